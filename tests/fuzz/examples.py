"""How many examples a test of this folder runs, and strategies that several of them share."""

from __future__ import annotations

import math
import os
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

FACTOR = "MEMSAVE_FUZZ"
"""The variable by which `make fuzz` asks for so many times more examples."""

numbers = st.one_of(
    st.integers(-3, 300),
    st.integers(),
    st.floats(),
    st.sampled_from([0.5, 1.0, -0.0, 1e308, 5e-324, math.inf, math.nan, 2**31, 2**63, -(2**63) - 1, 10**400]),
)
atoms = st.none() | st.booleans() | numbers | st.text(max_size=8)
json_values = st.recursive(
    atoms, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)
"""What JSON can say, and the numbers that Python's parser takes besides: NaN, infinities, integers of any size."""


def examples(few: int) -> settings:
    """So many examples, the same in each run; under `make fuzz` more, and others in each run."""
    factor = int(os.environ.get(FACTOR, "0"))
    return settings(
        max_examples=few * max(1, factor),
        derandomize=not factor,
        print_blob=True,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def says(error: BaseException, *words: Any) -> bool:
    """Whether a message has one of the words."""
    return any(str(word) in str(error) for word in words)
