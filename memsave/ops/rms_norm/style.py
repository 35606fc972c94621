"""The styles of RMSNorm, and the dtypes that follow from them; xhat = x / sqrt(mean(x^2) + eps)."""

from __future__ import annotations

from enum import IntEnum

import torch

HALF = (torch.float16, torch.bfloat16)


class Style(IntEnum):
    """Where RMSNorms round to the input's dtype and how they apply the weight; numbers, because schemas take no enum.

    CAST_THEN_SCALE is weight * cast(xhat); CAST_TO_WEIGHT weight * xhat, cast to the weight's dtype if that is a half
    type; SCALE_THEN_CAST cast(weight * xhat); ONE_PLUS cast((1 + weight) * xhat).
    """

    CAST_THEN_SCALE = 0
    CAST_TO_WEIGHT = 1
    SCALE_THEN_CAST = 2
    ONE_PLUS = 3


def statistic_dtype(x: torch.dtype, double: bool) -> torch.dtype:
    """Of rstd, and what is computed in: float32, or float64 for float64 inputs where `double`."""
    return torch.float64 if double and x == torch.float64 else torch.float32


def rounded_dtype(x: torch.dtype, weight: torch.dtype | None, style: int) -> torch.dtype | None:
    """What xhat is cast to before it is scaled, or None."""
    if weight is None or style == Style.CAST_THEN_SCALE:
        return x
    return weight if style == Style.CAST_TO_WEIGHT and weight in HALF else None


def output_dtype(x: torch.dtype, weight: torch.dtype | None, style: int, double: bool) -> torch.dtype:
    """Of y: what the products have, cast to the dtype of x where the style ends with a cast."""
    if weight is None or style in (Style.SCALE_THEN_CAST, Style.ONE_PLUS):
        return x
    return torch.promote_types(weight, rounded_dtype(x, weight, style) or statistic_dtype(x, double))
