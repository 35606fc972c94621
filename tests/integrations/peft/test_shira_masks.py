"""Masks against brute force, budgets, and what a config may be."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import memsave
from memsave import MemsaveError, UnsupportedModelError
from memsave.integrations.peft.shira.stored_mask import StoredMask
from memsave.peft import SHiRAConfig

from .shira import LINEARS, WIDTH, Toy, adapted, config, indices, layers, one, same, weights

BATCHES = [torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(i)) for i in range(3)]
BUDGETS = [({"density": 0.3}, lambda rows, columns: round(0.3 * rows * columns)), ({"r": 2}, lambda r, c: 2 * (r + c))]


def square(y: Tensor) -> Tensor:
    return y.square().sum()


def largest(scores: Tensor, k: int) -> list[int]:
    """The k largest, ties by position: by sorting in Python."""
    flat = scores.flatten().tolist()
    return sorted(sorted(range(len(flat)), key=lambda i: (-flat[i], i))[:k])


def expected_mask(kind: str, weight: Tensor, grad: Tensor, k: int) -> list[int]:
    score = {"magnitude": weight.abs(), "gradient": grad.abs(), "snip": (weight * grad).abs()}[kind]
    return largest(score.detach(), k)


@pytest.mark.parametrize(("budget", "count"), BUDGETS, ids=["density", "r"])
@pytest.mark.parametrize("mask", ["magnitude", "gradient", "snip"])
@pytest.mark.parametrize("model", ["toy", "conv1d"])
def test_masks_by_score(model: str, mask: str, budget: dict[str, Any], count: Any) -> None:
    torch.manual_seed(0)
    plain = (Toy() if model == "toy" else nn.Sequential(LINEARS["conv1d"]())).double()
    batches = [b.double() for b in BATCHES]
    settings = {"density": None, **budget, "mask": mask, "calibration": batches, "calibration_loss": square}
    tuned = adapted(plain, trained=False, **settings)
    plain.zero_grad()
    for batch in batches:
        square(plain(batch)).backward()
    originals = [m for m in plain.modules() if type(m).__name__ in ("Linear", "Conv1D")]
    assert len(layers(tuned)) == len(originals) == (4 if model == "toy" else 1)
    for layer, linear in zip(layers(tuned), originals, strict=True):
        k = count(*linear.weight.shape)
        assert indices(layer).tolist() == expected_mask(mask, linear.weight, linear.weight.grad, k)
        assert layer.memsave_shira_values["default"].shape == (k,)


def test_ties_go_to_the_first_positions() -> None:
    linear = nn.Linear(4, 4)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([1.0, -2.0, 2.0, 1.0]).repeat(4, 1))
    _, layer = one(linear, mask="magnitude", density=10 / 16)
    assert indices(layer).tolist() == [0, 1, 2, 3, 5, 6, 9, 10, 13, 14]


@pytest.mark.parametrize(("budget", "count"), BUDGETS, ids=["density", "r"])
def test_random_masks(budget: dict[str, Any], count: Any) -> None:
    """A function of the seed and the layer's name: other ones in other layers, the same ones in other models."""
    torch.manual_seed(0)
    made = [layers(adapted(Toy(), **{"density": None, **budget, "seed": s})) for s in (0, 0, 1)]
    first, again, other = ([indices(layer).tolist() for layer in found] for found in made)
    assert first == again and all(a != b for a, b in zip(first, other, strict=True))
    assert len({tuple(mask) for mask in first}) == 4
    for mask in (*first, *other):
        assert mask == sorted(set(mask)) and len(mask) == count(WIDTH, WIDTH) and 0 <= mask[0] <= mask[-1] < WIDTH**2


def test_random_masks_are_spread_evenly() -> None:
    counts = torch.zeros(36)
    for seed in range(200):
        _, layer = one(nn.Linear(6, 6), density=0.25, seed=seed, trained=False)
        counts[indices(layer)] += 1
    assert counts.sum() == 200 * 9
    error = (200 * 0.25 * 0.75) ** 0.5
    assert ((counts - 50).abs() < 4 * error).all()


@pytest.mark.parametrize(
    ("shape", "count", "expected"),
    [
        ((3, 3), 2, [0, 4]),
        ((3, 3), 3, [0, 4, 8]),
        ((3, 3), 5, [0, 1, 2, 4, 8]),
        ((3, 3), 9, [*range(9)]),
        ((2, 4), 4, [0, 2, 4, 5]),
        ((4, 2), 4, [0, 1, 3, 4]),
    ],
)
def test_structured_masks(shape: tuple[int, int], count: int, expected: list[int]) -> None:
    rows, columns = shape
    _, layer = one(nn.Linear(columns, rows), mask="struct", density=count / (rows * columns))
    assert indices(layer).tolist() == expected


def test_a_second_adapter_is_chosen_by_the_original_weight() -> None:
    """Not by the weight that holds the first one's values."""
    torch.manual_seed(0)
    plain = nn.Linear(WIDTH, WIDTH)
    model, layer = one(plain, density=0.9)
    original = layer.held.original_weight()
    model.add_adapter("other", config(mask="magnitude", density=0.1))
    expected = largest(original.abs(), round(0.1 * WIDTH**2))
    assert indices(layer, "other").tolist() == expected != largest(layer.base_layer.weight.abs(), len(expected))


@pytest.mark.parametrize("mask", ["gradient", "snip"])
def test_calibration_leaves_the_model_as_it_was(mask: str) -> None:
    torch.manual_seed(0)
    plain = Toy()
    plain.q.weight.requires_grad_(False)
    before = weights(plain)
    tuned = peft.get_peft_model(plain, config(mask=mask, calibration=BATCHES, calibration_loss=square))
    assert same(weights(tuned), before)
    assert all(p.grad is None for p in tuned.parameters())


@pytest.mark.parametrize("mask", ["gradient", "snip"])
def test_missing_calibration(mask: str, unchanged: Any) -> None:
    model = unchanged(Toy())
    for adapt in (lambda c: peft.get_peft_model(model, c), lambda c: memsave.convert_model(model, c)):
        with pytest.raises(
            UnsupportedModelError,
            match=f"a {mask} mask is chosen by gradients: .*SHiRAConfig.calibration, got None.*not changed",
        ):
            adapt(config(mask=mask))


@pytest.mark.parametrize(
    ("calibration", "words"),
    [
        ([], "expected at least one batch"),
        (iter(BATCHES), "one-shot iterator"),
        (BATCHES[0], "got Tensor"),
        (3, "got int"),
    ],
    ids=["none", "iterator", "tensor", "number"],
)
def test_wrong_calibration(calibration: Any, words: str, unchanged: Any) -> None:
    model = unchanged(Toy())
    with pytest.raises(ValueError, match=words):
        peft.get_peft_model(model, config(mask="gradient", calibration=calibration, calibration_loss=square))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"density": 0}, "density: expected a fraction in .0, 1., got 0"),
        ({"density": 1.5}, "density: expected a fraction in .0, 1., got 1.5"),
        ({"density": True}, "density: expected a fraction"),
        ({"density": float("nan")}, "density: expected a fraction"),
        ({"density": 0.1, "r": 2}, "expected density or r, got both: 0.1 and 2"),
        ({"r": 0}, "r: expected a whole number of at least 1, got 0"),
        ({"r": 1.0}, "r: expected a whole number"),
        ({"seed": -1}, "seed: expected a whole number"),
        ({"seed": 2**63}, "seed: expected a whole number"),
        ({"keep_ratio": 0.0}, "keep_ratio: expected a fraction"),
        ({"keep_ratio": 1.1}, "keep_ratio: expected a fraction"),
        ({"dtype": "int8"}, "dtype: expected one of"),
        ({"modules_to_save": "norm"}, "modules_to_save: expected a list of names"),
        ({"modules_to_save": [""]}, "modules_to_save: expected a list of names"),
        ({"dtype": "nothing"}, "dtype: expected one of"),
        ({"mask": "best"}, "mask: expected one of .'random', .*got 'best'"),
        ({"mask": "given"}, "'given' needs masks='stored'"),
        ({"masks": "all"}, "masks: expected one of"),
        ({"apply": "never"}, "apply: expected one of"),
        ({"layers_pattern": "layers"}, "layers_pattern: expected layers_to_transform"),
    ],
    ids=str,
)
def test_wrong_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"SHiRAConfig.*{words}"):
        SHiRAConfig(target_modules=["q"], **settings)


def test_configs_survive_json(tmp_path: Path) -> None:
    """All but the calibration; the masks then come from a file."""
    made = config(
        mask="gradient",
        density=0.07,
        seed=2**62,
        keep_ratio=0.5,
        dtype="bfloat16",
        apply="added",
        calibration=BATCHES,
        calibration_loss=square,
        counts={"q": 3},
        modules_to_save=["out"],
        target_modules=["q", "k"],
        exclude_modules=["v"],
    )
    made.save_pretrained(str(tmp_path))
    data = json.loads((tmp_path / "adapter_config.json").read_text())
    assert not any("calibration" in name for name in data) and data["peft_type"] == "MEMSAVE_SHIRA"
    for read in (peft.PeftConfig.from_pretrained(str(tmp_path)), SHiRAConfig.from_pretrained(str(tmp_path))):
        assert type(read) is SHiRAConfig and read.peft_type == made.peft_type == "MEMSAVE_SHIRA"
        changed = {f.name for f in dataclasses.fields(made) if getattr(made, f.name) != getattr(read, f.name)}
        assert changed == {"calibration", "calibration_loss", "masks"}
        assert (read.masks, read.calibration) == ("stored", None)


def test_a_mask_that_was_never_loaded() -> None:
    torch.manual_seed(0)
    model = adapted(Toy(), trained=False, mask="magnitude", masks="stored")
    first = layers(model)[0]
    for call in (model, lambda x: model.merge_and_unload(), lambda x: first.merged_weight()):
        with pytest.raises(MemsaveError, match="the magnitude mask of adapter 'default' has not been loaded"):
            call(BATCHES[0])
    again = adapted(Toy(), trained=False, masks="stored")
    again(BATCHES[0])  # a random mask follows from its seed


@pytest.mark.parametrize("kind", ["random", "magnitude"])
def test_a_stored_mask_knows_its_length(kind: str) -> None:
    mask = StoredMask(kind, 10, 1000)
    chosen = torch.arange(10, dtype=torch.int32) * 99 + 3
    code = mask.of_seed(12345) if kind == "random" else mask.of_indices(chosen)
    assert code.dtype == torch.uint8 and len(code) == mask.num_bytes == len(mask.unknown())
    assert kind == "random" or torch.equal(mask.indices(code), chosen)
    assert len(mask.indices(code)) == 10 and not mask.unknown().any()


def test_every_changed_bit_of_a_stored_mask_is_noticed() -> None:
    mask = StoredMask("magnitude", 5, 300)
    code = mask.of_indices(torch.tensor([3, 50, 51, 200, 299], dtype=torch.int32))
    for byte in range(len(code)):
        for bit in range(8):
            wrong = code.clone()
            wrong[byte] ^= 1 << bit
            with pytest.raises(ValueError, match="mask"):
                mask.indices(wrong)
    for wrong in (code[:-1], torch.cat((code, code[:1])), code.to(torch.int32)):
        with pytest.raises(ValueError, match="expected the mask of 5 of 300|expected a mask as bytes|checksum"):
            mask.indices(wrong)
