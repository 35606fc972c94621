"""What the benchmark cases that train the demo's model share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import demo

from .case import Case


@dataclass(frozen=True, kw_only=True)
class DemoCase(Case):
    """Trains the model of examples/train_text.py.

    Attributes:
        size: of the model, a key of `train_text.SIZES`.
        batch: sequences in a batch.
        length: bytes in a sequence.
        lr: the highest learning rate of the steps that are the demo's.
        text: folder with text files; None for the standard library's source.
    """

    size: str = "small"
    batch: int = 4
    length: int = 256
    lr: float = 1e-3
    text: Path | None = None

    def describe(self) -> dict[str, Any]:
        text = demo.text(self.text)
        described = super().describe() | {name: getattr(self, name) for name in ("size", "batch", "length", "lr")}
        return described | {"text": {"source": text.source, "training_bytes": len(text.train)}}
