"""PEFT adapters as methods of `convert_model`: put into the model in place, merged or dropped by `restore_model`."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import PeftConfig, PeftModel, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from typing_extensions import Self

from ...config import Guarantee, MethodConfig, TargetedConfig, applied_configs, matches
from ...targets import missed_exclusions, missed_target, names_by_module
from .targets import in_words, is_adaptable, targets_of

ADAPTER = "default"


@dataclass(frozen=True, kw_only=True)
class AdapterMethod(MethodConfig):
    """A PEFT config of memsave as a method of model scope.

    Args:
        settings: the config as JSON.
    """

    guarantee: ClassVar[Guarantee] = Guarantee.ADAPTER
    config_class: ClassVar[type[PeftConfig]]
    layer_class: ClassVar[type[nn.Module]]

    settings: str
    peft_config: Any = field(default=None, compare=False, repr=False)

    read: ClassVar[bool] = False
    """Whether it was made from `settings` alone, as those of a saved model are: what JSON lacks is in the weights."""

    def __post_init__(self) -> None:
        if self.peft_config is None:
            self.__dict__["read"] = True
            object.__setattr__(self, "peft_config", self._read())
        elif not isinstance(self.peft_config, self.config_class):
            raise ValueError(f"{self.name}.peft_config: expected a {self.label}, got {self.peft_config!r}")

    def _read(self) -> PeftConfig:
        try:
            return self.config_class(**json.loads(self.settings))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{self.name}.settings: expected those of a {self.label} as JSON: {error}") from error

    @classmethod
    def of(cls, config: PeftConfig) -> Self:
        """The method that puts adapters of `config` into a model."""
        return cls(settings=json.dumps(_plain(config), sort_keys=True), peft_config=copy.copy(config))

    @property
    def label(self) -> str:
        return self.config_class.__name__

    def to_dict(self) -> dict[str, Any]:
        return {"method": self.name, "settings": self.settings}

    def __str__(self) -> str:
        shown = {k: v for k, v in json.loads(self.settings).items() if v not in (None, False, {}) and k in self._shown}
        return f"{self.label}({', '.join(f'{k}={v!r}' for k, v in shown.items())})"

    @property
    def _shown(self) -> set[str]:
        return set(self.config_class.__dataclass_fields__) - set(PeftConfig.__dataclass_fields__)

    def why_not(self, module: nn.Module) -> str | None:
        if self.name in applied_configs(module):
            return None  # by the same adapter, or by one that conflicts
        if reason := _why_not_adapted(module):
            return reason
        problems = self.problems(module)
        return in_words(problems) if problems else None

    def problems(self, model: nn.Module) -> list[tuple[str, str]]:
        """(name, reason) of each target that cannot be adapted."""
        raise TypeError(f"{type(self).__name__} does not define problems(model)")

    def missed(self, module: nn.Module) -> list[str]:
        config = self.peft_config
        if self.name in applied_configs(module) or _why_not_adapted(module):
            return []
        if config.target_modules in (None, "all-linear"):
            return (
                [] if config.target_modules else [f"{self.label}.target_modules: expected names of linears, got None"]
            )
        filters = _Filter.of(self)
        modules = names_by_module(module)
        hits = Counter(
            entry for m in modules if is_adaptable(m.module) for n in m.names for entry in filters.entries(n)
        )
        wanted = [filters.target_modules] if isinstance(filters.target_modules, str) else filters.target_modules or ()
        missed = [missed_target(filters, entry, None, modules) for entry in wanted if not hits[entry]]
        return missed + missed_exclusions(filters, modules)

    def within(self, module: nn.Module) -> Sequence[tuple[str, nn.Module]]:
        converted = [(name, m) for name, m in module.named_modules() if isinstance(m, self.layer_class)]
        return converted or targets_of(self.peft_config, module)

    def convert(self, module: nn.Module) -> nn.Module:
        trained = [name for name, p in module.named_parameters() if p.requires_grad]
        loaded = module.__dict__.get("_hf_peft_config_loaded")
        self._inject(module)
        if hasattr(module, "_hf_peft_config_loaded"):
            # What transformers' add_adapter does, which refuses some versions of PEFT that serve as well.
            module.__dict__["_hf_peft_config_loaded"] = True
        module.__dict__["_memsave_before_adapters"] = (trained, loaded)
        return module

    def _inject(self, model: nn.Module) -> None:
        flags = [(p, p.requires_grad) for p in model.parameters()]
        had = "peft_config" in model.__dict__
        try:
            inject_adapter_in_model(self.peft_config, model, ADAPTER)
        except BaseException:
            self._take_off(model, merge=False)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            if not had:
                model.__dict__.pop("peft_config", None)
            raise

    def why_not_restore(self, module: nn.Module) -> str | None:
        if ADAPTER not in getattr(module, "peft_config", {}):
            return f"its adapter {ADAPTER!r} was deleted since; unload the model by PEFT's own means"
        return None

    def restore(self, module: nn.Module, *, adapters: str | None = None) -> nn.Module:
        self._take_off(module, merge=adapters == "merge")
        module.__dict__.pop("peft_config", None)
        trained, loaded = module.__dict__.pop("_memsave_before_adapters", ([], None))
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in trained)
        if hasattr(module, "_hf_peft_config_loaded"):
            module.__dict__.pop("_hf_peft_config_loaded")
            if loaded is not None:
                module._hf_peft_config_loaded = loaded
        return module

    def _take_off(self, model: nn.Module, *, merge: bool) -> None:
        for parent in list(model.modules()):
            for name, layer in list(parent._modules.items()):
                if isinstance(layer, self.layer_class):
                    base = layer.unload_and_optionally_merge_module(  # type: ignore[operator]
                        merge=merge, safe_merge=False, adapter_names=None
                    )
                    setattr(parent, name, base)


@dataclass(frozen=True, kw_only=True)
class _Filter(TargetedConfig):
    """The targets of an adapter, for the messages about those that match nothing; it speaks in the adapter's name."""

    guarantee: ClassVar[Guarantee] = Guarantee.ADAPTER

    @classmethod
    def of(cls, method: AdapterMethod) -> Self:
        config = method.peft_config
        made = cls(target_modules=_names(config.target_modules), exclude_modules=_names(config.exclude_modules))
        made.__dict__.update(name=method.name, _label=method.label)
        return made

    @property
    def label(self) -> str:
        return str(self.__dict__["_label"])

    def candidate(self, module: nn.Module) -> bool:
        return is_adaptable(module)

    def entries(self, name: str) -> list[str]:
        """The entries of the targets that match `name`, if it is not excluded."""
        if self.exclude_modules is not None and matches(self.exclude_modules, name):
            return []
        return matches(self.target_modules or (), name)


def _why_not_adapted(model: nn.Module) -> str | None:
    """Say in words why no adapters can be put into `model`, or return None."""
    if isinstance(model, PeftModel):
        return "it is a PeftModel; use its add_adapter, or convert the model inside (get_base_model())"
    if any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        return "it has adapters already; merge or unload them first"
    return None


def _plain(config: PeftConfig) -> dict[str, Any]:
    """The fields of `config` that differ from their defaults, as JSON data."""
    known = type(config).__dataclass_fields__
    data = {k: getattr(config, k) for k in config.to_dict()}
    data = {k: sorted(v) if isinstance(v, set) else v for k, v in data.items()}
    fixed = {"peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"}
    return {k: v for k, v in data.items() if k not in fixed and v != known[k].default}


def _names(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, list, tuple)) else value
