"""Which keys are chosen: the right number, those that matter, one choice for a group of heads, whole blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memsave import ops
from memsave.nn.sparse_attention import codebooks
from memsave.nn.sparse_attention.selecting import Choice, Visibility, choose, chunk_rows

from .toys import SIZE, Case, choice, chosen, codebook, inputs, of_lists, sight, visible

by_granularity = pytest.mark.parametrize("granularity", ["token", "block"])
ALL = Visibility(None, False, 0, 0, True)


@pytest.mark.parametrize(
    ("keep", "keys", "single", "blocks"),
    [
        (0.125, 1000, 125, 8),  # of 63 blocks
        (0.1, 101, 11, 3),
        (0.5, 160, 80, 5),
        (1.0, 33, 33, 3),
        (0.001, 500, 1, 3),
        (7, 500, 7, 3),
        (65, 500, 65, 5),
        (500, 40, 40, 3),
        (1, 10, 1, 1),
        (1, 1, 1, 1),
    ],
)
def test_how_many_keys(keep: float | int, keys: int, single: int, blocks: int) -> None:
    """A fraction is rounded up, to keys or to whole blocks; three blocks at least, where there are three."""
    assert Choice(keep, "token", SIZE).num_keys(keys) == single
    how = Choice(keep, "block", SIZE)
    assert how.num_blocks(keys) == blocks and how.num_keys(keys) == min(keys, blocks * SIZE)
    assert (how.size, Choice(keep, "token", SIZE).size) == (SIZE, 1)


@by_granularity
@pytest.mark.parametrize("mask", ["none", "left", "right", "full", "heads"])
@pytest.mark.parametrize("window", [0, 20])
def test_lists_ascend_without_repeats_and_hold_as_many_as_there_are(granularity: str, mask: str, window: int) -> None:
    case, how = Case(90, 90, mask=mask, is_causal=True, window=window), choice(granularity)
    q, k, *_ = inputs(case)
    words, see = codebook(case), sight(case)
    lists = choose(q.detach(), slice(0, 90), ops.pq_encode(k.detach(), words), words, how, see, 0.3)
    assert lists.shape == (2, 2, 90 if granularity == "token" else 6, 9 if granularity == "token" else 3)
    assert lists.dtype == torch.int32 and lists.max() < (90 if granularity == "token" else 6)
    following, there = lists[..., 1:] > lists[..., :-1], lists[..., 1:] >= 0
    assert torch.equal(following, there)  # after the first -1 nothing follows
    seen = visible(case, see)
    if granularity == "token":
        found = of_lists(lists, 90, 90, 1)
        assert not (found & ~seen).any()
        assert torch.equal(found.sum(-1), seen.sum(-1).clamp(max=9))


@pytest.mark.parametrize("mask", ["none", "left", "right", "full"])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("ordered_mask", [False, True])
def test_a_query_of_a_block_never_loses_what_stands_beside_it(mask: str, is_causal: bool, ordered_mask: bool) -> None:
    """Its own block is chosen, whatever the first query of that block sees: one that sees its own key gets it."""
    case, how = Case(150, 150, mask=mask, is_causal=is_causal), choice("block")
    see = sight(case)
    if ordered_mask:  # as transformers gives it: the order is in the mask, and nothing else says it
        see = Visibility(visible(case, see)[:, :1], False, 0, 0, True)
    q, k, *_ = inputs(case)
    allowed = chosen(q, k, codebook(case), how, see, 0.3)
    own = visible(case, see).diagonal(dim1=2, dim2=3)
    assert (allowed.diagonal(dim1=2, dim2=3) | ~own).all()


def test_queries_of_a_cache_stand_at_its_end() -> None:
    """The last queries alone get the keys that they get among all of them; blocks that hold them and the first one."""
    case = Case(90, 90, is_causal=True)
    q, k, *_ = inputs(case)
    words = codebook(case)
    whole = chosen(q, k, words, choice("token"), sight(case), 0.3)
    last = chosen(q[:, :, 77:], k, words, choice("token"), Visibility(None, True, 0, 77, True), 0.3)
    assert torch.equal(last, whole[:, :, 77:])
    block = chosen(q[:, :, 77:], k, words, choice("block"), Visibility(None, True, 0, 77, True), 0.3)
    assert block[..., :SIZE].all() and block[..., 64:90].all()  # of 77 to 92, in two blocks


@by_granularity
def test_one_choice_serves_the_heads_of_a_group(granularity: str) -> None:
    """The choice of a group is that of its own queries and codebook alone; the order of its heads does not count."""
    case, how = Case(120, 120, is_causal=True), choice(granularity)
    q, k, *_ = inputs(case)
    words, see = codebook(case), sight(case)
    both = chosen(q, k, words, how, see, 0.3)
    for group in (0, 1):
        heads = slice(2 * group, 2 * group + 2)
        alone = chosen(q[:, heads], k[:, group : group + 1], words[group : group + 1], how, see, 0.3)
        assert torch.equal(alone[:, 0], both[:, group])
    swapped = q[:, [1, 0, 3, 2]]
    assert torch.equal(chosen(swapped, k, words, how, see, 0.3), both)
    assert not torch.equal(both[:, 0], both[:, 1])
    assert not torch.equal(chosen(q[:, [0, 2, 1, 3]], k, words, how, see, 0.3), both)


@by_granularity
def test_in_chunks_the_choice_is_the_same(granularity: str) -> None:
    case, how = Case(150, 150, is_causal=True, mask="full", window=90), choice(granularity)
    q, k, *_ = inputs(case)
    words, see = codebook(case), sight(case)
    codes = ops.pq_encode(k.detach(), words)
    whole = choose(q.detach(), slice(0, 150), codes, words, how, see, 0.3)
    for step in (SIZE, 3 * SIZE):
        parts = [slice(start, min(150, start + step)) for start in range(0, 150, step)]
        assert torch.equal(torch.cat([choose(q.detach(), p, codes, words, how, see, 0.3) for p in parts], 2), whole)


@by_granularity
@pytest.mark.parametrize("batch", [1, 64])
def test_chunks_are_whole_blocks(granularity: str, batch: int) -> None:
    q, k = torch.empty(batch, 8, 4096, 64, device="meta"), torch.empty(batch, 8, 4096, 64, device="meta")
    rows = chunk_rows(q, k, torch.empty(8, 8, 16, 8), Choice(0.125, granularity, 64))
    assert rows % (64 if granularity == "block" else 1) == 0 and rows >= 1
    assert rows <= 64 or batch == 1


@by_granularity
def test_a_codebook_of_the_keys_themselves_finds_the_largest_product(granularity: str) -> None:
    """Sixteen keys that are the codewords, all in one subspace: estimates differ from products by rounding alone."""
    g = torch.Generator().manual_seed(2)
    words = torch.randn(2, 1, 16, 8, generator=g)
    which = torch.randint(16, (2, 2, 160), generator=g)
    # Every key is one of sixteen; the one that each query wants stands in one place alone, in the middle of a block.
    key = words[torch.arange(2)[:, None], 0, which]
    query = torch.randn(2, 2, 160, 8, generator=g)
    how = Choice(160 // 4, granularity, SIZE)
    allowed = chosen(query, key, words[:, :1], how, ALL, 1.0)
    if granularity == "token":
        best = (query @ key.mT).argmax(-1, keepdim=True)
        # Of several keys with the largest product one is as good as the other.
        products = (query @ key.mT).masked_fill(~allowed, float("-inf"))
        assert torch.equal(products.amax(-1), (query @ key.mT).gather(-1, best).squeeze(-1))
    else:
        query = query[:, :, :1].expand(-1, -1, 160, -1)  # one wish for all
        places = torch.tensor([53, 86])
        wanted = torch.zeros(2, 2, 160, 8)
        wanted[:, :, places] = 3 * query[:, :, places]
        best_words = torch.stack([torch.stack([3 * query[b, h, 0] for b in (0, 1)]) for h in (0, 1)])[:, None]
        words = torch.cat((best_words, torch.zeros(2, 1, 14, 8)), 2)
        allowed = chosen(query, wanted, words, choice("block", 4 * SIZE), ALL, 1.0)
        assert allowed[..., places].all() and not allowed.all()


def structured(groups: int, keys: int, seed: int) -> tuple[Tensor, Tensor]:
    """Queries and keys (1, h, T, 32), each around centers of their own, in runs of tokens, with noise."""
    g = torch.Generator().manual_seed(0)
    of_keys, of_queries = torch.randn(2, groups, 12, 32, generator=g)
    g.manual_seed(seed)
    topics = torch.randint(12, (keys // 8,), generator=g).repeat_interleave(8)
    key = of_keys[:, topics] + 0.5 * torch.randn(groups, keys, 32, generator=g)
    query = of_queries[:, topics.flip(0)] + 0.5 * torch.randn(groups, keys, 32, generator=g)
    return 2 * query[None], key[None]


def mass(allowed: Tensor, query: Tensor, key: Tensor) -> float:
    """The share of all attention that goes to what is allowed."""
    return ((query @ key.mT * 32**-0.5).softmax(-1) * allowed).sum(-1).mean().item()


def by_equal_codes(query: Tensor, key: Tensor, keep: int) -> Tensor:
    """The paper's choice: codes of queries and keys by one codebook for all heads, and how many are equal."""
    both = torch.cat((query, key), 2)[0].flatten(0, 1)[None]
    words = codebooks.fit(both, 4, 16).expand(query.shape[1], -1, -1, -1)
    codes = []
    for x in (query, key):
        packed = ops.pq_encode(x, words)
        codes.append(torch.stack((packed & 15, packed >> 4), 3).flatten(2, 3))  # (1, h, M, T)
    equal = sum((codes[0][:, :, m, :, None] == codes[1][:, :, m, None]).int() for m in range(4))
    best = torch.as_tensor(equal).topk(keep, dim=-1).indices
    return torch.zeros(best.shape[:3] + (key.shape[2],), dtype=torch.bool).scatter_(-1, best, True)


def test_more_of_the_attention_than_at_random_and_than_by_equal_codes() -> None:
    """Of 512 keys 64 are kept, after fitting to other keys of the same kind; the measure is the best choice."""
    _, sample = structured(2, 4096, seed=1)
    words = codebooks.fit(sample[0], 4, 16)
    query, key = structured(2, 512, seed=2)
    keep = 64
    scores = query @ key.mT
    best = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(keep).indices, True)
    possible = mass(best, query, key)
    ours = mass(chosen(query, key, words, Choice(keep, "token", SIZE), ALL, 32**-0.5), query, key)
    theirs = mass(by_equal_codes(query, key, keep), query, key)
    at_random = keep / 512
    assert ours > 0.8 * possible and ours > theirs + 0.3 and ours > at_random + 0.4
    blocks = mass(chosen(query, key, words, Choice(10 * SIZE, "block", SIZE), ALL, 32**-0.5), query, key)
    assert blocks > 10 * SIZE / 512 + 0.2


def test_in_order_blocks_are_chosen_by_the_first_query_and_those_before_it() -> None:
    """The key that all of a run of queries want is found from the queries of the block before."""
    g = torch.Generator().manual_seed(3)
    key = torch.randn(1, 1, 320, 32, generator=g)
    query = torch.randn(1, 1, 320, 32, generator=g)
    key[:, :, 100] = 4 * torch.ones(32)
    query[:, :, 239:256] = 2 * torch.ones(32)  # the block of 240, and the last query of the block before
    words = codebooks.fit(key[0], 4, 16)
    allowed = chosen(query, key, words, choice("block"), Visibility(None, True, 0, 0, True), 32**-0.5)
    assert allowed[0, 0, 240:256, 100].all()
    query[:, :, 239:241] = 0
    allowed = chosen(query, key, words, choice("block"), Visibility(None, True, 0, 0, True), 32**-0.5)
    later = query.clone()
    later[:, :, 241:] = torch.randn(1, 1, 79, 32, generator=g)
    again = chosen(later, key, words, choice("block"), Visibility(None, True, 0, 0, True), 32**-0.5)
    assert torch.equal(again[:, :, :256], allowed[:, :, :256])
