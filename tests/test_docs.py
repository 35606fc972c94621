"""The code in the pages on saving, distributed training and the loss runs as it stands there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import memsave
from memsave.config import applied_configs

DOCS = Path(__file__).parents[1] / "docs"
pytest.importorskip("transformers", reason="needs transformers (pip install 'memsave[hf]')")


def run_page(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run all Python blocks of a page in one namespace, in an empty folder; what they leave."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), re.DOTALL)
    assert blocks
    monkeypatch.chdir(folder)
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, name, "exec"), namespace)
    return namespace


def test_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = run_page("saving.md", tmp_path, monkeypatch)
    assert list(applied_configs(left["model"].model.layers[0].mlp.up_proj)) == ["recompute_norm", "wta_crs"]
    assert type(left["plain"][1]) is torch.nn.Linear
    files = {file.name for file in (tmp_path / "checkpoint").iterdir()}
    assert files == {"config.json", "generation_config.json", "memsave.json", "model.safetensors"}


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
    with pytest.raises(
        memsave.UnsupportedModelError, match="wrapped in FSDPModule: convert, restore or estimate .* fully_shard"
    ):
        memsave.restore_model(left["model"])
