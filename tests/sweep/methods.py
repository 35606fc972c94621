"""The checks, one for each method of memsave: what its guarantee says, then saving and restoring."""

from __future__ import annotations

import copy
import dataclasses
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

import memsave

from . import step
from .check import (
    Check,
    assert_exact,
    assert_same_state,
    assert_stock_class_reads,
    converted,
    state,
)
from .overrides import VALUES_DECIDE_SHAPES
from .subject import Skipped, Subject

ANY = r".*"


def bare(found: Subject) -> None:
    """`convert_model(model)`: the same function and gradients; saved as the plain model is; restored bit for bit."""
    before = state(found.model, found.moving)
    model = converted(found)
    assert_exact(found, model)
    if found.with_dropout is not None:
        assert_exact(found.with_dropout, converted(found.with_dropout))
    assert_stock_class_reads(found, model)
    _assert_saved_and_loaded(found, model)
    _assert_restored(found, model, before)


def linear_cross_entropy(found: Subject) -> None:
    """Lazy logits at any size."""
    before = state(found.model, found.moving)
    model = converted(found, memsave.LinearCrossEntropyConfig(min_logits_bytes=0))
    assert_exact(found, model)
    _assert_restored(found, model, before)


def recompute_mlp(found: Subject) -> None:
    """Feed-forward blocks that keep their input alone, after the bare conversion."""
    before = state(found.model, found.moving)
    model = converted(found)
    _convert(model, memsave.RecomputeMLPConfig(recompute="all"))
    assert_exact(found, model)
    _assert_restored(found, model, before)


def recompute_mlp_rows(found: Subject) -> None:
    """Weight gradients of these blocks from half of the rows: all others are exact."""
    before = state(found.model, found.moving)
    config = memsave.RecomputeMLPConfig(recompute="all", keep_ratio=0.5, min_rows=1, target_modules=ANY)
    model = converted(found, config)
    if not found.random:  # what it draws itself comes after the sampled rows
        assert_exact(found, model, skip=_weights_of_converted_linears(model))
    _assert_finite(found, model)
    _assert_restored(found, model, before)


def wta_crs(found: Subject) -> None:
    """Weight gradients of every linear from a part of the rows: all others are exact."""
    before = state(found.model, found.moving)
    model = converted(found, memsave.WTACRSConfig(keep_ratio=0.3, min_rows=2, target_modules=ANY))
    if not found.random:  # what it draws itself comes after the sampled rows
        assert_exact(found, model, skip=_weights_of_converted_linears(model))
    _assert_finite(found, model)
    _assert_saved_and_loaded(found, model)
    _assert_restored(found, model, before)


def sparse_mha(found: Subject) -> None:
    """With all keys, what the plain model computes; with a few of them, finite."""
    before = state(found.model, found.moving)
    few = converted(found, _sparse(found, 0.25), calibration=[found.batch])
    _assert_finite(found, few)
    _assert_saved_and_loaded(found, few)
    _assert_restored(found, few, before, allow_lossy=True)
    assert_exact(found, converted(found, _sparse(found, 1.0), calibration=[found.batch]))


def _sparse(found: Subject, keep: float) -> memsave.SparseMHAConfig:
    """Token by token, in the attention modules that the batch reaches."""
    config = memsave.SparseMHAConfig(keep=keep, granularity="token", dense_below=0, target_modules=ANY)
    reached = {n: m for n, m in found.model.named_modules() if n in found.reached and config.candidate(m)}
    reasons = {name: config.why_not(module) for name, module in reached.items()}
    names = [name for name, reason in reasons.items() if reason is None]
    if not names:
        refused = (
            f"refused: {next(iter(reasons.values()))}" if reasons else "the batch reaches no attention it converts"
        )
        raise Skipped(refused if reasons else f"no module that this method converts ({refused})")
    return dataclasses.replace(config, target_modules=_exactly(names))


def _exactly(names: list[str]) -> str:
    """A pattern that matches these whole names; as endings they could match others."""
    return "|".join(map(re.escape, names))


def routed_ffn(found: Subject) -> None:
    """Feed-forward blocks of which each token takes half; restored, the plain ones."""
    before = state(found.model, found.moving)
    model = converted(found, memsave.RoutedFFNConfig(blocks=4, active=2, target_modules=ANY))
    _assert_finite(found, model)
    _assert_saved_and_loaded(found, model)
    _assert_restored(found, model, before, allow_lossy=True)


def flash_svd(found: Subject) -> None:
    """Streaming computes what the same factors compute as plain linears; they can be trained."""
    try:
        _low_rank(found)
    except AttributeError as error:
        if "it exists only as two factors" not in str(error):
            raise
        raise Skipped(f"refused: {_reason(error)}") from None  # the model's code writes to a weight


def _low_rank(found: Subject) -> None:
    config: dict[str, Any] = {"ratio": 0.5, "target_modules": ANY}
    model = converted(found, memsave.FlashSVDConfig(**config, piece_bytes=2048)).eval()
    still = converted(found, memsave.FlashSVDConfig(**config, fuse=False)).eval()
    streamed, expected = (_without_probabilities(step.forward(each, found.batch)) for each in (model, still))
    text = step.difference(streamed, expected)
    assert not text, f"streaming: {text}"
    if type(found.model).__name__ not in VALUES_DECIDE_SHAPES:
        _assert_finite(found, model.train())
    _assert_saved_and_loaded(found, model)
    memsave.restore_model(model, allow_lossy=True)
    classes = [[type(module) for module in each.modules()] for each in (model, found.model)]
    assert classes[0] == classes[1], "restore_model: classes differ"


def _without_probabilities(done: step.Step) -> step.Step:
    """Attention that runs some heads at a time returns no probabilities."""
    return step.Step({name: value for name, value in done.outputs.items() if "attentions" not in name})


def patch_conv(found: Subject) -> None:
    """Inference in bands and tiles is the plain model's."""
    kernels = [m.kernel_size for m in found.model.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))]
    if "input_ids" in found.batch or sum(max(kernel) > 1 for kernel in kernels) < 3:
        raise Skipped("no module that this method converts (it is no convolutional network)")
    for schedule in ("stream", "patch"):
        error, text = _planned(found, schedule, torch.float32)
        # With batch norms folded into weights, rounding adds up: in float64 there is hardly any.
        assert error <= step.TOLERANCE or _planned(found, schedule, torch.float64)[0] < 1e-10, f"{schedule}: {text}"


def _planned(found: Subject, schedule: str, dtype: torch.dtype) -> tuple[float, str]:
    """How far the outputs are from the plain model's; restored, it is that."""
    plain = copy.deepcopy(found.model).eval().to(dtype)
    batch = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in found.batch.items()}
    model, before = copy.deepcopy(plain), state(plain, found.moving)
    config = memsave.PatchConvConfig(schedule=schedule, input_size=None, num_patches=2)
    try:
        memsave.convert_model(model, config, calibration=[batch])
    except memsave.UnsupportedModelError as error:
        raise Skipped(f"refused: {_reason(error)}") from None
    found_there = step.worst(step.forward(model, batch), step.forward(plain, batch))
    _assert_restored(found, model, before)
    return found_there


def shira(found: Subject) -> None:
    """A few trained entries of every linear's weight."""
    from memsave import SHiRAConfig

    _adapted(found, SHiRAConfig(density=0.05, target_modules=_linears(found)))


def lamda(found: Subject) -> None:
    """A small matrix between singular vectors of every linear's weight."""
    from memsave import LaMDAConfig

    targets = _linears(found, least=4)
    _adapted(found, LaMDAConfig(r=4, target_modules=targets))


def _adapted(found: Subject, config: Any) -> None:
    """The same function at first; only the adapters are trained; dropped, the plain model again."""
    before = state(found.model, found.moving)
    model = converted(found, config)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained, "no parameter is trained"
    plain = {id(p) for p in found.model.parameters()}
    assert not plain & {id(p) for p in model.parameters()}
    done = step.train(model, found.batch)
    alone = step.Step(done.outputs)
    text = step.difference(alone, step.Step(found.expected.outputs))
    assert not text, f"at the start: {text}"
    assert set(done.gradients) <= set(trained), "a frozen parameter has a gradient"
    assert done.gradients, "no adapter has a gradient"
    assert not (text := step.finite(done, found.expected)), text
    _assert_saved_and_loaded(found, model)
    _assert_restored(found, model, before, adapters="drop")


def _linears(found: Subject, least: int = 1) -> str:
    """A pattern of the linears, where each stands once, that are at least so wide.

    Raises:
        Skipped: there is none.
    """
    uses = Counter(id(p) for m in found.model.modules() for p in m._parameters.values())
    names = [
        name
        for name, module in found.model.named_modules()
        if type(module) is nn.Linear and min(module.weight.shape) >= least and uses[id(module.weight)] == 1
    ]
    if not names:
        raise Skipped("no module that this method converts (no linear)")
    return _exactly(names)


def _convert(model: Any, config: Any) -> None:
    try:
        memsave.convert_model(model, config)
    except memsave.NoMatchError as error:
        raise Skipped(f"no module that this method converts ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:240]


def _weights_of_converted_linears(model: nn.Module) -> frozenset[str]:
    """The gradients that are estimates."""
    names = set()
    for name, module in model.named_modules():
        if "_memsave" in module.__dict__ and getattr(module, "weight", None) is not None:
            names.add(f"{name}.weight")
    shared = {id(p) for n, p in model.named_parameters(remove_duplicate=False) if n in names}
    return frozenset(n for n, p in model.named_parameters(remove_duplicate=False) if id(p) in shared)


def _assert_finite(found: Subject, model: Any) -> None:
    done = step.train(model, found.batch)
    assert not (text := step.finite(done, found.expected)), text
    assert done.gradients, "no parameter has a gradient"
    model.zero_grad()


def _assert_saved_and_loaded(found: Subject, model: Any) -> None:
    """`memsave.save` and `memsave.load` into a plain model of other values give the same bits and outputs."""
    other = copy.deepcopy(found.model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    with tempfile.TemporaryDirectory() as folder:
        memsave.save(model, Path(folder) / "saved")
        memsave.load(Path(folder) / "saved", other)
    # A record holds a sketch in float32, made again from the weight that is loaded: its last bits may differ.
    mine, theirs = (state(m, frozenset(n for n in m.state_dict() if "_record." in n)) for m in (other, model))
    assert_same_state(mine, theirs, "save and load")
    text = step.difference(step.forward(other, found.batch), step.forward(model, found.batch), 0.0)
    assert not text, f"save and load: {text}"


def _assert_restored(found: Subject, model: Any, before: dict[str, Any], **options: Any) -> None:
    memsave.restore_model(model, **options)
    assert_same_state(state(model, found.moving), before, "restore_model")


CHECKS: dict[str, Check] = {
    "bare": bare,
    "linear_cross_entropy": linear_cross_entropy,
    "recompute_mlp": recompute_mlp,
    "recompute_mlp_rows": recompute_mlp_rows,
    "wta_crs": wta_crs,
    "sparse_mha": sparse_mha,
    "routed_ffn": routed_ffn,
    "flash_svd": flash_svd,
    "patch_conv": patch_conv,
    "shira": shira,
    "lamda": lamda,
}
