"""Measures which share of the attention chosen keys hold, in the demo's model after some training.

Shapes: B sequences of T bytes, h heads of D features, N blocks of tokens. Attention is (B, h, T, T), and so are masks
of chosen keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import memsave
from benchmarks import demo
from benchmarks.cases.sparse_attention import RecallCase
from benchmarks.checks import CheckFailed
from memsave import ops
from memsave.nn.sparse_attention import codebooks
from memsave.nn.sparse_attention.selecting import Choice

from .sparse_attention import CODEWORDS, FEATURES_OF_SUBSPACE, causal_mask, lists_of, visible_keys

SEED = 0
ROUNDING = 1e-4
BEST, OURS = "best there is", "memsave"
PAPER = "equal codes, one codebook for queries and keys (paper)"
RECENT, RANDOM, MEANS = "most recent", "random", "products of means"

Choose = Callable[[Choice], Tensor]


def run_recall_case(case: RecallCase, device: str, rounds: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """For each way, tokens that are chosen together (`size`) and share of the keys (`keep`): the attention found.

    It is the mean share in each of the `layers`; `keys` is how many a query has at most. `rounds` has no use here:
    nothing is timed.

    Raises:
        CheckFailed: a way chooses too many keys, or finds more than the best choice does.
    """
    train_text, text = demo.train_text(), demo.text(case.text)
    shape = (case.batch, case.length)
    run = train_text.Run("plain", demo.options(case, case.steps, SEED))
    batches = train_text.make_batches(text.train, case.steps, *shape, SEED)
    for index, batch in enumerate(batches):
        run.step(index, batch)
    calibration = list(batches[: case.calibration])
    validation = train_text.make_batches(text.validation, case.evaluated, *shape, SEED + 1)
    samples, found = attended(run.model, calibration), attended(run.model, list(validation))
    fitted = fitted_codebooks(run.model, calibration)
    layers = [
        Layer(*heads, codebook, shared(*sample)) for heads, codebook, sample in zip(found, fitted, samples, strict=True)
    ]
    results = []
    for keep in case.keeps:
        for size in (1, *case.block_sizes):
            choice = Choice(keep, "block" if size > 1 else "token", size)
            results += [figures | {"size": size, "keep": keep} for figures in compared(layers, choice)]
    return results, {}


def compared(layers: list[Layer], choice: Choice) -> Iterator[dict[str, Any]]:
    """The figures of every way to choose, the best one first."""
    best: list[float] = []
    for way in layers[0].ways(choice):
        shares = [layer.share(way, choice) for layer in layers]
        best = best or shares
        if any(share > most + ROUNDING for share, most in zip(shares, best, strict=True)):
            raise CheckFailed(f"{way}, {choice}: it finds {shares} of the attention, the best choice finds {best}")
        yield {"way": way, "keys": choice.num_keys(layers[0].length), "layers": [round(share, 4) for share in shares]}


class Attended(TorchFunctionMode):
    """Notes the queries and keys of every call of torch's attention, within."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.calls.append((args[0], args[1]))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def attended(model: Any, batches: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """By layer: queries and keys (B, h, T, D) of the batches together, as attention sees them."""
    calls = []
    model.eval()
    for batch in batches:
        with Attended() as noted:
            model(input_ids=batch)
        calls.append(noted.calls)
    return [tuple(torch.cat(parts) for parts in zip(*layer, strict=True)) for layer in zip(*calls, strict=True)]  # type: ignore[misc]


def fitted_codebooks(model: nn.Module, calibration: list[Tensor]) -> list[Tensor]:
    """By layer, the codebook (h, M, C, d) that converting fits."""
    converted = deepcopy(model)
    memsave.convert_model(converted, memsave.SparseMHAConfig(target_modules=r".*self_attn"), calibration=calibration)
    return [module.codebook for name, module in converted.named_modules() if name.endswith("self_attn")]


def shared(query: Tensor, key: Tensor) -> Tensor:
    """A codebook (h, M, C, d) for queries and keys alike."""
    sample = codebooks.KeySample(2 * codebooks.SAMPLE_KEYS)
    sample.add(torch.cat((query, key), dim=2))
    assert sample.keys is not None
    return codebooks.fit(sample.keys, query.shape[-1] // FEATURES_OF_SUBSPACE or 1, CODEWORDS)


class Layer:
    """The attention of one layer, and the ways to choose keys for it.

    Args:
        codebook: memsave's.
        shared: that of queries and keys alike.
    """

    def __init__(self, query: Tensor, key: Tensor, codebook: Tensor, shared: Tensor) -> None:
        self.query, self.key, self.codebook, self.shared = query, key, codebook, shared
        self.length = query.shape[2]
        self.causal = causal_mask(self.length, query.device)
        products = query @ key.mT * query.shape[-1] ** -0.5
        self.products = products.masked_fill(~self.causal, float("-inf"))
        self.attention = self.products.softmax(-1)

    def ways(self, choice: Choice) -> dict[str, Choose]:
        if choice.granularity == "block":
            return {BEST: self.best_blocks, OURS: self.ours, MEANS: self.means}
        return {BEST: self.best, OURS: self.ours, PAPER: self.equal_codes, RECENT: self.recent, RANDOM: self.random}

    def share(self, way: str, choice: Choice) -> float:
        """The mean over the later three quarters of the queries, which see more keys than are chosen.

        Raises:
            CheckFailed: too many keys are chosen.
        """
        chosen = self.ways(choice)[way](choice)
        most, allowed = int(chosen.sum(-1).max()), choice.num_keys(self.length)
        if most > allowed or (chosen & ~self.causal).any():
            raise CheckFailed(f"{way}, {choice}: a query has {most} keys, {allowed} are allowed, or has some after it")
        return float((self.attention * chosen).sum(-1)[:, :, self.length // 4 :].mean())

    def ours(self, choice: Choice) -> Tensor:
        lists = lists_of(self.query, self.key, self.codebook, choice, True)
        return visible_keys(lists, choice.size, self.length, True)

    def best(self, choice: Choice) -> Tensor:
        return self.largest(self.products, choice)

    def recent(self, choice: Choice) -> Tensor:
        return self.largest(self.places().expand_as(self.products), choice)

    def random(self, choice: Choice) -> Tensor:
        generator = torch.Generator().manual_seed(SEED)
        return self.largest(torch.rand(self.products.shape, generator=generator), choice)

    def equal_codes(self, choice: Choice) -> Tensor:
        """Keys by how many subspaces have the same codeword for query and key; of equal ones, the most recent."""
        queries, keys = (codes_of(t, self.shared) for t in (self.query, self.key))  # (B, h, M, T)
        count = torch.zeros_like(self.products)
        for m in range(queries.shape[2]):
            count += queries[:, :, m, :, None] == keys[:, :, m, None, :]
        return self.largest(count + self.places() / self.length, choice)

    def places(self) -> Tensor:
        return torch.arange(self.length, dtype=torch.float32)

    def largest(self, scores: Tensor, choice: Choice) -> Tensor:
        """The visible keys with the largest scores (B, h, T, T)."""
        places = scores.masked_fill(~self.causal, float("-inf")).topk(choice.num_keys(self.length), -1).indices
        return torch.zeros_like(self.products, dtype=torch.bool).scatter_(3, places, True) & self.causal

    def best_blocks(self, choice: Choice) -> Tensor:
        """Blocks by the attention that they hold."""
        size = choice.block_size
        missing = -self.length % size
        padded = F.pad(self.attention, (0, missing, 0, missing))
        return self.blocks(padded.unflatten(3, (-1, size)).unflatten(2, (-1, size)).sum((3, 5)), choice)

    def means(self, choice: Choice) -> Tensor:
        """Blocks by the product of the mean query and the mean key."""
        count = math.ceil(self.length / choice.block_size)
        parts = [[part.mean(2) for part in t.tensor_split(count, 2)] for t in (self.query, self.key)]
        queries, keys = (torch.stack(part, 2) for part in parts)
        return self.blocks(queries @ keys.mT, choice)

    def blocks(self, scores: Tensor, choice: Choice) -> Tensor:
        """The first block, the queries' own, and others before with the largest scores (B, h, N, N)."""
        count = scores.shape[-1]
        own = torch.arange(count)
        scores = scores.masked_fill(~causal_mask(count, scores.device), float("-inf"))
        scores[:, :, own, own] = scores[:, :, :, 0] = float("inf")
        return visible_keys(
            scores.topk(choice.num_blocks(self.length), -1).indices, choice.block_size, self.length, True
        )


def codes_of(x: Tensor, codebook: Tensor) -> Tensor:
    """x (B, h, T, D) -> the numbers of its codewords, (B, h, M, T)."""
    packed = ops.pq_encode(x, codebook)
    return torch.stack((packed & 15, packed >> 4), dim=3).flatten(2, 3)[:, :, : codebook.shape[1]]
