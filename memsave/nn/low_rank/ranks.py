"""How large the ranks of low-rank linears are: by a ratio, by energy, or for a whole model under one budget.

A weight (O, D) has O * D parameters, its factors of rank R have R * (O + D). The energy of singular values is the sum
of their squares; the share beyond R is the relative squared error at rank R (see `factorize.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import floor

import torch
from torch import Tensor


def break_even_rank(out_features: int, in_features: int) -> int:
    """The largest rank whose factors have fewer parameters than the weight; 0 if there is none.

    Raises ValueError for features below 1.
    """
    if out_features < 1 or in_features < 1:
        raise ValueError(f"expected at least one feature on each side, got ({out_features}, {in_features})")
    return (out_features * in_features - 1) // (out_features + in_features)


def rank_for_ratio(out_features: int, in_features: int, ratio: float) -> int:
    """The largest rank whose factors have at most `ratio` times the parameters of the weight, but at least 1.

    Raises ValueError for a ratio outside (0, 1] or features below 1.
    """
    break_even_rank(out_features, in_features)
    _check_share("ratio", ratio)
    return max(1, floor(ratio * out_features * in_features / (out_features + in_features)))


def rank_for_energy(spectrum: Tensor, energy: float) -> int:
    """The least rank that holds at least the share `energy` of a spectrum's squares; 1 for zeros.

    Args:
        spectrum: (K,) singular values, descending.
        energy: in (0, 1].

    Raises:
        ValueError: an argument is not as described.
    """
    _check_share("energy", energy)
    held = _squares("spectrum", spectrum).cumsum(0)
    return min(int((held < energy * held[-1]).sum()) + 1, len(held))


def allocate(
    spectra: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], ratio: float
) -> dict[str, int | None]:
    """Ranks of many weights whose parameters are at most `ratio` times those of all the weights together.

    Every weight gets rank 1. Then singular components are bought in the order of their share of their weight's energy,
    by parameter, until the next one does not fit: what is left of the budget is less than one component. Beyond the
    break-even rank the rest of a weight is bought as a whole, for the parameters that the dense weight has more; it
    then stays dense. So no rank falls when the ratio rises, and without dense weights no other ranks hold more energy
    shares in the parameters that these take. Of equal components the lower rank goes first, then the first name.

    Args:
        spectra: by name the (min(O, D),) singular values, descending, as of `spectrum`.
        shapes: (O, D) by the same names.
        ratio: in (0, 1]; 1 leaves all dense.

    Returns:
        By name the rank, from 1 to `break_even_rank`, or None for a weight that stays dense.

    Raises:
        ValueError: an argument is not as described; not even rank 1 fits the budget.
    """
    _check_share("ratio", ratio)
    if spectra.keys() != shapes.keys():
        raise ValueError(f"shapes: names differ from those of spectra: {sorted(spectra.keys() ^ shapes.keys())}")
    if not spectra:
        return {}
    limits = {name: break_even_rank(*shape) for name, shape in shapes.items()}
    steps = [_steps(name, spectra[name], shapes[name], limits[name]) for name in spectra]
    budget = floor(ratio * sum(o * d for o, d in shapes.values()))
    budget -= (least := sum(o + d if limits[name] else o * d for name, (o, d) in shapes.items()))
    if budget < 0:
        raise ValueError(
            f"ratio: rank 1 everywhere takes {least:,} parameters, more than {ratio} of "
            f"{sum(o * d for o, d in shapes.values()):,}; expected a larger ratio"
        )
    gains, costs = torch.cat([gain for gain, _ in steps]), torch.cat([cost for _, cost in steps])
    owners = torch.cat([torch.full((len(gain),), i) for i, (gain, _) in enumerate(steps)])
    order = torch.cat([torch.arange(len(gain)) for gain, _ in steps]).argsort(stable=True)
    order = order[gains[order].argsort(stable=True, descending=True)]
    bought = order[: int((costs[order].cumsum(0) <= budget).sum())]
    counts = torch.bincount(owners[bought], minlength=len(steps)).tolist()
    ranks = {name: 1 + count for name, count in zip(spectra, counts, strict=True)}
    return {name: rank if rank <= limits[name] else None for name, rank in ranks.items()}


def _steps(name: str, spectrum: Tensor, shape: tuple[int, int], limit: int) -> tuple[Tensor, Tensor]:
    """Gains by parameter, and costs, of rank 2 to `limit` and of dense, in this order; none if dense from the start."""
    out_features, in_features = shape
    squares = _squares(f"spectra: {name}", spectrum)
    if len(squares) != min(shape):
        raise ValueError(f"spectra: {name}: expected {min(shape)} values for shape {shape}, got {len(squares)}")
    if not limit:
        return squares[:0], torch.zeros(0, dtype=torch.int64)
    total = squares.sum()
    shares = squares / torch.where(total > 0, total, 1.0)
    costs = torch.full((limit,), out_features + in_features)
    costs[-1] = out_features * in_features - limit * (out_features + in_features)
    gains = torch.cat([shares[1:limit], shares[limit:].sum()[None]]) / costs
    return gains.cummin(0).values, costs  # a step comes after those before it, even if it gains more


def _squares(what: str, spectrum: Tensor) -> Tensor:
    """In float64 on the CPU."""
    if spectrum.dim() != 1 or not len(spectrum):
        raise ValueError(f"{what}: expected singular values (K,), got shape {tuple(spectrum.shape)}")
    sigma = spectrum.detach().to(device="cpu", dtype=torch.float64)
    if not bool((sigma.isfinite() & (sigma >= 0)).all()) or bool((sigma[1:] > sigma[:-1]).any()):
        raise ValueError(f"{what}: expected finite singular values of at least 0, descending")
    return sigma.square()


def _check_share(what: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{what}: expected a number in (0, 1], got {value}")
