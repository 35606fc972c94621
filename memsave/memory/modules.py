"""Which modules run: their parameters and buffers, and whose work an allocation is."""

from __future__ import annotations

import bisect
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .storages import module_tensors

# Names for what no running module allocated.
BEFORE, OUTSIDE, BACKWARD = "(made before)", "(outside modules)", "(backward)"


class OwnThread:
    """The thread that made this, with the threads that autograd runs backward in.

    torch's hooks of all modules and optimizers are called in every thread, and another one may train another model.
    """

    def __init__(self) -> None:
        self._id = threading.get_ident()

    def is_here(self) -> bool:
        return threading.get_ident() == self._id or torch._C._current_autograd_node() is not None


class ModuleWatch:
    """Tells, as a context, of the parameters and buffers of every `nn.Module` that runs, submodules included.

    Args:
        on_weight: called with each parameter and buffer: of a module and all its submodules when it first runs, of the
            module itself at each later run (a parameter may have been replaced), of all again at the end.
        on_enter: called with a module when it starts to run, after its weights.
        on_exit: called with a module when it is done, also after an exception.
    """

    def __init__(
        self,
        on_weight: Callable[[nn.Module, Tensor], None],
        on_enter: Callable[[nn.Module], None] | None = None,
        on_exit: Callable[[nn.Module], None] | None = None,
    ) -> None:
        self._on_weight, self._on_enter, self._on_exit = on_weight, on_enter, on_exit
        self._seen: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def __enter__(self) -> ModuleWatch:
        self._thread = OwnThread()
        hooks = torch.nn.modules.module
        self._handles = [
            hooks.register_module_forward_pre_hook(self._before),
            hooks.register_module_forward_hook(self._after, always_call=True),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for module in list(self._seen):
            self._report(module)

    def _before(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or not self._thread.is_here():
            return  # the compiler would trace this hook; the compiled module as a whole came here before
        for submodule in module.modules() if module not in self._seen else (module,):
            self._seen.add(submodule)
            self._report(submodule)
        if self._on_enter is not None:
            self._on_enter(module)

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._on_exit is not None and not torch.compiler.is_compiling() and self._thread.is_here():
            self._on_exit(module)

    def _report(self, module: nn.Module) -> None:
        for tensor in module_tensors(module):
            self._on_weight(module, tensor)


class ModuleNames:
    """Which module runs now, and which one's backward."""

    def __init__(self) -> None:
        self.running: list[nn.Module] = []
        self._names: Any = WeakIdKeyDictionary()
        self._roots = 0
        # Autograd numbers its nodes in order of creation: from self._starts[i] on they belong to self._owners[i].
        self._starts: list[int] = []
        self._owners: list[str] = []
        self._in_order = True

    def enter(self, module: nn.Module) -> None:
        if module not in self._names:
            self._add_root(module)
        self.running.append(module)
        self._mark()

    def exit(self, module: nn.Module) -> None:
        if module in self.running:
            while self.running.pop() is not module:
                pass
            self._mark()

    def name_of(self, module: nn.Module) -> str | None:
        """The name of a module, if one that has run is or holds it."""
        return self._names.get(module)

    def current(self, node: Any) -> str:
        """Name of the innermost running module, else of the module that made the autograd node that runs."""
        if self.running:
            return self._names[self.running[-1]]
        if node is None:
            return OUTSIDE
        if not self._in_order or is_accumulate_grad(node):
            return BACKWARD
        index = bisect.bisect_right(self._starts, node._sequence_nr()) - 1
        return self._owners[index] if index >= 0 else BACKWARD

    def _add_root(self, root: nn.Module) -> None:
        title = type(root).__name__
        prefix = f"{title}." if self._roots else ""
        self._roots += any(True for _ in root.children())
        for name, module in root.named_modules():
            self._names[module] = prefix + name if name else title

    def _mark(self) -> None:
        start = torch._C._autograd._get_sequence_nr()
        # Each thread has its own count; with modules running in several threads a number says nothing.
        self._in_order = self._in_order and (not self._starts or start >= self._starts[-1])
        self._starts.append(start)
        self._owners.append(self._names[self.running[-1]] if self.running else BACKWARD)


def is_accumulate_grad(node: Any) -> bool:
    """Whether an autograd node (or None) is one that adds to a leaf's `.grad`: no module's forward made it."""
    return node is not None and node.name().endswith("AccumulateGrad")
