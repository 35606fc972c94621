"""Measures sparse attention alone: checked first, then bytes, and times in turns, at every length.

query (1, h, T, D), key and value (1, kv, T, D). memsave makes its lists of keys in every forward and every backward;
FlexAttention has its own beforehand.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memsave
from benchmarks.cases.sparse_attention import EAGER, FLEX, SDPA, AttentionCase
from benchmarks.checks import ERROR_BUDGET, CheckFailed
from memsave import ops
from memsave.nn.sparse_attention import codebooks
from memsave.nn.sparse_attention.function import attend
from memsave.nn.sparse_attention.selecting import Choice, Visibility, choose

from .models import allocated_bytes, release
from .timing import elapsed, in_turns, no_garbage_collection, summary

FEATURES_OF_SUBSPACE, CODEWORDS = 8, 16
SMALLEST_ROUNDS = 2
SUMMED_EPS = 32.0  # the gradients of single keys are added to one after another, thousands of times
# Of FlexAttention's kernels on a GPU: theirs are larger than a block, which they refuse.
TILES = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_M1": 32, "BLOCK_N1": 64, "BLOCK_M2": 64, "BLOCK_N2": 32}


def run_attention_case(case: AttentionCase, device: str, rounds: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """For each length and way: times `forward` and `backward`, `kept_bytes`, and `peak_bytes` beyond the inputs.

    None stands for what there is not. On a GPU, `peak_bytes` is what torch's allocator counts. `rounds` is how often
    it was timed. `error` is the largest of output and gradients at the longest length that was checked, over the norm.

    Raises:
        CheckFailed: memsave computes something else than dense attention to the same keys, or than SDPA with all keys.
    """
    errors: dict[str, float] = {}
    for length in case.lengths:
        if length <= case.checked_length:
            errors |= checked(case, length, device)
    results: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for length in case.lengths:
        at = Length(case, length, device)
        for way, figures in at.measured(rounds, left_out):
            results.append({"size": {"T": length}, "way": way, "error": errors.get(way)} | figures)
        del at
        release(device)
    return results, left_out


@torch.no_grad()
def lists_of(query: Tensor, key: Tensor, codebook: Tensor, choice: Choice, is_causal: bool) -> Tensor:
    """The keys or blocks (B, kv, N, K) that memsave chooses for self-attention."""
    codes, see = ops.pq_encode(key, codebook), Visibility(None, is_causal, 0, 0, True)
    return choose(query, slice(0, query.shape[2]), codes, codebook, choice, see, query.shape[-1] ** -0.5)


def visible_keys(lists: Tensor, size: int, length: int, is_causal: bool) -> Tensor:
    """The lists (B, kv, N, K) that `choose` makes, as bool (B, kv, T, T): which keys each query attends to."""
    there = -(-length // size)
    named = torch.zeros(*lists.shape[:3], there + 1, dtype=torch.bool, device=lists.device)
    named.scatter_(3, torch.where(lists < 0, there, lists).long(), True)
    seen = named[..., :there].repeat_interleave(size, 2).repeat_interleave(size, 3)[:, :, :length, :length]
    return seen & causal_mask(length, lists.device) if is_causal else seen


def causal_mask(length: int, device: torch.device | str) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


class Eager(nn.Module):
    """Attention as it is written with matrix products, to all keys or those of `seen` (1, kv, T, T)."""

    backward_too = True
    seen: Tensor | None

    def __init__(self, seen: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("seen", seen)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        repeats = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(repeats, 1) if repeats > 1 else t for t in (key, value))
        scores = query @ key.mT * query.shape[-1] ** -0.5
        if self.seen is not None:
            seen = self.seen.repeat_interleave(repeats, 1) if self.seen.shape[1] > 1 else self.seen
            scores = scores.masked_fill(~seen, float("-inf"))
        output: Tensor = scores.softmax(-1) @ value
        return output


class Fused(nn.Module):
    """torch's own."""

    backward_too = True

    def __init__(self, is_causal: bool) -> None:
        super().__init__()
        self.is_causal = is_causal

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, is_causal=self.is_causal, enable_gqa=grouped)


class Sparse(nn.Module):
    """memsave's."""

    backward_too = True
    codebook: Tensor

    def __init__(self, codebook: Tensor, choice: Choice, is_causal: bool) -> None:
        super().__init__()
        self.register_buffer("codebook", codebook)
        self.choice = choice
        self.see = Visibility(None, is_causal, 0, 0, True)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(query, key, value, self.codebook, self.choice, self.see)


class Flex(nn.Module):
    """torch's FlexAttention, compiled, for given lists of blocks (1, kv, N, K). Its code is made for this one length.

    Args:
        why_not: it runs without gradients only, for this reason.
    """

    def __init__(
        self, lists: Tensor, heads: int, length: int, block_size: int, is_causal: bool, why_not: str = ""
    ) -> None:
        from torch.nn.attention.flex_attention import BlockMask, flex_attention

        super().__init__()
        torch.compiler.reset()  # or the code of earlier lengths counts, and some is run without being compiled
        self.compiled = torch.compile(flex_attention, dynamic=False)
        counts = (lists >= 0).sum(-1, dtype=torch.int32)
        places = F.pad(lists.clamp(min=0), (0, -(-length // block_size) - lists.shape[3]))
        counts, places = (t.repeat_interleave(heads // lists.shape[1], 1) for t in (counts, places))
        see: dict[str, Any] = {"mask_mod": lambda b, h, t, s: t >= s} if is_causal else {}
        self.blocks = BlockMask.from_kv_blocks(
            counts, places, BLOCK_SIZE=block_size, seq_lengths=(length, length), **see
        )
        self.backward_too = not why_not
        self.why_not = why_not

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        settings: dict[str, Any] = {"block_mask": self.blocks, "enable_gqa": query.shape[1] != key.shape[1]}
        settings |= {"kernel_options": TILES} if query.is_cuda else {}
        inputs = (query, key, value) if self.backward_too else (query.detach(), key.detach(), value.detach())
        output: Tensor = self.compiled(*inputs, **settings)
        return output


class Length:
    """The inputs of one length, and the ways to attend."""

    def __init__(self, case: AttentionCase, length: int, device: str, dtype: torch.dtype | None = None) -> None:
        self.case, self.length, self.device = case, length, device
        generator = torch.Generator().manual_seed(0)
        heads, groups = case.heads

        def drawn(count: int) -> Tensor:
            numbers = torch.randn(1, count, length, case.head_size, generator=generator)
            return numbers.to(case.dtype).to(device, dtype)  # in the check, the same numbers in another dtype

        self.inputs = {name: drawn(count) for name, count in (("q", heads), ("k", groups), ("v", groups))}
        self.doutput = drawn(heads)
        for tensor in self.inputs.values():
            tensor.requires_grad_()

    def codebook(self) -> Tensor:
        sample = codebooks.KeySample(codebooks.SAMPLE_KEYS)
        sample.add(self.inputs["k"].detach())
        assert sample.keys is not None
        return codebooks.fit(sample.keys, self.case.head_size // FEATURES_OF_SUBSPACE, CODEWORDS)

    def sparse(self, codebook: Tensor, granularity: str, keep: float) -> Sparse:
        return Sparse(codebook, Choice(keep, granularity, self.case.block_size), self.case.is_causal)

    def lists(self, way: Sparse) -> Tensor:
        """The keys or blocks that forward chooses, (1, kv, N, K)."""
        return lists_of(self.inputs["q"], self.inputs["k"], way.codebook, way.choice, self.case.is_causal)

    def seen(self, way: Sparse) -> Tensor:
        """(1, kv, T, T)."""
        return visible_keys(self.lists(way), way.choice.size, self.length, self.case.is_causal)

    def gradients(self, way: nn.Module) -> dict[str, Tensor]:
        """The output, and the gradients of query, key and value, in fp64."""
        output = self.forward(way)
        output.backward(self.doutput)
        found = {name: t.grad for name, t in self.inputs.items()} | {"output": output.detach()}
        self.clear()
        return {name: t.double() for name, t in found.items() if t is not None}

    def forward(self, way: nn.Module) -> Tensor:
        output: Tensor = way(*self.inputs.values())
        return output

    def both(self, way: nn.Module) -> None:
        output = self.forward(way)
        if way.backward_too:
            output.backward(self.doutput)

    def clear(self) -> None:
        for tensor in self.inputs.values():
            tensor.grad = None

    def ways(self, left_out: dict[str, str]) -> dict[str, nn.Module]:
        """Those that run here, ready; and why others do not."""
        case, codebook = self.case, self.codebook()
        own = {name: self.sparse(codebook, *settings) for name, settings in case.ways.items()}
        found: dict[str, nn.Module] = {}
        at = f"at T = {self.length}"
        if EAGER in case.peers:
            score_bytes = case.heads[0] * self.length**2 * case.dtype.itemsize
            if score_bytes <= case.most_score_bytes:
                found[EAGER] = Eager(causal_mask(self.length, self.device)[None, None] if case.is_causal else None)
            else:
                left_out[f"{EAGER} {at}"] = f"each of its matrices of T x T numbers takes {score_bytes / 2**30:.1f} GiB"
        if SDPA in case.peers:
            found[SDPA] = Fused(case.is_causal)
        if FLEX in case.peers:
            try:
                flex = self.flex(next(iter(own.values())))
            except Exception as error:  # whatever a compiler or its absence raises
                left_out[f"{FLEX} {at}"] = in_one_line(error)
            else:
                found[FLEX] = flex
                if flex.why_not:
                    left_out[f"{FLEX}, backward"] = flex.why_not
        return found | own

    def flex(self, chooser: Sparse) -> Flex:
        """FlexAttention that has run, with gradients where it can; its output is checked where dense attention fits.

        Raises whatever keeps it from running.
        """
        case, lists = self.case, self.lists(chooser)
        made = partial(Flex, lists, case.heads[0], self.length, case.block_size, case.is_causal)
        try:
            self.both(way := made())
        except Exception as error:
            # A new one: after an error torch runs the code uncompiled, which attends to other keys.
            way = made(why_not=in_one_line(error))
            self.both(way)
        self.clear()
        if self.length <= case.checked_length:
            with torch.no_grad():
                found, expected = (self.forward(each).float() for each in (way, Eager(self.seen(chooser))))
            off = float((found - expected).abs().max() / expected.abs().max())
            if not off <= 16 * torch.finfo(case.dtype).eps:
                raise CheckFailed(f"{FLEX}: its output differs by {off:.1e} of the largest")
        return way

    def measured(self, rounds: int, left_out: dict[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
        ways = self.ways(left_out)
        names = list(ways)
        bytes_of = {name: self.bytes_of(way) for name, way in ways.items()}
        times: dict[str, list[dict[str, tuple[float, float]]]] = {name: [] for name in names}
        start = time.monotonic()
        with no_garbage_collection():
            for number, index in enumerate(in_turns(len(names), rounds)):
                done, within = divmod(number, len(names))
                if not within and done >= SMALLEST_ROUNDS and time.monotonic() - start > self.case.seconds:
                    break
                times[names[index]].append(self.turn(ways[names[index]]))
        for name in names:
            found = times[name]
            both = {part: asdict(summary([turn[part] for turn in found])) for part in found[0]}
            yield name, bytes_of[name] | {"forward": None, "backward": None} | both | {"rounds": len(found)}

    def bytes_of(self, way: nn.Module) -> dict[str, int | None]:
        """What backward is kept, and the peak of forward and backward beyond the inputs. Warms up, too."""
        kept_bytes = peak_bytes = None
        if not isinstance(way, Flex):
            kept_bytes = memsave.saved_bytes(lambda: self.forward(way))
        if self.device != "cpu":
            self.both(way)
            self.clear()
            peak_bytes = allocated_bytes(lambda: self.both(way), self.device)
        elif not isinstance(way, Flex):
            profile = memsave.measure(lambda: self.both(way))
            peak_bytes = profile.peak_bytes - profile.baseline_bytes
        self.clear()
        return {"kept_bytes": kept_bytes, "peak_bytes": peak_bytes}

    def turn(self, way: nn.Module) -> dict[str, tuple[float, float]]:
        outputs: list[Tensor] = []
        times = {"forward": elapsed(lambda: outputs.append(self.forward(way)), 1, self.device)}
        if way.backward_too:
            times["backward"] = elapsed(lambda: outputs.pop().backward(self.doutput), 1, self.device)
        self.clear()
        return times


def in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def checked(case: AttentionCase, length: int, device: str) -> dict[str, float]:
    """By way, the largest error of output and gradients, over their norms.

    Raises:
        CheckFailed: it is too large, a query attends to too many keys, or all keys give something else than SDPA.
    """
    there = Length(case, length, device)
    exact = Length(case, length, device, torch.float64)
    codebook = there.codebook()
    errors = {}
    for name, (granularity, keep) in case.ways.items():
        way = there.sparse(codebook, granularity, keep)
        seen = there.seen(way)
        most, allowed = int(seen.sum(-1).max()), way.choice.num_keys(length)
        if most > allowed:
            raise CheckFailed(f"{name} at T = {length}: a query attends to {most} keys, allowed are {allowed}")
        dense = Eager(seen)
        compared = there.gradients(way), there.gradients(dense), exact.gradients(dense)
        errors[name] = check_rounding(f"{name} at T = {length}", *compared)
    dense = Eager(causal_mask(length, device)[None, None] if case.is_causal else None)
    truth, plain = exact.gradients(Fused(case.is_causal)), there.gradients(dense)
    for granularity in dict.fromkeys(granularity for granularity, _ in case.ways.values()):
        found = there.gradients(there.sparse(codebook, granularity, 1.0))
        check_rounding(f"all keys, by {granularity}, at T = {length}", found, plain, truth)
    return errors


def check_rounding(
    where: str, found: Mapping[str, Tensor], plain: Mapping[str, Tensor], truth: Mapping[str, Tensor]
) -> float:
    """The largest error over the norm. It may be twice that of plain operators, and what long sums in float32 round.

    Raises:
        CheckFailed: one is larger.
    """
    largest = 0.0
    for name, right in truth.items():
        error, rounded = (float((each[name] - right).norm() / right.norm()) for each in (found, plain))
        allowed = ERROR_BUDGET * rounded + SUMMED_EPS * torch.finfo(torch.float32).eps
        if not error <= allowed:
            raise CheckFailed(f"{where}: the error of its {name} is {error:.1e} of the norm, allowed is {allowed:.1e}")
        largest = max(largest, error)
    return largest
