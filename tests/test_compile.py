"""torch.compile in its default mode, autocast and gradient scaling, for the rows of the case table.

`tests/test_methods.py` compiles every row of single modules by aot_eager; here come norms with the linears that read
them, whole models, and the default backend.
"""

from __future__ import annotations

import copy
import os
import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memsave

from .cases.methods import CASES, SHAPE, MethodCase, NotedCase
from .nn.helpers import assert_same
from .test_methods import Fan, assert_alike, cases, convert, noted_cases, step, weights

_COMPILERS = [os.environ.get("CXX", ""), sysconfig.get_config_var("CXX") or "", "c++", "g++", "clang++"]
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(command.split()[0]) for command in _COMPILERS if command), reason="no C++ compiler here"
)
DEFAULT_MODE = ["recompute_norm-hf_rms_norm", "recompute_norm-layer_norm", "wta_crs-pps", "wta_crs-wta_crs"]


def fan(case: NotedCase) -> tuple[Fan, Any, Tensor]:
    """The plain norm with its readers, the converted one, and an input."""
    torch.manual_seed(0)
    plain = Fan(case)
    model = copy.deepcopy(plain)
    memsave.convert_model(model, case.configs)
    return plain, model, torch.randn(SHAPE)


def exact_only(one: Any, other: Any, sampled: bool) -> None:
    """Drop the sampled weights' gradients from both steps."""
    for name in [n for n in one.grads if sampled and n.startswith("linears") and n.endswith("weight")]:
        mine, theirs = one.grads.pop(name), other.grads.pop(name)
        assert mine.shape == theirs.shape and mine.isfinite().all() and not torch.allclose(mine, theirs)


def is_sampled(case: NotedCase) -> bool:
    return any(config.name == "wta_crs" for config in case.configs)


@noted_cases
def test_norms_and_their_readers_compile_without_a_graph_break(case: NotedCase) -> None:
    torch._dynamo.reset()
    plain, model, x = fan(case)
    ours = step(model, torch.compile(model, backend="aot_eager", fullgraph=True), x)
    expected = step(plain, plain, x)
    exact_only(ours, expected, is_sampled(case))
    assert_alike(ours, expected, case)


@needs_compiler
@pytest.mark.parametrize("case", [c for c in CASES if c.id in DEFAULT_MODE], ids=DEFAULT_MODE)
def test_the_default_mode_gives_the_reference_s_gradients(case: MethodCase) -> None:
    """From the same random state, sampled gradients, too: the draw is an op that the compiler leaves alone."""
    torch._dynamo.reset()
    module = convert(case.plain(), case.configs)
    compiled = torch.compile(module)
    for seed in (7, 8):
        ours = step(module, compiled, case.input(), seed)
        assert_alike(ours, step(module, module.reference, case.input(), seed), case)


@pytest.mark.parametrize("sampled", [False, True])
def test_a_compiled_llama_has_the_plain_one_s_loss_and_gradients(sampled: bool) -> None:
    """But for the sampled weights' gradients: a compiler may move draws to backward, so they are not those of eager."""
    hf = pytest.importorskip("transformers", reason="needs transformers (pip install 'memsave[hf]')")
    torch._dynamo.reset()
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    plain = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=32))
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.3)
    model = copy.deepcopy(plain)
    memsave.convert_model(model)
    if sampled:
        memsave.convert_model(model, memsave.WTACRSConfig(min_rows=1, target_modules=["up_proj", "down_proj"]))
    tokens = torch.randint(0, 32, (2, 24))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss, expected = (run(input_ids=tokens, labels=tokens).loss for run in (compiled, plain))
    torch.testing.assert_close(loss, expected)
    loss.backward(), expected.backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        if sampled and name.endswith(("up_proj.weight", "down_proj.weight")):
            assert ours.grad.isfinite().all() and not torch.allclose(ours.grad, theirs.grad, rtol=0.1)
        else:
            assert_same([ours.grad], [theirs.grad], ulps=128)


def under_autocast(module: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return module(x)

    return forward


@cases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_what_it_gives_the_plain_module(case: MethodCase, dtype: torch.dtype) -> None:
    plain, module = case.plain(), convert(case.plain(), case.configs)
    ours = step(module, under_autocast(module, dtype), case.input())
    expected = step(plain, under_autocast(plain, dtype), case.input())
    if case.gradients == "sampled":
        for name in weights(ours):
            mine, theirs = ours.grads.pop(name), expected.grads.pop(name)
            assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
            assert mine.isfinite().all() and not torch.allclose(mine, theirs, rtol=0.01)
    assert_close_in(dtype, ours.tensors(), expected.tensors())


@noted_cases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_through_a_note(case: NotedCase, dtype: torch.dtype) -> None:
    plain, model, x = fan(case)
    ours, expected = step(model, under_autocast(model, dtype), x), step(plain, under_autocast(plain, dtype), x)
    exact_only(ours, expected, is_sampled(case))
    assert_close_in(dtype, ours.tensors(), expected.tensors())


def assert_close_in(dtype: torch.dtype, actual: list[Tensor], expected: list[Tensor]) -> None:
    """The same dtypes, and values within a few roundings of the dtype in which autocast multiplies."""
    for a, e in zip(actual, expected, strict=True):
        assert_same([a], [e], ulps=8 * torch.finfo(dtype).eps / torch.finfo(e.dtype).eps)


class Scaled(nn.Module):
    """A linear, and what a row of the table makes; the output is a loss that weighs the rows of x (..., D), D = 8."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.before, self.inner = nn.Linear(8, 8), inner

    def forward(self, x: Tensor, row_weights: Tensor) -> Tensor:
        return (self.inner(self.before(x)) * row_weights).square().mean()


@dataclass
class Training:
    """Weights, losses and scales after each step, and the parameters that had no finite gradient in one of them."""

    weights: list[Tensor] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    overflowed: list[set[str]] = field(default_factory=list)


def scaled_training(case: MethodCase, module: nn.Module) -> Training:
    """Train four steps in fp16 autocast with loss scaling; in the second, the smallest row's gradient is infinite."""
    torch.manual_seed(0)
    model, done = Scaled(module), Training()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=100)
    x = case.input().detach()
    x = x / x.norm(dim=-1).max()  # so that only what is made infinite overflows
    for number in range(4):
        row_weights = torch.ones(*x.shape[:-1], 1)  # (..., 1)
        if number == 1:
            row_weights.view(-1)[x.norm(dim=-1).argmin()] = torch.inf
        torch.manual_seed(number)
        with torch.autocast("cpu", torch.float16):
            loss = model(x, row_weights)
        scaler.scale(loss).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        done.overflowed.append({name for name, grad in grads.items() if not grad.isfinite().all()})
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        done.weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        done.losses.append(loss.item())
        done.scales.append(scaler.get_scale())
    return done


@cases
def test_loss_scaling_skips_the_step_that_overflows(case: MethodCase) -> None:
    """A gradient shows an infinity where the plain one does, whether its row is drawn or not: the step is skipped."""
    ours, plain = (scaled_training(case, module) for module in (convert(case.plain(), case.configs), case.plain()))
    assert ours.overflowed == plain.overflowed and ours.overflowed[1] and not ours.overflowed[2]
    assert ours.scales == plain.scales == [64.0, 32.0, 32.0, 32.0]
    assert torch.equal(ours.weights[1], ours.weights[0]) and not torch.equal(ours.weights[2], ours.weights[1])
    assert ours.losses[0] == pytest.approx(plain.losses[0], rel=0.01)
    if case.gradients == "exact":
        for mine, theirs in zip(ours.weights, plain.weights, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0.01, atol=0.005)
