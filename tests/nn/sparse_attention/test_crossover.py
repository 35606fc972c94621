"""From which length on sparse attention is faster, as found with times that are given."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from memsave.nn.sparse_attention import crossover as timing
from memsave.nn.sparse_attention.crossover import Crossover, crossover
from memsave.nn.sparse_attention.selecting import Choice

HOW = Choice(0.125, "block", 64)
CPU = torch.device("cpu")


def found(times: dict[int, tuple[float, float]], monkeypatch: pytest.MonkeyPatch) -> Crossover:
    """What is found where each length takes (dense, sparse) seconds."""
    monkeypatch.setattr(timing, "_times", lambda choice, heads, size, length, dtype, device: times[length])
    return crossover(HOW, 4, 64, torch.float32, CPU, tuple(times))


@pytest.mark.parametrize(
    ("faster", "keys"),
    [
        ((True, True, True), 512),
        ((False, True, True), 1024),
        ((False, False, True), 2048),
        ((False, False, False), 2049),
        ((True, False, True), 2048),  # a length before which it is slower again does not count
        ((True, True, False), 2049),
    ],
)
def test_from_where_on_it_is_always_faster(
    faster: tuple[bool, ...], keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {length: (1.0, 0.5 if wins else 2.0) for length, wins in zip((512, 1024, 2048), faster, strict=True)}
    result = found(times, monkeypatch)
    assert result == Crossover(keys, times, 4, 64)
    said = result.describe()
    assert "causal, 4 heads of 64" in said and all(f"{n:,}: " in said for n in times)
    if keys > 2048:
        assert "no length up to 2,048 is faster with sparse attention here" in said and "below 2,049 keys" in said
    else:
        assert f"sparse attention from {keys:,} keys on" in said and "no length" not in said
    first = "2.00x" if faster[0] else "0.50x"
    assert f"512: {first}" in said


def test_the_same_time_is_not_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found({512: (1.0, 1.0), 1024: (1.0, 0.9)}, monkeypatch).keys == 1024


def test_a_length_that_takes_too_long_is_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = timing.MAX_SECONDS + 0.1
    result = found({512: (0.1, 0.2), 1024: (slow, 1.0), 2048: (9.0, 1.0)}, monkeypatch)
    assert result.keys == 1024 and list(result.seconds) == [512, 1024]
    result = found({512: (slow, 2 * slow), 1024: (9.0, 1.0)}, monkeypatch)
    assert result.keys == 513 and list(result.seconds) == [512]


def clock(steps: Callable[[int], float]) -> Callable[[], float]:
    """A clock that goes forward by steps(i) between its readings 2i and 2i + 1, and stands still otherwise."""
    readings, now = itertools.count(), [0.0]

    def read() -> float:
        number = next(readings)
        now[0] += steps(number // 2) if number % 2 else 0.0
        return now[0]

    return read


@pytest.mark.parametrize("granularity", ["block", "token"])
def test_the_best_of_several_times_of_both(granularity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense and sparse in turns, forward and backward: the clock says which call took what."""
    taken = [5.0, 7.0, 3.0, 8.0, 4.0, 6.0]
    monkeypatch.setattr(timing.time, "perf_counter", clock(lambda i: taken[i]))
    calls: list[Any] = []
    attend = timing.attend
    monkeypatch.setattr(timing, "attend", lambda *args: (calls.append(args), attend(*args))[1])
    how = Choice(0.125, granularity, 16)
    state = torch.get_rng_state()
    result = crossover(how, 2, 8, torch.float64, CPU, (96,))
    assert result.seconds == {96: (3.0, 6.0)} and result.keys == 97
    assert torch.equal(torch.get_rng_state(), state)
    q, k, v, codebook, choice, see = calls[0]
    assert len(calls) == 3 and choice == how and see.is_causal and see.local
    assert {t.shape for t in (q, k, v)} == {(1, 2, 96, 8)} and {t.dtype for t in (q, k, v)} == {torch.float64}
    assert q.grad is not None and k.grad is not None and codebook.shape[0] == 2


def test_it_can_be_timed_without_gradients_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing.time, "perf_counter", clock(lambda i: 1.0))
    with torch.no_grad():
        assert crossover(HOW, 1, 12, torch.bfloat16, CPU, (70,)).keys == 71
