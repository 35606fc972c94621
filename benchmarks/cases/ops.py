"""The benchmark cases of the ops, as data: what is called, with which inputs, beside what a user would write instead.

N rows, D input and O output features, k = KEEP_RATIO * N kept rows. Inputs have fixed seeds. A new op adds a case to
OP_CASES; a test fails for an op without one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from memsave import ops
from memsave.nn.rows import KeepRows
from memsave.ops.rms_norm import Style
from tests.harness import assert_same, assert_within_budget

from .activations import (
    activation_inputs,
    check_activations,
    kept_backward,
    torchs_activation,
    torchs_backward,
)
from .activations import written_product as written_gated
from .case import Case

KEEP_RATIO = 0.3
CHECKED_ROWS = 64
Inputs = dict[str, Any]  # by name, as the calls take them


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One of the calls that are compared.

    Attributes:
        call: takes the inputs of a size by name; unknown names are to be ignored.
        within: the context it runs in, entered outside of what is timed.
        devices: where it can run.
        may_fail: whether an error leaves it without figures, instead of failing the case.
    """

    name: str
    call: Callable[..., Any]
    within: Callable[[], AbstractContextManager[Any]] = nullcontext
    devices: tuple[str, ...] = ("cpu", "cuda")
    may_fail: bool = False


@dataclass(frozen=True, kw_only=True)
class Aim:
    """`contender` takes at most `at_most` of the time of `of`, at the sizes of a device."""

    contender: str
    of: str
    at_most: float
    device: str


@dataclass(frozen=True, kw_only=True)
class OpCase(Case):
    """Calls side by side, at several sizes. The first contender is the one that the others are compared with.

    Attributes:
        inputs: makes the inputs: `inputs(device, **size)`.
        contenders: what is called with them.
        check: takes the inputs by name, and raises AssertionError where memsave computes something else.
        sizes: for each device, the sizes as keyword arguments of `inputs`.
    """

    kind: ClassVar[str] = "op"

    inputs: Callable[..., Inputs]
    contenders: tuple[Contender, ...]
    check: Callable[..., None]
    sizes: Mapping[str, tuple[Mapping[str, Any], ...]]
    aim: Aim | None = None

    def describe(self) -> dict[str, Any]:
        aim = {"aim": vars(self.aim)} if self.aim else {}
        return super().describe() | {"first": self.contenders[0].name} | aim


def for_op(
    op: str,
    peers: Mapping[str, Callable[..., Any]],
    plain: Callable[..., Tensor] | None = None,
    kernels: bool = True,
    check: Callable[..., None] | None = None,
    writes: str | None = None,
    **fields: Any,
) -> OpCase:
    """A case of one op: plain PyTorch (its reference), memsave (the backend that is active) and peers.

    Args:
        kernels: whether the op has kernels; without, plain PyTorch is all there is of it.
        peers: what a user would write instead.
        plain: for an op that rounds, what it computes as one would write it: its error sets the budget, and in fp64 it
            is the truth. Without it, memsave must give the same bits as its reference.
        check: in place of both.
        writes: the input that the op overwrites: each call gets a copy of it.
    """
    function = getattr(ops, op)
    parameters = list(inspect.signature(function).parameters)

    def call(**inputs: Any) -> Any:
        if writes is not None:
            inputs[writes] = inputs[writes].clone()
        result = function(*(inputs[name] for name in parameters))
        return result if writes is None else inputs[writes]

    def same_result(**inputs: Any) -> None:
        if plain is not None:
            assert_within_budget(call(**inputs), plain(**in_fp64(inputs)), plain(**inputs))
            return
        torch.manual_seed(0)
        found = call(**inputs)
        torch.manual_seed(0)
        with ops.use_reference():
            assert_same(found, call(**inputs))

    contenders = (
        Contender(name="plain PyTorch", call=call, within=ops.use_reference),
        *([Contender(name="memsave", call=call)] if kernels else []),
        *(Contender(name=name, call=peer) for name, peer in peers.items()),
    )
    check = check or same_result
    return OpCase(name=f"op_{op}", contenders=contenders, check=check, devices=("cpu", "cuda"), **fields)


def in_fp64(inputs: Inputs) -> Inputs:
    """The inputs with every floating tensor in float64."""
    floating = {name for name, i in inputs.items() if isinstance(i, Tensor) and i.is_floating_point()}
    return {name: value.double() if name in floating else value for name, value in inputs.items()}


def _generator(device: str, seed: int = 0) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def _kept_rows(n: int) -> int:
    return int(KEEP_RATIO * n)


def row_weights(device: str, N: int) -> Inputs:
    """Row norms (N,), their inclusion probabilities and a seed: what the draws are called with."""
    weights = torch.randn(N, generator=_generator(device), device=device).exp()
    k = _kept_rows(N)
    inclusion = ops.row_inclusion(weights, k)
    probabilities = weights / weights.sum()
    seed = torch.tensor(N, device=device)
    return {"weights": weights, "k": k, "q": inclusion, "seed": seed, "winners": True, "probabilities": probabilities}


def matrices(device: str, N: int, D: int, O: int, dtype: torch.dtype) -> Inputs:  # noqa: E741
    """x (N, D), dy (N, O), and a sample of x: rows (k,), scale (k,) and the kept rows (k, D)."""
    generator = _generator(device)
    x = torch.randn(N, D, generator=generator, device=device, dtype=dtype)
    dy = torch.randn(N, O, generator=generator, device=device, dtype=dtype)
    seed = torch.tensor(N, device=device)
    rows, scale = draw(x=x, seed=seed)
    return {"x": x, "dy": dy, "seed": seed, "rows": rows, "scale": scale, "kept": ops.gather_rows(x, rows)}


def rows_of(device: str, N: int, D: int, dtype: torch.dtype) -> Inputs:
    """x (N, D), rows (k,) and scale (k,)."""
    inputs = matrices(device, N=N, D=D, O=1, dtype=dtype)
    return {name: inputs[name] for name in ("x", "rows", "scale")}


def norm_inputs(device: str, N: int, D: int, dtype: torch.dtype) -> Inputs:
    """x and dy (N, D), weight (D,), and what a Llama's norm is called with."""
    generator = _generator(device)
    x, dy = (torch.randn(N, D, generator=generator, device=device, dtype=dtype) for _ in range(2))
    weight = torch.randn(D, generator=generator, device=device, dtype=dtype)
    settings = {"eps": 1e-6, "style": int(Style.CAST_THEN_SCALE), "double": False, "needs_dweight": True}
    rstd = ops.rms_norm(x, weight, 1e-6, Style.CAST_THEN_SCALE)[1]
    return {"x": x, "dy": dy, "weight": weight, "rstd": rstd, **settings}


def masked_inputs(device: str, N: int, D: int, dtype: torch.dtype) -> Inputs:
    """x (N, D), a mask that drops a tenth, as bools, bits and noise, and the scale of what is left."""
    generator = _generator(device)
    x = torch.randn(N, D, generator=generator, device=device, dtype=dtype)
    mask = torch.rand(N, D, generator=generator, device=device) < 0.9
    return {"x": x, "mask": mask, "bits": ops.pack_bits(mask), "noise": mask.to(dtype) / 0.9, "scale": 1 / 0.9}


def written_norm(x: Tensor, weight: Tensor, eps: float, **_: Any) -> Tensor:
    """RMSNorm as models write it."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def functional_norm(x: Tensor, weight: Tensor, eps: float, **_: Any) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def check_norm(**inputs: Any) -> None:
    """The output and both gradients within the error budget."""
    names = ("x", "weight", "eps", "style", "double")
    back = ("dy", "x", "rstd", "weight", "style", "needs_dweight")
    found = ops.rms_norm(*map(inputs.get, names)), ops.rms_norm_backward(*map(inputs.get, back))
    with ops.use_reference():
        plain = ops.rms_norm(*map(inputs.get, names)), ops.rms_norm_backward(*map(inputs.get, back))
        wide = in_fp64(inputs) | {"double": True}
        exact = ops.rms_norm(*map(wide.get, names)), ops.rms_norm_backward(*map(wide.get, back))
    for which in (0, 1):
        for f, e, p in zip(found[which], exact[which], plain[which], strict=True):
            assert_within_budget(f, e, p)


def logit_inputs(device: str, N: int, V: int, dtype: torch.dtype) -> Inputs:
    """Logits (N, V) and targets (N,), their statistics, and the gradients of a sum of losses."""
    generator = _generator(device)
    logits = torch.randn(N, V, generator=generator, device=device, dtype=dtype)
    target = torch.randint(V, (N,), generator=generator, device=device)
    peak, log_sum, *_ = ops.logit_statistics(logits, target)
    gradients = {"d_lse": torch.ones_like(peak), "d_target": -torch.ones_like(peak), "d_total": torch.zeros_like(peak)}
    return {"logits": logits, "target": target, "peak": peak, "log_sum": log_sum, **gradients, "softcap": None}


def written_loss(logits: Tensor, target: Tensor, **_: Any) -> Tensor:
    return F.cross_entropy(logits.float(), target, reduction="none")


def written_logit_gradient(logits: Tensor, target: Tensor, peak: Tensor, log_sum: Tensor, **_: Any) -> Tensor:
    """As one would write it, without overwriting the logits."""
    gradient = (logits.float() - (peak + log_sum)[:, None]).exp_()
    gradient[torch.arange(len(target), device=target.device), target] -= 1
    return gradient.to(logits.dtype)


def check_logits(**inputs: Any) -> None:
    """The statistics and the gradient within the error budget, on the first rows."""
    rows = {name: i[:CHECKED_ROWS] if isinstance(i, Tensor) else i for name, i in inputs.items()}
    found = {}
    for name, given in {"memsave": rows, "plain": rows, "exact": in_fp64(rows)}.items():
        with nullcontext() if name == "memsave" else ops.use_reference():
            logits = given["logits"].clone()
            statistics = ops.logit_statistics(logits, given["target"])
            ops.logit_statistics_backward(logits, *(i for key, i in given.items() if key != "logits"))
            found[name] = (*statistics, logits)
    for f, e, p in zip(found["memsave"], found["exact"], found["plain"], strict=True):
        assert_within_budget(f, e, p)


def layer_norm_inputs(device: str, N: int, D: int, dtype: torch.dtype) -> Inputs:
    """x and dy (N, D), weight and bias (D,), and what torch's own gradients are called with, its mean and rstd."""
    inputs = {name: norm_inputs(device, N, D, dtype)[name] for name in ("x", "dy", "weight")}
    inputs["bias"] = inputs["weight"].flip(0)
    _, mean, torch_rstd = torch.native_layer_norm(inputs["x"], (D,), inputs["weight"], inputs["bias"], 1e-5)
    rstd = ops.layer_norm(inputs["x"], inputs["weight"], inputs["bias"], 1e-5)[1]
    settings = {"eps": 1e-5, "widen": False, "needs_dweight": True, "needs_dbias": True}
    return {**inputs, "rstd": rstd, "mean": mean, "torch_rstd": torch_rstd, **settings}


def functional_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, **_: Any) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def native_layer_norm_backward(
    dy: Tensor, x: Tensor, mean: Tensor, torch_rstd: Tensor, weight: Tensor, bias: Tensor, **_: Any
) -> Any:
    """torch's own gradients, from both statistics."""
    args = dy, x, weight.shape, mean, torch_rstd, weight, bias
    return torch.ops.aten.native_layer_norm_backward(*args, [True] * 3)


def check_layer_norm(**inputs: Any) -> None:
    """The output and all gradients within the error budget."""
    names = ("x", "weight", "bias", "eps", "widen")
    back = ("dy", "x", "rstd", "weight", "needs_dweight", "needs_dbias")
    found = *ops.layer_norm(*map(inputs.get, names)), *ops.layer_norm_backward(*map(inputs.get, back))
    wide = in_fp64(inputs)
    with ops.use_reference():
        plain = *ops.layer_norm(*map(inputs.get, names)), *ops.layer_norm_backward(*map(inputs.get, back))
        exact = *ops.layer_norm(*map(wide.get, names)), *ops.layer_norm_backward(*map(wide.get, back))
    for f, e, p in zip(found, exact, plain, strict=True):
        assert_within_budget(f, e, p)


def draw(x: Tensor, seed: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    """Row norms, inclusion probabilities and the draw: rows (k,) and scale (k,) of x (N, D)."""
    return KeepRows(KEEP_RATIO, 1, "pps").draw(x, seed)


def dense(dy: Tensor, x: Tensor, **_: Any) -> Tensor:
    return dy.t() @ x


def sampled_weight_gradient(x: Tensor, dy: Tensor, seed: Tensor, **_: Any) -> Tensor:
    """All that sampling adds to a linear layer: the draw, the gather and the product of the kept rows."""
    rows, scale = draw(x, seed)
    return ops.sampled_matmul(dy, ops.gather_rows(x, rows), rows, scale)


def product(dy: Tensor, kept: Tensor, rows: Tensor, scale: Tensor, **_: Any) -> Tensor:
    return ops.sampled_matmul(dy, kept, rows, scale)


def gather(x: Tensor, rows: Tensor, **_: Any) -> Tensor:
    return ops.gather_rows(x, rows)


def written_product(dy: Tensor, kept: Tensor, rows: Tensor, scale: Tensor, **_: Any) -> Tensor:
    """The product of the kept rows as one would write it."""
    return (dy[rows] * scale[:, None]).to(dy.dtype).t() @ kept


def check_sampled_weight_gradient(**inputs: Any) -> None:
    """The same rows as plain PyTorch draws, and their product within the error budget."""
    with ops.use_reference():
        assert_same((inputs["rows"], inputs["scale"]), draw(**inputs))
    assert_same(inputs["kept"], inputs["x"][inputs["rows"]])
    found = sampled_weight_gradient(**inputs)  # draws the same rows again, by the same seed
    assert_within_budget(found, written_product(**in_fp64(inputs)), written_product(**inputs))


def multinomial(probabilities: Tensor, k: int, replacement: bool = False, **_: Any) -> Tensor:
    return torch.multinomial(probabilities, k, replacement)


def sizes(*names: str) -> Callable[..., tuple[dict[str, Any], ...]]:
    """Makes sizes of tuples: `sizes("N", "D")((2, 3), (4, 5))`."""
    return lambda *rows: tuple(dict(zip(names, row, strict=True)) for row in rows)


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
        peers={"torch's own": torchs_activation},
        title="an activation function",
        **_ACTIVATION,
    ),
    for_op(
        "activation_backward",
        peers={"torch's own": torchs_backward},
        title="the gradient of an activation function",
        **_ACTIVATION,
    ),
    for_op(
        "gated_activation",
        peers={"as models write it": written_gated},
        title="the product in a gated MLP",
        **_ACTIVATION,
    ),
    for_op(
        "gated_activation_backward",
        peers={"act(gate) kept": kept_backward},
        title="the gradients of that product; the peer is what autograd does, which keeps act(gate)",
        **_ACTIVATION,
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
)
