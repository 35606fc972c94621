"""Every row of the case table: the C++ kernel against plain PyTorch, both against float64, and torch's own checks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from memsave import ops
from memsave.ops import _native
from tests.cases.ops import CASES, OpCase, assert_same, assert_within_budget, cases_of

DETERMINISTIC = [case for case in CASES if case.op != "new_seed"]
ROUNDING = cases_of("gather_rows", "sampled_matmul")
SMALL = [case for case in CASES if not case.large]
# opcheck compares outputs, and takes NaN to differ from NaN.
COMPARABLE = [case for case in SMALL if not case.name.startswith("not_finite_")]

needs_native = pytest.mark.skipif(_native.library() is None, reason=f"no C++ kernels: {_native.state()}")


def ids(cases: list[OpCase]) -> list[str]:
    return [case.id for case in cases]


def call(case: OpCase, backend: str) -> Any:
    with ops.use_backend(backend):
        return getattr(ops, case.op)(*case.make())


@pytest.fixture
def nan_in_new_memory() -> Iterator[None]:
    """Every tensor that is allocated without values holds NaN, or the largest integer."""
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]  # torch's default
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(was)


@needs_native
@pytest.mark.parametrize("case", DETERMINISTIC, ids=ids(DETERMINISTIC))
def test_native_gives_what_the_reference_gives(case: OpCase, nan_in_new_memory: None) -> None:
    native, reference = call(case, "native"), call(case, "reference")
    if case.exact:
        assert_same(native, reference)
    else:
        assert_within_budget(native, case.op, case.make())


@needs_native
@pytest.mark.parametrize("case", [c for c in DETERMINISTIC if c.large], ids=lambda case: case.id)
def test_native_gives_the_same_on_several_threads(case: OpCase) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = call(case, "native")
        torch.set_num_threads(3)
        three = call(case, "native")
    finally:
        torch.set_num_threads(before)
    if case.exact:
        assert_same(three, one)
    else:
        assert_within_budget(three, case.op, case.make())


@pytest.mark.parametrize("case", ROUNDING, ids=ids(ROUNDING))
def test_reference_stays_within_the_error_budget(case: OpCase, nan_in_new_memory: None) -> None:
    args = case.make()
    if case.name.startswith(("not_finite", "extremes")):
        x, _, scale = args  # all rows are kept, in order
        exact = x.double() * scale.double()[:, None]
        assert_same(call(case, "reference"), exact.to(torch.promote_types(x.dtype, torch.float32)).to(x.dtype))
    else:
        assert_within_budget(call(case, "reference"), case.op, args)


@pytest.mark.parametrize("case", COMPARABLE, ids=ids(COMPARABLE))
def test_opcheck(case: OpCase) -> None:
    overload = getattr(torch.ops.memsave, case.op).default
    # Two draws of a seed differ, so comparing compiled with eager outputs makes no sense there.
    utilities = ["test_autograd_registration", "test_faketensor"]
    if case.op != "new_seed":
        utilities.append("test_aot_dispatch_dynamic")
    if not any(isinstance(a, torch.Tensor) and a.isnan().any() for a in case.make()):
        utilities.append("test_schema")  # it compares the inputs before and after
    torch.library.opcheck(overload, case.make(), test_utils=utilities)


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_fake_and_meta_tensors_have_the_shapes_and_dtypes_of_real_ones(case: OpCase) -> None:
    op, args = getattr(ops, case.op), case.make()
    real = op(*args)
    mode = FakeTensorMode()
    fake_args = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
    with mode:
        fake = op(*fake_args)
    meta = op(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))
    for shadow in (fake, meta):
        for s, r in zip(tuple_of(shadow), tuple_of(real), strict=True):
            assert (s.shape, s.dtype, s.stride()) == (r.shape, r.dtype, r.stride())


def tuple_of(outputs: Any) -> tuple[torch.Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


@pytest.mark.parametrize("case", SMALL, ids=ids(SMALL))
def test_inputs_keep_their_values_and_outputs_own_their_memory(case: OpCase) -> None:
    args = case.make()
    outputs = tuple_of(getattr(ops, case.op)(*args))
    inputs = [a for a in args if isinstance(a, torch.Tensor)]
    for given, expected in zip(args, case.make(), strict=True):
        if isinstance(given, torch.Tensor):
            assert_same(given, expected)
    for output in outputs:
        assert output.is_contiguous()
        assert all(output.untyped_storage()._cdata != given.untyped_storage()._cdata for given in inputs)


@pytest.mark.parametrize("backend", ["reference"] + ["native"] * (_native.library() is not None))
@pytest.mark.parametrize("op", sorted(ops.backends()))
def test_settings_of_the_surrounding_code_change_nothing(op: str, backend: str) -> None:
    """Autocast, a default device and a default dtype must not reach into an op."""
    case = cases_of(op, large=False)[0]
    args = case.make()
    torch.manual_seed(0)
    with ops.use_backend(backend):
        expected = getattr(ops, op)(*args)
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float64)
        try:
            with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
                found = getattr(ops, op)(*args)
        finally:
            torch.set_default_dtype(torch.float32)
    assert_same(found, expected)


def test_the_table_covers_every_op() -> None:
    assert {case.op for case in CASES} == set(ops.backends())
    assert len({case.id for case in CASES}) == len(CASES)
