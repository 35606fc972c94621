"""Rows that are made when they are read, and modules that run on some of them at a time."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import memsave
from memsave.nn.low_rank.lazy_rows import LazyRows, filled, rows_of
from memsave.nn.low_rank.linear import LowRankLinear
from memsave.nn.low_rank.rows import RowWise, row_work

from .toys import WIDTH, GatedMLP, Largest, TwoModules, Wide, flops_of, low_rank_pair, small_budgets, tokens

property_settings = settings(
    max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
BLOCKS = {"gated": GatedMLP, "two modules": TwoModules, "sequential": lambda: nn.Sequential(*plain_mlp())}


def plain_mlp() -> list[nn.Module]:
    return [nn.Linear(WIDTH, 96), nn.GELU(), nn.Linear(96, WIDTH)]


def lazy(x: Tensor, chunk_rows: int = 4, log: list[tuple[int, int]] | None = None, *, fresh: bool = True) -> LazyRows:
    """Rows of x to come; `log` gets those that are made."""

    def make(start: int, stop: int) -> Tensor:
        if log is not None:
            log.append((start, stop))
        return rows_of(x, start, stop).clone()

    return LazyRows.of(x.shape, x, chunk_rows, make, fresh=fresh)


OTHER = tokens(2, 5, width=3)
ELEMENTWISE: dict[str, Callable[[Any], Any]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "chain": lambda x: 0.5 * x * (1.0 + torch.tanh(0.8 * (x + 0.04 * torch.pow(x, 3.0)))),
    "gate": lambda x: F.silu(x) * torch.sigmoid(x),
    "swish": lambda x: x * torch.sigmoid(x),
    "swish_turned": lambda x: torch.sigmoid(x) * x,
    "of_one_more": lambda x: F.relu(x + 1) * (x + 1).tanh() + F.relu(F.gelu(x)),
    "add_scaled": lambda x: torch.add(x, x * 2, alpha=3),
    "add_number": lambda x: x + 1,
}
ANYTHING: dict[str, Callable[[Any], Any]] = {
    "sum": torch.sum,
    "matmul": lambda x: x @ x.transpose(1, 2),
    "linear": lambda x: F.linear(x, OTHER[0]),
    "softmax": lambda x: x.softmax(-1),
    "layer_norm": lambda x: F.layer_norm(x, (3,)),
    "cat": lambda x: torch.cat([x, OTHER, x], 1),
    "stack": lambda x: torch.stack([OTHER, x]),
    "dense_operand": lambda x: OTHER * x,
    "broadcast": lambda x: x + OTHER[:1],
    "other_dtype": lambda x: x + torch.ones_like(x, dtype=torch.float32),
    "tensor_number": lambda x: x * torch.tensor(2.0, dtype=torch.float64),
    "view": lambda x: x.view(-1, 3),
    "split": lambda x: torch.cat(x.split(2, 1), 1),
    "index": lambda x: x[1, 2:],
    "to": lambda x: x.to(torch.float32),
    "clone": torch.clone,
    "detach": lambda x: x.detach(),
    "compare": lambda x: x > 0,
    "item": lambda x: torch.tensor(x[0, 0, 0].item()),
    "in_place": lambda x: x.mul_(2) + x,
    "out": lambda x: torch.exp(x, out=torch.empty_like(OTHER)),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "where": lambda x: torch.where(x > 0, x, OTHER),
    "numpy": lambda x: torch.from_numpy(x.numpy().copy()) if not isinstance(x, LazyRows) else x.clone(),
    "einsum": lambda x: torch.einsum("btf,bsf->bts", x, OTHER),
}


@pytest.mark.parametrize("fresh", [False, True], ids=["others_have", "fresh"])
@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("function", [*ELEMENTWISE, *ANYTHING])
def test_every_function_gets_the_right_values(function: str, inference: bool, fresh: bool) -> None:
    run = (ELEMENTWISE | ANYTHING)[function]
    with torch.inference_mode(inference), torch.no_grad():
        x = tokens(2, 5, width=3)
        log: list[tuple[int, int]] = []
        found, expected = run(lazy(x, log=log, fresh=fresh)), run(x.clone())
        if function in ELEMENTWISE:
            assert type(found) is LazyRows and not log
            assert (found.shape, found.dtype, found.stride()) == (expected.shape, expected.dtype, expected.stride())
            torch.testing.assert_close(found.rows(3, 8), expected.view(-1, 3)[3:8], rtol=1e-14, atol=1e-14)
            assert log == [(3, 8)], "the rows of each operand are made once"
        found = torch.cat([found]) if type(found) is LazyRows else found
        assert type(found) is Tensor
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)


def test_rows_of_different_tensors_that_do_not_match_are_made() -> None:
    x = tokens(2, 5, width=3)
    with torch.no_grad():
        for other in (x.transpose(0, 1).reshape(5, 2, 3)[:1, :1], x.float(), x[:1]):
            found = lazy(x) * lazy(other)
            assert type(found) is Tensor and torch.equal(found, x * other)


def test_rows_are_made_once_where_they_are_read_twice() -> None:
    x, log = tokens(2, 5, width=3), []
    y: Any = lazy(x, log=log)
    with torch.no_grad():
        for part in ((0, 4), (4, 8)):
            assert y.rows(*part).data_ptr() == y.rows(*part).data_ptr()
        assert log == [(0, 4), (4, 8)] and y.made is None
        assert torch.equal(y.clone(), x) and torch.equal(y.sum(), x.sum())
    assert log == [(0, 4), (4, 8), (0, 4), (4, 8), (8, 10)], "the whole is made once"
    assert torch.equal(y.rows(1, 9), x.view(-1, 3)[1:9]) and len(log) == 5
    assert y.made.data_ptr() == rows_of(y, 0, 1).data_ptr()


@torch.no_grad()
def test_rows_that_were_read_are_not_overwritten() -> None:
    """Functions of fresh rows write over them; not where someone holds them, or two modules read them in parts."""
    x, log = tokens(2, 5, width=3), []
    y: Any = lazy(x, log=log)
    read, later = y.rows(0, 4), torch.relu(y)
    later.rows(0, 4)
    assert torch.equal(read, x.view(-1, 3)[:4])
    log.clear()
    y = lazy(x, log=log)
    later = torch.relu(y)
    parts = [each.part(0, 4) for each in (later, y)]
    assert torch.equal(torch.cat(parts), torch.stack([x.relu().view(-1, 3)[:4], x.view(-1, 3)[:4]])) and log == [(0, 4)]
    own, y = [], lazy(x)
    y._rows.make = lambda start, stop: own.append(rows_of(x, start, stop).clone()) or own[-1]
    assert torch.relu(y).rows(0, 4).data_ptr() == own[0].data_ptr(), "the function needs no memory"


def test_what_made_the_rows_is_freed_with_the_whole() -> None:
    x = tokens(2, 5, width=3)
    y, alive = lazy(x), weakref.ref(x)
    del x
    gc.collect()
    assert alive() is not None
    with torch.no_grad():
        y.sum()
    gc.collect()
    assert alive() is None


def test_it_holds_no_bytes_until_it_is_made() -> None:
    x = tokens(20, 50, width=64)
    with torch.no_grad():
        y = lazy(x)
        assert y.__tensor_flatten__() == ([], None) and "LazyRows(shape=(20, 50, 64)" in repr(y)
        peak_bytes = memsave.measure(lambda: y.rows(0, 10) + F.gelu(y).rows(0, 10)).peak_bytes
        assert peak_bytes < 1.1 * x.nbytes, "x itself, and some rows"
        y.sum()
        assert y.__tensor_flatten__() == (["made"], None)


@property_settings
@given(shape=st.lists(st.integers(0, 4), min_size=1, max_size=4), chunk_rows=st.integers(1, 9))
def test_a_tensor_is_filled_chunk_by_chunk(shape: list[int], chunk_rows: int) -> None:
    x = tokens(*shape[:-1], width=shape[-1] + 1)
    parts: list[int] = []

    def make(start: int, stop: int) -> Tensor:
        parts.append(stop - start)
        return rows_of(x, start, stop).float()

    y = filled(x.shape, x, chunk_rows, make)
    num_rows = x.shape[:-1].numel()
    assert sum(parts) == num_rows and len(parts) == -(-num_rows // chunk_rows) and max(parts, default=0) <= chunk_rows
    assert y.dtype == (torch.float32 if num_rows else torch.float64) and torch.equal(y, x.to(y.dtype))


@pytest.fixture(params=list(BLOCKS))
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A low-rank feed-forward block without streaming and with it, chunks of 5 tokens."""
    small_budgets(monkeypatch)
    return low_rank_pair(BLOCKS[request.param])[:2]


def chunks(model: nn.Module, x: Tensor) -> list[int]:
    """The tokens in each call of the last linear's factors, of the hidden units that run."""
    linear = [m for m in model.modules() if isinstance(m, LowRankLinear)][-1]
    found: list[int] = []
    project = linear.project

    def counted(x: Tensor) -> Tensor:
        found.append(x.shape[:-1].numel())
        return project(x)

    linear.project = counted  # type: ignore[method-assign]
    try:
        model(x)
    finally:
        del linear.__dict__["project"]
    return found


@property_settings
@given(leading=st.lists(st.integers(0, 6), min_size=1, max_size=3))
def test_blocks_stream_and_compute_the_same(blocks: Any, leading: list[int]) -> None:
    plain, model = blocks
    x = tokens(*leading)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)
        tokens_at_once = chunks(model, x)
        assert sum(tokens_at_once) == x.shape[:-1].numel() and max(tokens_at_once, default=0) <= 5


@torch.no_grad()
def test_hidden_units_are_never_whole_and_nothing_is_computed_twice(blocks: Any) -> None:
    plain, model = blocks
    x = tokens(4, 25)
    with Largest() as whole:
        plain(x)
    assert whole.shapes_of(100 * 96)
    with Largest() as streamed:
        model(x)
    outputs = streamed.shapes_of(100 * WIDTH)
    assert outputs == [(4, 25, WIDTH)], "only the output is as large as the input"
    assert flops_of(model, x) == flops_of(plain, x) > 0
    peaks = [memsave.measure(lambda each=each: each(x)).peak_bytes for each in (plain, model)]
    parameter_bytes = sum(p.nbytes for p in model.parameters())
    temporary = [peak - parameter_bytes - 2 * x.nbytes for peak in peaks]
    assert temporary[0] >= 100 * 96 * 8 and temporary[1] <= 5 * (3 * 96 + 2 * WIDTH + 8) * 8


def test_what_is_not_served_runs_as_a_whole(blocks: Any) -> None:
    """Gradients, training, autocast and hooks: the values are those of the plain block."""
    plain, model = blocks
    x = tokens(4, 25)
    grads = []
    for each in blocks:
        each.zero_grad()
        each(x).square().sum().backward()
        grads.append([p.grad for p in each.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert chunks(model, x) == [100]
    with torch.no_grad():
        assert len(chunks(model, x)) == 20
        assert chunks(model.train(), x) == [100]
        assert len(chunks(model.eval(), x)) == 20
        with torch.autocast("cpu", torch.bfloat16):
            assert chunks(model.float(), x.float()) == [100]
            assert torch.equal(model(x.float()), plain.float()(x.float()))


def test_a_hook_inside_a_block_sees_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    small_budgets(monkeypatch)
    plain, model, _ = low_rank_pair(GatedMLP)
    seen: list[Any] = []
    handle = model[0].up_proj.register_forward_hook(lambda module, args, output: seen.append(output))
    x = tokens(4, 25)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
        assert [y.shape for y in seen] == [(4, 25, 96)]
        handle.remove()
        assert len(chunks(model, x)) == 20


def test_a_hook_on_a_linear_that_hands_on_rows_gets_its_values(monkeypatch: pytest.MonkeyPatch) -> None:
    small_budgets(monkeypatch)
    plain, model, _ = low_rank_pair(TwoModules)
    seen: dict[str, Tensor] = {}
    for name, each in (("plain", plain), ("model", model)):
        each[0].intermediate.dense.register_forward_hook(lambda m, args, y, name=name: seen.update({name: y * 1.5}))
    x = tokens(4, 25)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(seen["model"].clone(), seen["plain"], rtol=1e-12, atol=1e-12)


class OverTokens(GatedMLP):
    """Looks like a feed-forward block, but tokens see each other."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x).softmax(-2))


def test_a_block_in_which_tokens_see_each_other_is_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    small_budgets(monkeypatch)
    plain, model, _ = low_rank_pair(OverTokens)
    assert not any(isinstance(m, RowWise) for m in model.modules())
    x = tokens(4, 25)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x)) and chunks(model, x) == [100]


def test_what_a_module_is_by_rows() -> None:
    block = GatedMLP().train()
    work = row_work(block, [WIDTH])
    assert work is not None
    assert (work.num_inputs, work.out_features, work.hidden_features, work.lazy) == (1, WIDTH, 96, False)
    assert block.training and row_work(OverTokens(), [WIDTH]) is None and row_work(Wide(), [7]) is None
    assert row_work(GatedMLP().to("meta"), [WIDTH]) is None and row_work(nn.Identity(), [WIDTH]) is None
    broken = GatedMLP()
    nn.init.constant_(next(broken.parameters()), float("nan"))
    assert row_work(broken, [WIDTH]) is None


def test_copies_stream(blocks: Any) -> None:
    _, model = blocks
    x = tokens(4, 25)
    with torch.no_grad():
        copied = copy.deepcopy(model)
        assert torch.equal(copied(x), model(x)) and len(chunks(copied, x)) == 20


def test_writing_to_lazy_rows_does_not_reach_what_was_made_of_them_before() -> None:
    with torch.no_grad():
        source = torch.ones(2, 5, 3)
        first = LazyRows.of(source.shape, source, 2, lambda a, b: source.view(-1, 3)[a:b].clone(), fresh=True)
        second = torch.relu(first)
        first.mul_(2)
        assert torch.equal(torch.cat([second]), source) and torch.equal(torch.cat([first]), 2 * source)
        assert torch.equal(source, torch.ones(2, 5, 3))


def test_an_input_that_is_modified_before_its_rows_are_made_raises() -> None:
    linear = LowRankLinear(4, 400, 2).eval()
    linear.lazy = True
    for parameter in linear.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 1400, 4)
    with torch.no_grad():
        y = linear(x)
        assert isinstance(y, LazyRows)
        x.add_(1)
        with pytest.raises(RuntimeError, match="was modified in place before that"):
            torch.cat([y])
