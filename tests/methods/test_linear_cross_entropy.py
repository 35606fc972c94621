"""Lazy logits in models of transformers: losses and gradients through Trainer, PEFT, checkpoints and generation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memsave
from memsave import LinearCrossEntropyConfig
from memsave.nn.lazy_logits import LazyLogits

hf = pytest.importorskip("transformers", reason="needs transformers (pip install 'memsave[hf]')")

CLASSES, BATCH, TOKENS = 200, 4, 24
SIZES = {"vocab_size": CLASSES, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
IDS = {"pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0}
LLAMA = {**SIZES, **IDS, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
BERT = {**SIZES, "num_attention_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
HEAD = LinearCrossEntropyConfig(min_logits_bytes=0)

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("LlamaConfig", LLAMA),
    "Gemma2ForCausalLM": ("Gemma2Config", {**LLAMA, "head_dim": 8, "final_logit_softcapping": 2.0}),
    "GPT2LMHeadModel": ("GPT2Config", {**IDS, "vocab_size": CLASSES, "n_embd": 16, "n_layer": 2, "n_head": 2}),
    "BertForMaskedLM": ("BertConfig", BERT),
    "RobertaForMaskedLM": ("RobertaConfig", BERT),
    "Qwen3ForCausalLM": ("Qwen3Config", {**LLAMA, "head_dim": 8}),
    "OPTForCausalLM": (
        "OPTConfig",
        {**SIZES, **IDS, "ffn_dim": 32, "num_attention_heads": 2, "word_embed_proj_dim": 16, "pad_token_id": 1}
        | {"dropout": 0.0},
    ),
    "Phi3ForCausalLM": ("Phi3Config", LLAMA),
    "T5ForConditionalGeneration": (
        "T5Config",
        {"vocab_size": CLASSES, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        | {"decoder_start_token_id": 0, "dropout_rate": 0.0},
    ),
    "CohereForCausalLM": ("CohereConfig", {**LLAMA, "logit_scale": 0.3}),
    "GraniteForCausalLM": ("GraniteConfig", {**LLAMA, "logits_scaling": 3.0}),
}
architectures = pytest.mark.parametrize("name", MODELS)


@cache
def _made(name: str) -> Any:
    config, settings = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(hf, name)(getattr(hf, config)(**settings, tie_word_embeddings=name in TIED))
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


TIED = {"Gemma2ForCausalLM", "GPT2LMHeadModel", "BertForMaskedLM", "OPTForCausalLM"}


def plain(name: str = "LlamaForCausalLM") -> Any:
    return copy.deepcopy(_made(name)).train()


def lazy(name: str = "LlamaForCausalLM", config: LinearCrossEntropyConfig = HEAD) -> Any:
    model = plain(name)
    memsave.convert_model(model, config)
    return model


def batch(seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens, target = (torch.randint(2, CLASSES, (BATCH, TOKENS), generator=generator) for _ in range(2))
    target[:, ::5] = -100
    return {"input_ids": tokens, "labels": target}


def is_lazy(logits: Tensor) -> bool:
    return type(logits) is LazyLogits and logits._lazy.whole.tensor is None


def trained(model: Any, **kwargs: Any) -> dict[str, Tensor]:
    """The loss and all gradients of one step."""
    model.zero_grad()
    loss = model(**batch(), **kwargs).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_close(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert list(ours) == list(expected)
    largest = max(float(t.norm()) for n, t in expected.items() if n != "loss")
    for name, right in expected.items():
        error = float((ours[name] - right).norm())
        # A bias before softmax has no gradient but rounding, so its size is not a measure.
        assert error <= tolerance * max(float(right.norm()), 1e-2 * largest), (name, error)


@architectures
def test_loss_and_every_gradient(name: str) -> None:
    model = lazy(name)
    assert is_lazy(model(**batch()).logits)
    assert_close(trained(model), trained(plain(name)))


@architectures
def test_bare_conversion_finds_the_head_and_nothing_else(name: str) -> None:
    model = plain(name)
    report = memsave.convert_model(model)
    (row,) = (row for row in report.rows if row.method == "linear_cross_entropy")
    assert [model.get_submodule(n) for n in row.names] == [model.get_output_embeddings()]
    memsave.restore_model(model)
    assert type(model.get_output_embeddings()) is nn.Linear


@architectures
def test_bf16_is_at_most_twice_as_far_from_float64(name: str) -> None:
    exact = trained(plain(name).bfloat16().double())
    ours, expected = trained(lazy(name).bfloat16()), trained(plain(name).bfloat16())
    assert list(ours) == list(expected) and ours["loss"].dtype == expected["loss"].dtype
    of_ours, of_plain = (
        sum(float((t[n].double() - exact[n]).square().sum()) for n in exact if n != "loss") for t in (ours, expected)
    )
    assert of_ours <= 4 * of_plain


@architectures
def test_logits_are_those_of_the_plain_model(name: str) -> None:
    ours, expected = lazy(name)(**batch()).logits, plain(name)(**batch()).logits
    assert torch.equal(ours, expected) and ours.dtype == expected.dtype and type(ours) is Tensor


@pytest.mark.parametrize("kept", [0, 7])
def test_logits_to_keep(kept: int) -> None:
    inputs = {"input_ids": batch()["input_ids"], "logits_to_keep": kept}
    ours, expected = lazy()(**inputs).logits, plain()(**inputs).logits
    assert ours.shape == expected.shape and is_lazy(ours) and torch.equal(ours, expected)


def test_num_items_in_batch() -> None:
    for items in (37, torch.tensor(37)):
        assert_close(trained(lazy(), num_items_in_batch=items), trained(plain(), num_items_in_batch=items))


def test_autocast() -> None:
    def run(model: Any) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch()).loss
        loss.backward()
        return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters()}

    assert_close(run(lazy()), run(plain()), tolerance=0.03)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    def run(model: Any) -> dict[str, Tensor]:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        return trained(model)

    assert_close(run(lazy()), run(plain()))


def test_gradient_accumulation() -> None:
    def run(model: Any) -> dict[str, Tensor]:
        losses = [model(**batch(seed)).loss / 3 for seed in range(3)]
        for loss in losses:
            loss.backward()
        return {"loss": sum(losses).detach()} | {n: p.grad for n, p in model.named_parameters()}  # type: ignore[union-attr]

    assert_close(run(lazy()), run(plain()))


def test_with_the_other_exact_methods() -> None:
    model = plain()
    memsave.convert_model(model)
    memsave.restore_model(model, methods=["linear_cross_entropy"])
    memsave.convert_model(model, HEAD)
    assert is_lazy(model(**batch()).logits)
    assert_close(trained(model), trained(plain()))


def test_sampled_heads_have_plain_logits() -> None:
    model = lazy()
    memsave.convert_model(model, memsave.WTACRSConfig(target_modules=["lm_head"], min_rows=1))
    assert type(model(**batch()).logits) is Tensor


def test_generation_is_the_same_and_never_lazy() -> None:
    ours, expected = lazy().eval(), plain().eval()
    seen: list[type] = []
    ours.lm_head.register_forward_hook(lambda module, args, out: seen.append(type(out)))
    for settings in ({"do_sample": False}, {"num_beams": 2}):
        tokens = [
            m.generate(batch()["input_ids"][:, :5], max_new_tokens=6, pad_token_id=0, **settings)
            for m in (ours, expected)
        ]
        assert torch.equal(*tokens)
    assert set(seen) == {Tensor}


def test_hooks_that_read_the_logits() -> None:
    seen: list[Tensor] = []
    model = lazy()
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.softmax(-1)))
    model.register_forward_hook(lambda module, args, out: seen.append(out.logits.argmax(-1)))
    assert_close(trained(model), trained(plain()))
    assert len(seen) == 2


def test_logits_may_be_read_after_backward_but_not_after_the_step() -> None:
    model = lazy()
    optimizer = torch.optim.AdamW(model.parameters())
    first, second = model(**batch()), model(**batch())
    first.loss.backward()
    assert torch.equal(first.logits, plain()(**batch()).logits)
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"before optimizer\.step\(\)"):
        second.logits.argmax(-1)


def test_outputs_can_be_copied_with_values() -> None:
    ours, expected = lazy()(**batch()), plain()(**batch())
    assert torch.equal(ours.logits.detach().clone(), expected.logits) and list(ours) == list(expected)
    assert torch.equal(ours.to_tuple()[1], expected.to_tuple()[1])


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Sixteen examples."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: tensor[index % BATCH] for name, tensor in batch(index // BATCH).items()}


def loss_of_outputs(outputs: Any, target: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A `compute_loss_func` as users write them."""
    logits = outputs["logits"][..., :-1, :].contiguous()
    return F.cross_entropy(logits.view(-1, CLASSES), target[..., 1:].contiguous().view(-1), reduction="sum") / 99


def run_trainer(model: Any, folder: Path, settings: dict[str, Any], loss: Callable[..., Tensor] | None) -> Any:
    pytest.importorskip("accelerate", reason="needs accelerate (pip install 'memsave[hf]')")
    arguments = hf.TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=8,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    trainer = hf.Trainer(
        model=model,
        args=arguments,
        train_dataset=Rows(),
        eval_dataset=Rows(),
        compute_loss_func=loss,
        compute_metrics=lambda p: {"mean": float(p.predictions.mean()), "count": p.predictions.size},
    )
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], trainer.evaluate()


@pytest.mark.parametrize(
    ("settings", "loss"),
    [
        ({}, None),
        ({"bf16": True}, None),
        ({"gradient_accumulation_steps": 2}, None),
        ({"gradient_checkpointing": True}, None),
        ({"label_smoothing_factor": 0.1}, None),
        ({}, loss_of_outputs),
        ({"bf16": True}, loss_of_outputs),
    ],
    ids=["fp32", "bf16", "accumulation", "checkpointing", "label_smoother", "loss_func", "bf16_loss_func"],
)
def test_trainer(tmp_path: Path, settings: dict[str, Any], loss: Callable[..., Tensor] | None) -> None:
    """The same losses in every step, and the same metrics of the logits in evaluation."""
    made: list[bool] = []
    model = lazy()
    model.lm_head.register_forward_hook(lambda module, args, out: made.append(type(out) is LazyLogits))
    ours, evaluated = run_trainer(model, tmp_path, settings, loss)
    expected, of_plain = run_trainer(plain(), tmp_path, settings, loss)
    tolerance = 2e-2 if "bf16" in settings else 1e-4
    assert any(made) and len(ours) == 4
    assert ours == pytest.approx(expected, rel=tolerance)
    for name in ("eval_loss", "eval_mean", "eval_count"):
        assert evaluated[name] == pytest.approx(of_plain[name], rel=max(tolerance, 1e-3), abs=1e-3)


@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_lora(saved: list[str] | None) -> None:
    """With a frozen head no gradient of it is made; PEFT's trained copy of the head is lazy too."""
    peft = pytest.importorskip("peft", reason="needs peft (pip install 'memsave[hf]')")

    def adapted() -> Any:
        torch.manual_seed(0)
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=saved, init_lora_weights=False)
        return peft.get_peft_model(plain(), config)

    model = adapted()
    report = memsave.convert_model(model, HEAD)
    assert report.count == 1
    assert is_lazy(model(**batch()).logits)
    ours, expected = trained(model), trained(adapted())
    assert_close(ours, expected)
    assert any("lm_head" in name for name in ours) == bool(saved)


def test_an_adapter_on_the_head_itself() -> None:
    peft = pytest.importorskip("peft", reason="needs peft (pip install 'memsave[hf]')")

    def adapted() -> Any:
        torch.manual_seed(0)
        return peft.get_peft_model(plain(), peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False))

    model = adapted()
    assert "linear_cross_entropy" not in {row.method for row in memsave.convert_model(model).rows}
    assert_close(trained(model), trained(adapted()))


def test_peak_bytes_where_the_vocabulary_dominates() -> None:
    """A quarter of the plain peak at most, less than half of one set of logits; predicted to the byte."""
    classes, tokens = 8192, torch.randint(0, 8192, (16, 512), generator=torch.Generator().manual_seed(0))
    settings = {**LLAMA, "vocab_size": classes, "num_hidden_layers": 1, "max_position_embeddings": 512}
    inputs = {"input_ids": tokens, "labels": tokens}
    profiles = []
    for convert in (False, True):
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**settings))
        if convert:
            memsave.convert_model(model, LinearCrossEntropyConfig())

        def step(model: Any = model) -> None:
            model(**inputs).loss.backward()

        step()
        model.zero_grad()
        profiles.append(memsave.measure(step))
        model.zero_grad()
        assert memsave.estimate(model, inputs).peak_bytes == profiles[-1].peak_bytes
    logits_bytes = tokens.numel() * classes * 4
    plain_bytes, lazy_bytes = (profile.peak_bytes - profile.baseline_bytes for profile in profiles)
    assert plain_bytes > 2.5 * logits_bytes
    assert lazy_bytes < min(plain_bytes / 4, logits_bytes / 2)
    assert profiles[1].saved_bytes < profiles[0].saved_bytes - 0.9 * logits_bytes


def test_estimate_of_the_logits_themselves() -> None:
    """What reads the values is predicted, too."""
    model, inputs = lazy(), {"input_ids": batch()["input_ids"]}

    def step() -> None:
        model(**inputs).logits.sum().backward()

    step()
    model.zero_grad()
    assert memsave.estimate(model, inputs).peak_bytes == memsave.measure(step).peak_bytes


def test_a_model_without_a_head_is_left_alone() -> None:
    model = hf.LlamaModel(hf.LlamaConfig(**LLAMA))
    with pytest.raises(memsave.NoMatchError, match="no module that linear_cross_entropy can convert"):
        memsave.convert_model(model, HEAD)
    assert "linear_cross_entropy" not in {row.method for row in memsave.convert_model(model).rows}


@pytest.mark.parametrize("value", [-1, 1.5, True, None])
def test_bytes_that_are_no_number_of_bytes(value: Any) -> None:
    with pytest.raises(ValueError, match=r"min_logits_bytes: expected a whole number of at least 0, got"):
        LinearCrossEntropyConfig(min_logits_bytes=value)
