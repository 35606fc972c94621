"""What was saved comes back: structure, settings, bits, ties and modes, for every kind of method."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

import memsave
from memsave import MethodConfig, RecomputeNormConfig, WTACRSConfig
from memsave.config import applied_configs

from ..mlp import make, wta
from ..snapshot import bits
from ..test_restore import IN_PLACE, REPLACING, each, outputs, restore
from ..toys import AdapterLinear, LowRankLinear, ToyLowRankConfig
from ..trees import Tree, property_settings, trees

pytest.importorskip("safetensors", reason="needs safetensors (pip install 'memsave[hf]')")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saving") / "checkpoint"


def state_bits(model: nn.Module) -> dict[str, bytes | str]:
    return {name: bits(tensor) for name, tensor in model.state_dict().items()}


def structure(model: nn.Module) -> dict[str, Any]:
    """Classes, methods in their order, and flags, by name."""
    return {
        name: (type(m), list(applied_configs(m).items()), m.training, [p.requires_grad for p in m.parameters()])
        for name, m in model.named_modules()
    }


@each("configs", IN_PLACE + REPLACING)
@property_settings
@given(tree=trees())
def test_a_model_comes_back_from_the_plain_one(tree: Tree, configs: list[MethodConfig], directory: Path) -> None:
    plain = copy.deepcopy(tree)
    memsave.convert_model(tree, configs)
    for i, parameter in enumerate(tree.parameters()):
        parameter.data += 0.01 * i
    memsave.save(tree, directory, overwrite=True)
    assert memsave.load(directory, plain) is plain
    assert structure(plain) == structure(tree)
    assert state_bits(plain) == state_bits(tree)
    assert outputs(plain) == outputs(tree)
    restore(plain), restore(tree)
    assert (structure(plain), state_bits(plain)) == (structure(tree), state_bits(tree))


@each("configs", REPLACING)
@property_settings
@given(tree=trees())
def test_a_model_that_is_converted_alike_gets_the_weights(
    tree: Tree, configs: list[MethodConfig], directory: Path
) -> None:
    memsave.convert_model(tree, configs)
    other = copy.deepcopy(tree)
    objects = [id(t) for t in (*other.modules(), *other.parameters())]
    for parameter in tree.parameters():
        parameter.data += 1
    memsave.save(tree, directory, overwrite=True)
    memsave.load(directory, other)
    assert [id(t) for t in (*other.modules(), *other.parameters())] == objects
    assert state_bits(other) == state_bits(tree)


def low_rank(targets: Sequence[str], least: float) -> ToyLowRankConfig:
    return ToyLowRankConfig(rank=8, least=least, target_modules=targets)


def test_ranks_differ_from_layer_to_layer_and_come_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, plain = make(), make()
    memsave.convert_model(model, low_rank(["up_proj", "down_proj"], 0.5))
    ranks = [m.down.shape[0] for m in model.modules() if isinstance(m, LowRankLinear)]
    assert len(set(ranks)) > 1
    memsave.save(model, tmp_path / "c")
    memsave.load(tmp_path / "c", plain)
    assert [m.down.shape[0] for m in plain.modules() if isinstance(m, LowRankLinear)] == ranks
    assert state_bits(plain) == state_bits(model)


def test_several_calls_with_other_settings_for_other_modules_come_back(tmp_path: Path) -> None:
    model, plain = make(), make()
    memsave.convert_model(model, wta(["1.up_proj"], keep_ratio=0.5))
    memsave.convert_model(model, RecomputeNormConfig())
    memsave.convert_model(model, wta(["2.up_proj"], keep_ratio=0.25, estimator="crs"))
    memsave.save(model, tmp_path / "c")
    memsave.load(tmp_path / "c", plain)
    assert structure(plain) == structure(model)
    settings = [c for m in plain.modules() for c in applied_configs(m).values() if isinstance(c, WTACRSConfig)]
    assert [(c.keep_ratio, c.estimator) for c in settings] == [(0.5, "pps"), (0.25, "crs")]
    record = json.loads((tmp_path / "c" / "memsave.json").read_text())
    assert len(record["configs"]) == 3 and [*record["modules"]["1.up_proj"][0]] == ["config", "state"]


def test_a_model_on_meta_gets_dtypes_and_values_from_the_file(tmp_path: Path) -> None:
    model = make()
    model[2].up_proj.weight = model[1].up_proj.weight
    memsave.convert_model(
        model, [ToyLowRankConfig(target_modules=["down_proj"]), RecomputeNormConfig(exclude_modules=["down_proj"])]
    )
    model.to(torch.bfloat16)
    memsave.save(model, tmp_path / "c")
    with torch.device("meta"):
        empty = make()
        empty[2].up_proj.weight = empty[1].up_proj.weight
        empty[0].weight.requires_grad_(False)
    memsave.load(tmp_path / "c", empty)
    assert state_bits(empty) == state_bits(model)
    assert empty[2].up_proj.weight is empty[1].up_proj.weight
    assert not empty[0].weight.requires_grad and empty[0].bias.requires_grad


class Odd(nn.Module):
    """Tensors of every sort that a state dict may hold."""

    def __init__(self, fill: float) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.turned = nn.Parameter(torch.full((3, 5), fill).t())
        shared = torch.full((8,), fill)
        self.register_buffer("whole", shared)
        self.register_buffer("part", shared[:4])
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("also_empty", torch.zeros(0, 3))
        kinds = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]
        for kind in kinds:
            self.register_buffer(f"a_{str(kind)[6:]}", torch.full((2, 2), fill).to(kind))
        self.seen = torch.tensor([fill, fill])

    def get_extra_state(self) -> Tensor:
        return self.seen

    def set_extra_state(self, state: Tensor) -> None:
        self.seen = state


def test_all_sorts_of_tensors_come_back(tmp_path: Path) -> None:
    model, plain = Odd(float("nan")), Odd(3.0)
    model.seen = torch.arange(5.0)
    memsave.convert_model(model)
    memsave.save(model, tmp_path / "c")
    memsave.load(tmp_path / "c", plain)
    assert state_bits(plain) == state_bits(model)
    assert torch.equal(plain.seen, torch.arange(5.0))
    assert plain.part.data_ptr() == plain.whole.data_ptr() and not plain.turned.is_contiguous()


class Conjugate(nn.Module):
    """Two buffers at one place in memory, with different values."""

    def __init__(self) -> None:
        super().__init__()
        values = torch.randn(4, dtype=torch.complex64)
        self.register_buffer("whole", values)
        self.register_buffer("turned", values.conj())


def test_a_conjugate_view_is_another_tensor(tmp_path: Path) -> None:
    model, plain = Conjugate(), Conjugate()
    memsave.save(model, tmp_path / "c")
    memsave.load(tmp_path / "c", plain)
    assert torch.equal(plain.whole, model.whole) and torch.equal(plain.turned, model.whole.conj())


@pytest.mark.parametrize("seen", [0, 3], ids=["no_memory", "another_memory"])
def test_gradient_norms_come_back(seen: int, tmp_path: Path) -> None:
    """The memory is in the state dict once it holds something, and its shape is that of the data."""

    def made(samples: int) -> nn.Module:
        model = make()
        memsave.convert_model(model, wta(["up_proj"], grad_norms="sample_cache", save_grad_norms=True, min_rows=1))
        for ids in ([0, samples], [0]) if samples else ():
            with memsave.sample_ids(ids):
                model(torch.randn(len(ids), 2 + samples, 4)).sum().backward()
        return model

    model, other = made(7), made(seen)
    memsave.save(model, tmp_path / "c")
    for target in (other, make()):
        memsave.load(tmp_path / "c", target)
        assert "1.up_proj.grad_norms" in target.state_dict() and state_bits(target) == state_bits(model)
    memsave.load(tmp_path / "c", made(0))
    memsave.save(made(0), tmp_path / "empty")
    memsave.load(tmp_path / "empty", make())


def test_tied_tensors_are_written_once(tmp_path: Path) -> None:
    model = make()
    model[2].up_proj.weight = model[1].up_proj.weight
    memsave.save(model, tmp_path / "c")
    record = json.loads((tmp_path / "c" / "memsave.json").read_text())
    assert record["tied"] == {"2.up_proj.weight": "1.up_proj.weight"}
    plain = make()
    memsave.load(tmp_path / "c", plain)
    assert state_bits(plain) == state_bits(model)


def test_adapters_trained_after_the_conversion_come_back(tmp_path: Path) -> None:
    model, plain = make(), make()
    plain.load_state_dict(model.state_dict())
    memsave.convert_model(
        model, memsave.MethodConfig.from_dict({"method": "toy_adapter", "target_modules": ["up_proj"]})
    )
    for module in model.modules():
        if isinstance(module, AdapterLinear):
            module.delta.data.fill_(0.5)
    memsave.save(model, tmp_path / "c")
    memsave.load(tmp_path / "c", plain)
    x = torch.randn(3, 4)
    assert torch.equal(plain(x), model(x))
    memsave.restore_model(plain, adapters="merge")
    torch.testing.assert_close(plain(x), model(x))


def test_weights_gathered_elsewhere_are_written(tmp_path: Path) -> None:
    model, plain = make(), make()
    memsave.convert_model(model)
    gathered = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    memsave.save(model, tmp_path / "c", state_dict=gathered)
    memsave.load(tmp_path / "c", plain)
    assert state_bits(plain) == {name: bits(tensor) for name, tensor in gathered.items()}
