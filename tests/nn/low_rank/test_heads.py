"""Attention by groups of heads: found by structure, equal to the whole, smaller, and never at the cost of more work."""

from __future__ import annotations

import copy
import json
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import memsave
from memsave.nn.low_rank import heads
from memsave.nn.low_rank.group_run import Run
from memsave.nn.low_rank.heads import HeadStreaming
from memsave.nn.low_rank.layout import HeadLayout
from memsave.nn.low_rank.linear import LowRankLinear

from .toys import (
    WIDTH,
    Attention,
    FusedAttention,
    Largest,
    Layer,
    NormedHeads,
    ScaledInForward,
    TalkingHeads,
    counted_groups,
    flops_of,
    low_rank_pair,
    small_budgets,
    tokens,
)

property_settings = settings(
    max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
# The module, its key/value heads, and whether its heads run in rank space where each has factors of its own.
KINDS: dict[str, tuple[Callable[[], nn.Module], int, bool]] = {
    "heads": (Attention, 4, True),
    "no_bias": (lambda: Attention(bias=False), 4, True),
    "grouped_queries": (lambda: Attention(4, 2), 2, True),
    "two_heads": (lambda: Attention(2), 2, True),
    "fused": (FusedAttention, 4, False),
    "scaled_in_forward": (ScaledInForward, 4, False),
    "normed": (NormedHeads, 4, False),
    "layer": (Layer, 4, True),
}
kinds = pytest.mark.parametrize("kind", list(KINDS))
per_head = pytest.mark.parametrize("per_head", [False, True], ids=["whole", "per_head"])


@pytest.fixture(autouse=True)
def _small_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    small_budgets(monkeypatch)


def pair(kind: str, per_head: bool, **settings: Any) -> Any:
    """Without streaming and with it."""
    return low_rank_pair(KINDS[kind][0], per_head=per_head, **settings)[:2]


def streaming(model: nn.Module) -> list[HeadStreaming]:
    return [module for module in model.modules() if isinstance(module, HeadStreaming)]


@kinds
@per_head
def test_groups_compute_what_all_heads_do(kind: str, per_head: bool) -> None:
    plain, model = pair(kind, per_head)
    assert per_head == any(m.heads is not None for m in plain.modules() if isinstance(m, LowRankLinear))
    with torch.inference_mode():
        for leading in ((1, 1), (1, 7), (3, 1), (2, 12), *([(0, 3), (3, 0)] if kind == "heads" else [])):
            x = tokens(*leading)
            with counted_groups() as groups:
                found = model(x)
            torch.testing.assert_close(found, plain(x), rtol=1e-12, atol=1e-12)
            assert groups == [(per_head and KINDS[kind][2], KINDS[kind][1])]


@kinds
@per_head
@pytest.mark.parametrize("size", [2, 3, 4])
@torch.no_grad()
def test_groups_of_several_heads_and_a_smaller_rest(
    kind: str, per_head: bool, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, model = pair(kind, per_head)
    count = KINDS[kind][1]
    groups = [slice(start, min(start + size, count)) for start in range(0, count, size)]
    monkeypatch.setattr(HeadStreaming, "_groups", lambda *args: groups)
    x = tokens(2, 5)
    with counted_groups() as found:
        torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)
    absorbed = per_head and KINDS[kind][2]
    assert found == ([(absorbed, len(groups))] if absorbed or len(groups) > 1 else [])


@kinds
@per_head
def test_bf16_errs_no_more_than_twice_the_whole(kind: str, per_head: bool) -> None:
    plain, model = low_rank_pair(KINDS[kind][0], torch.bfloat16, per_head=per_head)[:2]
    x = tokens(4, 12, dtype=torch.bfloat16)
    with torch.no_grad():
        truth = copy.deepcopy(plain).double()(x.double())
        errors = [float((each(x).double() - truth).norm() / truth.norm()) for each in (model, plain)]
    assert errors[0] <= 2 * errors[1] + torch.finfo(torch.bfloat16).eps


@property_settings
@given(budget_bytes=st.integers(1, 40_000), batch=st.integers(1, 3), length=st.integers(1, 9))
def test_a_group_has_as_many_heads_as_the_budget_allows(budget_bytes: int, batch: int, length: int) -> None:
    """q, k, v and the output of a head: 2 * (2 + 1) features for two query heads of size 8 and their key/value head."""
    _, model = pair("grouped_queries", False)
    x, seen = tokens(batch, length), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(heads.GROUP_BYTES, "cpu", budget_bytes)
        patch.setattr(Run, "by_groups", lambda run, groups, *args: seen.append(groups))
        with torch.no_grad():
            model(x)
    per_head_bytes = batch * length * 8 * (2 * 2 + 2 * 1) * 8
    if budget_bytes >= 2 * per_head_bytes:
        assert not seen, "all heads fit, so that the module runs as it is"
    else:
        assert seen == [[slice(0, 1), slice(1, 2)]]


@torch.no_grad()
@kinds
@per_head
def test_nothing_is_as_large_as_the_input_and_nothing_is_computed_twice(kind: str, per_head: bool) -> None:
    """Short sequences, so that the scores of a head are smaller than the input."""
    plain, model = pair(kind, per_head, rank=2)
    x = tokens(64, 4)
    sizes = []
    for each in (plain, model):
        with Largest() as made:
            each(x)
        sizes.append([torch.Size(shape).numel() for shape in made.shapes_of(x.numel())])
    outputs = 4 if kind == "layer" else 1  # those of both parts, and the sums with what goes around them
    assert sizes[1] == [x.numel()] * outputs and len(sizes[0]) > outputs
    flops = [flops_of(each, x) for each in (plain, model)]
    absorbed = per_head and KINDS[kind][2]
    assert 0 < flops[1] < flops[0] if absorbed else flops[1] == flops[0] > 0


@torch.no_grad()
@per_head
def test_temporary_bytes_fall(per_head: bool) -> None:
    plain, model = pair("heads", per_head)
    x = tokens(64, 4)
    parameter_bytes = sum(p.nbytes for p in model.parameters())
    peaks = [memsave.measure(lambda each=each: each(x)).peak_bytes for each in (plain, model)]
    temporary = [peak - parameter_bytes - x.nbytes for peak in peaks]
    assert temporary[0] >= 3 * x.nbytes
    # The latents of q, k, v and of the output, of rank 4 of 32 features, or per head 4 of 8; and one head's tensors.
    latents = 3 * 16 + 4 if per_head else 4 * 4
    assert temporary[1] <= x.nbytes * (latents + 6 * 8) / WIDTH + x.nbytes


def test_gradients_training_and_autocast_run_all_heads() -> None:
    plain, model = pair("heads", True)
    x = tokens(2, 6)
    with counted_groups() as groups:
        grads = []
        for each in (plain, model):
            each(x).square().sum().backward()
            grads.append([p.grad for p in each.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
        with torch.no_grad():
            assert torch.equal(model.train()(x), plain(x))
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(model.eval().float()(x.float()), plain.float()(x.float()))
    assert not groups


@pytest.mark.parametrize("name", ["q_proj", "v_proj", "o_proj"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
@torch.no_grad()
def test_hooks_see_all_heads(name: str, kind: str) -> None:
    plain, model = pair("heads", False)
    x, seen = tokens(2, 6), []
    handle = getattr(model[0].get_submodule(name), kind)(lambda module, *values: seen.append(values[-1]))
    with counted_groups() as groups:
        torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)
        assert not groups and (seen[0] if kind == "register_forward_hook" else seen[0][0]).shape == x.shape
        handle.remove()
        model(x)
    assert groups == [(False, 4)]


@kinds
@torch.no_grad()
def test_a_run_leaves_no_trace(kind: str) -> None:
    """Also one that fails midway."""
    plain, model = pair(kind, True)
    before = {name: (type(m), dict(m.__dict__), dict(m._modules)) for name, m in model.named_modules()}
    x = tokens(2, 6)
    model(x)
    calls = []

    def failing(self: LowRankLinear, latent: Tensor, *args: Any) -> Tensor:
        calls.append(latent)
        raise OSError("no")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LowRankLinear, "expand", failing)
        with pytest.raises(OSError, match="no"):
            model(x)
    assert calls
    after = {name: (type(m), dict(m.__dict__), dict(m._modules)) for name, m in model.named_modules()}
    assert after == before
    torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_hooks_on_the_module_itself_get_its_input_and_output() -> None:
    """A forward hook may ask for the probabilities of all heads, which the module's own function returns."""
    plain, model = pair("heads", False)
    x, seen = tokens(2, 6), []
    before = model[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with counted_groups() as groups:
        found = model(x)
        assert seen == [x] and groups == [(False, 4)]
        before.remove()
        model[0].register_forward_hook(lambda module, args, output: seen.append(output))
        assert torch.equal(model(x), plain(x)) and len(groups) == 1 and len(seen) == 2
    torch.testing.assert_close(seen[1], found, rtol=1e-12, atol=1e-12)


class Nameless(Attention):
    """Its heads cannot be told from its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.shape = self.num_heads, self.head_dim
        del self.num_heads, self.head_dim

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            each(x).unflatten(-1, self.shape).transpose(1, 2) for each in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj(self.attend(q, k, v).transpose(1, 2).flatten(2))


class AsksForMore(Attention):
    """Its forward requires what nobody knows."""

    def forward(self, x: Tensor, temperature: float) -> Tensor:  # type: ignore[override]
        return super().forward(x * temperature)


class Headless(nn.Module):
    """Without an output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.num_heads = 4

    def forward(self, x: Tensor) -> Tensor:
        return self.query(x) * self.key(x).softmax(-1) * self.value(x)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (TalkingHeads, "by groups of heads|for a group of heads"),
        (lambda: Attention(4, 1), "its one key/value head cannot be divided"),
        (Nameless, "its heads do not follow from its attributes"),
        (AsksForMore, "its forward could not be tried .*it requires temperature"),
        (Headless, "no output projection was found"),
    ],
    ids=["talking", "mqa", "nameless", "asks_for_more", "headless"],
)
@per_head
def test_what_cannot_be_divided_is_named_and_computed_as_it_is(
    make: Callable[[], nn.Module], reason: str, per_head: bool
) -> None:
    plain, model, report = low_rank_pair(make, per_head=per_head)
    assert not streaming(model)
    (skip,) = [s for s in report.skipped if "0" in s.names]
    assert skip.reason.startswith("not fused: ")
    assert re.search(reason, skip.reason), skip.reason
    x = tokens(2, 6)
    args = (x, 0.5) if make is AsksForMore else (x,)
    with torch.no_grad():
        assert torch.equal(model[0](*args), plain[0](*args))


def test_trying_leaves_modes_and_random_numbers_alone() -> None:
    model = nn.Sequential(Layer(), Layer()).train()
    model[0].fc1.eval()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    memsave.convert_model(model, memsave.FlashSVDConfig(target_modules=r".*", rank=4))
    assert torch.equal(torch.rand(3), expected)
    assert not model[0].fc1.training and all(m.training for n, m in model.named_modules() if n != "0.fc1")
    assert not any(p.grad is not None for p in model.parameters())


@per_head
@torch.no_grad()
def test_copies_stream(per_head: bool) -> None:
    _, model = pair("layer", per_head)
    x = tokens(2, 6)
    expected = model(x)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with counted_groups() as groups:
            assert torch.equal(copied(x), expected)
        assert groups == [(per_head, 4)]
        assert streaming(copied)[0]._layout == streaming(model)[0]._layout


layouts = st.builds(
    lambda kv, per_kv, size, fused, scaled, sized: HeadLayout(
        query="q", key="q" if fused else "k", value="q" if fused else "v", output="o", inner="", tail="",
        num_heads=kv * per_kv, num_kv_heads=kv, head_size=size, scaled=scaled, sized=sized,
    ),
    st.integers(1, 5), st.integers(1, 3), st.integers(1, 4), st.booleans(),
    st.sampled_from([(), (("", "num_heads"), ("inner", "config.heads"))]),
    st.sampled_from([None, (), (("", "head_dim"),)]),
)  # fmt: skip


@property_settings
@given(layout=layouts, data=st.data())
def test_the_blocks_of_all_groups_are_all_features(layout: HeadLayout, data: st.DataObject) -> None:
    assert HeadLayout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout
    cuts = sorted({0, layout.num_kv_heads, *data.draw(st.lists(st.integers(0, layout.num_kv_heads), max_size=3))})
    found: dict[tuple[str, str], list[int]] = {}
    for start, stop in zip(cuts, cuts[1:], strict=False):
        for name, roles in layout.blocks(slice(start, stop)).items():
            for role, block in roles.items():
                features = layout.features(block)
                found.setdefault((name, role), []).extend(range(features.start, features.stop))
    by_name: dict[str, list[int]] = {}
    for (name, _), features in found.items():
        by_name[name] = by_name.get(name, []) + features
    for name, features in by_name.items():
        assert features == list(range(layout.num_blocks(name) * layout.head_size))
    assert {role for _, role in found} == {"query", "key", "value"}
