"""Rows of `pack_bits`; numpy's packbits is right."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tests.harness import OpCase, OpSpec

from .inputs import mask, strided


def oracle(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little"))


SPEC = OpSpec("pack_bits", oracle)
_SHAPES = {"odd": (37, 19), "whole_bytes": (20, 64), "narrow": (9, 3), "one_feature": (5, 1), "no_rows": (0, 5)}

CASES = [
    *(OpCase(SPEC, name, lambda shape=shape: (mask(*shape),)) for name, shape in _SHAPES.items()),
    OpCase(SPEC, "no_features", lambda: (mask(4, 0),)),
    OpCase(SPEC, "each_byte", lambda: (torch.arange(256)[:, None] >> torch.arange(8) & 1 == 1,)),
    OpCase(SPEC, "all_set", lambda: (torch.ones(3, 21, dtype=torch.bool),)),
    OpCase(SPEC, "transposed", lambda: (mask(24, 41).t(),)),
    OpCase(SPEC, "strided", lambda: (strided(mask(9, 33)),)),
    OpCase(SPEC, "expanded", lambda: (mask(1, 21).expand(6, 21),)),
    OpCase(SPEC, "many", lambda: (mask(700, 515),), large=True),
]
