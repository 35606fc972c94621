"""FlashSVDConfig: its settings, what it converts and refuses, what it looks at, and what an error leaves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memsave
from memsave import FlashSVDConfig, Guarantee, MemsaveError, NoMatchError
from memsave.config import applied_configs
from memsave.methods import flash_svd
from memsave.nn.low_rank.heads import HeadStreaming
from memsave.nn.low_rank.linear import LowRankLinear
from memsave.nn.low_rank.rows import RowWise

from ..architectures.models import ARCHITECTURES, TINY
from ..nn.low_rank.toys import WIDTH, Layer, tokens
from ..snapshot import snapshot

BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}


def config(**settings: Any) -> FlashSVDConfig:
    size = {} if {"rank", "ratio", "energy"} & settings.keys() else {"rank": 4}
    return FlashSVDConfig(**{"target_modules": r".*", **size, **settings})


def layers(count: int = 2) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(*(Layer() for _ in range(count))).eval()


def reasons(report: memsave.Report) -> dict[str, str]:
    return {name: skip.reason for skip in report.skipped for name in skip.names}


def low_rank_linears(model: nn.Module) -> dict[str, LowRankLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LowRankLinear)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank: expected a whole number of at least 1, got 0"),
        ({"rank": 2.0}, "rank: expected a whole number of at least 1, got 2.0"),
        ({"rank": True}, "got True"),
        ({"ratio": 0}, r"ratio: expected a fraction in \(0, 1\], got 0"),
        ({"ratio": 1.5}, r"ratio: expected a fraction in \(0, 1\], got 1.5"),
        ({"energy": float("nan")}, r"energy: expected a fraction in \(0, 1\], got nan"),
        ({"energy": -0.1}, r"energy: expected a fraction in \(0, 1\], got -0.1"),
        ({"rank": 4, "ratio": 0.5}, r"exactly one of rank, ratio and energy, got \['rank', 'ratio'\]"),
        ({"rank": None}, "exactly one of rank, ratio and energy, got none"),
        ({"ratio": 0.5, "allocation": "even"}, "allocation: expected one of .*'energy' with a ratio, got 'even'"),
        ({"rank": 4, "allocation": "energy"}, "allocation: .*got 'energy' with rank"),
        ({"whiten": "input"}, r"whiten: expected one of \['none', 'activation'\], got 'input'"),
        ({"damping": -1}, "damping: expected a number of at least 0, got -1"),
        ({"damping": float("inf")}, "damping: .*got inf"),
        ({"energy": 0.9, "per_head": True}, "per_head: expected rank or a uniform ratio"),
        ({"ratio": 0.9, "allocation": "energy", "per_head": True}, "per_head: expected rank or a uniform ratio"),
        ({"fuse": 1}, "fuse: expected True or False, got 1"),
        ({"keep_originals": None}, "keep_originals: expected True or False, got None"),
        ({"calibration_bytes": 0}, "calibration_bytes: expected a whole number or None, got 0"),
        ({"target_modules": None}, "must be aimed: give target_modules"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_settings_survive_json() -> None:
    made = config(ratio=0.5, allocation="energy", whiten="activation", keep_originals=False, calibration_bytes=10**6)
    assert memsave.MethodConfig.from_json(made.to_json()) == made
    assert made.guarantee is Guarantee.APPROXIMATE and made.calibrated and made.irrevocable and made.changes_keys
    assert not config().calibrated and not config().irrevocable


def test_what_is_converted_is_in_the_report() -> None:
    model = layers()
    report = memsave.convert_model(model, config())
    backends = {name: row.backend for row in report.rows for name in row.names}
    linears = {f"{i}.{name}" for i in (0, 1) for name in ("fc1", "fc2", *(f"attn.{p}_proj" for p in "qkvo"))}
    assert backends == dict.fromkeys(linears, "torch") | {"0.attn": "by heads", "1.attn": "by heads"}
    assert {row.guarantee for row in report.rows} == {"approximate"} and low_rank_linears(model).keys() == linears
    assert all(m.first.shape == (4, m.in_features) for m in low_rank_linears(model).values())
    assert model[0].fc1.lazy and not model[0].fc2.lazy and isinstance(model[0].attn, HeadStreaming)


def test_targets_and_exclusions_choose_linears_and_what_is_around_them() -> None:
    model = layers()
    memsave.convert_model(
        model, config(target_modules=[f"{p}_proj" for p in "qkvo"], exclude_modules=["1.attn.o_proj"])
    )
    assert low_rank_linears(model).keys() == {
        *(f"0.attn.{p}_proj" for p in "qkvo"), *(f"1.attn.{p}_proj" for p in "qkv")
    }  # fmt: skip
    assert [name for name, m in model.named_modules() if isinstance(m, HeadStreaming)] == ["0.attn"]
    model = layers()
    memsave.convert_model(model, config(fuse=False))
    assert not any(isinstance(m, (HeadStreaming, RowWise)) or getattr(m, "lazy", False) for m in model.modules())


def test_factors_that_are_no_smaller_leave_the_weight() -> None:
    """The break-even of (32, 32) is 15, of (32, 96) 23, of one of four heads (8, 32) 6."""
    model = layers()
    found = reasons(memsave.convert_model(model, config(rank=16)))
    assert low_rank_linears(model).keys() == {f"{i}.fc{j}" for i in (0, 1) for j in (1, 2)}
    assert found["0.attn.q_proj"] == "rank 16 has 1,024 parameters, and the weight 1,024"
    assert "its output projection stays dense" in found["0.attn"]
    found = reasons(memsave.convert_model(model := layers(), config(rank=7, per_head=True)))
    assert found["1.attn.k_proj"] == "rank 7 for each of 4 heads has 280 parameters, and the weight 256"
    assert model[0].attn.o_proj.rank == 7
    memsave.convert_model(model := layers(), config(rank=15))
    assert model[0].attn.q_proj.rank == 15


@pytest.mark.parametrize("settings", [{"rank": 24}, {"ratio": 1.0, "allocation": "energy"}])
def test_a_model_in_which_nothing_gets_smaller_stays(settings: dict[str, Any]) -> None:
    model = layers()
    before = snapshot(model)
    with pytest.raises(NoMatchError, match="so it is for all its targets. The model was not changed."):
        memsave.convert_model(model, config(**settings))
    assert snapshot(model) == before


def test_a_tied_head_and_the_base_of_an_adapter_stay() -> None:
    model: Any = nn.ModuleDict({"table": nn.Embedding(50, WIDTH), "layer": Layer(), "head": nn.Linear(WIDTH, 50)})
    model.head.weight = model.table.weight
    model.layer.attn.q_proj.base_layer = nn.Linear(WIDTH, WIDTH)
    found = reasons(memsave.convert_model(model, config()))
    assert found["head"].startswith("its weight is also that of table") and model.head.weight is model.table.weight
    assert found["layer.attn.q_proj.base_layer"].startswith("it is the base of an adapter")
    with pytest.raises(NoMatchError, match="its weight is also that of table"):
        memsave.convert_model(model, config(target_modules=["head"]))


def test_the_base_of_a_peft_adapter_is_refused() -> None:
    peft = pytest.importorskip("peft", reason="needs peft (pip install 'memsave[hf]')")
    model = peft.get_peft_model(BY_NAME["Llama"].make(), peft.LoraConfig(target_modules=["q_proj"], r=2))
    before = snapshot(model)
    with pytest.raises(MemsaveError, match="adapter"):
        memsave.convert_model(model, config(target_modules=r".*q_proj\.base_layer"))
    assert snapshot(model) == before


class Quantized(Tensor):
    """Stands for a quantized weight."""


def on_meta(model: nn.Module) -> None:
    model.to("meta")


def quantized(model: Any) -> None:
    for layer in model:
        layer.fc1.weight = nn.Parameter(layer.fc1.weight.data.as_subclass(Quantized), requires_grad=False)


def parametrized(model: Any) -> None:
    for layer in model:
        torch.nn.utils.parametrizations.weight_norm(layer.fc1)


def replaced_forward(model: Any) -> None:
    for layer in model:
        layer.fc1.forward = lambda x: x


def sampled(model: Any) -> None:
    memsave.convert_model(model, memsave.WTACRSConfig(target_modules=["fc1"]))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (on_meta, "its weight is on the meta device and has no values; load the weights first"),
        (quantized, r"its weight is a \w+ \(quantized or sharded\)"),
        (parametrized, "parametrized"),
        (replaced_forward, "its forward was replaced on the instance"),
        (sampled, "it is converted by wta_crs; restore that first"),
    ],
)
def test_linears_that_cannot_be_factored_are_refused_with_the_reason(spoil: Any, message: str) -> None:
    model = layers()
    spoil(model)
    before = snapshot(model)
    with pytest.raises(MemsaveError, match=message):
        memsave.convert_model(model, config(target_modules=["fc1"]))
    assert snapshot(model) == before


def with_nan(x: Tensor) -> Tensor:
    return x.clone().index_fill_(0, torch.tensor([1]), float("nan"))


@pytest.mark.parametrize(
    ("settings", "calibration", "message"),
    [
        ({"whiten": "activation"}, None, "calibration: .*needs batches of data, got None"),
        ({}, [tokens(2, 3)], "calibration was given, but no config of this call looks at it"),
        ({"whiten": "activation"}, [], "at least one batch"),
        ({"whiten": "activation"}, tokens(2, 3).float(), "iterable of batches"),
        ({"whiten": "activation"}, [with_nan(tokens(2, 3)).float()], "not finite|finite"),
        ({"whiten": "activation", "rank": None, "energy": 0.9}, [with_nan(tokens(2, 3)).float()], "finite"),
    ],
)
def test_batches_that_are_no_use(settings: dict[str, Any], calibration: Any, message: str) -> None:
    model = layers()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        memsave.convert_model(model, config(**settings), calibration=calibration)
    assert snapshot(model) == before


def test_again_with_the_same_settings_nothing_happens_and_with_others_it_is_an_error() -> None:
    model = layers()
    memsave.convert_model(model, config(rank=16))
    before = snapshot(model)
    for dry_run in (True, False):
        report = memsave.convert_model(model, config(rank=16), dry_run=dry_run)
        assert not report.rows and reasons(report)["0.attn.q_proj"].startswith("rank 16 has 1,024 parameters")
        assert snapshot(model) == before
    with pytest.raises(MemsaveError):
        memsave.convert_model(model, config(rank=4, target_modules=["fc1"]))
    assert snapshot(model) == before
    model = layers()
    memsave.convert_model(model, config())
    before = snapshot(model)
    report = memsave.convert_model(model, config())
    assert not report.rows and {name for row in report.already for name in row.names} >= low_rank_linears(model).keys()
    assert snapshot(model) == before


def test_again_the_budget_is_not_spent_on_what_is_left() -> None:
    model = layers()
    with torch.no_grad():
        model[0].fc1.weight[:, 4:] = 0
    settings = config(ratio=0.9, allocation="energy")
    memsave.convert_model(model, settings)
    before = snapshot(model)
    assert 0 < len(low_rank_linears(model)) < 12
    report = memsave.convert_model(model, settings)
    assert not report.rows and "earlier call" in reasons(report)["1.fc1"] and snapshot(model) == before


@pytest.mark.parametrize("ratio", [0.3, 0.6])
def test_energy_is_spent_within_the_budget_and_where_it_is_worth_most(ratio: float) -> None:
    model = layers()
    with torch.no_grad():
        model[0].fc1.weight[:, 4:] = 0  # of rank 4
    plain = copy.deepcopy(model)
    memsave.convert_model(model, config(ratio=ratio, allocation="energy"))
    kept, total = (sum(p.numel() for p in each.parameters() if p.dim() > 1) for each in (model, plain))
    assert 0.97 * ratio * total < kept <= ratio * total
    ranks = [m.rank for m in low_rank_linears(model).values()]
    assert model[0].fc1.rank == 4 and max(ranks) > 4 and min(ranks) < max(ranks)


@pytest.mark.parametrize(("settings", "rank"), [({"ratio": 0.5}, 12), ({"energy": 1.0}, 4), ({"energy": 0.5}, 2)])
def test_ranks_by_ratio_and_by_energy(settings: dict[str, Any], rank: int) -> None:
    """A weight (32, 96) has 3072 parameters, a rank 128; this one has four equal singular values."""
    model = nn.Sequential(nn.Linear(96, 32))
    with torch.no_grad():
        model[0].weight.zero_()[:4, :4] = 3 * torch.eye(4)
    memsave.convert_model(model, config(**settings))
    assert low_rank_linears(model)["0"].rank == rank


def output_error(found: nn.Module, plain: nn.Module, batches: list[Any]) -> float:
    with torch.no_grad():
        return sum(float((found(*b) - plain(*b)).square().sum()) for b in batches)


@pytest.mark.parametrize("calibration_bytes", [None, 10**9])
def test_whitening_errs_less_on_the_batches(calibration_bytes: int | None) -> None:
    plain = layers()
    scale = torch.logspace(0, -2, WIDTH)
    batches = [((torch.randn(4, 6, WIDTH, generator=torch.Generator().manual_seed(i)) * scale),) for i in range(3)]
    errors = []
    for whiten in ("none", "activation"):
        model = copy.deepcopy(plain).train()
        settings = {"whiten": whiten, "rank": 6, "calibration_bytes": calibration_bytes}
        memsave.convert_model(model, config(**settings), calibration=batches if whiten == "activation" else None)
        assert all(m.training and not m._forward_pre_hooks for m in model.modules())
        errors.append(output_error(model.eval(), plain, batches))
    assert 0 < errors[1] < 0.9 * errors[0]


def test_a_language_model_is_whitened_from_end_to_end() -> None:
    """With batches that are mappings; the ranks, too, come from the batches."""
    architecture = BY_NAME["Llama"]
    batches = [architecture.batch(TINY, side) for side in ("left", "right", None)]
    plain: Any = architecture.make().eval()
    errors = []
    for settings in ({"ratio": 0.4}, {"ratio": 0.4, "whiten": "activation"}, {"energy": 0.7, "whiten": "activation"}):
        model: Any = copy.deepcopy(plain)
        with_batches = {"calibration": batches} if "whiten" in settings else {}
        memsave.convert_model(model, config(**settings), **with_batches)
        with torch.no_grad():
            errors.append(sum(float((model(**b).logits - plain(**b).logits).norm()) for b in batches))
        assert {type(m).__name__ for m in model.modules()} >= {"LowRankLinear", "MemsaveLlamaAttention"}
    assert 0 < errors[1] < errors[0]
    assert len({m.rank for m in low_rank_linears(model).values()}) > 3


def fails_at(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The conversion of that linear raises."""
    make, calls = flash_svd.low_rank, []

    def failing(*args: Any, **kwargs: Any) -> LowRankLinear:
        calls.append(args)
        if len(calls) == number:
            raise OSError("no")
        return make(*args, **kwargs)

    monkeypatch.setattr(flash_svd, "low_rank", failing)


def fails_around(monkeypatch: pytest.MonkeyPatch) -> None:
    """The conversion of an attention module, after all linears, raises."""
    swap, calls = flash_svd.swap, []

    def failing(module: nn.Module, mixin: type, made: Any) -> nn.Module:
        calls.append(module)
        if len(calls) == 2:
            raise OSError("no")
        return swap(module, mixin, made)

    monkeypatch.setattr(flash_svd, "swap", failing)


@pytest.mark.parametrize("fails", [lambda patch: fails_at(1, patch), lambda patch: fails_at(5, patch), fails_around])
def test_an_error_midway_undoes_everything(fails: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    model = layers()
    model[0].fc1.register_forward_hook(print)
    before = snapshot(model)
    fails(monkeypatch)
    with pytest.raises(OSError, match="no"):
        memsave.convert_model(model, config())
    assert snapshot(model) == before


@pytest.mark.parametrize("number", [2, 5])
def test_an_error_midway_leaves_what_gave_up_its_original(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = layers()
    plain = copy.deepcopy(model)
    x = tokens(2, 5).float()
    fails_at(number, monkeypatch)
    with (
        pytest.raises(OSError, match="no"),
        pytest.warns(UserWarning, match=f"{number - 1} modules, .* had been converted and given up their originals"),
    ):
        memsave.convert_model(model, config(rank=8, keep_originals=False))
    converted = low_rank_linears(model)
    assert len(converted) == number - 1 and all(applied_configs(m) for m in converted.values())
    assert not any(isinstance(m, (HeadStreaming, RowWise)) for m in model.modules())
    assert all(p is not None for m in model.modules() for n, p in m._parameters.items() if n == "weight")
    with torch.no_grad():
        assert model(x).isfinite().all() and not torch.equal(model(x), plain(x))
        memsave.restore_model(model, allow_lossy=True)
        assert all(type(m) is type(plain.get_submodule(n)) for n, m in model.named_modules())
        model(x)


def test_originals_are_given_up_one_by_one() -> None:
    """The peak is that of the model and a layer's work; with the originals kept, that of the model and its factors."""
    peaks = []
    for keep in (True, False):
        model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(24))).eval()
        weight_bytes = sum(p.nbytes for p in model.parameters())
        settings = config(ratio=0.95, keep_originals=keep)
        peaks.append(memsave.measure(lambda model=model, s=settings: memsave.convert_model(model, s)).peak_bytes)
    assert peaks[0] - peaks[1] > 0.8 * weight_bytes
    assert peaks[1] < 1.7 * weight_bytes


def test_t5_in_half_precision_with_some_linears_in_full() -> None:
    """As transformers loads it: the input of these is cast."""
    architecture = BY_NAME["T5"]
    model: Any = architecture.make().eval().to(torch.bfloat16)
    for name, module in model.named_modules():
        if name.endswith(".wo"):
            module.float()
    batch = architecture.batch(TINY, "left")
    memsave.convert_model(model, config())
    with torch.no_grad():
        found = model(**batch).logits
        memsave.restore_model(model, allow_lossy=True)
        expected = model(**batch).logits
    assert found.dtype == expected.dtype and 0 < float((found - expected).norm()) < 0.05 * float(expected.norm())


def test_attention_whose_output_projection_is_no_target_says_so() -> None:
    model = next(a for a in ARCHITECTURES if a.name == "Llama").make()
    report = memsave.convert_model(model, FlashSVDConfig(rank=3, target_modules=["q_proj", "k_proj", "v_proj"]))
    (reason,) = {skip.reason for skip in report.skipped if skip.kind == "LlamaAttention"}
    assert reason == "not fused: its output projection stays dense, so its output would be whole"


def test_attention_that_has_no_target_is_not_spoken_of() -> None:
    model = next(a for a in ARCHITECTURES if a.name == "Llama").make()
    report = memsave.convert_model(model, FlashSVDConfig(rank=3, target_modules=[r"up_proj", "gate_proj", "down_proj"]))
    assert {row.kind for row in report.rows} == {"Linear", "LlamaMLP"}
    assert not [skip for skip in report.skipped if skip.kind == "LlamaAttention"]
