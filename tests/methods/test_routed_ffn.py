"""RoutedFFNConfig: its settings, what it converts and refuses, what comes back, and what a checkpoint holds."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import memsave
from memsave import Guarantee, MemsaveError
from memsave.config import applied_configs
from memsave.nn.routed_ffn import RoutedFFN

from ..nn.routed_ffn.toys import KINDS, OUT, UNITS, WIDTH, assert_same, dense, gradients, tokens
from ..snapshot import bits
from .ffn_models import Model, batches, clusterings, config, converted

kinds = pytest.mark.parametrize("kind", KINDS)
ranks = pytest.mark.parametrize("lora_rank", [0, 3])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": 0}, "blocks: expected a whole number of at least 1, got 0"),
        ({"blocks": 4.0}, "blocks: expected a whole number of at least 1, got 4.0"),
        ({"blocks": True}, "blocks: expected a whole number of at least 1, got True"),
        ({"active": 0}, "active: expected a whole number of at least 1, got 0"),
        ({"active": 5}, "active: expected at most blocks, which is 4, got 5"),
        ({"balance_loss": -0.1}, "balance_loss: expected a number of at least 0, got -0.1"),
        ({"balance_loss": float("nan")}, "balance_loss: expected a number of at least 0, got nan"),
        ({"balance_loss": float("inf")}, "balance_loss: expected a number of at least 0, got inf"),
        ({"balance_loss": None}, "balance_loss: expected a number of at least 0, got None"),
        ({"lora_rank": -1}, "lora_rank: expected a whole number of at least 0, got -1"),
        ({"lora_rank": 2, "lora_alpha": 0}, "lora_alpha: expected a number above 0 or None, got 0"),
        ({"lora_alpha": 8}, "lora_alpha: expected lora_rank with it, got 8 alone"),
        ({"clustering": "random"}, r"clustering: expected one of \['contiguous', 'coactivation'\], got 'random'"),
        ({"calibration_bytes": 0}, "calibration_bytes: expected a whole number or None, got 0"),
        ({"target_modules": None}, "must be aimed: give target_modules"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"RoutedFFNConfig.*{message}"):
        config(**settings)


def test_settings_survive_json() -> None:
    made = config(blocks=8, active=3, balance_loss=0, lora_rank=4, lora_alpha=8, clustering="coactivation")
    assert memsave.MethodConfig.from_json(made.to_json()) == made
    assert made.guarantee is Guarantee.APPROXIMATE and made.calibrated and made.changes_keys
    assert not config().calibrated and not made.irrevocable and not made.default


@kinds
def test_what_is_converted_is_in_the_report(kind: str) -> None:
    model = Model(kind)
    name = type(model.ffn).__name__
    report = memsave.convert_model(model, config())
    assert [(row.names, row.kind, row.guarantee) for row in report.rows] == [(("ffn",), name, "approximate")]
    left = {name: skip.reason for skip in report.skipped for name in skip.names}
    linears = [n for n in left if n.startswith("ffn.")]
    assert linears and {left[n] for n in linears} == {"its weight moves into the routed block"}
    assert isinstance(model.ffn, RoutedFFN) and list(applied_configs(model.ffn)) == ["routed_ffn"]
    shown = repr(model.ffn)
    assert f"in_features={WIDTH}, hidden={UNITS}, out_features={OUT}, 2 of 4 blocks" in shown
    assert "RoutedFFNConfig(" in shown and model.ffn.training


def test_a_shared_block_is_replaced_at_all_its_parents() -> None:
    block = dense("gated", torch.float32)
    model: Any = nn.ModuleDict({"a": nn.Sequential(block), "b": nn.Sequential(block)})
    memsave.convert_model(model, config(target_modules=["a.0"]))
    assert isinstance(model["a"][0], RoutedFFN) and model["a"][0] is model["b"][0]


def test_parameters_stay_where_nothing_is_moved() -> None:
    model = Model("fused")
    before = {id(p) for p in model.parameters()}
    model.ffn.down_proj.bias.requires_grad_(False)
    memsave.convert_model(model, config())
    new = {name for name, p in model.named_parameters() if id(p) not in before}
    assert new == {"ffn.router.weight", "ffn.router.bias"} and model.ffn.unit_order is None
    assert not model.ffn.down_bias.requires_grad and model.ffn.gate_up_weight.requires_grad


def test_hooks_of_the_block_and_its_mode_stay() -> None:
    model, seen = Model().eval(), []
    handle = model.ffn.register_forward_hook(lambda module, args, y: seen.append(type(module).__name__))
    memsave.convert_model(model, config())
    model(tokens(4, dtype=torch.float32))
    memsave.restore_model(model, allow_lossy=True)
    model(tokens(4, dtype=torch.float32))
    handle.remove()
    model(tokens(4, dtype=torch.float32))
    assert seen == ["RoutedFFN", "Gated"] and not model.ffn.training


@kinds
@clusterings
@ranks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_restoring_gives_back_every_bit(kind: str, clustering: str, lora_rank: int, dtype: torch.dtype) -> None:
    plain = Model(kind, dtype)
    model = converted(kind, dtype, clustering=clustering, lora_rank=lora_rank)
    moved = model.ffn.unit_order
    assert (moved is not None) is (clustering == "coactivation")
    if moved is not None:
        assert sorted(moved.tolist()) == list(range(UNITS)) and moved.tolist() != list(range(UNITS))
    with pytest.raises(MemsaveError, match="allow_lossy"):
        memsave.restore_model(model)
    memsave.restore_model(model, allow_lossy=True)
    assert type(model.ffn) is type(plain.ffn) and str(model) == str(plain)
    assert list(model.state_dict()) == list(plain.state_dict())
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert bits(ours) == bits(theirs) and ours.requires_grad, name
    assert set(model.ffn.__dict__) == set(plain.ffn.__dict__)
    x = tokens(5, dtype=dtype)
    assert torch.equal(model(x), plain(x))


@kinds
@clusterings
def test_what_was_trained_comes_back_in_its_place(kind: str, clustering: str) -> None:
    """All blocks active with equal scores: the dense block that comes back computes the same."""
    model = converted(kind, torch.float64, clustering=clustering, active=4)
    with torch.no_grad():
        for parameter in model.ffn.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        model.ffn.router.weight.zero_()
        model.ffn.router.bias.zero_()
    y = model(tokens())
    memsave.restore_model(model, allow_lossy=True)
    assert torch.allclose(model(tokens()), y, atol=1e-12)


@kinds
@clusterings
def test_low_rank_factors_are_merged_or_dropped(kind: str, clustering: str) -> None:
    settings = {"clustering": clustering, "active": 4, "lora_rank": 3, "lora_alpha": 5.0}
    model = converted(kind, torch.float64, **settings)
    nn.init.zeros_(model.ffn.router.weight)
    nn.init.zeros_(model.ffn.router.bias)
    plain = Model(kind, torch.float64)
    assert torch.allclose(model(tokens()), plain(tokens()), atol=1e-12)  # B is zero at first
    for name in model.ffn.layout.names:
        nn.init.normal_(getattr(model.ffn, f"{name}_lora_b"))
    y, other = model(tokens()), copy.deepcopy(model)
    assert not torch.allclose(y, plain(tokens()), atol=1e-2)
    memsave.restore_model(model, allow_lossy=True)
    assert torch.allclose(model(tokens()), y, atol=1e-12)
    memsave.restore_model(other, allow_lossy=True, adapters="drop")
    assert torch.equal(other(tokens()), plain(tokens()))


@kinds
def test_only_factors_and_router_are_trained_with_a_rank(kind: str) -> None:
    model = converted(kind, torch.float64, lora_rank=3, balance_loss=0.0)
    trained = {name for name, p in model.ffn.named_parameters() if p.requires_grad}
    assert trained and all("lora" in name or "router" in name for name in trained)
    bare = converted(kind, torch.float64, balance_loss=0.0)
    bare.ffn.router.load_state_dict(model.ffn.router.state_dict())
    assert torch.equal(model(tokens()), bare(tokens()))
    found = gradients(model, model, tokens())
    assert_same({"x": found["x"]}, {"x": gradients(bare, bare, tokens())["x"]})
    assert all(found[f"ffn.{name}"].abs().max() > 0 for name in trained if "lora_b" in name or "router" in name)
    assert not any(found[f"ffn.{name}"].any() for name in trained if "lora_a" in name)


@kinds
@clusterings
@ranks
def test_copies_and_pickles_compute_the_same(kind: str, clustering: str, lora_rank: int) -> None:
    model = converted(kind, clustering=clustering, lora_rank=lora_rank)
    x = tokens(5, dtype=torch.float32)
    model(x)
    expected = gradients(model, model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(gradients(other, other, x), expected, tolerance=0.0)
        assert applied_configs(other.ffn) == applied_configs(model.ffn)
        memsave.restore_model(other, allow_lossy=True)
        assert list(other.state_dict()) == list(Model(kind).state_dict())


@kinds
@clusterings
@ranks
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_checkpoints_hold_everything(kind: str, clustering: str, lora_rank: int, device: str, tmp_path: Path) -> None:
    model = converted(kind, clustering=clustering, lora_rank=lora_rank)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    memsave.save(model, tmp_path / "checkpoint")
    target = Model(kind).to(device)
    state = torch.get_rng_state()
    loaded: Any = memsave.load(tmp_path / "checkpoint", target)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert all(
        bits(a) == bits(b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )
    x = tokens(5, dtype=torch.float32)
    assert torch.equal(loaded(x), model(x))
    for each in (loaded, model):
        memsave.restore_model(each, allow_lossy=True)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_keys_are_as_documented() -> None:
    keys = set(converted("gated", clustering="coactivation", lora_rank=2).ffn.state_dict())
    parts = {"weight", "bias", "lora_a", "lora_b"}
    expected = {f"{name}_{part}" for name in ("gate", "up", "down") for part in parts}
    assert keys == {*expected, "unit_order", "router.weight", "router.bias"}
    assert set(converted("fused").ffn.state_dict()) == {
        "gate_up_weight", "down_weight", "down_bias", "router.weight", "router.bias"
    }  # fmt: skip
    assert "up_weight" in converted("plain").ffn.state_dict()


def test_the_step_can_be_estimated() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(64, 64), nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)))
    x = torch.randn(512, 64)
    for settings in ({}, {"clustering": "coactivation"}):
        report = memsave.convert_model(
            model,
            config(target_modules=["1"], **settings),
            batch=x,
            dry_run=True,
            calibration=[x] if settings else None,
        )
        assert report.estimate.kept_bytes[1] < 0.6 * report.estimate.kept_bytes[0]
    memsave.convert_model(model, config(target_modules=["1"]))
    predicted = memsave.estimate(model, x).peak_bytes
    measured = memsave.measure(lambda: model(x).sum().backward()).peak_bytes
    assert predicted == pytest.approx(measured, rel=0.05)


def test_an_error_leaves_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = nn.ModuleList([Model(), Model()])
    before = {name: (id(p), bits(p), p.requires_grad) for name, p in model.named_parameters()}
    calls = []

    def fail(*args: Any, **settings: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no memory")
        return fill(*args, **settings)

    from memsave.methods import routed_ffn

    fill = routed_ffn.fill
    monkeypatch.setattr(routed_ffn, "fill", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        memsave.convert_model(model, config(lora_rank=2))
    assert {name: (id(p), bits(p), p.requires_grad) for name, p in model.named_parameters()} == before


def test_calibration_is_asked_for() -> None:
    with pytest.raises(ValueError, match="needs batches of data"):
        memsave.convert_model(Model(), config(clustering="coactivation"))
    with pytest.raises(ValueError, match="no config of this call looks at it"):
        memsave.convert_model(Model(), config(), calibration=batches())


def test_routers_follow_torchs_random_numbers() -> None:
    torch.manual_seed(5)
    one, two = (Model() for _ in range(2))
    found = []
    for model in (one, two):
        torch.manual_seed(6)
        memsave.convert_model(model, config())
        found.append(model.ffn.router.weight)
    assert torch.equal(*found) and found[0].std() > 0
