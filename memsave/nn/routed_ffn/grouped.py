"""The same products, all blocks at once, by torch's grouped matrix product, where that is faster: half types on a GPU.

Everything is (N * k, ...), sorted by block; see `products.py`, whose block by block way serves everywhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from .layout import down_weight, linear_parts, unit_rows

if TYPE_CHECKING:
    from .products import Call, Gradients

_ALIGNMENT_BYTES = 16
forced: bool | None = None
"""For tests: whether it serves, instead of what `serves` finds."""


def serves(dtype: torch.dtype, x: Tensor, tensors: Sequence[Tensor | None]) -> bool:
    """Whether torch has the product for this device and these shapes; low-rank factors go block by block."""
    parts = linear_parts(tensors)
    if any(part.lora_a is not None for part in parts) or not hasattr(F, "grouped_mm") or is_fake(x) or not len(x):
        return False
    if forced is not None:
        return forced
    if x.device.type != "cuda" or torch.version.hip or dtype != torch.bfloat16:
        return False
    widths = [size for part in parts if part.weight is not None for size in part.weight.shape]
    aligned = all(width * dtype.itemsize % _ALIGNMENT_BYTES == 0 for width in widths)
    return aligned and torch.cuda.get_device_capability(x.device) >= (8, 0)


def forward(call: Call, pre: list[Tensor] | None) -> Tensor:
    """y (N, O); fills `pre`."""
    ends = _ends(call)
    x = call.x.index_select(0, call.sent.tokens)  # (N * k, D)
    found = []
    for number, rows in enumerate(call.linears):
        assert rows.weight is not None
        out = F.grouped_mm(x, _by_block(call, rows.weight).transpose(1, 2), offs=ends)
        if rows.bias is not None:
            out += _each_tokens(call, call.cast(rows.bias).view(call.layout.blocks, -1))
        if pre is not None:
            pre[number].copy_(out)
        found.append(out)
    del x
    h = call.hidden(found).mul_(_coefficients(call))
    out = F.grouped_mm(h, _down_by_block(call).transpose(1, 2), offs=ends)  # (N * k, O)
    y = _added(call, out)
    bias = call.parts[-1].bias
    return y if bias is None else y.add_(call.cast(bias))


def backward(call: Call, pre: Sequence[Tensor], dy: Tensor, gradients: Gradients) -> None:
    """Fill `gradients`, except that of down's bias."""
    ends, c = _ends(call), _coefficients(call)
    dy = dy.index_select(0, call.sent.tokens)
    dh = F.grouped_mm(dy, _down_by_block(call), offs=ends)  # (N * k, C)
    h = call.hidden(pre)
    if gradients.dp is not None:
        dc = (dh * h).sum(-1, dtype=c.dtype).mul_(call.layout.blocks)
        gradients.dp.index_put_((call.sent.tokens.long(), _blocks(call)), dc)
    ddown = down_weight(call.layout, gradients.parts[-1])
    if ddown is not None:
        found = F.grouped_mm(dy.t(), h.mul_(c), offs=ends)  # (G, O, C)
        ddown.unflatten(1, (call.layout.blocks, -1)).copy_(found.transpose(0, 1))
    del h, dy
    if not gradients.below:
        return
    dpre = call.hidden_backward(dh.mul_(c), pre)
    x = call.x.index_select(0, call.sent.tokens)
    for rows, d in zip(unit_rows(call.layout, gradients.parts, call.num_units), dpre, strict=True):
        if rows.weight is not None:
            rows.weight.unflatten(0, (call.layout.blocks, -1)).copy_(F.grouped_mm(d.t(), x, offs=ends))
        if rows.bias is not None:
            sums = d.new_zeros((call.layout.blocks, d.shape[1]), dtype=torch.float32)
            rows.bias.unflatten(0, (call.layout.blocks, -1)).copy_(sums.index_add_(0, _blocks(call), d.float()))
    del x
    if gradients.dx is not None:
        for rows, d in zip(call.linears, dpre, strict=True):
            assert rows.weight is not None
            gradients.dx.add_(_added(call, F.grouped_mm(d, _by_block(call, rows.weight), offs=ends)))


def _ends(call: Call) -> Tensor:
    return call.sent.counts.cumsum(0, dtype=torch.int32)


def _blocks(call: Call) -> Tensor:
    """(N * k,): the block of each sorted row."""
    numbers = torch.arange(call.layout.blocks, device=call.x.device)
    return numbers.repeat_interleave(call.sent.counts, output_size=len(call.sent.tokens))


def _each_tokens(call: Call, of_blocks: Tensor) -> Tensor:
    """(G, ...) -> (N * k, ...)."""
    return of_blocks.index_select(0, _blocks(call))


def _coefficients(call: Call) -> Tensor:
    """c (N * k, 1)."""
    return call.p[call.sent.tokens.long(), _blocks(call)][:, None] * call.layout.blocks


def _by_block(call: Call, weight: Tensor) -> Tensor:
    """(F, D) -> (G, C, D), a view."""
    return call.cast(weight).unflatten(0, (call.layout.blocks, -1))


def _down_by_block(call: Call) -> Tensor:
    """(O, F) -> (G, O, C), a view."""
    return call.cast(call.down).unflatten(1, (call.layout.blocks, -1)).transpose(0, 1)


def _added(call: Call, rows: Tensor) -> Tensor:
    """Sorted rows (N * k, ...), those of each token added up: (N, ...). Always in the order of the blocks."""
    order = call.sent.tokens.argsort(stable=True).view(len(call.x), call.layout.active)
    return rows[order].sum(1)
