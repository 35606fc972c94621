"""The config, what it targets, and what is refused before anything is replaced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from memsave.errors import UnsupportedModelError
from memsave.integrations.peft.lamda import LaMDAConfig, LaMDALinear

from .lamda_models import OUT, Block, D, adapted, block, config, layers, llama


def test_json_round_trip(tmp_path: Path) -> None:
    given = config(r=5, alpha=0.5, freeze_until=0.0, rank_pattern={"up": 3}, dtype=torch.bfloat16, seed=7)
    given.save_pretrained(str(tmp_path))
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["peft_type"] == "MEMSAVE_LAMDA" and stored["dtype"] == "bfloat16" and stored["memsave_version"]
    for loaded in (LaMDAConfig.from_pretrained(str(tmp_path)), peft.PeftConfig.from_pretrained(str(tmp_path))):
        assert type(loaded) is LaMDAConfig
        assert loaded.to_dict() == given.to_dict()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"r": 0}, "expected r to be an integer, at least 1, got 0"),
        ({"r": 2.5}, "expected r to be an integer, at least 1, got 2.5"),
        ({"alpha": float("inf")}, "expected alpha to be a finite number, got inf"),
        ({"freeze_until": 1.5}, r"expected freeze_until in \[0, 1\], got 1.5"),
        ({"freeze_until": -0.1}, r"expected freeze_until in \[0, 1\], got -0.1"),
        ({"ranks": "best"}, "expected ranks to be one of 'uniform', 'energy', got 'best'"),
        ({"svd": "fast"}, "expected svd to be one of 'randomized', 'exact', got 'fast'"),
        ({"dtype": "int8"}, "expected dtype to be one of None, 'float64', .* got 'int8'"),
        ({"niter": -1}, "expected niter to be an integer, at least 0, got -1"),
        ({"rank_pattern": {"up": 0}}, r"expected rank_pattern\['up'\] to be an integer, at least 1, got 0"),
        ({"min_rank": 40}, "expected min_rank <= r <= max_rank, got 40, 32 and 64"),
        ({"target_modules": "up", "layers_to_transform": [0]}, "layers_to_transform needs target_modules as a list"),
        ({"layers_pattern": "layers"}, "layers_pattern needs layers_to_transform"),
    ],
)
def test_bad_fields_raise(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LaMDAConfig(**given)


def test_needs_target_modules() -> None:
    with pytest.raises(ValueError, match="needs target_modules, such as"):
        peft.get_peft_model(block(), LaMDAConfig(r=2))


def test_all_linear_leaves_the_head_out() -> None:
    model = peft.get_peft_model(llama(), config(r=4, target_modules="all-linear"))
    assert len(layers(model)) == 14
    assert type(model.base_model.model.lm_head) is nn.Linear


def test_layers_and_exclusions() -> None:
    model = peft.get_peft_model(
        llama(), config(r=4, target_modules=["q_proj", "v_proj"], exclude_modules=["v_proj"], layers_to_transform=[1])
    )
    names = [name for name, module in model.named_modules() if isinstance(module, LaMDALinear)]
    assert names == ["base_model.model.model.layers.1.self_attn.q_proj"]


def test_rank_pattern_by_name_and_by_pattern() -> None:
    model = adapted(rank_pattern={"up": 3, "d.*n": 5})
    assert [layer.r["default"] for layer in layers(model)] == [3, 5]


class Odd(Block):
    """A `Block` in which one thing is wrong with `down`."""


def odd(change: str) -> Odd:
    model = Odd()
    if change == "complex":
        model.down = nn.Linear(OUT, D, dtype=torch.complex64)
    if change == "meta":
        model.down = nn.Linear(OUT, D, device="meta")
    if change == "float8":
        model.down.weight.data = model.down.weight.data.to(torch.float8_e4m3fn)
    if change == "nan":
        model.down.weight.data[3, 3] = float("nan")
    if change == "quantized":
        model.down.weight = nn.Parameter(torch.ones(D, OUT, dtype=torch.int8), requires_grad=False)
    if change == "parametrized":
        nn.utils.parametrizations.orthogonal(model.down)
    if change == "norm":
        model.down = nn.LayerNorm(OUT)
    if change == "subclass":
        model.down = type("MyLinear", (nn.Linear,), {"forward": lambda self, x: x})(OUT, D)
    if change == "lora":
        model.down = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["0"]), nn.Sequential(model.down))[0]
    return model


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("complex", "its weight is complex"),
        ("meta", "its weight is on the meta device and has no values to decompose"),
        ("float8", "its weight is torch.float8_e4m3fn, expected float64"),
        ("nan", "its weight has infinite or NaN values"),
        ("quantized", "its weight is quantized"),
        ("parametrized", "it is parametrized"),
        ("norm", "its class is LayerNorm, expected nn.Linear or transformers' Conv1D"),
        ("subclass", "its class is MyLinear, expected nn.Linear"),
        ("lora", "it is adapted by another method already"),
    ],
)
def test_what_cannot_be_adapted_is_refused_before_anything_is_replaced(change: str, reason: str) -> None:
    model = odd(change)
    modules, flags = list(model.modules()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(UnsupportedModelError, match=f"LaMDA cannot adapt down: {reason}.*The model was not changed"):
        peft.get_peft_model(model, config())
    assert list(model.modules()) == modules and [p.requires_grad for p in model.parameters()] == flags
    assert not hasattr(model, "peft_config")


def test_a_rank_too_large_names_every_layer() -> None:
    model = block()
    with pytest.raises(UnsupportedModelError) as raised:
        peft.get_peft_model(model, config(r=D + 1))
    reason = f"its rank is {D + 1} (r, or rank_pattern), expected at most min(in, out) = {D}"
    assert str(raised.value) == f"LaMDA cannot adapt {{up,down}}: {reason}. The model was not changed."
    assert isinstance(raised.value, ValueError) and not layers(model)


def test_what_was_replaced_is_put_back_if_a_later_layer_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model, svd, calls = block(), torch.linalg.svd, []

    def fails_later(matrix: Any, **given: Any) -> Any:
        calls.append(matrix)
        if len(calls) == 2:
            raise torch.linalg.LinAlgError("linalg.svd: did not converge.")
        return svd(matrix, **given)

    monkeypatch.setattr(torch.linalg, "svd", fails_later)
    up = model.up
    with pytest.raises(
        ValueError, match="LaMDA cannot decompose down: linalg.svd: did not converge. The model was not"
    ):
        peft.get_peft_model(model, config())
    assert model.up is up and not layers(model) and not hasattr(model, "peft_config")
    assert all(p.requires_grad for p in model.parameters())


def test_targets_from_a_state_dict() -> None:
    keys = {"base_model.model.up.memsave_lamda_S": torch.zeros(1)}
    given = {name.removeprefix("base_model.model."): value for name, value in keys.items()}
    model = peft.inject_adapter_in_model(config(target_modules=["up"]), block(), state_dict=given)
    assert len(layers(model)) == 1
    wrong = nn.Sequential(nn.LayerNorm(3), nn.Linear(20, 20))
    with pytest.raises(UnsupportedModelError, match="LaMDA cannot adapt 0: its class is LayerNorm"):
        peft.inject_adapter_in_model(
            config(target_modules=["1"]), wrong, state_dict={"0.memsave_lamda_S": torch.zeros(1)}
        )


@pytest.mark.parametrize("chosen", [None, "float32", "bfloat16", torch.float16])
@pytest.mark.parametrize("path", ["get_peft_model", "inject", "add_adapter", "transformers"])
def test_dtypes(path: str, chosen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the base weight, or the one asked for, whichever way the adapter comes."""
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda min_version: None)
    model, given = llama(torch.bfloat16), config(r=4, target_modules=["q_proj"], dtype=chosen)
    if path == "inject":
        peft.inject_adapter_in_model(given, model)
    elif path == "transformers":
        model.add_adapter(given)
    elif path == "add_adapter":
        tuned = peft.get_peft_model(model, config(r=4, target_modules=["k_proj"]), adapter_name="first")
        tuned.add_adapter("second", given)
        tuned.set_adapter("second")
    else:
        peft.get_peft_model(model, given)
    layer = next(layer for layer in layers(model) if set(layer.r) != {"first"})
    (name,) = layer.r
    found = {t.dtype for t in (layer.memsave_lamda_A[name], layer.memsave_lamda_S[name], *layer.segments(name))}
    expected = {None: torch.bfloat16, "float32": torch.float32, "bfloat16": torch.bfloat16}.get(chosen, torch.float16)
    assert found == {expected}
    assert layer.base_layer.weight.dtype == torch.bfloat16
