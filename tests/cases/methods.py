"""The case table of the methods: every row drives `tests/test_methods.py`, and every method must have a row.

x is (..., D) with N rows; linears map D = `WIDTH` to O = `OUT`, and
feed-forward blocks have F = `HIDDEN` hidden units. Modules are made from a fixed seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memsave import (
    LinearCrossEntropyConfig,
    MethodConfig,
    RecomputeActivationConfig,
    RecomputeDropoutConfig,
    RecomputeMLPConfig,
    RecomputeNormConfig,
    WTACRSConfig,
)

from ..trees import HFRMSNorm

WIDTH, OUT, HIDDEN, CLASSES = 8, 6, 20, 40
SHAPE = (3, 40, WIDTH)


@dataclass(frozen=True)
class MethodCase:
    """One module under one or several methods.

    Attributes:
        name: what is special about this row.
        make: builds the plain module.
        configs: the methods; the table's completeness is judged by their names.
        shape: of the input.
        gradients: "exact", or "sampled" where the weight's gradient is an estimate.
        precision: the widest dtype that the plain module computes in.
        plain_when_compiled: whether a compiler gets the plain module, with exact gradients.
    """

    name: str
    make: Callable[[], nn.Module]
    configs: tuple[MethodConfig, ...]
    shape: tuple[int, ...] = SHAPE
    gradients: str = "exact"
    precision: torch.dtype = torch.float64
    plain_when_compiled: bool = False

    @property
    def id(self) -> str:
        return "+".join(config.name for config in self.configs) + "-" + self.name

    def plain(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The module as it was, with random weights."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = self.make()
            for parameter in module.parameters():
                nn.init.normal_(parameter)
        return module.to(dtype)

    def input(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """A fixed random input that requires grad; rows differ in length by orders of magnitude."""
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(self.shape, generator=generator) * torch.randn(*self.shape[:-1], 1, generator=generator).exp()
        return x.to(dtype).requires_grad_()


@dataclass(frozen=True)
class NotedCase:
    """A norm and the linears that read its output, all converted: the linears keep nothing, or only which rows.

    Attributes:
        copies: how many elements per feature the note copies (weight, bias).
        precision: the widest dtype that the plain modules compute in.
    """

    name: str
    norm: Callable[[], nn.Module]
    configs: tuple[MethodConfig, ...]
    copies: int
    linears: Sequence[Callable[[], nn.Module]] = (lambda: nn.Linear(WIDTH, OUT),)
    precision: torch.dtype = torch.float64


class OnePlusRMSNorm(HFRMSNorm):
    """Gemma's: the weight is one plus the parameter, applied before the cast."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (wide * (1.0 + self.weight.float())).type_as(x)


def conv1d() -> nn.Module:
    """GPT-2's linear, whose weight is (D, O)."""
    from transformers.pytorch_utils import Conv1D

    return Conv1D(OUT, WIDTH)


def by_name(name: str) -> Callable[[], nn.Module]:
    """An activation function of transformers."""

    def make() -> nn.Module:
        from transformers.activations import ACT2FN

        return ACT2FN[name]

    return make


def linear() -> nn.Module:
    return nn.Linear(WIDTH, OUT)


def head() -> nn.Module:
    """A head with enough classes that its logits are better lazy."""
    return nn.Linear(WIDTH, CLASSES)


def frozen() -> nn.Module:
    module = nn.Linear(WIDTH, OUT)
    module.weight.requires_grad_(False)
    return module


def sampled(**settings: Any) -> WTACRSConfig:
    return WTACRSConfig(**{"target_modules": r".*", "keep_ratio": 0.25, "min_rows": 1, **settings})


class GatedMLP(nn.Module):
    """Llama's."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.up_proj = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down_proj = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class FusedMLP(nn.Module):
    """Phi-3's: gate and up are the halves of one linear's output."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(WIDTH, 2 * HIDDEN, bias=False)
        self.down_proj = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.activation_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(up * self.activation_fn(gate))


def plain_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))


def mlp(**settings: Any) -> RecomputeMLPConfig:
    return RecomputeMLPConfig(target_modules=r"0", **settings)


def norm_then_dropout() -> nn.Module:
    return NormThenDropout(nn.LayerNorm(WIDTH), nn.Dropout(0.25))


class NormThenDropout(nn.Sequential):
    """A dropout whose output is noted, since its input is."""

    def kept_bytes(self, input_shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """Of both together, once they are converted."""
        return sum(module.kept_bytes(input_shape, dtype) for module in self)


EXACT = (RecomputeNormConfig(),)
ALL = (mlp(recompute="all"),)
SAMPLED_ALL = (mlp(recompute="all", keep_ratio=0.25, min_rows=1),)
BOTH = (RecomputeNormConfig(), sampled())
ACTIVATION = (RecomputeActivationConfig(),)
DROPOUT = (RecomputeDropoutConfig(),)
NORM_AND_DROPOUT = (RecomputeNormConfig(), RecomputeDropoutConfig())
LAZY = (LinearCrossEntropyConfig(target_modules=r".*", min_logits_bytes=0),)

CASES = [
    MethodCase("rms_norm", lambda: nn.RMSNorm(WIDTH), EXACT),
    MethodCase("rms_norm_eps", lambda: nn.RMSNorm(WIDTH, eps=1e-3), EXACT),
    MethodCase("rms_norm_without_weight", lambda: nn.RMSNorm(WIDTH, elementwise_affine=False), EXACT),
    MethodCase("hf_rms_norm", lambda: HFRMSNorm(WIDTH), EXACT, precision=torch.float32),
    MethodCase("one_plus_rms_norm", lambda: OnePlusRMSNorm(WIDTH), EXACT, precision=torch.float32),
    MethodCase("layer_norm", lambda: nn.LayerNorm(WIDTH), EXACT),
    MethodCase("layer_norm_without_bias", lambda: nn.LayerNorm(WIDTH, bias=False), EXACT),
    MethodCase("layer_norm_without_weight", lambda: nn.LayerNorm(WIDTH, elementwise_affine=False), EXACT),
    MethodCase("linear", linear, EXACT),
    MethodCase("linear_without_bias", lambda: nn.Linear(WIDTH, OUT, bias=False), EXACT),
    MethodCase("conv1d", conv1d, EXACT),
    MethodCase("one_row", linear, EXACT, shape=(WIDTH,)),
    MethodCase("gated", GatedMLP, (mlp(),)),
    MethodCase("fused", FusedMLP, (mlp(),)),
    MethodCase("plain", plain_mlp, (mlp(),)),
    MethodCase("all_gated", GatedMLP, ALL),
    MethodCase("all_fused", FusedMLP, ALL),
    MethodCase("all_plain", plain_mlp, ALL),
    MethodCase("sampled_gated", GatedMLP, SAMPLED_ALL, gradients="sampled", plain_when_compiled=True),
    MethodCase("sampled_fused", FusedMLP, SAMPLED_ALL, gradients="sampled", plain_when_compiled=True),
    MethodCase("sampled_plain", plain_mlp, SAMPLED_ALL, gradients="sampled", plain_when_compiled=True),
    MethodCase("pps", linear, (sampled(),), gradients="sampled"),
    MethodCase("wta_crs", linear, (sampled(estimator="wta_crs"),), gradients="sampled"),
    MethodCase("crs", linear, (sampled(estimator="crs"),), gradients="sampled"),
    MethodCase("sample_cache", linear, (sampled(grad_norms="sample_cache"),), gradients="sampled"),
    MethodCase(
        "saved_sample_cache", linear, (sampled(grad_norms="sample_cache", save_grad_norms=True),), gradients="sampled"
    ),
    MethodCase("without_bias", lambda: nn.Linear(WIDTH, OUT, bias=False), (sampled(),), gradients="sampled"),
    MethodCase("conv1d", conv1d, (sampled(),), gradients="sampled"),
    MethodCase("matrix", linear, (sampled(),), shape=(64, WIDTH), gradients="sampled"),
    MethodCase("four_dimensions", linear, (sampled(),), shape=(2, 4, 5, WIDTH), gradients="sampled"),
    MethodCase("default_min_rows", linear, (sampled(keep_ratio=0.01, min_rows=16),), gradients="sampled"),
    MethodCase("fewer_rows_than_min_rows", linear, (sampled(min_rows=200),)),
    MethodCase("ratio_one", linear, (sampled(keep_ratio=1),)),
    MethodCase("frozen", frozen, (sampled(),)),
    MethodCase("gelu", nn.GELU, ACTIVATION),
    MethodCase("gelu_tanh", lambda: nn.GELU(approximate="tanh"), ACTIVATION),
    MethodCase("silu", nn.SiLU, ACTIVATION),
    MethodCase("mish", nn.Mish, ACTIVATION),
    MethodCase("gelu_new", by_name("gelu_new"), ACTIVATION),
    MethodCase("quick_gelu", by_name("quick_gelu"), ACTIVATION),
    MethodCase("relu_squared", by_name("relu2"), ACTIVATION),
    MethodCase("one_row", nn.GELU, ACTIVATION, shape=(WIDTH,)),
    MethodCase("linear", linear, ACTIVATION),
    MethodCase("conv1d", conv1d, ACTIVATION),
    MethodCase("dropout", lambda: nn.Dropout(0.1), DROPOUT),
    MethodCase("matrix_dropout", lambda: nn.Dropout(0.7), DROPOUT, shape=(64, WIDTH)),
    MethodCase("dropout_of_one_row", nn.Dropout, DROPOUT, shape=(WIDTH,)),
    MethodCase("dropout_of_nothing", lambda: nn.Dropout(0.0), DROPOUT),
    MethodCase("linear", linear, DROPOUT),
    MethodCase("head", head, LAZY),
    MethodCase("head_without_bias", lambda: nn.Linear(WIDTH, CLASSES, bias=False), LAZY),
    MethodCase("head", head, (*EXACT, *LAZY)),
    MethodCase("linear", linear, BOTH, gradients="sampled"),
]

# Methods of model scope and approximate ones, which the battery of single modules does not know, and what tests them.
MODEL_SCOPE = {
    "share_mask": "tests/integrations/test_attention.py",
    "patch_conv": "tests/methods/test_patch_conv.py",
}
APPROXIMATE = {
    "flash_svd": "tests/methods/test_flash_svd.py",
    "sparse_mha": "tests/methods/test_sparse_mha.py",
    "routed_ffn": "tests/methods/test_routed_ffn.py",
}

NOTED_CASES = [
    NotedCase("rms_norm", lambda: nn.RMSNorm(WIDTH), EXACT, copies=1),
    NotedCase("rms_norm_without_weight", lambda: nn.RMSNorm(WIDTH, elementwise_affine=False), EXACT, copies=0),
    NotedCase("hf_rms_norm", lambda: HFRMSNorm(WIDTH), EXACT, copies=1, precision=torch.float32),
    NotedCase("layer_norm", lambda: nn.LayerNorm(WIDTH), EXACT, copies=2),
    NotedCase("layer_norm_without_bias", lambda: nn.LayerNorm(WIDTH, bias=False), EXACT, copies=1),
    NotedCase("conv1d", lambda: nn.LayerNorm(WIDTH), EXACT, copies=2, linears=(conv1d,)),
    NotedCase("three_linears", lambda: nn.RMSNorm(WIDTH), EXACT, copies=1, linears=(linear, linear, linear)),
    NotedCase("rms_norm", lambda: nn.RMSNorm(WIDTH), BOTH, copies=1),
    NotedCase("layer_norm", lambda: nn.LayerNorm(WIDTH), BOTH, copies=2),
    NotedCase("three_linears", lambda: nn.RMSNorm(WIDTH), BOTH, copies=1, linears=(linear, linear, linear)),
    NotedCase("gelu", nn.GELU, ACTIVATION, copies=0),
    NotedCase("silu", nn.SiLU, ACTIVATION, copies=0, linears=(linear, linear)),
    NotedCase("gelu_new_conv1d", by_name("gelu_new"), ACTIVATION, copies=0, linears=(conv1d,)),
    NotedCase("relu_squared", by_name("relu2"), ACTIVATION, copies=0),
    NotedCase("gelu", nn.GELU, (*ACTIVATION, sampled()), copies=0),
    NotedCase("dropout", norm_then_dropout, NORM_AND_DROPOUT, copies=2),
]
