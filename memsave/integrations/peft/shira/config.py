"""What a SHiRA adapter is: which entries of a weight it trains, how many, and what is kept for their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from peft import PeftConfig

from ....nn.rows import KeepRows
from ..registration import peft_type
from ..targets import check_names, checked_targets

MASKS = ("random", "magnitude", "struct", "gradient", "snip", "given")
CALIBRATED = ("gradient", "snip")
APPLY = ("auto", "added")
DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclass
class SHiRAConfig(PeftConfig):
    """Sparse high rank adapters: a few entries of each weight are trained, all others stay bit for bit.

    Bhardwaj et al., NeurIPS 2024, arXiv 2406.13175. The trained values are added to the weight itself, so that a
    forward is the plain linear, and their gradients are computed one by one, never as a dense weight gradient.

    Args:
        mask: which entries. "random"; "magnitude": the largest |W|; "struct": whole rows or columns and the diagonal;
            "gradient": the largest |dL/dW| summed over `calibration`; "snip": the largest |W dL/dW|; "given": those of
            another adapter or file, set by `fuse_adapters` and `load_adapter`.
        density: fraction of a weight's entries, in (0, 1]; 0.01 unless `r` is given.
        r: the budget of a LoRA of this rank instead: r * (in_features + out_features) entries.
        seed: of random masks; each layer derives its own.
        keep_ratio: fraction of the input's rows kept for backward, in (0, 1]; below 1 the values' gradients are
            unbiased estimates (see WTA-CRS).
        dtype: of the values, as "float32" or "bfloat16"; None for the weight's own. PEFT's own cast to float32 is not
            applied.
        apply: "auto" holds the values in the weight wherever that is a plain tensor; "added" never does, and adds a
            sparse product instead (it does so by itself for FSDP2, ZeRO-3 and quantized weights).
        target_modules: names of `nn.Linear` or `Conv1D` modules, by PEFT's rule, or "all-linear".
        exclude_modules: names to leave out, by the same rule.
        modules_to_save: modules that are trained and saved as a whole.
        layers_to_transform, layers_pattern: as in PEFT: numbers of the layers to adapt, and the name of their list.
        calibration: batches for "gradient" and "snip": a list or another re-iterable of what the model is called with
            (dict, tuple or tensor). Not saved.
        calibration_loss: maps the model's output to a scalar; by default its `loss`. Not saved.
        counts: how many entries, by the layer's name, where that does not follow from `density` or `r`.
        masks: "select" chooses the entries; "stored" leaves that to the file that is loaded next. Set by saving.
        init_weights: False starts from random values, for tests only.

    Raises:
        ValueError: a field outside of what is said here.
    """

    mask: str = "random"
    density: float | None = None
    r: int | None = None
    seed: int = 0
    keep_ratio: float = 1.0
    dtype: str | None = None
    apply: str = "auto"
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    calibration: Iterable[Any] | None = field(default=None, repr=False)
    calibration_loss: Callable[[Any], torch.Tensor] | None = field(default=None, repr=False)
    counts: dict[str, int] | None = None
    masks: str = "select"
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type("MEMSAVE_SHIRA")
        for name in ("target_modules", "exclude_modules"):
            setattr(self, name, checked_targets("SHiRAConfig", name, getattr(self, name)))
        check_names("SHiRAConfig", "modules_to_save", self.modules_to_save)
        for name, known in (("mask", MASKS), ("apply", APPLY), ("masks", ("select", "stored"))):
            if getattr(self, name) not in known:
                raise ValueError(f"SHiRAConfig.{name}: expected one of {list(known)}, got {getattr(self, name)!r}")
        if self.mask == "given" and self.masks != "stored":
            raise ValueError("SHiRAConfig.mask: 'given' needs masks='stored': its entries come from a file")
        self._check_numbers()
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("SHiRAConfig.layers_pattern: expected layers_to_transform with it, got None")

    def _check_numbers(self) -> None:
        if self.density is not None and self.r is not None:
            raise ValueError(f"SHiRAConfig: expected density or r, got both: {self.density!r} and {self.r!r}")
        for name in ("density", "keep_ratio"):
            if (value := getattr(self, name)) is not None and not (_is_number(value) and 0 < value <= 1):
                raise ValueError(f"SHiRAConfig.{name}: expected a fraction in (0, 1], got {value!r}")
        if self.r is not None and not (_is_whole(self.r) and self.r >= 1):
            raise ValueError(f"SHiRAConfig.r: expected a whole number of at least 1, got {self.r!r}")
        if not _is_whole(self.seed) or not 0 <= self.seed < 2**63:
            raise ValueError(f"SHiRAConfig.seed: expected a whole number in [0, 2^63), got {self.seed!r}")
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"SHiRAConfig.dtype: expected one of {list(DTYPES)} or None, got {self.dtype!r}")
        counts = {} if self.counts is None else self.counts
        if not isinstance(counts, dict) or not all(_is_whole(count) and count >= 1 for count in counts.values()):
            raise ValueError(f"SHiRAConfig.counts: expected whole numbers of at least 1 by names, got {counts!r}")

    @property
    def keep(self) -> KeepRows | None:
        """Which rows of the input are kept; None for all."""
        return KeepRows(self.keep_ratio, 16, "pps") if self.keep_ratio < 1 else None

    def num_values(self, name: str, shape: tuple[int, int]) -> int:
        """How many entries of the weight of layer `name`, of a shape, are trained: at least one."""
        rows, columns = shape
        if self.counts and name in self.counts:
            return self.counts[name]
        if self.r is not None:
            return self.r * (rows + columns)
        return max(1, round((0.01 if self.density is None else self.density) * rows * columns))

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON data: without the calibration, and with masks that a file provides."""
        data = {f.name: getattr(self, f.name) for f in fields(self) if not f.name.startswith("calibration")}
        return data | {"masks": "stored"}

    def as_method(self) -> Any:
        """The same as a method of `convert_model`."""
        from .method import SHiRAMethod

        return SHiRAMethod.of(self)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
