"""memsave's adapters for PEFT. Importing this makes them known to PEFT, so that it can load their checkpoints."""

from .integrations.peft import (
    LaMDACallback,
    LaMDAConfig,
    LaMDAFreezer,
    LaMDALinear,
    SHiRAConfig,
    SHiRALinear,
    adapter_overlap,
    energy_ranks,
    export,
    fuse_adapters,
    lamda_param_groups,
    load_adapter,
    rank_pattern_for,
    save_adapter,
)

__all__ = [
    "LaMDACallback",
    "LaMDAConfig",
    "LaMDAFreezer",
    "LaMDALinear",
    "SHiRAConfig",
    "SHiRALinear",
    "adapter_overlap",
    "energy_ranks",
    "export",
    "fuse_adapters",
    "lamda_param_groups",
    "load_adapter",
    "rank_pattern_for",
    "save_adapter",
]
