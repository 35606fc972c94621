"""What the activation kernels do with numbers that are not finite, or close to it; the rest is in the case table."""

from __future__ import annotations

import pytest
import torch

from memsave import ops
from memsave.ops.activation import Activation
from tests.harness import implementation

INFINITY = float("inf")
SPECIAL = torch.tensor(
    [[float("nan"), INFINITY, -INFINITY, 1e20, -1e20, 3e38, -3e38, 0.0, -0.0, 1e-40, -1e-40, -100.0]]
)

kinds = pytest.mark.parametrize("kind", Activation, ids=lambda kind: kind.name)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
needs_native = pytest.mark.skipif(
    ops.backends()["activation"]["cpu"]["active"] != "native", reason="the C++ library was not built"
)


def both(op: str, *args: object) -> list[tuple[torch.Tensor, ...]]:
    """What C++ and plain PyTorch return."""
    results = [implementation(op, backend)(*args) for backend in ("native", "reference")]
    return [r if isinstance(r, tuple) else (r,) for r in results]


@needs_native
@kinds
@dtypes
def test_special_numbers_give_what_torch_gives(kind: Activation, dtype: torch.dtype) -> None:
    x = SPECIAL.to(dtype)
    if kind == Activation.GELU:
        x = x[x.isnan() | (x < 1e38)].view(1, -1)  # torch makes NaN of infinity and infinity of 3e38 here
    # Where a ReLU is flat, not even an infinity passes; elsewhere it meets slopes that round to 0 or not.
    flat = kind in (Activation.RELU, Activation.RELU_SQUARED)
    upstream = torch.full_like(x, INFINITY if flat else 1.0)
    calls = {
        "activation": (x, kind),
        "activation_backward": (upstream, x, kind),
        "gated_activation": (x, torch.ones_like(x), kind),
        "gated_activation_backward": (upstream, x, torch.ones_like(x), kind),
    }
    for op, args in calls.items():
        for ours, expected in zip(*both(op, *args), strict=True):
            torch.testing.assert_close(ours, expected, equal_nan=True, rtol=0.01, atol=1e-30)


@needs_native
@pytest.mark.parametrize("kind", [Activation.SILU, Activation.GELU, Activation.RELU], ids=lambda kind: kind.name)
@dtypes
def test_forward_has_the_bits_of_torch(kind: Activation, dtype: torch.dtype) -> None:
    x = 4 * torch.randn(7, 1030, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = {
        Activation.SILU: torch.nn.functional.silu,
        Activation.GELU: torch.nn.functional.gelu,
        Activation.RELU: torch.relu,
    }[kind](x)
    assert torch.equal(ops.activation(x, kind), expected)


@pytest.mark.parametrize(
    "name, args, message",
    [
        ("activation", (torch.ones(2, 3), 9), "kind must be one of SILU"),
        ("activation", (torch.ones(3), 0), "x must be a 2-D"),
        ("activation", (torch.ones(2, 3).long(), 0), "x must be a 2-D"),
        ("activation_backward", (torch.ones(2, 4), torch.ones(2, 3), 0), "dy must have the shape and dtype of x"),
        ("gated_activation", (torch.ones(2, 3), torch.ones(2, 3).double(), 0), "up must have the shape and dtype"),
        ("gated_activation", (torch.ones(2, 3), torch.ones(2, 3, device="meta"), 0), "on one device"),
        ("gated_activation_backward", (torch.ones(1, 3), torch.ones(2, 3), torch.ones(2, 3), 0), "dh must have"),
    ],
)
def test_bad_arguments_are_named(name: str, args: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(ops, name)(*args)
