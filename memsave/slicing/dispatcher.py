"""What stands in for a planned module's forward: it runs the plan where that is the same, and the original elsewhere.

It is kept as `forward` in the instance. The module tree, the classes and the parameters stay what they are.
"""

from __future__ import annotations

import copy
import itertools
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._C._functorch import maybe_current_level
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from ..errors import UnsupportedModelError
from .errors import CannotTrace
from .executor import run
from .fingerprint import Fingerprint, same, walk
from .plainly import is_collecting, runs_plainly, untouched
from .plan import Plan, make_plan
from .tracing import Traced, has_batch, read, trace

PLANNED = "planned"
GRADIENTS = "gradients are enabled"
_PLAIN = (Tensor, nn.Parameter, FakeTensor)


class Dispatcher:
    """The forward of one module.

    Attributes:
        module: whose forward it is.
        name: its qualified name in the model, for messages.
        settings: see `make_plan`.
        calls: how many calls ran by a plan, and why others did not.
        plans: by the shapes of a call; text where there can be none.
    """

    def __init__(self, module: nn.Module, name: str, settings: Mapping[str, Any]) -> None:
        self.module, self.name, self.settings = module, name, dict(settings)
        self.calls: Counter[str] = Counter()
        self.plans: dict[Any, Plan | str] = {}
        self._traces: dict[Any, Traced] = {}
        self._out_specs: dict[Any, pytree.TreeSpec] = {}  # by the shapes of a call, as the plans
        self._signature: Any = None
        self._seen: Fingerprint | None = None  # the module that the traces hold for
        self._readers: dict[int, list[tuple[str, dict[str, Any], str, Tensor]]] = {}
        self._warned = False

    def plan_for(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Plan:
        """The plan for calls like this one, which is what the module is planned for from here on.

        Raises:
            CannotTrace or UnsupportedModelError: there is none.
        """
        leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
        self._signature = _signature(self.module, leaves, spec)
        self._seen = Fingerprint(self.module)
        return self._make(leaves, args, kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or runs_plainly() or torch.jit.is_tracing():
            return type(self.module).forward(self.module, *args, **kwargs)  # in words that Dynamo understands
        leaves, spec = pytree.tree_flatten((args, kwargs))
        reason = self._why_plain(leaves, spec)
        if reason is None:
            plan = self._find(leaves, args, kwargs)
            if isinstance(plan, Plan) and (tensors := self._tensors(plan)) is not None:
                self.calls[PLANNED] += 1
                return pytree.tree_unflatten(run(plan.program, leaves, tensors), self._out_specs[_shapes(leaves)])
            reason = plan if isinstance(plan, str) else "the parameters have other shapes, dtypes or devices by now"
        self.calls[reason] += 1
        if reason == GRADIENTS and not self._warned:
            self._warned = True
            warnings.warn(
                f"memsave: {self.name or 'the model'} runs without its plan while gradients are enabled, in the memory "
                "of the plain module; call it under torch.inference_mode() or torch.no_grad()",
                stacklevel=3,
            )
        return self.original(*args, **kwargs)

    @property
    def original(self) -> Callable[..., Any]:
        """The module's own forward."""
        return types.MethodType(type(self.module).forward, self.module)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return self.original  # for inspect.signature

    @property
    def __code__(self) -> Any:
        return self.original.__code__  # for torch.export

    def _why_plain(self, leaves: Sequence[Any], spec: Any) -> str | None:
        if any(isinstance(x, fx.Proxy) for x in leaves):
            return "it was traced"
        if maybe_current_level() is not None or forward_ad._current_level >= 0:
            return "a transform of torch.func or forward-mode AD is active"
        if torch.is_grad_enabled() and (_requires_grad(leaves) or _requires_grad(self.module.parameters())):
            return GRADIENTS
        if any(torch.is_autocast_enabled(kind) for kind in {x.device.type for x in leaves if isinstance(x, Tensor)}):
            return "autocast is enabled"
        if any(type(x) not in _PLAIN for x in leaves if isinstance(x, Tensor)):
            return "an argument is a tensor of another class"
        if self._signature is None:
            self._signature = _signature(self.module, leaves, spec)
        if not same(_signature(self.module, leaves, spec), self._signature):
            return "it was called with other arguments than planned"
        return self._why_modules()

    def _why_modules(self) -> str | None:
        """Whether the modules within are what they were, in evaluation, and watched by nobody."""
        tree = tuple(walk(self.module))
        if self._seen is None or not self._seen.holds(tree):
            self._forget()  # modules or their settings were changed: what was traced holds no more
            self._seen = Fingerprint(self.module)
        for module in tree:
            if module.training:
                return "a module is in training mode"
            if module is not self.module and (watcher := _watcher(module)):
                return watcher
        return None

    def _forget(self) -> None:
        self.plans.clear()
        self._traces.clear()
        self._out_specs.clear()
        self._readers.clear()

    def _find(self, leaves: list[Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Plan | str:
        key = _shapes(leaves)
        if key not in self.plans:
            try:
                self._make(leaves, args, kwargs)
            except (CannotTrace, UnsupportedModelError) as error:
                if not all(isinstance(p, nn.Parameter) for p in self.module.parameters()):
                    return "torch.func.functional_call stands in for its parameters, for shapes without a plan"
                self.plans[key] = f"no plan for these shapes: {error}"
                warnings.warn(f"memsave: {self.name or 'the model'}: {self.plans[key]}; it runs plainly", stacklevel=4)
        return self.plans[key]

    def _make(self, leaves: list[Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Plan:
        shapes, kinds = _shapes(leaves), _kinds(self.module)
        for key in ((_shapes(leaves, any_batch=True), kinds), (shapes, kinds)):
            if traced := self._traces.get(key):
                break
        else:
            with _own_forward(self.module):
                traced = trace(self.module, args, kwargs)
            self._traces[_shapes(leaves, any_batch=traced.batch_varies), kinds] = traced
        with _own_forward(self.module):
            plan = make_plan(traced, self.module, leaves, name=self.name, **self.settings)
        plan.calls = self.calls
        self.plans[shapes], self._out_specs[shapes] = plan, traced.out_spec
        return plan

    def _tensors(self, plan: Plan) -> dict[str, Tensor] | None:
        """The parameters and buffers that the plan reads, as they are now; None if they are of another kind."""
        readers = self._readers.get(id(plan))
        if readers is None:
            readers = []
            for name, kind in plan.program.kinds.items():
                holder, key = read(self.module, name)
                readers.append((name, holder, key, kind))
            self._readers[id(plan)] = readers
        found = {}
        for name, holder, key, kind in readers:
            tensor = holder.get(key)
            if tensor is None or (tensor.shape, tensor.dtype, tensor.device) != (kind.shape, kind.dtype, kind.device):
                return None
            found[name] = tensor
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> Dispatcher:
        copied = type(self)(copy.deepcopy(self.module, memo), self.name, self.settings)
        for key, plan in self.plans.items():
            copied.plans[key] = replace(plan, calls=copied.calls) if isinstance(plan, Plan) else plan
        copied._traces, copied._out_specs = dict(self._traces), dict(self._out_specs)
        copied._signature, copied._seen = self._signature, copy.deepcopy(self._seen, memo)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "name": self.name, "settings": self.settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.calls, self.plans, self._traces, self._out_specs, self._readers = Counter(), {}, {}, {}, {}
        self._signature, self._warned, self._seen = None, False, None


@contextmanager
def _own_forward(module: nn.Module) -> Iterator[None]:
    """Within it, `module` has no stand-in, and no hooks, which are called around the plan."""
    standing_in = module.__dict__.pop("forward", None)
    try:
        with untouched(module):
            yield
    finally:
        if standing_in is not None:
            module.__dict__["forward"] = standing_in


def _watcher(module: nn.Module) -> str | None:
    """Why the calls of a module within must really happen, or None."""
    if "forward" in module.__dict__ and not isinstance(module.__dict__["forward"], Dispatcher):
        return "the forward of a module within was replaced"
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for hook in hooks.values():
            if not is_collecting(hook):
                return "hooks watch a module within"
            if hook.__globals__["_active_collector"].get():
                return "outputs of modules within are collected"
    return None


def _requires_grad(tensors: Any) -> bool:
    return any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


def _signature(module: nn.Module, leaves: Sequence[Any], spec: Any) -> Any:
    """What a call must share with the planned one: its structure, and all that is no tensor."""
    config = getattr(getattr(module, "config", None), "__dict__", {})
    return spec, [None if isinstance(x, Tensor) else x for x in leaves], dict(config)


def _shapes(leaves: Sequence[Any], *, any_batch: bool = False) -> Any:
    """The kinds of the tensors of a call; `any_batch`: for all batches of two and more."""

    def shape(x: Tensor) -> Any:
        many = any_batch and has_batch(x) and x.shape[0] > 1
        return ("many", *x.shape[1:]) if many else tuple(x.shape)

    return tuple((shape(x), x.stride(), x.dtype, x.device) for x in leaves if isinstance(x, Tensor))


def _kinds(module: nn.Module) -> Any:
    """The shapes, dtypes and devices of the parameters and buffers, which a forward may look at."""
    return tuple((x.shape, x.dtype, x.device) for x in itertools.chain(module.parameters(), module.buffers()))
