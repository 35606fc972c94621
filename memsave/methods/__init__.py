"""The methods: one file each, named after its paper. A new method adds its config to METHODS."""

from .recompute_activation import RecomputeActivationConfig
from .recompute_norm import RecomputeNormConfig
from .wta_crs import WTACRSConfig

METHODS = (RecomputeActivationConfig, RecomputeNormConfig, WTACRSConfig)

__all__ = ["METHODS", "RecomputeActivationConfig", "RecomputeNormConfig", "WTACRSConfig"]
