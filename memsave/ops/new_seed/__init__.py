"""A seed from torch's default generator, as an op: activation checkpointing replays it, and compilers keep it."""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import register
from . import reference

_op = register(
    "new_seed(Tensor like) -> Tensor",
    fake=lambda like: like.new_empty((), dtype=torch.int64),
    reference=reference,
    needs_no_grad=False,
    tags=(torch.Tag.nondeterministic_seeded,),
)


def new_seed(like: Tensor) -> Tensor:
    """A random 0-d int64 tensor in [0, 2^63), on the device of `like`, drawn from that device's default generator.

    Keep it for backward and pass it to `draw_rows`: a draw from a private generator is not replayed by activation
    checkpointing, and one outside an op is done again in backward by `torch.compile`. There, equal calls on one tensor
    may be merged into one; they then share the seed, which leaves every estimate unbiased.

    Args:
        like: any tensor; only its device matters.
    """
    return _op(like)
