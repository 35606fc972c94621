"""The classes of a linear layer before a cross entropy: all here, or divided over the processes of a group.

C tokens; V classes of all processes, V_r of them here, in the order of the ranks; R processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Statistics(NamedTuple):
    """Of the logits z (C, V) of each token, each (C,): see `ops.logit_statistics`. logsumexp is peak + log_sum."""

    peak: Tensor
    log_sum: Tensor
    at_target: Tensor
    total: Tensor

    @property
    def lse(self) -> Tensor:
        return self.peak + self.log_sum


@dataclass(frozen=True)
class Vocabulary:
    """Which classes are where.

    Attributes:
        num_classes: V.
        first: the first class that is here.
        widest: the largest V_r.
        group: the process group; None for one process alone, which has all classes.
    """

    num_classes: int
    first: int
    widest: int
    group: Any = None

    @classmethod
    def of(cls, weight: Tensor, group: Any) -> Vocabulary:
        """Of the weight (V_r, D) of each process; one collective, with which every process learns every V_r."""
        here = weight.shape[0]
        if group is None:
            return cls(here, 0, here)
        sizes = torch.empty(dist.get_world_size(group), dtype=torch.int64, device=weight.device)  # (R,)
        dist.all_gather_into_tensor(sizes, sizes.new_tensor([here]), group=group)
        counts: list[int] = sizes.tolist()
        return cls(sum(counts), sum(counts[: dist.get_rank(group)]), max(counts), group)

    def over_all(self, found: Statistics) -> Statistics:
        """The statistics of all classes from those of the classes here; one collective, the same bits everywhere."""
        if self.group is None:
            return found
        mine = torch.stack(found)  # (4, C)
        every = mine.new_empty(dist.get_world_size(self.group), *mine.shape)  # (R, 4, C)
        dist.all_gather_into_tensor(every.flatten(0, 1), mine, group=self.group)
        peaks, log_sums, at_target, total = every.unbind(1)  # (R, C)
        peak = peaks.amax(0)  # 0 from a process without a finite logit: any common peak will do
        return Statistics(peak, (log_sums + peaks - peak).logsumexp(0), at_target.sum(0), total.sum(0))

    def add_up_(self, gradient: Tensor) -> None:
        """Sums a gradient over the processes, in place; one collective."""
        if self.group is not None:
            dist.all_reduce(gradient, group=self.group)
