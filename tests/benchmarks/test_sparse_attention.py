"""The cases of sparse attention: what is checked before a figure is given, their figures, tables and plot."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import memsave
from benchmarks import run, tables
from benchmarks.cases.case import Case
from benchmarks.cases.sparse_attention import (
    ATTENTION_CASES,
    BLOCK_8,
    CONTINUED_CASE,
    EAGER,
    FLEX,
    RECALL_CASE,
    SDPA,
    TOKEN_8,
    AttentionCase,
)
from benchmarks.checks import CheckFailed
from benchmarks.formats import MIB
from benchmarks.plots import LINES, MARKERS, draw_attention
from benchmarks.result_files import FORMAT, RESULTS, read
from benchmarks.runners import continued, recall
from benchmarks.runners import sparse_attention as runner
from memsave.nn.sparse_attention.selecting import Choice

ON_CPU = tuple(case for case in ATTENTION_CASES if "cpu" in case.devices)
TINY = replace(ON_CPU[0].at_toy_size(), peers=(EAGER, SDPA), heads=(2, 2), head_size=16)


@pytest.fixture
def run_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs a case in the number of threads that there is: it holds for the whole process."""

    def run_case(case: Case, *options: str) -> int:
        monkeypatch.setattr(run, "CASES", (case,))
        monkeypatch.setattr(run, "QUALITY_CASES", (case,))
        threads = str(torch.get_num_threads())
        return run.main(["--long", "--repeats", "2", "--threads", threads, "--out", str(tmp_path), *options])

    return run_case


@pytest.mark.parametrize("case", ON_CPU, ids=lambda case: case.name)
def test_every_way_gives_its_figures(case: AttentionCase, run_case: Callable[..., int], tmp_path: Path) -> None:
    case = replace(case, head_size=16, peers=(EAGER, SDPA))
    assert run_case(case, "--tiny") == 0
    data = read(tmp_path / f"{case.name}.json")
    rows = {(row["size"]["T"], row["way"]): row for row in data["results"]}
    assert list(rows) == [(length, way) for length in (256, 320) for way in (EAGER, SDPA, *case.ways)]
    for (length, way), row in rows.items():
        assert row["rounds"] == 2 and row["peak_bytes"] > row["kept_bytes"] - 3 * 4 * 16 * 8 * length
        for part in ("forward", "backward"):
            assert 0 < row[part]["low_s"] <= row[part]["median_s"] <= row[part]["high_s"]
        # Query, key, value, the output, and a number for each of its rows.
        expected = 4 * length * ((2 * case.heads[0] + 2 * case.heads[1]) * 16 + case.heads[0])
        assert row["kept_bytes"] > expected if way == EAGER else row["kept_bytes"] == expected
        assert (row["error"] is None) == (way in (EAGER, SDPA)) and (row["error"] or 0) < 1e-5
    assert "it keeps at most what SDPA keeps and the codes of the keys: met." in tables.table(data)
    assert "eager" not in data["left_out"] and draw_attention([data]).axes


def test_each_of_the_ways_differs() -> None:
    there = runner.Length(TINY, 320, "cpu")
    codebook = there.codebook()
    seen = [there.seen(there.sparse(codebook, *settings)) for settings in (("block", 0.25), ("token", 0.25))]
    for mask, most in zip(seen, (192, 80), strict=True):  # three blocks of 64 at least
        assert mask.shape == (1, 2, 320, 320) and mask.sum(-1).max() == most and not mask.triu(1).any()
        assert mask[..., torch.arange(320), torch.arange(320)].any()


def test_visible_keys_are_those_of_the_lists() -> None:
    lists = torch.tensor([[[[0, -1], [0, 2], [1, 2]]]], dtype=torch.int32)
    seen = runner.visible_keys(lists, 2, 5, False)[0, 0].int().tolist()
    assert seen == [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 0, 0, 1], [1, 1, 0, 0, 1], [0, 0, 1, 1, 1]]
    assert runner.visible_keys(lists, 2, 5, True)[0, 0].int().tolist()[3] == [1, 1, 0, 0, 0]


def test_eager_attention_that_would_not_fit_is_left_out_and_says_so() -> None:
    case = replace(TINY, lengths=(256, 320), most_score_bytes=2 * 256 * 256 * 4)
    results, left_out = runner.run_attention_case(case, "cpu", 2)
    assert [row["size"]["T"] for row in results if row["way"] == EAGER] == [256]
    assert left_out == {"eager at T = 320": "each of its matrices of T x T numbers takes 0.0 GiB"}
    table = tables.table(result_with(case, results))
    (line,) = [line for line in table.splitlines() if line.startswith("| 320 tokens, kept")]
    assert line.startswith("| 320 tokens, kept | - | ")


def test_no_round_begins_after_the_time_but_two_do(monkeypatch: pytest.MonkeyPatch) -> None:
    results, _ = runner.run_attention_case(replace(TINY, lengths=(256,), seconds=0.0), "cpu", 5)
    assert {row["rounds"] for row in results} == {2}


def _scaled(way: runner.Sparse, *inputs: Tensor) -> Tensor:
    return 1.0001 * runner.attend(*inputs, way.codebook, way.choice, way.see)


def _all_but_the_last(way: runner.Sparse, *inputs: Tensor) -> Tensor:
    query, key, value = inputs
    if way.choice.keep == 1.0:
        return runner.attend(query, key[:, :, :-1], value[:, :, :-1], way.codebook, way.choice, way.see)
    return runner.attend(*inputs, way.codebook, way.choice, way.see)


def _blind_to_keys(way: runner.Sparse, *inputs: Tensor) -> Tensor:
    query, key, value = inputs
    return runner.attend(query, key.detach() + 0 * key, value, way.codebook, way.choice, way.see)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (_scaled, "memsave, blocks, 1/8 at T = 256: the error of its [a-z]+ is 1.0e-04 of the norm, allowed is"),
        (_all_but_the_last, "all keys, by block, at T = 256: the error of its"),
        (_blind_to_keys, "memsave, blocks, 1/8 at T = 256: the error of its k is 1.0e[+]00"),
    ],
)
def test_what_computes_something_else_gives_no_figure(
    broken: Callable[..., Tensor],
    message: str,
    run_case: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(runner.Sparse, "forward", broken)
    case = replace(TINY, is_causal=False)  # or the last key would matter to the last query alone
    with pytest.raises(CheckFailed, match=message):
        runner.checked(case, 256, "cpu")
    assert run_case(case) == 1
    printed = capsys.readouterr()
    assert not list(tmp_path.iterdir()) and "no figures" in printed.err and " ms" not in printed.out


def test_lists_that_are_too_long_give_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Choice, "num_keys", lambda choice, keys: 100)
    with pytest.raises(CheckFailed, match="a query attends to 192 keys, allowed are 100"):
        runner.checked(TINY, 256, "cpu")


@pytest.mark.slow
def test_flex_attention_is_given_the_same_blocks() -> None:
    """Forward alone on the CPU; checked, too. Where there is no compiler, the reason is told."""
    results, left_out = runner.run_attention_case(replace(TINY, peers=(SDPA, FLEX), lengths=(256,)), "cpu", 2)
    found = {row["way"]: row for row in results}
    if FLEX not in found:
        assert list(left_out) == [f"{FLEX} at T = 256"]
        return
    assert list(left_out) == [f"{FLEX}, backward"] and found[FLEX]["backward"] is None
    assert found[FLEX]["kept_bytes"] is None and found[FLEX]["forward"]["median_s"] > 0


def test_flex_attention_that_computes_something_else_has_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    def uncompiled(function: Callable[..., Tensor], **_: Any) -> Callable[..., Tensor]:
        return lambda query, key, value, **settings: (
            1.01
            * runner.attend(
                query, key, value, codebook, Choice(0.125, "block", 64), runner.Visibility(None, True, 0, 0, True)
            )
        )

    codebook = runner.Length(TINY, 256, "cpu").codebook()
    monkeypatch.setattr(torch, "compile", uncompiled)
    results, left_out = runner.run_attention_case(replace(TINY, peers=(SDPA, FLEX), lengths=(256,)), "cpu", 2)
    assert FLEX not in {row["way"] for row in results}
    assert left_out == {
        f"{FLEX} at T = 256": "CheckFailed: FlexAttention: its output differs by 1.0e-02 of the largest"
    }


def result_with(case: Case, rows: list[dict[str, Any]], **machine: Any) -> dict[str, Any]:
    made = {"date": "2000-01-01", "device": "cpu", "cpu": "a CPU", "threads": 1, "versions": {"torch": "1"}} | machine
    described = case.describe() | ({"text": {"source": "some text"}} if "text" in case.describe() else {})
    described = json.loads(json.dumps(described))
    return {"format": FORMAT, "tiny": False, "case": described, "machine": made, "results": rows, "left_out": {}}


def figures(
    length: int, way: str, forward_s: float, backward_s: float | None, kept_bytes: int | None
) -> dict[str, Any]:
    times = [
        None if s is None else {"median_s": s, "low_s": s, "high_s": s, "cpu_s": s} for s in (forward_s, backward_s)
    ]
    row = {"size": {"T": length}, "way": way, "kept_bytes": kept_bytes, "peak_bytes": kept_bytes and 2 * kept_bytes}
    return row | {"forward": times[0], "backward": times[1]}


def of_lengths(ours: dict[int, float], kept_bytes: int = MIB) -> dict[str, Any]:
    """A result in which memsave takes so many seconds where SDPA takes 2."""
    rows = []
    for length, s in ours.items():
        rows += [figures(length, SDPA, 0.5, 1.5, MIB), figures(length, FLEX, 0.25, None, None)]
        rows += [figures(length, BLOCK_8, s / 4, 3 * s / 4, kept_bytes), figures(length, TOKEN_8, s, s, MIB)]
    return result_with(ON_CPU[0], rows)


def test_the_table_stands_beside_sdpa_and_says_which_aims_are_met() -> None:
    lines = tables.table(of_lengths({2048: 4.0, 4096: 1.0, 8192: 0.5})).splitlines()
    assert lines[0] == f"|  | SDPA | FlexAttention | {BLOCK_8} | {TOKEN_8} |"
    cells = ["500.0 ms + 1.50 s (1.00x)", "250.0 ms (0.50x), forward alone", "250.0 ms + 750.0 ms (0.50x)"]
    assert lines[3] == f"| 4,096 tokens, time | {' | '.join(cells)} | 1.00 s + 1.00 s (1.00x) |"
    assert lines[5] == "| 2,048 tokens, kept | 1.0 MiB (1.00x) | - | 1.0 MiB (1.00x) | 1.0 MiB (1.00x) |"
    assert lines[8].startswith("| 2,048 tokens, peak | 2.0 MiB (1.00x) | - |")
    aim = f"Aim: {BLOCK_8} is faster than SDPA from 4,096 tokens on; measured 0.50x, 0.25x: met."
    assert lines[-1].endswith(f"{aim} Aim: it keeps at most what SDPA keeps and the codes of the keys: met.")
    missed = tables.table(of_lengths({4096: 2.0, 8192: 1.0}, MIB + 4 * 8 * 4096 + 1))
    assert "measured 1.00x, 0.50x: missed at 4,096." in missed and "the codes of the keys: missed." in missed
    assert "faster" not in tables.table(of_lengths({512: 3.0}))


def test_aims_are_for_the_device_of_the_case() -> None:
    data = of_lengths({4096: 1.0})
    data["machine"]["device"] = "NVIDIA H200"
    assert "Aim" not in tables.table(data)


def test_the_plot_shows_both_parts_of_every_way() -> None:
    (axes,) = draw_attention([of_lengths({2048: 4.0, 4096: 1.0})]).axes
    drawn = {str(line.get_label()): line for line in axes.lines}
    assert list(drawn) == [SDPA, f"{FLEX}, forward alone", BLOCK_8, TOKEN_8]
    assert list(drawn[BLOCK_8].get_xdata()) == [2048, 4096] and list(drawn[BLOCK_8].get_ydata()) == [4.0, 1.0]
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert len(LINES) == len(MARKERS) >= 2 + 1 + len(ON_CPU[0].ways)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A folder of text that is learned in a few steps."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number:02}.txt").write_text(f"line of file {number}\n" * 20)
    return folder


def test_a_run_of_recall(text: Path, run_case: Callable[..., int], tmp_path: Path) -> None:
    case = replace(RECALL_CASE, text=text, lr=1e-2, tiny=RECALL_CASE.tiny | {"steps": 10})
    assert run_case(case, "--suite", "quality", "--tiny") == 0
    data = read(tmp_path / f"{case.name}.json")
    rows = {(row["size"], row["way"], row["keep"]): row for row in data["results"]}
    ways = {1: (recall.BEST, recall.OURS, recall.PAPER, recall.RECENT, recall.RANDOM)}
    ways[16] = recall.BEST, recall.OURS, recall.MEANS
    assert list(rows) == [(size, way, keep) for keep in (0.125, 0.25) for size in (1, 16) for way in ways[size]]
    for (size, way, keep), row in rows.items():
        assert row["keys"] == (128 * keep if size == 1 else 48) and len(row["layers"]) == 2
        best = rows[size, recall.BEST, keep]["layers"]
        assert all(0 < share <= most <= 1 for share, most in zip(row["layers"], best, strict=True)), way
    for layer in range(2):
        found = [rows[1, way, 0.125]["layers"][layer] for way in (recall.BEST, recall.OURS, recall.RANDOM)]
        assert found[0] > found[1] > found[2]
    line = tables.table(data).splitlines()[2]
    layers = rows[1, recall.BEST, 0.125]["layers"]
    assert line.startswith(
        f"| keys | best there is | {sum(layers) / 2:.3f} ({min(layers):.3f} to {max(layers):.3f}), 16"
    )
    assert "The demo's tiny model, 10 steps of 2 x 128 bytes" in tables.table(data)


@pytest.fixture
def layer() -> recall.Layer:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 64, 16, generator=generator) for _ in range(2))
    return recall.Layer(query, key, recall.shared(key, key), recall.shared(query, key))


def test_shares_of_the_attention_are_those_of_a_loop(layer: recall.Layer) -> None:
    choice = Choice(0.125, "token", 1)
    p = (layer.query @ layer.key.mT / 4).masked_fill(~torch.ones(64, 64).tril().bool(), -torch.inf).softmax(-1)
    best, recent, equal = [], [], []
    codes = [recall.codes_of(t, layer.shared) for t in (layer.query, layer.key)]
    for h in range(2):
        for t in range(16, 64):
            row = p[0, h, t, : t + 1]
            best.append(row.sort(descending=True).values[:8].sum())
            recent.append(row[-8:].sum())
            same = [int((codes[0][0, h, :, t] == codes[1][0, h, :, s]).sum()) for s in range(t + 1)]
            chosen = sorted(range(t + 1), key=lambda s, same=same: (same[s], s))[-8:]  # type: ignore[misc]
            equal.append(row[chosen].sum())
    for way, shares in ((recall.BEST, best), (recall.RECENT, recent), (recall.PAPER, equal)):
        assert layer.share(way, choice) == pytest.approx(float(torch.stack(shares).mean()), rel=1e-5)
    everything = choice._replace(keep=64)
    assert [layer.share(way, everything) for way in layer.ways(choice)] == pytest.approx([1.0] * 5)


def test_the_best_blocks_are_the_best_of_all_combinations(layer: recall.Layer) -> None:
    choice = Choice(0.5, "block", 16)  # three of four: for the last block of queries the first, its own and one more
    chosen = layer.best_blocks(choice)
    for h in range(2):
        shares = [layer.attention[0, h, 48:, 16 * n : 16 * n + 16].sum() for n in range(4)]
        other = 1 if shares[1] > shares[2] else 2
        assert chosen[0, h, 63].view(4, 16).all(1).tolist() == [True, other == 1, other == 2, True]
    means = layer.query.view(1, 2, 4, 16, 16).mean(3) @ layer.key.view(1, 2, 4, 16, 16).mean(3).mT
    for h in range(2):
        other = 1 + int(means[0, h, 3, 1:3].argmax())
        assert layer.means(choice)[0, h, 63].view(4, 16).all(1).tolist() == [True, other == 1, other == 2, True]


def test_a_choice_that_cannot_be_gives_no_figure(layer: recall.Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = Choice(0.125, "token", 1)
    assert next(recall.compared([layer], choice))["way"] == recall.BEST
    monkeypatch.setattr(layer, "best", layer.recent)
    with pytest.raises(CheckFailed, match="memsave, .*: it finds .* of the attention, the best choice finds"):
        list(recall.compared([layer], choice))
    monkeypatch.setattr(layer, "best", lambda choice: layer.causal.expand(1, 2, 64, 64))
    with pytest.raises(CheckFailed, match="a query has 64 keys, 8 are allowed, or has some after it"):
        list(recall.compared([layer], choice))
    monkeypatch.setattr(layer, "best", lambda choice: torch.eye(64).roll(1, 1).bool().expand(1, 2, 64, 64))
    with pytest.raises(CheckFailed, match="a query has 1 keys, 8 are allowed, or has some after it"):
        list(recall.compared([layer], choice))


def test_attention_is_noted_by_layer_and_the_model_runs_as_it_is(text: Path) -> None:
    train_text = recall.demo.train_text()
    model = train_text.build_model("tiny", 32, 0)
    batches = list(train_text.make_batches(recall.demo.text(text).train, 2, 3, 32, 0))
    found = recall.attended(model, batches)
    assert [tuple(t.shape) for layer in found for t in layer] == [(6, 2, 32, 16)] * 4
    first = model.model.layers[0]
    hidden = first.input_layernorm(model.model.embed_tokens(batches[1]))
    query = first.self_attn.q_proj(hidden).unflatten(2, (2, 16)).transpose(1, 2)
    assert torch.allclose(found[0][0][3:].norm(dim=3), query.norm(dim=3), rtol=1e-4)  # rotated, so of the same norm


def test_further_training_goes_on_where_it_was_stopped(
    text: Path, run_case: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = replace(CONTINUED_CASE, text=text, lr=1e-2, further_lr=5e-3, tiny=CONTINUED_CASE.tiny | {"seeds": 2})
    path, trained = tmp_path / f"{case.name}.json", continued.trained

    def stop_at_the_second(case: Any, variants: Any, seed: int) -> Any:
        if seed:
            raise KeyboardInterrupt
        return trained(case, variants, seed)

    monkeypatch.setattr(continued, "trained", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run_case(case, "--suite", "quality", "--tiny")
    first = read(path)["results"]
    assert [(row["seed"], row["variant"]) for row in first] == [(0, variant) for variant in case.variants]

    monkeypatch.setattr(continued, "trained", trained)
    assert run_case(case, "--suite", "quality", "--tiny") == 0
    data = read(path)
    rows = {(row["seed"], row["variant"]): row for row in data["results"]}
    assert data["results"][: len(first)] == first
    assert list(rows) == [(seed, variant) for seed in range(2) for variant in case.variants]
    dense = rows[0, "dense"]
    for (seed, variant), row in rows.items():
        assert (row["converted_loss"] is None) == ("ema" in variant) and len(row["training_losses"]) == 1
        assert row["step_s"] > 0 and row["peak_bytes"] > row["kept_bytes"] > 0
        if seed == 0 and variant != "dense":
            assert row["validation_loss"] != dense["validation_loss"], "a variant that trains like dense"
    assert dense["validation_loss"] < dense["converted_loss"] < 5.5
    assert rows[0, "routed FFN, 2 of 4 blocks"]["kept_bytes"] < dense["kept_bytes"]
    assert "2 seeds, 4 steps before of 2 x 128 bytes" in tables.table(data)


def test_dense_is_the_training_of_the_demo_that_goes_on(text: Path) -> None:
    case = replace(CONTINUED_CASE.at_toy_size(), text=text, steps_per_point=1)
    (row,) = continued.trained(case, ["dense"], 0)
    train_text, content = continued.demo.train_text(), continued.demo.text(text)
    batches = train_text.make_batches(content.train, 8, 2, 128, 0)
    validation = train_text.make_batches(content.validation, train_text.VALIDATION_BATCHES, 2, 128, 1)
    both = (case, replace(case, lr=case.further_lr))
    runs = [train_text.Run("plain", continued.demo.options(each, 4, 0)) for each in both]
    for index, batch in enumerate(batches[:4]):
        runs[0].step(index, batch)
    assert row["converted_loss"] == pytest.approx(runs[0].validation_loss(validation), abs=2e-5)
    runs[1].model.load_state_dict(runs[0].model.state_dict())
    for index, batch in enumerate(batches[4:]):
        runs[1].step(index, batch)
    assert row["training_losses"] == pytest.approx(runs[1].losses, abs=2e-5)
    assert row["validation_loss"] == pytest.approx(runs[1].validation_loss(validation), abs=2e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variants": {"dense": None}, "further_lr": 1e30}, "dense: its validation loss is nan"),
        (
            {"variants": {"nothing": memsave.SparseMHAConfig(target_modules=r".*self_attn")}},
            "nothing: no module of the",
        ),
    ],
)
def test_training_that_makes_no_sense_gives_no_figure(
    change: dict[str, Any],
    message: str,
    text: Path,
    run_case: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "further_lr" not in change:
        monkeypatch.setattr(continued.memsave, "convert_model", lambda *args, **settings: None)
    assert run_case(replace(CONTINUED_CASE, text=text, **change), "--suite", "quality", "--tiny") == 1
    assert f"no figures: {message}" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.json"))


def test_the_table_of_further_training() -> None:
    def row(variant: str, seed: int, before: float | None, after: float, step_s: float) -> dict[str, Any]:
        found = {"variant": variant, "seed": seed, "converted_loss": before, "validation_loss": after}
        return found | {"step_s": step_s, "kept_bytes": MIB if variant == "dense" else MIB // 2}

    rows = [row("dense", 0, 3.0, 2.0, 1.0), row("dense", 1, 3.5, 2.5, 1.0)]
    rows += [row("sparse", 1, 4.0, 2.75, 0.5), row("sparse", 0, 4.5, 2.125, 0.5), row("ema", 0, None, 2.0, 2.0)]
    lines = tables.table(result_with(CONTINUED_CASE, rows)).splitlines()
    assert lines[0].startswith(
        f"| variant | converted | after {CONTINUED_CASE.further_steps} further steps | more than"
    )
    first, second, third = lines[2:5]
    assert first == "| dense | 3.250 (3.000 to 3.500) | 2.250 (2.000 to 2.500) |  | 1.00 s (1.00x) | 1.0 MiB (1.00x) |"
    assert second.startswith(
        "| sparse | 4.250 (4.000 to 4.500) | 2.438 (2.125 to 2.750) | +0.188 (+0.125 to +0.250) | 0.50"
    )
    assert second.endswith("| 0.50 s (0.50x) | 0.5 MiB (0.50x) |")
    assert third.startswith("| ema | - | 2.000 (2.000 to 2.000) | +0.000 (+0.000 to +0.000) | 2.00 s (2.00x)")


@pytest.mark.parametrize("case", (*ON_CPU, RECALL_CASE, CONTINUED_CASE), ids=lambda case: case.name)
def test_the_committed_results_are_complete_and_of_these_cases(case: Case) -> None:
    data = read(RESULTS / "cpu" / f"{case.name}.json")
    described = json.loads(json.dumps(case.describe()))
    assert described | {"text": None} == data["case"] | {"text": None}  # which differs with the version of Python
    if isinstance(case, AttentionCase):
        found = {(row["size"]["T"], row["way"]) for row in data["results"]}
        assert {(length, way) for length in case.lengths for way in (SDPA, *case.ways)} <= found
    if case is CONTINUED_CASE:
        found = {(row["seed"], row["variant"]) for row in data["results"]}
        assert found == {(seed, v) for seed in range(CONTINUED_CASE.seeds) for v in CONTINUED_CASE.variants}
