"""A model that FlashSVD converted: taken back, saved and loaded, copied, predicted, and beside other methods."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memsave
from memsave import FlashSVDConfig, RestoreError, SaveError
from memsave.config import applied_configs
from memsave.nn.low_rank.heads import HeadStreaming
from memsave.nn.low_rank.linear import LowRankLinear
from memsave.nn.low_rank.rows import RowWise

from ..architectures.models import ARCHITECTURES, TINY, Architecture
from ..architectures.step import assert_same, train
from ..nn.helpers import assert_same as assert_near
from ..nn.low_rank.toys import WIDTH, Layer, TwoModules, counted_groups, small_budgets, tokens
from ..snapshot import snapshot

pytest.importorskip("transformers", reason="needs transformers (pip install 'memsave[hf]')")
MODELS = [a for a in ARCHITECTURES if a.name in ("Llama", "GPT-2", "BERT", "T5", "Whisper")]
models = pytest.mark.parametrize("architecture", MODELS, ids=lambda a: a.name)
per_head = pytest.mark.parametrize("per_head", [False, True], ids=["whole", "per_head"])


@pytest.fixture(autouse=True)
def _small_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    small_budgets(monkeypatch)


def config(**settings: Any) -> FlashSVDConfig:
    return FlashSVDConfig(**{"target_modules": r".*", "rank": 4, **settings})


def converted(architecture: Architecture, **settings: Any) -> Any:
    model = architecture.make().eval()
    memsave.convert_model(model, config(**settings))
    return model


@torch.no_grad()
def logits(model: Any, architecture: Architecture) -> Tensor:
    return model(**architecture.batch(TINY, "left")).logits


def structure(model: nn.Module) -> dict[str, Any]:
    """Classes, methods, what streams, shapes and flags, by name."""
    return {
        name: (
            type(m), list(applied_configs(m).items()), m.training, m.extra_repr(), getattr(m, "lazy", None),
            m.__dict__.get("_memsave_heads"), m.__dict__.get("_memsave_rows"),
            [(n, p.shape, p.dtype, p.requires_grad) for n, p in m.named_parameters(recurse=False)],
        )
        for name, m in model.named_modules()
    }  # fmt: skip


@models
@per_head
def test_restored_models_are_dense_and_compute_what_the_low_rank_one_did(
    architecture: Architecture, per_head: bool
) -> None:
    plain: Any = architecture.make().eval()
    model = copy.deepcopy(plain)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.requires_grad_(False)
    before = snapshot(model)
    memsave.convert_model(model, config(per_head=per_head))
    expected = logits(model, architecture)
    with pytest.raises(RestoreError, match="flash_svd changed the function.*allow_lossy=True"):
        memsave.restore_model(model)
    report = memsave.restore_model(model, allow_lossy=True)
    assert report.rows and {row.method for row in report.rows} == {"flash_svd"}
    after = snapshot(model)
    assert [(n, m["class"], m["plain"], m["hooks"]) for n, m in after["modules"].items()] == [
        (n, m["class"], m["plain"], m["hooks"]) for n, m in before["modules"].items()
    ]
    assert after["keys"] == before["keys"] and list(after["parameters"]) == list(before["parameters"])
    for name, parameter in before["parameters"].items():
        found = after["parameters"][name]
        assert found["requires_grad"] == parameter["requires_grad"]
        assert found["id"] == parameter["id"] or ".weight" in name
    attributes = {n: set(m["attributes"]) for n, m in before["modules"].items()}
    assert {n: set(m["attributes"]) for n, m in after["modules"].items()} == attributes
    found = logits(model, architecture)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert not torch.allclose(found, logits(plain, architecture), rtol=1e-2)
    with counted_groups() as groups:
        logits(model, architecture)
    assert not groups


def test_hooks_and_parts_of_several_parents_survive() -> None:
    """One linear under two names; a hook, and a bias that an optimizer knows."""
    model: Any = nn.ModuleDict({"layer": Layer(), "same": nn.ModuleList()})
    model.same.append(model.layer.fc1)
    seen: list[Any] = []
    handle = model.layer.fc1.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    bias = model.layer.fc1.bias
    memsave.convert_model(model, config())
    assert model.same[0] is model.layer.fc1 and isinstance(model.layer.fc1, LowRankLinear)
    x = tokens(2, 5).float()
    model.layer.eval()(x)
    memsave.restore_model(model, allow_lossy=True)
    model.layer(x)
    assert model.same[0] is model.layer.fc1 and seen == [LowRankLinear, nn.Linear] and model.layer.fc1.bias is bias
    handle.remove()
    assert not model.layer.fc1._forward_hooks


def test_one_of_several_methods_comes_off() -> None:
    model = converted(MODELS[0])
    memsave.convert_model(model)
    with pytest.raises(RestoreError):
        memsave.restore_model(model, methods=["flash_svd"])
    memsave.restore_model(model, methods=["flash_svd"], allow_lossy=True)
    methods = {c.name for m in model.modules() for c in applied_configs(m).values()}
    assert "recompute_norm" in methods and "flash_svd" not in methods
    memsave.restore_model(model)
    assert snapshot(model)["keys"] == snapshot(MODELS[0].make())["keys"]


@models
@per_head
@pytest.mark.parametrize("alone", [False, True], ids=["into a model", "alone"])
def test_saved_and_loaded(architecture: Architecture, per_head: bool, alone: bool, tmp_path: Path) -> None:
    """Bit for bit, and it streams as before."""
    model = converted(architecture, per_head=per_head, whiten="none")
    memsave.save(model, tmp_path / "c")
    loaded: Any = memsave.load(tmp_path / "c") if alone else memsave.load(tmp_path / "c", architecture.make().eval())
    assert structure(loaded) == structure(model)
    with counted_groups() as groups:
        assert torch.equal(logits(loaded, architecture), logits(model, architecture))
    half = len(groups) // 2
    assert half and groups[:half] == groups[half:]
    with pytest.raises(SaveError, match="memsave.save"):
        loaded.save_pretrained(tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_a_model_of_ones_own_is_saved_and_loaded(tmp_path: Path) -> None:
    """Linears that hand on rows, and modules that work row by row."""

    def make() -> nn.Module:
        return nn.Sequential(Layer(), TwoModules()).eval()

    model = make()
    memsave.convert_model(model, config(per_head=True, exclude_modules=["q_proj"]))
    memsave.save(model, tmp_path / "c")
    loaded = memsave.load(tmp_path / "c", make())
    assert structure(loaded) == structure(model) and any(isinstance(m, RowWise) for m in loaded.modules())
    x = tokens(2, 9).float()
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    memsave.restore_model(loaded, allow_lossy=True)
    assert isinstance(loaded[0].fc1, nn.Linear)  # type: ignore[index]


@pytest.mark.parametrize("architecture", [MODELS[0], MODELS[1]], ids=lambda a: a.name)
def test_copies_and_pickles_stream(architecture: Architecture) -> None:
    """A process that reads a pickle knows the attention function that its modules ask for."""
    from transformers import AttentionInterface

    from memsave.nn.low_rank.group_run import ATTENTION

    model = converted(architecture, per_head=True)
    expected = logits(model, architecture)
    pickled = pickle.dumps(model)
    function = AttentionInterface._global_mapping.pop(ATTENTION)
    try:
        loaded = pickle.loads(pickled)
        assert ATTENTION in AttentionInterface._global_mapping
    finally:
        AttentionInterface._global_mapping[ATTENTION] = function
    for copied in (loaded, copy.deepcopy(model)):
        with counted_groups() as groups:
            assert torch.equal(logits(copied, architecture), expected)
        assert len(groups) == TINY.layers and structure(copied) == structure(model)
        for mine, theirs in zip(copied.parameters(), model.parameters(), strict=True):
            assert mine is not theirs


@pytest.mark.parametrize("architecture", MODELS[:3], ids=lambda a: a.name)
def test_the_estimate_touches_nothing(architecture: Architecture) -> None:
    """What forward and backward keep is predicted as it is, and a dry run changes nothing."""
    model: Any = architecture.make()
    batch = architecture.batch(TINY, None)
    before = snapshot(model)
    report = memsave.convert_model(model, config(), batch=batch, dry_run=True)
    assert snapshot(model) == before and report.action == "would be converted (dry run)"
    assert {row.backend for row in report.rows} >= {"torch", "by heads"}
    predicted = report.estimate
    again = memsave.convert_model(model, config(), batch=batch)
    assert again.estimate == predicted and again.rows == report.rows
    assert predicted is not None
    kept = memsave.saved_bytes(lambda: model(**batch).loss)
    assert (
        predicted.kept_bytes[1] == pytest.approx(kept, rel=0.02) and predicted.kept_bytes[0] != predicted.kept_bytes[1]
    )


@models
@per_head
def test_exact_methods_before_and_after(architecture: Architecture, per_head: bool) -> None:
    """In any order: the gradients and the outputs are those of the low-rank model."""
    plain = converted(architecture, per_head=per_head, fuse=False)
    after, before = converted(architecture, per_head=per_head), architecture.make()
    memsave.convert_model(after)
    memsave.convert_model(before)
    memsave.convert_model(before.eval(), config(per_head=per_head))
    for model in (after, before):
        names = {c.name for m in model.modules() for c in applied_configs(m).values()}
        assert "flash_svd" in names and len(names) > 1
    batch = architecture.batch(TINY, "left")
    with torch.no_grad():
        expected = train(plain, batch, backward=False)
        for model in (after, before):
            assert_same(train(model, batch, backward=False), expected)
    expected = train(plain.train(), batch)
    for model in (after, before):
        assert_same(train(model.train(), batch), expected)


def test_feed_forward_blocks_that_another_method_has_stay_its_own() -> None:
    model: Any = MODELS[0].make().eval()
    memsave.convert_model(model)
    report = memsave.convert_model(model, config())
    found = {name: skip.reason for skip in report.skipped for name in skip.names}
    assert found["model.layers.0.mlp"] == "not fused: it is converted by recompute_mlp"
    assert not isinstance(model.model.layers[0].mlp, RowWise)
    assert isinstance(model.model.layers[0].self_attn, HeadStreaming)


def test_a_second_call_with_the_same_batches_does_nothing() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, 96), nn.GELU(), nn.Linear(96, WIDTH))
    batches = [tokens(2, 5).float()]
    memsave.convert_model(model, config(whiten="activation"), calibration=batches)
    before = snapshot(model)
    report = memsave.convert_model(model, config(whiten="activation"), calibration=batches)
    assert not report.rows and snapshot(model) == before


def test_the_model_in_bf16_follows() -> None:
    model = nn.Sequential(Layer(), TwoModules()).eval()
    memsave.convert_model(model, config())
    x = tokens(2, 5)
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x)
        found = model.to(torch.bfloat16)(x.bfloat16())
    assert found.dtype == torch.bfloat16
    assert_near([found], [expected.bfloat16()], ulps=8)


def test_t5_reads_the_dtype_of_a_weight_that_is_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = next(each for each in MODELS if each.name == "T5")
    model: Any = architecture.make().eval()
    memsave.convert_model(model, config())
    assert isinstance(model.encoder.block[0].layer[1].DenseReluDense.wo, LowRankLinear)
    batch = architecture.batch(TINY, "left")
    with torch.no_grad():
        expected = model(**batch).logits
        monkeypatch.delattr(LowRankLinear, "dense_weight")
        assert torch.equal(model(**batch).logits, expected)
    model.train()(**batch).loss.backward()
