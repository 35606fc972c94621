"""The rows of dy and of x that are multiplied in backward are the same rows, however forward is run or replayed.

With x diagonal and dy the row number, dW[0, i] = scale_i * x_ii * i for drawn rows and 0 for others: any mix-up shows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch._functorch.config
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import memsave
from memsave import ops
from memsave.nn import rows

from .helpers import assert_same, converted, gradients

N = 24
Run = Callable[[nn.Module, Tensor], Tensor]


def selective(saved: str) -> Run:
    """Checkpointing that keeps the outputs of one op and recomputes the rest."""

    def policy(_ctx: object, op: object, *_args: object, **_kwargs: object) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if saved in str(op) else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    return lambda m, x: checkpoint(m, x, use_reentrant=False, context_fn=contexts)


def compiled(backend: str, *, budget: float = 1.0, checkpointed: bool = False) -> Run:
    def run(model: nn.Module, x: Tensor) -> Tensor:
        torch._dynamo.reset()
        with torch._functorch.config.patch(activation_memory_budget=budget):
            inner = (lambda x: checkpoint(model, x, use_reentrant=False)) if checkpointed else model
            return torch.compile(inner, backend=backend, fullgraph=True)(x)

    return run


RUNS: dict[str, Run] = {
    "eager": lambda m, x: m(x),
    "reentrant": lambda m, x: checkpoint(m, x, use_reentrant=True),
    "non-reentrant": lambda m, x: checkpoint(m, x, use_reentrant=False),
    "without preserved random state": lambda m, x: checkpoint(m, x, use_reentrant=False, preserve_rng_state=False),
    "selective, rows kept": selective("gather_rows"),
    "selective, draw kept": selective("draw_"),
    "selective, seed kept": selective("new_seed"),
    "aot_eager": compiled("aot_eager"),
    "aot_eager, small budget": compiled("aot_eager", budget=0.05),
    "aot_eager, checkpointed": compiled("aot_eager", checkpointed=True),
    "inductor": compiled("inductor"),
    "inductor, small budget": compiled("inductor", budget=0.05),
    "inductor, checkpointed": compiled("inductor", checkpointed=True),
}


@pytest.mark.parametrize("estimator", ["pps", "wta_crs", "crs"])
@pytest.mark.parametrize("run", RUNS)
def test_pairing(run: str, estimator: str) -> None:
    torch.manual_seed(5)
    config = memsave.WTACRSConfig(keep_ratio=0.5, min_rows=1, estimator=estimator, target_modules=r".*")
    model = converted(nn.Sequential(nn.Linear(N, 1, bias=False)), config)
    sizes = torch.linspace(1, 3, N)
    x = torch.diag(sizes).requires_grad_(True)
    numbers = torch.arange(1.0, N + 1)
    RUNS[run](model, x).backward(numbers[:, None])
    assert model[0].weight.grad is not None
    scales = model[0].weight.grad[0] / (sizes * numbers)
    drawn = scales != 0
    if estimator == "pps":
        inclusion = ops.row_inclusion(sizes, N // 2)
        assert drawn.sum() == N // 2
        torch.testing.assert_close(scales[drawn], 2.0**32 / inclusion[drawn].float())
    else:  # each drawn row's scale is a whole multiple of 1 / (k p), or a winner's 1
        units = scales * (N // 2) * sizes / sizes.sum() if estimator == "crs" else scales
        assert 0 < drawn.sum() <= N // 2
        if estimator == "crs":
            torch.testing.assert_close(units, units.round(), rtol=0, atol=1e-4)
    assert x.grad is not None
    assert_same([x.grad], [numbers[:, None] * model[0].weight.detach()])


class Noisy(nn.Module):
    """Linears (two read one tensor) and a norm, with dropout before and after, so that replays must line up."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(8)
        self.q, self.k, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        h = self.dropout(self.q(y) * self.k(y))
        return self.dropout(self.out(h)) + x


# Not "seed kept": keeping the output of any op that draws random numbers, torch's own too, shifts a replay's stream.
CHECKPOINTED = ["reentrant", "non-reentrant", "selective, rows kept", "selective, draw kept"]


@pytest.mark.parametrize("with_notes", [False, True])
@pytest.mark.parametrize("run", CHECKPOINTED)
def test_checkpointing_replays_the_same_draws_and_the_same_dropout(run: str, with_notes: bool) -> None:
    """Checkpointed gradients equal the plain ones bit for bit, from the same random state, nested or not."""
    torch.manual_seed(0)
    configs: list[memsave.MethodConfig] = [memsave.WTACRSConfig(min_rows=1, target_modules=r".*")]
    if with_notes:
        configs.append(memsave.RecomputeNormConfig())
    model = converted(nn.Sequential(Noisy(), Noisy()), *configs)
    x = torch.randn(40, 8)

    def seeded(run: Run) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            torch.manual_seed(7)
            return run(model, x)

        return forward

    def nested(m: nn.Module, x: Tensor) -> Tensor:
        inner = RUNS[run]
        return inner(lambda x: m[1](inner(m[0], x)), x)  # type: ignore[operator, arg-type]

    expected = gradients(seeded(RUNS["eager"]), model, x)
    for replayed in (RUNS[run], nested):
        for a, e in zip(gradients(seeded(replayed), model, x), expected, strict=True):
            assert torch.equal(a, e)


def test_siblings_on_both_sides_of_a_reentrant_checkpoint_draw_in_step() -> None:
    """A sibling's sample from outside is not reused inside where a replay could not find it."""
    torch.manual_seed(0)
    model = converted(Noisy(), memsave.WTACRSConfig(min_rows=1, target_modules=["q", "k", "out"]))

    def forward(x: Tensor, use_reentrant: bool | None) -> Tensor:
        torch.manual_seed(3)
        y = x * 1.0
        outside = model.q(y)  # type: ignore[operator]

        def inside(y: Tensor) -> Tensor:
            return model.dropout(model.k(y) * model.out(y))  # type: ignore[operator]

        return outside + (inside(y) if use_reentrant is None else checkpoint(inside, y, use_reentrant=use_reentrant))

    x = torch.randn(40, 8)
    expected = gradients(partial(forward, use_reentrant=None), model, x)
    for use_reentrant in (False, True):
        actual = gradients(partial(forward, use_reentrant=use_reentrant), model, x)
        # Rows may be other ones, the dropout mask and all exact parts may not.
        assert torch.equal(actual[0], expected[0])
        assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_for_changing_lengths(autocast: bool) -> None:
    """Lengths that change, one of them too short to sample; dx and db stay exact, dW has the drawn rows' weights."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4))
    model = converted(plain, memsave.WTACRSConfig(min_rows=6, target_modules=r".*"))
    run = torch.compile(model, backend="aot_eager", dynamic=True, fullgraph=True)
    for n in (20, 33, 57, 5):
        x = torch.randn(n, 8)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            actual, expected = gradients(run, model, x), gradients(plain, plain, x)
        exact = range(len(expected)) if n == 5 else (0, 2, 4)
        assert_same([actual[i] for i in exact], [expected[i] for i in exact], ulps=2**17 if autocast else 32)
        assert torch.isfinite(actual[1]).all() and not (n > 5 and torch.equal(actual[1], expected[1]))


def test_a_forward_without_backward_leaves_no_draw_to_reuse() -> None:
    torch.manual_seed(0)
    model = converted(nn.Sequential(nn.Linear(8, 8)), memsave.WTACRSConfig(min_rows=1, target_modules=r".*"))
    x = torch.randn(40, 8)

    def seeded(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return model(x)

    def weight_grad() -> Tensor:
        model.zero_grad()
        seeded(x).sum().backward()
        assert model[0].weight.grad is not None
        return model[0].weight.grad

    expected = weight_grad().clone()
    model(x)
    x.data.mul_(2)  # a static input buffer, refilled in a way that autograd does not see
    assert_same([weight_grad()], [2 * expected])


def test_under_checkpoints_only_the_last_sample_is_held() -> None:
    """Else the rows of every checkpoint's input would be kept between forward and backward."""
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8) for _ in range(3)]
    model = converted(nn.Sequential(*layers), memsave.WTACRSConfig(min_rows=1, target_modules=r".*"))
    inputs = [torch.randn(40, 8, requires_grad=True)]
    for layer in model:
        inputs.append(checkpoint(layer, inputs[-1], use_reentrant=False))
    held = [rows._samples[x].tensors is not None for x in inputs[:-1]]
    assert held == [False, False, True]
    inputs[-1].sum().backward()


def test_measuring_does_not_change_which_draws_are_shared() -> None:
    torch.manual_seed(0)
    model = converted(
        nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)]),
        memsave.WTACRSConfig(keep_ratio=0.5, min_rows=1, target_modules=r".*"),
    )
    x, other = torch.randn(40, 8), torch.randn(40, 8)

    def run() -> Tensor:
        first = model[0](x)
        return first + model[1](other) + model[2](x)  # the last one shares the first one's sample

    assert memsave.saved_bytes(run) == 2 * (20 * (4 * 8 + 8) + 4 * 8)
