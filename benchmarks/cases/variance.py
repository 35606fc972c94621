"""The benchmark case of the estimators' variance."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from .case import Case


@dataclass(frozen=True, kw_only=True)
class VarianceCase(Case):
    """The variance of the sampled weight gradient, relative to its squared norm, by estimator.

    x (N, D) has row norms exp(sigma * z) for normal z, dy (N, O) = x A / |x A| + noise has rows of equal norm.
    """

    kind: ClassVar[str] = "variance"

    keep_ratios: tuple[float, ...]
    sigmas: tuple[float, ...]
    rows: int = 512
    features: int = 64
    outputs: int = 64
    draws: int = 400

    def describe(self) -> dict[str, Any]:
        settings = asdict(self)
        names = ("keep_ratios", "sigmas", "rows", "features", "outputs", "draws")
        return super().describe() | {name: settings[name] for name in names}


VARIANCE_CASES = (
    VarianceCase(
        name="wta_crs_variance",
        method="wta_crs",
        title="variance of the estimators",
        keep_ratios=(0.1, 0.3, 0.5),
        sigmas=(0.0, 0.5, 1.0),
        tiny={"rows": 64, "features": 8, "outputs": 8, "draws": 50, "sigmas": (0.0,), "keep_ratios": (0.5,)},
    ),
)
