"""Lazy logits: what the head of a language model returns so that its loss never needs the logits of all tokens.

hidden is (..., D); logits (..., V); N tokens.

A `LazyLogits` has the shape, dtype and device of the logits, but no values. It remembers what the head was called with
and the steps taken since: reshaping, slices over tokens, casts, multiplication by a number, tanh (a softcap). Where
`F.cross_entropy` gets one, `linear_cross_entropy` computes the loss from the hidden states.

Everything else needs the values. Then the head and the steps run as they would have, and the object turns into an
ordinary tensor (`torch.utils.swap_tensors`), so that whoever holds it sees the same writes. Views that were taken
before become views of it. Where torch refuses the swap, the values stand for the object in every later call.

A custom `autograd.Function` takes tensors without asking `__torch_function__`. For those, the object has a node of its
own in autograd's graph, which makes the logits again in backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.hooks import RemovableHandle

from .eager import autocast_now, once_differentiable, product_dtype
from .linear_cross_entropy import CHUNK_BYTES, linear_cross_entropy

Step = Callable[[Tensor], Tensor]


class LazyOutput(NamedTuple):
    """The part `output` of a linear: from how many bytes of logits on they are lazy."""

    min_logits_bytes: int

    def serves(self, head: nn.Module, x: Tensor) -> bool:
        """Whether the logits of x (..., D) are better lazy: their loss then keeps fewer bytes, and time is not lost.

        Not where the weight may be gone when the loss is computed: sharded by tensors (DTensor), by a unit of the head
        alone (FSDP2), by a flat parameter (FSDP1) or by ZeRO-3.
        """
        weight: Tensor = head.weight  # type: ignore[assignment]
        if not all(type(t) in (Tensor, nn.Parameter, FakeTensor) or isinstance(t, FakeTensor) for t in (x, weight)):
            return False
        if not isinstance(weight, nn.Parameter) or hasattr(weight, "ds_id") or x.is_inference() or x.is_meta:
            return False
        if any(cls.__name__ == "FSDPModule" for cls in type(head).__mro__):
            return False
        num_classes, features = weight.shape
        num_tokens = x.numel() // max(features, 1)
        dtype = product_dtype(x, weight)
        loss_itemsize = max(dtype.itemsize, torch.float32.itemsize)
        logits_bytes = num_tokens * num_classes * loss_itemsize
        if not torch.is_grad_enabled() or not (x.requires_grad or weight.requires_grad):
            return logits_bytes > max(CHUNK_BYTES, self.min_logits_bytes)
        # The hidden states, as long as the logits are held, and the gradients that the loss makes in forward.
        kept_bytes = num_tokens * features * dtype.itemsize * (1 + x.requires_grad)
        if weight.requires_grad:
            kept_bytes += num_classes * (features + 1) * loss_itemsize
        return logits_bytes >= self.min_logits_bytes and kept_bytes < logits_bytes


def lazy_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> LazyLogits:
    """The lazy F.linear(x, weight, bias); x (..., D), weight (V, D), bias (V,)."""
    context = autocast_now(x) if torch.amp.is_autocast_available(x.device.type) else nullcontext
    call = _Call(x, weight, bias, context, torch.is_grad_enabled())
    form = torch.empty(*x.shape[:-1], weight.shape[0], dtype=product_dtype(x, weight), device="meta")
    return _new(_State(call, _Whole(), (), form, x))


class _Call:
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
        self.signals: list[Callable[[Tensor], Any]] = []
        """Hooks of torch's wrappers, which ask to be told when backward begins."""
        self._versions = self._now()

    def _now(self) -> tuple[int, ...]:
        return tuple(t._version for t in self.inputs if t is not None)

    def signal_from(self, tensor: Tensor) -> None:
        """Tell the wrappers when backward reaches `tensor`."""
        if tensor.requires_grad:
            for hook in self.signals:
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
class _Whole:
    """One tensor that the plain model would hold: the logits, or a copy of them (a cast, a product).

    Args:
        steps: lead to it from the output of the head.
        tensor: the tensor itself, once it was needed.
    """

    steps: tuple[Step, ...] = ()
    tensor: Tensor | None = None


@dataclass(frozen=True)
class _State:
    """What a handle stands for: `views` of a whole.

    Args:
        form: a meta tensor with the shape, strides and dtype.
        hidden: the hidden states (..., D) of its tokens, (..., V).
        scale, softcap: the logits are scale * z, or softcap * tanh(scale * z); z is the output of the head.
    """

    call: _Call
    whole: _Whole
    views: tuple[Step, ...]
    form: Tensor
    hidden: Tensor
    scale: float = 1.0
    softcap: float | None = None


class _Replay(NamedTuple):
    """Makes logits from the inputs of the head; holds no tensor."""

    autocast: Callable[[], AbstractContextManager[object]]
    steps: tuple[Step, ...]

    def __call__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with self.autocast():
            logits = F.linear(hidden, weight, bias)
        for step in self.steps:
            logits = step(logits)
        return logits


class _Taken(NamedTuple):
    """A step: `function` with all its arguments but the first, none of which is a tensor."""

    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, logits: Tensor) -> Tensor:
        return self.function(logits, *self.args, **self.kwargs)


class LazyLogits(Tensor):
    """A tensor of logits whose values are made when something other than `F.cross_entropy` needs them."""

    _lazy: _State
    _made: Tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is F.cross_entropy:
            answer = _loss(*args, **kwargs)
        elif func in _WATCHERS:
            answer = _watch(func, args, kwargs)
        else:
            answer = _lazily(func, args, kwargs)
        if answer is not None:
            return answer
        args, kwargs = tree_map_only(LazyLogits, ordinary, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """For callers that do not ask `__torch_function__`: autograd uses the handle's node, so the values are bare."""
        args, kwargs = tree_map_only(LazyLogits, lambda handle: _value(handle).detach(), (args, kwargs or {}))
        return func(*args, **kwargs)


def _new(state: _State) -> LazyLogits:
    handle: LazyLogits = _Node.apply(*state.call.inputs, state)
    handle._lazy = state
    return handle


class _Node(torch.autograd.Function):
    """The handle in autograd's graph, for those that use it without `__torch_function__`; backward replays all."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, state: _State) -> LazyLogits:
        ctx.replay = _Replay(state.call.autocast, (*state.whole.steps, *state.views))
        ctx.form = (hidden.shape, hidden.dtype)
        # Without tanh, no gradient but the weight's depends on hidden.
        needs_hidden = ctx.needs_input_grad[1] or state.softcap is not None
        ctx.save_for_backward(hidden if needs_hidden else None, weight, bias)
        form = state.form
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            LazyLogits, form.shape, strides=form.stride(), dtype=form.dtype, device=hidden.device
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        if hidden is None:
            hidden = torch.zeros(ctx.form[0], dtype=ctx.form[1], device=weight.device)
        needed = ctx.needs_input_grad[:3]
        with torch.enable_grad():
            inputs = [
                None if t is None else t.detach().requires_grad_(n)
                for t, n in zip((hidden, weight, bias), needed, strict=True)
            ]
            logits = ctx.replay(*inputs)
        gradients = iter(torch.autograd.grad(logits, [t for t in inputs if t is not None and t.requires_grad], dy))
        return *(next(gradients) if n else None for n in needed), None


def ordinary(handle: LazyLogits) -> Tensor:
    """The handle as an ordinary tensor with the logits: the same object, where torch allows that."""
    if type(handle) is not LazyLogits:
        return handle  # it became one as an earlier argument of the same call
    whole = handle._lazy.whole
    tensor = _value(handle)
    attributes = {k: v for k, v in handle.__dict__.items() if k not in ("_lazy", "_made")}
    try:
        torch.utils.swap_tensors(handle, tensor)
    except RuntimeError:  # someone holds it in C++ or by a weak reference; `_made` goes on standing for it
        return tensor
    tensor.__dict__.clear()
    handle.__dict__.update(attributes)
    if whole.tensor is tensor:
        whole.tensor = handle
    return handle


def _value(handle: LazyLogits) -> Tensor:
    """The logits of the handle, made once. Views of one whole share its memory."""
    if "_made" not in handle.__dict__:
        state = handle._lazy
        with torch.inference_mode(False):
            if _is_ours(handle):
                with torch.set_grad_enabled(state.call.grad_enabled):
                    handle._made = _made(state)
            else:
                with torch.enable_grad():
                    handle._made = _Values.apply(handle, state)
    return cast(Tensor, handle._made)


def _made(state: _State) -> Tensor:
    """The logits that `state` stands for, with their history."""
    call, whole = state.call, state.whole
    if whole.tensor is None:
        call.check()
        tensor = whole.tensor = _Replay(call.autocast, whole.steps)(*call.inputs)
        call.signal_from(tensor)
    else:
        tensor = whole.tensor.view_as(whole.tensor)
    for view in state.views:
        tensor = view(tensor)
    return tensor


class _Values(torch.autograd.Function):
    """The values of a handle that an `autograd.Function` returned, such as a checkpoint: its gradient goes there."""

    @staticmethod
    def forward(ctx: Any, handle: LazyLogits, state: _State) -> Tensor:
        return _made(state).detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return dy, None


def _is_ours(handle: LazyLogits) -> bool:
    """Whether the handle is in autograd's graph where `_new` put it."""
    with torch._C.DisableTorchFunctionSubclass():
        node = handle.grad_fn
        return not handle.requires_grad if node is None else isinstance(node, _Node._backward_cls)  # type: ignore[attr-defined]


def _is_lazy(handle: object) -> bool:
    """Whether nobody needed the values of what `handle` belongs to yet."""
    return type(handle) is LazyLogits and handle._lazy.whole.tensor is None and _is_ours(handle)


def _loss(
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """`F.cross_entropy` from the hidden states, or None where it needs the logits (or raises an error)."""
    if not _is_lazy(input) or not isinstance(target, Tensor):
        return None
    state, call = input._lazy, input._lazy.call
    usual = weight is None and size_average is None and reduce is None and reduction in ("mean", "sum", "none")
    fits = target.dtype == torch.int64 and input.dim() == 2 and target.shape == input.shape[:1]
    if not (usual and fits and target.device == input.device and 0 <= label_smoothing <= 1):
        return None
    if state.softcap is not None and state.softcap <= 0:
        return None
    call.check()
    scale = state.scale * (1.0 if state.softcap is None else state.softcap)
    _, head_weight, bias = call.inputs
    options: dict[str, Any] = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    with call.autocast():
        hidden = state.hidden if scale == 1 else state.hidden * scale
        bias = bias if bias is None or scale == 1 else bias * scale
        loss = linear_cross_entropy(
            hidden, head_weight, target, bias, softcap=state.softcap, reduction=reduction, **options
        )
    call.loss_computed = True
    call.signal_from(cast(Tensor, loss))
    return cast(Tensor, loss).to(_loss_dtype(input))


def _loss_dtype(logits: Tensor) -> torch.dtype:
    """The dtype of `F.cross_entropy` of `logits`, which autocast may change."""
    if logits.dtype in (torch.float32, torch.float64):
        return logits.dtype
    sample = torch.zeros(1, 1, dtype=logits.dtype, device=logits.device)
    return F.cross_entropy(sample, torch.zeros(1, dtype=torch.int64, device=logits.device)).dtype


def _watch(func: Any, args: Any, kwargs: Any) -> RemovableHandle | None:
    """Someone wants the gradient of the logits: None where the logits can still be made for it.

    torch's own wrappers (FSDP2) do not: they hook every output to be told when backward begins.
    """
    lazy = [leaf._lazy.call for leaf in tree_leaves((args, kwargs)) if _is_lazy(leaf)]
    hook = args[1] if func is Tensor.register_hook and len(args) > 1 else None
    if lazy and str(getattr(hook, "__module__", "")).startswith("torch.distributed."):
        lazy[0].signals.append(hook)
        return RemovableHandle({})
    if any(call.loss_computed for call in lazy):
        raise RuntimeError(
            f"{func.__name__}: the gradient of these logits is never made, because their loss was computed without "
            "them. Call it before the loss is computed, or take lazy logits off: "
            'memsave.restore_model(model, methods=["linear_cross_entropy"]). Nothing was changed.'
        )
    return None


def _lazily(func: Any, args: Any, kwargs: Any) -> LazyLogits | None:
    """The handle of what `func` makes of the handle args[0], or None where that needs the values."""
    rule = _RULES.get(getattr(func, "__name__", ""))
    if rule is None or not args or not _is_lazy(args[0]):
        return None
    handle, rest = args[0], tuple(args[1:])
    state: _State = handle._lazy
    if torch.is_grad_enabled() != state.call.grad_enabled:
        return None
    if any(isinstance(leaf, Tensor) for leaf in tree_leaves((rest, kwargs))):
        return None
    changed = rule(func, state, rest, kwargs)
    if changed is None:
        return None
    step = _Taken(func, rest, kwargs)
    if changed.form is state.form:
        return cast(LazyLogits, handle)
    if changed.form.untyped_storage()._cdata == state.form.untyped_storage()._cdata:
        return _new(replace(changed, views=(*state.views, step)))
    return _new(replace(changed, whole=_Whole((*state.whole.steps, *state.views, step)), views=()))


def _reshaped(func: Any, state: _State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _State | None:
    """view, reshape, flatten and contiguous, if the classes stay the last dimension."""
    form = func(state.form, *args, **kwargs)
    if form.dim() == 0 or form.shape[-1] != state.form.shape[-1] or form.dtype != state.form.dtype:
        return None
    return replace(state, form=form, hidden=state.hidden.reshape(*form.shape[:-1], state.hidden.shape[-1]))


def _sliced(func: Any, state: _State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _State | None:
    """Slices and numbers that choose tokens, with all classes of each."""
    key = args[0] if isinstance(args[0], tuple) else (args[0],)
    if not all(k is Ellipsis or isinstance(k, (int, slice)) and not isinstance(k, bool) for k in key):
        return None
    dims = state.form.dim()
    reaches_classes = len(key) - (Ellipsis in key) == dims or (Ellipsis in key and key[-1] is not Ellipsis)
    if reaches_classes and key[-1] != slice(None):
        return None
    return replace(state, form=func(state.form, *args), hidden=state.hidden[args[0]])


def _cast(func: Any, state: _State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _State | None:
    """float, half, bfloat16 and to(dtype); not to float64, in which the loss would be more exact than its logits."""
    given = (*args, *kwargs.values())
    if func.__name__ == "to" and not (len(given) == 1 and isinstance(given[0], torch.dtype)):
        return None
    form = func(state.form, *args, **kwargs)
    return replace(state, form=form) if form.dtype in (state.form.dtype, *_CASTS) else None


def _scaled(func: Any, state: _State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _State | None:
    """Multiplied or divided by a number."""
    if kwargs or len(args) != 1 or isinstance(args[0], bool) or not isinstance(args[0], (int, float)):
        return None
    factor = float(args[0])
    if not math.isfinite(factor) or factor == 0:
        return None
    factor = 1 / factor if "div" in func.__name__ else factor
    form = func(state.form, *args)
    if state.softcap is not None:
        return replace(state, form=form, softcap=state.softcap * factor)
    return replace(state, form=form, scale=state.scale * factor)


def _tanh(func: Any, state: _State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _State | None:
    """The tanh of a softcap."""
    return None if kwargs or state.softcap is not None else replace(state, form=func(state.form), softcap=1.0)


_CASTS = (torch.float32, torch.bfloat16, torch.float16)
_RULES: dict[str, Callable[..., _State | None]] = {
    **dict.fromkeys(("view", "reshape", "flatten", "contiguous"), _reshaped),
    **dict.fromkeys(("float", "half", "bfloat16", "to"), _cast),
    **dict.fromkeys(("mul", "multiply", "div", "divide", "true_divide"), _scaled),
    "__getitem__": _sliced,
    "tanh": _tanh,
}
_WATCHERS = {Tensor.register_hook, Tensor.retain_grad, torch.autograd.grad}
_METADATA = {
    *(Tensor.shape.__get__, Tensor.ndim.__get__, Tensor.dtype.__get__, Tensor.device.__get__, Tensor.layout.__get__),  # type: ignore[attr-defined]
    *(Tensor.requires_grad.__get__, Tensor.is_leaf.__get__, Tensor.itemsize.__get__, Tensor.nbytes.__get__),  # type: ignore[attr-defined]
    *(Tensor.is_cpu.__get__, Tensor.is_cuda.__get__, Tensor.is_xpu.__get__, Tensor.is_mps.__get__),  # type: ignore[attr-defined]
    *(Tensor.is_meta.__get__, Tensor.is_sparse.__get__, Tensor.is_nested.__get__, Tensor.is_quantized.__get__),  # type: ignore[attr-defined]
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.stride),
    *(Tensor.is_contiguous, Tensor.is_floating_point, Tensor.is_complex, Tensor.get_device, Tensor.is_inference),
    *(Tensor.__len__, Tensor.__hash__, torch.numel, torch.is_floating_point, torch.is_complex),
}
