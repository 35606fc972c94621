"""The mathematics of memsave: each op in plain PyTorch, and in C++ and Triton where that is faster or smaller.

Neither triton nor the C++ library is loaded before an op needs it.
"""

from __future__ import annotations

from ._backend import BackendError, use_backend, use_reference
from ._library import backends, serving, workspace_bytes
from .activation import activation
from .activation_backward import activation_backward
from .draw_rows import draw_rows
from .draw_winners import draw_winners
from .gated_activation import gated_activation
from .gated_activation_backward import gated_activation_backward
from .gather_rows import gather_rows
from .layer_norm import layer_norm
from .layer_norm_backward import layer_norm_backward
from .logit_statistics import logit_statistics
from .logit_statistics_backward import logit_statistics_backward
from .low_rank_attention import low_rank_attention
from .low_rank_mlp import low_rank_mlp
from .masked_scale import masked_scale
from .new_seed import new_seed
from .pack_bits import pack_bits
from .pq_encode import pq_encode
from .pq_select import pq_select
from .pq_select_blocks import pq_select_blocks
from .pq_table import pq_table
from .rms_norm import rms_norm
from .rms_norm_backward import rms_norm_backward
from .row_inclusion import row_inclusion
from .sampled_matmul import sampled_matmul
from .sddmm import sddmm
from .selected_attention import selected_attention
from .selected_attention_backward import selected_attention_backward
from .spmm import spmm

__all__ = [
    "BackendError",
    "activation",
    "activation_backward",
    "backends",
    "draw_rows",
    "draw_winners",
    "gated_activation",
    "gated_activation_backward",
    "gather_rows",
    "layer_norm",
    "layer_norm_backward",
    "masked_scale",
    "logit_statistics",
    "logit_statistics_backward",
    "low_rank_attention",
    "low_rank_mlp",
    "new_seed",
    "pack_bits",
    "pq_encode",
    "pq_select",
    "pq_select_blocks",
    "pq_table",
    "rms_norm",
    "rms_norm_backward",
    "row_inclusion",
    "sampled_matmul",
    "sddmm",
    "selected_attention",
    "selected_attention_backward",
    "serving",
    "spmm",
    "use_backend",
    "use_reference",
    "workspace_bytes",
]
