"""What is checked of one model type, and by which method of memsave."""

from __future__ import annotations

import copy
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

import memsave

from . import step
from .subject import Skipped, Subject, subject

PASSED, SKIPPED, FAILED = "passed", "skipped", "failed"


@dataclass
class Verdict:
    """How one method did: `PASSED`, `SKIPPED` with a reason, or `FAILED` with what was wrong."""

    outcome: str
    why: str = ""
    seconds: float = 0.0


@dataclass
class Result:
    """What the sweep found of one model type.

    Attributes:
        skipped: why nothing was checked; "" if it was.
        batch: which arguments the model was called with.
        kept_ratio: bytes kept for backward after the bare conversion, of those before.
    """

    model_type: str
    skipped: str = ""
    model: str = ""
    parameters: int = 0
    batch: list[str] = field(default_factory=list)
    random: bool = False
    kept_ratio: float | None = None
    methods: dict[str, Verdict] = field(default_factory=dict)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


Check = Callable[[Subject], None]
"""Raises `Skipped`, or an AssertionError that says what is wrong."""


def sweep(model_type: str, checks: dict[str, Check]) -> Result:
    """Build the type's model and run every check on it."""
    start = time.perf_counter()
    result = Result(model_type)
    try:
        found = subject(model_type)
    except (Skipped, TimeoutError) as reason:
        result.skipped = str(reason)
        return result
    result.random = found.random
    result.model, result.parameters = type(found.model).__name__, found.parameters
    result.batch = sorted(found.batch)
    for name, check in checks.items():
        started = time.perf_counter()
        result.methods[name] = _verdict(check, found)
        result.methods[name].seconds = round(time.perf_counter() - started, 2)
    try:
        result.kept_ratio = kept_ratio(found)
    except Exception:
        result.kept_ratio = None
    result.seconds = round(time.perf_counter() - start, 2)
    return result


def _verdict(check: Check, found: Subject) -> Verdict:
    try:
        check(found)
    except (Skipped, TimeoutError) as reason:
        return Verdict(SKIPPED, str(reason))
    except AssertionError as error:
        return Verdict(FAILED, str(error))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{where.filename.rpartition('/')[2]}:{where.lineno}"
        return Verdict(FAILED, f"{type(error).__name__}: {' '.join(str(error).split())[:400]} ({place})")
    return Verdict(PASSED)


def kept_ratio(found: Subject) -> float:
    """Bytes kept for backward after the bare conversion, of those before."""
    model = copy.deepcopy(found.model)
    before = memsave.saved_bytes(lambda: step.loss(model, found.batch))
    memsave.convert_model(model)
    return round(memsave.saved_bytes(lambda: step.loss(model, found.batch)) / before, 3)


def converted(found: Subject, configs: Any = None, **options: Any) -> Any:
    """A copy of the model, converted.

    Raises:
        Skipped: the method converts no module of it.
    """
    model = copy.deepcopy(found.model)
    try:
        memsave.convert_model(model, configs, **options)
    except memsave.NoMatchError as error:
        raise Skipped(_no_module(error)) from None
    except NotImplementedError as error:
        if "get_input_embeddings" not in str(error):
            raise
        raise Skipped(f"refused by PEFT: {' '.join(str(error).split())[:160]}") from None
    except ValueError as error:
        refused = ("leave this module out", "no batch reached")
        if any(words in str(error) for words in refused) or isinstance(error, memsave.UnsupportedModelError):
            raise Skipped(f"refused: {' '.join(str(error).split())[:240]}") from None
        raise
    return model


def _no_module(error: Exception) -> str:
    text = " ".join(str(error).split()).removesuffix(" The model was not changed.")
    return f"no module that this method converts ({text[:200]})"


def assert_exact(found: Subject, model: Any, skip: frozenset[str] = frozenset()) -> None:
    """One training step gives what the plain model's gives, but for the gradients in `skip`."""
    error, text = step.worst(step.train(model, found.batch), found.expected, skip)
    model.zero_grad()
    assert error <= step.TOLERANCE or _is_rounding(error, found, skip), text


def _is_rounding(error: float, found: Subject, skip: frozenset[str]) -> bool:
    """Whether the plain model itself moves as far when its weights move by half of their last bits."""
    other = step.rounded_anew(copy.deepcopy(found.model))
    return error <= step.worst(step.train(other, found.batch), found.expected, skip)[0] < 1e-3


def state(model: Any, moving: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Bits and classes of a model; of the buffers `moving`, which a forward changes, the shape alone."""
    tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    bits = {n: torch.empty_like(v).zero_() if n in moving else v.detach().clone() for n, v in tensors.items()}
    classes = {name: type(module) for name, module in model.named_modules(remove_duplicate=False)}
    return {"bits": bits, "classes": classes, "config": _config(model)}


def _config(model: Any) -> Any:
    """What the config says but for the fields that `save_pretrained` fills in."""
    said = {k: v for k, v in model.config.to_dict().items() if k not in ("dtype", "architectures")}
    return said, model.config._attn_implementation


def assert_same_state(found: dict[str, Any], expected: dict[str, Any], what: str) -> None:
    """Equal keys, bits, classes and config."""
    for part in ("classes", "config"):
        assert found[part] == expected[part], f"{what}: {part} differ"
    assert_same_bits(found["bits"], expected["bits"], what)


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    assert list(found) == list(expected), f"{what}: keys {sorted(found.keys() ^ expected.keys())[:3]} differ"
    for name, value in expected.items():
        same = found[name].dtype == value.dtype and torch.equal(torch.nan_to_num(found[name]), torch.nan_to_num(value))
        assert same, f"{what}: {name} differs"


def assert_stock_class_reads(found: Subject, model: Any) -> None:
    """`save_pretrained` writes what the plain model's class reads, bit for bit, as well as the plain model does."""
    try:
        again = _saved_and_read(model)
        assert_same_bits(state(again)["bits"], state(model)["bits"], "save_pretrained and from_pretrained")
    except Exception:
        try:
            plain = _saved_and_read(found.model)
            assert_same_bits(state(plain)["bits"], state(found.model)["bits"], "plain")
        except Exception:  # so does the plain model
            return
        raise


def _saved_and_read(model: Any) -> Any:
    cls = type(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return cls.from_pretrained(folder)
