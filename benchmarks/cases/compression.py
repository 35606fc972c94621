"""The benchmark case of what compressed weights do to the embeddings of a real sentence encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from benchmarks import sentences

from .case import Case

# More than all second moments take. With less, moments of later linears are of a model that is partly compressed, at
# the price of a pass over the calibration texts for a few linears each.
ONE_PASS_BYTES = 2**27


@dataclass(frozen=True, kw_only=True)
class CompressionCase(Case):
    """Embeddings of the original encoder and of compressed ones, each made from the original weights.

    Attributes:
        ratios: of the parameters that are kept.
        ways: a name, and the settings of `FlashSVDConfig` besides the ratio.
        layers: how many the encoder has, the first ones; None for all.
        target_modules: regular expression for the linears that are compressed.
        evaluated, calibration: how many texts are embedded and compared, and how many others whitening sees.
        batch: texts in a batch.
        max_length: tokens of a text; the rest is cut off.
        pairs: at most so many pairs of texts are compared by their rank.
        texts: folder with Python files whose docstrings are the texts; None for the standard library.
    """

    kind: ClassVar[str] = "compression"

    ratios: tuple[float, ...]
    ways: Mapping[str, Mapping[str, Any]]
    layers: int | None = None
    target_modules: str = r"encoder\..*"
    evaluated: int = 512
    calibration: int = 256
    batch: int = 32
    max_length: int = 128
    pairs: int = 100_000
    texts: Path | None = None

    def describe(self) -> dict[str, Any]:
        settings = asdict(self)
        names = ("target_modules", "evaluated", "calibration", "batch", "max_length", "pairs")
        described = super().describe() | {name: settings[name] for name in names}
        ways = {name: dict(way) for name, way in self.ways.items()}
        return described | {"model": sentences.MODEL, "ways": ways, "source": sentences.source(self.texts)}


COMPRESSION_CASES = (
    CompressionCase(
        name="flash_svd_minilm",
        method="flash_svd",
        title=f"embeddings by {sentences.MODEL} beside the original's, of 512 docstrings of the standard library: mean "
        "cosine (lowest), and rank correlation of the cosines between the texts",
        ratios=(0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
        ways={
            "plain": {},
            "plain, energy": {"allocation": "energy"},
            "whitened": {"whiten": "activation", "calibration_bytes": ONE_PASS_BYTES},
            "whitened, energy": {
                "whiten": "activation",
                "allocation": "energy",
                "calibration_bytes": ONE_PASS_BYTES,
            },
        },
        expected_s=330.0,
        tiny={
            "ratios": (0.3, 0.9),
            "layers": 1,
            "evaluated": 32,
            "calibration": 32,
            "batch": 32,
            "max_length": 32,
        },
    ),
)
