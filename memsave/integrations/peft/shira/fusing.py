"""Several SHiRA adapters as one, and how much they get in each other's way (arXiv 2406.13175, sections 3.2 and 3.3)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from ....errors import MemsaveError
from ....nn.sparse_mask import awom, awor, fuse
from .layer import SHiRALinear
from .stored_mask import StoredMask


def fuse_adapters(model: nn.Module, weights: Mapping[str, float], name: str = "fused") -> None:
    """Add the adapter `name`, the weighted sum of others: its mask is the union of theirs. It is not made active.

    The result is the same, bit for bit, in every order of `weights`. Switching to it is what switching to any adapter
    is: `set_adapter(name)` overwrites its entries.

    Args:
        model: with SHiRA adapters: a `PeftModel`, or a model that `convert_model` converted.
        weights: for each adapter, what it is multiplied by.
        name: of the new adapter.

    Raises:
        ValueError: no weights, an unknown adapter, or a name that is taken. The model is unchanged.
    """
    configs = getattr(model, "peft_config", {})
    _check_names(model, weights, name)
    layers = dict(_layers(model))
    base = getattr(getattr(model, "base_model", None), "model", model)  # a PeftModel calls its model base_model.model
    prefix = next((f"{n}." for n, m in model.named_modules() if m is base and n), "")
    fused: dict[str, tuple[Tensor, Tensor]] = {}
    for path, layer in layers.items():
        parts = [(*_delta(layer, a), w) for a, w in weights.items() if a in layer.memsave_shira_values]
        if parts:
            fused[path] = fuse(parts)
    config = copy.copy(configs[next(iter(weights))])
    config.mask, config.masks, config.density, config.r = "given", "stored", None, None
    config.counts = {path.removeprefix(prefix): len(values) for path, (_, values) in fused.items()}
    config.target_modules = set(config.counts)
    for path, (indices, values) in fused.items():
        _add(layers[path], name, config, indices, values)
    configs[name] = config


def _add(layer: SHiRALinear, name: str, config: object, indices: Tensor, values: Tensor) -> None:
    rows, columns = layer.weight_shape
    mask = StoredMask("given", len(values), rows * columns)
    layer.update_layer(name, config, mask, mask.of_indices(indices), inference_mode=False)  # type: ignore[arg-type]
    parameter = layer.memsave_shira_values[name]
    parameter.data.copy_(values)
    parameter.requires_grad_(False)
    layer.held.sync(force=True)


def adapter_overlap(model: nn.Module, first: str, second: str) -> dict[str, tuple[float, float]]:
    """How much two SHiRA adapters of a model interfere: for each layer that has both, (AWOM, AWOR).

    AWOM is the spectral norm of A1^T A2, AWOR the share of its entries that are zero, for the two differences A1, A2
    that the adapters make: 0 and 1 for adapters that cannot interfere.

    Raises:
        ValueError: an unknown adapter.
    """
    _check_names(model, (first, second), None)
    found = {}
    for path, layer in _layers(model):
        if first in layer.memsave_shira_values and second in layer.memsave_shira_values:
            pair = _delta(layer, first), _delta(layer, second)
            found[path] = float(awom(*pair, layer.weight_shape)), float(awor(*pair, layer.weight_shape))
    return found


def _layers(model: nn.Module) -> Iterator[tuple[str, SHiRALinear]]:
    return ((path, m) for path, m in model.named_modules() if isinstance(m, SHiRALinear))


def _delta(layer: SHiRALinear, name: str) -> tuple[Tensor, Tensor]:
    """(indices, values) of what adapter `name` adds to the weight."""
    layer.held.check_mask(name)
    values = layer.memsave_shira_values[name].detach()
    scaling = layer.scaling[name]
    return layer.memsave_shira_indices[name], values if scaling == 1.0 else values * scaling


def _check_names(model: nn.Module, wanted: Mapping[str, float] | tuple[str, ...], new: str | None) -> None:
    known = {name for _, layer in _layers(model) for name in layer.memsave_shira_values}
    unknown = [name for name in wanted if name not in known]
    if not known:
        raise MemsaveError("the model has no SHiRA adapters. Nothing was changed.")
    if unknown or not wanted:
        raise ValueError(f"expected names of adapters among {sorted(known)}, got {unknown or []}. Nothing was changed.")
    if new in known:
        raise ValueError(f"the name {new!r} is taken by an adapter; expected a new one. Nothing was changed.")
