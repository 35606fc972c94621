"""What cannot be computed part by part says why in words; what stands before it still is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.slicing.harness import Subject, assert_close
from tests.slicing.modules import f

aten = torch.ops.aten

REFUSED: list[tuple[str, Callable[[Tensor], Any], str]] = [
    ("softmax over rows", lambda x: x.softmax(2), "mixes the rows"),
    ("attention over rows", lambda x: x @ x.transpose(2, 3), "several maps"),
    ("linear over columns", lambda x: F.linear(x, torch.ones(3, x.shape[3], dtype=x.dtype)), "mixes the rows"),
    ("concatenation of rows", lambda x: torch.cat([x, x * 2], 2), "concatenation along the rows"),
    ("view across rows", lambda x: x.reshape(x.shape[0], 8, 3, -1), "tears the rows apart"),
    ("view as bytes", lambda x: x.view(torch.int64), "another dtype"),
    ("one row", lambda x: x[:, :, 2], "takes one row"),
    ("adaptive pool", lambda x: F.adaptive_avg_pool2d(x, 3), "more than one row"),
    ("flip", lambda x: x.flip(2), "not known"),
    ("cumulative sum", lambda x: x.cumsum(2), "not known"),
    ("largest norm", lambda x: x.norm(p=1, dim=(2, 3)), "euclidean"),
    ("place of the maximum", lambda x: x.argmax(2), "mixes the rows"),
    ("sum of two maps, turned", lambda x: (x + 1) + (x + 2).transpose(2, 3), "different dimensions"),
    ("layer norm of rows", lambda x: F.layer_norm(x, x.shape[2:]), "mixes the rows"),
    ("grid sample", lambda x: F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1), align_corners=False), "not known"),
]


@pytest.mark.parametrize(("name", "function", "reason"), REFUSED, ids=[c[0] for c in REFUSED])
def test_refused(name: str, function: Callable[[Tensor], Any], reason: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), f(function)).double()
    subject = Subject.of(module, torch.randn(1, 4, 12, 12, dtype=torch.float64))
    rules = subject.rules((1,) if "columns" in name else (0,))
    assert any(reason in found for found in rules.reasons.values()), rules.reasons
    # What comes before it still streams, and all of it is right.
    assert_close(subject.run(subject.stretch((0,), rows=2)), subject.expected(), "the stretch before it")


@pytest.mark.parametrize(
    "make", [lambda: nn.Conv2d(4, 4, 3), lambda: nn.MaxPool2d(2), lambda: nn.ConvTranspose2d(4, 4, 2)]
)
def test_maps_without_a_batch_are_not_sliced(make: Callable[[], nn.Module]) -> None:
    module = nn.Sequential(nn.ReLU(), make()).double()
    subject = Subject.of(module, torch.randn(4, 9, 8, dtype=torch.float64))
    assert_close(subject.run(subject.stretch((0,), rows=2)), subject.expected(), "without a batch")
