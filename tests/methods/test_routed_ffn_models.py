"""Routed feed-forward blocks in transformers models: they train, generate, and come back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import memsave
from memsave import RoutedFFNConfig
from memsave.nn.routed_ffn import RoutedFFN

transformers = pytest.importorskip("transformers", reason="needs transformers (pip install 'memsave[hf]')")

_SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
CONFIGS = {
    "Llama": {**_SIZES, "num_attention_heads": 2},
    "Phi3": {**_SIZES, "num_attention_heads": 2, "pad_token_id": 0, "resid_pdrop": 0.0},
    "GPT2": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.1},
}
TARGETS = {"Llama": r".*\.mlp", "Phi3": r".*\.mlp", "GPT2": r".*\.mlp"}
names = pytest.mark.parametrize("name", CONFIGS)


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**CONFIGS[name])
    cls = {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM")
    return getattr(transformers, cls)(config)


def ids(count: int = 4) -> torch.Tensor:
    return torch.randint(1, 64, (count, 16), generator=torch.Generator().manual_seed(1))


def convert(model: Any, name: str, **settings: Any) -> list[RoutedFFN]:
    config = RoutedFFNConfig(target_modules=TARGETS[name], **settings)
    memsave.convert_model(model, config, calibration=[{"input_ids": ids()}] if config.calibrated else None)
    found = [module for module in model.modules() if isinstance(module, RoutedFFN)]
    assert len(found) == 2
    return found


@names
@pytest.mark.parametrize("settings", [{}, {"clustering": "coactivation", "blocks": 8, "active": 4}, {"lora_rank": 4}])
def test_models_train_and_generate(name: str, settings: dict[str, Any]) -> None:
    model = model_of(name)
    blocks = convert(model.train(), name, **settings)
    batch = {"input_ids": ids(), "labels": ids()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.grad is not None for block in blocks for p in block.parameters() if p.requires_grad)
    assert all(float(block.load.sum()) == pytest.approx(1) for block in blocks)  # type: ignore[union-attr]
    made = model.eval().generate(ids()[:, :4], max_new_tokens=6, do_sample=False, pad_token_id=0)
    full = model(made).logits[:, 3:-1].argmax(-1)
    assert torch.equal(made[:, 4:], full), "a token is routed alike with a cache and without"


@names
def test_checkpointed_models_get_the_same_gradients(name: str) -> None:
    found = []
    for checkpointed in (False, True):
        model = model_of(name)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        torch.manual_seed(1)
        convert(model.train(), name)
        if checkpointed:
            model.gradient_checkpointing_enable()
        model(input_ids=ids(), labels=ids(), use_cache=False).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters()})
    assert all(torch.allclose(found[0][n], found[1][n], atol=1e-7) for n in found[0])


@names
def test_models_keep_less_for_backward(name: str) -> None:
    model, plain = model_of(name), model_of(name)
    convert(model, name)
    kept, before = (memsave.saved_bytes(lambda m=m: m(input_ids=ids()).logits) for m in (model, plain))
    assert kept < before


@names
def test_pretrained_files(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    plain = {n: p.clone() for n, p in model.named_parameters()}
    convert(model.eval(), name, clustering="coactivation")
    with pytest.raises(memsave.SaveError, match=r"memsave\.save"):
        model.save_pretrained(tmp_path / "plain")
    memsave.save(model, tmp_path / "routed")
    loaded: Any = memsave.load(tmp_path / "routed")
    assert torch.equal(loaded(ids()).logits, model(ids()).logits)
    memsave.restore_model(loaded, allow_lossy=True)
    assert all(torch.equal(p, plain[n]) for n, p in loaded.named_parameters())
    loaded.save_pretrained(tmp_path / "plain")


def test_the_code_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "routed_ffn.md").read_text()
    train, scale = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    batches = [{"input_ids": ids(), "labels": ids()}]
    given: dict[str, Any] = {"model": model_of("Llama"), "batches": batches, "memsave": memsave, "torch": torch}
    monkeypatch.chdir(tmp_path)
    exec(compile(train.partition("memsave.restore_model")[0], "routed_ffn.md", "exec"), given)
    exec(compile(scale, "routed_ffn.md", "exec"), given)
    block = given["model"].model.layers[0].mlp
    assert block.balance.scale == 0.25 and (tmp_path / "routed" / "memsave.json").is_file()
    memsave.restore_model(given["model"], allow_lossy=True)
    assert not any(isinstance(module, RoutedFFN) for module in given["model"].modules())
