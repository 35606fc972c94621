"""Second moments against x^T x in float64, what shares one, and how many live at once."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memsave
from memsave.nn.low_rank import moments
from memsave.nn.low_rank.moments import second_moments

from .collecting import FEATURES, GROUPS, Calls, Experts, attention, by_hand, collected, data, part, surroundings


@pytest.mark.parametrize("budget_bytes", [None, 0, 8 * (FEATURES**2 + 100), 10**9])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_moments_are_those_of_the_inputs(budget_bytes: int | None, dropout: float) -> None:
    model, batches = attention(dropout=dropout), data()
    expected = by_hand(model, batches)
    model.calls.clear()
    before = surroundings(model)
    found = collected(model, part(model), batches, budget_bytes=budget_bytes)
    calls, model.calls = model.calls, []
    assert surroundings(model) == before
    assert list(found) == GROUPS
    for names, moment in found.items():
        assert moment.dtype == torch.float64 and not moment.requires_grad
        for name in names:
            torch.testing.assert_close(moment, expected[name])
    # By default down (800 bytes), then q and gate and out (704 bytes).
    passes = {None: 2, 0: 4, 8 * (FEATURES**2 + 100): 2, 10**9: 1}[budget_bytes]
    assert calls == [(False, False)] * (passes * len(batches) + 1)


def test_batches_of_every_kind() -> None:
    x = data()
    batches: list[Any] = [{"x": x[0], "scale": 2.0}, (x[1], 3.0), [x[2]], x[0]]
    model = attention()
    expected = by_hand(model, [batches[0], batches[1], x[2], x[0]])
    for names, moment in collected(model, part(model), batches).items():
        torch.testing.assert_close(moment, expected[names[0]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("at_once", [2**20, 7])
def test_narrow_inputs_are_summed_in_float32(dtype: torch.dtype, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "_ENTRIES_AT_ONCE", at_once)
    model = nn.Sequential(nn.Linear(2, 3)).to(dtype)
    # In a half type 256 + 1 + 1 + ... stays 256.
    batches = [torch.tensor([[16.0, 0.0]], dtype=dtype)] + [torch.tensor([[1.0, 0.5]] * 9, dtype=dtype)] * 20
    (moment,) = collected(model, {"0": model[0]}, batches).values()
    assert moment.dtype == torch.float32
    assert moment.tolist() == [[436.0, 90.0], [90.0, 45.0]]


def test_autocast_acts_on_the_model_alone() -> None:
    model = attention(torch.float32)
    x = torch.tensor([1 + 2.0**-10] * FEATURES)  # not a bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        found = collected(nn.Sequential(model.q), {"q": model.q}, [x])
    torch.testing.assert_close(found[("q",)], x[:, None] * x, rtol=1e-7, atol=0)


def test_under_inference_mode() -> None:
    model, batches = attention(), data()
    expected = by_hand(model, batches)
    with torch.inference_mode():
        found = collected(model, part(model), batches)
    assert list(found) == GROUPS and not found[GROUPS[0]].is_inference()
    torch.testing.assert_close(found[("q", "k", "v")], expected["q"])


def test_a_batch_of_inference_mode_is_not_shared() -> None:
    """Nothing would tell whether it was changed in between."""
    model = Calls(lambda a, b, x: (a(x), b(x))).double()
    with torch.inference_mode():
        x = torch.ones(2, 3).double()
    found = collected(model, part(model, ("a", "b")), [x])
    assert list(found) == [("a",), ("b",)] and found[("b",)].tolist() == [[2.0] * 3] * 3


@pytest.mark.parametrize(
    ("body", "shared"),
    [
        (lambda a, b, x: (a(x), b(x)), True),
        (lambda a, b, x: (b(x), a(x)), True),
        (lambda a, b, x: (a(x), a(x + 1), b(x)), False),
        (lambda a, b, x: (y := x + 1, a(x), b(x), a(y), b(y)), True),
        (lambda a, b, x: (a(x), b(x.clone())), False),
        (lambda a, b, x: (y := x + 1, a(y), y.add_(1), b(y)), False),  # one object, but no longer the same values
        (lambda a, b, x: (a(x + 1), b(x + 1)), False),  # may well have one address
        (lambda a, b, x: (a(x), b(x.view(x.shape))), False),
    ],
)
def test_what_is_shared(body: Any, shared: bool) -> None:
    model = Calls(body).double()
    batches = [torch.arange(6.0).reshape(2, 3).double() + i for i in range(2)]
    expected = by_hand(model, batches, ("a", "b"))
    found = collected(model, part(model, ("a", "b")), batches)
    assert list(found) == ([("a", "b")] if shared else [("a",), ("b",)])
    for names, moment in found.items():
        for name in names:
            torch.testing.assert_close(moment, expected[name])


def test_a_one_shot_iterator_is_enough_for_one_pass() -> None:
    model, batches = attention(), data()
    expected = by_hand(model, batches)
    found = collected(model, part(model), iter(batches), budget_bytes=10**9)
    torch.testing.assert_close(found[("out",)], expected["out"])


@pytest.mark.parametrize("budget_bytes", [0, 10**9])
def test_batches_drawn_at_random_are_the_same_in_every_pass(budget_bytes: int) -> None:
    class Random:
        drawn: list[list[float]] = []

        def __iter__(self) -> Iterator[Tensor]:
            for _ in range(3):
                x = torch.randn(2, 5, FEATURES).double()
                self.drawn.append(x.flatten().tolist())
                yield x

    model, batches = attention(), Random()
    before = surroundings(model)
    found = collected(model, part(model), batches, budget_bytes=budget_bytes)
    model.calls.clear()
    assert surroundings(model) == before
    assert len({str(x) for x in batches.drawn}) == 3 and len(batches.drawn) == (12 if budget_bytes == 0 else 3)
    x = [torch.tensor(values).double().reshape(2, 5, FEATURES) for values in batches.drawn[:3]]
    torch.testing.assert_close(found[("out",)], by_hand(model, x)["out"])


@pytest.mark.parametrize("budget_bytes", [0, 10**9])
def test_every_pass_draws_what_the_caller_would(budget_bytes: int) -> None:
    model = Calls(lambda a, b, x: (y := x + torch.randn_like(x), a(y), b(y + 1))).double()
    batches = [torch.ones(4, 3).double()] * 2
    state = torch.get_rng_state()
    found = collected(model, part(model, ("a", "b")), batches, budget_bytes=budget_bytes)
    assert torch.equal(torch.get_rng_state(), state)
    for name, moment in by_hand(model, batches, ("a", "b")).items():
        torch.testing.assert_close(found[(name,)], moment)


def test_a_pass_runs_what_use_has_put_in_place() -> None:
    model, batches = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double(), [torch.ones(2, 3).double()]
    linears = {str(i): linear for i, linear in enumerate(model)}
    found: dict[str, Tensor] = {}

    def use(names: tuple[str, ...], moment: Tensor) -> None:
        found[names[0]] = moment
        model[int(names[0])] = nn.Identity()

    second_moments(model, linears, batches, use, budget_bytes=0)
    torch.testing.assert_close(found["1"], torch.full((3, 3), 2.0).double())
    assert [type(module) for module in model] == [nn.Identity] * 2 and model[0].training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_moment_at_a_time(dtype: torch.dtype) -> None:
    features, layers = 512, 4
    model = nn.Sequential(*(nn.Linear(features, features, bias=False) for _ in range(layers))).to(dtype)
    batches = [torch.randn(4, features).to(dtype) for _ in range(2)]
    own_bytes, moment_bytes = layers * dtype.itemsize * features**2, 4 * features**2

    def peak_bytes(budget_bytes: int | None) -> float:
        def body() -> None:
            modules = {str(i): layer for i, layer in enumerate(model)}
            second_moments(model, modules, batches, lambda names, moment: None, budget_bytes=budget_bytes)

        return (memsave.measure(body).peak_bytes - own_bytes) / moment_bytes

    assert 1 <= peak_bytes(None) < 1.1
    assert 1 <= peak_bytes(2 * moment_bytes - 1) < 1.1
    assert 2 <= peak_bytes(2 * moment_bytes) < 2.1
    assert 4 <= peak_bytes(4 * moment_bytes) < 4.1


def test_a_half_input_is_turned_to_float32_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "_ENTRIES_AT_ONCE", 2**12)
    model, x = nn.Sequential(nn.Linear(16, 16)).bfloat16(), torch.ones(2**14, 16).bfloat16()
    peak_bytes = memsave.measure(lambda: collected(model, {"0": model[0]}, [x])).peak_bytes
    assert peak_bytes < 2.1 * x.nbytes  # with the output; all of x in float32 would be twice as much


def test_moments_are_freed_one_by_one() -> None:
    given: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def use(names: tuple[str, ...], moment: Tensor) -> None:
        alive.append(sum(ref() is not None for ref in given))
        given.append(weakref.ref(moment))

    model = attention()
    second_moments(model, part(model), data(), use, budget_bytes=10**9)
    assert alive == [0, 0, 0, 0] and all(ref() is None for ref in given)


def test_gpt2_and_llama() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, intermediate_size=24)).double()
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).double()
    batches = [{"input_ids": ids} for ids in torch.randint(32, (2, 3, 12))]
    expected = {
        llama: [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",), ("lm_head",)],
        gpt2: [("c_attn",), ("c_proj",), ("c_fc",), ("c_proj",), ("lm_head",)],
    }
    for model, groups in expected.items():
        modules = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, transformers.pytorch_utils.Conv1D))
        }
        sums = by_hand(model, batches, tuple(modules))
        found = collected(model, modules, batches)
        assert [tuple(name.split(".")[-1] for name in names) for names in found] == groups
        for names, moment in found.items():
            torch.testing.assert_close(moment, sums[names[-1]])


def test_modules_that_the_first_batch_does_not_reach() -> None:
    model = Experts().double()
    batches = [torch.tensor([[sign, 2.0, 3.0]]).double() for sign in (0.0, 1.0, -1.0)]
    for budget_bytes, passes in ((None, 2), (72, 2), (144, 1)):
        model.runs.clear()
        found = collected(model, part(model, ("a", "b")), batches, budget_bytes=budget_bytes)
        assert found[("a",)][0].tolist() == [1.0, 2.0, 3.0] and found[("b",)][0].tolist() == [1.0, -2.0, -3.0]
        assert len(model.runs) == passes * len(batches) + 1
