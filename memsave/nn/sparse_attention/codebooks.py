"""Codebooks: the codewords that stand for keys, fitted to a sample of keys, or following the keys while training.

G key/value heads, M subspaces of d features, C codewords; a sample is (G, N, D = M d) float32, a codebook (G, M, C, d)
float32, counts (G, M, C) float32: how many keys a codeword stands for, on average.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import ops

ITERATIONS = 15
SAMPLE_KEYS = 4096
"""How many keys of a head a codebook is fitted to."""
STEP_KEYS = 1024
"""How many keys of a head one forward adds to what a codebook follows."""
_DEAD = 1e-3
"""A codeword that stands for less than this part of the average moves to a key of the sample."""


class KeySample:
    """Keys of some forwards, every one as likely as any other: at most `limit` of each head.

    The choice comes from a generator of its own, so that the random numbers of training stay what they are.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._generator = torch.Generator().manual_seed(0)
        self._priorities = torch.empty(0)
        self.keys: Tensor | None = None

    @torch.no_grad()
    def add(self, key: Tensor, seen: Tensor | None = None) -> None:
        """Take keys (B, G, S, D) in; `seen` (B, S) bool: those that any query may see, or None for all."""
        places = torch.arange(key.shape[0] * key.shape[2])
        if seen is not None:
            places = places[seen.flatten().cpu()]
        priorities = torch.rand(places.shape, generator=self._generator)
        chosen = priorities.argsort()[: self._limit]
        places, priorities = places[chosen].to(key.device), priorities[chosen]
        rows = key.transpose(1, 2).flatten(0, 1)[places] if key.shape[0] > 1 else key[0].transpose(0, 1)[places]
        found = rows.transpose(0, 1).float()  # (G, n, D)
        if self.keys is not None:
            found, priorities = torch.cat((self.keys, found), dim=1), torch.cat((self._priorities, priorities))
            best = priorities.argsort()[: self._limit]
            found, priorities = found[:, best.to(found.device)], priorities[best]
        self.keys, self._priorities = found, priorities


@torch.no_grad()
def fit(sample: Tensor, subspaces: int, codewords: int) -> Tensor:
    """The codebook with the least squared error that k-means finds on a sample (G, N, D), N from 1 on.

    It starts from keys of the sample that are far from each other, as "k-means++" does (Arthur & Vassilvitskii 2007),
    but without drawing, so that the same sample gives the same codebook.
    """
    groups, count, size = sample.shape
    points = sample.unflatten(2, (subspaces, -1)).transpose(1, 2).flatten(0, 1).contiguous()  # (G M, N, d)
    centers = _farthest(points, min(codewords, count))
    for _ in range(ITERATIONS):
        nearest = torch.cdist(points, centers).argmin(-1)  # (G M, N)
        sums, counts = _sums(points, nearest, centers.shape[1])
        centers = torch.where(counts[..., None] > 0, sums / counts.clamp(min=1)[..., None], centers)
    missing = codewords - centers.shape[1]
    centers = torch.cat((centers, centers[:, :1].expand(-1, missing, -1)), dim=1)
    return centers.view(groups, subspaces, codewords, size // subspaces)


def _farthest(points: Tensor, count: int) -> Tensor:
    """(P, N, d) -> (P, count, d): the point nearest to the mean, then each time one that is far from those before.

    Not the farthest, which would be an outlier: the one that half of the squared distance lies beyond.
    """
    first = (points - points.mean(1, keepdim=True)).square().sum(-1).argmin(1)
    rows = torch.arange(points.shape[0], device=points.device)
    chosen = [points[rows, first]]
    distances = (points - chosen[0][:, None]).square().sum(-1)
    for _ in range(count - 1):
        ordered = distances.sort(dim=1)
        mass = ordered.values.cumsum(1)
        place = (mass < mass[:, -1:] / 2).sum(1).clamp(max=points.shape[1] - 1)
        chosen.append(points[rows, ordered.indices[rows, place]])
        distances = torch.minimum(distances, (points - chosen[-1][:, None]).square().sum(-1))
    return torch.stack(chosen, dim=1)


def _sums(points: Tensor, nearest: Tensor, codewords: int) -> tuple[Tensor, Tensor]:
    """points (P, N, d), nearest (P, N) -> their sums (P, C, d) and counts (P, C) by codeword."""
    sums = points.new_zeros(points.shape[0], codewords, points.shape[2])
    sums.scatter_add_(1, nearest[..., None].expand_as(points), points)
    counts = points.new_zeros(points.shape[0], codewords)
    return sums, counts.scatter_add_(1, nearest, torch.ones_like(nearest, dtype=points.dtype))


@torch.no_grad()
def follow(codebook: Tensor, counts: Tensor, sample: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """Codebook and counts after a step whose keys are `sample`: exponential moving averages (van den Oord et al. 2017).

    Counts weigh a step by its share of 1, so that its number of keys does not matter.
    """
    _, subspaces, codewords, _ = codebook.shape
    points = sample.unflatten(2, (subspaces, -1)).transpose(1, 2).flatten(0, 1)  # (G M, N, d)
    sums, new = _sums(points, _nearest(codebook, sample), codewords)
    share = (1 - decay) / sample.shape[1]
    old = counts.flatten(0, 1) * decay  # (G M, C)
    total = old + new * share
    mixed = (codebook.flatten(0, 1) * old[..., None] + sums * share) / total.clamp(min=1e-20)[..., None]
    centers = torch.where(total[..., None] > 0, mixed, codebook.flatten(0, 1))
    dead = total < _DEAD / codewords
    # Keys at even distances in the sample, another one for each codeword.
    spread = torch.arange(codewords, device=sample.device) * sample.shape[1] // codewords
    centers = torch.where(dead[..., None], points[:, spread], centers)
    total = torch.where(dead, total.new_tensor(1 / codewords), total)
    return centers.view_as(codebook), total.view_as(counts)


@torch.no_grad()
def first_counts(codebook: Tensor, sample: Tensor) -> Tensor:
    """Counts (G, M, C) of a codebook that was just fitted to `sample`."""
    nearest = _nearest(codebook, sample)
    counts = sample.new_zeros(len(nearest), codebook.shape[2])
    counts.scatter_add_(1, nearest, torch.ones_like(nearest, dtype=sample.dtype))
    return (counts / sample.shape[1]).view(codebook.shape[:3])


def _nearest(codebook: Tensor, sample: Tensor) -> Tensor:
    """(G, M, C, d), (G, N, D) -> (G M, N) int64: the nearest codeword of each subspace."""
    codes = ops.pq_encode(sample[None], codebook)[0]  # (G, P, N)
    both = torch.stack((codes & 15, codes >> 4), dim=2).flatten(1, 2)  # (G, 2 P, N)
    return both[:, : codebook.shape[1]].flatten(0, 1).long()
