"""The tensor subclass: which calls it answers without values, and how it turns into an ordinary tensor for the rest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.hooks import RemovableHandle

from ..eager import once_differentiable
from ..linear_cross_entropy import linear_cross_entropy
from .state import RULES, Replay, State, Step, Whole


class LazyLogits(Tensor):
    """A tensor of logits whose values are made when something other than `F.cross_entropy` needs them."""

    _lazy: State
    _made: Tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """For callers that do not ask `__torch_function__`: autograd uses the handle's node, so the values are bare."""
        args, kwargs = tree_map_only(LazyLogits, lambda handle: _value(handle).detach(), (args, kwargs or {}))
        return func(*args, **kwargs)


@torch.compiler.disable  # a compiled function that is given a handle runs what it does with that in eager mode
def _call(func: Any, args: Any, kwargs: Any) -> Any:
    """`func` with handles among its arguments."""
    if func in _METADATA:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    answer: Any
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


def new_handle(state: State) -> LazyLogits:
    handle: LazyLogits = _Node.apply(*state.call.inputs, state)
    handle._lazy = state
    return handle


class _Node(torch.autograd.Function):
    """The handle in autograd's graph, for those that use it without `__torch_function__`; backward replays all."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, state: State) -> LazyLogits:
        ctx.replay = Replay(state.call.autocast, (*state.whole.steps, *state.views))
        ctx.form = (hidden.shape, hidden.dtype)
        # Without tanh, no gradient but the weight's depends on hidden.
        needs_hidden = ctx.needs_input_grad[1] or state.softcap is not None
        ctx.save_for_backward(hidden if needs_hidden else None, weight, bias)
        form = state.form
        return Tensor._make_wrapper_subclass(
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
    return handle._made


def _made(state: State) -> Tensor:
    """The logits that `state` stands for, with their history."""
    call, whole = state.call, state.whole
    if whole.tensor is None:
        call.check()
        tensor = whole.tensor = Replay(call.autocast, whole.steps)(*call.inputs)
        call.signal_from(tensor)
    else:
        tensor = whole.tensor.view_as(whole.tensor)
    for view in state.views:
        tensor = view(tensor)
    return tensor


class _Values(torch.autograd.Function):
    """The values of a handle that an `autograd.Function` returned, such as a checkpoint: its gradient goes there."""

    @staticmethod
    def forward(ctx: Any, handle: LazyLogits, state: State) -> Tensor:
        return _made(state).detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


def _is_ours(handle: LazyLogits) -> bool:
    """Whether the handle is in autograd's graph where `_new` put it."""
    with torch._C.DisableTorchFunctionSubclass():
        node = handle.grad_fn
        return not handle.requires_grad if node is None else isinstance(node, _Node._backward_cls)


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
        removable = RemovableHandle(lazy[0].signals)
        lazy[0].signals[removable.id] = hook
        return removable
    if any(call.loss_computed for call in lazy):
        raise RuntimeError(
            f"{func.__name__}: the gradient of these logits is never made, because their loss was computed without "
            "them. Call it before the loss is computed, or take lazy logits off: "
            'memsave.restore_model(model, methods=["linear_cross_entropy"]). Nothing was changed.'
        )
    return None


def _lazily(func: Any, args: Any, kwargs: Any) -> LazyLogits | None:
    """The handle of what `func` makes of the handle args[0], or None where that needs the values."""
    rule = RULES.get(getattr(func, "__name__", ""))
    if rule is None or not args or not _is_lazy(args[0]):
        return None
    handle, rest = args[0], tuple(args[1:])
    state: State = handle._lazy
    if torch.is_grad_enabled() != state.call.grad_enabled:
        return None
    if any(isinstance(leaf, Tensor) for leaf in tree_leaves((rest, kwargs))):
        return None
    changed = rule(func, state, rest, kwargs)
    if changed is None:
        return None
    step = Step(func, rest, kwargs)
    if changed.form is state.form:
        return cast(LazyLogits, handle)
    if changed.form.untyped_storage()._cdata == state.form.untyped_storage()._cdata:
        return new_handle(replace(changed, views=(*state.views, step)))
    return new_handle(replace(changed, whole=Whole((*state.whole.steps, *state.views, step)), views=()))


_WATCHERS = {Tensor.register_hook, Tensor.retain_grad, torch.autograd.grad}
_ATTRIBUTES = (
    *("shape", "ndim", "dtype", "device", "layout", "itemsize", "nbytes", "requires_grad", "is_leaf", "_base"),
    *("is_cpu", "is_cuda", "is_xpu", "is_mps", "is_meta", "is_sparse", "is_nested", "is_quantized"),
)
_METADATA = {
    *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES),
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.stride),
    *(Tensor.is_contiguous, Tensor.is_floating_point, Tensor.is_complex, Tensor.get_device, Tensor.is_inference),
    *(Tensor.__len__, Tensor.__hash__, torch.numel, torch.is_floating_point, torch.is_complex),
}
