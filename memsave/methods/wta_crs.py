"""WTA-CRS: estimate each weight gradient from a few rows of the input, and keep only those rows for backward.

Winner-Take-All Column Row Sampling, Liu et al., NeurIPS 2023, arXiv 2305.15265. Of the N rows (tokens) of a linear's
input, k = keep_ratio * N are kept; dW = dy^T x is estimated from them without bias, all else is exact. The default
estimator is memsave's own: fixed-size sampling without replacement with probabilities proportional to size, which has
a lower variance than the paper's. Where the input is a converted norm's output, not even the k rows are kept: they
are recomputed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from .. import ops
from ..config import Guarantee, TargetedConfig
from ..nn.converted import swap, unswap, why_not_back, why_not_in_place
from ..nn.grad_norms import GradNormCache
from ..nn.linear import ConvertedLinear, is_linear
from ..nn.rows import ESTIMATORS, GRAD_NORMS, KeepRows


@dataclass(frozen=True, kw_only=True)
class WTACRSConfig(TargetedConfig):
    """Linears that keep sampled rows of their inputs, for `nn.Linear`, `Conv1D` and the `lora_A` linears of PEFT.

    Args:
        keep_ratio: fraction of the N input rows kept for backward, in (0, 1]; 1 is the plain linear.
        min_rows: never keep fewer rows than this (nor more than N).
        estimator: "pps" (default, lowest variance), "wta_crs" (the paper's) or "crs" (plain column-row sampling).
        grad_norms: "none" (default): rows are drawn by |x|; "sample_cache": by |x| (1 + r) / 2, where r is the token's
            gradient norm at its dataset sample's previous visit, over the batch's mean. It can lower the variance from
            the second epoch on. Steps must run in `with memsave.sample_ids(ids):`. Takes CPU memory: see
            `memsave.sample_cache_bytes`.
        save_grad_norms: whether these norms are part of the `state_dict` and of copies of the model.

    Raises:
        ValueError: a ratio outside (0, 1], min_rows below 1, an unknown estimator or grad_norms, save_grad_norms that
            is no bool or has nothing to save, or no target_modules.
    """

    name: ClassVar[str] = "wta_crs"
    guarantee: ClassVar[Guarantee] = Guarantee.UNBIASED_GRAD
    docs: ClassVar[str] = "docs/wta_crs.md"

    keep_ratio: float = 0.3
    min_rows: int = 16
    estimator: str = "pps"
    grad_norms: str = "none"
    save_grad_norms: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if (
            isinstance(self.keep_ratio, bool)
            or not isinstance(self.keep_ratio, (int, float))
            or not 0 < self.keep_ratio <= 1
        ):
            raise ValueError(f"WTACRSConfig.keep_ratio: expected a fraction in (0, 1], got {self.keep_ratio!r}")
        if isinstance(self.min_rows, bool) or not isinstance(self.min_rows, int) or self.min_rows < 1:
            raise ValueError(f"WTACRSConfig.min_rows: expected a whole number of at least 1, got {self.min_rows!r}")
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"WTACRSConfig.estimator: expected one of {list(ESTIMATORS)}, got {self.estimator!r}")
        if self.grad_norms not in GRAD_NORMS:
            raise ValueError(f"WTACRSConfig.grad_norms: expected one of {list(GRAD_NORMS)}, got {self.grad_norms!r}")
        if not isinstance(self.save_grad_norms, bool) or (self.save_grad_norms and self.grad_norms == "none"):
            raise ValueError(
                "WTACRSConfig.save_grad_norms: expected False, or True with grad_norms='sample_cache', got "
                f"{self.save_grad_norms!r} with {self.grad_norms!r}"
            )

    @property
    def optional_keys(self) -> tuple[str, ...]:
        return ("grad_norms",) if self.save_grad_norms else ()

    def candidate(self, module: nn.Module) -> bool:
        return is_linear(module)

    def why_not(self, module: nn.Module) -> str | None:
        if any(p.is_complex() for p in module.parameters(recurse=False)):
            return "its weight is complex; rows are sampled for real weights only"
        return why_not_in_place(module)

    def parts(self, module: nn.Module) -> Mapping[str, object]:
        keep = KeepRows(self.keep_ratio, self.min_rows, self.estimator, self.grad_norms)
        return {"keep": keep, "weight_grad": "rows"}

    def convert(self, module: nn.Module) -> nn.Module:
        swap(module, ConvertedLinear, self)
        if self.grad_norms == "sample_cache":
            module.__dict__["_memsave_grad_norms"] = GradNormCache(self.save_grad_norms)
        return module

    def why_not_restore(self, module: nn.Module) -> str | None:
        return why_not_back(module)

    def restore(self, module: nn.Module, *, adapters: str | None = None) -> nn.Module:
        module.__dict__.pop("_memsave_grad_norms", None)
        return unswap(module, self.name)

    def backend(self, module: nn.Module) -> str:
        return ops.serving("gather_rows", {p.device.type for p in module.parameters(recurse=False)})
