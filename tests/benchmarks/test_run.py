"""The benchmark runner: no figure without a passed check, variants that leave nothing behind, a time budget."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import train_text
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

import memsave
from benchmarks import run
from benchmarks.cases import CASES, Case, models, tiles
from benchmarks.cases.op_case import OpCase, for_op, in_fp64
from benchmarks.cases.op_inputs import matrices, product, rows_of, written_product
from benchmarks.cases.training import StepCase, TrainingCase
from benchmarks.cases.variance import VarianceCase
from benchmarks.cases.variants import CHECKPOINT, EXACT, PLAIN, SAMPLED_ALONE, Variant
from benchmarks.result_files import RESULTS
from benchmarks.runners import estimates
from benchmarks.runners import ops as runners_ops
from benchmarks.runners.models import checked
from memsave.ops import _backend
from tests.harness import assert_within_budget

BY_NAME = {case.name: case for case in CASES}


def _add_one_percent(model: nn.Module) -> None:
    model.get_parameter("0.weight").register_hook(lambda grad: 1.01 * grad)


def _wrong_scale(model: nn.Module) -> None:
    SAMPLED_ALONE.apply(model)
    model.get_parameter("2.weight").register_hook(lambda grad: 2.0 * grad)


def tiny_case(*variants: Variant) -> TrainingCase:
    return TrainingCase(
        name="tiny",
        title="a tiny model",
        model=lambda: nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)),
        forward=models.direct,
        variants=(PLAIN, *variants),
        shape=(2, 256, 32),
    )


def run_tiny(case: Case, out: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr(run, "CASES", (case,))
    monkeypatch.setattr(runners_ops, "TURN_S", 0.0)
    common = ["--long", "--repeats", "2", "--threads", str(torch.get_num_threads())]
    return run.main([*common, "--out", str(out), *options])


def results_of(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["results"]


def test_a_case_gives_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = tiny_case(SAMPLED_ALONE)
    assert run_tiny(case, tmp_path, monkeypatch) == 0
    plain, sampled = results_of(tmp_path / "tiny.json")
    model, x = case.model(), torch.randn(case.shape, requires_grad=True)
    assert plain["kept_bytes"] == memsave.saved_bytes(lambda: model(x)) > sampled["kept_bytes"]
    for figures in (plain, sampled):
        weights_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        assert figures["peak_bytes"] > figures["kept_bytes"] + 2 * weights_bytes
    assert 0 < plain["low_s"] <= plain["median_s"] <= plain["high_s"]


def test_a_full_step_counts_the_optimizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(BY_NAME["step_demo"].at_toy_size(), variants=(PLAIN, CHECKPOINT, EXACT))
    assert isinstance(case, StepCase)
    assert run_tiny(case, tmp_path, monkeypatch) == 0
    plain, checkpoint, exact = results_of(tmp_path / "step_demo.json")
    weights_bytes = sum(p.numel() * 4 for p in case.model().parameters())
    for figures in (plain, checkpoint, exact):
        # Weights and AdamW's two states, and at the peak of backward what is kept or the gradients.
        assert figures["peak_bytes"] > 3 * weights_bytes + min(weights_bytes, figures["kept_bytes"])
    assert checkpoint["kept_bytes"] < exact["kept_bytes"] < plain["kept_bytes"]


@pytest.mark.parametrize("broken", [_add_one_percent, _wrong_scale])
def test_a_case_that_fails_its_check_gives_no_figure(
    broken: Callable[[nn.Module], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    case = tiny_case(Variant(name="broken", apply=broken))
    assert run_tiny(case, tmp_path, monkeypatch) == 1
    assert not list(tmp_path.iterdir())
    printed = capsys.readouterr()
    assert "broken" in printed.err and "MiB" not in printed.out


def test_a_peer_that_fails_or_is_missing_leaves_the_others_their_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Variant(name="broken peer", apply=_add_one_percent, package="torch")
    made: list[nn.Module] = []

    def fail_later(model: nn.Module) -> None:
        made.append(model)
        if len(made) > 1:  # the first one is checked
            raise RuntimeError("cannot be measured")

    late = Variant(name="late peer", apply=fail_later, package="torch")
    missing = Variant(name="missing peer", apply=_add_one_percent, package="no_such_package")
    assert run_tiny(tiny_case(broken, late, missing, SAMPLED_ALONE), tmp_path, monkeypatch) == 0
    data = json.loads((tmp_path / "tiny.json").read_text())
    assert [row["variant"] for row in data["results"]] == [PLAIN.name, SAMPLED_ALONE.name]
    assert "plain model's error" in data["left_out"]["broken peer"]
    assert data["left_out"]["late peer"] == "RuntimeError: cannot be measured"
    assert data["left_out"]["missing peer"] == "no_such_package is not installed"


def test_what_a_peer_patches_reaches_no_other_variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that replaces a function and a method of transformers for the whole process, and adds names."""
    seen: list[tuple[object, object]] = []

    def remember(model: nn.Module) -> None:
        seen.append((modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaMLP.forward))

    def patch(model: nn.Module) -> None:
        original = modeling_llama.apply_rotary_pos_emb
        modeling_llama.apply_rotary_pos_emb = lambda *args, **kwargs: original(*args, **kwargs)
        modeling_llama.LlamaMLP.forward = lambda self, x: self.down_proj(
            self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        )
        modeling_llama.new_name = modeling_llama.LlamaMLP.new_name = None

    before = dict(vars(modeling_llama)), dict(vars(modeling_llama.LlamaMLP))
    watching = Variant(name="watching", apply=remember)
    patching = Variant(name="patching", apply=patch, package="torch", patches=(modeling_llama.__name__,))
    case = replace(BY_NAME["step_demo"].at_toy_size(), variants=(watching, patching))
    assert run_tiny(case, tmp_path, monkeypatch) == 0
    assert len(results_of(tmp_path / "step_demo.json")) == 2
    assert (dict(vars(modeling_llama)), dict(vars(modeling_llama.LlamaMLP))) == before
    assert set(seen) == {(before[0]["apply_rotary_pos_emb"], before[1]["forward"])}


def test_the_variance_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = (case for case in CASES if isinstance(case, VarianceCase))
    assert run_tiny(case, tmp_path, monkeypatch, "--tiny") == 0
    (row,) = results_of(tmp_path / f"{case.name}.json")
    assert row["pps"] < 0.7 * row["crs"]  # half of the rows: the factor is 0.5


def test_the_estimate_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "MAX_ROUNDS", 1)
    case = BY_NAME["estimate_llama_8b"]
    assert run_tiny(case, tmp_path, monkeypatch, "--tiny") == 0
    ours, theirs = results_of(tmp_path / f"{case.name}.json")
    assert ours["peak_bytes"] == pytest.approx(theirs["peak_bytes"], rel=estimates.TOLERANCE)
    assert ours["process_bytes"] > 2**26 and ours["cpu_s"] > 0


def test_predictions_that_differ_give_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {name: 'print(json.dumps({"peak_bytes": 100 + 2 * (name == "ours")}))' for name in ("ours", "theirs")}
    programs = {name: f"name = {name!r}\n{program}" for name, program in wrong.items()}
    monkeypatch.setattr(estimates, "TOOLS", programs)
    assert run_tiny(BY_NAME["estimate_llama_8b"], tmp_path, monkeypatch, "--tiny") == 1
    assert "predict peaks of 102 and 100 bytes" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


OPS = [case for case in (*CASES, *tiles.tile_cases()) if isinstance(case, OpCase)]


@pytest.mark.parametrize("case", OPS, ids=lambda case: case.name)
def test_every_op_case_passes_its_check(case: OpCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_tiny(replace(case, devices=("cpu",)), tmp_path, monkeypatch, "--tiny") == 0
    rows = results_of(tmp_path / f"{case.name}.json")
    on_cpu = [contender.name for contender in case.contenders if "cpu" in contender.devices]
    sizes = len(case.at_toy_size().sizes["cpu"])
    assert [row["contender"] for row in rows] == on_cpu * sizes
    assert all(0 < row["low_s"] <= row["median_s"] and row["peak_bytes"] > 0 for row in rows)


def test_bytes_of_an_op_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel allocates its result; indexing also the rows and their product in float32 before the last cast."""
    run_tiny(BY_NAME["op_gather_rows"], tmp_path, monkeypatch, "--tiny")
    rows = results_of(tmp_path / "op_gather_rows.json")
    peaks = {(row["contender"], row["size"]["dtype"]): row["peak_bytes"] for row in rows}
    elements = 76 * 48  # 30% of 256 rows
    assert peaks["indexing", "float32"] == 2 * 4 * elements
    assert peaks["memsave", "float32"] in (4 * elements, peaks["plain PyTorch", "float32"])  # without C++: the latter


def test_an_op_that_differs_gets_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A backend whose results are wrong: without a wish for plain PyTorch, the last row is lost."""
    right = memsave.ops.gather_rows

    def wrong(x: Tensor, rows: Tensor, scale: Tensor | None = None) -> Tensor:
        found = right(x, rows, scale)
        return found if _backend.wish() == "reference" else found * (torch.arange(len(found)) < len(found) - 1)[:, None]

    monkeypatch.setattr(memsave.ops, "gather_rows", wrong)
    case = BY_NAME["op_gather_rows"]
    broken = for_op("gather_rows", {}, title=case.title, inputs=rows_of, sizes=case.at_toy_size().sizes)
    assert run_tiny(broken, tmp_path, monkeypatch) == 1
    assert not list(tmp_path.iterdir())
    printed = capsys.readouterr()
    assert "op_gather_rows at {'N': 256" in printed.err and " us" not in printed.out


def test_an_op_beyond_its_error_budget_is_refused() -> None:
    inputs = matrices("cpu", N=256, D=16, O=16, dtype=torch.bfloat16)
    exact, plain = written_product(**in_fp64(inputs)), written_product(**inputs)
    assert_within_budget(product(**inputs), exact, plain)
    with pytest.raises(AssertionError, match="the budget is"):
        assert_within_budget(product(**inputs) * 1.05, exact, plain)


def test_a_spent_budget_leaves_all_cases_out_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle" / "results.json"
    assert run_tiny(tiny_case(), tmp_path / "out", monkeypatch, "--budget-s", "0", "--bundle", str(bundle)) == 0
    reason = f"0 s of the time budget were left, it takes about {tiny_case().expected_s:.0f} s"
    assert json.loads(bundle.read_text())["left_out"] == {"tiny": reason}
    assert json.loads(bundle.read_text())["results"] == {}
    assert not (tmp_path / "out").exists()
    assert f"LEFT OUT: tiny: {reason}" in capsys.readouterr().out


def test_a_case_that_takes_longer_than_what_is_left_is_not_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "CASES", (replace(tiny_case(), expected_s=1e9), replace(tiny_case(), name="short")))
    bundle = tmp_path / "results.json"
    assert run.main(["--long", "--repeats", "2", "--budget-s", "1000", "--bundle", str(bundle)]) == 0
    written = json.loads(bundle.read_text())
    assert list(written["results"]) == ["short"] and list(written["left_out"]) == ["tiny"]


def test_long_cases_wait_until_they_are_asked_for() -> None:
    def chosen(*arguments: str) -> set[str]:
        return {case.name for case in run.parse_options(arguments).cases}

    long = {case.name for case in CASES if "cpu" in case.devices and case.long}
    assert long and chosen("--long") - chosen() == long == chosen("--case", *sorted(long))
    assert sum(case.expected_s for case in CASES if "cpu" in case.devices and not case.long) <= 20 * 60


@pytest.mark.parametrize("device", ["cuda", "gpu"])
def test_a_device_that_is_not_there_is_refused(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(run, "run_all", lambda *args: pytest.fail("cases were run"))
    with pytest.raises(SystemExit) as caught:
        run.main(["--device", device])
    assert caught.value.code == 2


def test_every_op_has_a_case() -> None:
    assert {f"op_{op}" for op in memsave.backends()} <= set(BY_NAME)


def test_every_case_for_the_cpu_has_a_result_file() -> None:
    found = {path.stem for path in (RESULTS / "cpu").glob("*.json")}
    assert {case.name for case in CASES if "cpu" in case.devices} <= found
    assert len(BY_NAME) == len(CASES)


def test_the_demo_step_is_the_demo() -> None:
    case = BY_NAME["step_demo"]
    assert isinstance(case, StepCase)
    made, of_demo = case.model().config.to_dict(), train_text.build_model("small", 256, 0).config.to_dict()
    assert made == of_demo and case.shape == (4, 256)


def test_the_shapes_of_the_large_models() -> None:
    """What the names promise, without allocating them."""
    with torch.device("meta"):
        llama, bert = models.llama_1b(), models.bert_large()
    assert sum(p.numel() for p in llama.parameters()) == 1_235_814_400  # Llama-3.2-1B has as many
    assert 335e6 < sum(p.numel() for p in bert.parameters()) < 336e6


@pytest.mark.parametrize("name", ["step_llama_1b", "step_bert_large"])
def test_the_large_cases_pass_their_check_at_toy_size(name: str) -> None:
    case = BY_NAME[name].at_toy_size()
    assert isinstance(case, StepCase)
    case = replace(case, variants=tuple(v for v in case.variants if not v.compiled))  # compiling takes long
    errors, left_out = checked(case, "cpu")
    assert errors.keys() | left_out.keys() == {variant.name for variant in case.variants}
    assert left_out.keys() <= {"Liger"}  # it needs a GPU


def test_forced_tiles_are_put_back() -> None:
    pytest.importorskip("triton")
    from memsave.ops.gather_rows import triton as gather
    from memsave.ops.sampled_matmul import triton as matmul

    before = matmul.CONFIGS
    with tiles.matmul_tile(128, 256, 64, 8, 3):
        options = matmul.CONFIGS[2][0].all_kwargs()
        assert (options["BLOCK_D"], options["num_warps"], options["num_stages"]) == (256, 8, 3)
        assert torch.are_deterministic_algorithms_enabled()  # launch then takes the first tile
        assert not torch.utils.deterministic.fill_uninitialized_memory
    assert matmul.CONFIGS is before and not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    with tiles.gather_tile(2048, 512):
        assert gather.tile(4096) == (4, 512)
    assert (gather.TILE_ELEMENTS, gather.MAX_BLOCK_D) == tiles.GATHER_TILES[0]
