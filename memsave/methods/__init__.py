"""The methods: one file each, named after its paper. A new method adds its config to METHODS."""

from .recompute_dropout import RecomputeDropoutConfig
from .recompute_norm import RecomputeNormConfig
from .wta_crs import WTACRSConfig

METHODS = (RecomputeDropoutConfig, RecomputeNormConfig, WTACRSConfig)

__all__ = ["METHODS", "RecomputeDropoutConfig", "RecomputeNormConfig", "WTACRSConfig"]
