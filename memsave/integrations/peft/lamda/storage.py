"""What of an adapter is on disk, and what must hold before it is loaded.

Written: S, the record of the base weight, and those segments of B that were ever trainable, which are all of them
unless freeze_until is 0; with save_factors also A and all of B. Loading makes A and B again from the base weight, as
making a new adapter does, and then compares records. Nothing is loaded unless everything fits.
"""

from __future__ import annotations

import weakref
from functools import partial

from torch import Tensor, nn

from ....errors import LoadError
from ..targets import withdraw
from .config import LaMDAConfig
from .layer import LaMDALinear, on_record

PREFIX = "memsave_lamda_"
SHOWN = 5

# What required a gradient before the first adapter came, by name, to be put back if loading it fails.
_trainable: weakref.WeakKeyDictionary[nn.Module, dict[str, bool]] = weakref.WeakKeyDictionary()


def layers_with(model: nn.Module, adapter_name: str) -> dict[str, LaMDALinear]:
    """{name: layer} of the layers of `model` that have the adapter."""
    modules = model.named_modules()
    return {n: m for n, m in modules if isinstance(m, LaMDALinear) and adapter_name in m.memsave_lamda_S}


def checked(
    model: nn.Module, config: LaMDAConfig, adapter_name: str, state_dict: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The entries to load, given a file's under the model's names: the same, with the layers' own records.

    Raises LoadError, naming the layers, if an entry is missing, unknown or of another shape or kind, or if the base
    weight is not the one that the adapter was trained on; an adapter made in order to be loaded is taken out then.
    """
    entries, problems, expected = dict(state_dict), list[str](), set[str]()
    for name, layer in layers_with(model, adapter_name).items():
        own, record_key = _entries_of(name, layer, adapter_name, config)
        expected |= {*own, record_key}
        record = state_dict.get(record_key)
        reason = "its record is missing" if record is None else layer.why_not_record(adapter_name, record)
        problems += [f"{name}: {reason}"] if reason else []
        entries[record_key] = layer.memsave_lamda_record[adapter_name]
        for key, tensor in own.items():
            if key not in state_dict:
                problems.append(f"{key} is missing")
            elif state_dict[key].shape != tensor.shape or not state_dict[key].is_floating_point():
                given = f"{state_dict[key].dtype} {list(state_dict[key].shape)}"
                problems.append(f"{key}: expected floating point {list(tensor.shape)}, got {given}")
    unknown = [key for key in state_dict if f".{PREFIX}" in f".{key}" and key not in expected]
    problems += [f"{key} has no place in the model" for key in unknown]
    if problems:
        raise _failed(model, adapter_name, problems)
    _loaded(model, adapter_name)
    return entries


def _entries_of(name: str, layer: LaMDALinear, adapter_name: str, config: LaMDAConfig) -> tuple[dict[str, Tensor], str]:
    """{key: tensor} of what files have of an adapter in one layer, and the key of its record."""
    at = f"{name}.{PREFIX}" if name else PREFIX
    found: dict[str, Tensor] = {f"{at}S.{adapter_name}": layer.memsave_lamda_S[adapter_name]}
    if config.save_factors or config.freeze_until:
        found |= {f"{at}B.{adapter_name}.rows{i}": part for i, part in enumerate(layer.segments(adapter_name))}
    if config.save_factors:
        found[f"{at}A.{adapter_name}"] = layer.memsave_lamda_A[adapter_name]
    return found, f"{at}record.{adapter_name}"


def _failed(model: nn.Module, adapter_name: str, problems: list[str]) -> LoadError:
    layers = layers_with(model, adapter_name).values()
    made_for_loading = any(layer.loading.get(adapter_name) for layer in layers)
    if made_for_loading:
        remove_adapter(model, adapter_name)
    lines = "".join(f"\n  {problem}" for problem in problems[:SHOWN])
    more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    after = "the adapter was taken out of the model again" if made_for_loading else "the adapter is as it was"
    return LoadError(f"LaMDA adapter {adapter_name!r} was not loaded; {after}:{lines}{more}")


def _loaded(model: nn.Module, adapter_name: str) -> None:
    for layer in layers_with(model, adapter_name).values():
        layer.loading[adapter_name] = False


def remember(model: nn.Module) -> None:
    """Note what requires a gradient, if `model` has no LaMDA layer yet."""
    if not any(isinstance(module, LaMDALinear) for module in model.modules()):
        _trainable[model] = {name: p.requires_grad for name, p in model.named_parameters()}


def remove_adapter(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter out of `model` as if it had never been there; layers without adapters give way to their bases."""
    withdraw(model, adapter_name)
    if any(isinstance(module, LaMDALinear) for module in model.modules()):
        return
    for module in model.modules():
        _forget(module)


def _forget(module: nn.Module) -> None:
    """Undo what PEFT and transformers note on a model with adapters."""
    if module.__dict__.get("peft_config") == {}:
        del module.__dict__["peft_config"]
    if module.__dict__.get("_hf_peft_config_loaded") and not module.__dict__.get("peft_config"):
        module.__dict__["_hf_peft_config_loaded"] = False
    flags = _trainable.pop(module, None)
    for name, parameter in module.named_parameters() if flags else ():
        if flags and name in flags:
            parameter.requires_grad_(flags[name])


def watch_record(model: nn.Module, layer: LaMDALinear) -> None:
    """Compare records where transformers' `load_adapter` puts them, since it does not ask the tuner before."""
    on_record[layer.memsave_lamda_record] = partial(_compare, weakref.ref(model), weakref.ref(layer))


def _compare(model: weakref.ref[nn.Module], layer: weakref.ref[LaMDALinear], adapter_name: str, record: Tensor) -> None:
    whole, inner = model(), layer()
    if whole is None or inner is None:
        return
    if reason := inner.why_not_record(adapter_name, record):
        name = next((name for name, module in whole.named_modules() if module is inner), "a layer")
        raise _failed(whole, adapter_name, [f"{name}: {reason}"])
    inner.loading[adapter_name] = False
