"""The benchmark cases of the ops, as data: what is called, with which inputs, beside what a user would write instead.

A new op adds a case to OP_CASES; a test fails for an op without one. Its inputs, peers and check stand in op_inputs.py
or activations.py.
"""

from __future__ import annotations

from functools import partial

import torch

from memsave import ops

from .activations import (
    activation_inputs,
    check_activations,
    kept_backward,
    torchs_activation,
    torchs_backward,
)
from .activations import written_product as written_gated
from .attention import dense_attention, rebuilt_attention, token_inputs
from .op_case import Aim, Contender, OpCase, for_op, sizes
from .op_inputs import (
    check_layer_norm,
    check_logits,
    check_norm,
    check_sampled_weight_gradient,
    csr_product,
    dense,
    draw,
    entries_of_dense,
    functional_layer_norm,
    functional_norm,
    gather,
    layer_norm_inputs,
    logit_inputs,
    low_rank_block,
    masked_entries,
    masked_inputs,
    matrices,
    multinomial,
    native_layer_norm_backward,
    norm_inputs,
    product,
    product_with_dense,
    products_of_columns,
    row_weights,
    rows_of,
    sampled_weight_gradient,
    sparse_matrix,
    written_logit_gradient,
    written_loss,
    written_low_rank_block,
    written_norm,
    written_product,
)
from .selection import SELECTION_CASES

FP32, BF16 = torch.float32, torch.bfloat16
_n, _nd, _ndo = sizes("N"), sizes("N", "D", "dtype"), sizes("N", "D", "O", "dtype")
_ROWS = {"cpu": _n((4096,), (65536,)), "cuda": _n((16384,), (262144,))}
_TINY_ROWS = {"sizes": {device: _n((256,)) for device in ("cpu", "cuda")}}
_TINY_MATRICES = {"sizes": {device: _ndo((256, 32, 48, FP32)) for device in ("cpu", "cuda")}}
_TINY_ND = {"sizes": {device: _nd((256, 48, FP32), (256, 48, BF16)) for device in ("cpu", "cuda")}}
_NORM_SIZES = {
    "cpu": _nd((1024, 256, FP32), (1024, 256, BF16), (4096, 2048, FP32), (4096, 2048, BF16)),
    "cuda": _nd((16384, 2048, BF16), (16384, 2048, FP32), (16384, 8192, BF16)),
}
_nda = sizes("N", "D", "dtype", "activation")
_ACTIVATION = {
    "inputs": activation_inputs,
    "check": check_activations,
    "sizes": {
        "cpu": _nda(*((4096, 2816, dtype, name) for dtype in (FP32, BF16) for name in ("silu", "gelu_tanh"))),
        "cuda": _nda((16384, 8192, BF16, "silu"), (16384, 8192, FP32, "silu"), (16384, 8192, BF16, "gelu_tanh")),
    },
    "tiny": {"sizes": {device: _nda((256, 48, FP32, "silu")) for device in ("cpu", "cuda")}},
}
_nv = sizes("N", "V", "dtype")
_LOGIT_SIZES = {
    "cpu": _nv((512, 32000, FP32), (512, 32000, BF16)),
    "cuda": _nv((4096, 128256, BF16), (4096, 128256, FP32)),
}
_nrc = sizes("N", "R", "C", "dtype", "density")
_nfr = sizes("N", "F", "R1", "R", "dtype", "activation", "gated")
_nrct = sizes("N", "R", "C", "dtype", "density", "transposed")
_s = sizes("S", "dtype")
_TINY_NV = {"sizes": {device: _nv((64, 96, FP32), (64, 96, BF16)) for device in ("cpu", "cuda")}}

OP_CASES: tuple[OpCase, ...] = (
    OpCase(
        name="sampled_weight_gradient",
        title="weight gradient of a linear from 30% of its rows (pps), all included, and its parts",
        devices=("cpu", "cuda"),
        inputs=matrices,
        contenders=(
            Contender(name="dense dy.t() @ x", call=dense),
            Contender(name="memsave", call=sampled_weight_gradient),
            Contender(name="plain PyTorch", call=sampled_weight_gradient, within=ops.use_reference),
            Contender(name="draw alone", call=draw),
            Contender(name="gather alone", call=gather),
            Contender(name="product alone", call=product),
        ),
        check=check_sampled_weight_gradient,
        sizes={
            "cpu": _ndo((1024, 256, 688, FP32), (4096, 768, 3072, FP32)),
            "cuda": _ndo((16384, 2048, 8192, BF16)),
        },
        aim=Aim(contender="memsave", of="dense dy.t() @ x", at_most=0.45, device="cuda"),
        tiny=_TINY_MATRICES,
    ),
    for_op(
        "sampled_matmul",
        plain=written_product,
        peers={"indexing": written_product, "dense dy.t() @ x": dense},
        title="product of the kept rows",
        inputs=matrices,
        sizes={
            "cpu": _ndo((4096, 768, 3072, FP32), (4096, 768, 3072, BF16)),
            "cuda": _ndo((16384, 2048, 8192, BF16), (8192, 4096, 16, BF16), (8192, 1024, 1024, FP32)),
        },
        tiny=_TINY_MATRICES,
    ),
    for_op(
        "sddmm",
        expected_s=130.0,
        plain=entries_of_dense,
        peers={"dense product, then its entries": entries_of_dense, "columns of each entry": products_of_columns},
        title="some entries of a weight gradient, a share of `density` of them",
        inputs=masked_entries,
        sizes={
            "cpu": _nrc(
                *((2048, 2048, 2048, dtype, density) for dtype in (FP32, BF16) for density in (0.01, 0.05)),
                *((4096, 3072, 768, dtype, 0.01) for dtype in (FP32, BF16)),
            ),
            "cuda": _nrc(
                *((8192, 4096, 4096, dtype, density) for dtype in (BF16, FP32) for density in (0.001, 0.01, 0.05)),
                (16384, 14336, 4096, BF16, 0.01),
            ),
        },
        tiny={
            "sizes": {device: _nrc((256, 48, 32, FP32, 0.02), (256, 48, 32, BF16, 0.1)) for device in ("cpu", "cuda")}
        },
    ),
    for_op(
        "spmm",
        expected_s=50.0,
        plain=product_with_dense,
        peers={"torch.sparse.mm (CSR)": csr_product, "dense matrix": product_with_dense},
        title="products with a sparse matrix, x S or x S^T; CSR and dense forms of it are there before",
        inputs=sparse_matrix,
        sizes={
            "cpu": _nrct(
                *((2048, 2048, 2048, dtype, 0.01, way) for dtype in (FP32, BF16) for way in (True, False)),
                *((4096, 768, 3072, dtype, 0.01, way) for dtype in (FP32, BF16) for way in (True, False)),
            ),
            "cuda": _nrct(
                *((8192, 4096, 4096, dtype, 0.01, way) for dtype in (BF16, FP32) for way in (True, False)),
            ),
        },
        tiny={
            "sizes": {
                device: _nrct((256, 48, 32, FP32, 0.02, True), (256, 48, 32, BF16, 0.1, False))
                for device in ("cpu", "cuda")
            }
        },
    ),
    for_op(
        "gather_rows",
        peers={"indexing": lambda x, rows, scale, **_: (x[rows] * scale[:, None]).to(x.dtype)},
        title="30% of the rows copied, each times a factor",
        inputs=rows_of,
        sizes={
            "cpu": _nd((4096, 1024, FP32), (4096, 4096, FP32), (4096, 4096, BF16), (65536, 1024, FP32)),
            "cuda": _nd((16384, 2048, BF16), (16384, 8192, BF16), (16384, 8192, FP32)),
        },
        tiny=_TINY_ND,
    ),
    for_op(
        "rms_norm",
        peers={"as models write it": written_norm, "torch's rms_norm": functional_norm},
        title="RMSNorm as in a Llama",
        inputs=norm_inputs,
        check=check_norm,
        sizes=_NORM_SIZES,
        tiny=_TINY_ND,
    ),
    for_op(
        "rms_norm_backward",
        peers={},
        title="the gradients of RMSNorm",
        inputs=norm_inputs,
        check=check_norm,
        sizes=_NORM_SIZES,
        tiny=_TINY_ND,
    ),
    for_op(
        "activation",
        expected_s=30.0,
        peers={"torch's own": torchs_activation},
        title="an activation function",
        **_ACTIVATION,
    ),
    for_op(
        "activation_backward",
        expected_s=30.0,
        peers={"torch's own": torchs_backward},
        title="the gradient of an activation function",
        **_ACTIVATION,
    ),
    for_op(
        "gated_activation",
        expected_s=30.0,
        peers={"as models write it": written_gated},
        title="the product in a gated MLP",
        **_ACTIVATION,
    ),
    for_op(
        "gated_activation_backward",
        expected_s=95.0,
        peers={"act(gate) kept": kept_backward},
        title="the gradients of that product; the peer is what autograd does, which keeps act(gate)",
        **_ACTIVATION,
    ),
    for_op(
        "low_rank_mlp",
        plain=written_low_rank_block,
        peers={"hidden activations of all rows": written_low_rank_block},
        title="a feed-forward block between its factors, ranks R1 (of gate and up) and R",
        inputs=low_rank_block,
        sizes={
            "cpu": _nfr((4096, 3072, 307, 307, FP32, "gelu", False)),
            "cuda": _nfr(
                (4096, 8192, 819, 819, BF16, "silu", True),
                (4096, 8192, 816, 816, BF16, "silu", True),
                (4096, 3072, 307, 307, FP32, "gelu", False),
            ),
        },
        tiny={"sizes": {device: _nfr((256, 48, 12, 20, FP32, "silu", True)) for device in ("cpu", "cuda")}},
    ),
    for_op(
        "pack_bits",
        peers={},
        title="a mask in one bit per element",
        inputs=masked_inputs,
        sizes=_NORM_SIZES,
        tiny=_TINY_ND,
    ),
    for_op(
        "layer_norm",
        kernels=False,
        peers={"torch's layer_norm": functional_layer_norm},
        title="LayerNorm, which on the CPU is torch's own",
        inputs=layer_norm_inputs,
        check=check_layer_norm,
        sizes=_NORM_SIZES,
        tiny=_TINY_ND,
    ),
    for_op(
        "masked_scale",
        peers={"x * noise": lambda x, noise, **_: x * noise},
        title="the product with a packed mask, beside that with noise in the dtype of x",
        inputs=masked_inputs,
        sizes=_NORM_SIZES,
        tiny=_TINY_ND,
    ),
    for_op(
        "layer_norm_backward",
        peers={"torch's own": native_layer_norm_backward},
        title="the gradients of LayerNorm; in bf16 torch's own add up those of weight and bias in bf16",
        inputs=layer_norm_inputs,
        check=check_layer_norm,
        sizes=_NORM_SIZES,
        tiny=_TINY_ND,
    ),
    for_op(
        "low_rank_attention",
        plain=rebuilt_attention,
        peers={"keys and values rebuilt in full": rebuilt_attention, "cache of full keys and values": dense_attention},
        title="attention of one token of a Llama-3.2-1B to S keys, keys and values in rank space (R = 205)",
        inputs=token_inputs,
        sizes={
            "cpu": _s(*((s, FP32) for s in (512, 4096, 16384))),
            "cuda": _s(*((s, BF16) for s in (512, 4096, 16384))),
        },
        tiny={"sizes": {device: _s((64, FP32)) for device in ("cpu", "cuda")}},
    ),
    for_op(
        "logit_statistics",
        peers={"losses by cross_entropy": written_loss},
        title="what cross entropy needs of rows of logits",
        inputs=logit_inputs,
        check=check_logits,
        sizes=_LOGIT_SIZES,
        tiny=_TINY_NV,
    ),
    for_op(
        "logit_statistics_backward",
        peers={"with plain operators, to a new tensor": written_logit_gradient},
        title="logits turned into their gradient, in place; of a copy, which each call makes",
        writes="logits",
        inputs=logit_inputs,
        check=check_logits,
        sizes=_LOGIT_SIZES,
        tiny=_TINY_NV,
    ),
    for_op(
        "row_inclusion",
        peers={},
        title="inclusion probabilities of 30% of the rows",
        inputs=row_weights,
        sizes=_ROWS,
        tiny=_TINY_ROWS,
    ),
    for_op(
        "draw_rows",
        peers={"torch.multinomial": multinomial},
        title="30% of the rows drawn without replacement; torch.multinomial does not keep to given probabilities",
        inputs=row_weights,
        sizes=_ROWS,
        tiny=_TINY_ROWS,
    ),
    for_op(
        "draw_winners",
        kernels=False,
        peers={"torch.multinomial": partial(multinomial, replacement=True)},
        title="30% of the rows by WTA-CRS, which has no kernel; torch.multinomial draws without the winners",
        inputs=row_weights,
        sizes=_ROWS,
        tiny=_TINY_ROWS,
    ),
    for_op(
        "new_seed",
        peers={"torch.randint": lambda like, **_: torch.randint(2**63 - 1, (), device=like.device)},
        kernels=False,
        title="one random integer, without a kernel",
        inputs=lambda device: {"like": torch.empty(1, device=device)},
        sizes={"cpu": ({},), "cuda": ({},)},
    ),
    *SELECTION_CASES,
)
