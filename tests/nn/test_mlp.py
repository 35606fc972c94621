"""Feed-forward blocks: which are recognized, what they keep, in chunks and whole, with adapters, hooks and dropout."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import memsave
from memsave import RecomputeMLPConfig, RecomputeNormConfig
from memsave.nn import mlp
from memsave.nn.mlp_graph import NoMatch, looks_like_mlp, mlp_graph
from memsave.ops.activation import Activation

from ..cases.methods import FusedMLP, GatedMLP, plain_mlp
from .helpers import assert_same

D, HIDDEN = 8, 20
SHAPE = (3, 40, D)
ALL = RecomputeMLPConfig(recompute="all")
ELEMENTWISE = RecomputeMLPConfig()
modes = pytest.mark.parametrize("config", [ELEMENTWISE, ALL], ids=["elementwise", "all"])


class WithDropout(nn.Module):
    """T5's gated block, and a dropout at its end."""

    def __init__(self, p: float = 0.25) -> None:
        super().__init__()
        self.wi_0, self.wi_1 = nn.Linear(D, HIDDEN), nn.Linear(D, HIDDEN)
        self.wo = nn.Linear(HIDDEN, D)
        self.dropout, self.last = nn.Dropout(p), nn.Dropout(p)
        self.act = nn.GELU(approximate="tanh")

    def forward(self, hidden_states: Tensor) -> Tensor:
        h = self.dropout(self.act(self.wi_0(hidden_states)) * self.wi_1(hidden_states))
        if isinstance(self.wo.weight, Tensor) and h.dtype != self.wo.weight.dtype:
            h = h.to(self.wo.weight.dtype)
        return self.last(self.wo(h))


class Functional(nn.Module):
    """A plain block whose activation is a function, with an unused option, and up before gate in a product."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(D, HIDDEN), nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, D)
        self.gated = gated

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        if scale is not None:
            x = x * scale
        h = self.up(x) * F.silu(self.gate(x)) if self.gated else F.gelu(self.up(x), approximate="tanh")
        return self.down(h)


class Shared(GatedMLP):
    """Not a block: one linear's output is used twice."""

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        return self.down_proj(self.act_fn(gate) * gate)


class Residual(GatedMLP):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Branching(GatedMLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


class Scaled(GatedMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * 2.0)


class Attention(nn.Module):
    """Not a block, with the children of one: queries, keys and values as BERT has them."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(D, D) for _ in range(3))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(F.softmax(self.query(x) @ self.key(x).mT, -1)) @ self.value(x)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "gated": GatedMLP,
    "fused": FusedMLP,
    "plain": plain_mlp,
    "functional": lambda: Functional(False),
    "functional_gated": lambda: Functional(True),
    "dropout": WithDropout,
    "squared_relu": lambda: nn.Sequential(nn.Linear(D, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, D), nn.Dropout(0.1)),
}
blocks = pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS.keys())


def converted(module: nn.Module, *configs: memsave.MethodConfig) -> Any:
    module = copy.deepcopy(module)
    memsave.convert_model(nn.Sequential(module), configs)
    return module


def gradients(module: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    """Output, the input's gradient and all parameters' gradients, with fixed random numbers."""
    module.zero_grad()
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(3)
    y = (run or module)(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype))
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad for p in module.parameters() if p.grad is not None)]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 7 rows, which do not divide 120."""
    monkeypatch.setitem(mlp.CHUNK_BYTES, "cpu", 1)
    monkeypatch.setattr(mlp, "MIN_CHUNK_ROWS", 7)


def test_what_a_block_computes_is_read_from_its_forward() -> None:
    gated, fused, plain = mlp_graph(GatedMLP()), mlp_graph(FusedMLP()), mlp_graph(plain_mlp())
    assert (gated.linears, gated.down, gated.gate, gated.gated) == (("gate_proj", "up_proj"), "down_proj", 0, True)
    assert (fused.linears, fused.fused, fused.gate, fused.activation) == (("gate_up_proj",), True, 0, Activation.SILU)
    assert (plain.linears, plain.down, plain.activation, plain.gated) == (("0",), "2", Activation.GELU, False)
    with_dropout = mlp_graph(WithDropout())
    assert (with_dropout.dropout, with_dropout.trailing, with_dropout.act) == ("dropout", "last", ("act", "GELU"))
    assert with_dropout.activation is Activation.GELU_TANH
    functional = mlp_graph(Functional(True))
    assert (functional.linears, functional.gate, functional.act) == (("up", "gate"), 1, None)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Shared(), "more than once"),
        (Residual(), "where a linear is expected"),
        (Branching(), "cannot be traced"),
        (Scaled(), "multiplies by something"),
        (nn.Sequential(nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, D)), "is not an activation"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_forward_that_does_anything_else_is_named(module: nn.Module, reason: str) -> None:
    assert looks_like_mlp(module)
    with pytest.raises(NoMatch, match=reason):
        mlp_graph(module)
    report = memsave.convert_model(nn.Sequential(module))
    assert reason in str(report)
    assert "recompute_mlp" not in {row.method for row in report.rows if row.names == ("0",)}


def test_what_has_other_children_is_no_candidate() -> None:
    assert not looks_like_mlp(nn.TransformerEncoderLayer(D, 2))
    assert not looks_like_mlp(nn.Sequential(nn.Linear(D, D), nn.Tanh()))
    assert not looks_like_mlp(nn.Linear(D, D))


def test_attention_with_the_children_of_a_block_is_no_candidate() -> None:
    assert not looks_like_mlp(Attention())
    square = Functional(True)
    square.gate, square.up, square.down = (nn.Linear(D, D) for _ in range(3))
    assert looks_like_mlp(square)


@modes
@blocks
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_function_gradients_and_random_stream_are_the_plain_ones(
    make: Callable[[], nn.Module], config: RecomputeMLPConfig, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    plain, x = make().to(dtype), torch.randn(SHAPE).to(dtype)
    expected = gradients(plain, x)
    state = torch.get_rng_state()
    ours = gradients(converted(plain, config), x)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(ours, expected, ulps=64)


@blocks
def test_chunks_change_nothing_but_rounding(make: Callable[[], nn.Module], small_chunks: None) -> None:
    torch.manual_seed(0)
    plain, x = make().double(), torch.randn(SHAPE, dtype=torch.float64)
    module = converted(plain, ALL)
    assert_same(gradients(module, x), gradients(plain, x), ulps=64)
    with torch.no_grad():
        assert_same([module.eval()(x)], [plain.eval()(x)], ulps=16)
        assert_same([module(x.transpose(0, 1))], [plain(x.transpose(0, 1))], ulps=16)
        assert module(x[:0]).shape == (0, 40, D)


def test_bf16_sums_over_chunks_are_as_good_as_the_plain_product(small_chunks: None) -> None:
    torch.manual_seed(0)
    plain, x = GatedMLP().bfloat16(), torch.randn(16, 40, D).bfloat16()
    truth = gradients(copy.deepcopy(plain).double(), x.double())
    ours, theirs = gradients(converted(plain, ALL), x), gradients(plain, x)
    for mine, other, right in zip(ours, theirs, truth, strict=True):
        assert (mine - right).norm() <= 2 * (other - right).norm()


@modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_behind_a_norm_only_the_preactivations_are_kept_or_nothing(
    config: RecomputeMLPConfig, dtype: torch.dtype
) -> None:
    model: Any = nn.Sequential(nn.RMSNorm(D), GatedMLP()).to(dtype)
    memsave.convert_model(model, [RecomputeNormConfig(), config])
    x = torch.randn(SHAPE).to(dtype).requires_grad_()
    norm, block = model
    kept = memsave.saved_bytes(lambda: model(x))
    preactivations = 2 * HIDDEN * 120 * dtype.itemsize if config is ELEMENTWISE else 0
    assert block.kept_bytes(SHAPE, dtype, noted=True) == preactivations
    assert kept == norm.kept_bytes(SHAPE, dtype) + preactivations + D * dtype.itemsize  # the note's copy of the weight


@pytest.mark.parametrize("backward", [False, True], ids=["no_grad", "all"])
def test_temporary_bytes_do_not_grow_with_the_rows(backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(mlp.CHUNK_BYTES, "cpu", 1)
    monkeypatch.setattr(mlp, "MIN_CHUNK_ROWS", 64)
    block = converted(GatedMLP(), ALL)

    def temporary_bytes(num_rows: int) -> int:
        """What the peak has beyond the input, the output and the input's gradient."""
        x = torch.randn(num_rows, D, requires_grad=backward)

        def run() -> None:
            with torch.set_grad_enabled(backward):
                y = block(x)
            if backward:
                y.backward(torch.ones_like(y))

        run()
        x.grad = None
        block.zero_grad()
        return memsave.measure(run).peak_bytes - num_rows * D * 4 * (4 if backward else 2)

    assert temporary_bytes(4096) <= temporary_bytes(1024) + 64
    assert temporary_bytes(4096) < 4096 * HIDDEN * 4


@modes
def test_adapters_in_a_block_train(config: RecomputeMLPConfig, small_chunks: None) -> None:
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=2, target_modules=["gate_proj", "down_proj"], lora_dropout=0.3, init_lora_weights=False)
    plain = peft.inject_adapter_in_model(lora, nn.Sequential(GatedMLP()))
    model = copy.deepcopy(plain)
    report = memsave.convert_model(model, config)
    assert ("recompute_mlp", ("0",)) in {(row.method, row.names) for row in report.rows}
    x = torch.randn(SHAPE)
    ours, expected = gradients(model, x), gradients(plain, x)
    assert len(ours) == 2 + 4
    assert_same(ours, expected, ulps=64)
    memsave.convert_model(model)
    assert_same(gradients(model, x), expected, ulps=64)


@modes
def test_hooks_of_children_run(config: RecomputeMLPConfig, small_chunks: None) -> None:
    """Those of a linear see whole tensors; those of the activation too, so the original forward runs."""
    seen: list[torch.Size] = []

    def doubled(child: nn.Module, args: object, y: Tensor) -> Tensor:
        seen.append(y.shape)
        return 2 * y

    for name in ("gate_proj", "act_fn"):
        plain = GatedMLP()
        module, x = converted(plain, config), torch.randn(SHAPE)
        for block in (module, plain):
            getattr(block, name).register_forward_hook(doubled)
        assert_same(gradients(module, x), gradients(plain, x), ulps=64)
    assert set(seen) == {(3, 40, HIDDEN)}


def test_gradient_hooks_of_parameters_run_once() -> None:
    plain = GatedMLP()
    module, x = converted(plain, ALL), torch.randn(SHAPE)
    for block in (module, plain):
        block.up_proj.weight.register_hook(lambda grad: 2 * grad)
    assert_same(gradients(module, x), gradients(plain, x), ulps=64)


@modes
def test_an_activation_that_was_replaced_is_used(config: RecomputeMLPConfig) -> None:
    plain = GatedMLP()
    module, x = converted(plain, config), torch.randn(SHAPE)
    for block in (module, plain):
        block.act_fn = nn.GELU()
    assert_same(gradients(module, x), gradients(plain, x), ulps=64)


@modes
@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing(config: RecomputeMLPConfig, reentrant: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.RMSNorm(D), WithDropout())
    model, x = copy.deepcopy(plain), torch.randn(SHAPE)
    memsave.convert_model(model, [RecomputeNormConfig(), config])
    ours = gradients(model, x, lambda x: checkpoint(model, x, use_reentrant=reentrant))
    assert_same(ours, gradients(plain, x), ulps=64)


@modes
def test_under_autocast_and_offloading(config: RecomputeMLPConfig) -> None:
    plain, x = GatedMLP(), torch.randn(SHAPE)
    module = converted(plain, config)

    def autocast(block: nn.Module) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return block(x)

        return run

    ours, theirs = gradients(module, x, autocast(module)), gradients(plain, x, autocast(plain))
    truth = gradients(plain, x)
    assert ours[0].dtype == theirs[0].dtype == torch.bfloat16
    for mine, other, right in zip(ours, theirs, truth, strict=True):
        assert (mine - right).norm() <= 2 * (other - right).norm()
    with torch.autograd.graph.save_on_cpu():
        assert_same(gradients(module, x), truth, ulps=64)


def test_a_weight_that_changes_before_backward_is_an_error() -> None:
    module = converted(GatedMLP(), ALL)
    y = module(torch.randn(SHAPE))
    with torch.no_grad():
        module.up_proj.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_other_parameters_in_backward_are_an_error() -> None:
    module = converted(GatedMLP(), ALL)
    others = {name: torch.randn_like(p).requires_grad_() for name, p in module.named_parameters()}
    y = torch.func.functional_call(module, others, (torch.randn(SHAPE),))
    with pytest.raises(RuntimeError, match="other parameters now than in forward"):
        y.sum().backward()


def test_frozen_and_partly_frozen_blocks() -> None:
    for frozen in (["gate_proj"], ["up_proj", "down_proj"], ["gate_proj", "up_proj", "down_proj"]):
        plain = GatedMLP()
        for name in frozen:
            getattr(plain, name).requires_grad_(False)
        x = torch.randn(SHAPE)
        ours, expected = gradients(converted(plain, ALL), x), gradients(plain, x)
        assert len(ours) == 2 + 3 - len(frozen)
        assert_same(ours, expected, ulps=64)


def test_gradients_accumulate_and_a_second_backward_works() -> None:
    plain, x = GatedMLP(), torch.randn(SHAPE)
    module = converted(plain, ALL)
    for block in (plain, module):
        y = block(x).square().sum()
        y.backward(retain_graph=True)
        y.backward()
    assert_same([p.grad for p in module.parameters()], [p.grad for p in plain.parameters()], ulps=64)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        x.requires_grad_()
        (dx,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        dx.sum().backward()


def test_a_block_without_rows_gives_zeros_for_gradients() -> None:
    """As plain linears do: experts, and the blocks of a kind of token that a batch lacks, are called so."""
    model = nn.Sequential(plain_mlp())
    memsave.convert_model(model, RecomputeMLPConfig(recompute="all"))
    width = next(model.parameters()).shape[1]
    x = torch.randn(0, width, requires_grad=True)
    model(x).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    assert x.grad is not None and x.grad.shape == x.shape
