"""The model that stands for a type: built small, fed, and found to be a fair measure."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import step, types
from .inputs import Inputs, Maker
from .shrink import LEVELS, Level, small_config

LARGEST = 8_000_000
"""Parameters of a model that is swept, at most."""


class Skipped(Exception):
    """Why a type, or a method for it, is not checked."""


@dataclass
class Subject:
    """A model type's plain model and its batch.

    Attributes:
        model: in training mode, on the CPU, float32.
        kind: which of the candidates the batch is.
        expected: one training step of it.
        reached: names of the modules that run.
        random: whether it draws random numbers, though it has no dropout.
        moving: buffers that a forward changes, such as running means.
        with_dropout: the same with the dropout of the default config, and what it gives; None if there is none.
    """

    model_type: str
    model: Any
    batch: Inputs
    kind: str
    expected: step.Step
    parameters: int
    moving: frozenset[str] = frozenset()
    reached: frozenset[str] = frozenset()
    random: bool = False
    with_dropout: Subject | None = None


def subject(model_type: str) -> Subject:
    """The first class, size and batch of a type that run forward and backward, the same each time.

    Raises:
        Skipped: there is none.
    """
    try:
        classes = types.model_classes(model_type)
    except ImportError as error:
        raise Skipped(str(error)) from None
    if not classes:
        raise Skipped("is part of another type: transformers has no model class for it")
    problems: list[tuple[int, str]] = []
    for level in LEVELS:
        try:
            config = small_config(types.config_class(model_type), level)
        except Exception as error:
            problems.append((0, _said("its default config, made smaller, is refused", error)))
            continue
        for cls in classes[:4]:
            found = _try(model_type, cls, config, problems)
            if found is not None:
                found.with_dropout = _with_dropout(found, level)
                return found
    raise Skipped(max(problems, key=lambda p: p[0])[1])


def _with_dropout(found: Subject, level: Level) -> Subject | None:
    config = small_config(types.config_class(found.model_type), level, dropout=True)
    if config.to_dict() == found.model.config.to_dict():
        return None
    model = _built(type(found.model), config)
    model.load_state_dict(found.model.state_dict(), strict=False)
    model.train()
    step.train(model, found.batch)
    first, second = step.train(model, found.batch), step.train(model, found.batch)
    if _unfair(first, second) or not step.difference(first, found.expected):
        return None
    model.zero_grad()
    return Subject(found.model_type, model, found.batch, found.kind, first, found.parameters)


def _try(model_type: str, cls: Any, config: Any, problems: list[tuple[int, str]]) -> Subject | None:
    try:
        with torch.device("meta"):
            count = sum(p.numel() for p in cls(config).parameters())
    except Exception as error:
        problems.append((1 if not isinstance(error, ImportError) else 9, _said("cannot be built", error)))
        return None
    if count > LARGEST:
        problems.append((2, f"has {count / 1e6:.0f} million parameters when made smaller"))
        return None
    try:
        model = step.lively(_built(cls, config)).train()
        candidates = list(Maker(model).candidates())
    except Exception as error:
        problems.append((3, _said("cannot be built", error)))
        return None
    for kind, batch in candidates:
        before = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
        try:
            step.train(model, batch)  # what is made by a first call exists from here on
            first, second = step.train(model, batch), step.train(model, batch)
        except Exception as error:
            problems.append((4, _said("the plain model fails on generated inputs", error)))
            continue
        if text := _unfair(first, second):
            problems.append((5, text))
            continue
        model.zero_grad()
        after = model.state_dict()
        moving = frozenset(n for n, v in before.items() if not torch.equal(v.nan_to_num(), after[n].nan_to_num()))
        reached, random = _watched(model, batch)
        return Subject(model_type, model, batch, kind, first, count, moving, reached, random)
    return None


def _watched(model: nn.Module, batch: Inputs) -> tuple[frozenset[str], bool]:
    """The names of the modules that run, and whether random numbers are drawn."""
    names = set()

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = "") -> None:
        # Sparse attention makes no weights, and transformers' code cannot be told not to ask for them.
        if not (isinstance(module, nn.MultiheadAttention) and kwargs.get("need_weights", True)):
            names.add(name)

    handles = [m.register_forward_hook(partial(note, name=n), with_kwargs=True) for n, m in model.named_modules()]
    step.seed()
    before = torch.get_rng_state()
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return frozenset(names), not torch.equal(before, torch.get_rng_state())


def _built(cls: Any, config: Any) -> nn.Module:
    step.seed()
    model: nn.Module = cls(config)
    return model


def _unfair(first: step.Step, second: step.Step) -> str:
    if not first.gradients:
        return "the plain model's output depends on no parameter"
    if not all(g.isfinite().all() for g in first.gradients.values()):
        return "the plain model's gradients are not finite on generated inputs"
    if text := step.difference(second, first):
        return f"the plain model is not deterministic: {text.partition(':')[0]} differs between two equal calls"
    return ""


def _said(what: str, error: BaseException) -> str:
    if isinstance(error, ImportError):
        words = str(error).split()
        if "the" in words and "library" in words:
            return f"needs the package {words[words.index('library') - 1]}"
    where = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{where.filename.rpartition('/')[2]}:{where.lineno}"
    text = " ".join(str(error).split())[:160]
    return f"{what}: {type(error).__name__}: {text} ({place})"
