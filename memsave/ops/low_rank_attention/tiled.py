"""`low_rank_attention` in plain PyTorch: keys tile by tile, each rebuilt once, and an online softmax.

B sequences, h query and kv key/value heads, T queries, S keys, head size D, ranks Rk and Rv; a tile has n keys and t
queries, W = Rv or D numbers are accumulated for each query. Inside a tile the rows of a key/value head are
(t, h / kv), and keys are the last dimension: (kv, D, n), so that a few queries still make long vectors.

Half types are computed in float32. All memory is taken once, see plan.py: never all K, all V or all scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .plan import Buffers, Plan, buffer_elements, collapsed, plan, usable


def low_rank_attention(
    query: Tensor,
    key_latent: Tensor,
    key_factor: Tensor,
    key_bias: Tensor | None,
    value_latent: Tensor,
    value_factor: Tensor,
    value_bias: Tensor | None,
    scale: float,
    cos: Tensor | None,
    sin: Tensor | None,
    norm_weight: Tensor | None,
    norm_eps: float,
    mask: Tensor | None,
    is_causal: bool,
) -> Tensor:
    cut = plan(query, key_latent, key_factor, value_latent)
    out = query.new_zeros((cut.size.B, cut.size.T, cut.size.h, cut.size.D))
    if not out.numel() or not cut.size.S:
        return out
    factors = key_latent, key_factor, key_bias, value_latent, value_factor, value_bias
    buffers = Buffers(buffer_elements(cut, *factors, cos, norm_weight, mask, is_causal), cut.wide, query)
    latents = Latents(cut, buffers, *factors, cos, sin, norm_weight, norm_eps)
    seen = Seen(cut, buffers, mask, is_causal)
    with torch.autocast(query.device.type, enabled=False):
        for b in range(cut.size.B):
            queries = [Queries(cut, buffers, query[b], begin, scale) for begin in range(0, cut.size.T, cut.queries)]
            for begin in range(0, cut.size.S, cut.keys):
                keys = slice(begin, min(begin + cut.keys, cut.size.S))
                rebuilt, values = latents.keys(b, keys), latents.values(b, keys)
                for rows in queries:
                    if seen.any_of(rows.positions, keys):
                        rows.add(rebuilt, values, seen, b, keys)
            for rows in queries:
                rows.finish(latents, out[b])
    return out


def workspace_bytes(
    query: Tensor,
    key_latent: Tensor,
    key_factor: Tensor,
    key_bias: Tensor | None,
    value_latent: Tensor,
    value_factor: Tensor,
    value_bias: Tensor | None,
    scale: float,
    cos: Tensor | None,
    sin: Tensor | None,
    norm_weight: Tensor | None,
    norm_eps: float,
    mask: Tensor | None,
    is_causal: bool,
) -> int:
    cut = plan(query, key_latent, key_factor, value_latent)
    if not query.numel() or not cut.size.S:
        return 0
    factors = key_latent, key_factor, key_bias, value_latent, value_factor, value_bias
    return Buffers.count_bytes(buffer_elements(cut, *factors, cos, norm_weight, mask, is_causal), cut.wide)


class Latents:
    """The keys and values of a call, which it rebuilds."""

    def __init__(
        self,
        cut: Plan,
        buffers: Buffers,
        key_latent: Tensor,
        key_factor: Tensor,
        key_bias: Tensor | None,
        value_latent: Tensor,
        value_factor: Tensor,
        value_bias: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        norm_weight: Tensor | None,
        norm_eps: float,
    ) -> None:
        self.cut, self.buffers = cut, buffers
        self.key_latent, self.value_latent = key_latent, value_latent
        self.key_factor = self._operand("key_factor", key_factor)
        self.value_factor = self._operand("value_factor", value_factor)
        self.key_bias = self._widened("key_bias", key_bias)
        self.value_bias = self._widened("value_bias", value_bias)
        self.norm_weight, self.norm_eps = self._widened("norm_weight", norm_weight), norm_eps
        self.cos, self.sin = cos, sin

    def _operand(self, name: str, matrix: Tensor) -> Tensor:
        """What a matrix product takes without a copy of its own."""
        if usable(matrix, self.cut.wide):
            return matrix
        return self.buffers.take(name, *matrix.shape).copy_(matrix)

    def _widened(self, name: str, vector: Tensor | None) -> Tensor | None:
        if vector is None or vector.dtype == self.cut.wide:
            return vector
        return self.buffers.take(name, *vector.shape).copy_(vector)

    def keys(self, b: int, keys: slice) -> Tensor:
        """(kv, D, n): rebuilt, normed and rotated."""
        size = self.cut.size
        latent = self._operand("key_latent", self.key_latent[b, keys])  # (n, Rk)
        shape = size.kv, size.D, len(latent)
        rebuilt = self.buffers.take("keys", *shape)
        torch.mm(self.key_factor, latent.t(), out=rebuilt.view(-1, len(latent)))
        if self.key_bias is not None:
            rebuilt.add_(self.key_bias.view(size.kv, size.D, 1))
        if self.norm_weight is not None:
            self._norm(rebuilt, self.norm_weight)
        return rebuilt if self.cos is None or self.sin is None else self._rotated(rebuilt, b, keys, self.cos, self.sin)

    def _norm(self, rebuilt: Tensor, weight: Tensor) -> None:
        kv, _, n = rebuilt.shape
        squares = torch.mul(rebuilt, rebuilt, out=self.buffers.take("others", *rebuilt.shape))
        roots = torch.mean(squares, 1, keepdim=True, out=self.buffers.take("roots", kv, 1, n))
        rebuilt.mul_(roots.add_(self.norm_eps).rsqrt_()).mul_(weight[:, None])

    def _rotated(self, rebuilt: Tensor, b: int, keys: slice, cos: Tensor, sin: Tensor) -> Tensor:
        """rebuilt * cos + rotate_half(rebuilt) * sin."""
        half = rebuilt.shape[1] // 2
        turns = [self._turned(name, turn[min(b, len(turn) - 1), keys]) for name, turn in (("cos", cos), ("sin", sin))]
        rotated = torch.mul(rebuilt, turns[0], out=self.buffers.take("others", *rebuilt.shape))
        rotated[:, :half].addcmul_(rebuilt[:, half:], turns[1][:half], value=-1)
        rotated[:, half:].addcmul_(rebuilt[:, :half], turns[1][half:])
        return rotated

    def _turned(self, name: str, angles: Tensor) -> Tensor:
        """(n, D) -> (D, n), in halves: torch transposes a whole matrix by way of a buffer of its own."""
        n, d = angles.shape
        turned = self.buffers.take(name, d, n)
        for to, of in zip(turned.chunk(2), angles.t().chunk(2), strict=True):
            to.copy_(of)
        return turned

    def values(self, b: int, keys: slice) -> Tensor:
        """What is accumulated: the latents (n, Rv), or the values (kv, n, D) without their bias."""
        size = self.cut.size
        latent = self._operand("value_latent", self.value_latent[b, keys])
        if self.cut.in_rank_space:
            return latent
        values = self.buffers.take("values", len(latent), size.kv * size.D)
        torch.mm(latent, self.value_factor.t(), out=values)
        return values.view(-1, size.kv, size.D).transpose(0, 1)


class Seen:
    """Which keys a query sees, and what is added to its scores."""

    def __init__(self, cut: Plan, buffers: Buffers, mask: Tensor | None, is_causal: bool) -> None:
        self.size, self.buffers, self.is_causal = cut.size, buffers, is_causal
        self.mask = None if mask is None else collapsed(mask, cut.size)

    def any_of(self, queries: slice, keys: slice) -> bool:
        return not self.is_causal or keys.start < queries.stop + self.size.S - self.size.T

    def apply(self, scores: Tensor, b: int, queries: slice, keys: slice) -> None:
        """To scores (kv, t, h / kv, n): minus infinity where a key is not seen."""
        if self.mask is not None:
            self._apply_mask(scores, self.mask[b if len(self.mask) > 1 else 0], queries, keys)
        first_hidden = queries.start + self.size.S - self.size.T + 1 - keys.start  # of the first query, in this tile
        if self.is_causal and first_hidden < keys.stop - keys.start:
            _, t, _, n = scores.shape
            hidden = self.buffers.take("hidden", t, n).fill_(True).triu_(first_hidden)
            scores.masked_fill_(hidden[:, None], float("-inf"))

    def _apply_mask(self, scores: Tensor, mask: Tensor, queries: slice, keys: slice) -> None:
        """mask: (h or 1, T or 1, S or 1)."""
        mask = mask if mask.shape[1] == 1 else mask[:, queries]
        mask = mask if mask.shape[2] == 1 else mask[:, :, keys]
        heads = (1, 1) if len(mask) == 1 else (self.size.kv, self.size.group)
        if mask.dtype == torch.bool:
            unseen = torch.logical_not(mask, out=self.buffers.take("unseen", *mask.shape))
            scores.masked_fill_(unseen.unflatten(0, heads).transpose(1, 2), float("-inf"))
        else:
            if mask.dtype != scores.dtype:
                mask = self.buffers.take("added", *mask.shape).copy_(mask)
            scores.add_(mask.unflatten(0, heads).transpose(1, 2))


class Queries:
    """A tile of queries, and what is known of their softmax: the peak of their scores, their sum and that of values."""

    def __init__(self, cut: Plan, buffers: Buffers, query: Tensor, begin: int, scale: float) -> None:
        size = cut.size
        self.cut, self.buffers = cut, buffers
        self.positions = slice(begin, min(begin + cut.queries, size.T))
        t, first = self.positions.stop - begin, size.h * begin
        rows = size.kv, t * size.group
        self.query = buffers.take("queries", *rows, size.D, begin=first * size.D)
        of_heads = query[:, self.positions].unflatten(0, (size.kv, size.group)).transpose(1, 2)  # (kv, t, h / kv, D)
        self.query.view(of_heads.shape).copy_(of_heads).mul_(scale)
        self.peaks = buffers.take("peaks", *rows, 1, begin=first).fill_(float("-inf"))
        self.totals = buffers.take("totals", *rows, 1, begin=first).zero_()
        self.sums = buffers.take("sums", *rows, cut.width, begin=first * cut.width).zero_()

    def add(self, keys: Tensor, values: Tensor, seen: Seen, b: int, places: slice) -> None:
        """A tile of keys (kv, D, n), and of values (kv, n, D) or (n, Rv)."""
        (kv, rows, _), n = self.query.shape, keys.shape[2]
        scores = self.buffers.take("scores", kv, rows, n)
        torch.bmm(self.query, keys, out=scores)
        seen.apply(scores.view(kv, -1, self.cut.size.group, n), b, self.positions, places)
        shift, decay = (self.buffers.take(name, kv, rows, 1) for name in ("shift", "decay"))
        torch.maximum(self.peaks, torch.amax(scores, 2, keepdim=True, out=shift), out=shift)
        decay.copy_(self.peaks)
        self.peaks.copy_(shift)
        shift.clamp_(min=torch.finfo(shift.dtype).min)  # a row that has seen nothing: its exponentials are zero
        decay.sub_(shift).exp_()
        scores.sub_(shift).exp_()
        self.totals.mul_(decay).add_(torch.sum(scores, 2, keepdim=True, out=shift))
        self.sums.mul_(decay)
        if self.cut.in_rank_space:
            self.sums.view(kv * rows, -1).addmm_(scores.view(kv * rows, n), values)
        else:
            self.sums.baddbmm_(scores, values)

    def finish(self, latents: Latents, out: Tensor) -> None:
        """Writes these queries to out (T, h, D)."""
        size = self.cut.size
        kv, rows, _ = self.query.shape
        seen = torch.sign(self.totals, out=self.buffers.take("shift", kv, rows, 1))
        result = self.sums.div_(self.totals.clamp_(min=1.0))  # the peak itself adds 1, so only zeros are raised
        if self.cut.in_rank_space:
            factor = latents.value_factor.view(kv, size.D, size.Rv).transpose(1, 2)
            result = torch.bmm(result, factor, out=self.buffers.take("rebuilt", kv, rows, size.D))
        if latents.value_bias is not None:
            result.addcmul_(latents.value_bias.view(kv, 1, size.D), seen)
        of_heads = out[self.positions].view(-1, kv, size.group, size.D)
        of_heads.copy_(result.view(kv, -1, size.group, size.D).transpose(0, 1))
