"""What a LaMDA adapter is: rank, schedule, recipe and storage."""

from __future__ import annotations

from dataclasses import dataclass, field
from sys import float_info
from typing import Any

import torch
from peft import PeftConfig

from ..registration import peft_type
from ..targets import check_names, checked_targets

RANKS = ("uniform", "energy")
SVDS = ("randomized", "exact")
DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclass
class LaMDAConfig(PeftConfig):
    """LaMDA (arXiv 2406.12832): y = x W^T + alpha * ((x A) S) B, with A and B from the SVD of W and S = 0 at the start.

    Args:
        r: rank, at most min(in, out) of every adapted layer; with ranks="energy" the mean over the layers.
        alpha: what the adapter's output is multiplied by. Not divided by r, since A and B have orthonormal vectors.
        freeze_until: share of the training steps, in [0, 1], over which B is frozen row by row, from the largest
            singular value on. At 0 only S trains.
        target_modules: names or dotted suffixes of linear layers, a regular expression that matches whole names, or
            "all-linear". There is no table of architectures: it must be given.
        exclude_modules: as target_modules: what is left out.
        modules_to_save: other modules that are trained and saved as a whole.
        layers_to_transform, layers_pattern: as in PEFT's LoraConfig.
        ranks: "uniform", or "energy" (LaMDA++): more rank where the top r singular values hold less of the weight.
        rank_pattern: name or pattern of a module -> its rank; filled by ranks="energy" and saved.
        min_rank, max_rank: limits of ranks="energy"; None means max(1, r // 4) and 2 r.
        svd: "randomized" (`torch.svd_lowrank`) or "exact" (`torch.linalg.svd`), in float32 on the CPU.
        seed, niter, oversample: of the randomized SVD.
        dtype: of A, S and B, as "float32", "bfloat16", "float16" or "float64"; None is that of the base weight.
        save_factors: whether A and all of B are written to disk, so that loading does not depend on the SVD coming out
            the same on another machine.
        init_weights: False draws S at random, for tests.
        memsave_version: filled in when the config is saved; tells a loaded config from a new one.

    Raises ValueError for a field out of range.
    """

    r: int = field(default=32, metadata={"help": "Rank."})
    alpha: float = field(default=1.0, metadata={"help": "Scale of the adapter's output."})
    freeze_until: float = field(default=0.3, metadata={"help": "Share of the steps over which B is frozen."})
    target_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "Modules to adapt."})
    exclude_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "Modules to leave out."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train and save as a whole."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Indices of layers to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    ranks: str = field(default="uniform", metadata={"help": "'uniform' or 'energy'."})
    rank_pattern: dict[str, int] | None = field(default_factory=dict, metadata={"help": "Module -> rank."})
    min_rank: int | None = field(default=None, metadata={"help": "Least rank of ranks='energy'."})
    max_rank: int | None = field(default=None, metadata={"help": "Largest rank of ranks='energy'."})
    svd: str = field(default="randomized", metadata={"help": "'randomized' or 'exact'."})
    seed: int = field(default=0, metadata={"help": "Seed of the randomized SVD."})
    niter: int = field(default=4, metadata={"help": "Subspace iterations of the randomized SVD."})
    oversample: int = field(default=8, metadata={"help": "Further dimensions of the randomized SVD."})
    dtype: str | None = field(default=None, metadata={"help": "Dtype of the adapter; None: the base weight's."})
    save_factors: bool = field(default=False, metadata={"help": "Whether A and all of B are saved."})
    init_weights: bool = field(default=True, metadata={"help": "False: S is drawn at random (for tests)."})
    memsave_version: str | None = field(default=None, metadata={"help": "Version of memsave that saved the config."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type("MEMSAVE_LAMDA")
        for name in ("target_modules", "exclude_modules"):
            setattr(self, name, checked_targets("LaMDAConfig", name, getattr(self, name)))
        check_names("LaMDAConfig", "modules_to_save", self.modules_to_save)
        if isinstance(self.dtype, torch.dtype):
            self.dtype = str(self.dtype).removeprefix("torch.")
        if self.rank_pattern is not None and not isinstance(self.rank_pattern, dict):
            raise ValueError(f"LaMDAConfig: expected rank_pattern to map names to ranks, got {self.rank_pattern!r}")
        self.rank_pattern = dict(self.rank_pattern or {})
        self._check_numbers()
        self._check_choices()

    def _check_numbers(self) -> None:
        for name, least in (("r", 1), ("seed", 0), ("niter", 0), ("oversample", 0)):
            _check_int(name, getattr(self, name), least)
        for name in ("min_rank", "max_rank"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 1)
        low, high = self.rank_limits()
        if not low <= self.r <= high:
            raise ValueError(f"LaMDAConfig: expected min_rank <= r <= max_rank, got {low}, {self.r} and {high}")
        for key, rank in (self.rank_pattern or {}).items():
            _check_int(f"rank_pattern[{key!r}]", rank, 1)
        if not _is_number(self.alpha) or not abs(self.alpha) <= float_info.max:
            raise ValueError(f"LaMDAConfig: expected alpha to be a finite number, got {self.alpha!r}")
        if not _is_number(self.freeze_until) or not 0 <= self.freeze_until <= 1:
            raise ValueError(f"LaMDAConfig: expected freeze_until in [0, 1], got {self.freeze_until!r}")

    def _check_choices(self) -> None:
        for name, choices in (("ranks", RANKS), ("svd", SVDS), ("dtype", (None, *DTYPES))):
            if getattr(self, name) not in choices:
                expected = ", ".join(map(repr, choices))
                raise ValueError(f"LaMDAConfig: expected {name} to be one of {expected}, got {getattr(self, name)!r}")
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    given = f"target_modules={self.target_modules!r}"
                    raise ValueError(f"LaMDAConfig: {name} needs target_modules as a list of names, got {given}")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("LaMDAConfig: layers_pattern needs layers_to_transform, which is None")

    def rank_limits(self) -> tuple[int, int]:
        """(least, largest) rank that ranks="energy" may give to a layer."""
        low = max(1, self.r // 4) if self.min_rank is None else self.min_rank
        return low, 2 * self.r if self.max_rank is None else self.max_rank

    def as_method(self) -> Any:
        """The same as a method of `convert_model`."""
        from .method import LaMDAMethod

        return LaMDAMethod.of(self)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON knows them, with the version of memsave that wrote them."""
        import memsave

        return {**super().to_dict(), "memsave_version": self.memsave_version or memsave.__version__}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_int(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"LaMDAConfig: expected {name} to be an integer, at least {least}, got {value!r}")
