"""What SHiRA keeps for backward and needs at its peak, in bytes: the input alone, whatever the weight's size."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import memsave

from .shira import LINEARS, WIDTH, adapted, compiled, config, layers, llama, one, tokens, values

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
SHAPE = (3, 20, WIDTH)


def kept(model: nn.Module, x: Tensor) -> int:
    return memsave.saved_bytes(lambda: model(x))


@dtypes
@pytest.mark.parametrize("kind", LINEARS)
def test_the_input_is_kept_and_nothing_else(kind: str, dtype: torch.dtype) -> None:
    model, layer = one(LINEARS[kind]().to(dtype))
    x = torch.randn(SHAPE).to(dtype).requires_grad_()
    assert kept(model, x) == layer.kept_bytes(SHAPE, dtype) == x.nbytes
    with torch.no_grad():
        assert kept(model, x) == 0


@dtypes
@pytest.mark.parametrize("kind", LINEARS)
def test_sampled_rows_are_kept(kind: str, dtype: torch.dtype) -> None:
    model, layer = one(LINEARS[kind]().to(dtype), keep_ratio=0.4)
    x = torch.randn(SHAPE).to(dtype).requires_grad_()
    k = 24
    assert kept(model, x) == layer.kept_bytes(SHAPE, dtype) == k * 8 + (k + 1) * WIDTH * dtype.itemsize
    model.eval()
    assert kept(model, x) == layer.kept_bytes(SHAPE, dtype) == x.nbytes


def test_bytes_do_not_depend_on_the_weight() -> None:
    """Nor on how many values are trained."""
    x = torch.randn(SHAPE, requires_grad=True)
    found = [kept(one(nn.Linear(WIDTH, outputs), density=d)[0], x) for outputs in (8, 16, 512) for d in (0.01, 1.0)]
    assert set(found) == {x.nbytes}


def test_two_active_adapters_keep_one_input() -> None:
    model, layer = one(nn.Linear(WIDTH, 8))
    model.add_adapter("other", config(seed=4))
    model.base_model.set_adapter(["default", "other"])
    x = torch.randn(SHAPE, requires_grad=True)
    assert kept(model, x) == layer.kept_bytes(SHAPE, torch.float32) == x.nbytes


class Fan(nn.Module):
    """Linears that read one tensor, with nothing between that keeps anything; with a norm in front, if asked."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH) if norm else None
        self.q, self.k, self.v = (nn.Linear(WIDTH, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.norm is None else self.norm(x)
        return self.q(y) + self.k(y) + self.v(y)


@pytest.mark.parametrize("keep_ratio", [1.0, 0.4])
def test_siblings_keep_one_input(keep_ratio: float) -> None:
    model = adapted(Fan(norm=False), keep_ratio=keep_ratio)
    x = torch.randn(SHAPE, requires_grad=True)
    assert kept(model, x) == layers(model)[0].kept_bytes(SHAPE, torch.float32)


@pytest.mark.parametrize("keep_ratio", [1.0, 0.4])
def test_beside_a_note_nothing_of_the_input_is_kept(keep_ratio: float) -> None:
    """The norm's input is all there is; of sampled rows their numbers and weights are left."""
    model = adapted(Fan(norm=True), keep_ratio=keep_ratio)
    x = torch.randn(SHAPE, requires_grad=True)
    plain = kept(model, x)
    memsave.convert_model(model.base_model.model, memsave.RecomputeNormConfig())
    ours = kept(model, x)
    norm = model.base_model.model.norm
    layer = layers(model)[0]
    copies = WIDTH * 4
    expected = layer.kept_bytes(SHAPE, torch.float32, noted=True)
    assert expected == (0 if keep_ratio == 1 else 24 * 8 + WIDTH * 4)
    assert ours == norm.kept_bytes(SHAPE, torch.float32) + copies + expected < plain


BUDGET = {"r": 1, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}


def variants(model: nn.Module, targets: Any = None) -> dict[str, Any]:
    """The same model with adapters of one budget."""
    settings = {**BUDGET, "target_modules": targets or BUDGET["target_modules"]}
    return {
        "ours": peft.get_peft_model(copy.deepcopy(model), memsave.SHiRAConfig(**settings)),
        "lora": peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings), autocast_adapter_dtype=False),
        "shira": peft.get_peft_model(copy.deepcopy(model), peft.ShiraConfig(**settings), autocast_adapter_dtype=False),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_llama_keeps_less_than_with_lora_and_far_less_than_with_pefts_shira(dtype: torch.dtype) -> None:
    models = variants(llama(hidden_size=32, intermediate_size=64).to(dtype))
    counts = {name: sum(p.numel() for p in m.parameters() if p.requires_grad) for name, m in models.items()}
    assert len(set(counts.values())) == 1
    bytes_ = {name: memsave.saved_bytes(lambda m=m: m(**tokens(count=8)).loss) for name, m in models.items()}
    assert bytes_["ours"] < bytes_["lora"]
    assert bytes_["ours"] < 0.7 * bytes_["shira"]


class Deep(nn.Module):
    """Nothing but linears, with weights that are much larger than the activations."""

    def __init__(self, width: int = 192, depth: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """A steady training step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    dy = torch.randn(x.shape)

    def run() -> None:
        model(x).backward(dy)
        optimizer.step()
        optimizer.zero_grad()

    run()
    return run


def test_the_peak_is_below_those_of_lora_and_pefts_shira() -> None:
    x = torch.randn(48, 192)
    models = variants(Deep(depth=6), r".*layers\.\d")
    peaks = {name: memsave.measure(step(model, x)).peak_bytes for name, model in models.items()}
    assert peaks["ours"] <= 0.6 * peaks["shira"]
    assert peaks["ours"] < peaks["lora"]


def test_no_gradient_of_a_whole_weight_is_ever_made() -> None:
    """All that a step allocates, together, is far smaller than one weight; the optimizer's step writes it in place."""
    model = variants(Deep(width=256), r".*layers\.\d")["ours"]
    x = torch.randn(4, 256)
    profile = memsave.measure(step(model, x))
    assert profile.saved_bytes == 4 * x.nbytes
    assert profile.peak_bytes - profile.baseline_bytes < 256 * 256 * 4 / 4


@pytest.mark.parametrize("keep_ratio", [1.0, 0.4])
def test_the_output_is_the_linears_own(keep_ratio: float) -> None:
    """Nothing is added to it and nothing is copied."""
    model, layer = one(nn.Linear(WIDTH, 8), keep_ratio=keep_ratio)
    places: list[int] = []
    layer.base_layer.register_forward_hook(lambda module, args, y: places.append(y.data_ptr()))
    y = model(torch.randn(SHAPE))
    assert places == [y.data_ptr()] and y.requires_grad


def test_values_and_their_optimizer_are_all_that_is_trained() -> None:
    model, layer = one(nn.Linear(64, 64), density=0.01)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained == values(model) and trained[0].shape == (41,)
    assert sum(b.nbytes for b in model.buffers()) == 41 * 4 + 41 * 4 + 8  # positions, originals, the seed


def test_a_compiled_step_keeps_the_input_too() -> None:
    model, _ = one(nn.Linear(WIDTH, 8))
    x = torch.randn(SHAPE, requires_grad=True)
    run = compiled(model)
    run(x)
    assert kept(run, x) <= x.nbytes + layers(model)[0].memsave_shira_indices["default"].nbytes
