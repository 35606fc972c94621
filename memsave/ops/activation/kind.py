"""The activation functions that memsave knows: functions of one number, of which backward needs the input alone."""

from __future__ import annotations

from enum import IntEnum

QUICK_GELU_SCALE = 1.702


class Activation(IntEnum):
    """Which function act(x) is; numbers, because schemas take no enum.

    SILU is x * sigmoid(x); GELU x * Phi(x), with the normal distribution's Phi; GELU_TANH its approximation by a tanh
    (gelu_new, gelu_fast, gelu_pytorch_tanh); QUICK_GELU x * sigmoid(1.702 x); RELU max(x, 0); RELU_SQUARED its square;
    MISH x * tanh(log(1 + exp(x))).
    """

    SILU = 0
    GELU = 1
    GELU_TANH = 2
    QUICK_GELU = 3
    RELU = 4
    RELU_SQUARED = 5
    MISH = 6
