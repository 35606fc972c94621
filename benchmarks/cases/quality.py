"""The benchmark cases of training's quality, which train the demo's model on real text.

They take up to an hour, so they are a suite of their own: `python -m benchmarks.run --suite quality`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from .case import Case
from .demo_case import DemoCase
from .sparse_attention import CONTINUED_CASE, RECALL_CASE

ALL_LINEARS = r".*\.layers\..*_proj"


@dataclass(frozen=True, kw_only=True)
class QualityCase(DemoCase):
    """Losses of training as it is and with sampled weight gradients, from several seeds.

    More seeds or variants may be added later: only what is missing is trained.

    Attributes:
        seeds: how many, from 0 on. A seed fixes the weights, the batches and the draws.
        steps: of each training.
        steps_per_point: a training loss is the mean of so many steps.
        linears: which linears are sampled: a name, and the regular expression for `target_modules`.
        sampled: how: a name, the estimator and the ratio of rows kept. Every way is tried with all `linears`.
    """

    kind: ClassVar[str] = "quality"

    seeds: int = 5
    steps: int = 150
    steps_per_point: int = 5
    linears: Mapping[str, str]
    sampled: Mapping[str, tuple[str, float]]

    def variants(self) -> list[tuple[str, str]]:
        """What is trained, as names of linears and of the way they are sampled; the plain model first."""
        return [("none", "plain"), *((linears, sampled) for linears in self.linears for sampled in self.sampled)]

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"steps": self.steps, "steps_per_point": self.steps_per_point}


@dataclass(frozen=True, kw_only=True)
class GradNormsCase(DemoCase):
    """What remembered gradient norms do to the variance, when training on the same batches again and again.

    Attributes:
        batches: of an epoch.
        target: regular expression for the linears that are sampled.
        trainings: a name, the demo's steps on other batches first, and the learning rate of the epochs.
    """

    kind: ClassVar[str] = "grad_norms"

    batches: int = 12
    epochs: int = 4
    keep_ratio: float = 0.3
    target: str = ALL_LINEARS
    trainings: Mapping[str, tuple[int, float]]

    def describe(self) -> dict[str, Any]:
        described = super().describe() | {name: getattr(self, name) for name in ("batches", "epochs", "keep_ratio")}
        trainings = {name: {"steps_before": steps, "lr": lr} for name, (steps, lr) in self.trainings.items()}
        return described | {"trainings": trainings}


QUALITY_CASES: tuple[Case, ...] = (
    QualityCase(
        name="wta_crs_quality",
        method="wta_crs",
        title="losses in nats per byte",
        linears={"down_proj": r".*\.down_proj", "all linears of the blocks": ALL_LINEARS},
        sampled={"pps 0.3": ("pps", 0.3), "wta_crs 0.3": ("wta_crs", 0.3), "pps 0.1": ("pps", 0.1)},
        expected_s=3000.0,
        tiny={"size": "tiny", "steps": 6, "seeds": 1},
    ),
    GradNormsCase(
        name="wta_crs_grad_norms",
        method="wta_crs",
        title="variance of dW over |dW|² by |x| alone, and times that with other weights: mean over the kinds of "
        "linears (lowest to highest), pps 0.3 on all linears of the blocks",
        trainings={"from random weights": (0, 1e-3), "from trained weights": (80, 1e-4)},
        expected_s=600.0,
        tiny={"size": "tiny", "batches": 2, "epochs": 2},
    ),
    RECALL_CASE,
    CONTINUED_CASE,
)
