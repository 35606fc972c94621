"""How the JIT would specialize each kernel of memsave for usual arguments: what the ahead-of-time tests compile."""

from __future__ import annotations

from importlib import import_module
from itertools import cycle
from typing import Any

import torch
import triton.language as tl

from memsave.ops.activation import Activation
from memsave.ops.triton_rows import tile

from .resources import TARGETS, Build

LAST_OF_HEADS = ("stride_query_d", "stride_cos_d", "stride_sin_d")
LAST_STRIDES = ("_e", "x_d", "key_d", "query_d", "stride_d", "codes_s", "mask_s", "indices_k", "logsumexp_r")


def kernels_of(op: str) -> Any:
    return import_module(f"memsave.ops.{op}.triton")


def integer_builds() -> list[Build]:
    draw, inclusion = kernels_of("draw_rows"), kernels_of("row_inclusion")
    block = {"BLOCK": draw.BLOCK}
    counts = {"N": "i32", "K": "i32"}
    pointers = dict.fromkeys(("q_permuted", "ends", "permutation", "seed"), "*i64")
    sorted_sums = dict.fromkeys(("quantized", "ordered", "sums", "room"), "*i64")
    filled = dict.fromkeys(("room", "filled", "q"), "*i64")
    builds = [
        Build("key", draw.key_kernel, {"keys": "*i64", "seed": "*i64", "N": "i32"}, block),
        Build("hit", draw.hit_kernel, {**pointers, "hits": "*i32", **counts}, block),
        Build("room", inclusion.room_kernel, {**sorted_sums, **counts}, block),
        Build("fill", inclusion.fill_kernel, {**filled, **counts}, block),
    ]
    for dtype in ("fp16", "bf16", "fp32", "fp64"):
        types = {"weights": f"*{dtype}", "peak": f"*{dtype}", "quantized": "*i64", "N": "i32"}
        builds.append(Build(f"quantize_{dtype}", inclusion.quantize_kernel, types, {**block, "stride": 1}))
    return builds


def gather_builds() -> list[Build]:
    """Every dtype with a scale, and the narrowest, a middle and the widest tile."""
    gather = kernels_of("gather_rows")
    rows_of = [("fp16", 4096, True), ("bf16", 4096, True), ("fp32", 4096, True), ("fp64", 1, True)]
    rows_of += [("bf16", 64, False), ("fp64", 4096, False)]
    builds = []
    for dtype, features, scaled in rows_of:
        block_k, block_d = gather.tile(features)
        types = {"x": f"*{dtype}", "rows": "*i32", "out": f"*{dtype}", "K": "i32", "D": "i32", "stride_n": "i32"}
        constants = {"stride_d": 1, "stride_row": 1, "HAS_SCALE": scaled, "BLOCK_K": block_k, "BLOCK_D": block_d}
        if scaled:
            types["scale"] = "*fp32"
            constants["stride_scale"] = 1
        else:
            types["stride_scale"] = "i32"
            constants["scale"] = None
        name = f"gather_{dtype}_{features}{'_scaled' if scaled else ''}"
        multiples = ("D", "stride_n") if features > 1 else ()
        builds.append(Build(name, gather.gather_kernel, types, constants, multiples))
    return builds


def matmul_builds() -> list[Build]:
    """Every tile that autotuning may pick, for every dtype; the result in that dtype, or in fp32 as partial sums."""
    matmul = kernels_of("sampled_matmul")
    sizes = ("K", "OUT", "IN", "slice_rows", "shape_class")
    strides = ("stride_dy_n", "stride_kept_k")
    ones = dict.fromkeys(("stride_dy_o", "stride_kept_d", "stride_rows", "stride_scale"), 1)
    builds = []
    for dtype, size, precision in [("fp16", 2, "ieee"), ("bf16", 2, "ieee"), ("fp32", 4, "ieee"), ("fp32", 4, "tf32")]:
        for config in matmul.CONFIGS[size]:
            tile = "x".join(str(value) for value in config.kwargs.values())
            types = {"dy": f"*{dtype}", "kept": f"*{dtype}", "rows": "*i32", "scale": "*fp32"}
            types["out"] = "*fp32" if dtype == "bf16" else f"*{dtype}"
            types |= dict.fromkeys((*sizes, *strides), "i32")
            constants = {**ones, "PRECISION": precision, **config.kwargs}
            options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
            multiples = ("K", "OUT", "IN", *strides)
            name = f"matmul_{dtype}_{precision}_{tile}"
            builds.append(Build(name, matmul.matmul_kernel, types, constants, multiples, options))
    return builds


def norm_builds() -> list[Build]:
    """Short, usual and the longest rows, with as many warps as each GPU gets; each style, and what it rounds to."""
    backward = kernels_of("rms_norm_backward")
    kernels = [kernels_of("rms_norm").forward_kernel, backward.backward_kernel]
    kernels += [kernels_of("layer_norm").forward_kernel, kernels_of("layer_norm_backward").backward_kernel]
    builds = []
    for target, (gpu, _) in TARGETS.items():
        for style, (dtype, features) in enumerate([("fp16", 64), ("bf16", 2048), ("fp32", 16384), ("bf16", 16384)]):
            block, warps = tile(features, gpu.warp_size)
            pointers = dict.fromkeys(("x", "weight", "bias", "y", "dy", "dx"), f"*{dtype}")
            pointers |= dict.fromkeys(("rstd", "sums"), "*fp32")
            strides = dict.fromkeys(("stride_n", "stride_x_n", "stride_dy_n"), "i32")
            types = {**pointers, **strides, "N": "i32", "D": "i32", "rows": "i32"}
            ones = dict.fromkeys(("stride_d", "stride_x_d", "stride_dy_d", "stride_w", "stride_b", "stride_rstd"), 1)
            rounded = {"fp16": tl.float16, "bf16": tl.bfloat16, "fp32": tl.float32}[dtype]
            flags = dict.fromkeys(("HAS_WEIGHT", "HAS_BIAS", "NEEDS_DWEIGHT", "NEEDS_SUMS"), True)
            flags |= {"STYLE": style, "ROUNDED": rounded, "BLOCK": block}
            flags |= {"EPS": 1e-5, "WIDE": tl.float32, "PRODUCT": tl.float32}
            for kernel in kernels if features <= 8192 else kernels[:3]:  # LayerNorm's gradients have two sums to hold
                names = set(kernel.arg_names)
                builds.append(
                    Build(
                        f"{kernel.fn.__module__.split('.')[-2]}_{dtype}_{features}",
                        kernel,
                        {name: of for name, of in types.items() if name in names},
                        {name: value for name, value in (ones | flags).items() if name in names},
                        tuple(names & {"D", *strides}),
                        {"num_warps": warps},
                        (target,),
                    )
                )
    return builds


def activation_builds() -> list[Build]:
    """Every function, the types in turn, in a narrow tile and the widest."""
    forward, backward = kernels_of("gated_activation"), kernels_of("gated_activation_backward")
    builds = []
    for kind, dtype in zip(Activation, cycle(("bf16", "fp16", "fp32", "fp64"))):
        for features in (64, 8192):
            pointers = dict.fromkeys(("gate", "up", "h", "dh", "dgate", "dup"), f"*{dtype}")
            strides = dict.fromkeys(("stride_gate_n", "stride_up_n", "stride_dh_n"), "i32")
            types = {**pointers, **strides, "F": "i32"}
            constants = dict.fromkeys(("stride_gate_f", "stride_up_f", "stride_dh_f"), 1)
            wide = tl.float64 if dtype == "fp64" else tl.float32
            constants |= {"KIND": int(kind), "WIDE": wide, "BLOCK": forward.tile(features)}
            for kernel in (forward.product_kernel, backward.gradients_kernel):
                names = set(kernel.arg_names)
                builds.append(
                    Build(
                        f"{kernel.fn.__name__}_{kind.name.lower()}_{dtype}_{features}",
                        kernel,
                        {name: of for name, of in types.items() if name in names},
                        {name: value for name, value in constants.items() if name in names},
                        tuple(names & {"F", *strides}),
                    )
                )
    return builds


def bit_builds() -> list[Build]:
    pack, masked = kernels_of("pack_bits"), kernels_of("masked_scale")
    types = {"mask": "*u8", "bits": "*u8", **dict.fromkeys(("NUM_BYTES", "D", "BYTES_PER_ROW", "stride_n"), "i32")}
    builds = [Build("pack", pack.pack_kernel, types, {"stride_d": 1, "BLOCK": pack.BLOCK}, ("D", "stride_n"))]
    for dtype in ("fp16", "bf16", "fp32", "fp64"):
        types = {"x": f"*{dtype}", "bits": "*u8", "y": f"*{dtype}"}
        types |= dict.fromkeys(("NUMEL", "D", "stride_x_n", "stride_bits_n"), "i32")
        wide = tl.float64 if dtype == "fp64" else tl.float32
        constants = {"stride_x_d": 1, "stride_bits_b": 1, "SCALE": 1 / 0.9, "WIDE": wide, "BLOCK": masked.BLOCK}
        multiples = ("NUMEL", "D", "stride_x_n")
        builds.append(Build(f"masked_scale_{dtype}", masked.scale_kernel, types, constants, multiples))
    return builds


def logit_builds() -> list[Build]:
    """A large vocabulary in each dtype, with and without a softcap."""
    forward, backward = kernels_of("logit_statistics"), kernels_of("logit_statistics_backward")
    builds = []
    for dtype, softcap in [("fp16", 0.0), ("bf16", 30.0), ("fp32", 30.0), ("fp64", 0.0)]:
        wide = {"fp64": "fp64"}.get(dtype, "fp32")
        numbers = dict.fromkeys(("peak", "log_sum", "at_target", "total", "d_lse", "d_target", "d_total"), f"*{wide}")
        types = {**numbers, "logits": f"*{dtype}", "target": "*i64", "V": "i32", "stride_n": "i32"}
        flags = {"SOFTCAP": softcap, "WIDE": tl.float64 if wide == "fp64" else tl.float32, "BLOCK": forward.BLOCK}
        for module, kernel in ((forward, forward.statistics_kernel), (backward, backward.gradient_kernel)):
            names = set(kernel.arg_names)
            ones = {name: 1 for name in names if name.startswith("stride_") and name != "stride_n"}
            builds.append(
                Build(
                    f"{kernel.fn.__name__}_{dtype}",
                    kernel,
                    {name: of for name, of in types.items() if name in names},
                    ones | flags,
                    ("V", "stride_n"),
                    {"num_warps": module.WARPS},
                )
            )
    return builds


def sddmm_builds() -> list[Build]:
    """Sums in the dtype of the operands, and in fp32 between chunks; blocks of the product in every dtype."""
    sddmm = kernels_of("sddmm")
    builds = []
    for dtype, first in [("fp16", True), ("bf16", False), ("fp32", False)]:
        types = {"a": f"*{dtype}", "b": f"*{dtype}", "indices": "*i32", "before": "*fp32", "out": f"*{dtype}"}
        types |= dict.fromkeys(("N", "C", "K", "stride_a_r", "stride_b_c"), "i32")
        constants = {"stride_index": 1, "HAS_BEFORE": not first}
        constants |= {"BLOCK_ENTRIES": sddmm.BLOCK_ENTRIES, "BLOCK_TOKENS": sddmm.BLOCK_TOKENS}
        multiples, options = ("N", "C", "stride_a_r", "stride_b_c"), {"num_warps": sddmm.WARPS}
        builds.append(Build(f"sddmm_sum_{dtype}", sddmm.sum_kernel, types, constants, multiples, options))
    for dtype in ("fp16", "bf16", "fp32", "fp64"):
        types = {"block": f"*{dtype}", "indices": "*i32", "out": f"*{dtype}", "FIRST": "i32", "LAST": "i32", "K": "i32"}
        constants = {"stride_index": 1, "BLOCK": sddmm.BLOCK_TAKEN}
        builds.append(Build(f"sddmm_take_{dtype}", sddmm.take_kernel, types, constants))
    return builds


def low_rank_attention_builds() -> list[Build]:
    """A token and a prompt, in rank space and with rebuilt values, narrow to wide heads; ranks that are no multiples.

    With all that a key can need: a bias, a norm, a rotation, a mask.
    """
    shapes = [("fp16", 1, 64, 205), ("bf16", 512, 64, 205), ("bf16", 512, 96, 205), ("fp16", 512, 128, 1024)]
    shapes += [("bf16", 1, 256, 640), ("fp32", 1, 64, 205), ("fp32", 512, 128, 205), ("fp32", 1, 256, 640)]
    return [build for target in TARGETS for shape in shapes for build in _low_rank_attention_builds(*shape, target)]


def _low_rank_attention_builds(dtype: str, queries: int, d: int, rank: int, target: str) -> list[Build]:
    """For 16 heads on 4: the attention, for one token also what combines its slices."""
    module, tiles = kernels_of("low_rank_attention"), import_module("memsave.ops.low_rank_attention.tiles")
    size = module.Sizes(1, 16, 4, queries, 4096, d, rank, rank)
    types_of = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    tile = tiles.tile_of(size, types_of[dtype], TARGETS[target][0].warp_size)
    constants = {"G": size.group, "D": d, "SCALE": d**-0.5, "EPS": 1e-6, **tile.constants()}
    constants |= {"IS_CAUSAL": queries > 1, "MASK_IS_BOOL": dtype == "fp16", "PRECISION": "ieee"}
    types = dict.fromkeys(("KV", "T", "S", "RK", "RV", "slice_keys", "slices"), "i32")
    of_slices = dict.fromkeys(("peaks", "totals", "sums"), "*fp32")
    types, constants = (types | of_slices, constants) if queries == 1 else (types, constants | dict.fromkeys(of_slices))
    multiples = {"T", "S", "slice_keys"} | ({"RK", "RV"} if rank % 16 == 0 else set())
    builds = []
    for kernel in (module.attention_kernel, module.combine_kernel)[: 2 if queries == 1 else 1]:
        of, ones = {}, {}
        for name in kernel.arg_names:
            if name.startswith("stride_"):
                last = name.endswith(("_r", "_bias", "_norm", "mask_s")) or name in LAST_OF_HEADS
                (ones if last else of)[name] = 1 if last else "i32"
            elif name not in constants:
                of[name] = types.get(name, "*u8" if name == "mask" and dtype == "fp16" else f"*{dtype}")
        heads = {name for name in of if name.startswith(("stride_query", "stride_cos", "stride_sin", "stride_mask"))}
        ranks = {name for name in of if name.startswith("stride_") and rank % 16 == 0}
        aligned = tuple(name for name in of if name in multiples | heads | ranks)
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        known = ones | {name: value for name, value in constants.items() if name in kernel.arg_names}
        name = f"low_rank_{kernel.fn.__name__}_{dtype}_{queries}x{d}_{rank}"
        builds.append(Build(name, kernel, of, known, aligned, options, (target,)))
    return builds


def low_rank_mlp_builds() -> list[Build]:
    """Every tile that autotuning may pick; functions, types, gated and plain blocks in turn.

    Ranks are multiples of 16; for the first tile of each list, which deterministic mode takes, also other ones.
    """
    mlp, kinds, turns = kernels_of("low_rank_mlp"), cycle(Activation), cycle((True, True, False))
    halves = cycle(("fp16", "bf16"))
    builds = []
    for size, lists in mlp.CONFIGS.items():
        for columns, configs in lists.items():
            for config, aligned in [*((config, True) for config in configs), (configs[0], False)]:
                for dtype, precision in [("fp32", "ieee"), ("fp32", "tf32")] if size == 4 else [(next(halves), "ieee")]:
                    flags = {"KIND": int(next(kinds)), "PRECISION": precision, "BLOCK_RANK": columns, **config.kwargs}
                    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
                    tile = "x".join(str(value) for value in (columns, *config.kwargs.values()))
                    name = f"low_rank_mlp_{dtype}_{precision}_{tile}{'' if aligned else '_odd_ranks'}"
                    builds.append(_low_rank_mlp_build(name, dtype, next(turns), aligned, flags, options))
    return builds


def _low_rank_mlp_build(
    name: str, dtype: str, gated: bool, aligned: bool, flags: dict[str, Any], options: dict[str, int]
) -> Build:
    kernel = kernels_of("low_rank_mlp").mlp_kernel
    types, constants = {"shape_class": "i32"}, flags
    for argument in kernel.arg_names:
        if argument in ("p_up", "expand_up", "bias_up") and not gated:
            constants[argument] = None
        elif argument in ("p_gate", "expand_gate", "bias_gate", "p_up", "expand_up", "bias_up", "reduce_down", "out"):
            types[argument] = f"*{dtype}"
        elif argument in ("stride_bias_gate", "stride_down_f") or argument.endswith("gate_r"):
            constants[argument] = 1
        elif gated and (argument == "stride_bias_up" or argument.endswith("up_r")):
            constants[argument] = 1
        elif argument not in constants:
            types[argument] = "i32"
    multiples = {"N", "F", "stride_down_r"}
    if aligned:
        multiples |= {"R1", "R2", "R"} | {of for of in types if of.endswith(("_n", "_f"))}
    return Build(name, kernel, types, constants, tuple(multiples), options)


def product_quantization_builds() -> list[Build]:
    """Narrow and wide subspaces, an odd number of them; blocks of keys in a tile, and larger than one."""
    encode, select, blocks = (kernels_of(op) for op in ("pq_encode", "pq_select", "pq_select_blocks"))
    shared = import_module("memsave.ops.triton_codes")
    builds = []
    for dtype, features in [("fp16", 8), ("bf16", 128), ("fp32", 8), ("fp64", 33)]:
        types = {"x": f"*{dtype}", "codebook": "*fp32", "out": "*u8"}
        constants = {"M": 16, "C": 16, "D": features, "CODEWORDS": 16}
        constants |= {"BLOCK_S": encode.BLOCK_S, "BLOCK_D": encode.BLOCK_D}
        options = {"num_warps": encode.WARPS}
        builds.append(_usual_build(f"encode_{dtype}_{features}", encode.encode_kernel, types, constants, options))
    bytes_of = dict.fromkeys(("table", "codes", "mask"), "*u8")
    for subspaces in (8, 15):
        constants = {"M": subspaces, "IS_CAUSAL": True, "BLOCK_R": select.BLOCK_R, "BLOCK_S": shared.ESTIMATE_KEYS}
        types = {**bytes_of, "out": "*i16"}
        options = {"num_warps": select.WARPS}
        builds.append(_usual_build(f"estimate_{subspaces}", select.estimate_kernel, types, constants, options))
    types, constants = {"estimates": "*i16", "out": "*i32"}, {"IS_CAUSAL": True, "BLOCK": shared.ROW_KEYS}
    builds.append(_usual_build("keep", select.keep_kernel, types, constants, {"num_warps": select.WARPS}))
    types = {**bytes_of, "weights": "*i32", "sums": "*i64", "ranks": "*i64"}
    for size, subspaces in [(64, 16), (100, 7), (1024, 8)]:
        inside = min(1 << (size - 1).bit_length(), shared.SUM_KEYS)
        constants = {"M": subspaces, "SIZE": size, "IS_CAUSAL": True, "REPRESENTATIVES": 2, "LOCAL": True}
        constants |= {"BLOCKS": shared.SUM_KEYS // inside, "INSIDE": inside, "BLOCK_I": 2, "BLOCK_L": shared.ROW_BLOCKS}
        for kernel in (blocks.sum_kernel, blocks.rank_kernel):
            name = f"blocks_{kernel.fn.__name__}_{size}"
            builds.append(_usual_build(name, kernel, types, constants, {"num_warps": blocks.WARPS}))
    return builds


def _usual_build(
    name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], options: dict[str, int], *targets: str
) -> Build:
    """A build with contiguous tensors: the last stride is 1, the others are multiples, and other numbers are i32."""
    found, known, aligned = {}, {}, []
    for argument in kernel.arg_names:
        if argument in constants:
            known[argument] = constants[argument]
        elif argument.startswith("stride_") and argument.endswith(LAST_STRIDES):
            known[argument] = 1
        else:
            found[argument] = types.get(argument, "i32")
            aligned += [argument] if argument.startswith("stride_") else []
    return Build(name, kernel, found, known, tuple(aligned), options, targets or tuple(TARGETS))


def selected_attention_builds() -> list[Build]:
    """Blocks with a mask and without, single keys; narrow to wide heads."""
    shapes = [("bf16", 64, 128, 128, False), ("fp16", 16, 64, 64, True), ("bf16", 64, 192, 256, True)]
    shapes += [("fp16", 1, 80, 80, False), ("fp32", 64, 128, 128, True), ("fp32", 1, 64, 64, False)]
    return [build for target in TARGETS for shape in shapes for build in _selected_builds(*shape, target)]


def _selected_builds(dtype: str, size: int, d: int, e: int, masked: bool, target: str) -> list[Build]:
    """The forward and both kernels of the backward, for 4 query heads of each key/value head."""
    forward, backward = kernels_of("selected_attention"), kernels_of("selected_attention_backward")
    torch_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    block_d, block_e = forward.power_of_2(d), forward.power_of_2(e)
    like_query = ("doutput", "query", "key", "value", "output", "out", "dquery")
    types = dict.fromkeys(like_query, f"*{dtype}") | dict.fromkeys(("logsumexp", "delta", "dkey", "dvalue"), "*fp32")
    types |= {"indices": "*i32", "mask": "*u8", "order": "*i64", "begins": "*i64"}
    flags = {"G": 4, "D": d, "E": e, "SCALE": d**-0.5, "SIZE": size, "PRECISION": "ieee", "IS_CAUSAL": size > 1}
    flags |= {"HAS_WINDOW": masked, "BLOCK_D": block_d, "BLOCK_E": block_e, "BLOCK_K": forward.step_of(torch_dtype)}
    if not masked:
        flags |= {"mask": None} | {name: 0 for name in forward.attention_kernel.arg_names if "stride_mask" in name}
    builds = []
    for kernel, choose, rows in [
        (forward.attention_kernel, forward.tile_of, 4 * size),
        (backward.query_kernel, backward.query_tile, 4 * size),
        (backward.key_kernel, backward.key_tile, size),
    ]:
        block_m, block_n, warps, stages = choose(
            rows, max(block_d, block_e), torch_dtype, masked, TARGETS[target][0].warp_size
        )
        constants = flags | {"BLOCK_M": block_m, "BLOCK_N": block_n}
        options = {"num_warps": warps, "num_stages": stages}
        name = f"selected_{kernel.fn.__name__}_{dtype}_{size}_{d}x{e}{'_masked' if masked else ''}"
        builds.append(_usual_build(name, kernel, types, constants, options, target))
    return builds


BUILDS = [
    *integer_builds(),
    *gather_builds(),
    *matmul_builds(),
    *norm_builds(),
    *activation_builds(),
    *bit_builds(),
    *logit_builds(),
    *sddmm_builds(),
    *low_rank_attention_builds(),
    *low_rank_mlp_builds(),
    *product_quantization_builds(),
    *selected_attention_builds(),
]
