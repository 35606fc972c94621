"""Which model types the installed transformers has, and which of its classes stand for each."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any

import transformers
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

# Of the tasks of a type, the first whose class can be fed is swept: those with a head and a loss first.
_TASKS = (
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "MASKED_LM",
    "CAUSAL_LM",
    "CTC",
    "OBJECT_DETECTION",
    "UNIVERSAL_SEGMENTATION",
    "SEMANTIC_SEGMENTATION",
    "IMAGE_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
    "DEPTH_ESTIMATION",
    "TIME_SERIES_PREDICTION",
    "SEQUENCE_CLASSIFICATION",
)


def model_types() -> list[str]:
    """Every model type that transformers' automatic classes know, in alphabetical order."""
    return sorted(CONFIG_MAPPING_NAMES, key=str.lower)


def config_class(model_type: str) -> Any:
    """The config class of a model type."""
    return CONFIG_MAPPING[model_type]


def model_classes(model_type: str) -> list[Any]:
    """The model classes of a type, those to try first in front.

    Raises:
        ImportError: all of them need a package that is not installed.
    """
    names = dict.fromkeys(_listed_names(model_type))
    found = [cls for name in names if (cls := getattr(transformers, name, None)) is not None]
    found += [cls for cls in _declared(model_type) if cls not in found]
    usable = [cls for cls in found if not hasattr(cls, "_backends")]
    if found and not usable:
        raise ImportError(f"needs the package {', '.join(found[0]._backends)}")
    return usable


def _listed_names(model_type: str) -> list[str]:
    tables = {
        name: getattr(modeling_auto, name)
        for name in dir(modeling_auto)
        if name.startswith("MODEL_") and name.endswith("MAPPING_NAMES")
    }
    order = [f"MODEL_FOR_{task}_MAPPING_NAMES" for task in _TASKS]
    order += [name for name in tables if name not in order]
    names: list[str] = []
    for name in order:
        listed = tables.get(name, {}).get(model_type, ())
        names += [listed] if isinstance(listed, str) else listed
    return names


def _declared(model_type: str) -> list[Any]:
    """Classes that transformers' automatic ones do not list: those whose config is of this type's class."""
    config = config_class(model_type)
    package = config.__module__.rpartition(".")[0]
    classes = [cls for module in _modeling_modules(package) for cls in vars(module).values()]
    models: list[Any] = [cls for cls in classes if isinstance(cls, type) and issubclass(cls, PreTrainedModel)]
    return [cls for cls in models if cls.config_class is config and not cls.__name__.endswith("PreTrainedModel")]


@cache
def _modeling_modules(package: str) -> list[Any]:
    folder = importlib.import_module(package).__path__
    names = [info.name for info in pkgutil.iter_modules(folder) if info.name.startswith("modeling_")]
    modules = []
    for name in names:
        try:
            modules.append(importlib.import_module(f"{package}.{name}"))
        except ImportError:  # of an optional package
            continue
    return modules
