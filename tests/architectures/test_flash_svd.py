"""FlashSVD on every architecture: streaming computes what the same low-rank model computes without it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import memsave
from memsave import FlashSVDConfig
from memsave.nn.low_rank import heads, lazy_rows, linear, rows
from memsave.nn.low_rank.group_run import Run

from .models import ARCHITECTURES, PADDINGS, TINY, Architecture, Size, _decoder, text
from .step import Step, assert_same, assert_within_twice, in_dtype, train

pytest.importorskip("transformers", reason="needs transformers (pip install 'memsave[hf]')")

# What the table lacks: biases of queries, keys and values alone.
QWEN2 = Architecture(name="Qwen2", model="Qwen2ForCausalLM", config="Qwen2Config", settings=_decoder, batch=text)
ALL = (*ARCHITECTURES, QWEN2)
BY_NAME = {architecture.name: architecture for architecture in ALL}
# Nothing acts on the features of their queries and keys: no rotary positions, no norms of heads.
ABSORBED = {"GPT-2", "OPT", "BERT", "RoBERTa", "T5", "ViT", "DINOv2", "Whisper"}
WINDOWED = ("Mistral", "Gemma2", "Gemma3")
GENERATING = ("Llama", "Qwen2", *WINDOWED, "GPT-2", "OPT", "T5", "Whisper")
MIXED = ("Qwen3-MoE", "Mixtral")  # experts are one parameter each, so no feed-forward block is low-rank
# What it computes by an eager function does not stream: T5's has a bias of all heads for an argument, and transformers'
# hooks for the router's logits are on the attention, too, and may ask for the probabilities of all heads.
NOT_EAGER = {"T5", "Mixtral"}
EAGER_ONLY = {"Gemma2"}
CHUNK_ROWS = 5
# Which experts a token gets hangs on rounding, so two right answers in bf16 may differ: there each token gets all.
ALL_EXPERTS = replace(TINY, experts_per_token=TINY.experts)


def _rows() -> Iterator[tuple[Architecture, str | None, str]]:
    """Every padding that an architecture can have by sdpa, and one by its own file's function."""
    for a in ALL:
        sides = (None, *PADDINGS) if a.padded else (None,)
        yield from ((a, side, "sdpa") for side in sides if a.name not in EAGER_ONLY)
        yield from ((a, side, "eager") for side in (sides if a.name in EAGER_ONLY else sides[-1:]))


_ROWS = list(_rows())
every_padding = pytest.mark.parametrize(
    ("architecture", "padding", "implementation"), _ROWS, ids=[f"{a.name}-{side or 'full'}-{i}" for a, side, i in _ROWS]
)
every = pytest.mark.parametrize("architecture", ALL, ids=lambda a: a.name)
per_head = pytest.mark.parametrize("per_head", [False, True], ids=["whole", "per_head"])
implementations = pytest.mark.parametrize("implementation", ["eager", "sdpa"])


@pytest.fixture(autouse=True)
def _small_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every key/value head is a group, and every chunk has `CHUNK_ROWS` tokens."""
    monkeypatch.setitem(heads.GROUP_BYTES, "cpu", 1)
    monkeypatch.setitem(lazy_rows.CHUNK_BYTES, "cpu", 1)
    monkeypatch.setattr(lazy_rows, "MIN_CHUNK_ROWS", CHUNK_ROWS)


@pytest.fixture
def runs() -> Iterator[Counter[Any]]:
    """Counts attention by ("absorbed" or "heads", groups), and what is filled by ("rows", chunks)."""
    with counted() as found:
        yield found


class counted:
    """As a context manager, what streams inside it; not a fixture alone, for hypothesis."""

    def __enter__(self) -> Counter[Any]:
        self._patch = pytest.MonkeyPatch()
        found: Counter[Any] = Counter()
        by_groups, filled = Run.by_groups, lazy_rows.filled

        def count_groups(run: Run, groups: Any, *args: Any) -> Any:
            found["absorbed" if run.absorbed else "heads", len(groups)] += 1
            return by_groups(run, groups, *args)

        def count_chunks(shape: torch.Size, like: Tensor, chunk_rows: int, make: Any) -> Tensor:
            if (chunks := -(-shape[:-1].numel() // chunk_rows)) > 1:  # not the linears within, which are given one
                found["rows", chunks] += 1
            return filled(shape, like, chunk_rows, make)

        self._patch.setattr(Run, "by_groups", count_groups)
        for module in (linear, rows):
            self._patch.setattr(module, "filled", count_chunks)
        return found

    def __exit__(self, *error: object) -> None:
        self._patch.undo()


def convert(model: Any, per_head: bool, fuse: bool = True) -> Any:
    memsave.convert_model(model, FlashSVDConfig(target_modules=r".*", rank=4, per_head=per_head, fuse=fuse))
    return model.eval()


@cache
def pair(architecture: Architecture, per_head: bool, implementation: str = "sdpa", size: Size = TINY) -> Any:
    """The low-rank model without streaming and with it: no test changes them."""
    models = []
    implementation = "eager" if architecture.name in EAGER_ONLY else implementation
    for fuse in (False, True):
        model = architecture.make(size)
        model.set_attn_implementation(implementation)
        models.append(convert(model, per_head, fuse))
    return tuple(models)


def attention_modules(architecture: Architecture) -> int:
    """How many attend to their own input."""
    return TINY.layers * (2 if architecture.name in ("T5", "Whisper") else 1)


@torch.no_grad()
def run(model: Any, batch: dict[str, Tensor]) -> Step:
    return train(model, batch, backward=False)


def assert_streamed(found: Counter[Any], architecture: Architecture, per_head: bool, by_heads: bool = True) -> None:
    """Every attention module by its key/value heads, and every low-rank feed-forward block by chunks."""
    kind = "absorbed" if per_head and architecture.name in ABSORBED else "heads"
    groups = TINY.kv_heads if "num_key_value_heads" in architecture.settings(TINY, 0.0) else TINY.heads
    count = attention_modules(architecture)
    assert {key: n for key, n in found.items() if key[0] != "rows"} == ({(kind, groups): count} if by_heads else {})
    chunked = [chunks for name, chunks in found.elements() if name == "rows"]
    assert len(chunked) == (0 if architecture.name in MIXED else count) and all(chunks > 2 for chunks in chunked)


@every_padding
@per_head
def test_fp32(
    architecture: Architecture, padding: str | None, per_head: bool, implementation: str, runs: Counter[Any]
) -> None:
    plain, model = pair(architecture, per_head, implementation)
    batch = architecture.batch(TINY, padding)
    runs.clear()
    expected = run(plain, batch)
    assert not runs
    assert_same(run(model, batch), expected)
    assert_streamed(runs, architecture, per_head, implementation == "sdpa" or architecture.name not in NOT_EAGER)


@every
@per_head
def test_bf16(architecture: Architecture, per_head: bool) -> None:
    dtype = torch.bfloat16
    plain, model = (convert(architecture.make(ALL_EXPERTS).to(dtype), per_head, fuse) for fuse in (False, True))
    exact = copy.deepcopy(plain)
    batch = in_dtype(architecture.batch(TINY, "left"), dtype)
    truth = run(exact.to(architecture.truth), in_dtype(batch, architecture.truth))
    assert_within_twice(run(model, batch), run(plain, batch), truth, dtype)
    model.to(torch.float32)
    batch = in_dtype(batch, torch.float32)
    assert_same(run(model, batch), run(plain.to(torch.float32), batch))


@st.composite
def ragged(draw: st.DrawFn) -> dict[str, Tensor]:
    """Tokens (B, T) and a mask: every sequence has a length of its own, on one side."""
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 2 * TINY.tokens))
    lengths = torch.tensor(draw(st.lists(st.integers(1, tokens), min_size=batch, max_size=batch)))
    ids = torch.randint(2, TINY.vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(tokens))
    mask = torch.arange(tokens) < lengths[:, None]
    mask = mask.flip(1) if draw(st.booleans()) else mask
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma3", "GPT-2", "BERT"])
@per_head
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(batch=ragged())
def test_ragged_batches_of_any_size(name: str, per_head: bool, batch: dict[str, Tensor]) -> None:
    """From one token to twice the window, in a batch of one to three."""
    plain, model = pair(BY_NAME[name], per_head)
    with torch.no_grad():
        found, expected = (each(**batch).logits for each in (model, plain))
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-5 * float(expected[real].abs().max()))


@pytest.mark.parametrize("name", GENERATING)
@per_head
@pytest.mark.parametrize("beams", [1, 2], ids=["greedy", "beams"])
def test_generation(name: str, per_head: bool, beams: int, runs: Counter[Any]) -> None:
    """With the cache that the model makes itself: what was streamed in the prompt is read in every step."""
    architecture = BY_NAME[name]
    plain, model = pair(architecture, per_head)
    batch = architecture.batch(TINY, "left")
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "decoder_input_ids", "decoder_attention_mask")}
    how = {"max_new_tokens": 8, "min_new_tokens": 8, "num_beams": beams, "use_cache": True, "do_sample": False}
    how |= {"output_scores": True, "return_dict_in_generate": True}
    runs.clear()
    found = model.generate(**inputs, **how)
    assert sum(runs[key] for key in runs if key[0] != "rows") >= TINY.layers
    expected = plain.generate(**inputs, **how)
    assert torch.equal(found.sequences, expected.sequences)
    for mine, theirs in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "BERT", "T5", "ViT"])
@per_head
@implementations
def test_requests_for_inner_values(name: str, per_head: bool, implementation: str, runs: Counter[Any]) -> None:
    """Probabilities of all heads come from plain attention, hidden states from streamed; then it streams as before."""
    architecture = BY_NAME[name]
    plain, model = pair(architecture, per_head, implementation)
    batch = architecture.batch(TINY, "left")
    asked = ["output_hidden_states", "output_attentions"][: 2 if implementation == "eager" else 1]
    with torch.no_grad():
        for each in asked:
            found, expected = (m(**batch, **{each: True}) for m in (model, plain))
            inner = [k for k in expected if "attentions" in k or "hidden_states" in k]
            assert inner
            for key in inner:
                assert len(found[key]) == len(expected[key])
                for mine, theirs in zip(found[key], expected[key], strict=True):
                    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))
    runs.clear()
    assert_same(run(model, batch), run(plain, batch))
    # The eager function returns probabilities to whatever hook transformers has left.
    if implementation == "sdpa":
        assert_streamed(runs, architecture, per_head)


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "BERT", "T5"])
@per_head
@pytest.mark.parametrize("before", ["eager", "sdpa"])
def test_another_implementation_after_the_conversion(name: str, per_head: bool, before: str) -> None:
    architecture = BY_NAME[name]
    after = {"eager": "sdpa", "sdpa": "eager"}[before]
    plain, model = copy.deepcopy(pair(architecture, per_head, before))
    for each in (plain, model):
        each.set_attn_implementation(after)
    batch = architecture.batch(TINY, "left")
    assert_same(run(model, batch), run(plain, batch))


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "OPT", "BERT", "T5"])
def test_gradients_are_those_of_the_plain_low_rank_model(name: str, runs: Counter[Any]) -> None:
    """In training mode and in eval mode with gradients, nothing streams."""
    architecture = BY_NAME[name]
    models = [convert(architecture.make(), True, fuse) for fuse in (False, True)]
    batch = architecture.batch(TINY, "right")
    runs.clear()
    for training in (True, False):
        expected, found = (train(model.train(training), batch) for model in models)
        assert any(name.endswith(".first") for name in found.gradients)
        assert_same(found, expected, 0.0)
    with torch.no_grad():
        train(models[1].train(), batch, backward=False)
    assert not runs
