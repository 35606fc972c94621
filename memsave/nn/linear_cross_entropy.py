"""Linear layer and cross entropy in one, without the logits of all tokens at once: chunks of tokens, one after another.

hidden is (..., D); weight (V, D); bias (V,); target (...). N tokens count, those whose target is not `ignore_index`:
the others never reach a matrix product. A chunk has C tokens; its logits z (C, V) become their own gradient in place.

For token i with target t, in float32 (float64 for float64 inputs), eps = label_smoothing:

    lse_i  = logsumexp(z_i)
    loss_i = lse_i - (1 - eps) z_it - eps mean(z_i) + z_loss lse_i^2
    d loss_i / d z_ij = (1 + 2 z_loss lse_i) softmax(z_i)_j - (1 - eps) [j = t] - eps / V

A mean or a sum has one upstream gradient, a factor, so the gradients are made in forward from the logits that are
there anyway: three matrix products, as in the plain loss. Losses per token have an upstream gradient each, which only
backward knows: backward makes the logits again, a fourth product, and forward keeps only logsumexp.

With a process group, each process has V_r of the classes. What a token's loss needs of the other processes is four
numbers. A mean or a sum needs them chunk by chunk, before the chunk's logits are overwritten: a small message per chunk
costs less than making all logits twice. Losses per token need them once, at the end of forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .. import ops
from .eager import autocast_enabled, no_autocast, once_differentiable, plain, product_dtype
from .vocabulary import Statistics, Vocabulary

CHUNK_BYTES = 64 * 2**20
MIN_TOKENS_PER_PASS = 512  # over the gradient of the weight
_UNSHARD = "call it where FSDP has gathered the weight (in its unit's forward), or pass to_local() and process_group"
Chunk = slice | Tensor  # what selects a chunk's tokens among all


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    reduction: str = "mean",
    return_logsumexp: bool = False,
    process_group: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross entropy of `hidden @ weight.T + bias`, without ever holding these logits for all tokens.

    The same loss and gradients, up to rounding, as `F.cross_entropy` of the logits in float32. A loss per token is

        cross entropy of softcap * tanh(logits / softcap) + z_loss * logsumexp of the same, squared

    and zero where the target is `ignore_index`. "mean" divides the sum by the number of the other tokens: NaN if there
    are none, as in torch. Under a compiler, a tracer or functorch the plain operators run, with all logits.

    Args:
        hidden: (..., D), floating point.
        weight: (V, D), in the dtype of `hidden`; under autocast, both are cast as `F.linear` casts them.
        target: (...), int64, classes in [0, V) or `ignore_index`.
        bias: (V,), in the dtype of `weight`.
        ignore_index: targets of this value count for nothing, and cost nothing.
        label_smoothing: share of the target that is spread evenly over all classes, in [0, 1].
        softcap: bound of the logits' absolute values, above 0; None for no bound.
        z_loss: factor of the squared logsumexp, at least 0.
        reduction: "mean", "sum" or "none".
        return_logsumexp: return also the logsumexp (...) of every token's logits, zero where ignored. It can be
            differentiated; for that, backward makes the logits once more, as it does for the reduction "none".
        process_group: processes that each hold some rows of the weight and of the bias, in the order of their ranks and
            any number of them. All else must be the same on all of them, also which inputs require a gradient; this
            is not checked, and where a shape or an option differs they may wait for each other for ever. The results
            and the gradient of `hidden` are the same on all processes; those of weight and bias are of the rows here.

    Returns:
        The loss: a scalar, or (...) for "none"; float32, or float64 for float64 inputs.

    Raises:
        ValueError: a shape, dtype, device or option does not fit; a DTensor; a process group under a compiler.
        IndexError: a target is out of range, on every process alike.
        RuntimeError: in backward, where its result is differentiated again.

    Sources: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024 (never all logits); Hsu et al.,
    "Liger Kernel", 2024 (gradients in forward); Yeung et al., "Balancing Pipeline Parallelism with Vocabulary
    Parallelism", 2024 (classes divided over processes).
    """
    _check(hidden, weight, target, bias, ignore_index, label_smoothing, softcap, z_loss, reduction)
    if plain(hidden):
        if process_group is not None:
            raise ValueError(
                "linear_cross_entropy: a process group was given under torch.compile, a tracer or torch.func, expected "
                "eager mode; call it outside of what is compiled. Nothing was changed."
            )
        s = _Settings(label_smoothing, softcap, z_loss, product_dtype(hidden, weight), Vocabulary.of(weight, None))
        loss, lse, counts = _plain_losses(hidden, weight, target, bias, ignore_index, s)
        reduced = _reduce(loss, counts.sum(), reduction)
        return (reduced, lse) if return_logsumexp else reduced
    vocabulary = Vocabulary.of(weight, process_group)
    s = _Settings(label_smoothing, softcap, z_loss, product_dtype(hidden, weight), vocabulary)
    flat, targets = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)  # (N, D), (N,)
    rows = _counting_rows(targets, ignore_index, vocabulary.num_classes)
    num_tokens = targets.numel() if rows is None else rows.numel()
    tensors = (flat, weight, bias)
    trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if trains and reduction != "none" and not return_logsumexp:
        return _ReducedLoss.apply(*tensors, targets, rows, s, num_tokens if reduction == "mean" else None)
    loss, lse = _LossPerToken.apply(*tensors, targets, rows, s)
    reduced = _reduce(loss.view(target.shape), num_tokens, reduction)
    return (reduced, lse.view(target.shape)) if return_logsumexp else reduced


class _Settings(NamedTuple):
    """What is the same for every chunk; `dtype` is that of the matrix products."""

    label_smoothing: float
    softcap: float | None
    z_loss: float
    dtype: torch.dtype
    vocabulary: Vocabulary

    @property
    def loss_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def chunk_tokens(self, features: int, weight_trains: bool) -> int:
        """C: as many tokens as CHUNK_BYTES hold logits of, at least one; the same on all processes.

        Each chunk reads and writes the whole gradient of the weight. So where there is one, C is at least
        MIN_TOKENS_PER_PASS, as long as the chunk takes no more bytes than that gradient, which is there anyway.
        """
        tokens = CHUNK_BYTES // max(1, self.vocabulary.widest * self.dtype.itemsize)
        if weight_trains:
            tokens = max(tokens, min(MIN_TOKENS_PER_PASS, features * self.loss_dtype.itemsize // self.dtype.itemsize))
        return max(1, tokens)

    def losses(self, of: Statistics) -> Tensor:
        """Losses (C,)."""
        # Differences from the peak first: with large logits, logsumexp has lost what they have in common.
        loss = of.log_sum - (1 - self.label_smoothing) * (of.at_target - of.peak)
        if self.label_smoothing:
            loss -= self.label_smoothing * (of.total / self.vocabulary.num_classes - of.peak)
        return loss + self.z_loss * of.lse.square() if self.z_loss else loss

    def upstream(self, lse: Tensor, d_loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients (C,) of logsumexp, of the target's logit and of the sum of logits, from those of the losses."""
        d_total = d_loss * (-self.label_smoothing / max(1, self.vocabulary.num_classes))
        return d_loss * (1 + 2 * self.z_loss * lse), d_loss * (self.label_smoothing - 1), d_total


class _Head:
    """The linear layer, chunk by chunk: logits from tokens, gradients from those of the logits."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None, s: _Settings) -> None:
        self.hidden = hidden  # (N, D)
        self.weight = weight.to(s.dtype)  # (V, D)
        self.bias = None if bias is None else bias.to(s.dtype)  # (V,)
        self.rows = rows
        self.s = s

    def chunks(self, weight_trains: bool) -> Iterator[tuple[Chunk, Tensor]]:
        """Each chunk, with its tokens (C, D) in the dtype of the products."""
        size = self.s.chunk_tokens(self.weight.shape[1], weight_trains)
        if self.rows is None:
            for start in range(0, self.hidden.shape[0], size):
                chunk = slice(start, start + size)
                yield chunk, self.hidden[chunk].to(self.s.dtype)
        elif self.rows.numel():
            for part in self.rows.split(size):
                yield part, self.hidden[part].to(self.s.dtype)

    def logits(self, x: Tensor) -> Tensor:
        """Logits (C, V) of tokens x (C, D), without the softcap."""
        return F.linear(x, self.weight, self.bias)

    def new_gradients(self, needed: tuple[bool, ...]) -> list[Tensor | None]:
        """Zeros for those of hidden, weight and bias that need a gradient; sums over tokens in the loss's dtype."""
        weight, wide = self.weight, self.s.loss_dtype
        return [
            torch.zeros_like(self.hidden, dtype=self.s.dtype) if needed[0] else None,
            torch.zeros_like(weight, dtype=wide) if needed[1] else None,
            weight.new_zeros(weight.shape[0], dtype=wide) if needed[2] else None,
        ]

    def add_gradients(self, gradients: list[Tensor | None], chunk: Chunk, x: Tensor, dz: Tensor) -> None:
        """Adds to `gradients` what follows from dz (C, V), the gradient of the logits of tokens x (C, D)."""
        dx, dw, db = gradients
        if db is not None:
            db += dz.sum(0)
        if dx is not None:
            dx[chunk] = dz @ self.weight
        if dw is None:
            return
        if dw.dtype == dz.dtype:
            dw.addmm_(dz.t(), x)
        else:
            dw += dz.t() @ x


class _ReducedLoss(torch.autograd.Function):
    """The sum of all losses, over `mean_of` unless that is None; makes and keeps its gradients in forward.

    The gradients are kept without the division, which would make float16 underflow, and scaled in backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        rows: Tensor | None,
        s: _Settings,
        mean_of: int | None,
    ) -> Tensor:
        head = _Head(hidden, weight, bias, rows, s)
        gradients = head.new_gradients(ctx.needs_input_grad[:3])
        losses = hidden.new_zeros(hidden.shape[0], dtype=s.loss_dtype)
        for chunk, x in head.chunks(ctx.needs_input_grad[1]):
            z, places = head.logits(x), target[chunk] - s.vocabulary.first
            found = s.vocabulary.over_all(Statistics(*ops.logit_statistics(z, places, s.softcap)))
            losses[chunk] = s.losses(found)
            upstream = s.upstream(found.lse, torch.ones_like(found.lse))
            ops.logit_statistics_backward(z, places, found.peak, found.log_sum, *upstream, s.softcap)
            head.add_gradients(gradients, chunk, x, z)
            del z
        if gradients[0] is not None:
            s.vocabulary.add_up_(gradients[0])
        ctx.save_for_backward(*gradients)
        ctx.divisor = max(mean_of, 1) if mean_of is not None else 1
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (hidden, weight, bias))
        return losses.sum() if mean_of is None else _reduce(losses, mean_of, "mean")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        scale = upstream / ctx.divisor
        scaled = (
            None if g is None else _scaled(g, scale, dtype)
            for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *scaled, None, None, None, None


class _LossPerToken(torch.autograd.Function):
    """Loss (N,) and logsumexp (N,); keeps its inputs and parts of logsumexp, and makes the logits again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        rows: Tensor | None,
        s: _Settings,
    ) -> tuple[Tensor, Tensor]:
        of_all = Statistics(*(hidden.new_zeros(hidden.shape[0], dtype=s.loss_dtype) for _ in range(4)))
        head = _Head(hidden, weight, bias, rows, s)
        for chunk, x in head.chunks(weight_trains=False):
            z = head.logits(x)
            found = ops.logit_statistics(z, target[chunk] - s.vocabulary.first, s.softcap)
            del z
            for numbers, part in zip(of_all, found, strict=True):
                numbers[chunk] = part
        of_all = s.vocabulary.over_all(of_all)
        losses, lse = s.losses(of_all), of_all.lse
        if rows is not None:
            ignored = torch.ones_like(target, dtype=torch.bool).index_fill_(0, rows, False)
            losses.masked_fill_(ignored, 0.0)
            lse.masked_fill_(ignored, 0.0)
        ctx.save_for_backward(hidden, weight, bias, target, rows, of_all.peak, of_all.log_sum)
        ctx.settings = s
        return losses, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target, rows, peak, log_sum = ctx.saved_tensors
        s = ctx.settings
        with no_autocast(hidden):  # backward may run under another autocast than forward did
            head = _Head(hidden, weight, bias, rows, s)
            gradients = head.new_gradients(ctx.needs_input_grad[:3])
            for chunk, x in head.chunks(ctx.needs_input_grad[1]):
                z, places = head.logits(x), target[chunk] - s.vocabulary.first
                parts = peak[chunk], log_sum[chunk]
                of_lse, of_target, of_total = s.upstream(parts[0] + parts[1], d_loss[chunk])
                upstream = of_lse + d_lse[chunk], of_target, of_total
                ops.logit_statistics_backward(z, places, *parts, *upstream, s.softcap)
                head.add_gradients(gradients, chunk, x, z)
                del z
            if gradients[0] is not None:
                s.vocabulary.add_up_(gradients[0])
        cast = (None if g is None else g.to(t.dtype) for g, t in zip(gradients, (hidden, weight, bias), strict=True))
        return *cast, None, None, None


def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`gradient` times a number, in `dtype`, with no more than a chunk's bytes beside the result."""
    if gradient.dtype == dtype == scale.dtype:
        return gradient * scale
    scaled = torch.empty_like(gradient, dtype=dtype)
    row_bytes = max(1, gradient[:1].numel() * scale.dtype.itemsize)
    for out, part in zip(*(t.split(max(1, CHUNK_BYTES // (2 * row_bytes))) for t in (scaled, gradient)), strict=True):
        out.copy_(part.to(scale.dtype) * scale)
    return scaled


def _reduce(loss: Tensor, num_tokens: int | Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / num_tokens


def _counting_rows(target: Tensor, ignore_index: int, num_classes: int) -> Tensor | None:
    """Indices of the tokens that are not ignored, None for all of them; two synchronizations on a GPU, together.

    Targets without values, meta or fake, all count.
    """
    if target.is_meta or isinstance(target, FakeTensor):
        return None
    counts = target != ignore_index
    rows = counts.nonzero().squeeze(1)
    wrong = target[counts & ((target < 0) | (target >= num_classes))]
    if wrong.numel():
        raise IndexError(
            f"linear_cross_entropy: target {int(wrong[0])} is out of bounds, expected classes from 0 to "
            f"{num_classes - 1} (the rows of weight) or ignore_index = {ignore_index}. Nothing was changed."
        )
    return None if rows.numel() == target.numel() else rows


def _plain_losses(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int, s: _Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and logsumexp per token by plain operators, and which tokens count."""
    z = F.linear(hidden, weight, bias).to(s.loss_dtype)  # (..., V)
    if s.softcap is not None:
        z = s.softcap * torch.tanh(z / s.softcap)
    counts = target != ignore_index
    lse = torch.where(counts, z.logsumexp(-1), 0.0)
    options: dict[str, Any] = {"ignore_index": ignore_index, "label_smoothing": s.label_smoothing}
    loss = F.cross_entropy(z.reshape(-1, z.shape[-1]), target.reshape(-1), reduction="none", **options)
    return loss.view(target.shape) + s.z_loss * lse.square(), lse, counts


def _check(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    z_loss: float,
    reduction: str,
) -> None:
    """Raises ValueError for what does not fit together."""
    tensors = [t for t in (hidden, weight, bias) if t is not None]
    autocast = autocast_enabled(hidden) and all(t.dtype != torch.float64 for t in tensors)
    wrong = (
        (
            hidden.dim() == 0 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[-1],
            "hidden (..., D), weight (V, D)",
        ),
        (hidden.shape[:-1] != target.shape, "target of the shape of hidden without its last dimension"),
        (bias is not None and bias.shape != weight.shape[:1], "bias (V,) for weight (V, D)"),
        (target.dtype != torch.int64, "target of dtype torch.int64"),
        (not all(t.is_floating_point() for t in tensors), "hidden, weight and bias of floating point"),
        (not autocast and len({t.dtype for t in tensors}) > 1, "hidden, weight and bias of one dtype, or autocast"),
        (any(type(t).__name__ == "DTensor" for t in tensors), "whole tensors, not a DTensor: " + _UNSHARD),
        (len({t.device for t in (*tensors, target)}) > 1, "all tensors on one device"),
        (not isinstance(ignore_index, int), f"a whole number as ignore_index, not {ignore_index!r}"),
        (not 0 <= label_smoothing <= 1, f"label_smoothing from 0 to 1, not {label_smoothing}"),
        (softcap is not None and not softcap > 0, f"softcap above 0 or None, not {softcap}"),
        (not z_loss >= 0, f"z_loss of at least 0, not {z_loss}"),
        (reduction not in ("none", "mean", "sum"), f"reduction 'none', 'mean' or 'sum', not {reduction!r}"),
    )
    expected = [text for failed, text in wrong if failed]
    if expected:
        named = {"hidden": hidden, "weight": weight, "target": target} | ({} if bias is None else {"bias": bias})
        given = ", ".join(f"{name} {_form(tensor)}" for name, tensor in named.items())
        raise ValueError(f"linear_cross_entropy: expected {'; '.join(expected)}. Given: {given}. Nothing was changed.")


def _form(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
