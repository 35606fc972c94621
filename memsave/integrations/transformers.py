"""A transformers model without its weights: written as its config files, and made again from them."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from torch import nn

from ..errors import LoadError


def write_config(model: transformers.PreTrainedModel, directory: Path) -> None:
    """Write config.json, which names the model's class, and generation_config.json if the model generates."""
    config = type(model.config).from_dict(model.config.to_dict())
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    config.dtype = model.dtype
    config.save_pretrained(directory)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(directory)


def model_of(directory: Path) -> nn.Module:
    """The model that config.json describes, with random weights; no code but that of transformers is run.

    Raises:
        LoadError: a config file is missing, damaged or does not fit, or names no model class of transformers.
    """
    advice = f"Make the model yourself and call memsave.load({str(directory)!r}, model)."
    if not (directory / "config.json").is_file():
        raise LoadError(f"load: {directory} has no config.json. {advice}")
    try:
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # its validators raise classes of their own
        raise LoadError(f"load: transformers cannot read {directory / 'config.json'}: {error} {advice}") from error
    name = str(next(iter(config.architectures or []), ""))
    cls = getattr(transformers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise LoadError(
            f"load: {directory / 'config.json'} names the class {name!r}, which transformers "
            f"{transformers.__version__} does not have. {advice}"
        )
    try:
        with torch.random.fork_rng(devices=[]):
            model = cls(config)
        if (directory / "generation_config.json").is_file():
            model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
    except Exception as error:
        raise LoadError(f"load: transformers cannot make a {name} from {directory}: {error} {advice}") from error
    return model
