"""The demo, examples/train_text.py, for the cases that train its model."""

from __future__ import annotations

import argparse
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from benchmarks.cases.demo_case import DemoCase

EXAMPLES = Path(__file__).parent.parent / "examples"


@cache
def train_text() -> ModuleType:
    """The demo's module, imported when a case needs it: its packages may be missing where the other cases run."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    import train_text

    return train_text


@cache
def text(folder: Path | None) -> Any:
    """The `train_text.Text` of a folder, or for None of the standard library's source."""
    return train_text().read_text(folder)


def options(case: DemoCase, steps: int, seed: int) -> argparse.Namespace:
    """What `train_text.Run` needs to know."""
    return argparse.Namespace(
        size=case.size,
        batch=case.batch,
        length=case.length,
        lr=case.lr,
        steps=steps,
        seed=seed,
        device=torch.device("cpu"),
    )
