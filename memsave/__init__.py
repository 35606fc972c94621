"""memsave: drop-in PyTorch modules that train and run models in less memory.

    report = memsave.convert_model(model)      # in place; print(report)
    memsave.restore_model(model)               # and back

Importing memsave changes nothing outside of it; what needs more than torch is imported at first use.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import Guarantee, MethodConfig
    from .convert import convert_model, restore_model
    from .errors import (
        ConflictError,
        ConversionError,
        EstimateError,
        LoadError,
        MemsaveError,
        NoMatchError,
        NotAModelError,
        RestoreError,
        SaveError,
        UnsupportedModelError,
    )
    from .explaining import Explanation, explain
    from .integrations.low_rank_cache import low_rank_cache
    from .integrations.trainer import MemsaveCallback
    from .memory import MemoryProfile, OOMReport, estimate, measure, oom_report, saved_bytes
    from .methods import (
        FlashSVDConfig,
        LinearCrossEntropyConfig,
        PatchConvConfig,
        RecomputeActivationConfig,
        RecomputeDropoutConfig,
        RecomputeMLPConfig,
        RecomputeNormConfig,
        RoutedFFNConfig,
        ShareMaskConfig,
        SparseMHAConfig,
        WTACRSConfig,
    )
    from .methods.patch_conv import patch_plans
    from .nn.grad_norms import sample_cache_bytes, sample_ids
    from .nn.linear_cross_entropy import linear_cross_entropy
    from .ops import backends
    from .peft import LaMDAConfig, SHiRAConfig, export, fuse_adapters, load_adapter, save_adapter
    from .report import Report
    from .saving import load, save

try:
    __version__ = version("memsave")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

_PLACES = {
    "config": ("Guarantee", "MethodConfig"),
    "convert": ("convert_model", "restore_model"),
    "errors": (
        "ConflictError",
        "ConversionError",
        "EstimateError",
        "LoadError",
        "MemsaveError",
        "NoMatchError",
        "NotAModelError",
        "RestoreError",
        "SaveError",
        "UnsupportedModelError",
    ),
    "explaining": ("Explanation", "explain"),
    "memory": ("MemoryProfile", "OOMReport", "estimate", "measure", "oom_report", "saved_bytes"),
    "methods": (
        "FlashSVDConfig",
        "LinearCrossEntropyConfig",
        "PatchConvConfig",
        "RecomputeActivationConfig",
        "RecomputeDropoutConfig",
        "RecomputeMLPConfig",
        "RecomputeNormConfig",
        "RoutedFFNConfig",
        "ShareMaskConfig",
        "SparseMHAConfig",
        "WTACRSConfig",
    ),
    "methods.patch_conv": ("patch_plans",),
    "nn.grad_norms": ("sample_cache_bytes", "sample_ids"),
    "nn.linear_cross_entropy": ("linear_cross_entropy",),
    "ops": ("backends",),
    "integrations.low_rank_cache": ("low_rank_cache",),
    "integrations.trainer": ("MemsaveCallback",),
    "peft": ("LaMDAConfig", "SHiRAConfig", "export", "fuse_adapters", "load_adapter", "save_adapter"),
    "report": ("Report",),
    "saving": ("load", "save"),
}
_MODULES = {name: module for module, names in _PLACES.items() for name in names}

__all__ = [
    "ConflictError",
    "ConversionError",
    "EstimateError",
    "Explanation",
    "FlashSVDConfig",
    "Guarantee",
    "LaMDAConfig",
    "LinearCrossEntropyConfig",
    "LoadError",
    "MemoryProfile",
    "MemsaveCallback",
    "MemsaveError",
    "MethodConfig",
    "NoMatchError",
    "NotAModelError",
    "OOMReport",
    "PatchConvConfig",
    "Report",
    "RecomputeActivationConfig",
    "RecomputeDropoutConfig",
    "RecomputeMLPConfig",
    "RecomputeNormConfig",
    "RestoreError",
    "RoutedFFNConfig",
    "SHiRAConfig",
    "SaveError",
    "ShareMaskConfig",
    "SparseMHAConfig",
    "UnsupportedModelError",
    "WTACRSConfig",
    "backends",
    "convert_model",
    "estimate",
    "explain",
    "export",
    "fuse_adapters",
    "linear_cross_entropy",
    "load",
    "load_adapter",
    "low_rank_cache",
    "measure",
    "oom_report",
    "patch_plans",
    "restore_model",
    "sample_cache_bytes",
    "sample_ids",
    "save",
    "save_adapter",
    "saved_bytes",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        try:
            return getattr(import_module(f".{_MODULES[name]}", __name__), name)
        except ModuleNotFoundError as error:
            if _MODULES[name] not in ("peft", "integrations.low_rank_cache", "integrations.trainer"):
                raise
            raise ImportError(f"memsave.{name} needs {error.name}: pip install 'memsave[hf]'") from error
    if name in ("ops", "nn", "methods", "memory", "peft"):
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module 'memsave' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
