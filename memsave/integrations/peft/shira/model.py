"""The SHiRA tuner: checks all targets before it touches one, chooses the masks, wraps the linears."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from ....errors import LoadError, UnsupportedModelError
from ....nn.converted import why_not_in_place
from ....nn.sparse_mask import gradient_masks, largest, struct_indices
from ..targets import is_adaptable, refuse, targets_of
from .config import CALIBRATED, SHiRAConfig
from .held_weight import is_fake, is_plain
from .layer import SHiRALinear, weight_shape
from .stored_mask import RANDOM, StoredMask, seed_of_layer, why_not_masked

_UNCHANGED = "The model was not changed."


class SHiRAModel(BaseTuner):
    """Puts SHiRA adapters into a model; made by `peft.get_peft_model(model, memsave.SHiRAConfig(...))`."""

    prefix = "memsave_shira_"
    tuner_layer_cls = SHiRALinear
    target_module_mapping: dict[str, list[str]] = {}

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        if peft_config.target_modules is None:
            raise ValueError(
                "SHiRAConfig.target_modules: expected names of linears, a regular expression or 'all-linear', got "
                f"None. {_UNCHANGED}"
            )
        return peft_config

    def _prepare_model(self, peft_config: SHiRAConfig, model: nn.Module) -> None:
        """Check every target and choose the masks that need batches, before anything is replaced."""
        refuse(problems(peft_config, model), "SHiRA")
        self._chosen: dict[str, Tensor] = {}
        if peft_config.mask in CALIBRATED and peft_config.masks == "select":
            targets = targets_of(peft_config, model)
            if not any(is_fake(weight_of(module)) for _, module in targets):
                self._chosen = self._calibrated(peft_config, model, targets)

    def _calibrated(self, config: SHiRAConfig, model: nn.Module, targets: list[tuple[str, Any]]) -> dict[str, Tensor]:
        linears = {name: m.get_base_layer() if isinstance(m, SHiRALinear) else m for name, m in targets}
        weights = {name: linear.weight for name, linear in linears.items()}
        counts = {name: config.num_values(name, weight_shape(linear)) for name, linear in linears.items()}
        batches = () if config.calibration is None else config.calibration
        return gradient_masks(model, weights, counts, batches, loss=config.calibration_loss, score=config.mask)

    def _create_and_replace(
        self,
        peft_config: SHiRAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if reason := why_not(peft_config, current_key, target, self.model):
            raise UnsupportedModelError(f"SHiRA: {current_key}: {reason}.")
        layer = target if isinstance(target, SHiRALinear) else SHiRALinear(target)
        shape = weight_shape(layer.get_base_layer())
        mask = StoredMask(peft_config.mask, peft_config.num_values(current_key, shape), shape[0] * shape[1])
        layer.update_layer(
            adapter_name, peft_config, mask, self._code(peft_config, layer, mask, current_key), inference_mode=False
        )
        if layer is not target:
            layer.train(target.training)
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)  # a further adapter is not trained before it is made active
            setattr(parent, target_name, layer)  # PEFT's own way moves the values, which are in their place, again

    def _code(self, config: SHiRAConfig, layer: SHiRALinear, mask: StoredMask, name: str) -> Tensor:
        """The code of the mask of one layer."""
        if is_fake(weight_of(layer)):  # of `memsave.estimate`: the sizes are all that counts
            return mask.unknown()
        if mask.kind == RANDOM:
            return mask.of_seed(seed_of_layer(config.seed, name))
        if config.masks == "stored":
            return mask.unknown()
        if mask.kind == "struct":
            return mask.of_indices(struct_indices(layer.weight_shape, mask.count))
        if mask.kind == "magnitude":
            return mask.of_indices(largest(layer.held.original_weight().abs(), mask.count))
        return mask.of_indices(self._chosen[name])

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Nothing: values have the dtype that the config says. PEFT would make them float32."""

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        if hasattr(state_dict, "resolve"):
            state_dict = state_dict.resolve(model)  # a format whose masks can be written once the layers are known
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_loadable(model, adapter_name, found)
        return found


def weight_of(module: Any) -> Tensor:
    return module.get_base_layer().weight if isinstance(module, SHiRALinear) else module.weight


def problems(config: SHiRAConfig, model: nn.Module) -> list[tuple[str, str]]:
    """(name, reason) of each target that cannot be adapted; changes nothing."""
    found = [
        (name, reason) for name, linear in targets_of(config, model) if (reason := why_not(config, name, linear, model))
    ]
    if config.mask in CALIBRATED and config.masks == "select" and config.calibration is None:
        reason = f"a {config.mask} mask is chosen by gradients: expected batches in SHiRAConfig.calibration, got None"
        found.append(("", reason))
    return found


def why_not(config: SHiRAConfig, name: str, module: Any, model: nn.Module) -> str | None:
    """Say in words why `module`, which `model` has under `name`, cannot be adapted, or return None."""
    if isinstance(module, BaseTunerLayer) and not isinstance(module, SHiRALinear):
        return f"it carries an adapter of another kind ({type(module).__name__})"
    linear: Any = module.get_base_layer() if isinstance(module, SHiRALinear) else module
    if not is_adaptable(linear):
        return f"expected an nn.Linear or Conv1D, got {type(linear).__name__}"
    if not isinstance(module, SHiRALinear) and (reason := why_not_in_place(linear)):
        return reason
    shape = weight_shape(linear)
    if reason := why_not_masked(shape[0] * shape[1], config.num_values(name, shape)):
        return reason
    if reason := _why_not_weight(config, linear.weight):
        return reason
    if others := [name for name in _names_of(linear.weight, model) if name not in _names_within(linear, model)]:
        return f"its weight is tied to {others[0]}, which would change, too; untie them or leave it out"
    return None


def _why_not_weight(config: SHiRAConfig, weight: Tensor) -> str | None:
    if weight.is_complex():
        return "its weight is complex"
    if type(weight) is nn.Parameter and weight.is_floating_point() and not weight.is_contiguous():
        return "its weight is not contiguous in memory"
    if config.masks == "select" and config.mask in ("magnitude", *CALIBRATED):
        if weight.is_meta:
            return f"a {config.mask} mask needs the weight's values, which are on the meta device"
        if not is_plain(weight):
            return f"a {config.mask} mask needs the weight's values, which are sharded or quantized here"
    return None


def check_loadable(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]) -> None:
    """Raise LoadError unless `state_dict` has fitting values and a valid mask for every layer of the adapter, and for
    no other."""
    if problems := loading_problems(model, adapter_name, state_dict):
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise LoadError(
            f"SHiRA: the file does not fit adapter {adapter_name!r}: {'; '.join(problems[:3])}{more}. "
            "Nothing was loaded."
        )


def loading_problems(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]) -> list[str]:
    """What `check_loadable` finds, in words."""
    problems = []
    known: set[str] = set()
    for name, layer in model.named_modules(remove_duplicate=False):
        if not isinstance(layer, SHiRALinear) or adapter_name not in layer.memsave_shira_values:
            continue
        mask = layer.stored_masks[adapter_name]
        inner = name.removeprefix("base_model.model.")
        keys = [
            [f"{p}{inner}.memsave_shira_{part}.{adapter_name}" for p in ("", "base_model.model.")]
            for part in ("values", "mask")
        ]
        known.update(*keys)
        values, code = (next((state_dict[key] for key in names if key in state_dict), None) for names in keys)
        if values is None or code is None:
            problems.append(f"{name}: its values or its mask are missing")
        elif tuple(values.shape) != (mask.count,) or not values.is_floating_point():
            problems.append(f"{name}: expected {mask.count} values, got {values.dtype} of shape {tuple(values.shape)}")
        else:
            try:
                mask.indices(code)
            except ValueError as error:
                problems.append(f"{name}: {error}")
    strange = sorted(key for key in state_dict if ".memsave_shira_" in key and key not in known)
    return problems + [f"{key}: the model has no such layer" for key in strange]


def _names_of(weight: Tensor, model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters(remove_duplicate=False) if p is weight]


def _names_within(linear: nn.Module, model: nn.Module) -> set[str]:
    """The names that the weight of `linear` has by its own module, which may have several parents."""
    return {f"{name}.weight" for name, module in model.named_modules(remove_duplicate=False) if module is linear}
