"""memsave's adapters as PEFT tuners; importing this package makes them known to PEFT."""

from .files import export, load_adapter, save_adapter
from .lamda import (
    LaMDACallback,
    LaMDAConfig,
    LaMDAFreezer,
    LaMDALinear,
    energy_ranks,
    lamda_param_groups,
    rank_pattern_for,
)
from .shira import SHiRAConfig, SHiRALinear
from .shira.fusing import adapter_overlap, fuse_adapters

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
