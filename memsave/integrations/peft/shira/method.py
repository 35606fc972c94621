"""SHiRA as a method of `convert_model`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from .... import ops
from ..method import ADAPTER, AdapterMethod
from .config import SHiRAConfig
from .layer import SHiRALinear
from .model import loading_problems, problems


@dataclass(frozen=True, kw_only=True)
class SHiRAMethod(AdapterMethod):
    """What `convert_model(model, SHiRAConfig(...))` applies; made by that call."""

    name: ClassVar[str] = "shira"
    docs: ClassVar[str] = "docs/shira.md"
    config_class: ClassVar[type[SHiRAConfig]] = SHiRAConfig
    layer_class: ClassVar[type[nn.Module]] = SHiRALinear

    def problems(self, model: nn.Module) -> list[tuple[str, str]]:
        return problems(self._with_stored_masks() if self.read else self.peft_config, model)

    def rebuild(self, module: nn.Module, state: Mapping[str, Any]) -> nn.Module:
        return type(self)(settings=self.settings, peft_config=self._with_stored_masks()).convert(module)

    def why_not_load(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> str | None:
        return "; ".join(loading_problems(module, ADAPTER, tensors)) or None

    def _with_stored_masks(self) -> SHiRAConfig:
        return SHiRAConfig(**{**json.loads(self.settings), "masks": "stored"})

    def backend(self, module: nn.Module) -> str:
        return ops.serving("sddmm", {p.device.type for p in module.parameters()})
