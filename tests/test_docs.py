"""The code in README.md and the pages of docs/ runs as it stands there, and prints what the README shows."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import memsave
from memsave.config import applied_configs
from memsave.ops import _native

DOCS = Path(__file__).parents[1] / "docs"
transformers = pytest.importorskip("transformers", reason="needs transformers (pip install 'memsave[hf]')")
import train_text  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402


def run_page(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **given: Any) -> dict[str, Any]:
    """Run all Python blocks of a page in one namespace, at first `given`, in an empty folder; what they leave."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), re.DOTALL)
    assert blocks
    monkeypatch.chdir(folder)
    namespace = given
    for block in blocks:
        exec(compile(block, name, "exec"), namespace)
    return namespace


def small_llama() -> dict[str, Any]:
    """What the pages take for granted: a model, a batch, an optimizer."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2
    )
    model, ids = LlamaForCausalLM(config), torch.arange(64).view(2, 32)
    batch = {"input_ids": ids, "labels": ids}
    return {"config": config, "model": model, "batch": batch, "optimizer": torch.optim.AdamW(model.parameters())}


def test_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    left = run_page("../README.md", tmp_path, monkeypatch, **small_llama())
    assert list(applied_configs(left["model"].model.layers[0].mlp.down_proj)) == ["recompute_norm"]
    assert (tmp_path / "step.png").stat().st_size > 0
    assert "at the peak, by module" in capsys.readouterr().out


def for_inference() -> dict[str, Any]:
    """What the code for FlashSVD takes for granted."""
    given = small_llama()
    model = given["model"].eval()
    ids = given["batch"]["input_ids"]
    return {"model": model, "batches": [{"input_ids": ids}], "inputs": {"input_ids": ids[:, :4]}, "memsave": memsave}


def test_the_readmes_code_for_inference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```py\n(.*?)```", (DOCS.parent / "README.md").read_text(), re.DOTALL)
    compress, in_bands = (next(b for b in blocks if word in b) for word in ("FlashSVDConfig", "PatchConvConfig"))
    monkeypatch.chdir(tmp_path)
    exec(compile(compress, "README.md", "exec"), for_inference())
    assert (tmp_path / "compressed" / "memsave.json").is_file()
    given = for_images()
    exec(compile(in_bands, "README.md", "exec"), given)
    assert "bands of" in str(given["report"]) and given["logits"].shape == (2, 10)


def for_images() -> dict[str, Any]:
    """What the code for convolutional networks takes for granted."""
    cnn = torch.nn.Sequential(
        *(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3, 2, 1), torch.nn.ReLU()),
        *(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 10)),
    ).eval()
    return {"cnn": cnn, "model": cnn, "images": torch.randn(2, 3, 224, 224), "memsave": memsave, "torch": torch}


def test_patch_conv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = run_page("patch_conv.md", tmp_path, monkeypatch, **for_images())
    assert (tmp_path / "layers.png").stat().st_size > 0
    assert given["plan"].calls == {"planned": 1} and "forward" not in given["model"].__dict__


def test_flash_svd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = for_inference()
    page = (DOCS / "flash_svd.md").read_text().replace('r"encoder.*"', 'r"model.layers.*"')
    compress, cached = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(compress.partition("memsave.restore_model")[0], "flash_svd.md", "exec"), given)
    exec(compile(cached, "flash_svd.md", "exec"), given)
    assert "by heads" in str(given["report"]) and given["cache"].nbytes > 0
    memsave.restore_model(given["model"], allow_lossy=True)


def test_sparse_mha(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = run_page("sparse_mha.md", tmp_path, monkeypatch, **for_inference())
    assert "model.layers.{0-3}.self_attn" in str(given["report"])
    assert (tmp_path / "sparse" / "memsave.json").is_file()
    assert applied_configs(given["model"].model.layers[0].self_attn) == {}


@pytest.mark.skipif(_native.library() is None, reason=f"the README shows C++ kernels: {_native.state()}")
def test_the_reports_in_the_readme_are_those_of_the_demos_model() -> None:
    """The groups as they stand there; the bytes within 2%, since torch's versions differ."""
    page = (DOCS.parent / "README.md").read_text()
    ids = torch.zeros(4, 256, dtype=torch.int64)
    model = train_text.build_model("small", length=256, seed=0)
    report = str(memsave.convert_model(model, batch={"input_ids": ids, "labels": ids}, dry_run=True))
    groups, estimate = report.split("estimated for")
    assert groups.replace("would be converted (dry run)", "converted") in page
    shown = page[page.index("estimated for") :].partition("```")[0]
    found, expected = (re.findall(r"[\d.]+", text) for text in (estimate, shown))
    assert len(expected) == 6
    assert [float(value) for value in found] == pytest.approx([float(value) for value in expected], rel=0.02)


def test_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    left = run_page("measuring.md", tmp_path, monkeypatch, memsave=memsave, **small_llama())
    assert left["kept_bytes"] == left["profile"].saved_bytes == left["explanation"].profile.saved_bytes
    assert (tmp_path / "step.png").stat().st_size > 0 and left["report"].error is None
    assert "by cause" in capsys.readouterr().out


def test_every_public_name_is_documented() -> None:
    """In docs/api.md, with what each parameter is."""
    pytest.importorskip("peft", reason="needs peft (pip install 'memsave[hf]')")
    from benchmarks.api_page import GROUPS

    named = [name for names in GROUPS.values() for name in names]
    assert sorted(named) == sorted(memsave.__all__)
    page = (DOCS / "api.md").read_text()
    for name in memsave.__all__:
        thing = getattr(memsave, name)
        assert f"### `memsave.{name}`" in page
        if inspect.isfunction(thing):
            undocumented = [p for p in inspect.signature(thing).parameters if not re.search(rf"\b{p}\b", thing.__doc__)]
            assert not undocumented, f"{name}: {undocumented}"


def test_estimate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = small_llama()
    left = run_page(
        "estimate.md", tmp_path, monkeypatch, memsave=memsave, torch=torch, transformers=transformers, **given
    )
    assert left["model"].device.type == "meta"
    assert left["report"].estimate.kept_bytes[1] < left["report"].estimate.kept_bytes[0]


def test_remembered_gradient_norms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = small_llama()
    loader = [([0, 1], given["batch"]), ([2, 3], given["batch"])]
    left = run_page("wta_crs.md", tmp_path, monkeypatch, memsave=memsave, loader=loader, **given)
    assert memsave.sample_cache_bytes(left["model"]) == 4 * 2 * 32


def test_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft", reason="needs peft (pip install 'memsave[hf]')")
    left = run_page("adapters.md", tmp_path, monkeypatch, **small_llama())
    assert {folder.name for folder in tmp_path.iterdir()} == {"first", "second", "third"}
    assert left["lamda"].get_base_model().model.layers[0].mlp.up_proj.memsave_lamda_S["default"].count_nonzero()
    assert type(left["base"].model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = run_page("saving.md", tmp_path, monkeypatch)
    applied = list(applied_configs(left["model"].model.layers[0].mlp.up_proj))
    assert (applied[0], applied[-1]) == ("recompute_norm", "wta_crs")
    assert type(left["plain"][1]) is torch.nn.Linear
    files = {file.name for file in (tmp_path / "checkpoint").iterdir()}
    assert files == {"config.json", "generation_config.json", "memsave.json", "model.safetensors"}


def test_shira(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = small_llama()
    base = {name: weight.clone() for name, weight in given["model"].state_dict().items()}
    left = run_page("shira.md", tmp_path, monkeypatch, torch=torch, batches=[given["batch"]] * 3, **given)
    assert left["model"].active_adapters == ["both"] and len(left["overlaps"]) == 28
    plain = left["model"].unload()
    assert all(torch.equal(weight, base[name]) for name, weight in plain.state_dict().items())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs it (pip install 'memsave[hf]')")
    left = run_page("training.md", tmp_path, monkeypatch)
    assert (tmp_path / "out" / "checkpoint-2" / "memsave.json").is_file() and (tmp_path / "state").is_dir()
    texts = (DOCS / "training.md").read_text(), capsys.readouterr().out
    shown, printed = (re.findall(r"([\d.]+) KiB", text[text.index("memsave: memory") :])[:4] for text in texts)
    assert [float(size) for size in printed] == pytest.approx([float(size) for size in shown], rel=0.02)
    assert applied_configs(left["model"].model.norm)


def test_linear_cross_entropy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = run_page("linear_cross_entropy.md", tmp_path, monkeypatch)
    logits, labels = left["head"](left["body"](left["x"])).flatten(0, 1), left["labels"].flatten()
    loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    loss = loss + 1e-4 * logits[labels != -100].logsumexp(-1).square().mean()
    torch.testing.assert_close(left["loss"], loss)
    assert left["body"].weight.grad.count_nonzero()


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this PyTorch is built without gloo")
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_distributed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = run_page("distributed.md", tmp_path, monkeypatch)
    assert applied_configs(left["plain"].lm_head)
    for name, weight in left["plain"].state_dict().items():
        assert torch.equal(weight, left["weights"][name])
    with pytest.raises(memsave.UnsupportedModelError, match="FSDPModule: convert, restore or estimate .* fully_shard"):
        memsave.restore_model(left["model"])
