"""`convert_model(model, SHiRAConfig(...))`: in place, reported, composed, saved, predicted, restored."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import pytest
import torch
from torch import nn

import memsave
from memsave import ConflictError, NoMatchError, RestoreError, UnsupportedModelError
from memsave.config import applied_configs
from memsave.integrations.peft.shira import SHiRALinear
from memsave.peft import SHiRAConfig

from ...snapshot import bits, snapshot
from .shira import WIDTH, Toy, config, indices, layers, llama, randomize, same, tokens, values, weights

ROOT = Path(__file__).parents[3]
X = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(7))
PROJECTIONS = ["q_proj", "k_proj", "down_proj"]


def toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


def converted(model: Any, *, trained: bool = True, **settings: Any) -> Any:
    memsave.convert_model(model, config(**settings))
    if trained:
        randomize(model)
    return model


def loss(model: Any) -> torch.Tensor:
    return model(**tokens()).loss if hasattr(model, "config") else model(X).square().sum()


def gradients_of(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss(model).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("make", [toy, llama])
def test_a_model_is_converted_in_place(make: Any) -> None:
    model, plain = make(), make()
    targets = ["q", "out"] if make is toy else PROJECTIONS
    parameters = {id(p) for p in model.parameters()}
    memsave.convert_model(model, config(target_modules=targets))
    assert type(model) is type(plain) and len(layers(model)) == (2 if make is toy else 6)
    assert parameters < {id(p) for p in model.parameters()}
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == len(layers(model)) and all("memsave_shira_values.default" in n for n in trained)
    assert torch.equal(loss(model), loss(plain))
    through_peft = peft.get_peft_model(plain, config(target_modules=targets))
    randomize(model), randomize(through_peft)
    for a, b in zip(layers(model), layers(through_peft), strict=True):
        assert torch.equal(indices(a), indices(b))
    assert torch.equal(loss(model), loss(through_peft.base_model.model))


def test_training_works_after_it() -> None:
    model = converted(llama(), trained=False, target_modules=PROJECTIONS)
    before = weights(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(6):
        value = loss(model)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0] - 0.01
    after = weights(model)
    changed = {n.split(".")[-2] for n in before if not torch.equal(before[n], after[n])}
    assert changed == set(PROJECTIONS)


def test_a_dry_run_changes_nothing_and_reports_the_same(unchanged: Any) -> None:
    model = unchanged(llama())
    dry = memsave.convert_model(model, config(target_modules=PROJECTIONS), dry_run=True)
    real = memsave.convert_model(llama(), config(target_modules=PROJECTIONS))
    assert [(r.modules, r.count) for r in dry.rows] == [(r.modules, r.count) for r in real.rows]
    assert "would be converted" in str(dry) and "would" not in str(real)
    assert sum(r.count for r in dry.rows) == 6
    text = str(real)
    assert "shira" in text and "native  adapter" in text
    assert all(row.config.startswith("SHiRAConfig(density=0.25") for row in real.rows)
    assert {name.split(".")[-1] for row in real.rows for name in row.names} == set(PROJECTIONS)


def test_the_report_says_what_stays_frozen() -> None:
    report = memsave.convert_model(llama(), config(target_modules=PROJECTIONS))
    skipped = {name.split(".")[-1]: skip.reason for skip in report.skipped for name in skip.names}
    assert skipped["v_proj"] == skipped["embed_tokens"] == "frozen: not targeted by shira"
    assert not any(name in skipped for name in (*PROJECTIONS, "base_layer"))


def test_it_is_idempotent_and_other_settings_conflict() -> None:
    model = converted(toy(), target_modules=["q", "k"])
    before = snapshot(model)
    report = memsave.convert_model(model, config(target_modules=["q", "k"]))
    assert not report.rows and sum(row.count for row in report.already) == 2
    with pytest.raises(ConflictError, match="restore that one first.*The model was not changed"):
        memsave.convert_model(model, config(target_modules=["q"]))
    with pytest.raises(ConflictError, match="both asked for"):
        memsave.convert_model(toy(), [config(target_modules=["q"]), config(target_modules=["q"], seed=1)])
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_modules": ["q_prj"]}, "SHiRAConfig.*q_prj.*q_proj"),
        ({"target_modules": ["q_proj", "k_prj"]}, "k_prj.*k_proj"),
        ({"target_modules": r".*\.q_prj"}, "q_prj"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "q_proj"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["k_prj"]}, "k_prj"),
        ({"target_modules": None}, "SHiRAConfig.target_modules: expected names of linears, got None"),
    ],
    ids=str,
)
def test_targets_that_match_nothing(settings: dict[str, Any], words: str, unchanged: Any) -> None:
    model = unchanged(llama())
    with pytest.raises(NoMatchError, match=words) as raised:
        memsave.convert_model(model, config(**settings))
    assert "The model was not changed" in str(raised.value)


def test_all_linears() -> None:
    model = converted(llama(), target_modules="all-linear")
    assert len(layers(model)) == 14 and type(model.lm_head) is nn.Linear


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: peft.get_peft_model(toy(), config()), "it is a PeftModel; use its add_adapter"),
        (
            lambda: peft.get_peft_model(toy(), peft.LoraConfig(target_modules=["q"])).base_model.model,
            "adapters already",
        ),
        (lambda: tied(), "lm_head: its weight is tied to"),
    ],
    ids=["PeftModel", "lora", "tied"],
)
def test_what_cannot_be_converted(make: Any, words: str, unchanged: Any) -> None:
    model = unchanged(make())
    with pytest.raises(UnsupportedModelError, match=words):
        memsave.convert_model(model, config(target_modules=["lm_head"] if hasattr(model, "lm_head") else ["q"]))


def tied() -> Any:
    return llama(tie_word_embeddings=True)


EXACT: dict[str, Any] = {
    "bare": None,
    "recompute all": [memsave.RecomputeMLPConfig(recompute="all"), memsave.RecomputeNormConfig()],
}


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("exact", EXACT)
def test_composes_with_exact_methods(exact: str, order: str) -> None:
    """The same gradients in fp64, fewer bytes; and both come off again."""
    plain = converted(llama().double(), target_modules="all-linear")
    model = llama().double()
    if order == "before":
        memsave.convert_model(model, EXACT[exact])
    converted(model, target_modules="all-linear")
    if order == "after":
        memsave.convert_model(model, EXACT[exact])
    ours, expected = gradients_of(model), gradients_of(plain)
    assert ours.keys() == expected.keys() and len(ours) == 14
    for name in expected:
        # Llama's norms compute in float32, whatever the model's dtype.
        torch.testing.assert_close(ours[name], expected[name], rtol=0, atol=1e-5 * float(expected[name].abs().max()))
    assert memsave.saved_bytes(lambda: loss(model)) < memsave.saved_bytes(lambda: loss(plain))
    memsave.restore_model(model, adapters="drop")
    assert same(dict(model.state_dict()), dict(llama().double().state_dict()))
    assert not any(applied_configs(m) for m in model.modules())


def test_with_sampling_in_one_call() -> None:
    model = llama()
    wta = memsave.WTACRSConfig(target_modules=["v_proj"], keep_ratio=0.5)
    memsave.convert_model(model, [config(target_modules=["q_proj"]), wta, memsave.RecomputeNormConfig()])
    assert len(layers(model)) == 2
    assert {name for m in model.modules() for name in applied_configs(m)} >= {"shira", "wta_crs", "recompute_norm"}
    loss(model).backward()


@pytest.mark.parametrize("adapters", ["merge", "drop"])
@pytest.mark.parametrize("make", [toy, llama])
def test_restoring(make: Any, adapters: str) -> None:
    model = make()
    next(model.parameters()).requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    modules, attributes = [(n, id(m)) for n, m in model.named_modules()], set(model.__dict__)
    converted(model, target_modules=["q", "q_proj"][make is llama : 1 + (make is llama)])
    held = weights(model)
    expected = loss(model)
    memsave.restore_model(model, adapters=adapters)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert [(n, id(m)) for n, m in model.named_modules()] == modules
    assert set(model.__dict__) == attributes and not hasattr(model, "peft_config")
    assert same(dict(model.named_parameters()), held if adapters == "merge" else weights(make()))
    assert torch.equal(loss(model), expected if adapters == "merge" else loss(make()))


def test_restoring_needs_to_know_what_becomes_of_the_adapters() -> None:
    model = converted(toy(), target_modules=["q"])
    before = snapshot(model)
    with pytest.raises(RestoreError, match="shira holds trained adapters; say adapters='merge' or 'drop'"):
        memsave.restore_model(model)
    assert snapshot(model) == before
    for layer in layers(model):
        layer.delete_adapter("default")
    model.peft_config.pop("default")
    with pytest.raises(RestoreError, match="its adapter 'default' was deleted since"):
        memsave.restore_model(model, adapters="drop")


def test_a_failed_restore_leaves_the_adapters() -> None:
    model = converted(llama(), target_modules=PROJECTIONS)
    memsave.convert_model(model, memsave.RecomputeNormConfig())
    before = {n: bits(p) for n, p in model.named_parameters()}
    value = loss(model)
    with mock.patch.object(memsave.RecomputeNormConfig, "restore", side_effect=KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            memsave.restore_model(model, adapters="drop")
    assert {n: bits(p) for n, p in model.named_parameters()} == before and torch.equal(loss(model), value)


@pytest.mark.parametrize("at", [0, 1, 4])
def test_an_exception_in_between_leaves_the_model_unchanged(at: int, unchanged: Any) -> None:
    model = unchanged(llama())
    original, calls = SHiRALinear.update_layer, []

    def fails(self: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(self)
        if len(calls) > at:
            raise KeyboardInterrupt
        original(self, *args, **kwargs)

    with mock.patch.object(SHiRALinear, "update_layer", fails), pytest.raises(KeyboardInterrupt):
        memsave.convert_model(model, [memsave.RecomputeNormConfig(), config(target_modules=PROJECTIONS)])


MASKS = [{"mask": "random"}, {"mask": "magnitude"}, {"mask": "snip", "calibration": [tokens()]}]


@pytest.mark.parametrize("settings", MASKS, ids=lambda s: s["mask"])
@pytest.mark.parametrize("extra", [False, True])
def test_saved_and_loaded(settings: dict[str, Any], extra: bool, tmp_path: Path) -> None:
    model = converted(llama(), target_modules=PROJECTIONS, **settings)
    if extra:
        memsave.convert_model(model)
    memsave.save(model, tmp_path / "c")
    for again in (memsave.load(tmp_path / "c"), memsave.load(tmp_path / "c", llama())):
        assert torch.equal(loss(again), loss(model))
        assert same(dict(again.state_dict()), dict(model.state_dict())) and same(weights(again), weights(model))
        assert [layer.stored_masks for layer in layers(again)] == [layer.stored_masks for layer in layers(model)]
        ours, expected = gradients_of(again), gradients_of(model)
        assert same(ours, expected)
        assert {n for n, p in again.named_parameters() if p.requires_grad} == set(expected)
    memsave.restore_model(again, adapters="drop")
    assert same(weights(again), weights(llama()))


def test_loaded_in_a_fresh_process(tmp_path: Path) -> None:
    """`memsave.load` knows the adapters although nothing has imported them."""
    model = converted(llama(), target_modules=PROJECTIONS, mask="magnitude")
    memsave.save(model, tmp_path / "c")
    code = f"""
import sys, memsave
assert "peft" not in sys.modules
model = memsave.load({str(tmp_path / "c")!r})
import torch
ids = torch.tensor({tokens()["input_ids"].tolist()})
print(repr(model(input_ids=ids, labels=ids).loss.item()))
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout.strip().splitlines()[-1]) == loss(model).item()


def test_the_config_survives_json() -> None:
    method = config(target_modules=["k", "q"], density=0.1, keep_ratio=0.5, calibration=[X]).as_method()
    again = memsave.MethodConfig.from_json(method.to_json())
    assert again == method and hash(again) == hash(method) and "calibration" not in method.to_json()
    assert again.peft_config.density == 0.1 and again.peft_config.target_modules == {"q", "k"}
    assert str(again).startswith("SHiRAConfig(density=0.1, ") and "keep_ratio=0.5" in str(again)
    assert config(target_modules=["k"]).as_method() != method


def test_a_config_that_was_read_lacks_its_calibration(unchanged: Any) -> None:
    model = unchanged(toy())
    method = config(mask="snip", calibration=[X], calibration_loss=lambda y: y.sum()).as_method()
    again = memsave.MethodConfig.from_json(method.to_json())
    with pytest.raises(
        UnsupportedModelError, match="a snip mask is chosen by gradients: expected batches in SHiRAConfig.calibration"
    ):
        memsave.convert_model(model, again)


def test_the_prediction_is_what_a_step_needs() -> None:
    batch = tokens(count=16)
    plain, model = llama(), llama()
    predicted = memsave.convert_model(model, config(target_modules=PROJECTIONS), batch=batch, dry_run=True).estimate
    assert predicted is not None and not layers(model)
    converted(model, trained=False, target_modules=PROJECTIONS)
    kept = [memsave.saved_bytes(lambda m=m: m(**batch).loss) for m in (plain, model)]
    assert predicted.kept_bytes == pytest.approx(kept, rel=0.01)
    optimizer = torch.optim.AdamW(values(model))

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    held = weights(model)
    estimate = memsave.estimate(model, batch, optimizer="AdamW")
    assert same(weights(model), held)
    measured = memsave.measure(step)
    assert estimate.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.01)
    assert estimate.saved_bytes == pytest.approx(measured.saved_bytes, rel=0.01)


def test_save_pretrained_writes_the_original_weights(tmp_path: Path) -> None:
    """With the adapter on: what a plain model loads has no trace of it."""
    model = converted(llama(), target_modules=PROJECTIONS)
    state = {n.replace("base_layer.", ""): t for n, t in model.state_dict().items() if "shira" not in n}
    assert same(state, dict(llama().state_dict()))


def test_configs_of_the_class_instead_of_an_instance() -> None:
    with pytest.raises(TypeError, match="SHiRAConfig"):
        memsave.convert_model(toy(), SHiRAConfig)  # type: ignore[arg-type]


def test_copies_of_a_converted_model_are_restored_alone() -> None:
    model = converted(toy(), target_modules=["q"])
    twin = copy.deepcopy(model)
    memsave.restore_model(twin, adapters="drop")
    assert same(weights(twin), weights(toy())) and len(layers(model)) == 1 and not layers(twin)
    assert not torch.equal(model(X), twin(X))


@pytest.mark.parametrize("mask", ["random", "magnitude", "struct", "gradient", "snip"])
def test_large_masks_are_predicted(mask: str) -> None:
    """What chooses the entries needs values, which the tensors of the prediction do not have; small ones do."""
    x = torch.randn(4, 512)
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512))
    settings = {"calibration": [x], "calibration_loss": lambda y: y.sum()} if mask in ("gradient", "snip") else {}
    report = memsave.convert_model(
        model, SHiRAConfig(mask=mask, density=0.3, target_modules=["0"], **settings), batch=x
    )
    kept = memsave.saved_bytes(lambda: model(x))
    assert report.estimate is not None and report.estimate.kept_bytes == (2 * x.nbytes, kept) and kept == x.nbytes
    measured = memsave.measure(lambda: model(x).sum().backward())
    assert memsave.estimate(model, x).peak_bytes == measured.peak_bytes
