"""Every op on random arguments, by every implementation of the CPU, in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import given, note
from hypothesis import strategies as st

from memsave import ops
from tests.ops import test_sanitizers as sanitizers

from .examples import FACTOR, examples
from .isolated import Isolated
from .op_arguments import MAKERS, described
from .op_changes import laid_out, with_a_mistake, with_special_numbers
from .op_runs import LIBRARY

SANITIZED = FACTOR in os.environ and sanitizers.COMPILER is not None and sanitizers.CSRC.exists()


@pytest.fixture(scope="module", params=["guards", *["sanitizer"] * SANITIZED])
def isolated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Isolated]:
    """Another process; under `make fuzz` also one whose kernels are compiled with sanitizers."""
    variables: dict[str, str] = {}
    if request.param == "sanitizer":
        library = sanitizers.build(
            sanitizers.CSRC, tmp_path_factory.mktemp("fuzz") / "sanitized.so", "-O1", "-DMS_NO_CLONES"
        )
        variables = {**sanitizers.environment("address,undefined"), LIBRARY: str(library)}
    process = Isolated(variables)
    yield process
    process.close()


def test_every_op_is_drawn() -> None:
    assert set(MAKERS) == set(ops.backends())


@pytest.mark.parametrize("op", sorted(MAKERS))
@examples(6)
@given(data=st.data())
def test_right_arguments_of_any_layout(op: str, data: st.DataObject, isolated: Isolated) -> None:
    args = laid_out(data.draw, op, MAKERS[op](data.draw))
    note(f"{op}({described(args)})")
    isolated.call("tests.fuzz.op_runs:right", op, args, True)


@pytest.mark.parametrize("op", sorted(MAKERS))
@examples(4)
@given(data=st.data())
def test_numbers_that_are_not_finite(op: str, data: st.DataObject, isolated: Isolated) -> None:
    args = laid_out(data.draw, op, with_special_numbers(data.draw, MAKERS[op](data.draw)))
    note(f"{op}({described(args)})")
    isolated.call("tests.fuzz.op_runs:right", op, args, False)


@pytest.mark.parametrize("op", sorted(MAKERS))
@examples(12)
@given(data=st.data())
def test_wrong_arguments(op: str, data: st.DataObject, isolated: Isolated) -> None:
    args = with_a_mistake(data.draw, laid_out(data.draw, op, MAKERS[op](data.draw)))
    note(f"{op}({described(args)})")
    isolated.call("tests.fuzz.op_runs:right_or_refused", op, args)
