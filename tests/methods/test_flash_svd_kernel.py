"""FlashSVD with feed-forward blocks as one op: what they compute, and which blocks that is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memsave
import memsave.nn.low_rank.rows as rows
from memsave import ops
from memsave.nn.low_rank.rows import RowWise

from ..cases.methods import WIDTH, FusedMLP, GatedMLP, plain_mlp


class ActFirst(nn.Module):
    """Phi-3's, with the halves the other way around."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(WIDTH, 40)
        self.down = nn.Linear(20, WIDTH)
        self.act = nn.GELU(approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.both(x).chunk(2, dim=-1)
        return self.down(self.act(gate) * up)


def with_dropouts() -> nn.Module:
    """T5's has the first, GPT-2's the second; in evaluation they do nothing."""
    return nn.Sequential(nn.Linear(WIDTH, 20), nn.GELU(), nn.Dropout(0.5), nn.Linear(20, WIDTH), nn.Dropout(0.5))


BLOCKS = {
    "gated": GatedMLP,
    "fused": FusedMLP,
    "plain": plain_mlp,
    "act first": ActFirst,
    "dropouts": with_dropouts,
}


def models(name: str, **settings: Any) -> tuple[Any, Any]:
    """A block in a container, low-rank: as one op, and as it was."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Identity(), BLOCKS[name]()).eval()
    found = []
    for each in ({"kernel": True}, {"fuse": False}):
        model = copy.deepcopy(plain)
        memsave.convert_model(model, memsave.FlashSVDConfig(rank=3, target_modules=r".*", **each, **settings))
        found.append(model)
    return found[0], found[1]


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_op_computes_the_block(monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype) -> None:
    calls = []
    op = ops.low_rank_mlp
    monkeypatch.setattr(rows.ops, "low_rank_mlp", lambda *args: calls.append(args) or op(*args))
    monkeypatch.setattr(rows, "chunk_rows", lambda *_: 4)
    model, still = (each.to(dtype) for each in models(name))
    x = torch.randn(2, 9, WIDTH, dtype=dtype)
    with torch.no_grad():
        found, expected = model(x), still(x)
    assert len(calls) == 1 and isinstance(model[1], RowWise)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_linear_that_stayed_dense_leaves_the_block_to_its_own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "chunk_rows", lambda *_: 4)
    monkeypatch.setattr(rows.ops, "low_rank_mlp", lambda *_: pytest.fail("its up projection is not low-rank"))
    model, still = models("gated", exclude_modules=[r"up_proj"])
    x = torch.randn(2, 9, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(model(x), still(x), rtol=1e-5, atol=1e-5)


def test_small_inputs_and_gradients_take_the_plain_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows.ops, "low_rank_mlp", lambda *_: pytest.fail("not for this call"))
    model, still = models("gated")
    x = torch.randn(2, 9, WIDTH)
    with torch.no_grad():
        assert torch.equal(model(x), still(x))
    monkeypatch.setattr(rows, "chunk_rows", lambda *_: 4)
    model(x).sum().backward()
    assert model[1].up_proj.first.grad is not None


def test_a_dropout_that_is_left_on_is_not_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "chunk_rows", lambda *_: 4)
    monkeypatch.setattr(rows.ops, "low_rank_mlp", lambda *_: pytest.fail("it would drop nothing"))
    model, still = models("dropouts")
    model[1][4].train()
    with torch.no_grad():
        assert (model(torch.randn(2, 9, WIDTH)) == 0).any()


class OverTokens(nn.Module):
    """Looks like a feed-forward block, but its forward mixes the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(WIDTH, 40), nn.GELU(), nn.Linear(40, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x - x.mean(1, keepdim=True))))


def test_a_block_that_needs_all_tokens_is_named_and_left_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "chunk_rows", lambda *_: 4)
    monkeypatch.setitem(BLOCKS, "over tokens", OverTokens)
    model, still = models("over tokens")
    assert not isinstance(model[1], RowWise)
    report = memsave.convert_model(
        nn.Sequential(nn.Identity(), OverTokens()), memsave.FlashSVDConfig(rank=3, target_modules=r".*")
    )
    (reason,) = {skip.reason for skip in report.skipped}
    assert reason == "not fused: tried on a few tokens, its forward does not work on each alone"
    x = torch.randn(2, 9, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(model(x), still(x))
