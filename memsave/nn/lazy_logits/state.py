"""What lazy logits stand for: a call of the head, and the steps taken since. The rules say which steps need no values.

hidden is (..., D); logits (..., V). A step's form is a meta tensor: it knows shape, strides and dtype, and torch itself
raises the error of a step that does not fit. It is made outside of dispatch modes, which would count its bytes.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes


class Step(NamedTuple):
    """A step: `function` with all its arguments but the first, none of which is a tensor."""

    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, logits: Tensor, /) -> Tensor:
        return self.function(logits, *self.args, **self.kwargs)


class Call:
    """One call of the head: its inputs, and the modes under which it ran."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        autocast: Callable[[], AbstractContextManager[object]],
        grad_enabled: bool,
    ) -> None:
        self.inputs = (hidden, weight, bias)
        self.autocast = autocast
        self.grad_enabled = grad_enabled
        self.loss_computed = False
        self.signals: OrderedDict[int, Callable[[Tensor], Any]] = OrderedDict()
        """Hooks of torch's wrappers, which ask to be told when backward begins."""
        self._versions = self._now()

    def _now(self) -> tuple[int, ...]:
        return tuple(t._version for t in self.inputs if t is not None)

    def signal_from(self, tensor: Tensor) -> None:
        """Tell the wrappers when backward reaches `tensor`."""
        if tensor.requires_grad:
            for hook in self.signals.values():
                tensor.register_hook(hook)

    def check(self) -> None:
        """Raise RuntimeError if what the logits are made from is not there any more."""
        freed = not isinstance(self.inputs[1], FakeTensor) and (
            self.inputs[1].numel() and not self.inputs[1].untyped_storage().nbytes()
        )
        if freed or self._versions != self._now():
            what = "the head's weight was freed (sharded again)" if freed else "the head's weight or input was changed"
            raise RuntimeError(
                f"lazy logits: {what} after the model's forward, so its logits cannot be made any more. Read them "
                "before that (before optimizer.step(), before FSDP's unit ends), or take this off: "
                'memsave.restore_model(model, methods=["linear_cross_entropy"]). Nothing was changed.'
            )


@dataclass
class Whole:
    """One tensor that the plain model would hold: the logits, or a copy of them (a cast, a product).

    Args:
        steps: lead to it from the output of the head.
        tensor: the tensor itself, once it was needed.
    """

    steps: tuple[Step, ...] = ()
    tensor: Tensor | None = None


@dataclass(frozen=True)
class State:
    """What a handle stands for: `views` of a whole.

    Args:
        form: a meta tensor with the shape, strides and dtype.
        hidden: the hidden states (..., D) of its tokens, (..., V).
        scale, softcap: the logits are scale * z, or softcap * tanh(scale * z); z is the output of the head.
    """

    call: Call
    whole: Whole
    views: tuple[Step, ...]
    form: Tensor
    hidden: Tensor
    scale: float = 1.0
    softcap: float | None = None


class Replay(NamedTuple):
    """Makes logits from the inputs of the head; holds no tensor."""

    autocast: Callable[[], AbstractContextManager[object]]
    steps: tuple[Step, ...]

    def __call__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with self.autocast():
            logits = F.linear(hidden, weight, bias)
        for step in self.steps:
            logits = step(logits)
        return logits


def _form(func: Any, state: State, *args: Any, **kwargs: Any) -> Tensor:
    with _disable_current_modes():
        return cast(Tensor, func(state.form, *args, **kwargs))


def _reshaped(func: Any, state: State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> State | None:
    """view, reshape, flatten and contiguous, if the classes stay the last dimension."""
    form = _form(func, state, *args, **kwargs)
    if form.dim() == 0 or form.shape[-1] != state.form.shape[-1] or form.dtype != state.form.dtype:
        return None
    return replace(state, form=form, hidden=state.hidden.reshape(*form.shape[:-1], state.hidden.shape[-1]))


def _sliced(func: Any, state: State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> State | None:
    """Slices and numbers that choose tokens, with all classes of each."""
    key = args[0] if isinstance(args[0], tuple) else (args[0],)
    if not all(k is Ellipsis or isinstance(k, (int, slice)) and not isinstance(k, bool) for k in key):
        return None
    dims = state.form.dim()
    reaches_classes = len(key) - (Ellipsis in key) == dims or (Ellipsis in key and key[-1] is not Ellipsis)
    if reaches_classes and key[-1] != slice(None):
        return None
    return replace(state, form=_form(func, state, *args), hidden=state.hidden[args[0]])


def _cast(func: Any, state: State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> State | None:
    """float, half, bfloat16 and to(dtype); not to float64, in which the loss would be more exact than its logits."""
    given = (*args, *kwargs.values())
    if func.__name__ == "to" and not (len(given) == 1 and isinstance(given[0], torch.dtype)):
        return None
    form = _form(func, state, *args, **kwargs)
    return replace(state, form=form) if form.dtype in (state.form.dtype, *_CASTS) else None


def _scaled(func: Any, state: State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> State | None:
    """Multiplied or divided by a number."""
    if kwargs or len(args) != 1 or isinstance(args[0], bool) or not isinstance(args[0], (int, float)):
        return None
    factor = float(args[0])
    if not math.isfinite(factor) or factor == 0:
        return None
    factor = 1 / factor if "div" in func.__name__ else factor
    form = _form(func, state, *args)
    if state.softcap is not None:
        return replace(state, form=form, softcap=state.softcap * factor)
    return replace(state, form=form, scale=state.scale * factor)


def _tanh(func: Any, state: State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> State | None:
    """The tanh of a softcap."""
    return None if kwargs or state.softcap is not None else replace(state, form=_form(func, state), softcap=1.0)


_CASTS = (torch.float32, torch.bfloat16, torch.float16)
RULES: dict[str, Callable[..., State | None]] = {
    **dict.fromkeys(("view", "reshape", "flatten", "contiguous"), _reshaped),
    **dict.fromkeys(("float", "half", "bfloat16", "to"), _cast),
    **dict.fromkeys(("mul", "multiply", "div", "divide", "true_divide"), _scaled),
    "__getitem__": _sliced,
    "tanh": _tanh,
}
