"""SparseMHAConfig: settings that make no sense, what is not converted, calls that are refused, and what is said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memsave
from memsave import MemsaveError, NoMatchError, SparseMHAConfig

from ..snapshot import snapshot
from .sparse import Block, batch, blocks, config, llama, tokens

transformers = pytest.importorskip("transformers", reason="needs transformers (pip install 'memsave[hf]')")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0}, r"keep: expected a fraction of the keys in \(0, 1\] .* got 0"),
        ({"keep": 0.0}, "keep: .* got 0.0"),
        ({"keep": 1.5}, "keep: .* got 1.5"),
        ({"keep": -3}, "keep: .* got -3"),
        ({"keep": True}, "keep: .* got True"),
        ({"keep": float("nan")}, "keep: .* got nan"),
        ({"keep": "all"}, "keep: .* got 'all'"),
        ({"keep": None}, "keep: .* got None"),
        ({"granularity": "page"}, r"granularity: expected one of \['block', 'token'\], got 'page'"),
        ({"block_size": 8}, "block_size: expected 16, 32, 64 or 128, got 8"),
        ({"block_size": 48}, "block_size: .* got 48"),
        ({"block_size": 256}, "block_size: .* got 256"),
        ({"block_size": 64.0}, "block_size: .* got 64.0"),
        ({"num_subspaces": 0}, "num_subspaces: expected a whole number from 1 to 64 or None, got 0"),
        ({"num_subspaces": 65}, "num_subspaces: .* got 65"),
        ({"num_subspaces": 2.0}, "num_subspaces: .* got 2.0"),
        ({"num_codewords": 1}, r"num_codewords: expected a whole number from 2 to 16 \(four bits\), got 1"),
        ({"num_codewords": 17}, "num_codewords: .* got 17"),
        ({"num_codewords": True}, "num_codewords: .* got True"),
        ({"codebook": "random"}, r"codebook: expected one of \['fit', 'ema'\], got 'random'"),
        ({"ema_decay": 1}, r"ema_decay: expected a number in \[0, 1\), got 1"),
        ({"ema_decay": -0.1}, "ema_decay: .* got -0.1"),
        ({"ema_decay": False}, "ema_decay: .* got False"),
        ({"ema_decay": float("nan")}, "ema_decay: .* got nan"),
        ({"dense_below": -1}, "dense_below: expected a number of keys from 0 on, or 'measure', got -1"),
        ({"dense_below": 10.0}, "dense_below: .* got 10.0"),
        ({"dense_below": "auto"}, "dense_below: .* got 'auto'"),
        ({"dense_below": True}, "dense_below: .* got True"),
        ({"target_modules": None}, "must be aimed: give target_modules"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_settings_at_the_ends_of_their_ranges() -> None:
    for settings in ({"keep": 1.0}, {"keep": 1}, {"ema_decay": 0}, {"ema_decay": 0.999}, {"dense_below": "measure"}):
        assert config(**settings) is not None
    assert str(SparseMHAConfig(target_modules="x", keep=0.5)) == "SparseMHAConfig(target_modules='x', keep=0.5)"


def adds_keys(model: Any) -> None:
    model[0].attention = nn.MultiheadAttention(16, 4, batch_first=True, add_bias_kv=True)


def adds_zero(model: Any) -> None:
    model[0].attention = nn.MultiheadAttention(16, 4, batch_first=True, add_zero_attn=True)


def replaced(model: Any) -> None:
    model[0].attention.forward = lambda *args, **kwargs: (args[0], None)


def parametrized(model: Any) -> None:
    nn.utils.parametrizations.weight_norm(model[0].attention, "in_proj_weight")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (adds_keys, r"it adds keys of its own \(add_bias_kv, add_zero_attn\)"),
        (adds_zero, "it adds keys of its own"),
        (replaced, "its forward was replaced on the instance"),
        (parametrized, r"does not convert \(ParametrizedMultiheadAttention\)"),
    ],
)
def test_modules_that_cannot_be_converted(spoil: Callable[[Any], None], message: str) -> None:
    model = blocks()
    spoil(model)
    before = snapshot(model)
    with pytest.raises(MemsaveError, match=message):
        memsave.convert_model(model, config(target_modules=["0.attention"]), calibration=[tokens()])
    assert snapshot(model) == before


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_models_with_another_attention(implementation: str) -> None:
    model = llama()
    model.config._attn_implementation_internal = implementation
    before = snapshot(model)
    with pytest.raises(NoMatchError, match=f"its attention is '{implementation}'; only 'sdpa'"):
        memsave.convert_model(model, config(), calibration=[batch()])
    assert snapshot(model) == before


def test_nothing_but_attention_is_a_target() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    with pytest.raises(NoMatchError, match="sparse_mha can convert: none"):
        memsave.convert_model(model, config(), calibration=[torch.ones(1, 4)])


def test_what_other_approximations_converted() -> None:
    model = llama()
    memsave.convert_model(model, memsave.FlashSVDConfig(rank=2, target_modules=r".*self_attn.*"))
    with pytest.raises(MemsaveError, match="it is converted by flash_svd; restore that first"):
        memsave.convert_model(model, config(), calibration=[batch()])


@pytest.mark.parametrize("codebook", ["fit", "ema"])
@pytest.mark.parametrize("make", [llama, blocks])
def test_heads_that_cannot_be_divided(make: Callable[[], Any], codebook: str) -> None:
    """Found when the model is converted, also where the codebook is yet to come."""
    model = make()
    before = snapshot(model)
    size = 8 if make is llama else 4
    given: Any = {"calibration": [batch() if make is llama else tokens()]} if codebook == "fit" else {}
    message = (
        f"SparseMHAConfig.num_subspaces: heads of {size} features cannot be divided into 3 subspaces .* not changed"
    )
    with pytest.raises(ValueError, match=message):
        memsave.convert_model(model, config(num_subspaces=3, codebook=codebook), **given)
    assert snapshot(model) == before


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = Block(), Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("settings", "calibration", "message"),
    [
        ({}, None, "calibration: .*needs batches of data, got None"),
        ({"codebook": "ema"}, [tokens()], "calibration was given, but no config of this call looks at it"),
        ({}, [], "at least one batch"),
        ({}, iter(()), "at least one batch"),
        ({}, tokens(), "expected an iterable of batches, such as a list, got Tensor"),
        ({}, {"x": tokens()}, "got dict"),
        ({}, 5, "got int"),
        ({}, [tokens()], "calibration: no batch reached unused.attention; exclude it, or give batches that do"),
        ({}, [tokens()[:, :0]], "no batch reached used.attention"),
    ],
)
def test_batches_that_are_no_use(settings: dict[str, Any], calibration: Any, message: str) -> None:
    model = Unused()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        memsave.convert_model(model, config(**settings), calibration=calibration)
    assert snapshot(model) == before


def attention(dense_below: int = 0, **settings: Any) -> Any:
    model = nn.Sequential(Block())
    model[0].attention = nn.MultiheadAttention(16, 4, **{"batch_first": True, **settings})
    memsave.convert_model(model, config(dense_below=dense_below), calibration=[tokens()])
    return model[0].attention


def test_weights_that_are_never_made() -> None:
    module, x = attention(), tokens()
    with pytest.raises(ValueError, match="need_weights=True asks for the T x S weights .* pass need_weights=False"):
        module(x, x, x)
    assert attention(dense_below=81)(x, x, x)[1].shape == (2, 80, 80)


def test_dropout_while_training_is_no_error() -> None:
    """What it drops: tests/nn/sparse_attention/test_dropout.py."""
    x = tokens()
    module = attention(dropout=0.1)

    def output() -> Tensor:
        torch.manual_seed(1)
        return module(x, x, x, need_weights=False)[0]

    trained = output()
    assert torch.equal(trained, output())
    assert not torch.equal(trained, module.eval()(x, x, x, need_weights=False)[0])
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.2
    memsave.convert_model(model, config(), calibration=[batch()])
    logits = model.train()(**batch()).logits
    assert logits.isfinite().all() and not torch.equal(logits, model.eval()(**batch()).logits)


def test_an_order_without_the_mask_that_says_it() -> None:
    x = tokens()
    for module in (attention(), attention(dense_below=81)):
        with pytest.raises(ValueError, match="is_causal=True needs attn_mask"):
            module(x, x, x, need_weights=False, is_causal=True)


def test_a_mask_that_is_a_bias() -> None:
    x, bias = tokens(), -torch.arange(80.0).sub(torch.arange(80.0)[:, None]).abs()
    with pytest.raises(ValueError, match="MemsaveMultiheadAttention: the attention mask adds something else"):
        attention()(x, x, x, need_weights=False, attn_mask=bias)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_that_are_not_self_attention() -> None:
    x = torch.nested.nested_tensor([torch.randn(70, 16), torch.randn(80, 16)])
    other = torch.nested.nested_tensor([torch.randn(70, 16), torch.randn(80, 16)])
    module = attention().eval()
    for args, kwargs in (((x, other, other), {}), ((x, x, x), {"attn_mask": torch.ones(80, 80, dtype=torch.bool)})):
        with pytest.raises(ValueError, match="nested tensors are taken for self-attention without masks only"):
            module(*args, need_weights=False, **kwargs)


@pytest.mark.parametrize(("rows", "keys"), [(0, 80), (0, 0), (80, 0)])
def test_no_queries_or_no_keys(rows: int, keys: int) -> None:
    """As torch has it: no output, or what its attention to nothing gives."""
    module = attention()
    query, key = tokens(rows=rows), tokens(1, rows=keys)
    y, _ = module(query, key, key, need_weights=False)
    assert y.shape == (2, rows, 16) and y.isfinite().all()
