"""Adapters from and to files: checked before the model is touched; PEFT's own SHIRA format; merged stock checkpoints.

O, D: features of a layer; K masked entries of one.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import LoadError, SaveError
from ...saving.weights import tensors_of
from ..transformers import write_config
from .shira import SHiRAConfig, SHiRALinear
from .shira.stored_mask import StoredMask
from .targets import withdraw

_UNCHANGED = "The model was not changed."
_PEFT_SHIRA = "SHIRA"
FORMATS = ("plain", "peft_shira")


def save_adapter(
    model: nn.Module, directory: str | os.PathLike[str], *, adapter_name: str = "default", overwrite: bool = False
) -> None:
    """Write one adapter as PEFT does: adapter_config.json and adapter_model.safetensors.

    For a `PeftModel` that is what its `save_pretrained` writes; this also serves a model that `convert_model` gave an
    adapter, where transformers' `save_pretrained` may refuse the installed version of PEFT.

    Args:
        model: with the adapter.
        directory: made if absent; must be empty unless `overwrite`.
        adapter_name: which one.

    Raises:
        SaveError: there is no such adapter, or the directory is not empty. Nothing was written.
    """
    target = Path(directory)
    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise SaveError(
            f"save_adapter: the model has no adapter {adapter_name!r}; it has {sorted(configs)}. Nothing was written."
        )
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not overwrite)):
        raise SaveError(f"save_adapter: {target} is not an empty directory. Nothing was written.")
    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name)
    if not isinstance(model, PeftModel):  # files name modules as a PeftModel does
        tensors = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    target.mkdir(parents=True, exist_ok=True)
    packed = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(packed, target / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    config = copy.copy(configs[adapter_name])
    config.inference_mode = True
    config.save_pretrained(str(target))


def load_adapter(
    model: nn.Module, directory: str | os.PathLike[str], *, adapter_name: str = "default", is_trainable: bool = False
) -> None:
    """Load an adapter into a model in place: one of memsave, or one of PEFT's own SHIRA, which becomes memsave's.

    Unlike PEFT's loaders it leaves the model as it was if the files are missing, damaged or do not fit. The adapter
    becomes active, except beside others in a `PeftModel`, as there.

    Args:
        model: the plain base model, one with adapters of the same kind, or a `PeftModel`.
        directory: what `save_pretrained` wrote: adapter_config.json and adapter_model.safetensors.
        adapter_name: a new name.
        is_trainable: whether its values require gradients.

    Raises:
        LoadError: a file is missing or damaged, of another method, or does not fit the model.
        ValueError: the name is taken.
    """
    source = Path(directory)
    if adapter_name in getattr(model, "peft_config", {}):
        raise ValueError(f"load_adapter: the name {adapter_name!r} is taken; expected a new one. {_UNCHANGED}")
    config, tensors = _read(source)
    config.inference_mode = not is_trainable
    flags = [(p, p.requires_grad) for p in model.parameters()]
    had = "peft_config" in model.__dict__
    try:
        if isinstance(model, PeftModel):
            model.add_adapter(adapter_name, config)
        else:
            inject_adapter_in_model(config, model, adapter_name)
        set_peft_model_state_dict(model, tensors, adapter_name=adapter_name)
    except Exception as error:
        withdraw(model, adapter_name)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        if not had:
            model.__dict__.pop("peft_config", None)
        if isinstance(error, LoadError):
            if _UNCHANGED in str(error):
                raise
            raise LoadError(f"load_adapter: {source}: {error} {_UNCHANGED}") from error
        raise LoadError(f"load_adapter: {source} does not fit the model: {error} {_UNCHANGED}") from error
    if isinstance(model, PreTrainedModel):
        model._hf_peft_config_loaded = True


def _read(source: Path) -> tuple[PeftConfig, dict[str, Tensor]]:
    """The config and the tensors of an adapter's directory, those of PEFT's SHIRA as memsave's."""
    try:
        settings = json.loads((source / CONFIG_NAME).read_text())
        kind = str(settings["peft_type"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise LoadError(f"load_adapter: {source / CONFIG_NAME} cannot be read: {error!r}. {_UNCHANGED}") from error
    if kind != _PEFT_SHIRA and not kind.startswith("MEMSAVE_"):
        raise LoadError(
            f"load_adapter: {source} holds an adapter of kind {kind!r}; expected one of memsave or PEFT's SHIRA. Use "
            f"PeftModel.from_pretrained for others. {_UNCHANGED}"
        )
    try:
        tensors = load_file(source / SAFETENSORS_WEIGHTS_NAME)
    except (SafetensorError, OSError) as error:
        path = source / SAFETENSORS_WEIGHTS_NAME
        raise LoadError(f"load_adapter: {path} cannot be read: {error}. {_UNCHANGED}") from error
    if kind == _PEFT_SHIRA:
        return _from_peft(settings, tensors, source)
    try:
        return PeftConfig.from_pretrained(str(source)), tensors
    except (ValueError, TypeError) as error:
        raise LoadError(f"load_adapter: {source / CONFIG_NAME} is damaged: {error}. {_UNCHANGED}") from error


def _from_peft(
    settings: dict[str, Any], tensors: dict[str, Tensor], source: Path
) -> tuple[PeftConfig, dict[str, Tensor]]:
    """PEFT's SHIRA: `shira_weight` (K,) and `shira_indices` (2, K) of each layer, in any order."""
    counts: dict[str, int] = {}
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for key in sorted(tensors):
        layer, _, part = key.rpartition(".")
        if part != "shira_weight":
            continue
        values, places = tensors[key], tensors.get(f"{layer}.shira_indices")
        whole = places is not None and places.dtype in (torch.int32, torch.int64)
        if places is None or not whole or values.ndim != 1 or tuple(places.shape) != (2, len(values)):
            raise LoadError(f"load_adapter: {source}: {layer}: its shira_indices are missing or damaged. {_UNCHANGED}")
        name = layer.removeprefix("base_model.model.")
        pairs[name], counts[name] = (places, values), places.unique(dim=1).shape[1]
    if not pairs:
        raise LoadError(f"load_adapter: {source} holds no values of SHIRA. {_UNCHANGED}")
    try:
        config = SHiRAConfig(
            mask="given",
            masks="stored",
            counts=counts,
            target_modules=sorted(counts),
            modules_to_save=settings.get("modules_to_save"),
            task_type=settings.get("task_type"),
        )
    except (ValueError, TypeError) as error:
        raise LoadError(f"load_adapter: {source / CONFIG_NAME} is damaged: {error}. {_UNCHANGED}") from error
    return config, _Later(pairs, {k: v for k, v in tensors.items() if ".shira_" not in k})


class _Later(dict[str, Tensor]):
    """The tensors of PEFT's SHIRA, which can be written as masks once the shapes of the layers are known."""

    def __init__(self, pairs: dict[str, tuple[Tensor, Tensor]], others: dict[str, Tensor]) -> None:
        super().__init__(others)
        self.pairs = pairs

    def copy(self) -> _Later:
        return _Later(self.pairs, dict(self))

    def resolve(self, model: nn.Module) -> dict[str, Tensor]:
        """The same as memsave stores it, for the layers of `model`."""
        found = dict(self)
        for path, layer in _shira_layers(model):
            name = path.removeprefix("base_model.model.")
            if name not in self.pairs:
                continue
            places, values = self.pairs[name]
            rows, columns = layer.weight_shape
            if bool((places < 0).any()) or bool((places.max(1).values >= torch.tensor([rows, columns])).any()):
                raise LoadError(
                    f"load_adapter: {name}: positions outside of its {rows} x {columns} weight. {_UNCHANGED}"
                )
            flat = places[0].long() * columns + places[1].long()
            union, where = flat.unique(return_inverse=True)
            mask = StoredMask("given", len(union), rows * columns)
            prefix = f"base_model.model.{name}.memsave_shira_"
            found[f"{prefix}mask"] = mask.of_indices(union)
            # What is there twice adds up, as it does in PEFT.
            found[f"{prefix}values"] = values.new_zeros(len(union)).index_add_(0, where, values)
        return found


def _shira_layers(model: nn.Module) -> Iterator[tuple[str, SHiRALinear]]:
    return ((path, m) for path, m in model.named_modules() if isinstance(m, SHiRALinear))


def export(
    model: nn.Module, format: str, directory: str | os.PathLike[str], *, adapter_name: str | None = None
) -> None:
    """Write what a program without memsave can read; the model stays as it is.

    Args:
        model: with adapters of memsave.
        format: "plain": the model with the active adapters merged, as model.safetensors and, for transformers models,
            config.json; "peft_shira": one SHiRA adapter as PEFT's own SHIRA.
        directory: empty or absent.
        adapter_name: for "peft_shira"; by default the active one.

    Raises:
        ValueError: an unknown format or adapter.
        SaveError: the directory is not empty, or the adapter has no such form. Nothing was written.
    """
    if format not in FORMATS:
        raise ValueError(f"export: format: expected one of {list(FORMATS)}, got {format!r}")
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise SaveError(f"export: {target} is not an empty directory. Nothing was written.")
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if format == "plain":
        _export_plain(base, target)
    else:
        _export_peft(model, base, target, adapter_name)


def _export_plain(model: nn.Module, target: Path) -> None:
    others = [
        path
        for path, m in model.named_modules()
        if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and not hasattr(m, "merged_weight")
    ]
    if others:
        raise SaveError(
            f"export: {others[0]} is a {type(model.get_submodule(others[0])).__name__}, which memsave cannot merge; "
            "use PEFT's merge_and_unload() and save what it returns. Nothing was written."
        )
    merged = dict(_merged_state(model))
    tensors, _ = tensors_of(merged)
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    if isinstance(model, PreTrainedModel):
        write_config(model, target)


def _merged_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The state dict that the model would have if its adapters were merged and taken off."""
    layers = {path: m for path, m in model.named_modules() if hasattr(m, "merged_weight")}
    for key, value in model.state_dict(keep_vars=True).items():
        layer = next((path for path in layers if key.startswith(f"{path}.")), None)
        if layer is None:
            yield key, value.detach()
        elif key == f"{layer}.base_layer.weight":
            yield f"{layer}.weight", layers[layer].merged_weight()
        elif key.startswith(f"{layer}.base_layer."):
            yield key.replace(f"{layer}.base_layer.", f"{layer}."), value.detach()


def _export_peft(model: nn.Module, base: nn.Module, target: Path, name: str | None) -> None:
    layers = list(_shira_layers(base))
    known = {n for _, layer in layers for n in layer.memsave_shira_values}
    name = name or next((n for _, layer in layers for n in layer.adapters_wanted()), None)
    if name not in known:
        raise ValueError(f"export: adapter_name: expected one of {sorted(known)}, got {name!r}")
    layers = [(path, layer) for path, layer in layers if name in layer.memsave_shira_values]
    if conv := [path for path, layer in layers if layer.transposed]:
        raise SaveError(f"export: PEFT's SHIRA has no Conv1D ({conv[0]}). Nothing was written.")
    r = max(-(-layer.stored_masks[name].count // sum(layer.weight_shape)) for _, layer in layers)
    tensors: dict[str, Tensor] = {}
    for path, layer in layers:
        rows, columns = layer.weight_shape
        wanted = r * (rows + columns)
        if wanted > rows * columns:
            raise SaveError(
                f"export: {path}: PEFT's SHIRA has r * (in + out) values in every layer, here r = {r}, which is more "
                "than its weight has entries. Nothing was written."
            )
        indices = layer.memsave_shira_indices[name].cpu()
        values = (layer.memsave_shira_values[name].detach() * layer.scaling[name]).cpu()
        # PEFT wants a number of values that r gives: what is missing is filled up by zeros, which add nothing.
        fill = wanted - len(indices)
        indices = torch.cat((indices, indices[:1].expand(fill)))
        key = f"base_model.model.{path}.shira_"
        tensors[f"{key}weight"] = torch.cat((values, values.new_zeros(fill)))
        tensors[f"{key}indices"] = torch.stack((indices // columns, indices % columns)).to(torch.int32)
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    from peft import ShiraConfig

    ours = getattr(model, "peft_config", {})[name]
    targets = [path for path, _ in layers]
    ShiraConfig(
        r=r, target_modules=targets, task_type=getattr(ours, "task_type", None), inference_mode=True
    ).save_pretrained(str(target))
