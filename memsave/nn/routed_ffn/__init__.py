"""Feed-forward blocks whose tokens use only some of the hidden units: the module, its products, and how it is made."""

from torch import nn

from .module import RoutedFFN

__all__ = ["RoutedFFN", "set_balance_scale"]


def set_balance_scale(model: nn.Module, scale: float) -> None:
    """Multiply the gradients of all balance losses in `model` by `scale` from now on; read when backward runs.

    A module cannot know by what the loss of the training loop is multiplied, and its own loss never meets that one:
    with a gradient scaler give `scaler.get_scale()`, with n accumulated batches 1 / n, with both the product.
    """
    for module in model.modules():
        if isinstance(module, RoutedFFN):
            module.balance.scale = float(scale)
