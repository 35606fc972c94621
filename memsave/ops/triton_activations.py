"""The activation functions in Triton, as functions that other kernels call; x is a block of float32 or float64."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from .activation.kind import QUICK_GELU_SCALE, Activation

SILU = tl.constexpr(int(Activation.SILU))
GELU = tl.constexpr(int(Activation.GELU))
GELU_TANH = tl.constexpr(int(Activation.GELU_TANH))
QUICK_GELU = tl.constexpr(int(Activation.QUICK_GELU))
RELU = tl.constexpr(int(Activation.RELU))
RELU_SQUARED = tl.constexpr(int(Activation.RELU_SQUARED))
QUICK_SCALE = tl.constexpr(QUICK_GELU_SCALE)


@triton.jit
def constant(x, VALUE: tl.constexpr):
    """A number in the type of x: as it stands in a product, a float64 block would get it rounded to float32."""
    return tl.full([], VALUE, x.dtype)


@triton.jit
def two_sigmoids(x):
    """sigmoid(x) and sigmoid(-x), without cancellation or overflow."""
    e = tl.exp(tl.where(x < 0, x, -x))
    near = 1.0 / (1.0 + e)
    return tl.where(x < 0, e * near, near), tl.where(x < 0, near, e * near)


@triton.jit
def value_and_slope(x, KIND: tl.constexpr):
    """act(x) and act'(x)."""
    if KIND == SILU or KIND == QUICK_GELU:
        scale = constant(x, QUICK_SCALE if KIND == QUICK_GELU else 1.0)
        s, rest = two_sigmoids(scale * x)
        y = x * s
        slope = s * (1.0 + scale * (x * rest))
    elif KIND == GELU:
        phi = 0.5 * (1.0 + tl.erf(x * constant(x, 0.7071067811865476)))
        y = x * phi
        slope = phi + x * (tl.exp(-0.5 * x * x) * constant(x, 0.3989422804014327))
    elif KIND == GELU_TANH:
        cubic = constant(x, 0.044715)
        twice = constant(x, 1.5957691216057308)
        s, rest = two_sigmoids(twice * (x + cubic * (x * x * x)))
        y = x * s
        slope = s + y * rest * (twice * (1.0 + 3.0 * cubic * (x * x)))
    elif KIND == RELU:
        y = tl.where(x < 0, 0.0, x)
        slope = tl.where(x <= 0, 0.0, 1.0).to(x.dtype)
    elif KIND == RELU_SQUARED:
        slope = tl.where(x <= 0, 0.0, x)
        y = tl.where(x < 0, 0.0, x * x)
        slope = slope + slope
    else:  # MISH: from x = 20 on, tanh(log(1 + exp(x))) is 1
        e = tl.exp(tl.where(x > 20.0, 20.0, x))
        n = e * (e + 2.0)
        t = n / (n + 2.0)
        y = x * t
        slope = t + x * (1.0 - t * t) * (e / (1.0 + e))
    return y, slope
