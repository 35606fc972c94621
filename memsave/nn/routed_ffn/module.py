"""A feed-forward block whose hidden units are divided into blocks; each token uses only the best of them.

x is (..., D), N tokens; F hidden units in G blocks, of which k are active; y (..., O). With p = softmax(router(x)) and
c_i = G p_i for a token's k most probable blocks:

    y = sum_i c_i V_i act(W_i x + b_i) + b,    or with act(gate) * up in the place of act

With all blocks active and equal p this is the dense block: c = 1. Source: SPT, arXiv 2312.10365.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops.activation import reference as activation_reference
from ..eager import autocast_enabled, no_autocast, plain, product_dtype
from ..matrix import as_matrix, in_shape
from .layout import PARTS, Layout, LinearPart, down_weight, linear_parts, unit_rows
from .products import Work, routed
from .routing import Balance, Router, chosen_blocks, dispatch


class Sizes(NamedTuple):
    """D, F and O of a block."""

    features: int
    units: int
    outputs: int


class RoutedFFN(nn.Module):
    """What `RoutedFFNConfig` puts in the place of a feed-forward block; made by `replacing.routed_ffn`.

    Its parameters are named by what they compute: `gate_weight` and `up_weight`, or `gate_up_weight`, and
    `down_weight`, each with `_bias`, `_lora_a` and `_lora_b` where there is one, in the layout of the linears that
    they come from; besides `router.weight` and `router.bias`. `unit_order` (F,) says which unit of the original each
    is, and is None where none was moved. Dropout children are in `others`.

    Attributes:
        layout: its structure.
        sizes: D, F and O.
        dropout, trailing: the names of dropout children between the linears and at the end, or None.
    """

    unit_order: Tensor | None

    def __init__(
        self,
        layout: Layout,
        sizes: Sizes,
        router: Router,
        balance_loss: float,
        *,
        dropout: str | None,
        trailing: str | None,
    ) -> None:
        super().__init__()
        self.layout, self.sizes, self.router = layout, sizes, router
        self.dropout, self.trailing = dropout, trailing
        self.others = nn.Module()
        self.balance = Balance(balance_loss)
        self.register_buffer("unit_order", None)
        for name in layout.names:
            for part in PARTS:
                self.register_parameter(f"{name}_{part}", None)

    @property
    def balance_loss(self) -> Tensor | None:
        """The balance loss of the latest forward, for logging: its gradient is added in backward as it is."""
        return self.balance.value

    @property
    def load(self) -> Tensor | None:
        """(G,): each block's share of the tokens of the latest forward."""
        return self.balance.load

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            y = self._not_compiled(x)
        else:
            y = self.reference(x) if plain(x) else self._routed(x)
        return y if self.trailing is None else self.others.get_submodule(self.trailing)(y)

    @torch.compiler.disable
    def _not_compiled(self, x: Tensor) -> Tensor:
        """How many tokens a block gets is known in eager mode alone, so the compiler's graph breaks here."""
        return self._routed(x)

    def _routed(self, x: Tensor) -> Tensor:
        dtype = self._check(x)
        flat = as_matrix(x).to(dtype)  # (N, D)
        p = self.router(flat)
        active = self.layout.active
        with torch.no_grad():
            sent = dispatch(chosen_blocks(p, active), active)
        self.balance.note(p, sent.counts)
        work = Work(self.layout, self.balance if self._balances() else None, dtype)
        y = routed(flat, p, sent, work, self._tensors())
        return in_shape(y, torch.Size((*x.shape[:-1], self.sizes.outputs)))

    def _check(self, x: Tensor) -> torch.dtype:
        """The dtype of the products.

        Raises:
            ValueError: x is of another width or dtype than the weights, or the dropout child would drop units.
        """
        weight: Tensor = self.down_weight  # type: ignore[assignment]
        dtype = product_dtype(x, weight)
        if x.dim() == 0 or x.shape[-1] != self.sizes.features or not (autocast_enabled(x) or x.dtype == weight.dtype):
            raise ValueError(
                f"RoutedFFN: expected an input (..., {self.sizes.features}) of {weight.dtype}, got {tuple(x.shape)} of "
                f"{x.dtype}; nothing was computed"
            )
        dropout = None if self.dropout is None else self.others.get_submodule(self.dropout)
        if isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0:
            raise ValueError(
                f"RoutedFFN: its child {self.dropout} would drop hidden units (p = {dropout.p}), which a routed block "
                "does not; set its p to 0"
            )
        return dtype

    def _balances(self) -> bool:
        return self.training and self.balance.alpha > 0

    def _tensors(self) -> list[Tensor | None]:
        return [self._parameters[f"{name}_{part}"] for name in self.layout.names for part in PARTS]

    def reference(self, x: Tensor) -> Tensor:
        """The same function and gradients, without what `trailing` does, in plain autograd and with all units."""
        flat = as_matrix(x)
        if autocast_enabled(x):
            flat = flat.to(product_dtype(x, self.down_weight))  # type: ignore[arg-type]
        p = self.router.reference(flat)
        chosen = chosen_blocks(p.detach(), self.layout.active)
        if self._balances() and p.requires_grad and not torch._C._are_functorch_transforms_active():
            counts = chosen.sum(0)
            p.register_hook(lambda dp: dp + self.balance.gradient(counts, dp))
        c = p * self.layout.blocks * chosen  # (N, G)
        parts = linear_parts(self._tensors())
        h = self._reference_hidden(flat, parts)  # (N, F)
        h = (h.unflatten(1, (self.layout.blocks, -1)) * c[:, :, None].to(h.dtype)).flatten(1)
        weight = down_weight(self.layout, parts[-1])
        assert weight is not None
        y = F.linear(h, weight, parts[-1].bias)
        if parts[-1].lora_a is not None and parts[-1].lora_b is not None:
            y = y + self.layout.scaling * F.linear(F.linear(h, parts[-1].lora_a), parts[-1].lora_b)
        return y.reshape(*x.shape[:-1], self.sizes.outputs)

    def _reference_hidden(self, x: Tensor, parts: list[LinearPart]) -> Tensor:
        pre = []
        for rows in unit_rows(self.layout, parts, self.sizes.units):
            assert rows.weight is not None
            each = F.linear(x, rows.weight, rows.bias)
            lora_a = parts[rows.linear].lora_a
            if lora_a is not None and rows.lora_b is not None:
                each = each + self.layout.scaling * F.linear(F.linear(x, lora_a), rows.lora_b)
            pre.append(each)
        with no_autocast(x):
            h = activation_reference.activation(pre[0], self.layout.activation)
            return h * pre[1] if self.layout.gated else h

    def kept_bytes(self, input_shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """Bytes that one training forward keeps, parameters and what a trailing dropout keeps not counted.

        N * D elements of x and N * k * F / G of pre, twice if gated; p (N, G) in float32 or wider; as int32 the order
        (N * k,) and the counts (G,).
        """
        num_tokens, blocks = prod(input_shape[:-1]), self.layout.blocks
        slots = num_tokens * self.layout.active
        kept = (
            num_tokens * self.sizes.features + slots * self._units_per_block() * (1 + self.layout.gated)
        ) * dtype.itemsize
        return kept + num_tokens * blocks * max(4, dtype.itemsize) + (slots + blocks) * 4

    def flops(self, input_shape: tuple[int, ...]) -> int:
        """Of the matrix products of one forward, low-rank ones not counted: 2 for a multiplication and an addition."""
        num_tokens = prod(input_shape[:-1])
        products = (1 + self.layout.gated) * self.sizes.features + self.sizes.outputs
        of_blocks = num_tokens * self.layout.active * self._units_per_block() * products
        return 2 * (of_blocks + num_tokens * self.sizes.features * self.layout.blocks)

    def _units_per_block(self) -> int:
        return self.sizes.units // self.layout.blocks

    def extra_repr(self) -> str:
        features, units, outputs = self.sizes
        text = f"in_features={features}, hidden={units}, out_features={outputs}, {self.layout.active} of "
        configs = ", ".join(str(config) for config in self.__dict__.get("_memsave", {}).values())
        return f"{text}{self.layout.blocks} blocks" + (f", memsave: {configs}" if configs else "")
