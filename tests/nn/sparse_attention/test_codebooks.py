"""Codebooks: k-means finds what is there, averages follow keys that drift, and samples take every key alike."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memsave import ops
from memsave.nn.sparse_attention import codebooks
from memsave.nn.sparse_attention.codebooks import KeySample, first_counts, fit, follow

GROUPS, SUBSPACES, FEATURES = 3, 2, 4


def planted(count: int = 400, noise: float = 0.05, seed: int = 0, codewords: int = 16) -> tuple[Tensor, Tensor]:
    """A sample (G, N, M d) around centers (G, M, C, d) that are far from each other, and the centers."""
    g = torch.Generator().manual_seed(seed)
    centers = 3 * torch.randn(GROUPS, SUBSPACES, codewords, FEATURES, generator=g)
    which = torch.randint(codewords, (GROUPS, SUBSPACES, count), generator=g)
    which[:, :, :codewords] = torch.arange(codewords)  # all are there
    points = centers.gather(2, which[..., None].expand(-1, -1, -1, FEATURES))
    points = points + noise * torch.randn(points.shape, generator=g)
    return points.transpose(1, 2).flatten(2), centers


def error(sample: Tensor, codebook: Tensor) -> float:
    """Mean squared distance of a key to the nearest codeword, summed over subspaces."""
    points = sample.unflatten(2, (codebook.shape[1], -1)).transpose(1, 2)
    return torch.cdist(points, codebook).square().amin(-1).sum(1).mean().item()


def test_planted_clusters_are_found() -> None:
    sample, centers = planted()
    codebook = fit(sample, SUBSPACES, 16)
    assert codebook.shape == centers.shape and codebook.dtype == torch.float32
    distances = torch.cdist(centers, codebook)
    assert distances.amin(-1).max() < 0.1  # the noise has 0.05 for each of four features
    nearest = distances.argmin(-1).sort(-1).values
    assert torch.equal(nearest, torch.arange(16).expand_as(nearest))


def test_each_head_and_each_subspace_has_its_own() -> None:
    sample, _ = planted()
    whole = fit(sample, SUBSPACES, 16)
    for group in range(GROUPS):
        for m in range(SUBSPACES):
            alone = fit(sample[group : group + 1, :, m * FEATURES : (m + 1) * FEATURES], 1, 16)
            torch.testing.assert_close(alone[0, 0], whole[group, m])


def test_the_same_sample_gives_the_same_codebook_and_no_random_number_is_drawn() -> None:
    sample, _ = planted(noise=2.0)
    torch.manual_seed(0)
    first = fit(sample, SUBSPACES, 16)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert torch.equal(fit(sample.clone(), SUBSPACES, 16), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_k_means_is_far_better_than_codewords_drawn_from_the_sample() -> None:
    sample, _ = planted(noise=0.3)
    points = sample.unflatten(2, (SUBSPACES, -1)).transpose(1, 2)
    drawn = min(error(sample, points[:, :, torch.randperm(400)[:16]].contiguous()) for _ in range(5))
    assert error(sample, fit(sample, SUBSPACES, 16)) < 0.5 * drawn


@pytest.mark.parametrize("count", [1, 3, 16, 17])
@pytest.mark.parametrize("codewords", [2, 16])
def test_few_keys(count: int, codewords: int) -> None:
    """No more codewords than keys differ; the rest repeat one, and the keys are the codewords."""
    sample, _ = planted(16)
    codebook = fit(sample[:, :count], SUBSPACES, codewords)
    assert codebook.shape == (GROUPS, SUBSPACES, codewords, FEATURES) and codebook.isfinite().all()
    if count <= codewords:
        assert error(sample[:, :count], codebook) < 1e-8


def test_keys_that_are_all_the_same() -> None:
    codebook = fit(torch.ones(2, 50, 8), 2, 16)
    assert torch.equal(codebook, torch.ones(2, 2, 16, 4))
    again, counts = follow(codebook, first_counts(codebook, torch.ones(2, 50, 8)), torch.ones(2, 50, 8), 0.9)
    assert torch.equal(again, codebook) and counts.isfinite().all()


def test_the_first_counts_are_shares() -> None:
    sample, _ = planted()
    codebook = fit(sample, SUBSPACES, 16)
    counts = first_counts(codebook, sample)
    points = sample.unflatten(2, (SUBSPACES, -1)).transpose(1, 2)
    nearest = torch.cdist(points, codebook).argmin(-1)  # (G, M, N)
    expected = torch.nn.functional.one_hot(nearest, 16).float().mean(2)
    torch.testing.assert_close(counts, expected)


@pytest.mark.parametrize("subspaces", [2, 1])
def test_following_is_the_average_of_sums_and_of_counts(subspaces: int) -> None:
    """One step by hand: N = decay N + (1 - decay) share, and the codeword is what sums and counts make."""
    sample, _ = planted(100, noise=0.5)
    codebook = fit(sample, subspaces, 16)
    counts = first_counts(codebook, sample)
    step, _ = planted(60, noise=0.5)
    decay = 0.8
    new, total = follow(codebook, counts, step, decay)
    points = step.unflatten(2, (subspaces, -1)).transpose(1, 2).double()
    nearest = torch.cdist(points, codebook.double()).argmin(-1)
    share = torch.nn.functional.one_hot(nearest, 16).double()  # (G, M, N, C)
    expected = decay * counts + (1 - decay) * share.mean(2)
    sums = decay * counts[..., None] * codebook + (1 - decay) * (share.mT @ points) / 60
    alive = expected > 2e-3 / 16
    assert alive.float().mean() > 0.9
    torch.testing.assert_close(total.double()[alive], expected[alive], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(new.double()[alive], (sums / expected[..., None])[alive], rtol=1e-4, atol=1e-5)


def test_keys_that_drift_are_followed() -> None:
    """After 40 steps the error is less than a quarter of that of the codebook that stayed."""
    sample, _ = planted(noise=0.3)
    stale = fit(sample, SUBSPACES, 16)
    codebook, counts = stale, first_counts(stale, sample)
    drift = torch.randn(GROUPS, 1, SUBSPACES * FEATURES, generator=torch.Generator().manual_seed(4))
    for step in range(40):
        now, _ = planted(300, noise=0.3, seed=0)
        now = now + 0.1 * step * drift
        codebook, counts = follow(codebook, counts, now, 0.8)
    assert error(now, codebook) < 0.25 * error(now, stale)
    assert codebook.isfinite().all() and counts.min() > 0


def test_what_is_given_is_not_changed() -> None:
    """A backward that is still to come has kept the old codebook."""
    sample, _ = planted(noise=0.3)
    codebook = fit(sample, SUBSPACES, 16)
    counts = first_counts(codebook, sample)
    versions = codebook._version, counts._version, sample._version
    new, total = follow(codebook, counts, sample, 0.9)
    assert (codebook._version, counts._version, sample._version) == versions
    storages = {t.untyped_storage().data_ptr() for t in (codebook, counts, sample)}
    assert not storages & {new.untyped_storage().data_ptr(), total.untyped_storage().data_ptr()}


def test_codewords_that_stand_for_nothing_come_back() -> None:
    """Half of them start far away; they move to keys, and the error falls."""
    sample, _ = planted(noise=0.05)
    codebook = fit(sample, SUBSPACES, 16)
    codebook[:, :, 8:] = 1000.0
    counts = first_counts(codebook, sample)
    before = error(sample, codebook)
    for _ in range(60):
        codebook, counts = follow(codebook, counts, sample, 0.7)
    assert codebook.abs().max() < 100  # all are at keys
    assert error(sample, codebook) < 0.4 * before
    codes = ops.pq_encode(sample[None], codebook)[0]
    used = torch.stack((codes & 15, codes >> 4), 2).flatten(1, 2)
    assert min(len(row.unique()) for group in used for row in group) >= 12


def test_without_decay_a_codeword_is_the_mean_of_the_steps_keys() -> None:
    sample, centers = planted(noise=0.05)
    moved = sample + 0.3
    codebook, counts = follow(fit(sample, SUBSPACES, 16), torch.full((GROUPS, SUBSPACES, 16), 1 / 16), moved, 0.0)
    assert torch.cdist(centers + 0.3, codebook).amin(-1).max() < 0.1
    torch.testing.assert_close(counts.sum(-1), torch.ones(GROUPS, SUBSPACES))


def numbered(batch: int, groups: int, keys: int, start: int = 0) -> Tensor:
    """Keys (B, G, S, 2) that say their group, and which of all tokens they are."""
    tokens = torch.arange(start, start + batch * keys).view(batch, 1, keys, 1).expand(-1, groups, -1, -1)
    heads = torch.arange(groups).view(1, groups, 1, 1).expand(batch, -1, keys, -1)
    return torch.cat((heads, tokens), -1).float()


@pytest.mark.parametrize("batch", [1, 3])
def test_a_sample_holds_all_keys_while_they_are_few(batch: int) -> None:
    sample = KeySample(100)
    for start in (0, 1000):
        sample.add(numbered(batch, 2, 10, start))
    assert sample.keys is not None and sample.keys.shape == (2, 20 * batch, 2)
    for group in (0, 1):
        assert (sample.keys[group, :, 0] == group).all()
        tokens = sample.keys[group, :, 1].sort().values.tolist()
        assert tokens == [*range(10 * batch), *range(1000, 1000 + 10 * batch)]
    assert torch.equal(sample.keys[0, :, 1], sample.keys[1, :, 1])  # the same tokens of each head


def test_every_key_is_as_likely_as_any_other() -> None:
    """Of 4000 keys in forwards of several sizes 400 are taken, and as many from each forward as its share is."""
    sample = KeySample(400)
    start = 0
    for size in (1000, 10, 1990, 1000):
        sample.add(numbered(1, 1, size, start))
        start += size
    assert sample.keys is not None
    tokens = sample.keys[0, :, 1]
    assert tokens.shape == (400,) and len(tokens.unique()) == 400
    for first, last in ((0, 1000), (1010, 3000), (3000, 4000)):
        share = ((tokens >= first) & (tokens < last)).float().mean().item()
        assert abs(share - (last - first) / 4000) < 0.08  # three standard deviations


def test_padding_is_no_key() -> None:
    sample = KeySample(100)
    seen = torch.ones(2, 10, dtype=torch.bool)
    seen[1, :6] = False
    sample.add(numbered(2, 2, 10), seen)
    assert sample.keys is not None and sample.keys[1, :, 1].sort().values.tolist() == [*range(10), *range(16, 20)]
    sample.add(numbered(2, 2, 10), torch.zeros(2, 10, dtype=torch.bool))
    assert sample.keys.shape[1] == 14
    nothing = KeySample(5)
    nothing.add(numbered(2, 2, 10), torch.zeros(2, 10, dtype=torch.bool))
    nothing.add(numbered(2, 2, 0))
    assert nothing.keys is not None and nothing.keys.shape == (2, 0, 2)


def test_a_sample_draws_none_of_the_random_numbers_of_training_and_keeps_no_graph() -> None:
    before = torch.get_rng_state()
    keys = numbered(2, 2, 50).requires_grad_()
    samples = [KeySample(7) for _ in range(2)]
    for sample in samples:
        sample.add(keys.bfloat16())
    assert torch.equal(torch.get_rng_state(), before)
    assert samples[0].keys is not None and samples[1].keys is not None
    assert torch.equal(samples[0].keys, samples[1].keys)
    assert samples[0].keys.dtype == torch.float32 and not samples[0].keys.requires_grad
    assert codebooks.SAMPLE_KEYS >= 16 * codebooks.ITERATIONS
