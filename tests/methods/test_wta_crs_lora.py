"""Sampling in PEFT LoRA: only `lora_A` is sampled, its gradient is unbiased, and adapters are saved as before."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import memsave

from .linears import OUT, D, N, grads, step_data


class Attention(nn.Module):
    """A stand-in for a block with LoRA on one of its linears."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(D, D), nn.Linear(D, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(self.q_proj(x))


def lora_model() -> peft.PeftModel:
    torch.manual_seed(0)
    model = peft.get_peft_model(Attention(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    return model.train()


LORA_A = r".*lora_A.*"


def lora_grad(model: nn.Module, x: Tensor, dy: Tensor) -> Tensor:
    found = grads(model, x, dy)[1]
    (name,) = (name for name in found if "lora_A" in name)
    return found[name]


def test_lora_samples_lora_a_without_bias() -> None:
    plain, (x, dy) = lora_model(), step_data()
    model = copy.deepcopy(plain)
    report = memsave.convert_model(model, memsave.WTACRSConfig(min_rows=1, target_modules=LORA_A))
    assert "lora_A" in str(report) and sum(row.count for row in report.rows) == 1
    exact = lora_grad(plain, x, dy)
    draws = torch.stack([lora_grad(model, x, dy) for _ in range(400)])  # (R, r, D)
    assert draws.std(0).min() > 0
    assert ((draws.mean(0) - exact).abs() < 4 * draws.std(0) / len(draws) ** 0.5).all()
    assert torch.equal(model(x), plain(x))

    k = int(0.3 * N)
    freed_bytes = memsave.saved_bytes(lambda: plain(x)) - memsave.saved_bytes(lambda: model(x))
    assert freed_bytes == N * D * 4 - (8 * k + (k + 1) * D * 4)


def test_lora_trains_and_its_adapter_is_saved_as_before(tmp_path: Path) -> None:
    model, (x, dy) = lora_model(), step_data()
    memsave.convert_model(model, memsave.WTACRSConfig(min_rows=1, target_modules=LORA_A))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(50):
        loss = (model(x) - dy).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]

    model.save_pretrained(tmp_path / "converted")
    expected = model(x)
    memsave.restore_model(model)
    model.save_pretrained(tmp_path / "plain")
    saved = [load_file(tmp_path / kind / "adapter_model.safetensors") for kind in ("converted", "plain")]
    assert saved[0].keys() == saved[1].keys()
    for name in saved[0]:
        assert torch.equal(saved[0][name], saved[1][name])
    base = Attention()
    base.load_state_dict(model.unload().state_dict())
    assert torch.equal(peft.PeftModel.from_pretrained(base, tmp_path / "converted")(x), expected)
