"""A module that is replaced is also replaced where its parent keeps it in a plain list and calls it from there."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import memsave


class Listed(nn.Module):
    """As some heads of transformers do: children by number, and a list that the forward goes through."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(8, 8), nn.Linear(8, 8)]
        for number, layer in enumerate(self.layers):
            self.add_module(str(number), layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_what_is_called_is_what_was_converted() -> None:
    model = nn.Sequential(Listed())
    x = torch.randn(3, 8)
    plain = model(x)
    memsave.convert_model(model, memsave.FlashSVDConfig(rank=2, target_modules=r".*"))
    assert not torch.allclose(model(x), plain)
    assert model[0].layers == list(model[0].children())
    memsave.restore_model(model, allow_lossy=True)
    assert model[0].layers == list(model[0].children())
    assert all(type(layer) is nn.Linear for layer in model[0].layers)
