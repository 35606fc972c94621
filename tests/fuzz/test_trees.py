"""Random models, converted by random methods one after the other, trained, restored: what they were, to the bit."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import memsave
from memsave import MethodConfig
from memsave.config import applied_configs
from tests.mlp import make
from tests.snapshot import snapshot
from tests.trees import WIDTH, Tree, trees

from .examples import examples

METHODS: list[MethodConfig] = [
    memsave.RecomputeNormConfig(),
    memsave.RecomputeActivationConfig(),
    memsave.RecomputeDropoutConfig(),
    memsave.RecomputeMLPConfig(),
    memsave.WTACRSConfig(target_modules=r".*", min_rows=1),
    memsave.WTACRSConfig(target_modules=r".*", keep_ratio=0.5, estimator="crs", grad_norms="sample_cache"),
]
EXACT = METHODS[:4]


def step(tree: Tree) -> tuple[Tensor, list[Tensor | None]]:
    """The output and the gradients of one step of training, which leaves none."""
    x = torch.linspace(-1, 1, 7 * WIDTH).view(7, WIDTH).requires_grad_()
    with memsave.sample_ids(torch.arange(7)):
        output = tree(x)
        output.sum().backward()
    gradients = [x.grad, *(p.grad for p in tree.parameters())]
    tree.zero_grad(set_to_none=True)
    return output.detach(), gradients


def converted(tree: Tree, methods: list[MethodConfig]) -> None:
    for config in methods:
        try:
            memsave.convert_model(tree, config)
        except memsave.MemsaveError as error:  # none to convert, or two that want the same part
            assert "not changed" in str(error), error


@examples(60)
@given(tree=trees(), methods=st.lists(st.sampled_from(METHODS), min_size=1, max_size=4))
def test_convert_run_restore(tree: Tree, methods: list[MethodConfig]) -> None:
    before, plain = snapshot(tree), copy.deepcopy(tree)
    converted(tree, methods)
    output, gradients = step(tree)
    assert torch.equal(output, step(plain)[0]), "the output must be that of the plain model"
    assert [g is None for g in gradients] == [g is None for g in step(plain)[1]]
    memsave.restore_model(tree)
    assert snapshot(tree) == before


@examples(40)
@given(tree=trees(), methods=st.lists(st.sampled_from(EXACT), min_size=1, unique=True))
def test_gradients_of_exact_methods(tree: Tree, methods: list[MethodConfig]) -> None:
    plain = copy.deepcopy(tree)
    converted(tree, methods)
    for ours, right in zip(step(tree)[1], step(plain)[1], strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)


@examples(20)
@given(tree=trees(), data=st.data())
def test_a_copy_of_a_converted_model_is_restored(tree: Tree, data: st.DataObject) -> None:
    converted(tree, data.draw(st.lists(st.sampled_from(METHODS), min_size=1, max_size=3)))
    again = copy.deepcopy(tree)
    memsave.restore_model(tree)
    memsave.restore_model(again)
    assert [type(m) for m in again.modules()] == [type(m) for m in tree.modules()]
    for a, b in zip(again.state_dict().values(), tree.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("config", METHODS, ids=str)
def test_each_method_converts_something(config: MethodConfig) -> None:
    """A test of the test: what nothing is converted by would show nothing."""
    model = make().append(torch.nn.Dropout(0.5))
    memsave.convert_model(model, config)
    assert any(applied_configs(module) for module in model.modules())
