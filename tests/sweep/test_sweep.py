"""A diverse part of the sweep, and that its committed results are those of this transformers, without a failure."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("transformers", reason="needs transformers (pip install 'memsave[hf]')")

import torch
import transformers

from . import table
from .check import FAILED, sweep
from .methods import CHECKS
from .types import config_class, model_types

# Decoders, encoders, both, experts, states, images, sounds, several kinds of input, series; and those that found bugs.
TYPES = (
    *("llama", "gemma3_text", "qwen3_moe", "deepseek_v2", "gpt_neox", "bloom", "falcon", "olmo2"),
    *("phi3", "mamba", "bert", "albert", "deberta-v2", "modernbert", "xlm", "openai-gpt"),
    *("t5", "bart", "marian", "t5gemma2", "canary", "whisper", "wav2vec2", "vit", "swinv2"),
    *("convnextv2", "resnet", "segformer", "clip", "siglip", "llava", "qwen2_vl", "aimv2_text_model"),
    *("patchtst", "moonshine", "imagegpt", "layoutlmv3", "maskformer", "higgs_audio_v2", "rwkv"),
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", TYPES)
def test_every_method(model_type: str) -> None:
    try:
        config_class(model_type)
    except KeyError:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    result = sweep(model_type, CHECKS)
    assert not result.skipped, result.skipped
    failures = {name: verdict.why for name, verdict in result.methods.items() if verdict.outcome == FAILED}
    assert not failures


def test_the_page_is_that_of_the_results() -> None:
    assert table.PAGE.read_text() == table.page(table.read()), "run python -m tests.sweep for the types that changed"


def test_the_results_have_no_failure() -> None:
    rows = table.read()["types"].values()
    failed = {(row["model_type"], n) for row in rows for n, v in row["methods"].items() if v["outcome"] == FAILED}
    assert not failed
    for row in rows:
        assert row["skipped"] or set(row["methods"]) == set(CHECKS), row["model_type"]
        assert all(verdict["why"] or verdict["outcome"] == "passed" for verdict in row["methods"].values())


def test_the_results_name_every_type() -> None:
    results = table.read()
    if results["transformers"] != transformers.__version__:
        pytest.skip(f"the results are those of transformers {results['transformers']}")
    assert sorted(results["types"], key=str.lower) == model_types()
