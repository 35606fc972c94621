"""Bare `convert_model` computes what the untouched model does: loss, logits and every gradient, every architecture."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import memsave

from .models import ARCHITECTURES, PADDINGS, TINY, Architecture
from .step import Step, assert_same, assert_within_twice, in_dtype, micro_batches, train

pytest.importorskip("transformers", reason="needs transformers (pip install 'memsave[hf]')")
pytestmark = [
    # Its replacement does not exist in the oldest version that is supported.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
]
DROPOUT = 0.1
# Which experts a token gets hangs on rounding, so two right answers in bf16 may differ: there each token gets all.
ALL_EXPERTS = replace(TINY, experts_per_token=TINY.experts)

every = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
# Of every architecture, the paddings that it can have.
_PADDED = [(a, side) for a in ARCHITECTURES for side in (None, *PADDINGS) if side is None or a.padded]
every_padding = pytest.mark.parametrize(
    ("architecture", "padding"), _PADDED, ids=[f"{a.name}-{side or 'full'}" for a, side in _PADDED]
)


def pair(architecture: Architecture, *, dropout: float = 0.0) -> tuple[Any, Any]:
    """The plain model and a converted one."""
    plain, model = (architecture.make(dropout=dropout) for _ in range(2))
    memsave.convert_model(model)
    return plain, model


@every_padding
def test_fp32(architecture: Architecture, padding: str | None) -> None:
    plain, model = pair(architecture)
    batch = architecture.batch(TINY, padding)
    assert_same(train(model, batch), train(plain, batch))


@every_padding
def test_bf16(architecture: Architecture, padding: str | None) -> None:
    dtype = torch.bfloat16
    plain, model, exact = (architecture.make(ALL_EXPERTS).to(dtype) for _ in range(3))
    memsave.convert_model(model)
    batch = in_dtype(architecture.batch(TINY, padding), dtype)
    truth = train(exact.to(architecture.truth), in_dtype(batch, architecture.truth))
    assert_within_twice(train(model, batch), train(plain, batch), truth, dtype)


@every_padding
def test_autocast(architecture: Architecture, padding: str | None) -> None:
    plain, model, exact = (architecture.make(ALL_EXPERTS) for _ in range(3))
    memsave.convert_model(model)
    batch = architecture.batch(TINY, padding)
    truth = train(exact.to(architecture.truth), in_dtype(batch, architecture.truth))
    found, expected = (train(each, batch, autocast=True) for each in (model, plain))
    assert_within_twice(found, expected, truth, torch.bfloat16)


@every_padding
def test_dropout_draws_the_same_random_numbers(architecture: Architecture, padding: str | None) -> None:
    plain, model = pair(architecture, dropout=DROPOUT)
    batch = architecture.batch(TINY, padding)
    found, expected = train(model, batch), train(plain, batch)
    assert_same(found, expected)
    assert torch.equal(found.random_state, expected.random_state)
    assert _differ(expected, train(architecture.make(), batch)), "the plain model drops nothing"


@every
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing(architecture: Architecture, use_reentrant: bool) -> None:
    """With dropout, so that what is recomputed must draw the same numbers again."""
    plain, model = pair(architecture, dropout=DROPOUT)
    for each in (plain, model):
        each.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    batch = architecture.batch(TINY, "right")
    assert_same(train(model, batch), train(plain, batch))


@every
def test_accumulated_gradients(architecture: Architecture) -> None:
    plain, model = pair(architecture, dropout=DROPOUT)
    batches = micro_batches(architecture.batch(TINY, "right"))
    expected = train(plain, *batches)
    assert_same(train(model, *batches), expected)
    assert _differ(expected, train(plain, batches[1])), "the first micro-batch adds nothing"


@every_padding
def test_evaluation(architecture: Architecture, padding: str | None) -> None:
    plain, model = (each.eval() for each in pair(architecture, dropout=DROPOUT))
    batch = architecture.batch(TINY, padding)
    with torch.no_grad():
        found, expected = (train(each, batch, backward=False).outputs for each in (model, plain))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6 * float(value.abs().max()))


@pytest.mark.parametrize(
    "architecture", [a for a in ARCHITECTURES if a.name in ("Llama", "GPT-2", "BERT")], ids=lambda a: a.name
)
def test_compiled(architecture: Architecture) -> None:
    plain, model = pair(architecture)
    batch = architecture.batch(TINY, "right")
    torch._dynamo.reset()
    assert_same(train(model, batch, run=torch.compile(model, backend="aot_eager")), train(plain, batch))


def _differ(a: Step, b: Step) -> bool:
    return any(not torch.allclose(a.gradients[name], b.gradients[name], rtol=1e-3) for name in a.gradients)
