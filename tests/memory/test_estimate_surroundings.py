"""`estimate` called from anywhere: the caller's modes do not change it, and it does not change what is the caller's."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import AdamW

from memsave import estimate, measure

from .test_estimate import assert_equal, steady_step


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "fake": FakeTensorMode,
    "anomaly": lambda: torch.autograd.detect_anomaly(check_nan=True),
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("autocast", [None, torch.float16], ids=["", "float16"])
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_the_callers_modes_change_nothing(name: str, autocast: torch.dtype | None) -> None:
    model, x = two_layers(), torch.randn(4, 8)
    expected = estimate(model, x, optimizer="adamw", autocast=autocast)
    with ExitStack() as contexts:
        contexts.enter_context(SURROUNDINGS[name]())
        assert_equal(estimate(model, x, optimizer="adamw", autocast=autocast), expected)


def test_another_thread_that_trains_changes_nothing() -> None:
    """torch's hooks of all modules and optimizers are called there, too."""
    model, other, x = two_layers(), two_layers(), torch.randn(4, 8)
    train = steady_step(other, lambda: other(x).sum(), AdamW)

    def loss(y: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(train).result()
        return y.sum()

    expected = estimate(model, x, optimizer="adamw")
    assert_equal(estimate(model, x, loss=loss, optimizer="adamw"), expected)


class _Random(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        random.random(), np.random.rand(), torch.rand([])
        return super().forward(x)


def test_random_numbers_stay() -> None:
    model, x = _Random(4, 4), torch.randn(2, 4)
    before = random.getstate(), np.random.get_state()[2], torch.get_rng_state()
    estimate(model, x)
    assert random.getstate() == before[0] and np.random.get_state()[2] == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


class _Holds(nn.Module):
    """Holds tensors in a list, in a dict and in an object, one of them twice; and adds to a list at each call."""

    class Table:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.tensors = [torch.randn(4, 8), {"a": torch.randn(8)}]
        self.table = self.Table(self.tensors[0])
        self.outputs: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.outputs.append(x)
        return self.linear(x) * self.tensors[0] * self.tensors[1]["a"] + self.table.tensor


def test_tensors_in_lists_and_objects_have_twins() -> None:
    model, x = _Holds(), torch.randn(4, 8)
    objects = [id(tensor) for tensor in (model.tensors[0], model.tensors[1]["a"], model.table.tensor)]
    predicted = estimate(model, x, loss=lambda y: y.square().mean(), optimizer="adamw")
    assert [id(t) for t in (model.tensors[0], model.tensors[1]["a"], model.table.tensor)] == objects
    assert model.outputs == []
    assert_equal(predicted, measure(steady_step(model, lambda: model(x).square().mean(), AdamW)))


def test_prompt_tuning() -> None:
    """PEFT holds the prompt's tokens in a dict."""
    peft = pytest.importorskip("peft", reason="needs peft (the extra hf)")
    from .test_estimate import labelled, llama

    settings = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    model, batch = peft.get_peft_model(llama(), peft.PromptTuningConfig(**settings)), labelled()
    predicted = estimate(model, batch, optimizer="adamw")
    assert_equal(predicted, measure(steady_step(model, lambda: model(**batch).loss, AdamW)))


def test_the_loss_is_dropped_after_backward() -> None:
    """The peak is in the optimizer's step here, where one scalar more would show."""
    model, x = two_layers(), torch.randn(1, 8)
    predicted = estimate(model, x, loss=lambda y: y.square().mean(), optimizer="adamw")
    assert predicted.phase == "optimizer"
    assert_equal(predicted, measure(steady_step(model, lambda: model(x).square().mean(), AdamW)))
