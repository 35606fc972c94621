"""Feed-forward blocks that keep their pre-activations only, or nothing but their input, and may sample in backward.

"elementwise" recomputes the activation and the product, a pass over memory. "all" repeats the matrix products up to
them, too: two of the nine of a gated block's step. With `keep_ratio` below 1 backward makes the three weight gradients
from a part of the rows, drawn where |x| and |dy| are both known, which pays for that. Sources: activation
checkpointing (Chen et al. 2016, arXiv 1604.06174); row sampling (Drineas et al. 2006; Liu et al. 2023, arXiv
2305.15265).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from .. import ops
from ..config import Guarantee, TargetedConfig
from ..nn.converted import swap, unswap, why_not_back, why_not_in_place
from ..nn.linear import ConvertedLinear, is_linear
from ..nn.mlp import ConvertedMLP
from ..nn.mlp_graph import NoMatch, looks_like_mlp, mlp_graph
from ..nn.rows import KeepRows

RECOMPUTE = ("elementwise", "all")


@dataclass(frozen=True, kw_only=True)
class RecomputeMLPConfig(TargetedConfig):
    """Gated and plain feed-forward blocks, recognized by what their forward does, with the linears in them.

    Args:
        recompute: "elementwise" (default): keep the pre-activations; "all": keep only the block's input.
        keep_ratio: fraction of the rows that make the weight gradients, in (0, 1]; below 1 these are estimates without
            bias, which needs recompute="all" and target_modules.
        min_rows: never draw from fewer rows of a chunk than this.

    Raises:
        ValueError: an unknown `recompute`, a ratio outside (0, 1], min_rows below 1, or a ratio below 1 without "all"
            or without target_modules.
    """

    name: ClassVar[str] = "recompute_mlp"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    default: ClassVar[bool] = True
    replaces_itself: ClassVar[bool] = True
    docs: ClassVar[str] = "docs/recompute_mlp.md"

    recompute: str = "elementwise"
    keep_ratio: float = 1.0
    min_rows: int = 16

    def __post_init__(self) -> None:
        ratio = self.keep_ratio
        if self.recompute not in RECOMPUTE:
            raise ValueError(f"RecomputeMLPConfig.recompute: expected one of {list(RECOMPUTE)}, got {self.recompute!r}")
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio <= 1:
            raise ValueError(f"RecomputeMLPConfig.keep_ratio: expected a fraction in (0, 1], got {ratio!r}")
        if ratio < 1 and self.recompute != "all":
            raise ValueError(
                "RecomputeMLPConfig.keep_ratio: rows are drawn in the backward that recompute='all' runs; got "
                f"{ratio!r} with recompute={self.recompute!r}"
            )
        if isinstance(self.min_rows, bool) or not isinstance(self.min_rows, int) or self.min_rows < 1:
            raise ValueError(
                f"RecomputeMLPConfig.min_rows: expected a whole number of at least 1, got {self.min_rows!r}"
            )
        if ratio < 1:
            object.__setattr__(self, "guarantee", Guarantee.UNBIASED_GRAD)
        super().__post_init__()

    def candidate(self, module: nn.Module) -> bool:
        return looks_like_mlp(module)

    def companions(self, module: nn.Module) -> Sequence[str]:
        if is_linear(module):
            return ()
        graph = mlp_graph(module)
        return [name for name in (*graph.linears, graph.down) if is_linear(module.get_submodule(name))]

    def fits(self, module: nn.Module) -> bool:
        return is_linear(module) or self.candidate(module)

    def why_not(self, module: nn.Module) -> str | None:
        if (reason := why_not_in_place(module)) or is_linear(module):
            return reason
        try:
            mlp_graph(module)
        except NoMatch as error:
            return str(error)
        return None

    def parts(self, module: nn.Module) -> Mapping[str, object]:
        if is_linear(module):
            return {}
        parts: dict[str, object] = {"mlp": mlp_graph(module), "recompute": self.recompute}
        if self.keep_ratio < 1:
            parts["backward_rows"] = KeepRows(self.keep_ratio, self.min_rows, "pps")
        return parts

    def convert(self, module: nn.Module) -> nn.Module:
        return swap(module, ConvertedLinear if is_linear(module) else ConvertedMLP, self)

    def why_not_restore(self, module: nn.Module) -> str | None:
        return why_not_back(module)

    def restore(self, module: nn.Module, *, adapters: str | None = None) -> nn.Module:
        return unswap(module, self.name)

    def backend(self, module: nn.Module) -> str:
        if is_linear(module):
            return "torch"
        return ops.serving("gated_activation", {p.device.type for p in module.parameters()})
