"""The modules of a model that an adapter's config means, by PEFT's own rule."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ...errors import UnsupportedModelError
from ...nn.linear import is_linear
from ...text import groups, pattern


def targets_of(config: PeftConfig, model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The targets by name, also those that carry adapters already; `config` and `model` stay as they are.

    What lies within a layer of a tuner, such as LoRA's own linears, is no target.
    """
    known = config
    if isinstance(config.target_modules, str):  # PEFT replaces "all-linear" by the names of the linears
        known = copy.copy(config)
        known = _maybe_include_all_linear_layers(known, model)
    found: list[tuple[str, nn.Module]] = []
    within: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or name.startswith(within or ("\0",)):
            continue
        if isinstance(module, BaseTunerLayer):
            within = (*within, f"{name}.")
        if _is_target(known, name):
            found.append((name, module))
    return found


def _is_target(config: Any, name: str) -> bool:
    # PEFT's answer for what is excluded is an object that is false.
    return bool(check_target_module_exists(config, name))


def is_adaptable(module: nn.Module) -> bool:
    """Whether `module` is of a kind that adapters go around: a linear, also a quantized one with its own forward."""
    weight = getattr(module, "weight", None)
    quantized = isinstance(weight, nn.Parameter) and not (weight.is_floating_point() or weight.is_complex())
    return is_linear(module) or (isinstance(module, nn.Linear) and quantized)


def refuse(problems: Sequence[tuple[str, str]], label: str) -> None:
    """Raise UnsupportedModelError for (name, reason) pairs that a tuner found before it touched the model."""
    if problems:
        raise UnsupportedModelError(f"{label} cannot adapt {in_words(problems)}. The model was not changed.")


def in_words(problems: Sequence[tuple[str, str]]) -> str:
    """(name, reason) pairs as text: names with the same reason as one pattern, as in a report."""
    grouped = groups((reason, name) for name, reason in problems)
    return "; ".join(f"{pattern(names)}: {reason}" for reason, names in grouped)


def withdraw(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter out of `model`; layers of memsave that have no other give way to the modules that they wrap."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            layer: Any = child
            if isinstance(child, AuxiliaryTrainingWrapper):  # around one of modules_to_save
                if others := sorted(child._adapters - {adapter_name}):
                    child.delete_adapter(adapter_name, others[:1])
                else:
                    setattr(parent, name, child.original_module)
                continue
            if not hasattr(layer, "unload_and_optionally_merge_module"):
                continue
            if adapter_name in layer._all_available_adapter_names():
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # PEFT says which adapter is active then
                    layer.delete_adapter(adapter_name)
            if not layer._all_available_adapter_names():
                setattr(parent, name, layer.unload_and_optionally_merge_module(False, False, None))
    for module in model.modules():
        if isinstance(configs := module.__dict__.get("peft_config"), dict):
            configs.pop(adapter_name, None)


def checked_targets(owner: str, name: str, value: Any) -> Any:
    """A filter of modules as PEFT takes it, lists as sets. Raises ValueError that names the field for anything else."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(entry, str) for entry in value):
        return set(value)
    raise ValueError(
        f"{owner}.{name}: expected names of modules, a regular expression or 'all-linear', or None, got {value!r}"
    )


def check_names(owner: str, name: str, value: Any) -> None:
    """Raises ValueError that names the field, unless it is None or a list of names: PEFT would take a string apart."""
    if value is None:
        return
    if isinstance(value, (list, tuple, set)) and all(isinstance(entry, str) and entry for entry in value):
        return
    raise ValueError(f"{owner}.{name}: expected a list of names of modules, or None, got {value!r}")
