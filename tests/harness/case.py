"""What the harness must know of an op, and one row of the case table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class OpSpec:
    """What an op must compute.

    Attributes:
        name: of the op, also of its public function in `memsave.ops`.
        oracle: the right result, one tensor or a tuple: an exact output in its final dtype, one that rounds in float64.
            None for an op that draws from torch's generator, where only equal draws under equal seeds are checked.
        plain: the op as one would write it in plain PyTorch in the dtype of its inputs; its error against the oracle
            sets the budget. Needed where an output rounds.
        exact: whether each output must have the oracle's bits (NaN equal to NaN) or may round; one value for all.
        takes_empty: False for an op that refuses a first tensor without elements.
        writes: positions of the arguments that the op writes to, as its schema declares. What they hold afterwards
            counts as outputs behind those that it returns, here and in `oracle` and `plain`.
        fixed: sizes of dimensions that are always the same, such as 16 entries of a table; they need not be odd.
        slack: an error of so many units of rounding of 1 plus the largest result is always allowed: for random rows,
            where plain PyTorch may be exact by chance. The rows of the tables allow none.
    """

    name: str
    oracle: Callable[..., Any] | None
    plain: Callable[..., Any] | None = None
    exact: bool | tuple[bool, ...] = True
    takes_empty: bool = True
    writes: tuple[int, ...] = ()
    fixed: tuple[int, ...] = ()
    slack: float = 0.0

    def is_exact(self, output: int) -> bool:
        return self.exact if isinstance(self.exact, bool) else self.exact[output]


@dataclass(frozen=True)
class OpCase:
    """One call of one op.

    Attributes:
        spec: the op.
        name: what is special about this row.
        make: builds the positional arguments on the CPU, the same ones at each call.
        large: too big for checks that run an op many times.
    """

    spec: OpSpec
    name: str
    make: Callable[[], tuple[Any, ...]]
    large: bool = False

    @property
    def op(self) -> str:
        return self.spec.name

    @property
    def id(self) -> str:
        return f"{self.op}-{self.name}"


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    if outputs is None:
        return ()
    return outputs if isinstance(outputs, tuple) else (outputs,)
