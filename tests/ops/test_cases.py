"""Every row of the case table: plain PyTorch and the C++ kernels through the harness, and torch's own checks of ops."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from memsave import ops
from memsave.ops import _native
from tests.cases.ops import CASES, SPECS, cases_of, one_dtype
from tests.harness import OpCase, as_tuple, assert_same, check, has_kernel, implementation
from tests.harness.coverage import missing_rows
from tests.ops.threads import threads

SMALL = [case for case in CASES if not case.large]
NATIVE = [case for case in CASES if has_kernel(case.op, "native")]
# opcheck compares outputs, and takes NaN to differ from NaN. It looks at how an op is declared, for which one dtype is
# enough: what depends on dtypes is checked by the other tests here, on every row.
COMPARABLE = one_dtype(case for case in SMALL if not case.name.startswith("not_finite_"))
BACKENDS = ["reference"] + ["native"] * (_native.library() is not None)

needs_native = pytest.mark.skipif(_native.library() is None, reason=f"no C++ kernels: {_native.state()}")


def ids(cases: list[OpCase]) -> list[str]:
    return [case.id for case in cases]


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_reference(case: OpCase) -> None:
    check(case, implementation(case.op, "reference"))


@needs_native
@pytest.mark.parametrize("case", NATIVE, ids=ids(NATIVE))
def test_native(case: OpCase) -> None:
    check(case, implementation(case.op, "native"))


@needs_native
@pytest.mark.parametrize("case", [case for case in NATIVE if case.large], ids=lambda case: case.id)
def test_native_on_several_threads(case: OpCase) -> None:
    with threads(3):
        check(case, implementation(case.op, "native"), deterministic=(False,))


@pytest.mark.parametrize("case", COMPARABLE, ids=ids(COMPARABLE))
def test_opcheck(case: OpCase) -> None:
    overload = getattr(torch.ops.memsave, case.op).default
    # Two draws of a seed differ, so comparing compiled with eager outputs makes no sense there.
    utilities = ["test_autograd_registration", "test_faketensor"]
    if SPECS[case.op].oracle is not None:
        utilities.append("test_aot_dispatch_dynamic")
    if not any(isinstance(a, torch.Tensor) and a.isnan().any() for a in case.make()):
        utilities.append("test_schema")  # it compares the inputs before and after
    torch.library.opcheck(overload, case.make(), test_utils=utilities)


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_fake_and_meta_tensors_have_the_shapes_and_dtypes_of_real_ones(case: OpCase) -> None:
    op, args = getattr(ops, case.op), case.make()
    real = op(*case.make())
    mode = FakeTensorMode()
    fake_args = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
    with mode:
        fake = op(*fake_args)
    meta = op(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))
    for shadow in (fake, meta):
        for s, r in zip(as_tuple(shadow), as_tuple(real), strict=True):
            assert (s.shape, s.dtype, s.stride()) == (r.shape, r.dtype, r.stride())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", sorted(ops.backends()))
def test_settings_of_the_surrounding_code_change_nothing(op: str, backend: str) -> None:
    """Autocast, a default device and a default dtype must not reach into an op."""
    case = cases_of(op, large=False)[0]
    args, same_args = case.make(), case.make()
    written = SPECS[op].writes
    torch.manual_seed(0)
    expected = as_tuple(implementation(op, backend)(*same_args)) + tuple(same_args[i] for i in written)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        with ops.use_backend(backend), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
            found = as_tuple(getattr(ops, op)(*args)) + tuple(args[i] for i in written)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(found, expected)


def test_every_op_is_in_the_table() -> None:
    assert set(SPECS) == set(ops.backends())
    assert len(set(ids(CASES))) == len(CASES)


@pytest.mark.parametrize("op", sorted(ops.backends()))
def test_the_rows_of_an_op_cover_shapes_strides_and_dtypes(op: str) -> None:
    assert missing_rows(SPECS[op], getattr(ops, op), cases_of(op)) == []


def test_only_what_draws_from_torch_has_no_oracle() -> None:
    for op, spec in SPECS.items():
        seeded = torch.Tag.nondeterministic_seeded in getattr(torch.ops.memsave, op).default.tags
        assert (spec.oracle is None) == seeded, op
