"""LaMDA as a method of `convert_model`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..method import ADAPTER, AdapterMethod
from .config import LaMDAConfig
from .decomposition import postponed
from .fingerprint import DTYPES, HEAD, make_record, why_not_same
from .layer import LaMDALinear
from .storage import PREFIX, layers_with
from .targets import problems


@dataclass(frozen=True, kw_only=True)
class LaMDAMethod(AdapterMethod):
    """What `convert_model(model, LaMDAConfig(...))` applies; made by that call."""

    name: ClassVar[str] = "lamda"
    docs: ClassVar[str] = "docs/lamda.md"
    config_class: ClassVar[type[LaMDAConfig]] = LaMDAConfig
    layer_class: ClassVar[type[nn.Module]] = LaMDALinear

    def problems(self, model: nn.Module) -> list[tuple[str, str]]:
        return problems(self.peft_config, model)

    def module_state(self, module: nn.Module) -> dict[str, Any]:
        return {"rank_pattern": dict(module.peft_config["default"].rank_pattern or {})}  # type: ignore[index, union-attr]

    def rebuild(self, module: nn.Module, state: Mapping[str, Any]) -> nn.Module:
        config = copy.copy(self.peft_config)
        config.rank_pattern = dict(state["rank_pattern"])
        with postponed():  # the weights are loaded afterwards, and with them A and B are made
            return type(self)(settings=self.settings, peft_config=config).convert(module)

    def why_not_load(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> str | None:
        for name in layers_with(module, ADAPTER):
            record, weight = (tensors[f"{name}.{key}"] for key in (f"{PREFIX}record.{ADAPTER}", "base_layer.weight"))
            if weight.dtype not in DTYPES:
                return f"{name}: its base weight is {weight.dtype}"
            own = make_record(weight, weight.new_zeros(1, max(0, len(record) - HEAD)))
            if reason := why_not_same(record, own, weight, compare_sketch=False):
                return f"{name}: {reason}"
        return None
