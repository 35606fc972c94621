"""FlashSVD at the head sizes, ranks and lengths that models have: what streaming and the cache compute."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import memsave
import memsave.nn.low_rank.heads as heads
import memsave.nn.low_rank.lazy_rows as lazy_rows
from memsave.nn.low_rank.group_run import Run

transformers = pytest.importorskip("transformers", reason="needs transformers (pip install 'memsave[hf]')")
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
HEAD_SIZES = (40, 64, 80, 96, 128, 256)
LENGTHS = ((1, 1), (1, 2), (3, 7), (1, 150), (2, 65))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(heads.GROUP_BYTES, "cpu", 1)
    monkeypatch.setitem(lazy_rows.CHUNK_BYTES, "cpu", 1)


def rotary(size: int) -> Any:
    """A Qwen2 with grouped queries and biases."""
    config = transformers.Qwen2Config(
        vocab_size=50,
        hidden_size=4 * size,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.Qwen2ForCausalLM(config)


def absorbed(size: int) -> Any:
    """A BERT, whose heads can run in rank space."""
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=3 * size, intermediate_size=96, num_hidden_layers=1, num_attention_heads=3
    )
    return transformers.BertModel(config)


def pair(make: Any, size: int, rank: int, **settings: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    plain = make(size).eval()
    for name, parameter in plain.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    found = []
    for fuse in (True, False):
        model = copy.deepcopy(plain)
        targets = r".*(proj|query|key|value|dense)"
        memsave.convert_model(model, memsave.FlashSVDConfig(rank=rank, fuse=fuse, target_modules=targets, **settings))
        found.append(model)
    return found[0], found[1]


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("size", HEAD_SIZES)
@pytest.mark.parametrize(
    ("make", "settings"), [(rotary, {}), (absorbed, {}), (absorbed, {"per_head": True})], ids=["rotary", "bert", "head"]
)
def test_every_head_size_and_length(monkeypatch: pytest.MonkeyPatch, make: Any, settings: Any, size: int) -> None:
    runs: list[Run] = []
    original = Run.by_groups

    def counted(self: Run, groups: Any, *args: Any, **kwargs: Any) -> Any:
        runs.append(self)
        assert len(groups) > 1
        return original(self, groups, *args, **kwargs)

    model, still = pair(make, size, 19, **settings)
    monkeypatch.setattr(Run, "by_groups", counted)
    for batch, length in LENGTHS:
        ids = torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            assert_near(model(input_ids=ids)[0], still(input_ids=ids)[0])
    assert len(runs) == len(LENGTHS)
    assert all(run.absorbed == bool(settings) for run in runs)


@pytest.mark.parametrize("size", HEAD_SIZES)
def test_the_cache_of_latents_at_every_head_size(size: int) -> None:
    model, still = pair(rotary, size, 19)
    ids = torch.randint(50, (2, 70), generator=torch.Generator().manual_seed(0))
    cache = memsave.low_rank_cache(model)
    with torch.no_grad():
        whole = still(input_ids=ids, use_cache=False).logits
        parts = [model(input_ids=part, past_key_values=cache).logits for part in ids.split([66, 1, 3], 1)]
    assert_near(torch.cat(parts, 1), whole)
