"""The mathematics of memsave: each op in plain PyTorch, and in C++ and Triton where that is faster or smaller.

Neither triton nor the C++ library is loaded before an op needs it.
"""

from __future__ import annotations

from ._backend import BackendError, use_backend, use_reference
from ._library import backends, workspace_bytes
from .draw_rows import draw_rows
from .draw_winners import draw_winners
from .gather_rows import gather_rows
from .logit_statistics import logit_statistics
from .logit_statistics_backward import logit_statistics_backward
from .new_seed import new_seed
from .rms_norm import rms_norm
from .rms_norm_backward import rms_norm_backward
from .row_inclusion import row_inclusion
from .sampled_matmul import sampled_matmul

__all__ = [
    "BackendError",
    "backends",
    "draw_rows",
    "draw_winners",
    "gather_rows",
    "logit_statistics",
    "logit_statistics_backward",
    "new_seed",
    "rms_norm",
    "rms_norm_backward",
    "row_inclusion",
    "sampled_matmul",
    "use_backend",
    "use_reference",
    "workspace_bytes",
]
