"""Planning a bare call: which of the default methods are applied and named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

import memsave
from memsave import RecomputeActivationConfig, RecomputeDropoutConfig, RecomputeNormConfig
from memsave.config import applied_configs

LINEARS = ("recompute_norm", "recompute_activation", "recompute_dropout")


def block(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), *between, nn.Linear(8, 4))


def named(model: nn.Module) -> set[str]:
    return {row.method for row in memsave.convert_model(model).rows}


@pytest.mark.parametrize(
    ("make", "methods"),
    [
        (lambda: block(), {"recompute_norm"}),
        (lambda: block(nn.Tanh()), {"recompute_norm"}),
        (lambda: block(nn.GELU()), {"recompute_norm", "recompute_activation"}),
        (lambda: block(nn.Dropout()), {"recompute_norm", "recompute_dropout"}),
        (lambda: block(nn.GELU(), nn.Dropout()), set(LINEARS)),
        (lambda: nn.Sequential(block(nn.GELU())[1:]), {"recompute_activation", "recompute_mlp"}),
        (lambda: nn.Sequential(nn.Linear(4, 8), nn.GELU()), {"recompute_activation"}),
        (lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout()), {"recompute_dropout"}),
        (lambda: nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), {"recompute_norm"}),
    ],
)
def test_a_default_method_that_would_add_nothing_is_left_out(make: Callable[[], nn.Module], methods: set[str]) -> None:
    model = make()
    assert named(model) == methods
    assert {name for module in model.modules() for name in applied_configs(module)} == methods
    assert all(applied_configs(module) for module in model.modules() if isinstance(module, nn.Linear))


def test_a_second_bare_call_adds_nothing() -> None:
    model = block(nn.GELU())
    memsave.convert_model(model)
    report = memsave.convert_model(model)
    assert report.rows == () and {row.method for row in report.already} == {"recompute_norm", "recompute_activation"}


def test_a_method_that_comes_to_have_something_to_do_is_added() -> None:
    model = block()
    memsave.convert_model(model)
    model.append(nn.Dropout())
    rows = memsave.convert_model(model).rows
    assert {(row.method, row.modules) for row in rows} == {("recompute_dropout", "{1-2}"), ("recompute_dropout", "3")}


@pytest.mark.parametrize(
    "config", [RecomputeNormConfig(), RecomputeActivationConfig(), RecomputeDropoutConfig()], ids=str
)
def test_a_method_that_was_asked_for_is_applied(config: memsave.MethodConfig) -> None:
    report = memsave.convert_model(nn.Sequential(nn.Linear(4, 4)), [RecomputeNormConfig(), config])
    assert {row.method for row in report.rows} == {"recompute_norm", config.name}


def test_a_method_that_sets_something_on_others_linears_is_kept() -> None:
    model = block()
    model.get_output_embeddings = lambda: model[-1]  # type: ignore[assignment]
    assert named(model) == {"recompute_norm", "linear_cross_entropy"}
