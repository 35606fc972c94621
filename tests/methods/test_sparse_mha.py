"""SparseMHAConfig: its settings, what it converts, how it is undone, saved, copied and combined."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import memsave
from memsave import Guarantee, MemsaveError, SaveError, ShareMaskConfig, SparseMHAConfig
from memsave.config import applied_configs
from memsave.methods import sparse_mha
from memsave.nn.sparse_attention.crossover import Crossover
from memsave.nn.sparse_attention.module import SparseAttention
from memsave.nn.sparse_attention.multihead import SparseMultiheadAttention
from memsave.nn.sparse_attention.state import state_of

from ..snapshot import snapshot
from .sparse import batch, blocks, codebooks, config, llama, tokens

transformers = pytest.importorskip("transformers", reason="needs transformers (pip install 'memsave[hf]')")


def reasons(report: memsave.Report) -> dict[str, str]:
    return {name: skip.reason for skip in report.skipped for name in skip.names}


def converted(**settings: Any) -> tuple[Any, Any]:
    """A Llama with sparse attention, and the plain one."""
    plain = llama().eval()
    model = copy.deepcopy(plain)
    memsave.convert_model(model, config(**settings), calibration=[batch()])
    return model, plain


def test_settings_survive_json() -> None:
    made = config(keep=0.25, granularity="block", num_subspaces=4, codebook="ema", dense_below="measure")
    assert memsave.MethodConfig.from_json(made.to_json()) == made
    assert memsave.MethodConfig.from_json(config(keep=64).to_json()) == config(keep=64)
    assert made.guarantee is Guarantee.APPROXIMATE and made.changes_keys and not made.calibrated
    assert config().calibrated and pickle.loads(pickle.dumps(made)) == made


def test_what_is_converted_is_in_the_report() -> None:
    model = llama()
    report = memsave.convert_model(model, config(), calibration=[batch()])
    assert [(row.names, row.guarantee) for row in report.rows] == [
        (("model.layers.0.self_attn", "model.layers.1.self_attn"), "approximate")
    ]
    assert report.rows[0].backend in ("native", "torch") and "sparse_mha" in str(report)
    attention = model.model.layers[0].self_attn
    assert isinstance(attention, SparseAttention) and attention.codebook.shape == (2, 1, 16, 8)
    assert "keep=8" in repr(attention) and type(attention).__name__ == "MemsaveLlamaAttention"


def test_one_layer_of_a_model() -> None:
    """The others go on as they were, with the masks that they had."""
    plain = llama().eval()
    model = copy.deepcopy(plain)
    memsave.convert_model(model, config(target_modules=["layers.1.self_attn"]), calibration=[batch()])
    assert list(codebooks(model)) == ["model.layers.1.self_attn.codebook"]
    for padding in (None, "left", "right"):
        with torch.no_grad():
            found, expected = (m(**batch(padding), output_hidden_states=True).hidden_states for m in (model, plain))
        torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-5)
        assert (found[2] - expected[2]).abs().max() > 1e-2
    memsave.restore_model(model, allow_lossy=True)
    with torch.no_grad():
        assert torch.equal(model(**batch("left")).logits, plain(**batch("left")).logits)


@pytest.mark.parametrize("kind", ["llama", "torch"])
def test_restoring_gives_back_everything(kind: str) -> None:
    model: Any = llama() if kind == "llama" else blocks()
    given: Any = batch("left") if kind == "llama" else tokens()

    def output(each: Any) -> Any:
        with torch.no_grad():
            return each(**given).logits if kind == "llama" else each(given)

    model.register_forward_hook(lambda *_: None)
    for module in list(model.modules())[3:5]:
        module.register_forward_pre_hook(lambda *_: None)
    settings = [(m.config, copy.deepcopy(vars(m.config))) for m in model.modules() if hasattr(m, "config")]
    before, expected = snapshot(model), output(model)
    memsave.convert_model(model, config(), calibration=[given])
    assert not torch.equal(output(model), expected)
    with pytest.raises(memsave.RestoreError, match="allow_lossy=True"):
        memsave.restore_model(model)
    memsave.restore_model(model, allow_lossy=True)
    assert snapshot(model) == before and torch.equal(output(model), expected)
    now = [m.config for m in model.modules() if hasattr(m, "config")]
    assert all(a is b and vars(a) == c for a, (b, c) in zip(now, settings, strict=True))


def test_again_with_the_same_settings_nothing_happens_and_with_others_it_is_an_error() -> None:
    model, _ = converted()
    before = snapshot(model)
    for dry_run in (True, False):
        report = memsave.convert_model(model, config(), dry_run=dry_run)
        assert report.count == 0 and [row.method for row in report.already] == ["sparse_mha"]
    with pytest.raises(MemsaveError, match="restore that one first"):
        memsave.convert_model(model, config(keep=9), calibration=[batch()])
    assert snapshot(model) == before


def test_a_dry_run_changes_nothing() -> None:
    model = llama()
    before = snapshot(model)
    report = memsave.convert_model(model, config(), calibration=[batch()], dry_run=True)
    assert report.count == 2 and snapshot(model) == before
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("granularity", ["token", "block"])
def test_the_estimate_is_what_is_measured(granularity: str) -> None:
    model, _ = converted(granularity=granularity, keep=48)
    model.train()
    given = batch("left")

    def step() -> None:
        model(**given).loss.backward()
        model.zero_grad()

    step()
    estimated, measured = memsave.estimate(model, given).peak_bytes, memsave.measure(step).peak_bytes
    assert abs(estimated - measured) <= 0.02 * measured


def test_a_batch_in_the_call_says_what_is_saved() -> None:
    model = llama()
    report = memsave.convert_model(model, config(granularity="block"), calibration=[batch()], batch=batch())
    assert "sparse_mha" in str(report) and codebooks(model)


@pytest.mark.parametrize("kind", ["llama", "torch"])
def test_a_copy_and_a_pickle_compute_the_same_and_are_restored_alone(kind: str) -> None:
    model: Any = llama().eval() if kind == "llama" else blocks()
    given: Any = batch()["input_ids"] if kind == "llama" else tokens()
    memsave.convert_model(model, config(), calibration=[given])

    def output(each: Any) -> Any:
        with torch.no_grad():
            return each(given).logits if kind == "llama" else each(given)

    expected = output(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(other), expected)
        memsave.restore_model(other, allow_lossy=True)
        assert not torch.equal(output(other), expected) and torch.equal(output(model), expected)
        assert not codebooks(other) and codebooks(model)


def test_a_pickle_runs_in_a_new_process(tmp_path: Path) -> None:
    """transformers' registries know the functions there as soon as it is read."""
    model, _ = converted()
    torch.save(model, tmp_path / "model.pt")
    with torch.no_grad():
        torch.save(model(**batch("left")).logits, tmp_path / "logits.pt")
    torch.save(batch("left"), tmp_path / "batch.pt")
    code = (
        "import sys, torch\n"
        "model, logits, batch = (torch.load(f'{sys.argv[1]}/{n}.pt', weights_only=False) "
        "for n in ('model', 'logits', 'batch'))\n"
        "print(torch.equal(model(**batch).logits, logits), model.config._attn_implementation)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == [
        "True", "memsave_sparse"
    ]  # fmt: skip


@pytest.mark.parametrize("codebook", ["fit", "ema"])
def test_saving_and_loading(codebook: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codebooks, and from which length on attention is sparse; that is not measured again."""
    found = Crossover(40, {512: (2.0, 1.0)}, 2, 8)
    monkeypatch.setattr(sparse_mha, "crossover", lambda *args, **kwargs: found)
    model = llama()
    given = {"calibration": [batch()]} if codebook == "fit" else {}
    memsave.convert_model(model, config(codebook=codebook, dense_below="measure"), **given)
    if codebook == "ema":
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        model(**batch()).loss.backward()
        optimizer.step()
    monkeypatch.undo()
    model.eval()
    with torch.no_grad():
        expected = model(**batch("left")).logits
    memsave.save(model, tmp_path / "c")
    for loaded in (memsave.load(tmp_path / "c"), memsave.load(tmp_path / "c", llama())):
        loaded.eval()
        assert state_of(loaded.model.layers[0].self_attn).dense_below == 40  # type: ignore[union-attr]
        with torch.no_grad():
            assert torch.equal(loaded(**batch("left")).logits, expected)
        assert applied_configs(loaded.model.layers[1].self_attn) == applied_configs(model.model.layers[1].self_attn)
        assert {n: b.shape for n, b in loaded.named_buffers()} == {n: b.shape for n, b in model.named_buffers()}
        memsave.restore_model(loaded, allow_lossy=True)
        assert loaded.state_dict().keys() == llama().state_dict().keys()


def test_saving_before_the_first_step(tmp_path: Path) -> None:
    model = blocks()
    memsave.convert_model(model, config(codebook="ema"))
    memsave.save(model, tmp_path / "c")
    loaded = blocks()
    memsave.load(tmp_path / "c", loaded)
    assert all(c.shape == (0, 1, 16, 1) for c in codebooks(loaded).values())
    optimizer = torch.optim.SGD(loaded.parameters(), 1e-3)
    loaded(tokens()).sum().backward()
    optimizer.step()
    assert all(c.shape == (4, 1, 16, 4) for c in codebooks(loaded).values())


def test_transformers_own_files_are_refused_and_the_config_does_not_tell(tmp_path: Path) -> None:
    model, plain = converted()
    with pytest.raises(SaveError):
        model.save_pretrained(tmp_path / "c")
    assert model.config.to_dict() == plain.config.to_dict()
    assert model.model.layers[0].self_attn.config.to_dict() == plain.config.to_dict()
    memsave.restore_model(model, allow_lossy=True)
    model.save_pretrained(tmp_path / "d")
    assert "memsave" not in (tmp_path / "d" / "config.json").read_text()


@pytest.mark.parametrize("order", ["sparse first", "defaults first"])
@pytest.mark.parametrize("back", ["sparse first", "defaults first"])
def test_together_with_the_exact_methods(order: str, back: str) -> None:
    """Outputs are those of sparse attention alone, in fewer bytes; both are undone in either order."""
    alone, plain = converted()
    model = copy.deepcopy(plain)
    exact = lambda: memsave.convert_model(model)  # noqa: E731
    sparse = lambda: memsave.convert_model(model, config(), calibration=[batch()])  # noqa: E731
    for convert in (sparse, exact) if order == "sparse first" else (exact, sparse):
        convert()
    assert any("share_mask" in applied_configs(m) for m in model.modules())
    for padding in (None, "left"):
        with torch.no_grad():
            found, expected = model(**batch(padding)).logits, alone(**batch(padding)).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    bytes_of = {
        n: memsave.saved_bytes(lambda m=m: m.train()(**batch("left")).loss) for n, m in (("a", alone), ("m", model))
    }
    assert bytes_of["m"] < bytes_of["a"]
    model.eval()
    implementation = model.config._attn_implementation
    assert implementation == "memsave_sparse_shared"
    methods = ["sparse_mha", "share_mask"]
    for method in methods if back == "sparse first" else methods[::-1]:
        memsave.restore_model(model, methods=[method], allow_lossy=True)
    assert model.config._attn_implementation == "sdpa"
    memsave.restore_model(model)
    with torch.no_grad():
        assert torch.equal(model(**batch("left")).logits, plain(**batch("left")).logits)


def test_dense_layers_share_their_masks_with_share_mask() -> None:
    """Where calls are too short to be sparse, padding costs no more than without sparse attention."""
    plain = llama()
    model = copy.deepcopy(plain)
    memsave.convert_model(plain, ShareMaskConfig())
    memsave.convert_model(model, [ShareMaskConfig(), config(dense_below=1000)], calibration=[batch()])
    kept = [memsave.saved_bytes(lambda m=m: m(**batch("left")).loss) for m in (plain, model)]
    assert kept[1] <= kept[0]


def test_the_crossover_is_measured_for_the_heads_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def measured(*args: Any) -> Crossover:
        calls.append(args)
        return Crossover(2048, {1024: (1.0, 2.0), 2048: (3.0, 1.0)}, 2, 8)

    monkeypatch.setattr(sparse_mha, "crossover", measured)
    model = llama()
    report = memsave.convert_model(model, config(dense_below="measure"), calibration=[batch()])
    choice, heads, size, dtype, device = calls[0]
    assert len(calls) == 1 and (heads, size, dtype, device.type) == (2, 8, torch.float32, "cpu")
    assert (choice.keep, choice.granularity, choice.block_size) == (8, "token", 16)
    assert "sparse attention from 2,048 keys on" in str(report) and "2,048: 3.00x" in str(report)
    assert state_of(model.model.layers[0].self_attn).dense_below == 2048  # type: ignore[union-attr]
    assert applied_configs(model.model.layers[0].self_attn)["sparse_mha"].dense_below == "measure"  # type: ignore[attr-defined]


def test_an_error_midway_undoes_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    swap, done = sparse_mha.swap, []

    def failing(module: nn.Module, mixin: type, made: Any) -> nn.Module:
        done.append(module)
        if len(done) == 2:
            raise OSError("no")
        return swap(module, mixin, made)

    for model, given in ((llama(), batch()), (blocks(), tokens())):
        before = snapshot(model)
        done.clear()
        with monkeypatch.context() as patch:
            patch.setattr(sparse_mha, "swap", failing)
            with pytest.raises(OSError, match="no"):
                memsave.convert_model(model, config(), calibration=[given])
        assert snapshot(model) == before
        if hasattr(model, "config"):
            assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {"sdpa"}


@pytest.mark.parametrize("kind", ["llama", "torch"])
def test_a_compiled_model_gives_the_same(kind: str) -> None:
    torch._dynamo.reset()
    model: Any = llama().eval() if kind == "llama" else blocks()
    given: Any = batch()["input_ids"] if kind == "llama" else tokens()
    memsave.convert_model(model, config(), calibration=[given])
    outputs = [each(given) for each in (model, torch.compile(model, backend="eager"))]
    found = [y.logits if kind == "llama" else y for y in outputs]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(y.square().sum(), next(model.parameters())) for y in found]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_the_modules_of_torch_are_converted_and_their_names_stay() -> None:
    model = blocks()
    keys = list(model.state_dict())
    memsave.convert_model(model, config(), calibration=[tokens()])
    assert all(isinstance(b.attention, SparseMultiheadAttention) for b in model)
    assert [k for k in model.state_dict() if not k.endswith("codebook")] == keys
    assert isinstance(model[0].attention, nn.MultiheadAttention)
    assert SparseMHAConfig.name in {name for m in model.modules() for name in applied_configs(m)}
