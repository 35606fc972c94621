"""RecomputeMLPConfig: its settings, how it replaces itself, and what its sampled gradients are worth."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memsave
from memsave import Guarantee, RecomputeMLPConfig, RecomputeNormConfig, WTACRSConfig
from memsave.nn import mlp

from ..cases.methods import WIDTH, GatedMLP, plain_mlp

SAMPLED = RecomputeMLPConfig(recompute="all", keep_ratio=0.3, min_rows=1, target_modules=r".*")
ROWS = 120


def model_of(*blocks: nn.Module) -> Any:
    return nn.Sequential(*blocks)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recompute": "some"}, r"recompute: expected one of \['elementwise', 'all'\], got 'some'"),
        ({"keep_ratio": 0.0}, r"keep_ratio: expected a fraction in \(0, 1\], got 0.0"),
        ({"keep_ratio": True}, "got True"),
        ({"keep_ratio": 0.3, "target_modules": r".*"}, "got 0.3 with recompute='elementwise'"),
        ({"keep_ratio": 0.3, "recompute": "all"}, "must be aimed"),
        ({"min_rows": 0}, "min_rows: expected a whole number of at least 1, got 0"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RecomputeMLPConfig(**settings)


def test_the_guarantee_follows_the_ratio() -> None:
    assert RecomputeMLPConfig(recompute="all").guarantee is Guarantee.EXACT
    assert SAMPLED.guarantee is Guarantee.UNBIASED_GRAD
    assert memsave.MethodConfig.from_json(SAMPLED.to_json()) == SAMPLED
    assert memsave.MethodConfig.from_json(SAMPLED.to_json()).guarantee is Guarantee.UNBIASED_GRAD


def test_the_linears_of_a_block_are_converted_with_it() -> None:
    model = model_of(GatedMLP(), plain_mlp(), nn.Linear(WIDTH, WIDTH))
    config = RecomputeMLPConfig(target_modules=["0", "1"], exclude_modules=["0.up_proj"])
    report = memsave.convert_model(model, config)
    assert {name for row in report.rows for name in row.names} == {"0", "1", "0.gate_proj", "0.down_proj", "1.0", "1.2"}
    assert memsave.convert_model(model, config).count == 0
    memsave.restore_model(model)
    assert not any("_memsave" in module.__dict__ for module in model.modules())


def test_other_settings_replace_the_earlier_ones_and_defaults_do_not() -> None:
    model = model_of(GatedMLP())
    memsave.convert_model(model)
    everywhere = RecomputeMLPConfig(recompute="all")
    report = memsave.convert_model(model, everywhere)
    assert {row.method for row in report.rows} == {"recompute_mlp"} and not report.already
    assert model[0]._memsave_parts["recompute"] == "all"
    report = memsave.convert_model(model)
    assert model[0]._memsave_parts["recompute"] == "all" and "recompute='all'" in str(model[0])
    assert not report.rows and "already" in str(report)
    with pytest.raises(memsave.ConversionError, match="were both asked for"):
        memsave.convert_model(model, [RecomputeMLPConfig(), SAMPLED])


def test_a_failed_replacement_puts_the_earlier_settings_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(GatedMLP(), GatedMLP())
    memsave.convert_model(model)
    before = repr(model)
    convert = RecomputeMLPConfig.convert

    def fails_at_the_second(self: RecomputeMLPConfig, module: nn.Module) -> nn.Module:
        if module is model[1] and self.recompute == "all":
            raise OSError("no")
        return convert(self, module)

    monkeypatch.setattr(RecomputeMLPConfig, "convert", fails_at_the_second)
    with pytest.raises(OSError, match="no"):
        memsave.convert_model(model, RecomputeMLPConfig(recompute="all"))
    assert repr(model) == before
    assert [block._memsave_parts["recompute"] for block in model] == ["elementwise"] * 2


def test_sampled_linears_inside_go_on_sampling_in_forward() -> None:
    """WTA-CRS keeps rows of h already in forward; the block around is then not split, and recomputes the same draw."""
    torch.manual_seed(0)
    model, x = model_of(GatedMLP()), torch.randn(ROWS, WIDTH)
    wta = WTACRSConfig(keep_ratio=0.25, min_rows=1, target_modules=["down_proj"])
    memsave.convert_model(model, [wta, RecomputeMLPConfig(recompute="all")])
    once, again = gradient(model, x, 0), gradient(model, x, 0)
    assert torch.equal(once["0.down_proj.weight"], again["0.down_proj.weight"])
    assert not torch.equal(once["0.down_proj.weight"], gradient(model, x, 1)["0.down_proj.weight"])


def gradient(model: nn.Module, x: Tensor, seed: int) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(seed)
    model(x).backward(torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x) * x[:, :1].exp())
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunk_rows", [ROWS, 37], ids=["whole", "chunks"])
@pytest.mark.parametrize("make", [GatedMLP, plain_mlp], ids=["gated", "plain"])
def test_sampled_gradients_are_unbiased(
    make: type[nn.Module], chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every entry's mean, and a random projection of each gradient, within five standard errors of the exact value."""
    monkeypatch.setitem(mlp.CHUNK_BYTES, "cpu", 1)
    monkeypatch.setattr(mlp, "MIN_CHUNK_ROWS", chunk_rows)
    torch.manual_seed(0)
    plain, x = model_of(make()).double(), torch.randn(ROWS, WIDTH, dtype=torch.float64)
    exact = gradient(plain, x, 0)
    model = copy.deepcopy(plain)
    memsave.convert_model(model, SAMPLED)
    draws = [gradient(model, x, seed) for seed in range(400)]
    for name, right in exact.items():
        found = torch.stack([draw[name] for draw in draws])
        if name.endswith("bias"):
            assert torch.allclose(found[0], right) and torch.allclose(found[-1], right)
            continue
        error, spread = found.mean(0) - right, found.std(0) / len(draws) ** 0.5
        assert (spread > 0).all() and (error.abs() <= 5 * spread).all()
        projection = torch.randn_like(right)
        along = (found * projection).flatten(1).sum(1)
        assert abs(along.mean() - (right * projection).sum()) <= 5 * along.std() / len(draws) ** 0.5


def test_the_variance_is_below_that_of_rows_drawn_in_forward() -> None:
    """|x| |dy| against |x| alone, for tokens whose gradients differ: the down projection of the same block."""
    torch.manual_seed(0)
    plain, x = model_of(GatedMLP()).double(), torch.randn(ROWS, WIDTH, dtype=torch.float64)
    exact = gradient(plain, x, 0)["0.down_proj.weight"]

    def variance(config: memsave.MethodConfig) -> float:
        model = copy.deepcopy(plain)
        memsave.convert_model(model, config)
        errors = [(gradient(model, x, seed)["0.down_proj.weight"] - exact).square().sum() for seed in range(100)]
        return float(torch.stack(errors).mean())

    forward = WTACRSConfig(keep_ratio=0.3, min_rows=1, target_modules=["down_proj"])
    assert variance(SAMPLED) < 0.7 * variance(forward)


def test_gate_and_up_share_one_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """By both their gradients: rows where only one of them has a gradient are drawn too."""
    from memsave.nn.rows import KeepRows

    factors: list[Tensor | None] = []
    draw = KeepRows.draw

    def recorded(self: KeepRows, x: Tensor, seed: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        factors.append(given)
        return draw(self, x, seed, given)

    monkeypatch.setattr(KeepRows, "draw", recorded)
    torch.manual_seed(0)
    model, x = model_of(GatedMLP()), torch.randn(ROWS, WIDTH)
    block = model[0]
    memsave.convert_model(model, SAMPLED)
    gate, up = block.gate_proj(x).detach().requires_grad_(), block.up_proj(x).detach().requires_grad_()
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) * x[:, :1].exp()
    dys = torch.autograd.grad(block.down_proj(block.act_fn(gate) * up), (gate, up), dy)
    gradient(model, x, 0)
    assert len(factors) == 2 and factors[1] is not None
    assert torch.allclose(factors[1], torch.cat(dys, dim=1).norm(dim=1), rtol=1e-4)


def test_what_is_not_finite_stays_so() -> None:
    torch.manual_seed(0)
    model, x = model_of(GatedMLP()), torch.randn(ROWS, WIDTH)
    memsave.convert_model(model, SAMPLED)
    for seed in range(5):
        x[3, 2] = float("nan")
        found = gradient(model, x, seed)
        assert all(grad.isnan().any() for grad in found.values())


def test_a_seed_is_drawn_in_every_training_forward_and_none_in_evaluation() -> None:
    model, x = model_of(GatedMLP()), torch.randn(ROWS, WIDTH)
    memsave.convert_model(model, SAMPLED)
    states = []
    for context in (torch.no_grad, torch.enable_grad):
        torch.manual_seed(0)
        with context():
            model(x)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert not torch.equal(state, states[0])
    model.eval()(x)
    assert torch.equal(state, torch.get_rng_state())


def test_behind_a_norm_only_the_seed_is_kept() -> None:
    model, x = model_of(nn.RMSNorm(WIDTH), GatedMLP()), torch.randn(ROWS, WIDTH)
    memsave.convert_model(model, [RecomputeNormConfig(), SAMPLED])
    norm, block = model
    assert block.kept_bytes(x.shape, x.dtype, noted=True) == 8
    assert memsave.saved_bytes(lambda: model(x)) == norm.kept_bytes(x.shape, x.dtype) + 8 + WIDTH * 4


def test_a_saved_model_is_converted_again_with_its_linears(tmp_path: Path) -> None:
    model = model_of(GatedMLP())
    memsave.convert_model(model, SAMPLED)
    memsave.save(model, tmp_path / "saved")
    loaded = memsave.load(tmp_path / "saved", model_of(GatedMLP()))
    assert repr(loaded) == repr(model)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
