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
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .eager import autocast_enabled, no_autocast, once_differentiable, plain, product_dtype

CHUNK_BYTES = 64 * 2**20
MIN_TOKENS_PER_PASS = 512  # over the gradient of the weight
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

    Returns:
        The loss: a scalar, or (...) for "none"; float32, or float64 for float64 inputs.

    Raises:
        ValueError: a shape, dtype, device or option does not fit.
        IndexError: on the CPU, a target is out of range.
        RuntimeError: in backward, where its result is differentiated again.

    Sources: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024 (never all logits); Hsu et al.,
    "Liger Kernel", 2024 (gradients in forward).
    """
    _check(hidden, weight, target, bias, label_smoothing, softcap, z_loss, reduction)
    s = _Settings(label_smoothing, softcap, z_loss, product_dtype(hidden, weight))
    if plain(hidden):
        loss, lse, counts = _plain_losses(hidden, weight, target, bias, ignore_index, s)
        reduced = _reduce(loss, counts.sum(), reduction)
        return (reduced, lse) if return_logsumexp else reduced
    flat, targets = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)  # (N, D), (N,)
    rows = _counting_rows(targets, ignore_index, weight.shape[0])
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

    @property
    def loss_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def logit_bytes(self) -> int:
        """Bytes per logit of a chunk: for the loss, for the products if their dtype differs, for tanh of a softcap."""
        wide, narrow = self.loss_dtype.itemsize, self.dtype.itemsize
        return wide + (narrow if self.dtype != self.loss_dtype else 0) + (wide if self.softcap is not None else 0)

    def chunk_tokens(self, num_classes: int, features: int, weight_trains: bool) -> int:
        """C: as many tokens as CHUNK_BYTES hold logits of, at least one.

        Each chunk reads and writes the whole gradient of the weight. So where there is one, C is at least
        MIN_TOKENS_PER_PASS, as long as the chunk takes no more bytes than that gradient, which is there anyway.
        """
        tokens = CHUNK_BYTES // max(1, num_classes * self.logit_bytes)
        if weight_trains:
            tokens = max(tokens, min(MIN_TOKENS_PER_PASS, features * self.loss_dtype.itemsize // self.logit_bytes))
        return max(1, tokens)


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
        num_classes, features = self.weight.shape
        size = self.s.chunk_tokens(num_classes, features, weight_trains)
        if self.rows is None:
            for start in range(0, self.hidden.shape[0], size):
                chunk = slice(start, start + size)
                yield chunk, self.hidden[chunk].to(self.s.dtype)
        elif self.rows.numel():
            for part in self.rows.split(size):
                yield part, self.hidden[part].to(self.s.dtype)

    def logits(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits (C, V) of tokens x (C, D) in the loss's dtype and, where they are capped, the tanh in them."""
        z = F.linear(x, self.weight, self.bias).to(self.s.loss_dtype)  # (C, V)
        if self.s.softcap is None:
            return z, None
        tanh = z.div_(self.s.softcap).tanh_()
        return tanh * self.s.softcap, tanh

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
        dz = dz.to(self.s.dtype)
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
        total = hidden.new_zeros((), dtype=s.loss_dtype)
        for chunk, x in head.chunks(ctx.needs_input_grad[1]):
            z, tanh = head.logits(x)
            loss, lse, exp_sum = _losses(z, target[chunk], s)
            total += loss.sum()
            _to_gradient(z, tanh, target[chunk], (1 + 2 * s.z_loss * lse) / exp_sum, torch.ones_like(lse), s)
            head.add_gradients(gradients, chunk, x, z)
            del z, tanh
        ctx.save_for_backward(*gradients)
        ctx.divisor = max(mean_of, 1) if mean_of is not None else 1
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (hidden, weight, bias))
        return total if mean_of is None else _reduce(total, mean_of, "mean")

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
    """Loss (N,) and logsumexp (N,); keeps its inputs and the logsumexp, and makes the logits again in backward."""

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
        losses, lses = (hidden.new_zeros(hidden.shape[0], dtype=s.loss_dtype) for _ in range(2))
        head = _Head(hidden, weight, bias, rows, s)
        for chunk, x in head.chunks(weight_trains=False):
            z, _ = head.logits(x)
            losses[chunk], lses[chunk], _ = _losses(z, target[chunk], s)
            del z, _
        ctx.save_for_backward(hidden, weight, bias, target, rows, lses)
        ctx.settings = s
        return losses, lses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target, rows, lses = ctx.saved_tensors
        s = ctx.settings
        with no_autocast(hidden):  # backward may run under another autocast than forward did
            head = _Head(hidden, weight, bias, rows, s)
            gradients = head.new_gradients(ctx.needs_input_grad[:3])
            for chunk, x in head.chunks(ctx.needs_input_grad[1]):
                z, tanh = head.logits(x)
                lse, g = lses[chunk], d_loss[chunk]
                z.sub_(lse[:, None]).exp_()
                _to_gradient(z, tanh, target[chunk], g * (1 + 2 * s.z_loss * lse) + d_lse[chunk], g, s)
                head.add_gradients(gradients, chunk, x, z)
                del z, tanh
        cast = (None if g is None else g.to(t.dtype) for g, t in zip(gradients, (hidden, weight, bias), strict=True))
        return *cast, None, None, None


def _losses(z: Tensor, target: Tensor, s: _Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and logsumexp (C,) of logits z (C, V), which become e^(z - max) in place, and their sums (C,)."""
    loss = -(1 - s.label_smoothing) * z.gather(1, target[:, None]).squeeze(1)  # (C,)
    if s.label_smoothing:
        loss -= s.label_smoothing * z.mean(1)
    largest = z.amax(1)  # (C,)
    exp_sum = z.sub_(largest[:, None]).exp_().sum(1)  # (C,)
    lse = largest + exp_sum.log()
    loss += lse
    if s.z_loss:
        loss += s.z_loss * lse.square()
    return loss, lse, exp_sum


def _to_gradient(p: Tensor, tanh: Tensor | None, target: Tensor, of_p: Tensor, of_target: Tensor, s: _Settings) -> None:
    """Turns p (C, V) into of_p * p - of_target * (smoothed one-hot target), through the softcap; factors are (C,)."""
    p.mul_(of_p[:, None])
    p.scatter_add_(1, target[:, None], -(1 - s.label_smoothing) * of_target[:, None])
    if s.label_smoothing:
        p.sub_(s.label_smoothing / p.shape[1] * of_target[:, None])
    if tanh is not None:
        p.mul_(tanh.square_().neg_().add_(1))


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
    """Indices of the tokens that are not ignored, None for all of them; one synchronization on a GPU.

    Targets without values, meta or fake, all count.
    """
    if target.is_meta or isinstance(target, FakeTensor):
        return None
    counts = target != ignore_index
    if target.device.type == "cpu":  # on a GPU that would be another synchronization; there, the gather fails
        wrong = target[counts & ((target < 0) | (target >= num_classes))]
        if wrong.numel():
            raise IndexError(
                f"linear_cross_entropy: target {int(wrong[0])} is out of bounds, expected classes from 0 to "
                f"{num_classes - 1} (the rows of weight) or ignore_index = {ignore_index}. Nothing was changed."
            )
    rows = counts.nonzero().squeeze(1)
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
        (len({t.device for t in (*tensors, target)}) > 1, "all tensors on one device"),
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
