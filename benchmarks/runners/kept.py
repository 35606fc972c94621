"""Counts what each architecture keeps for backward, once its gradients are checked at toy size."""

from __future__ import annotations

from typing import Any

import torch

import memsave
from benchmarks.cases.case import short
from benchmarks.cases.kept import KeptCase
from benchmarks.checks import CheckFailed
from tests.architectures.models import TINY, Architecture
from tests.architectures.step import assert_same, in_dtype, train

DTYPES = (torch.float32, torch.bfloat16)


def run_kept_case(case: KeptCase, device: str, rounds: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """For each architecture and dtype, `plain_bytes` and `converted_bytes`; nothing is timed.

    Raises:
        CheckFailed: a converted model has other gradients than the plain one.
    """
    results = []
    for architecture in case.architectures:
        check(architecture, case.dropout.get(architecture.name, 0.0))
        results += [kept(case, architecture, dtype) for dtype in DTYPES]
    return results, {}


def check(architecture: Architecture, dropout: float) -> None:
    plain, model = (architecture.make(dropout=dropout) for _ in range(2))
    memsave.convert_model(model)
    batch = architecture.batch(TINY, "right")
    try:
        assert_same(train(model, batch), train(plain, batch))
    except AssertionError as error:
        raise CheckFailed(f"{architecture.name}, converted: {error}") from None


def kept(case: KeptCase, architecture: Architecture, dtype: torch.dtype) -> dict[str, Any]:
    dropout = case.dropout.get(architecture.name, 0.0)
    model: Any = architecture.make(case.size, dropout=dropout).to(dtype)
    batch = in_dtype(architecture.batch(case.size, "right"), dtype)
    plain_bytes = memsave.saved_bytes(lambda: model(**batch).loss)
    memsave.convert_model(model)
    return {
        "architecture": architecture.name,
        "dtype": short(dtype),
        "dropout": dropout,
        "plain_bytes": plain_bytes,
        "converted_bytes": memsave.saved_bytes(lambda: model(**batch).loss),
    }
