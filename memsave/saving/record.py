"""memsave.json: which methods were applied to which modules, and all else that the tensors do not say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import MethodConfig, applied_configs
from ..errors import LoadError, SaveError
from ..guard import is_pretrained

FORMAT = 1
FILE = "memsave.json"


@dataclass(frozen=True)
class Applied:
    """One method on one module: the module's name, the config, and what `module_state` said of the structure."""

    name: str
    config: MethodConfig
    state: Mapping[str, Any]


@dataclass(frozen=True)
class Record:
    """The contents of memsave.json.

    Attributes:
        methods: outer modules before inner ones, on one module the oldest method first.
        tied: names of tensors that were one with another, which was written.
        training: whether the model was in training mode.
        transformers: whether config.json describes the plain model.
    """

    methods: tuple[Applied, ...]
    tied: Mapping[str, str]
    training: bool
    transformers: bool


def record_of(model: nn.Module, tied: Mapping[str, str]) -> Record:
    """What is to be written of `model` besides its tensors."""
    methods = tuple(
        Applied(name, config, config.module_state(module))
        for name, module in model.named_modules()
        for config in applied_configs(module).values()
    )
    return Record(methods, tied, model.training, is_pretrained(model))


def write_record(record: Record, directory: Path) -> None:
    """Write memsave.json. Every config is written once, however many modules it converted."""
    configs: dict[MethodConfig, int] = {}
    modules: dict[str, list[dict[str, Any]]] = {}
    for applied in record.methods:
        number = configs.setdefault(applied.config, len(configs))
        modules.setdefault(applied.name, []).append({"config": number, "state": applied.state})
    data = {
        "format": FORMAT,
        "memsave": _version(),
        "torch": torch.__version__,
        "transformers": record.transformers,
        "training": record.training,
        "configs": [config.to_dict() for config in configs],
        "modules": modules,
        "tied": record.tied,
    }
    try:
        text = json.dumps(data, indent=1)
    except (TypeError, ValueError) as error:
        raise SaveError(f"save: a config or what module_state returned is not JSON data: {error}") from error
    (directory / FILE).write_text(text)


def read_record(directory: Path) -> Record:
    """Read memsave.json. Raises LoadError if it is missing, damaged, of another format, or names unknown methods."""
    path = directory / FILE
    if not path.is_file():
        what = "holds no memsave.json, so memsave.save did not write it" if directory.is_dir() else "is not a directory"
        raise LoadError(f"load: {directory} {what}. The model was not changed.")
    try:
        data = json.loads(path.read_text())
        written_format = data["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise LoadError(f"load: {path} is damaged: {error!r}. The model was not changed.") from error
    if written_format != FORMAT:
        raise LoadError(
            f"load: {path} has format {written_format!r}, written by memsave {data.get('memsave')}; this memsave "
            f"{_version()} reads format {FORMAT}. Install the memsave that wrote it. The model was not changed."
        )
    try:
        configs = [_config(item, data.get("memsave"), path) for item in data["configs"]]
        methods = tuple(
            Applied(name, configs[item["config"]], item["state"])
            for name, items in data["modules"].items()
            for item in items
        )
        tied = {name: str(written) for name, written in data["tied"].items()}
        return Record(methods, tied, bool(data["training"]), bool(data["transformers"]))
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise LoadError(f"load: {path} is damaged: {error!r}. The model was not changed.") from error


def _config(data: Mapping[str, Any], writer: str | None, path: Path) -> MethodConfig:
    from .. import methods  # a config is known by name once its class exists

    if not any(method.name == data.get("method") for method in methods.METHODS):
        with suppress(ImportError):  # an adapter's, which is known once PEFT is imported
            from .. import peft  # noqa: F401
    try:
        return MethodConfig.from_dict(data)
    except ValueError as error:
        raise LoadError(
            f"load: {path}: {error}. It was written by memsave {writer}, this is memsave {_version()}. "
            "The model was not changed."
        ) from error


def _version() -> str:
    from .. import __version__

    return __version__
