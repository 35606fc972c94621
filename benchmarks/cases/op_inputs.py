"""What the benchmark cases of the ops are called with, what a user would write instead, and how results are checked.

N rows, D input and O output features, V classes, k = KEEP_RATIO * N kept rows. Inputs have fixed seeds.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memsave import ops
from memsave.nn.rows import KeepRows
from memsave.ops.activation import Activation
from memsave.ops.rms_norm import Style
from tests.harness import assert_same, assert_within_budget

from .op_case import Inputs, in_fp64

KEEP_RATIO = 0.3
CHECKED_ROWS = 64
GATHERED_ENTRIES = 1024


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


def masked_entries(device: str, N: int, R: int, C: int, dtype: torch.dtype, density: float) -> Inputs:
    """a (N, R) and b (N, C), and a share of the entries of their R x C product: indices (K,), drawn from all."""
    generator = _generator(device)
    a = torch.randn(N, R, generator=generator, device=device, dtype=dtype)
    b = torch.randn(N, C, generator=generator, device=device, dtype=dtype)
    drawn = torch.randperm(R * C, generator=generator, device=device)[: round(density * R * C)]
    return {"a": a, "b": b, "indices": drawn.sort().values.to(torch.int32)}


def entries_of_dense(a: Tensor, b: Tensor, indices: Tensor, **_: Any) -> Tensor:
    """The dense product, then its entries."""
    return (a.t() @ b).view(-1)[indices]


def products_of_columns(a: Tensor, b: Tensor, indices: Tensor, **_: Any) -> Tensor:
    """The two columns of each entry gathered, some entries at a time: those of all would take gigabytes."""
    rows, columns = indices // b.shape[1], indices % b.shape[1]
    parts = zip(rows.split(GATHERED_ENTRIES), columns.split(GATHERED_ENTRIES), strict=True)
    return torch.cat([(a[:, r] * b[:, c]).sum(0) for r, c in parts])


def sparse_matrix(device: str, N: int, R: int, C: int, dtype: torch.dtype, density: float, transposed: bool) -> Inputs:
    """x (N, C) or (N, R), and a share of the entries of an R x C matrix: as `spmm` takes it, in CSR and dense.

    CSR is of S^T for x S, and in float32 on the CPU, where torch has no other product.
    """
    entries = masked_entries(device, 1, R, C, dtype, density)["indices"]
    generator = _generator(device, 1)
    x = torch.randn(N, C if transposed else R, generator=generator, device=device, dtype=dtype)
    values = torch.randn(len(entries), generator=generator, device=device, dtype=dtype)
    dense = x.new_zeros(R * C).index_put((entries,), values).view(R, C)
    turned = dense if transposed else dense.t()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        csr = (turned.float() if device == "cpu" else turned).to_sparse_csr()
    sizes = {"rows": R, "columns": C, "transposed": transposed}
    return {"x": x, "values": values, "indices": entries, **sizes, "csr": csr, "matrix": dense}


def low_rank_block(
    device: str,
    N: int,
    F: int,
    R1: int,
    R: int,
    dtype: torch.dtype,
    activation: str,
    gated: bool,
) -> Inputs:
    """p_gate (N, R1), expand_gate (F, R1), bias_gate (F,) of a plain block; p_up and expand_up of a gated one, which
    has no biases, with R2 = R1; reduce_down (R, F)."""
    generator = _generator(device)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, device=device)).to(dtype)

    inputs: Inputs = {"p_gate": normal(N, R1), "expand_gate": normal(F, R1, scale=R1**-0.5)}
    inputs |= {"bias_gate": None if gated else normal(F), "bias_up": None}
    inputs |= {"p_up": normal(N, R1) if gated else None}
    inputs |= {"expand_up": normal(F, R1, scale=R1**-0.5) if gated else None}
    return inputs | {"reduce_down": normal(R, F, scale=F**-0.5), "kind": int(Activation[activation.upper()])}


def written_low_rank_block(
    p_gate: Tensor,
    expand_gate: Tensor,
    bias_gate: Tensor | None,
    p_up: Tensor | None,
    expand_up: Tensor | None,
    reduce_down: Tensor,
    kind: int,
    **_: Any,
) -> Tensor:
    """As models write it: the hidden activations of all rows are there."""
    gate = F.linear(p_gate, expand_gate, bias_gate)
    h = F.silu(gate) if kind == Activation.SILU else F.gelu(gate)
    return F.linear(h if p_up is None or expand_up is None else h * F.linear(p_up, expand_up), reduce_down)


def csr_product(x: Tensor, csr: Tensor, **_: Any) -> Tensor:
    """torch's product of a matrix in CSR, which was made before."""
    return torch.sparse.mm(csr, x.t().to(csr.dtype)).t().to(x.dtype).contiguous()


def product_with_dense(x: Tensor, matrix: Tensor, transposed: bool, **_: Any) -> Tensor:
    return x @ (matrix.t() if transposed else matrix)


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
