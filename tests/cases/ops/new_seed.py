"""Rows of `new_seed`, which reads nothing of its argument but the device."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from tests.harness import OpCase, OpSpec
from tests.harness.coverage import DTYPES

from .inputs import short

SPEC = OpSpec("new_seed", oracle=None)


def _like(dtype: torch.dtype) -> tuple[Any, ...]:
    return (torch.ones(3, 5).to(dtype),)


CASES = [
    *(OpCase(SPEC, short(dtype), partial(_like, dtype)) for dtype in DTYPES),
    OpCase(SPEC, "no_elements", lambda: (torch.ones(0, 3),)),
    OpCase(SPEC, "transposed", lambda: (torch.ones(3, 5).t(),)),
]
