"""The methods: one file each, named after its paper. A new method adds its config to METHODS."""

from .flash_svd import FlashSVDConfig
from .linear_cross_entropy import LinearCrossEntropyConfig
from .patch_conv import PatchConvConfig
from .recompute_activation import RecomputeActivationConfig
from .recompute_dropout import RecomputeDropoutConfig
from .recompute_mlp import RecomputeMLPConfig
from .recompute_norm import RecomputeNormConfig
from .routed_ffn import RoutedFFNConfig
from .share_mask import ShareMaskConfig
from .sparse_mha import SparseMHAConfig
from .wta_crs import WTACRSConfig

METHODS = (
    RecomputeNormConfig,
    RecomputeActivationConfig,
    RecomputeDropoutConfig,
    RecomputeMLPConfig,
    ShareMaskConfig,
    LinearCrossEntropyConfig,
    PatchConvConfig,
    WTACRSConfig,
    SparseMHAConfig,
    RoutedFFNConfig,
    FlashSVDConfig,
)

__all__ = [
    "METHODS",
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
]
