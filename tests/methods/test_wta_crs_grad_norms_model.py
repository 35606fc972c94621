"""Remembered gradient norms in a model's life: checkpoints, missing ids, compilers, copies, files, the way back."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import memsave
from memsave.nn import grad_norms
from memsave.nn.grad_norms import decode
from memsave.nn.rows import KeepRows

from ..nn.test_pairing import RUNS
from .linears import OUT, D, last_weight_grad
from .remembered import IDS, B, T, cached, caches, data, factors, linear, rounded, visit
from .test_wta_crs import deviations

pytestmark = pytest.mark.usefixtures("fresh_memory")


class Deep(nn.Module):
    """Linears that share samples and one that does not, with a factor that makes the rows' gradients differ."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.q(x).tanh() * self.k(x))


@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward outside"])
@pytest.mark.parametrize("run", ["reentrant", "non-reentrant", "selective, rows kept", "selective, draw kept"])
def test_checkpointing_replays_the_draw_of_the_visit(run: str, inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three visits of a changing model: gradients and what is remembered are those without checkpoints, bit for bit."""
    torch.manual_seed(0)
    plain = nn.Sequential(Deep(), Deep())
    plain[1].out = plain[0].out  # its backward in one block comes before it is run again in the other one
    drawn: list[Tensor] = []
    draw = KeepRows.draw

    def recorded(self: KeepRows, *args: Any) -> tuple[Tensor, Tensor]:
        rows, scale = draw(self, *args)
        drawn.append(rows)
        return rows, scale

    monkeypatch.setattr(KeepRows, "draw", recorded)

    def train(forward: Callable[[nn.Module, Tensor], Tensor]) -> tuple[list[list[Tensor]], list[Tensor], list[Tensor]]:
        model, seen = cached(plain), []
        drawn.clear()
        for step in range(3):
            torch.manual_seed(step)
            x, dy = data(seed=step % 2)
            x.requires_grad_()
            model.zero_grad()
            with memsave.sample_ids(IDS):
                y = forward(model[1], forward(model[0], x))
                if inside:
                    y.backward(dy[..., :1].expand_as(y))
            if not inside:
                y.backward(dy[..., :1].expand_as(y))
            seen.append([p.grad.clone() for p in model.parameters()])
        grad_norms.remember()
        return seen, [cache.codes for cache in caches(model)], drawn.copy()

    expected, codes, plain_draws = train(RUNS["eager"])
    found, checkpointed_codes, draws = train(RUNS[run])
    for step, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)), step
    assert all(torch.equal(a, b) for a, b in zip(checkpointed_codes, codes, strict=True))
    # One draw for q and k and one for out, in two blocks, in three steps; forward's and the recomputed are the same.
    assert len(plain_draws) == 12
    assert {tuple(rows.tolist()) for rows in draws} == {tuple(rows.tolist()) for rows in plain_draws}
    assert len(draws) == (12 if run == "reentrant" else 24)


def test_blocks_around_each_backward_of_two_checkpointed_micro_batches() -> None:
    """Both forwards run first, so each recomputation needs to be told whose it is."""
    torch.manual_seed(0)
    plain, ids = nn.Sequential(Deep()), (IDS[:2], IDS[2:])
    found = []
    for run in ("eager", "non-reentrant", "reentrant"):
        model = cached(plain)
        visit(model, IDS, data()[0], data()[0])
        torch.manual_seed(1)
        model.zero_grad()
        losses = []
        for each, x in zip(ids, data(seed=1)[0].split(2), strict=True):
            with memsave.sample_ids(each):
                losses.append(RUNS[run](model, x.requires_grad_()).square().sum())
        for each, loss in zip(ids, losses, strict=True):
            with memsave.sample_ids(each):
                loss.backward()
        found.append([p.grad for p in model.parameters()])
    for grads in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads, found[0], strict=True))


def test_a_later_block_without_ids_is_not_taken_for_the_last_one() -> None:
    model, (x, dy) = cached(linear()), data()
    visit(model, IDS, x, dy)
    with pytest.warns(UserWarning, match="outside of"):
        checkpoint(model, data(seed=1)[0].requires_grad_(), use_reentrant=True).backward(data(seed=1)[1])
    assert torch.equal(factors(model, IDS), rounded(dy.norm(dim=-1)))


def test_forwards_without_ids_warn_once_and_draw_by_the_input_alone() -> None:
    x, dy = data()
    models = [cached(linear()), cached(linear(), grad_norms="none")]
    visit(models[0], IDS, x, dy)
    found = []
    with pytest.warns(UserWarning, match=r"outside of `with memsave.sample_ids\(ids\):`") as caught:
        for model in models:
            torch.manual_seed(3)
            found.append(last_weight_grad(model, x, dy))
            last_weight_grad(model, x, dy)
    assert len(caught) == 1
    assert torch.equal(*found)


def test_rows_that_are_not_whole_samples_go_without_and_warn_once() -> None:
    """As in the experts of a mixture, which read some tokens of several samples."""
    model, flat = cached(nn.ModuleList([nn.Linear(D, OUT), nn.Linear(D, OUT)])), data()[0].flatten(0, 1)
    experts = list(model)
    with memsave.sample_ids(IDS), pytest.warns(UserWarning, match=r"not 4 samples of equal length") as caught:
        for rows in (30, 41, 42):
            for expert in experts:
                expert(flat[:rows]).sum().backward()
    assert len(caught) == 1
    grad_norms.remember()
    assert memsave.sample_cache_bytes(model) == 0
    assert experts[0].weight.grad is not None


def test_a_compiled_model_goes_without_and_warns_once() -> None:
    torch._dynamo.reset()
    model, (x, dy) = cached(nn.Sequential(nn.Linear(D, D), nn.Linear(D, OUT))), data()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with pytest.warns(UserWarning, match="compiled linears neither use nor remember") as caught:
        for _ in range(2):
            visit(compiled, IDS, x, dy)
    assert len(caught) == 1
    grad_norms.remember()
    assert memsave.sample_cache_bytes(model) == 0
    with memsave.sample_ids(IDS):
        draws = torch.stack([torch.autograd.grad(compiled(x), model[1].weight, dy)[0] for _ in range(300)])
    with torch.no_grad():
        exact = dy.flatten(0, 1).t() @ model[0](x).flatten(0, 1)
    assert max(deviations(draws, exact).values()) < 4


@pytest.mark.parametrize("ids", [None, IDS])
def test_a_step_on_fake_tensors_remembers_nothing_and_does_not_warn(ids: list[int] | None) -> None:
    """As predictions of memory make them."""
    with FakeTensorMode():
        model, x, dy = linear(), torch.randn(B, T, D), torch.randn(B, T, OUT)
        memsave.convert_model(model, memsave.WTACRSConfig(grad_norms="sample_cache", target_modules=r".*"))
        with contextlib.nullcontext() if ids is None else memsave.sample_ids(ids):
            model(x).backward(dy)
        assert model[0].weight.grad is not None
    assert grad_norms._pending == []


def test_copies_and_pickles_begin_with_an_empty_memory_unless_it_is_saved() -> None:
    x, dy = data()
    for saved in (False, True):
        model = cached(linear(), save_grad_norms=saved)
        visit(model, IDS, x, dy)  # still pending when it is copied
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert memsave.sample_cache_bytes(other) == (8 * T if saved else 0)
            visit(other, [1], *data(samples=1, seed=1))
            assert factors(other, [1]).unique().numel() > 1
        grad_norms.remember()
        expected = torch.ones(1, T)
        assert torch.equal(factors(model, [1]), expected)
        assert torch.equal(factors(model, IDS), rounded(dy.norm(dim=-1)))


def test_restoring_drops_the_memory() -> None:
    model, (x, dy) = cached(linear()), data()
    visit(model, IDS, x, dy)
    memsave.restore_model(model)
    assert not any("memsave" in name for name in vars(model[0]))
    with memsave.sample_ids(IDS):  # writes what is pending nowhere
        pass
    assert memsave.sample_cache_bytes(model) == 0


def test_the_memory_is_in_the_state_dict_only_on_request() -> None:
    x, dy = data()
    plain, model = cached(linear()), cached(linear(), save_grad_norms=True)
    for each in (plain, model):
        visit(each, IDS, x, dy)
    assert list(plain.state_dict()) == list(linear().state_dict())
    state = model.state_dict()
    assert list(state) == ["0.weight", "0.bias", "0.grad_norms"]
    assert state["0.grad_norms"].shape == (8, T) and state["0.grad_norms"].dtype == torch.uint8
    visit(model, IDS, *data(seed=1))
    assert torch.equal(decode(state["0.grad_norms"][IDS]), rounded(dy.norm(dim=-1))), "a state is a copy"

    other = cached(linear(), save_grad_norms=True)
    assert other.load_state_dict(state).missing_keys == []
    assert torch.equal(factors(other, IDS), rounded(dy.norm(dim=-1)))
    other.load_state_dict(linear().state_dict())  # one without norms leaves them
    assert torch.equal(factors(other, IDS), rounded(dy.norm(dim=-1)))
    memsave.restore_model(other)
    assert list(other.state_dict()) == list(linear().state_dict())


@pytest.mark.parametrize("bad", [torch.zeros(3, dtype=torch.uint8), torch.zeros(3, 4)])
def test_a_state_dict_with_other_norms_is_an_error(bad: Tensor) -> None:
    model, (x, dy) = cached(linear(), save_grad_norms=True), data()
    visit(model, IDS, x, dy)
    with pytest.raises(RuntimeError, match="0.grad_norms: expected a uint8 matrix, got"):
        model.load_state_dict(model.state_dict() | {"0.grad_norms": bad})
    assert torch.equal(factors(model, IDS), rounded(dy.norm(dim=-1)))


def test_bytes_are_reported_and_are_the_formula() -> None:
    model = cached(nn.Sequential(nn.Linear(D, D), nn.Linear(D, OUT)))
    visit(model, [99, 3], *data(samples=2))
    grad_norms.remember()
    per_linear_bytes = 104 * T  # 100 samples rounded up
    assert memsave.sample_cache_bytes(model) == 2 * per_linear_bytes
    assert f"grad_norms: {per_linear_bytes} bytes" in repr(model[1])
    assert "grad_norms: " not in repr(cached(linear(), grad_norms="none"))


def test_a_pending_visit_does_not_keep_a_model_alive() -> None:
    model, (x, dy) = cached(linear()), data()
    visit(model, IDS, x, dy)
    (pending,) = grad_norms._pending
    assert pending._cache() is not None
    del model
    assert pending._cache() is None
    grad_norms.remember()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grad_norms": "always"}, "grad_norms: expected one of"),
        ({"grad_norms": "none", "save_grad_norms": True}, "save_grad_norms: expected False, or True with"),
        ({"save_grad_norms": 1}, "save_grad_norms: expected False, or True with"),
    ],
)
def test_bad_settings_are_an_error(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"WTACRSConfig.{message}"):
        cached(linear(), **settings)


def test_the_config_goes_through_json() -> None:
    config = memsave.WTACRSConfig(grad_norms="sample_cache", save_grad_norms=True, target_modules=["q"])
    assert memsave.MethodConfig.from_json(config.to_json()) == config
