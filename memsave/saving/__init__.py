"""save and load: a converted model as a directory, also where its keys are no longer those of the plain model.

    model.safetensors       every tensor of the state dict, tied ones once
    memsave.json            format, versions, and per module: which methods, in which order, and their structure
    config.json             for transformers models, so that `load` can make the model itself

Only JSON and safetensors are read and written, so loading runs no code from the directory.
"""

from __future__ import annotations

import os
import reprlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..applying import Change, apply_changes
from ..config import TargetedConfig, applied_configs
from ..errors import LoadError, MemsaveError, SaveError
from ..wrappers import INSIDE
from . import record as records
from . import weights
from .record import Record

__all__ = ["load", "save"]

_UNCHANGED = "The model was not changed."
_NOTHING_WRITTEN = "Nothing was written."


def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    state_dict: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model, converted or not, to a directory that `memsave.load` reads.

    Args:
        model: not wrapped in DDP or compiled (pass the module inside).
        directory: made if absent; must be empty unless `overwrite`.
        state_dict: the gathered weights of a model under `fully_shard`; by default `model.state_dict()`.
        overwrite: replace an earlier checkpoint in the directory; other files there stay.

    Raises:
        SaveError: the directory is not empty, the model is wrapped, or a value cannot be written. Nothing was written.
        ImportError: safetensors is not installed.
    """
    safetensors, safetensors_error = _safetensors("save")
    target = Path(directory).resolve()
    _check_target(target, overwrite)
    if wrapper := _wrapper(model):
        raise SaveError(f"save: {wrapper}. {_NOTHING_WRITTEN}")
    tensors, tied = weights.tensors_of(model.state_dict() if state_dict is None else state_dict)
    record = records.record_of(model, tied)
    target.parent.mkdir(parents=True, exist_ok=True)
    # On the target's own file system, where moving cannot fail halfway: it may be the root of a mounted volume.
    beside = target if target.exists() else target.parent
    staged = beside / f".{target.name}.{os.getpid()}.partial"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    try:
        try:
            safetensors.save_file(tensors, staged / weights.FILE)
        except (safetensors_error, KeyError, ValueError, RuntimeError) as error:
            raise SaveError(f"save: safetensors cannot write the weights: {error!r}. {_NOTHING_WRITTEN}") from error
        if record.transformers:
            from ..integrations.transformers import write_config

            write_config(model, staged)
        records.write_record(record, staged)
        _publish(staged, target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def load(directory: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Read what `memsave.save` wrote: convert the model as it was converted, and load its weights, bit for bit.

    Args:
        directory: what was given to `save`.
        model: the plain model, or one that is converted in the same way already; changed in place. Its training flags
            and `requires_grad` stay. It may be on the meta device: then it gets the dtypes of the file, on the CPU.
            None makes a transformers model from the config.json of the directory, on the CPU, in the mode in which it
            was saved.

    Returns:
        The model.

    Raises:
        LoadError: a file is missing, damaged or of another format, a method is unknown here, or the model does not
            fit. The model was not changed.
        ImportError: safetensors is not installed, or for model=None, transformers.
    """
    safetensors, safetensors_error = _safetensors("load")
    source = Path(directory)
    record = records.read_record(source)
    try:
        tensors: dict[str, Tensor] = safetensors.load_file(source / weights.FILE)
    except (safetensors_error, OSError) as error:
        raise LoadError(f"load: {source / weights.FILE} cannot be read: {error}. {_UNCHANGED}") from error
    tensors |= {name: tensors[written] for name, written in record.tied.items() if written in tensors}
    target = _from_config(source, record) if model is None else model
    if wrapper := _wrapper(target, sharded=True):
        raise LoadError(f"load: {wrapper}. {_UNCHANGED}")
    replace = model is None or any(t.is_meta for t in target.state_dict().values() if isinstance(t, Tensor))
    _rebuild(target, record, tensors, replace)
    return target.train(record.training) if model is None else target


def _safetensors(function: str) -> tuple[Any, type[Exception]]:
    """The module that reads and writes, and its error."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(f"memsave.{function} needs safetensors: pip install 'memsave[hf]'") from error
    return safetensors.torch, safetensors.SafetensorError


def _check_target(target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise SaveError(f"save: {target} is a file; expected a directory. {_NOTHING_WRITTEN}")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise SaveError(
            f"save: {target} is not empty; say overwrite=True to replace the checkpoint in it. {_NOTHING_WRITTEN}"
        )


def _wrapper(model: nn.Module, *, sharded: bool = False) -> str | None:
    """Say what `model` or a part of it is wrapped in, if the names of its tensors are not its own then."""
    if not isinstance(model, nn.Module):
        return f"expected a torch.nn.Module, got {type(model).__name__}"
    for name, module in model.named_modules():
        where = f"its submodule {name!r}" if name else "the model"
        for cls in type(module).__mro__:
            if cls.__name__ in INSIDE:
                return f"{where} is wrapped in {cls.__name__}; use the module inside: {INSIDE[cls.__name__]}"
            if cls.__name__ == "FullyShardedDataParallel" or (sharded and cls.__name__ == "FSDPModule"):
                return f"{where} is wrapped in {cls.__name__}; save or load the model before wrapping it"
    return None


def _publish(staged: Path, target: Path) -> None:
    """Move the finished files in place; until the last one, memsave.json, is there, nothing can be loaded."""
    if not target.exists():
        staged.rename(target)
        return
    (target / records.FILE).unlink(missing_ok=True)
    for file in sorted(staged.iterdir(), key=lambda file: file.name == records.FILE):
        file.replace(target / file.name)


def _from_config(source: Path, record: Record) -> nn.Module:
    if not record.transformers:
        raise LoadError(
            f"load: {source} was not saved from a transformers model, so it does not say how to make one; make the "
            f"plain model and call memsave.load({str(source)!r}, model)"
        )
    try:
        from ..integrations.transformers import model_of
    except ImportError as error:
        raise ImportError("memsave.load without a model needs transformers: pip install 'memsave[hf]'") from error
    return model_of(source)


def _rebuild(model: nn.Module, record: Record, tensors: Mapping[str, Tensor], replace: bool) -> None:
    """Give `model` the structure that was saved, check that `tensors` fit, and load them; on any exception undo it."""
    saved = {name: {a.config.name: a for a in record.methods if a.name == name} for name in _names(record)}
    present = {name: c for name, m in model.named_modules() if (c := applied_configs(m))}
    if present and present != {name: {k: a.config for k, a in methods.items()} for name, methods in saved.items()}:
        raise LoadError(
            "load: the model is converted already, and not as the saved one was; pass the plain model "
            f"(see restore_model). {_UNCHANGED}"
        )

    def changes() -> Iterator[Change]:
        # One at a time: a module may exist only once the one around it is converted.
        for applied in () if present else record.methods:
            yield _change(model, applied)
        weights.check_fit(model, tensors, record.tied, any_dtype=replace)
        weights.fill(model, tensors, replace=replace)

    def convert(change: Change, module: nn.Module) -> nn.Module:
        return _rebuilt(change, module, saved[change.name][change.config.name].state)

    apply_changes(model, changes(), convert)


def _rebuilt(change: Change, module: nn.Module, state: Mapping[str, Any]) -> nn.Module:
    try:
        return change.config.rebuild(module, state)
    except MemsaveError:
        raise
    except Exception as error:  # what a damaged or forged state leads to
        where = change.name or "the model"
        raise LoadError(
            f"load: {change.config.name} cannot make {where} from what memsave.json says of it, {reprlib.repr(state)}: "
            f"{error!r}. {_UNCHANGED}"
        ) from error


def _names(record: Record) -> list[str]:
    return list(dict.fromkeys(applied.name for applied in record.methods))


def _change(model: nn.Module, applied: records.Applied) -> Change:
    """The conversion to make now, checked."""
    name, config = applied.name, applied.config
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise LoadError(f"load: the model lacks {name!r}, which {config.name} converted. {_UNCHANGED}") from None
    reason = config.why_not(module)
    if isinstance(config, TargetedConfig) and not config.fits(module):
        reason = f"it is of class {type(module).__name__}"
    if reason:
        raise LoadError(f"load: {config.name} cannot convert {name or 'the model'}: {reason}. {_UNCHANGED}")
    return Change(name, module, config)
