"""`MemoryProfile`: text, JSON, thinning and pictures."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from memsave.memory import MemoryProfile, measure, replay
from memsave.memory.profile import CATEGORIES, PHASES, Timeline, format_bytes

KIB, MIB = 1024, 1024**2


@pytest.fixture
def profile() -> MemoryProfile:
    """Made by hand: 3 MiB at the peak."""
    live_bytes = {name: [0, 0, 0] for name in CATEGORIES}
    live_bytes |= {"weights": [MIB, MIB, MIB], "kept for backward": [0, 3 * MIB // 2, 0], "temporary": [0, MIB // 2, 0]}
    return MemoryProfile(
        peak_bytes=3 * MIB,
        baseline_bytes=MIB,
        saved_bytes=3 * MIB // 2,
        by_category=dict.fromkeys(CATEGORIES, 0)
        | {"weights": MIB, "kept for backward": 3 * MIB // 2, "temporary": MIB // 2},
        by_module={"layers.0.mlp": 3 * MIB // 2, "(made before)": MIB, "layers.1": 400 * KIB, "layers.2": 112 * KIB},
        phase="backward",
        timeline=Timeline(event=[0, 1, 2], phase=["forward", "backward", "other"], live_bytes=live_bytes),
    )


def measured() -> MemoryProfile:
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1)), torch.randn(4, 8)
    return measure(lambda: model(x).sum().backward())


def test_table(profile: MemoryProfile) -> None:
    assert profile.table(modules=2).splitlines() == [
        "peak                       3.0 MiB  in backward",
        "at the start               1.0 MiB",
        "most kept for backward     1.5 MiB",
        "",
        "at the peak, by category",
        "  weights                  1.0 MiB   33.3%",
        "  gradients                    0 B    0.0%",
        "  optimizer                    0 B    0.0%",
        "  kept for backward        1.5 MiB   50.0%",
        "  temporary              512.0 KiB   16.7%",
        "  input                        0 B    0.0%",
        "",
        "at the peak, by module",
        "  layers.0.mlp             1.5 MiB   50.0%",
        "  (made before)            1.0 MiB   33.3%",
        "  (other modules)        512.0 KiB   16.7%",
    ]
    assert "layers.2" in str(profile) and "(other modules)" not in str(profile)


def test_table_of_nothing() -> None:
    assert measure(lambda: None).table().startswith("peak ")


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536 * KIB, "1.5 MiB"), (5 * 1024**3, "5.0 GiB")],
)
def test_units(size_bytes: int, text: str) -> None:
    assert format_bytes(size_bytes) == text
    assert format_bytes(3 * 1024**4) == "3.0 TiB"


def test_json_round_trip(profile: MemoryProfile) -> None:
    for original in (profile, measured()):
        assert MemoryProfile.from_json(original.to_json()) == original


@pytest.mark.parametrize("text", ["", "[]", '{"peak_bytes": 3}', '{"timeline": {}}'])
def test_json_of_something_else(text: str) -> None:
    with pytest.raises(ValueError, match="expected the text that MemoryProfile.to_json"):
        MemoryProfile.from_json(text)


def test_a_long_run_is_thinned_but_keeps_its_peak() -> None:
    def fn() -> None:
        for number in range(6000):
            torch.zeros(1000 if number == 3333 else 10)

    profile = measure(fn)
    timeline = profile.timeline
    assert timeline.event[0] == 0 and timeline.event[-1] == 12000
    assert timeline.event == sorted(set(timeline.event)) and set(timeline.phase) <= set(PHASES)
    assert 1500 < len(timeline.event) < 2100
    assert max(timeline.total_bytes()) == profile.peak_bytes == 4000
    assert timeline.total_bytes().count(4000) == 1
    assert len(profile.to_json()) < 200_000


def test_thinning_keeps_the_ends_and_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "_MAX_POINTS", 10)
    for length in range(1, 60):
        for peak in {0, length // 2, length - 1}:
            points = [replay.Point(event, "other", (int(event == peak), event)) for event in range(length)]
            points[peak] = replay.Point(peak, "other", (1000, 0))
            thinned = replay._thin(points)
            events = [point.event for point in thinned]
            assert events == sorted(set(events)) and len(events) <= 12
            assert {0, peak, length - 1} <= set(events)


def pixels(path: Path) -> torch.Tensor:
    import matplotlib.image

    return torch.from_numpy(matplotlib.image.imread(path)[..., :3].copy())  # (H, W, 3) in [0, 1]


def has_color(image: torch.Tensor, hex_color: str, at_least: int = 200) -> bool:
    color = torch.tensor([int(hex_color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return bool(((image - color).abs().amax(-1) < 0.01).sum() > at_least)


def test_plot_draws_the_categories(tmp_path: Path, profile: MemoryProfile) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib (the extra plot)")
    path = profile.plot(tmp_path / "one.png")
    image = pixels(path)
    assert image.shape[0] > 500 and image.shape[1] > 1000
    for color in ("#0072B2", "#E69F00", "#F0E442"):  # weights, kept for backward, temporary
        assert has_color(image, color, at_least=10_000)  # its patch in the legend is smaller
    assert not has_color(image, "#D55E00")  # the second line of a comparison


def test_plot_draws_the_others_as_lines(tmp_path: Path, profile: MemoryProfile) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib (the extra plot)")
    other = replace(profile, peak_bytes=2 * profile.peak_bytes)
    path = profile.plot(tmp_path / "two.svg", other, labels=["plain & simple", "small"])
    assert path.read_text().lower().count("#d55e00") >= 2  # the line and its legend
    assert has_color(pixels(profile.plot(tmp_path / "two.png", other)), "#D55E00")


def test_plot_of_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib (the extra plot)")
    assert measure(lambda: None).plot(tmp_path / "none.png").stat().st_size > 1000


def test_plot_with_a_wrong_number_of_labels(tmp_path: Path, profile: MemoryProfile) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib (the extra plot)")
    with pytest.raises(ValueError, match="expected 2 labels.*got 1"):
        profile.plot(tmp_path / "x.png", profile, labels=["one"])
    assert not (tmp_path / "x.png").exists()


def test_plot_without_matplotlib(tmp_path: Path, profile: MemoryProfile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"memsave\[plot\]"):
        profile.plot(tmp_path / "x.png")
