"""What is measured, as data: methods, adapters, losses, ops, kept bytes, variances, inference and `estimate`.

The cases of the Triton kernels' tiles are in tiles.py, those that train for long in quality.py.
"""

from __future__ import annotations

from .adapters import ADAPTER_CASES, SWITCH_CASE
from .case import Case
from .compression import COMPRESSION_CASES
from .convolution import CONVOLUTION_CASES
from .estimates import ESTIMATE_CASES
from .kept import KEPT_CASES
from .losses import LOSS_CASES
from .methods import METHODS_CASES
from .ops import OP_CASES
from .routed_ffn import ROUTED_FFN_CASES
from .sparse_attention import ATTENTION_CASES
from .streaming import DECODING_CASES, STREAMING_CASES
from .training import TRAINING_CASES
from .variance import VARIANCE_CASES

# In the order in which they run: what matters most comes first, for a machine that is lent for minutes.
CASES: tuple[Case, ...] = (
    *OP_CASES,
    *TRAINING_CASES,
    *METHODS_CASES,
    *ADAPTER_CASES,
    SWITCH_CASE,
    *LOSS_CASES,
    *VARIANCE_CASES,
    *ESTIMATE_CASES,
    *KEPT_CASES,
    *STREAMING_CASES,
    *DECODING_CASES,
    *COMPRESSION_CASES,
    *CONVOLUTION_CASES,
    *ROUTED_FFN_CASES,
    *ATTENTION_CASES,
)

__all__ = ["CASES", "Case"]
