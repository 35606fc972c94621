"""LaMDA as a PEFT tuner: PEFT finds the modules, puts layers in their place, saves and loads them."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from ....errors import UnsupportedModelError
from . import storage
from .config import LaMDAConfig
from .layer import LaMDALinear
from .ranks import rank_pattern_for
from .targets import checked_targets, rank_of, why_not


class LaMDAModel(BaseTuner):
    """Puts a `LaMDALinear` in the place of every targeted linear of a model; made by `peft.get_peft_model`."""

    prefix: str = "memsave_lamda_"
    tuner_layer_cls = LaMDALinear
    target_module_mapping: dict[str, list[str]] = {}

    def _prepare_adapter_config(self, peft_config: LaMDAConfig, model_config: dict[str, Any]) -> LaMDAConfig:
        return peft_config  # `checked_targets` says what is missing

    def _prepare_model(self, peft_config: LaMDAConfig, model: nn.Module) -> None:
        """Raise for all targets together before anything is replaced; find the ranks of LaMDA++."""
        checked_targets(model, peft_config)
        if peft_config.ranks == "energy" and not peft_config.rank_pattern:
            peft_config.rank_pattern = rank_pattern_for(model, peft_config)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        storage.remember(model)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            storage.remove_adapter(model, adapter_name)
            raise

    def _create_and_replace(
        self,
        peft_config: LaMDAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        rank = rank_of(current_key, peft_config)
        linear = target.get_base_layer() if isinstance(target, LaMDALinear) else target
        if reason := why_not(linear, rank):  # for targets that come from a state dict; others were checked together
            raise UnsupportedModelError(f"LaMDA cannot adapt {current_key}: {reason}. The model was not changed.")
        layer = target if isinstance(target, LaMDALinear) else LaMDALinear(target)
        try:
            layer.update_layer(adapter_name, rank, peft_config, inference_mode=peft_config.inference_mode)
        except torch.linalg.LinAlgError as error:
            raise ValueError(f"LaMDA cannot decompose {current_key}: {error} The model was not changed.") from error
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)  # an additional adapter does not train until it is activated
            setattr(parent, target_name, layer)  # PEFT's own way moves the factors, which are in their place, again
        storage.watch_record(self.model, layer)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Nothing: the config says which dtype, and PEFT's float32 would make every layer keep a copy of its input."""

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: LaMDAConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        renamed = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        return storage.checked(model, config, adapter_name, renamed)
