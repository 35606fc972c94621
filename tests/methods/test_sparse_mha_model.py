"""Sparse attention in models that train: kept bytes, checkpointing, codebooks that follow the keys, and calibration."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import memsave
from memsave import RecomputeNormConfig
from memsave.nn.sparse_attention import state
from memsave.nn.sparse_attention.codebooks import KeySample

from ..snapshot import snapshot
from .sparse import Block, batch, blocks, codebooks, config, llama, tokens

transformers = pytest.importorskip("transformers", reason="needs transformers (pip install 'memsave[hf]')")

by_granularity = pytest.mark.parametrize("granularity", ["token", "block"])
KEEP = {"token": 8, "block": 48}


def sparse_llama(granularity: str = "token", **settings: Any) -> Any:
    model = llama()
    given = {} if settings.get("codebook") == "ema" else {"calibration": [batch()]}
    wanted = config(granularity=granularity, keep=KEEP[granularity], **settings)
    memsave.convert_model(model, wanted, **given)
    return model


def train(model: Any, given: dict[str, Tensor]) -> list[Tensor]:
    """The loss and all gradients."""
    model.zero_grad()
    loss = model(**given).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def assert_same(first: list[Tensor], second: list[Tensor]) -> None:
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@by_granularity
@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_llama_keeps_no_more_than_with_torchs_attention(granularity: str, padding: str | None, dtype: Any) -> None:
    """Without padding as much, but for copies of codebooks; with padding less, by the masks that torch makes."""
    plain, model = llama().to(dtype), sparse_llama(granularity).to(dtype)
    kept = [memsave.saved_bytes(lambda m=m: m(**batch(padding)).loss) for m in (plain, model)]
    copies = sum(c.nbytes for c in codebooks(model.float()).values())  # of those that are not float32
    mask_bytes = 2 * 80 * 80 * dtype.itemsize
    assert kept[1] <= kept[0] + copies - (mask_bytes if padding is not None else 0)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("codebook", ["fit", "ema"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpointing_changes_no_bit_over_several_steps(codebook: str, use_reentrant: bool) -> None:
    """Losses, gradients, and what the codebooks become: a forward that runs again adds no keys."""
    results = []
    for checkpointing in (False, True):
        model = sparse_llama("block", codebook=codebook)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        found: list[Tensor] = []
        for step in range(3):
            found += train(model, batch("left", seed=step))
            optimizer.step()
        results.append([*found, *codebooks(model).values()])
        assert all(c.shape[0] for c in codebooks(model).values())
    assert_same(*results)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_of_torchs_attention_changes_no_bit(use_reentrant: bool) -> None:
    class Twice(nn.Module):
        def __init__(self, again: bool) -> None:
            super().__init__()
            self.blocks, self.again = blocks(), again

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=use_reentrant) if self.again else block(x)
            return x

    results = []
    for again in (False, True):
        model = Twice(again)
        memsave.convert_model(model, config(codebook="ema", target_modules=r".*attention"))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        found: list[Tensor] = []
        for step in range(3):
            model.zero_grad()
            x = tokens(step).requires_grad_()
            model(x).square().sum().backward()
            found += [x.grad, *(p.grad.clone() for p in model.parameters())]  # type: ignore[union-attr, list-item]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        results.append([*found, *codebooks(model).values()])
    assert_same(*results)


def following(**settings: Any) -> tuple[Any, torch.optim.Optimizer]:
    """A model of torch's attention whose codebooks follow the keys, after the step that makes them."""
    model = blocks()
    memsave.convert_model(model, config(codebook="ema", **settings))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    model(tokens()).square().mean().backward()
    optimizer.step()
    return model, optimizer


def test_codebooks_begin_after_the_first_step_and_change_in_steps_alone() -> None:
    model, plain = blocks(), blocks()
    memsave.convert_model(model, config(codebook="ema"))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    torch.testing.assert_close(model(tokens()), plain(tokens()), rtol=1e-5, atol=1e-5)
    model(tokens()).square().mean().backward()
    assert all(c.shape == (0, 1, 16, 1) for c in codebooks(model).values())
    optimizer.step()
    first = {name: c.clone() for name, c in codebooks(model).items()}
    assert all(c.shape == (4, 1, 16, 4) for c in first.values())
    outputs = [model(x) for x in (tokens(), tokens(1), tokens())]
    assert torch.equal(outputs[0], outputs[2])
    assert all(torch.equal(c, first[name]) for name, c in codebooks(model).items())
    optimizer.step()
    second = codebooks(model)
    assert all(not torch.equal(c, first[name]) for name, c in second.items())
    optimizer.step()  # nothing was run since
    assert all(codebooks(model)[name] is c for name, c in second.items())


def test_evaluation_adds_no_keys() -> None:
    model, optimizer = following()
    before = codebooks(model)
    with torch.no_grad():
        model.eval()(tokens(3))
    optimizer.step()
    assert all(codebooks(model)[name] is c for name, c in before.items())


def test_keys_of_all_forwards_before_a_step_count() -> None:
    """As many as one sample holds, from accumulated forwards as from one with all of their sequences."""
    results = []
    for parts in (1, 2):
        model, optimizer = following()
        for x in torch.cat((tokens(5), tokens(6))).chunk(parts):
            model(x).square().mean().backward()
        pending = [state._pending[b.attention].keys.clone() for b in model]
        assert all(p.shape == (4, 4 * 80, 4) for p in pending)
        optimizer.step()
        results.append([p.flatten(0, 1).sort(0).values for p in pending])
    torch.testing.assert_close(*results)


def test_a_step_between_forward_and_backward_leaves_the_gradients_right() -> None:
    """Of another model's optimizer, say: the graph has kept the codebook that its forward read."""
    model, _ = following()
    other = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    expected = torch.autograd.grad(model(tokens(2)).square().sum(), list(model.parameters()))
    y = model(tokens(2))
    before = codebooks(model)
    other(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert all(codebooks(model)[name] is not c for name, c in before.items())
    assert_same(list(torch.autograd.grad(y.square().sum(), list(model.parameters()))), list(expected))


def test_codebooks_follow_the_keys_of_a_model_that_changes() -> None:
    """When the weights of the keys turn, the error of the codebook that stayed is 2.5 times as large."""
    model, optimizer = following(ema_decay=0.7)
    stale = model[0].attention.codebook.clone()
    with torch.no_grad():
        model[0].attention.in_proj_weight[16:32] *= -2
        model[0].attention.in_proj_bias[16:32] += 3
    sample = KeySample(10**6)
    for step in range(20):
        model(tokens(step)).sum().backward()
        sample = state._pending[model[0].attention]
        optimizer.zero_grad()
        optimizer.step()
    assert sample.keys is not None
    errors = [torch.cdist(sample.keys, c[:, 0]).square().amin(-1).mean() for c in (model[0].attention.codebook, stale)]
    assert errors[0] < errors[1] / 2.5


def test_restoring_forgets_keys_that_wait_for_a_step() -> None:
    model, optimizer = following()
    model(tokens())
    waiting = [b.attention for b in model]
    assert all(m in state._pending for m in waiting)
    memsave.restore_model(model, allow_lossy=True)
    assert not any(m in state._pending for m in waiting)
    optimizer.step()
    assert not codebooks(model)


def test_training_with_sparse_attention_learns_what_plain_training_learns() -> None:
    """Twenty steps on a batch: the loss falls as far, within a tenth of the way."""
    losses = {}
    for name, model in (
        ("plain", llama()),
        ("fit", sparse_llama("block")),
        ("ema", sparse_llama("block", codebook="ema")),
    ):
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        for _ in range(20):
            loss = train(model, batch())[0]
            optimizer.step()
        losses[name] = loss.item()
    start = train(llama(), batch())[0].item()
    assert losses["plain"] < start / 2
    assert all(losses[name] < losses["plain"] + 0.1 * (start - losses["plain"]) for name in ("fit", "ema"))


def interrupted(given: Any, error: BaseException) -> Iterator[Any]:
    yield given
    raise error


@pytest.mark.parametrize("error", [None, OSError("gone"), KeyboardInterrupt()])
@pytest.mark.parametrize("make", [llama, blocks])
def test_calibration_leaves_a_model_as_it_was(make: Callable[[], Any], error: BaseException | None) -> None:
    """Classes, hooks, modes, configs, values and random numbers; also when it is broken off, or the model fails."""
    model = make()
    given: Any = batch("left") if make is llama else tokens()
    next(iter(model.children())).eval()
    modes = [m.training for m in model.modules()]
    settings = [(m.config, dict(vars(m.config))) for m in model.modules() if hasattr(m, "config")]
    before, numbers = snapshot(model), torch.get_rng_state()
    if error is None:
        memsave.convert_model(model, config(), calibration=iter([given, given]))
        assert [m.training for m in model.modules()] == modes
        memsave.restore_model(model, allow_lossy=True)
    else:
        with pytest.raises(type(error)):
            memsave.convert_model(model, config(), calibration=interrupted(given, error))
        with pytest.raises((TypeError, ValueError)):
            memsave.convert_model(model, config(), calibration=[given, {"nonsense": 1}])
    assert snapshot(model) == before and torch.equal(torch.get_rng_state(), numbers)
    now = [m.config for m in model.modules() if hasattr(m, "config")]
    assert all(a is b and vars(a) == c for a, (b, c) in zip(now, settings, strict=True))


def test_while_calibrating_the_model_computes_what_it_did() -> None:
    """Densely, in evaluation mode, without gradients; a codebook depends on the batches and on nothing else."""
    model, plain = llama(), llama().eval()
    seen: list[Tensor] = []
    model.register_forward_hook(lambda module, args, output: seen.append(output.logits))
    memsave.convert_model(model, config(), calibration=[batch("left")])
    with torch.no_grad():
        expected = plain(**batch("left")).logits
    real = batch("left")["attention_mask"].bool()
    torch.testing.assert_close(seen[0][real], expected[real], rtol=1e-5, atol=1e-5)
    assert not seen[0].requires_grad
    torch.manual_seed(99)
    again = llama()
    memsave.convert_model(again, config(), calibration=[batch("left")])
    assert_same(list(codebooks(again).values()), list(codebooks(model).values()))


def test_keys_of_padding_are_in_no_codebook() -> None:
    """Of a Llama whose padding has embeddings far from all others."""
    model = llama()
    given = batch("left")
    given["input_ids"] = given["input_ids"].clamp(min=2).masked_fill(given["attention_mask"] == 0, 1)
    with torch.no_grad():
        model.model.embed_tokens.weight[1] = 0
        model.model.layers[0].input_layernorm.register_forward_hook(
            lambda module, args, y: y + 1e3 * (args[0].abs().sum(-1, keepdim=True) == 0)
        )
        memsave.convert_model(model, config(target_modules=["layers.0.self_attn"]), calibration=[given])
    assert next(iter(codebooks(model).values())).abs().max() < 100


def test_exact_methods_can_be_there_before_and_after() -> None:
    """The norms before attention give notes to the linears inside a converted module, as without it."""
    first, second = llama(), llama()
    memsave.convert_model(first, RecomputeNormConfig())
    memsave.convert_model(first, config(), calibration=[batch()])
    memsave.convert_model(second, config(), calibration=[batch()])
    memsave.convert_model(second, RecomputeNormConfig())
    results = [train(m, batch("left")) for m in (first, second, sparse_llama())]
    assert_same(results[0], results[1])
    for mine, alone in zip(results[0], results[2], strict=True):
        torch.testing.assert_close(mine, alone, rtol=1e-3, atol=1e-5)


def test_a_module_used_twice_has_one_codebook() -> None:
    block = Block()
    model = nn.Sequential(block, block)
    memsave.convert_model(model, config(), calibration=[tokens()])
    assert len(codebooks(model)) == 1
    copied = copy.deepcopy(model)
    assert torch.equal(model(tokens()), copied(tokens()))
