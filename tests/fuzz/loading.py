"""Checkpoints and adapters of every kind, and what loading a damaged one may do: nothing, or a whole model."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import memsave
from tests.methods import ffn_models, sparse
from tests.mlp import make, wta
from tests.nn.routed_ffn.toys import tokens
from tests.snapshot import snapshot


class Kind(NamedTuple):
    """A plain model, what it is called with, and how it is converted before it is saved."""

    plain: Callable[[], nn.Module]
    batch: Callable[[], Any]
    convert: Callable[[nn.Module], Any]


def _exact(model: nn.Module) -> None:
    memsave.convert_model(model)
    memsave.convert_model(model, wta(["down_proj"], grad_norms="sample_cache", save_grad_norms=True))


def _low_rank(model: nn.Module) -> None:
    memsave.convert_model(model, memsave.FlashSVDConfig(rank=2, target_modules=["up_proj", "down_proj"]))


def _routed(model: nn.Module) -> None:
    config = ffn_models.config(clustering="coactivation", lora_rank=2)
    memsave.convert_model(model, config, calibration=ffn_models.batches())


def _sparse(model: nn.Module) -> None:
    memsave.convert_model(model, sparse.config(), calibration=[sparse.tokens()])


def _shira(model: nn.Module) -> None:
    memsave.convert_model(
        model, memsave.SHiRAConfig(mask="magnitude", density=0.3, target_modules=["up_proj", "down_proj"])
    )


def _lamda(model: nn.Module) -> None:
    memsave.convert_model(model, memsave.LaMDAConfig(r=2, target_modules=["up_proj", "down_proj"], save_factors=True))


def _rows() -> Tensor:
    return torch.linspace(-1, 1, 24).view(6, 4)


CHECKPOINTS = {
    "exact": Kind(make, _rows, _exact),
    "flash_svd": Kind(make, _rows, _low_rank),
    "routed_ffn": Kind(ffn_models.Model, lambda: tokens(5, 7).detach().float(), _routed),
    "sparse_mha": Kind(sparse.blocks, sparse.tokens, _sparse),
    "shira": Kind(make, _rows, _shira),
    "lamda": Kind(make, _rows, _lamda),
}
ADAPTERS = ("shira", "lamda", "peft_shira")


def _plain(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return CHECKPOINTS[kind].plain()


def _files(write: Callable[[Path], None]) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "saved")
        return {path.name: path.read_bytes() for path in (Path(folder) / "saved").iterdir()}


@cache
def checkpoint(kind: str) -> dict[str, bytes]:
    """The files of a checkpoint."""
    model = _plain(kind)
    CHECKPOINTS[kind].convert(model)
    return _files(lambda folder: memsave.save(model, folder))


@cache
def adapter(kind: str) -> dict[str, bytes]:
    """The files of an adapter."""
    model = _plain("shira")
    CHECKPOINTS[kind.removeprefix("peft_")].convert(model)
    if kind == "peft_shira":
        files = _files(lambda folder: memsave.export(model, "peft_shira", folder))
    else:
        files = _files(lambda folder: memsave.save_adapter(model, folder))
    return {name: data for name, data in files.items() if name.startswith("adapter_")}


def load_checkpoint(kind: str, files: dict[str, bytes], onto_meta: bool = False) -> None:
    """Either a memsave error and the model as it was, or a model that runs, trains, and can be restored."""
    model = _plain(kind)
    if onto_meta:
        model.to("meta")
    _attempt(model, files, lambda folder: memsave.load(folder, model))
    _run(model, CHECKPOINTS[kind].batch())


def load_adapter(files: dict[str, bytes]) -> None:
    """As `load_checkpoint`."""
    model = _plain("shira")
    _attempt(model, files, lambda folder: memsave.load_adapter(model, folder, is_trainable=True))
    _run(model, _rows())


def load_by_peft(files: dict[str, bytes]) -> None:
    """PEFT's own loader, which may raise anything and leave anything, but nothing that makes a kernel read astray."""
    from peft import PeftModel

    model = _plain("shira")
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder), files)
        try:
            model = PeftModel.from_pretrained(model, folder, is_trainable=True)
        except Exception as error:
            assert str(error) or isinstance(error, KeyError), repr(error)
            return
    _run(model, _rows())


def _write(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).write_bytes(data)


def _attempt(model: nn.Module, files: dict[str, bytes], load: Callable[[Path], Any]) -> None:
    before = _seen(model)
    folder = Path(tempfile.mkdtemp())
    try:
        _write(folder, files)
        load(folder)
    except memsave.MemsaveError as error:
        assert "not changed" in str(error) or "Nothing was loaded" in str(error), error
        assert _seen(model) == before, f"the model was changed, in spite of: {error}"
    finally:
        assert sorted(os.listdir(folder)) == sorted(files)
        shutil.rmtree(folder)


def _seen(model: nn.Module) -> Any:
    """All that must be as before, without the numbers by which torch counts writes: what was written was put back."""
    found = snapshot(model)
    for tensor in (*found["parameters"].values(), *found["buffers"].values()):
        del tensor["version"]
    return found


def _run(model: nn.Module, batch: Any) -> None:
    """A step of training, and a call of inference."""
    tensors = [*model.parameters(), *model.buffers()]
    dtypes = {t.dtype for t in tensors if t.is_floating_point()}
    if any(t.is_meta for t in tensors) or len(dtypes) > 1 or dtypes != {torch.float32}:
        return  # not loaded, or with the dtypes of the file, which may be any
    output = model.train()(batch)
    if output.requires_grad:
        output.sum().backward()
    with torch.no_grad():
        model.eval()(batch)
