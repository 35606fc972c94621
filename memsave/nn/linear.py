"""The one memsave linear, for `nn.Linear` and for GPT-2's `Conv1D` (a linear whose weight is stored transposed).

x is (..., D), N rows; weight (O, D), or (D, O) for Conv1D; bias (O,); y (..., O); k kept rows.

It has three parts, which methods set and which compose:
- `keep`: how the input is kept for backward: itself | by the note that its maker attached (`note.py`), which is free |
  as sampled rows (`rows.py`: a `KeepRows`), themselves recomputed from the note where there is one;
- `weight_grad`: "dense", or "rows" (estimated from the sampled rows). A frozen weight needs no input at all. A block
  that runs again in backward may also have its linears draw rows there (`rerun.py`);
- `output`: itself, or lazy (`lazy_logits.py`: a `LazyOutput`), unless rows are sampled.
The output, the input's gradient and the bias's gradient are exact in every combination.
"""

from __future__ import annotations

import weakref
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from . import note as notes
from .converted import Converted, original_class
from .eager import no_autocast, once_differentiable, only_input, plain, product_dtype
from .grad_norms import GradNormCache, Visit, warn_of_compiler
from .lazy_logits import LazyOutput, lazy_linear
from .note import Recipe
from .rerun import BackwardDraw, asked_of
from .rows import KeepRows, Sample, draw_sample, kept_bytes, poison, sample_of


class ConvertedLinear(Converted):
    """`nn.Linear` or `Conv1D` with the parts named above; parameters, their names and the output are the original's."""

    weight: Tensor
    bias: Tensor | None

    @property
    def _transposed(self) -> bool:
        return not issubclass(self._memsave_base, nn.Linear)

    @property
    def _grad_norm_cache(self) -> GradNormCache | None:
        return self.__dict__.get("_memsave_grad_norms")

    def extra_repr(self) -> str:
        cache = self._grad_norm_cache
        return super().extra_repr() + (f", grad_norms: {cache.codes.nbytes} bytes" if cache is not None else "")

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        cache = self._grad_norm_cache
        if cache is not None and cache.saved and (codes := cache.state()).numel():
            destination[prefix + "grad_norms"] = codes if keep_vars else codes.clone()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        cache = self._grad_norm_cache
        if cache is not None and cache.saved and (codes := state_dict.pop(prefix + "grad_norms", None)) is not None:
            try:
                cache.load(codes)
            except ValueError as error:
                args[-1].append(f"{prefix}{error}")  # torch raises all that goes wrong together
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]

    def _keep_rows(self, num_rows: int) -> KeepRows | None:
        """The `keep` part, where it would keep fewer than all rows of a training step."""
        keep: KeepRows | None = self._memsave_parts.get("keep")
        if keep is None or not self.training or not self.weight.requires_grad:  # type: ignore[attr-defined]
            return None
        return keep if 0 < keep.num_rows(num_rows) < num_rows else None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x = only_input(self, args, kwargs)  # type: ignore[arg-type]
        compiling = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
        if x is None or (plain(x) and not compiling) or not self._fits(x):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        keep = self._keep_rows(prod(x.shape[:-1]))
        lazy: LazyOutput | None = self._memsave_parts.get("output")
        if lazy is not None and keep is None and not compiling and lazy.serves(self, x):  # type: ignore[arg-type]
            return lazy_linear(x, self.weight, self.bias)
        # Drawn in every training forward, also without gradients or when a sibling's sample is used: reentrant
        # checkpointing runs forward once without and once with gradients, and both must leave torch's random stream
        # in the same state.
        seed = ops.new_seed(x) if keep is not None else None
        cache = None if keep is None or compiling else self._grad_norm_cache
        visit = cache.visit(x, self) if cache is not None else None  # type: ignore[arg-type]
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return super().forward(x)  # type: ignore[misc]
        dtype = product_dtype(x, self.weight)
        if compiling:
            if keep is None:
                return super().forward(x)  # type: ignore[misc]
            settings = (keep.keep_ratio, keep.min_rows, keep.estimator, keep.grad_norms)
            return _sampled_linear(x, self.weight, self.bias, self._transposed, dtype, seed, *settings)
        note = notes.find(x)
        draw, unread = asked_of(self)  # type: ignore[arg-type]
        sample = None
        if keep is not None and seed is not None:
            sample = sample_of(id(self), x, keep, seed, dtype, noted=note is not None, visit=visit)
        elif note is not None:
            note.recipe.readers += 1
        elif draw is None and not unread:
            return super().forward(x)  # type: ignore[misc]
        sampled = (sample.tensors if sample else None) or ()
        kept = (*sampled, *(note.tensors if note else () if sampled else (x.detach(),)))
        # The context holds no tensor of the sample or the note, so that hooks can take them over.
        shared = _Shared(
            len(sampled),
            note.recipe if note else None,
            weakref.ref(sample) if sample else None,
            sample.visit if sample else None,
            None if sample else draw,
            unread,
        )
        return _Linear.apply(x, self.weight, self.bias, self._transposed, dtype, shared, *kept)

    def _fits(self, x: Tensor) -> bool:
        """Whether the original forward would accept x; where not, it raises its own error."""
        weight = self.weight
        autocast = torch.is_autocast_enabled(x.device.type) and x.is_floating_point() and x.dtype != torch.float64
        return (
            (autocast or x.dtype == weight.dtype) and x.dim() > 0 and x.shape[-1] == weight.shape[not self._transposed]
        )

    def reference(self, x: Tensor) -> Tensor:
        """The same function and, for the same random state, the same gradients, in plain autograd."""
        original = super().forward  # type: ignore[misc]
        keep = self._keep_rows(prod(x.shape[:-1]))
        if keep is None:
            return original(x)
        seed = ops.new_seed(x)
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return original(x)
        flat = x.detach().reshape(-1, x.shape[-1])  # (N, D)
        rows, scale = keep.draw(flat, seed)
        weight = self.weight.t() if self._transposed else self.weight  # (O, D)
        sampled = F.linear(flat[rows.long()] * scale[:, None].to(x.dtype), weight)  # (k, O)
        y = F.linear(x, weight.detach(), self.bias)
        # Adds zero to the output and the sampled rows' gradient to the weight.
        zero = torch.zeros_like(y).reshape(-1, y.shape[-1]).index_add(0, rows.long(), sampled - sampled.detach())
        return y + zero.view_as(y)

    def kept_bytes(self, input_shape: tuple[int, ...], dtype: torch.dtype, *, noted: bool = False) -> int:
        """Bytes that one training forward keeps, parameters not counted: see `rows.kept_bytes`.

        Not counted are the note's own tensors: the norm's input, which the norm keeps anyway, and a copy of its weight
        and bias.
        """
        if not self.weight.requires_grad:
            return 0
        keep = self._keep_rows(prod(input_shape[:-1]))
        return kept_bytes(input_shape, dtype, keep, noted=noted)


class _Shared(NamedTuple):
    """How many of the kept tensors are the sample's, and what siblings share; none of it holds a tensor of forward."""

    num_sampled: int
    recipe: Recipe | None = None
    sample: weakref.ref[Sample] | None = None
    visit: Visit | None = None
    draw: BackwardDraw | None = None
    unread: bool = False


class _Linear(torch.autograd.Function):
    """y = x W^T + b; keeps the weight itself (autocast's copy is made again in backward) and what `forward` was given.

    `kept` are first the sample's tensors (rows, scale, poison and, without a note, the kept rows), then the note's, or
    x where there is neither.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        transposed: bool,
        dtype: torch.dtype,
        shared: _Shared,
        *kept: Tensor,
    ) -> Tensor:
        ctx.transposed, ctx.dtype, ctx.shared = transposed, dtype, shared
        ctx.dtypes = (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, *kept)
        if shared.unread:
            return x.new_zeros((), dtype=dtype).expand(*x.shape[:-1], weight.shape[1 if transposed else 0])
        with no_autocast(x):
            w = weight.to(dtype)
            y = F.linear(x.to(dtype), w.t() if transposed else w, None if bias is None else bias.to(dtype))
        return y.detach()  # the same memory, and no view: it may be modified in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, *kept = ctx.saved_tensors
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        flat = dy.reshape(prod(dy.shape[:-1]), dy.shape[-1])  # (N, O)
        dx = dweight = dbias = None
        with no_autocast(dy):
            if ctx.needs_input_grad[0]:
                w = weight.to(ctx.dtype)
                dx = F.linear(dy, w if ctx.transposed else w.t()).to(x_dtype)
            if ctx.needs_input_grad[1]:
                dweight = _weight_grad(flat, ctx.dtype, ctx.shared, kept, ctx.transposed).to(weight_dtype)
            if ctx.needs_input_grad[2]:
                dbias = flat.sum(0).to(bias_dtype)
        return dx, dweight, dbias, *(None for _ in range(3 + len(kept)))


@torch.compiler.allow_in_graph  # dynamo cannot trace a Function that saves tensors of a computed size; AOT autograd can
def _sampled_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, dtype: torch.dtype, seed: Tensor, *keep: Any
) -> Tensor:
    """The sampled linear under a compiler: no notes, no siblings, no gradient norms; `keep` are `KeepRows`' fields."""
    settings = KeepRows(*keep)
    if settings.grad_norms == "sample_cache":
        warn_of_compiler()
    with torch.no_grad():
        sample = draw_sample(x.detach().reshape(-1, x.shape[-1]), settings, seed, dtype)
    return _Linear.apply(x, weight, bias, transposed, dtype, _Shared(len(sample)), *sample)


def _weight_grad(dy: Tensor, dtype: torch.dtype, shared: _Shared, tensors: list[Tensor], transposed: bool) -> Tensor:
    """dW (O, D), or (D, O) if transposed, from dy (N, O) and the tensors that were kept."""
    num_sampled, recipe, sample, visit, draw, _ = shared
    sampled, noted = tensors[:num_sampled], tensors[num_sampled:]
    if not sampled:
        x = (noted[0] if recipe is None else recipe.output(noted)).to(dtype)  # (..., D)
        x = x.reshape(-1, x.shape[-1])  # (N, D)
        if draw is None:
            return x.t() @ dy if transposed else dy.t() @ x
        dweight = draw.weight_grad(dy, x)
        return dweight.t() if transposed else dweight
    rows, scale, poisoned, *stored = sampled
    if sample is not None and (drawn := sample()) is not None:
        drawn.release()
    if visit is not None:
        visit.add(dy)
    kept = stored[0] if recipe is None else recipe.output_rows(noted, rows).to(dtype)  # (k, D)
    dweight = ops.sampled_matmul(dy, kept, rows, scale)
    dweight += poison(dy).to(dweight.dtype)[:, None]
    dweight += poisoned
    return dweight.t() if transposed else dweight


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is, or was before memsave, an `nn.Linear` or GPT-2 `Conv1D` with the forward of these."""
    cls = original_class(module)
    if issubclass(cls, nn.Linear):
        # MultiheadAttention reads the weight of its out_proj and never calls it.
        return cls.forward is nn.Linear.forward and cls is not nn.modules.linear.NonDynamicallyQuantizableLinear
    return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"
