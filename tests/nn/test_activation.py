"""Activation functions: recognized by what they compute, the same gradients as torch's, one tensor kept.

x, gate and up are (B, T, F).
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import memsave
from memsave.nn.activation import activate, gated
from memsave.nn.activation_kind import activation_of, activation_of_function
from memsave.ops.activation import Activation
from tests.cases.ops.activation import plain as plain_activation

from .helpers import assert_same

kinds = pytest.mark.parametrize("kind", Activation, ids=lambda kind: kind.name)
SHAPE = (2, 5, 7)


def numbers(*shape: int, dtype: torch.dtype = torch.float64, value: int = 0) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(value), dtype=torch.float64).to(dtype)


class OtherActivation(nn.Module):
    """A class with a forward given as a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class HalfSiLU(nn.SiLU):
    """A SiLU by its class, not by what it computes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


@pytest.mark.parametrize(
    "make, expected",
    [
        (nn.SiLU, Activation.SILU),
        (nn.GELU, Activation.GELU),
        (lambda: nn.GELU(approximate="tanh"), Activation.GELU_TANH),
        (nn.ReLU, Activation.RELU),
        (nn.Mish, Activation.MISH),
        (lambda: OtherActivation(lambda x: x * torch.sigmoid(1.702 * x)), Activation.QUICK_GELU),
        (lambda: OtherActivation(lambda x: F.relu(x) ** 2), Activation.RELU_SQUARED),
        (lambda: OtherActivation(lambda x: x * torch.sigmoid(1.7 * x)), None),
        (lambda: OtherActivation(lambda x: F.gelu(x).clamp(-10, 10)), None),
        (lambda: OtherActivation(lambda x: F.silu(x.float())), None),
        (lambda: OtherActivation(lambda x: F.silu(x.float()).to(x.dtype)), None),
        (lambda: OtherActivation(lambda x: F.silu(x).sum()), None),
        (HalfSiLU, None),
        (nn.ReLU6, None),
        (nn.LeakyReLU, None),
        (nn.PReLU, None),
        (nn.Identity, None),
    ],
)
def test_a_module_is_recognized_by_what_it_computes(make: Callable[[], nn.Module], expected: Activation | None) -> None:
    assert activation_of(make()) is expected


@pytest.mark.parametrize(
    "name, expected",
    [
        ("gelu", Activation.GELU),
        ("gelu_python", Activation.GELU),
        ("gelu_new", Activation.GELU_TANH),
        ("gelu_fast", Activation.GELU_TANH),
        ("gelu_accurate", Activation.GELU_TANH),
        ("gelu_pytorch_tanh", Activation.GELU_TANH),
        ("quick_gelu", Activation.QUICK_GELU),
        ("silu", Activation.SILU),
        ("swish", Activation.SILU),
        ("mish", Activation.MISH),
        ("relu2", Activation.RELU_SQUARED),
        ("gelu_10", None),
        ("laplace", None),
        ("linear", None),
    ],
)
def test_activations_of_transformers_are_recognized(name: str, expected: Activation | None) -> None:
    activations = pytest.importorskip("transformers.activations", reason="the modules come from transformers")
    assert activation_of(activations.ACT2FN[name]) is expected


def test_recognition_leaves_the_random_state_alone_and_works_among_fake_tensors() -> None:
    before = torch.get_rng_state()
    with FakeTensorMode(), torch.device("meta"):
        assert activation_of(nn.RReLU()) is None
        assert activation_of(OtherActivation(F.mish)) is Activation.MISH
    assert torch.equal(torch.get_rng_state(), before)


def test_functions_are_recognized_with_their_keywords() -> None:
    assert activation_of_function(F.gelu, {}) is Activation.GELU
    assert activation_of_function(F.gelu, {"approximate": "tanh"}) is Activation.GELU_TANH
    assert activation_of_function(F.silu, {"inplace": False}) is Activation.SILU
    assert {activation_of_function(f, {}) for f in (torch.relu, F.relu, "relu")} == {Activation.RELU}
    assert activation_of_function(F.softmax, {"dim": -1}) is None


@kinds
def test_activate_has_the_gradients_of_autograd(kind: Activation) -> None:
    x = numbers(*SHAPE).requires_grad_()
    ours, expected = activate(x, kind), plain_activation(x, kind)
    upstream = numbers(*SHAPE, value=1)
    found = [torch.autograd.grad(y, x, upstream)[0] for y in (ours, expected)]
    assert_same([ours, found[0]], [expected, found[1]], ulps=16)
    assert torch.autograd.gradcheck(lambda x: activate(x, kind), x)


@kinds
@pytest.mark.parametrize("fused", [False, True])
def test_gated_has_the_gradients_of_autograd(kind: Activation, fused: bool) -> None:
    both = numbers(*SHAPE[:-1], 2 * SHAPE[-1]).requires_grad_()
    gate, up = both.chunk(2, dim=-1) if fused else (half.contiguous() for half in both.chunk(2, dim=-1))
    ours, expected = gated(gate, up, kind), plain_activation(gate, kind) * up
    upstream = numbers(*SHAPE, value=1)
    found = [torch.autograd.grad(h, both, upstream, retain_graph=True)[0] for h in (ours, expected)]
    assert_same([ours, found[0]], [expected, found[1]], ulps=16)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gated_in_other_types_is_as_close_to_float64_as_torch(kind: Activation, dtype: torch.dtype) -> None:
    inputs = [numbers(3, 257, dtype=dtype, value=value).requires_grad_() for value in (0, 1)]
    upstream = numbers(3, 257, dtype=dtype, value=2)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    ours = torch.autograd.grad(gated(*inputs, kind), inputs, upstream)
    plain = torch.autograd.grad(plain_activation(inputs[0], kind) * inputs[1], inputs, upstream)
    exact = torch.autograd.grad(plain_activation(wide[0], kind) * wide[1], wide, upstream.double())
    for mine, theirs, right in zip(ours, plain, exact, strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - right).norm() <= 2 * (theirs.double() - right).norm()


def test_what_is_kept() -> None:
    x, gate, up = (numbers(*SHAPE, value=value).requires_grad_() for value in range(3))
    fused = numbers(*SHAPE[:-1], 2 * SHAPE[-1]).requires_grad_()
    each = x.nbytes
    linear = nn.Linear(SHAPE[-1], 3).double()
    memsave.convert_model(nn.Sequential(linear))
    assert memsave.saved_bytes(lambda: linear(activate(x, Activation.GELU_TANH))) == each
    assert memsave.saved_bytes(lambda: linear(gated(gate, up, Activation.SILU))) == 2 * each
    assert memsave.saved_bytes(lambda: linear(gated(*fused.chunk(2, dim=-1), Activation.SILU))) == 2 * each
    with torch.no_grad():
        assert memsave.saved_bytes(lambda: gated(gate, up, Activation.SILU)) == 0


def test_no_grad_allocates_the_output_alone() -> None:
    gate, up = (numbers(64, 256, dtype=torch.float32, value=value) for value in range(2))
    inputs = gate.nbytes + up.nbytes

    def run() -> None:
        with torch.no_grad():
            gated(gate, up, Activation.SILU)

    assert memsave.measure(run).peak_bytes - inputs <= gate.nbytes


def test_autocast_leaves_the_dtype_of_the_input() -> None:
    gate, up = (numbers(*SHAPE, dtype=torch.float32, value=value).requires_grad_() for value in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        h = gated(gate, up, Activation.SILU)
        assert h.dtype == torch.float32
        h.sum().backward()
    assert gate.grad is not None and gate.grad.dtype == torch.float32


def test_activations_that_gain_nothing_or_work_in_place_are_left_alone() -> None:
    model = nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.SiLU(inplace=True), nn.Linear(8, 4), nn.GELU()
    )
    report = memsave.convert_model(model, memsave.RecomputeActivationConfig())
    assert [type(m).__name__ for m in model] == [
        *("MemsaveLinear", "ReLU", "MemsaveLinear", "SiLU", "MemsaveLinear", "MemsaveGELU")
    ]
    assert "works in place" in str(report)


class Feed(nn.Module):
    """fc1 -> activation -> fc2, written inline as encoder layers do."""

    def __init__(self, activation: nn.Module, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.activation, self.fc2 = nn.Linear(width, inner), activation, nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


@pytest.mark.parametrize("name, plain_tensors", [("gelu", 2), ("gelu_new", 5), ("silu", 2), ("relu2", 2)])
def test_fc1_activation_fc2_keeps_one_wide_tensor(name: str, plain_tensors: int) -> None:
    activations = pytest.importorskip("transformers.activations", reason="the modules come from transformers")
    width, inner, tokens = 8, 32, 24
    plain = Feed(activations.ACT2FN[name], width, inner)
    model = copy.deepcopy(plain)
    memsave.convert_model(model, memsave.RecomputeActivationConfig())
    x = numbers(2, tokens // 2, width, dtype=torch.float32).requires_grad_()
    assert memsave.saved_bytes(lambda: model(x)) == 4 * tokens * (width + inner)
    assert memsave.saved_bytes(lambda: plain(x)) == 4 * tokens * (width + plain_tensors * inner)


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(16, 2, 64, dropout=0.0, activation=nn.GELU(), batch_first=True)


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="the model comes from transformers")
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 1}
    config = transformers.BertConfig(
        vocab_size=9, hidden_act="gelu_new", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes
    )
    return transformers.BertModel(config, add_pooling_layer=False).encoder


def whisper() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="the model comes from transformers")
    module = pytest.importorskip("transformers.models.whisper.modeling_whisper", reason="the layer comes from there")
    config = transformers.WhisperConfig(
        d_model=16, encoder_attention_heads=2, encoder_ffn_dim=64, dropout=0.0, activation_function="gelu"
    )
    return module.WhisperEncoderLayer(config)


def all_gradients(y: Tensor, x: Tensor, model: nn.Module) -> list[Tensor]:
    """y, the input's gradient, and those of all parameters as one vector: some of them are zero but for rounding."""
    dx, *others = torch.autograd.grad(y.sin().sum(), [x, *model.parameters()])
    return [y, dx, torch.cat([grad.flatten() for grad in others])]


@pytest.mark.parametrize("make, wide_tensors", [(encoder_layer, 1), (bert, 4), (whisper, 1)])
def test_layers_with_an_inline_mlp_free_what_the_activation_kept(
    make: Callable[[], nn.Module], wide_tensors: int
) -> None:
    torch.manual_seed(0)
    plain = make()
    model = copy.deepcopy(plain)
    memsave.convert_model(model, memsave.RecomputeActivationConfig())
    x = numbers(2, 12, 16, dtype=torch.float32).requires_grad_()
    arguments = (None,) if "Whisper" in type(plain).__name__ else ()

    def output(model: nn.Module) -> Tensor:
        found = model(x, *arguments)
        return found if isinstance(found, Tensor) else found[0]

    freed = memsave.saved_bytes(lambda: output(plain)) - memsave.saved_bytes(lambda: output(model))
    assert freed == 4 * 24 * 64 * wide_tensors
    for results in zip(*(all_gradients(output(m), x, m) for m in (model, plain)), strict=True):
        assert_same([results[0]], [results[1]], ulps=64)
