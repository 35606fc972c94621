"""`measure`: exact small cases by hand, and that it leaves no trace."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import memsave.ops
from memsave.memory import MemoryProfile, measure, saved_bytes

from .helpers import FLOAT_BYTES, hook_state

KIB = 1024
FLOATS = KIB // FLOAT_BYTES  # floats in one KiB


def check(profile: MemoryProfile) -> MemoryProfile:
    """What holds for every profile."""
    total_bytes = profile.timeline.total_bytes()
    assert sum(profile.by_category.values()) == profile.peak_bytes == sum(profile.by_module.values())
    assert max(total_bytes) == profile.peak_bytes and total_bytes[0] == profile.baseline_bytes
    assert min(min(sizes) for sizes in profile.timeline.live_bytes.values()) >= 0
    assert profile.timeline.phase[total_bytes.index(profile.peak_bytes)] == profile.phase
    return profile


def test_temporaries_add_up_and_are_freed() -> None:
    x = torch.ones(FLOATS)  # 1 KiB

    def fn() -> None:
        y = x + 1  # 2 KiB live
        z = torch.cat([y, y])  # 4 KiB
        del y  # 3 KiB
        z.sum()

    profile = check(measure(fn))
    assert (profile.peak_bytes, profile.baseline_bytes) == (4 * KIB, KIB)
    assert profile.by_category["temporary"] == 3 * KIB and profile.by_category["input"] == KIB
    assert profile.by_module == {"(outside modules)": 3 * KIB, "(made before)": KIB}


def test_views_and_in_place_ops_add_nothing() -> None:
    x = torch.ones(FLOATS)
    profile = check(measure(lambda: x.view(2, -1).t().add_(1).mul_(2)[0].zero_()))
    assert profile.peak_bytes == profile.baseline_bytes == KIB


def test_an_input_freed_inside_counts_from_the_start() -> None:
    held = [torch.ones(8 * FLOATS)]

    def fn() -> None:
        small = held.pop()[: 4 * FLOATS].clone()  # 8 + 4 KiB, then 4 KiB
        torch.cat([small, small, small])  # 4 + 12 KiB

    profile = check(measure(fn))
    assert (profile.peak_bytes, profile.baseline_bytes) == (16 * KIB, 8 * KIB)
    assert profile.by_category["input"] == 0


def test_what_is_first_touched_late_counts_from_the_start() -> None:
    first, late = torch.ones(FLOATS), torch.ones(2 * FLOATS)

    def fn() -> None:
        torch.cat([first, first, first, first])  # the peak: 1 + 2 + 4 KiB
        late.sum()

    profile = check(measure(fn))
    assert (profile.peak_bytes, profile.baseline_bytes) == (7 * KIB, 3 * KIB)


def test_resizing_an_op_sees() -> None:
    x = torch.ones(FLOATS)

    def fn() -> None:
        x.resize_(6 * FLOATS)
        x.resize_(1)  # a storage does not shrink by this
        x.untyped_storage().resize_(FLOAT_BYTES)
        torch.ones(3 * FLOATS)

    profile = check(measure(fn))
    assert (profile.peak_bytes, profile.baseline_bytes) == (6 * KIB, KIB)


def test_resizing_that_no_op_sees() -> None:
    x = torch.ones(4 * FLOATS)

    def fn() -> None:
        x.add_(1)
        x.untyped_storage().resize_(0)  # as FSDP frees its weights
        torch.ones(5 * FLOATS)

    profile = check(measure(fn))
    assert (profile.peak_bytes, profile.baseline_bytes) == (5 * KIB, 4 * KIB)


@pytest.mark.parametrize("make", [lambda: torch.tensor([1.0] * FLOATS), lambda: torch.tensor(0.0)[None].expand(9)])
def test_tensors_from_python_values_are_new(make) -> None:
    profile = check(measure(lambda: make().sum()))
    assert profile.baseline_bytes == 0 and profile.by_category["input"] == 0


def test_sparse_tensors_count_indices_and_values() -> None:
    dense = torch.eye(16)
    profile = check(measure(dense.to_sparse))
    assert profile.peak_bytes - profile.baseline_bytes >= 16 * (2 * 8 + FLOAT_BYTES)
    sparse = dense.to_sparse()
    profile = check(measure(lambda: sparse * 2))
    assert profile.baseline_bytes == 16 * (2 * 8 + FLOAT_BYTES)


def test_jagged_tensors_count_values_and_offsets() -> None:
    jagged = torch.nested.nested_tensor([torch.ones(2, 8), torch.ones(3, 8)], layout=torch.jagged)
    profile = check(measure(lambda: jagged * 2))
    values_bytes, offsets_bytes = 5 * 8 * FLOAT_BYTES, 3 * 8
    assert profile.baseline_bytes == values_bytes + offsets_bytes
    assert profile.peak_bytes == profile.baseline_bytes + values_bytes


class Wrapper(Tensor):
    """Holds its data in another tensor, and needs 1 KiB of scratch in each op."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        wrapper = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        wrapper.inner = inner
        return wrapper

    def __tensor_flatten__(self):
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        scratch = torch.ones(FLOATS)
        result = func(*(arg.inner if isinstance(arg, Wrapper) else arg for arg in args), **(kwargs or {}))
        del scratch
        return Wrapper(result)


def test_ops_inside_a_wrapper_are_seen() -> None:
    wrapper = Wrapper(torch.ones(2 * FLOATS))
    profile = check(measure(lambda: wrapper + 1))
    assert (profile.peak_bytes, profile.baseline_bytes) == (5 * KIB, 2 * KIB)
    assert profile.timeline.total_bytes()[-1] == 2 * KIB


def test_control_flow_ops() -> None:
    x = torch.ones(FLOATS)
    profile = check(measure(lambda: torch.ops.higher_order.cond(True, lambda a: (a + 1,), lambda a: (a - 1,), (x,))))
    assert (profile.peak_bytes, profile.baseline_bytes) == (2 * KIB, KIB)


def linear_step(accumulate: bool = False, steps: int = 1):
    """A linear (weight 16 KiB), its input (2 KiB) and a function that runs forward and backward."""
    linear = nn.Linear(64, 64, bias=False)
    x = torch.randn(8, 64)

    def fn() -> None:
        for _ in range(steps):
            linear(x).square().sum().backward()

    if accumulate:
        fn()
    return linear, fn


def test_training_by_category() -> None:
    linear, fn = linear_step()
    profile = check(measure(fn))
    assert profile.baseline_bytes == 18 * KIB
    assert profile.phase == "backward"
    assert profile.by_category["weights"] == 16 * KIB
    assert profile.by_category["gradients"] == 16 * KIB
    assert profile.by_category["optimizer"] == 0
    assert profile.saved_bytes == 4 * KIB == saved_bytes(fn)  # x, and the output under the square


def test_a_gradient_is_one_from_its_allocation_on() -> None:
    linear, fn = linear_step()
    timeline = measure(fn).timeline
    assert max(timeline.live_bytes["temporary"]) < 16 * KIB
    assert timeline.live_bytes["gradients"][-1] == 16 * KIB


def test_gradient_accumulation_holds_two_gradients_for_a_moment() -> None:
    linear, fn = linear_step(accumulate=True)
    profile = check(measure(fn))
    assert profile.baseline_bytes == (16 + 16 + 2) * KIB  # the gradient is from before
    assert profile.by_category["gradients"] == 16 * KIB
    assert profile.by_category["temporary"] >= 16 * KIB  # what is about to be added
    assert profile.timeline.live_bytes["gradients"] == [16 * KIB] * len(profile.timeline.event)


def test_gradients_freed_by_zero_grad_count_until_then() -> None:
    linear, fn = linear_step(accumulate=True)

    def zero_first() -> None:
        linear.zero_grad()
        fn()

    profile = check(measure(zero_first))
    assert profile.baseline_bytes == (16 + 16 + 2) * KIB
    assert profile.by_category["gradients"] == 16 * KIB
    assert profile.timeline.live_bytes["gradients"][0] == 16 * KIB
    assert min(profile.timeline.live_bytes["gradients"]) == 0
    other = nn.Linear(64, 64)
    other(torch.ones(64)).sum().backward()  # a bystander's gradient is no part of the run
    assert measure(zero_first).baseline_bytes == profile.baseline_bytes


def test_two_backwards() -> None:
    _, once = linear_step()
    _, twice = linear_step(steps=2)
    assert measure(twice).saved_bytes == measure(once).saved_bytes
    first, second = measure(once), measure(twice)
    assert second.by_category["gradients"] == 16 * KIB == first.by_category["gradients"]


def test_adam_states() -> None:
    linear, fn = linear_step()
    optimizer = torch.optim.Adam(linear.parameters(), foreach=False)

    def step() -> None:
        fn()
        optimizer.step()
        optimizer.zero_grad()

    states_bytes = 2 * 16 * KIB + FLOAT_BYTES  # two moments and the step count
    first, second = check(measure(step)), check(measure(step))
    assert first.baseline_bytes == 18 * KIB and second.baseline_bytes == 18 * KIB + states_bytes
    assert first.phase == second.phase == "optimizer"
    for profile in (first, second):
        assert profile.by_category["optimizer"] == profile.timeline.live_bytes["optimizer"][-1] == states_bytes
    assert second.timeline.live_bytes["optimizer"][0] == states_bytes


def test_parameters_of_an_optimizer_are_weights_without_a_module() -> None:
    weight = torch.ones(FLOATS, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)

    def step() -> None:
        (weight * weight).sum().backward()
        optimizer.step()

    profile = check(measure(step))
    assert profile.by_category["weights"] == profile.by_category["gradients"] == KIB
    assert profile.saved_bytes == 0


def test_tied_weights_count_once() -> None:
    first, second = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
    second.weight = first.weight
    model, x = nn.Sequential(first, second), torch.randn(8, 64)
    profile = check(measure(lambda: model(x).sum().backward()))
    assert profile.by_category["weights"] == 16 * KIB
    assert profile.baseline_bytes == 18 * KIB


def test_weights_that_no_op_touches_count() -> None:
    class TakesOne(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.experts[0](x)

    model, x = TakesOne(), torch.randn(8, 64)
    assert measure(lambda: model(x)).by_category["weights"] == 3 * 16 * KIB


def test_modules_own_what_they_allocate_in_forward_and_backward() -> None:
    wide, narrow = nn.Linear(64, 256, bias=False), nn.Linear(256, 64, bias=False)  # 64 KiB each
    model, x = nn.Sequential(wide, narrow), torch.randn(8, 64, requires_grad=True)
    out_bytes = {"0": 8 * 256 * FLOAT_BYTES, "1": 8 * 64 * FLOAT_BYTES}

    forward = check(measure(lambda: model(x)))
    before_bytes = 128 * KIB + 2 * KIB
    assert forward.by_module == {"(made before)": before_bytes, **out_bytes}

    def fn() -> None:
        out = model(x)
        out.backward(torch.ones_like(out))

    backward = check(measure(fn))
    # At the peak: both weight gradients, the gradient of x, the hidden gradient and `out` with its gradient.
    assert backward.by_module["1"] == out_bytes["1"] + 64 * KIB + out_bytes["0"]
    assert backward.by_module["0"] == 64 * KIB + 2 * KIB
    assert backward.by_module["(outside modules)"] == out_bytes["1"]


def test_names_stay_apart_for_several_models() -> None:
    first, second = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 8))
    x = torch.ones(1, 4)
    profile = check(measure(lambda: [first(x), second(x)]))
    assert profile.by_module["0"] == 16 and profile.by_module["Sequential.0"] == 32


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_inside(reentrant: bool) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    x = torch.randn(128, 64, requires_grad=True)
    plain = measure(lambda: model(x).sum().backward())
    model.zero_grad()
    checkpointed = check(measure(lambda: checkpoint(model, x, use_reentrant=reentrant).sum().backward()))
    assert checkpointed.timeline.live_bytes["kept for backward"][0] == 0
    assert max(checkpointed.timeline.live_bytes["kept for backward"]) == checkpointed.saved_bytes
    assert (checkpointed.saved_bytes == plain.saved_bytes) is reentrant


def test_phases() -> None:
    linear, fn = linear_step()
    optimizer = torch.optim.Adam(linear.parameters())

    def step() -> None:
        fn()
        optimizer.step()
        with torch.no_grad():
            torch.ones(1)

    phases = measure(step).timeline.phase
    changes = [phase for before, phase in zip([None, *phases], phases, strict=False) if phase != before]
    assert changes == ["forward", "backward", "optimizer", "other"]


def test_inference_is_forward() -> None:
    model, x = nn.Linear(64, 64), torch.randn(8, 64)
    with torch.inference_mode():
        profile = check(measure(lambda: model(x)))
    assert profile.phase == "forward" and profile.saved_bytes == 0


def small_model() -> tuple[nn.Module, Tensor]:
    model = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.1, batch_first=True, activation=nn.functional.gelu)
    return model, torch.randn(2, 8, 32)


def step_of(model: nn.Module, x: Tensor):
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def test_fake_tensors_give_the_same_as_real_ones() -> None:
    real_step = step_of(*small_model())
    with FakeTensorMode():
        fake_step = step_of(*small_model())
        fake_first, fake_steady = measure(fake_step), measure(fake_step)
    real_first, real_steady = measure(real_step), measure(real_step)
    assert fake_steady == real_steady  # to the last event
    # In the first step the optimizer makes tensors from Python numbers, which fake tensors copy once more.
    assert fake_first.peak_bytes == real_first.peak_bytes and fake_first.by_category == real_first.by_category


def test_results_gradients_and_random_numbers_are_unchanged() -> None:
    def run(around) -> list[Tensor]:
        torch.manual_seed(0)
        model, x = small_model()
        out = []

        def fn() -> None:
            out.append(model(x))
            out[0].square().sum().backward()

        around(fn)
        return [out[0].detach(), *(parameter.grad for parameter in model.parameters()), torch.rand(3)]

    plain, measured = run(lambda fn: fn()), run(measure)
    assert all(torch.equal(a, b) for a, b in zip(plain, measured, strict=True))


def test_nothing_is_kept_alive() -> None:
    model, x = small_model()
    refs: list[weakref.ref] = []

    def fn() -> None:
        out = model(x)
        refs.extend([weakref.ref(out.untyped_storage()), weakref.ref(out)])
        out.sum().backward()
        refs.append(weakref.ref(next(model.parameters()).grad.untyped_storage()))

    gc.disable()
    try:
        profile = measure(fn)
        assert [ref() is None for ref in refs] == [True, True, False]
        model.zero_grad()
        assert refs[2]() is None
    finally:
        gc.enable()
    assert profile.peak_bytes > 0


def test_modification_in_place_raises() -> None:
    def fn() -> None:
        y = torch.ones(3, requires_grad=True).exp()
        y.add_(1)
        y.sum().backward()

    with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
        measure(fn)


def test_hooks_are_gone_after_an_error() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("from forward")

    before = hook_state()
    with pytest.raises(KeyError, match="from forward"):
        measure(lambda: nn.Sequential(nn.Linear(4, 4), Fails())(torch.ones(4)))
    assert hook_state() == before
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"), pytest.raises(RuntimeError, match="not here"):
        measure(lambda: None)
    assert hook_state() == before


def test_an_error_inside_a_module_that_fn_catches_leaves_the_names_right() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("from forward")

    model, x = nn.Sequential(Fails()), torch.ones(FLOATS)

    def fn() -> None:
        with pytest.raises(KeyError):
            model(x)
        x + 1

    assert measure(fn).by_module["(outside modules)"] == KIB


def test_bytes_inside_our_ops_are_added_at_their_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    def fn() -> None:
        x, rows = torch.ones(64, 4), torch.arange(8, dtype=torch.int32)
        memsave.ops.gather_rows(x, rows)
        torch.ones(FLOATS)

    monkeypatch.setattr(memsave.ops, "workspace_bytes", lambda func, args, kwargs: 0)
    without = check(measure(fn))
    monkeypatch.setattr(memsave.ops, "workspace_bytes", lambda func, args, kwargs: 10 * KIB)
    within = check(measure(fn))
    inputs_and_output_bytes = 64 * 4 * FLOAT_BYTES + 8 * 4 + 8 * 4 * FLOAT_BYTES
    assert within.peak_bytes == inputs_and_output_bytes + 10 * KIB
    assert within.by_category["temporary"] == within.peak_bytes
    assert without.peak_bytes < within.peak_bytes
    assert within.timeline.total_bytes()[-1] == without.timeline.total_bytes()[-1]


@pytest.mark.filterwarnings("ignore:Using `torch.compile")  # says that our hooks run once more
def test_compiled_functions_run_uncompiled() -> None:
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU()), torch.randn(4, 8)
    compiled = torch.compile(model, backend="aot_eager")
    plain = measure(lambda: model(x))
    assert measure(lambda: compiled(x)).peak_bytes == plain.peak_bytes
    torch._dynamo.reset()


def test_allocator_peak_of_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks, reset = [900, 70], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: [100, 30][device])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peaks[device])
    profile = measure(lambda: torch.ones(1))
    assert profile.allocator_peak_bytes == 840 and reset == [0, 1]
    assert "CUDA allocator, above the start" in profile.table()


def test_no_allocator_peak_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert measure(lambda: torch.ones(1)).allocator_peak_bytes is None
