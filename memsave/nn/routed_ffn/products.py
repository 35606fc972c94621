"""The products of a routed block, forward and backward, block by block.

x is (N, D), y (N, O); block i has n tokens and C of the F hidden units, and k of G blocks serve a token. With c = G p:

    pre = x W_i^T + b_i;  h = act(pre), or act(gate) * up;  y = sum_i c_i h V_i^T + b;  W (F, D), V (O, F)

Kept for backward: x, p, the order of the tokens, and pre (N * k, C) of the tokens that each block got, twice if
gated. Everything else is made again, one block at a time, so that gathered rows are never whole. Low-rank factors of
rank r add s B_i A x to pre, and s B sum_i A_i c_i h to y.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import ops
from ..eager import no_autocast, once_differentiable
from . import grouped
from .layout import Layout, LinearPart, UnitRows, down_weight, linear_parts, unit_rows
from .routing import Balance, Dispatch, spans


class Work(NamedTuple):
    """What a routed block is given besides its input; none of it is a tensor.

    Attributes:
        layout: of its linears.
        balance: adds its gradient to that of p; None for none.
        dtype: of the products.
    """

    layout: Layout
    balance: Balance | None
    dtype: torch.dtype


def routed(x: Tensor, p: Tensor, sent: Dispatch, work: Work, tensors: Sequence[Tensor | None]) -> Tensor:
    """y (N, O) for x (N, D) of the products' dtype and p (N, G); `tensors` are the linears', see `layout.PARTS`."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, p, *tensors)):
        return _Routed.apply(x, p, *sent, work, *tensors)
    with torch.no_grad():
        return _outputs(x, p, sent, work, tensors, None)


class _Routed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, p: Tensor, tokens: Tensor, counts: Tensor, work: Work, *tensors: Tensor | None
    ) -> Tensor:
        widths = len(tokens), _num_units(work.layout, tensors) // work.layout.blocks
        pre = [x.new_empty(widths) for _ in range(1 + work.layout.gated)]
        y = _outputs(x, p, Dispatch(tokens, counts), work, tensors, pre)
        ctx.work = work
        # The parameters themselves, to learn of changes in place; autocast's copies are made again in backward.
        ctx.save_for_backward(x, p, tokens, counts, *pre, *tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        work: Work = ctx.work
        x, p, tokens, counts, *others = ctx.saved_tensors
        num_pre = 1 + work.layout.gated
        pre, tensors = others[:num_pre], others[num_pre:]
        gradients = Gradients.empty(x, p, tensors, ctx.needs_input_grad)
        with no_autocast(dy):
            dy = dy.to(work.dtype)
            call = Call(work, x, p, Dispatch(tokens, counts), linear_parts(tensors))
            if grouped.serves(work.dtype, x, tensors):
                grouped.backward(call, pre, dy, gradients)
            elif gradients.of_units:
                _backward(call, pre, dy, gradients)
            if gradients.parts[-1].bias is not None:
                gradients.parts[-1].bias.copy_(dy.sum(0))
            if gradients.dp is not None and work.balance is not None:
                gradients.dp.add_(work.balance.gradient(counts, p))
        return gradients.dx, gradients.dp, None, None, None, *(t for part in gradients.parts for t in part)


def _num_units(layout: Layout, tensors: Sequence[Tensor | None]) -> int:
    down = down_weight(layout, linear_parts(tensors)[-1])
    assert down is not None
    return down.shape[1]


def _outputs(
    x: Tensor, p: Tensor, sent: Dispatch, work: Work, tensors: Sequence[Tensor | None], pre: list[Tensor] | None
) -> Tensor:
    """y; fills `pre` if it is given."""
    with no_autocast(x):
        call = Call(work, x, p, sent, linear_parts(tensors))
        if grouped.serves(work.dtype, x, tensors):
            return grouped.forward(call, pre)
        return _forward(call, pre)


class Gradients(NamedTuple):
    """Of x, of p, and of each linear's tensors; None for what needs none."""

    dx: Tensor | None
    dp: Tensor | None
    parts: list[LinearPart]

    @staticmethod
    def empty(x: Tensor, p: Tensor, tensors: Sequence[Tensor | None], needs: Sequence[bool]) -> Gradients:
        """Those of x and p are zero, the others are to be written; `needs` is autograd's, of all arguments."""
        needed = zip(tensors, needs[-len(tensors) :], strict=True)
        of_tensors = [torch.empty_like(t) if t is not None and wanted else None for t, wanted in needed]
        dx, dp = (torch.zeros_like(t) if wanted else None for t, wanted in zip((x, p), needs, strict=False))
        return Gradients(dx, dp, linear_parts(of_tensors))

    @property
    def of_units(self) -> bool:
        """Whether any is needed besides that of down's bias."""
        others = [t for part in self.parts for t in part]
        return any(t is not None and t is not self.parts[-1].bias for t in (self.dx, self.dp, *others))

    @property
    def below(self) -> bool:
        """Whether any is needed before the activation."""
        return self.dx is not None or any(t is not None for part in self.parts[:-1] for t in part)


class Call:
    """One run, forward or backward: its tensors, and which rows and units are each block's."""

    def __init__(self, work: Work, x: Tensor, p: Tensor, sent: Dispatch, parts: list[LinearPart]) -> None:
        self.x, self.p, self.sent, self.parts = x, p, sent, parts
        self.layout, self.dtype = work.layout, work.dtype
        down = down_weight(self.layout, parts[-1])
        assert down is not None
        self.down = down  # (O, F)
        self.num_units = down.shape[1]
        self.linears = unit_rows(self.layout, parts, self.num_units)

    def blocks(self) -> list[Block]:
        """All of them, empty ones too."""
        places = spans(self.sent.counts, len(self.sent.tokens))
        size = self.num_units // self.layout.blocks
        return [Block(self, i, place, slice(i * size, (i + 1) * size)) for i, place in enumerate(places)]

    def cast(self, weight: Tensor) -> Tensor:
        return weight.to(self.dtype)

    def latents(self) -> list[Tensor | None]:
        """s x A^T (N, r) of every linear that reads x, or None."""
        factors = [part.lora_a for part in self.parts[:-1]]
        scaling = self.layout.scaling
        return [None if a is None else (self.x @ self.cast(a).t()).mul_(scaling) for a in factors]

    def hidden(self, pre: Sequence[Tensor]) -> Tensor:
        """h (n, C)."""
        if self.layout.gated:
            return ops.gated_activation(pre[0], pre[1], self.layout.activation)
        return ops.activation(pre[0], self.layout.activation)

    def hidden_backward(self, dh: Tensor, pre: Sequence[Tensor]) -> Sequence[Tensor]:
        """The gradients of pre."""
        if self.layout.gated:
            return ops.gated_activation_backward(dh, pre[0], pre[1], self.layout.activation)
        return [ops.activation_backward(dh, pre[0], self.layout.activation)]


class Block(NamedTuple):
    """One block in a call: where its tokens are among the sorted ones, and which hidden units it has."""

    call: Call
    number: int
    place: slice
    units: slice

    @property
    def is_whole(self) -> bool:
        """Whether it gets every token: they are then in their own order."""
        return self.place.stop - self.place.start == len(self.call.x)

    @property
    def tokens(self) -> Tensor:
        return self.call.sent.tokens[self.place]

    def rows(self, tensor: Tensor) -> Tensor:
        """Those of `tensor` (N, ...) that belong to the block's tokens."""
        return tensor if self.is_whole else tensor.index_select(0, self.tokens)

    def add(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """Add left (n, ...) right to the rows of `total` (N, ...) that belong to the block's tokens."""
        if self.is_whole:
            total.addmm_(left, right)
        else:  # a block has a token once at most, so that no order of sums is left open
            total.index_add_(0, self.tokens, left @ right)

    def coefficients(self) -> Tensor:
        """c (n, 1)."""
        return self.rows(self.call.p[:, self.number])[:, None] * self.call.layout.blocks

    def down(self) -> Tensor:
        """V_i (O, C)."""
        return self.call.cast(self.call.down[:, self.units])


def _forward(call: Call, pre: list[Tensor] | None) -> Tensor:
    down = call.parts[-1]
    y = call.x.new_zeros((len(call.x), call.down.shape[0]), dtype=call.dtype)
    if down.bias is not None:
        y += call.cast(down.bias)
    latents = call.latents()
    latent = None if down.lora_a is None else y.new_zeros((len(y), down.lora_a.shape[0]))
    for block in call.blocks():
        h = call.hidden(_pre(block, latents, pre)).mul_(block.coefficients())
        block.add(y, h, block.down().t())
        if latent is not None and down.lora_a is not None:
            block.add(latent, h, call.cast(down.lora_a[:, block.units]).t())
    if latent is not None and down.lora_b is not None:
        y.addmm_(latent, call.cast(down.lora_b).t(), alpha=call.layout.scaling)
    return y


def _pre(block: Block, latents: Sequence[Tensor | None], kept: list[Tensor] | None) -> list[Tensor]:
    """pre (n, C) of one block, in the place of `kept` (N * k, C) where that is given."""
    call = block.call
    x = block.rows(call.x)  # (n, D)
    found = []
    for number, rows in enumerate(call.linears):
        mine = rows.block(block.units)
        assert mine.weight is not None
        weight = call.cast(mine.weight).t()
        out = x.new_empty((len(x), weight.shape[1])) if kept is None else kept[number][block.place]
        if mine.bias is None:
            torch.mm(x, weight, out=out)
        else:
            torch.addmm(call.cast(mine.bias), x, weight, out=out)
        latent = latents[rows.linear]
        if latent is not None and mine.lora_b is not None:
            out.addmm_(block.rows(latent), call.cast(mine.lora_b).t())
        found.append(out)
    return found


class _Sums:
    """What backward adds up over the blocks for the low-rank factors; each (N, r), None where there is no factor."""

    def __init__(self, call: Call, dy: Tensor, gradients: Gradients) -> None:
        down = call.parts[-1]
        self.latents = call.latents()
        self.dlatents = [None if t is None else torch.zeros_like(t) for t in self.latents]
        self.down_latent: Tensor | None = None
        self.down_dlatent: Tensor | None = None
        if down.lora_a is not None and down.lora_b is not None:
            self.down_dlatent = (dy @ call.cast(down.lora_b)).mul_(call.layout.scaling)
            if gradients.parts[-1].lora_b is not None:
                self.down_latent = torch.zeros_like(self.down_dlatent)


def _backward(call: Call, pre: Sequence[Tensor], dy: Tensor, gradients: Gradients) -> None:
    sums = _Sums(call, dy, gradients)
    of_units = unit_rows(call.layout, gradients.parts, call.num_units)
    for block in call.blocks():
        mine = [t[block.place] for t in pre]
        dh = _down_backward(block, mine, dy, gradients, sums)
        if gradients.below:
            dpre = call.hidden_backward(dh, mine)
            del dh
            _up_backward(block, dpre, gradients.dx, of_units, sums)
    for part, given, dlatent in zip(gradients.parts, call.parts, sums.dlatents, strict=False):
        if dlatent is None or given.lora_a is None:
            continue
        dlatent.mul_(call.layout.scaling)
        if part.lora_a is not None:
            _put(part.lora_a, dlatent.t(), call.x)
        if gradients.dx is not None:
            gradients.dx.addmm_(dlatent, call.cast(given.lora_a))
    if sums.down_latent is not None and (dlora_b := gradients.parts[-1].lora_b) is not None:
        _put(dlora_b, dy.t(), sums.down_latent)
        dlora_b.mul_(call.layout.scaling)


def _down_backward(block: Block, pre: Sequence[Tensor], dy: Tensor, gradients: Gradients, sums: _Sums) -> Tensor:
    """The gradient of h (n, C); writes those of p, of V_i and of the factors."""
    call, (ddown, _, dlora_a, _) = block.call, gradients.parts[-1]
    dy = block.rows(dy)  # (n, O)
    dh = dy @ block.down()
    lora_a = call.parts[-1].lora_a
    dlatent = None
    if sums.down_dlatent is not None and lora_a is not None:
        lora_a = call.cast(lora_a[:, block.units])
        dlatent = block.rows(sums.down_dlatent)
        dh.addmm_(dlatent, lora_a)
    c = block.coefficients()
    if gradients.dp is not None or ddown is not None or dlatent is not None:
        h = call.hidden(pre)
        if gradients.dp is not None:
            dc = (dh * h).sum(-1, dtype=c.dtype).mul_(call.layout.blocks)
            gradients.dp[:, block.number].index_add_(0, block.tokens, dc)
        h.mul_(c)
        if ddown is not None:
            whole = down_weight(call.layout, gradients.parts[-1])
            assert whole is not None
            _put(whole[:, block.units], dy.t(), h)
        if dlora_a is not None and dlatent is not None:
            _put(dlora_a[:, block.units], dlatent.t(), h)
        if sums.down_latent is not None and lora_a is not None:
            block.add(sums.down_latent, h, lora_a.t())
    return dh.mul_(c)


def _up_backward(
    block: Block, dpre: Sequence[Tensor], dx: Tensor | None, of_units: Sequence[UnitRows], sums: _Sums
) -> None:
    """Write the gradients of W_i and b_i, and add to those of x and of the factors."""
    call = block.call
    x = block.rows(call.x) if any(rows.weight is not None for rows in of_units) else None  # (n, D)
    given = [rows.block(block.units) for rows in call.linears]
    for rows, mine, d in zip((rows.block(block.units) for rows in of_units), given, dpre, strict=True):
        if rows.weight is not None and x is not None:
            _put(rows.weight, d.t(), x)
        if rows.bias is not None:
            rows.bias.copy_(d.sum(0))
        latent, dlatent = sums.latents[rows.linear], sums.dlatents[rows.linear]
        if latent is not None and dlatent is not None and mine.lora_b is not None:
            if rows.lora_b is not None:
                _put(rows.lora_b, d.t(), block.rows(latent))
            block.add(dlatent, d, call.cast(mine.lora_b))
    del x
    if dx is None:
        return
    weights = [call.cast(mine.weight) for mine in given if mine.weight is not None]
    if block.is_whole:
        for d, weight in zip(dpre, weights, strict=True):
            dx.addmm_(d, weight)
        return
    rows_dx = dpre[0] @ weights[0]
    for d, weight in zip(dpre[1:], weights[1:], strict=True):
        rows_dx.addmm_(d, weight)
    dx.index_add_(0, block.tokens, rows_dx)


def _put(target: Tensor, left: Tensor, right: Tensor) -> None:
    """Write left right into `target`, whose dtype may be another."""
    if target.dtype == left.dtype:
        torch.mm(left, right, out=target)
    else:
        target.copy_(left @ right)
