"""Chains of notes: what is made from a noted tensor has a note of its own, made of the first one's."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import memsave
from memsave.nn import note

from .helpers import Block, HFStyleRMSNorm, assert_same, converted, gradients
from .test_note import NORMS, RUNS, WIDTH, recomputations


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))


class Negative(nn.Module):
    """-x, which keeps nothing itself: whatever is kept is kept for its readers."""

    def forward(self, x: Tensor) -> Tensor:
        return -x


class ChainedNegative(Negative):
    def forward(self, x: Tensor) -> Tensor:
        y = -x
        if torch.is_grad_enabled():
            recompute, tensors, per_row = note.source(x)
            note.attach(y, note.Recipe(lambda *kept: -recompute(*kept), per_row), tensors)
        return y


def blocks(norm: type[nn.Module] = nn.RMSNorm, length: int = 3) -> tuple[Block, Block]:
    """A norm, and `length` modules that map its output, before the linears that read the last one's."""
    torch.manual_seed(0)
    plain = Block(nn.Sequential(norm(WIDTH), *(Negative() for _ in range(length))))
    ours = converted(plain)
    for module in ours.modules():
        if type(module) is Negative:
            module.__class__ = ChainedNegative
    return plain, ours  # type: ignore[return-value]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("norm", NORMS)
def test_gradients_are_those_of_the_plain_modules(norm: type[nn.Module], run: str, x: Tensor) -> None:
    plain, ours = blocks(norm)
    assert_same(
        gradients(lambda x: RUNS[run](ours, x), ours, x), gradients(lambda x: RUNS[run](plain, x), plain, x), ulps=16
    )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_chain_keeps_what_its_first_note_keeps(norm: type[nn.Module], length: int, x: Tensor) -> None:
    x.requires_grad_(True)
    _, alone = blocks(norm, 0)
    plain, ours = blocks(norm, length)
    kept = memsave.saved_bytes(lambda: ours(x))
    assert kept == memsave.saved_bytes(lambda: alone(x))
    assert kept < memsave.saved_bytes(lambda: plain(x))


def test_a_chain_is_recomputed_once_for_all_its_readers(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = blocks()
    count = recomputations(monkeypatch)
    gradients(ours, ours, x)
    assert len(count) == 1


def test_readers_of_a_link_and_of_its_source_each_get_theirs(x: Tensor) -> None:
    plain, ours = blocks(length=1)

    def run(block: Block, x: Tensor) -> Tensor:
        y = block.norm[0](x)
        return block.q(y).tanh() + block.k(block.norm[1](y)).tanh() + block.v(y)

    assert_same(gradients(lambda x: run(ours, x), ours, x), gradients(lambda x: run(plain, x), plain, x), ulps=16)


def test_the_source_is_the_note_where_it_holds_and_else_the_tensor(x: Tensor) -> None:
    _, ours = blocks()
    y = ours.norm[0](x.requires_grad_(True))
    noted, modified = note.source(y), (y := ours.norm[0](x)).add_(1.0)
    assert noted.tensors[0].data_ptr() == x.data_ptr() and noted.per_row == (True, False)
    assert torch.equal(noted.recompute(*noted.tensors), ours.norm[0](x))
    whole = note.source(modified)
    assert whole.tensors[0].data_ptr() == y.data_ptr() and whole.per_row == (True,)
    assert not whole.tensors[0].requires_grad
    assert note.source(ours.norm[0](x).view(-1, WIDTH)).per_row == (True, False)
    with saved_tensors_hooks(lambda t: t, lambda t: t):
        assert note.source(y).per_row == (True,)


@pytest.mark.parametrize("what", ["link", "between", "input"])
def test_modification_anywhere_in_the_chain_is_detected(what: str, x: Tensor) -> None:
    """A link that was modified before the next one read it is no source; after that it may change as it likes."""
    plain, ours = blocks()

    def run(block: Block, x: Tensor) -> Tensor:
        h = x * 1.5
        y = block.norm[1](block.norm[0](h))
        if what == "link":
            y.mul_(3.0)
        z = block.norm[2](y)
        if what == "between":
            y.mul_(3.0)
        if what == "input":
            h.detach().mul_(2)
        return block.q(z) + block.v(z)

    if what == "input":
        for block in (plain, ours):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                gradients(lambda x, block=block: run(block, x), block, x)
        return
    assert_same(gradients(lambda x: run(ours, x), ours, x), gradients(lambda x: run(plain, x), plain, x), ulps=16)


def test_rows_of_a_chain_are_those_of_its_output(x: Tensor) -> None:
    _, ours = blocks(HFStyleRMSNorm)
    y = ours.norm(x.requires_grad_(True))
    found = note.find(y)
    assert found is not None
    rows = torch.tensor([7, 0, 7])
    assert torch.equal(found.recipe.output_rows(found.tensors, rows), y.reshape(-1, WIDTH)[rows])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_under_a_checkpoint_a_chain_holds_nothing(use_reentrant: bool, x: Tensor) -> None:
    _, ours = blocks()
    made: list[weakref.ref[torch.UntypedStorage]] = []
    for module in ours.norm:
        module.register_forward_hook(lambda _m, _i, out: made.append(weakref.ref(out.untyped_storage())))
    out = checkpoint(ours, x.requires_grad_(True), use_reentrant=use_reentrant)
    gc.collect()
    assert len(made) == 4 and all(ref() is None for ref in made) and len(note._notes) == 0
    out.sum().backward()
    gc.collect()
    assert len(note._notes) == 0


def test_links_that_live_on_do_not_hold_the_first_input(x: Tensor) -> None:
    _, ours = blocks()
    h = x.requires_grad_(True) * 1.0
    storage = weakref.ref(h.untyped_storage())
    y = ours.norm(h)
    out = ours.q(y).sum()
    del h
    gc.collect()
    assert storage() is not None
    out.backward()
    gc.collect()
    assert storage() is None and note.find(y) is None
