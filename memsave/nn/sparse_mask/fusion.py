"""Fusing sparse deltas into one: delta = sum_p weight_p * delta_p.

P parts, the p-th with K_p values; K values in the union of their masks.

Source: Bhardwaj et al., "Sparse High Rank Adapters", 2024 (arXiv 2406.13175), section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from .checks import check_delta


def fuse(parts: Sequence[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor]:
    """The weighted sum of sparse deltas, bit for bit the same in every order of the parts.

    Each product weight * value is rounded to float64. What meets at an index is added up from the smallest product to
    the largest, and the sum is rounded once, to the dtype of the result.

    Args:
        parts: (indices (K_p,) int32 strictly ascending, values (K_p,), weight); all on one device.

    Returns:
        indices (K,) int32, strictly ascending, the union of all masks; values (K,) in the dtype to which those of the
        parts promote.

    Raises:
        ValueError: there are no parts, or one is not a valid delta.
    """
    if not parts:
        raise ValueError("fuse: expected at least one part, got none")
    for indices, values, _ in parts:
        check_delta(indices, values)
    dtype = reduce(torch.promote_types, (values.dtype for _, values, _ in parts))
    places = torch.cat([indices for indices, _, _ in parts])
    products = torch.cat([values.detach().to(torch.float64) * weight for _, values, weight in parts])
    # By index, and at each index by product: equal products may change places, which changes no sum.
    products, order = products.sort(stable=True)
    places, by_place = places[order].sort(stable=True)
    products = products[by_place]
    union, group, sizes = places.unique_consecutive(return_inverse=True, return_counts=True)
    starts = sizes.cumsum(0) - sizes
    ranks = torch.arange(places.numel(), device=places.device) - starts[group]
    total = torch.zeros(union.shape, dtype=torch.float64, device=places.device)
    # No index has two entries of one rank, so that nothing is left to the order in which a kernel adds.
    for rank in range(len(parts)):
        now = ranks == rank
        total[group[now]] += products[now]
    return union, total.to(dtype)
