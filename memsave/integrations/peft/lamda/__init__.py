"""LaMDA adapters (arXiv 2406.12832) for PEFT; importing this makes "MEMSAVE_LAMDA" known to it."""

from ..registration import register
from .config import LaMDAConfig
from .freezing import LaMDACallback, LaMDAFreezer, lamda_param_groups
from .layer import LaMDALinear
from .model import LaMDAModel
from .ranks import energy_ranks, rank_pattern_for

__all__ = [
    "LaMDACallback",
    "LaMDAConfig",
    "LaMDAFreezer",
    "LaMDALinear",
    "LaMDAModel",
    "energy_ranks",
    "lamda_param_groups",
    "rank_pattern_for",
]

register("memsave_lamda", LaMDAConfig, LaMDAModel)
