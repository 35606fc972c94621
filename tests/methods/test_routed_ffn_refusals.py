"""What RoutedFFNConfig refuses, what a routed block refuses, and other methods on the same model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memsave
from memsave import NoMatchError
from memsave.nn.routed_ffn import RoutedFFN

from ..nn.routed_ffn.toys import OUT, UNITS, WIDTH, dense, tokens
from .ffn_models import Model, batches, clusterings, config, converted


def hooked(child: str) -> Callable[[Any], object]:
    return lambda block: block.get_submodule(child).register_forward_hook(lambda *_: None)


class Adapter(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x)


class Quantized(nn.Parameter):
    pass


def replace_weight(block: Any) -> None:
    block.up_proj.weight = Quantized(block.up_proj.weight.data)


def adapt(block: Any) -> None:
    block.up_proj = Adapter(block.up_proj)


def parametrize(block: Any) -> None:
    nn.utils.parametrizations.weight_norm(block.up_proj)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda block: block.__dict__.update(forward=lambda x: x), "its forward was replaced on the instance"),
        (hooked("up_proj"), "hooks watch its up_proj, which a routed block does not call"),
        (hooked("act_fn"), "hooks watch its act_fn"),
        (adapt, r"an adapter \(Adapter\) is around its up_proj.*use lora_rank"),
        (replace_weight, r"the weight of its up_proj is a Quantized \(quantized or sharded\)"),
        (parametrize, "its up_proj is parametrized"),
        (lambda block: block.down_proj.half(), "its weights are of several kinds .*float16 on cpu, .*float32 on"),
        (lambda block: block.to("meta"), "on the meta device and have no values"),
    ],
)  # fmt: skip
@clusterings
def test_blocks_that_are_refused(change: Callable[[Any], object], message: str, clustering: str) -> None:
    model = Model()
    change(model.ffn)
    before = list(model.state_dict())
    given = batches() if clustering == "coactivation" else None
    with pytest.raises(NoMatchError, match=message):
        memsave.convert_model(model, config(clustering=clustering), calibration=given)
    assert not isinstance(model.ffn, RoutedFFN) and list(model.state_dict()) == before


def test_units_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(NoMatchError, match="its 24 hidden units cannot be divided into 5 equal blocks"):
        memsave.convert_model(Model(), config(blocks=5))


def test_a_forward_that_does_more_is_refused() -> None:
    class More(type(dense("gated"))):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    model = Model()
    model.ffn.__class__ = More
    with pytest.raises(NoMatchError, match="ffn"):
        memsave.convert_model(model, config())


def test_weights_that_are_tied_are_refused() -> None:
    model: Any = nn.ModuleDict({"ffn": dense("gated", torch.float32), "other": dense("gated", torch.float32)})
    model["other"].up_proj.weight = model["ffn"].up_proj.weight
    with pytest.raises(NoMatchError, match="the weight of its up_proj is tied with one of other.up_proj"):
        memsave.convert_model(model, config())


def test_dropout_between_is_refused_or_noticed() -> None:
    def model(p: float) -> Any:
        parts = nn.Linear(WIDTH, UNITS), nn.GELU(), nn.Dropout(p), nn.Linear(UNITS, OUT), nn.Dropout(0.5)
        return nn.ModuleDict({"ffn": nn.Sequential(*parts)})

    with pytest.raises(NoMatchError, match=r"its 2 drops hidden units \(p = 0.1\).*set its p to 0"):
        memsave.convert_model(model(0.1), config())
    made = model(0.0)
    memsave.convert_model(made, config())
    x = tokens(200, dtype=torch.float32)
    y = made["ffn"](x)
    assert 0.4 < float((y == 0).float().mean()) < 0.6  # the one at the end goes on
    made["ffn"].others.get_submodule("2").p = 0.1
    with pytest.raises(ValueError, match="its child 2 would drop hidden units .p = 0.1.*set its p to 0"):
        made["ffn"](x)
    made.eval()
    assert torch.isfinite(made["ffn"](x)).all()
    memsave.restore_model(made, allow_lossy=True)
    assert [type(m).__name__ for m in made["ffn"]] == ["Linear", "GELU", "Dropout", "Linear", "Dropout"]


def test_inputs_that_do_not_fit() -> None:
    made = converted("gated").ffn
    for x in (torch.randn(3, WIDTH + 1), torch.randn(3, WIDTH).double(), torch.tensor(1.0)):
        with pytest.raises(
            ValueError, match=r"expected an input \(..., 6\) of torch.float32, got .*nothing was computed"
        ):
            made(x)


def test_other_methods() -> None:
    """Exact ones make way, lossy ones must be restored first; afterwards the block is nobody else's."""
    model = Model()
    memsave.convert_model(model)
    memsave.convert_model(model, config())
    assert isinstance(model.ffn, RoutedFFN)
    assert not any("Memsave" in type(m).__name__ for m in model.ffn.modules())
    plain = Model()
    memsave.restore_model(model, allow_lossy=True)
    assert type(model.ffn) is type(plain.ffn) and type(model.ffn.up_proj) is nn.Linear
    memsave.convert_model(model, memsave.WTACRSConfig(keep_ratio=0.5, target_modules=["up_proj"]))
    with pytest.raises(NoMatchError, match="its up_proj is converted by wta_crs; restore that first"):
        memsave.convert_model(model, config())
    report = memsave.convert_model(other := converted())
    assert isinstance(other.ffn, RoutedFFN) and not any("ffn" in n for row in report.rows for n in row.names)
    before = other.ffn
    memsave.convert_model(other, config())  # as it is already
    assert other.ffn is before
