"""Transformers models whose layers share masks: the same training in fewer bytes, and a config that does not tell."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memsave
from memsave import RecomputeNormConfig, ShareMaskConfig, UnsupportedModelError
from memsave.config import applied_configs

hf = pytest.importorskip("transformers", reason="needs transformers (pip install 'memsave[hf]')")

VOCABULARY, BATCH, TOKENS, WIDTH, HEADS = 48, 2, 24, 32, 4
NAME = "memsave_sdpa"
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
SHARE = ShareMaskConfig()


def made(model: str, config: str, settings: dict[str, Any], **changed: Any) -> Any:
    """A model in training mode with the same random weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(hf, model)(getattr(hf, config)(**{**settings, **changed})).train()


def llama(**changed: Any) -> Any:
    return made("LlamaForCausalLM", "LlamaConfig", LLAMA, **changed)


def gemma(**changed: Any) -> Any:
    return made("Gemma3ForCausalLM", "Gemma3TextConfig", {**LLAMA, "head_dim": 8, "sliding_window": 8}, **changed)


def bert(**changed: Any) -> Any:
    settings = {key: value for key, value in LLAMA.items() if "key_value" not in key} | {"pad_token_id": 0}
    return made("BertForMaskedLM", "BertConfig", settings, **changed)


def gpt2(**changed: Any) -> Any:
    settings = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 2, "n_head": HEADS}
    return made("GPT2LMHeadModel", "GPT2Config", settings, **{"bos_token_id": 0, "eos_token_id": 0, **changed})


def t5(**changed: Any) -> Any:
    settings = {"vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": HEADS}
    return made("T5ForConditionalGeneration", "T5Config", {**settings, "decoder_start_token_id": 0}, **changed)


def whisper(**changed: Any) -> Any:
    settings = {
        **{"vocab_size": VOCABULARY, "d_model": WIDTH, "num_mel_bins": 8, "max_source_positions": 24},
        **{f"{part}_layers": 2 for part in ("encoder", "decoder")},
        **{f"{part}_attention_heads": HEADS for part in ("encoder", "decoder")},
        **{f"{part}_ffn_dim": 64 for part in ("encoder", "decoder")},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
        **{"attention_dropout": 0.1},
    }
    return made("WhisperForConditionalGeneration", "WhisperConfig", settings, **changed)


def text(padding: str = "none") -> dict[str, Any]:
    """Tokens (B, T); padded on the left, on the right, packed, or with a mask (B, 1, T, T) of the caller's."""
    ids = torch.randint(1, VOCABULARY, (BATCH, TOKENS), generator=torch.Generator().manual_seed(1))
    seen = torch.ones(BATCH, TOKENS, dtype=torch.long)
    if padding == "left":
        seen[0, :5] = 0
    if padding == "right":
        seen[1, -7:] = 0
    batch: dict[str, Any] = {"input_ids": ids, "labels": ids.masked_fill(seen == 0, -100), "attention_mask": seen}
    if padding == "packed":
        del batch["attention_mask"]
        batch["use_cache"] = False  # transformers looks for packed sequences only without a cache
        batch["position_ids"] = torch.cat([torch.arange(10), torch.arange(TOKENS - 10)]).expand(BATCH, -1)
    if padding == "own":
        batch["attention_mask"] = torch.ones(BATCH, 1, TOKENS, TOKENS, dtype=torch.bool).tril()
        batch["attention_mask"][:, :, 12:, :6] = False
    return batch


def sound() -> dict[str, Tensor]:
    features = torch.randn(BATCH, 8, 48, generator=torch.Generator().manual_seed(2))
    return {"input_features": features, "labels": text()["input_ids"]}


def share(model: Any) -> Any:
    """A copy of `model` whose layers share masks."""
    model = copy.deepcopy(model)
    memsave.convert_model(model, SHARE)
    return model


def train(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor], Tensor]:
    """Loss, gradients and the next random number of one step."""
    model.zero_grad()
    torch.manual_seed(5)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None], torch.rand(1)


def assert_trains_alike(model: Any, plain: Any, batch: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    (loss, gradients, drawn), (plain_loss, expected, plain_drawn) = train(model, batch), train(plain, batch)
    assert torch.equal(drawn, plain_drawn)
    torch.testing.assert_close(loss, plain_loss, rtol=tolerance, atol=0)
    largest = max(gradient.abs().max().item() for gradient in expected)
    for mine, theirs in zip(gradients, expected, strict=True):
        assert (mine - theirs).abs().max() <= tolerance * max(theirs.abs().max().item(), 1e-2 * largest)


def kept(model: Any, batch: dict[str, Tensor]) -> int:
    return memsave.saved_bytes(lambda: model(**batch).loss)


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llama_with_dropout": lambda: llama(attention_dropout=0.1),
    "gemma3": gemma,
    "bert": bert,
    "gpt2": gpt2,
    "t5": t5,
    "t5_without_dropout": lambda: t5(dropout_rate=0.0),
}
PADDED = ["none", "left", "right", "own"]


@pytest.mark.parametrize("padding", [*PADDED, "packed"])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_training_in_fewer_bytes(name: str, padding: str) -> None:
    if padding == "packed" and name not in ("llama", "llama_with_dropout", "gemma3"):
        pytest.skip("transformers finds packed sequences by positions in decoders with rotary positions only")
    plain, batch = MODELS[name](), text(padding)
    model = share(plain)
    assert_trains_alike(model, plain, batch)
    before, after = kept(plain, batch), kept(model, batch)
    unchanged = padding == "none" and name == "llama"  # nothing to share, and grouped heads are not repeated anyway
    assert after == before if unchanged else after < before


def test_whisper_trains_alike_in_fewer_bytes() -> None:
    plain = whisper()
    model = share(plain)
    assert_trains_alike(model, plain, sound())
    assert kept(model, sound()) < 0.7 * kept(plain, sound())


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_llama_layer_keeps_what_the_formula_says(padding: str, dtype: torch.dtype) -> None:
    """(4 + 2 kv/h) d + (h + 2) * 4/itemsize elements per token, and 4f of the MLP, which this method leaves alone.

    d for each norm's input, q and the output of attention; the norms' copies of two weights are not per token.
    """
    totals = []
    for layers in (2, 3):
        model = llama(num_hidden_layers=layers).to(dtype)
        memsave.convert_model(model, [RecomputeNormConfig(), SHARE])
        totals.append(kept(model, text(padding)))
    tokens, grouped = BATCH * TOKENS, LLAMA["num_key_value_heads"] / HEADS
    attention = (4 + 2 * grouped) * WIDTH + (HEADS + 2) * 4 / dtype.itemsize
    elements = tokens * (attention + 4 * LLAMA["intermediate_size"]) + 2 * WIDTH
    assert totals[1] - totals[0] == elements * dtype.itemsize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_keeps_one_additive_mask_and_gemma_two(dtype: torch.dtype) -> None:
    mask = BATCH * TOKENS * TOKENS * dtype.itemsize
    for model, masks in ((llama().to(dtype), 1), (gemma(num_hidden_layers=7).to(dtype), 2)):
        memsave.convert_model(model, SHARE)
        windows = masks - 1  # a sliding window needs its mask without padding, too
        assert kept(model, text("left")) == kept(model, text()) + (masks - windows) * mask


def test_under_autocast_layers_share_the_mask_in_the_dtype_of_attention() -> None:
    plain = llama()
    model = share(plain)
    with torch.autocast("cpu", torch.bfloat16):
        loss, plain_loss = model(**text("left")).loss, plain(**text("left")).loss
        masks = kept(model, text("left")) - kept(model, text())
        assert kept(plain, text("left")) - kept(model, text("left")) > 2 * masks
    torch.testing.assert_close(loss, plain_loss)
    assert masks == 2 * BATCH * TOKENS * TOKENS


def test_bf16_is_as_near_to_fp64_as_the_plain_model() -> None:
    exact, plain = llama(attention_dropout=0.1).double(), llama(attention_dropout=0.1).bfloat16()
    batch = text("left")
    (_, right, _), (_, theirs, _), (_, ours, _) = train(exact, batch), train(plain, batch), train(share(plain), batch)
    for true, near, mine in zip(right, theirs, ours, strict=True):
        assert (mine - true).norm() <= 2 * (near - true).norm()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama_with_dropout", "bert", "t5"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpointing_trains_alike_and_keeps_no_more(name: str, use_reentrant: bool) -> None:
    plain, batch = MODELS[name](), text("left")
    model = share(plain)
    for each in (plain, model):
        each.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_trains_alike(model, plain, batch)
    assert kept(model, batch) <= kept(plain, batch)
    peaks = []
    for each in (plain, model):
        train(each, batch)
        peaks.append(memsave.measure(lambda each=each: train(each, batch) and None).peak_bytes)
    assert peaks[1] <= peaks[0]


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_without_gradients_the_bits_are_those_of_the_plain_model(name: str) -> None:
    plain = MODELS[name]()
    model = share(plain)
    with torch.no_grad():
        for training in (True, False):
            outputs = []
            for each in (plain, model):
                torch.manual_seed(0)
                outputs.append(each.train(training)(**text("left")).logits)
            assert torch.equal(*outputs)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_generation_gives_the_same_tokens(name: str, cache: str) -> None:
    plain = MODELS[name]().eval()
    batch = {key: value for key, value in text("left").items() if key != "labels"}
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "cache_implementation": cache}
    settings["disable_compile"] = True
    assert torch.equal(share(plain).generate(**batch, **settings), plain.generate(**batch, **settings))


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_compiles_as_one_graph(name: str) -> None:
    torch._dynamo.reset()
    plain = MODELS[name]()
    for module in plain.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model = share(plain)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    batch = text("left")
    loss = compiled(**batch).loss
    loss.backward()
    expected = train(plain, batch)
    torch.testing.assert_close(loss.detach(), expected[0], rtol=1e-5, atol=0)
    for parameter, gradient in zip(model.parameters(), expected[1], strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["llama_with_dropout", "t5", "gemma3"])
def test_the_estimate_is_what_is_measured(name: str) -> None:
    model, batch = share(MODELS[name]()), text("left")

    def step() -> None:
        model(**batch).loss.backward()
        model.zero_grad()

    step()
    assert memsave.estimate(model, batch).peak_bytes == memsave.measure(step).peak_bytes


def test_the_config_that_is_written_is_that_of_the_plain_model(tmp_path: Path) -> None:
    plain = whisper()
    model = share(plain)
    assert model.config._attn_implementation == NAME
    for each, folder in ((plain, "plain"), (model, "shared")):
        each.save_pretrained(tmp_path / folder)
    written = [(tmp_path / folder / "config.json").read_text() for folder in ("plain", "shared")]
    assert written[0] == written[1] and "memsave" not in written[1]
    assert model.config.to_dict() == plain.config.to_dict()
    loaded = type(model).from_pretrained(tmp_path / "shared")
    assert loaded.config._attn_implementation == "sdpa" and not applied_configs(loaded)


def test_restoring_puts_back_every_config() -> None:
    model = t5()
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values()
    before = [copy.deepcopy(vars(c)) for c in configs]
    memsave.convert_model(model, SHARE)
    assert {c._attn_implementation for c in configs} == {NAME}
    memsave.restore_model(model)
    assert [vars(c) for c in configs] == before and "_memsave" not in model.__dict__


def test_converting_twice_changes_nothing_more() -> None:
    model = share(llama())
    report = memsave.convert_model(model, SHARE)
    assert report.count == 0 and [row.method for row in report.already] == ["share_mask"]


def test_a_copy_is_restored_alone() -> None:
    model = share(llama())
    copied = copy.deepcopy(model)
    memsave.restore_model(copied)
    assert (copied.config._attn_implementation, model.config._attn_implementation) == ("sdpa", NAME)


def test_a_pickled_model_trains_in_a_new_process(tmp_path: Path) -> None:
    model = share(llama())
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    code = (
        "import pickle, sys, torch\n"
        "model = pickle.load(open(sys.argv[1], 'rb'))\n"
        "print(model.config._attn_implementation, model(input_ids=torch.arange(6)[None]).logits.shape)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model.pickle")]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output.split()[0] == NAME


def test_importing_memsave_registers_nothing() -> None:
    code = (
        "import memsave, memsave.methods, torch, transformers, transformers.masking_utils as masks\n"
        "memsave.convert_model(torch.nn.Sequential(torch.nn.Linear(2, 2)))\n"
        f"print({NAME!r} in transformers.AttentionInterface() or {NAME!r} in masks.ALL_MASK_ATTENTION_FUNCTIONS)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split() == ["False"]


def test_memsave_load_gives_back_the_sharing(tmp_path: Path) -> None:
    model = share(llama())
    memsave.save(model, tmp_path)
    for loaded in (memsave.load(tmp_path), memsave.load(tmp_path, llama())):
        assert loaded.config._attn_implementation == NAME and applied_configs(loaded) == {"share_mask": SHARE}
        assert kept(loaded.train(), text("left")) == kept(model, text("left"))


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_another_attention_is_left_alone_and_named(implementation: str) -> None:
    model = llama(attn_implementation=implementation)
    report = memsave.convert_model(model)
    assert model.config._attn_implementation == implementation
    (skip,) = (skip for skip in report.skipped if skip.reason.startswith("share_mask"))
    assert skip.modules == "(the model)" and repr(implementation) in skip.reason
    with pytest.raises(UnsupportedModelError, match=f"its attention is '{implementation}'.*was not changed"):
        memsave.convert_model(model, SHARE)


def test_a_part_with_another_attention_keeps_it() -> None:
    model = t5()
    model.encoder.config._attn_implementation = "eager"
    memsave.convert_model(model, SHARE)
    assert model.encoder.config._attn_implementation == "eager"
    assert model.decoder.config._attn_implementation == model.config._attn_implementation == NAME
    memsave.restore_model(model)
    assert [m.config._attn_implementation for m in (model, model.encoder, model.decoder)] == ["sdpa", "eager", "sdpa"]


def test_code_that_asks_for_sdpa_by_name_is_named() -> None:
    settings = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": HEADS}
    model = made("FalconForCausalLM", "FalconConfig", {**settings, "bos_token_id": 0, "eos_token_id": 0})
    report = memsave.convert_model(model)
    assert model.config._attn_implementation == "sdpa"
    assert any("FalconForCausalLM chooses its attention" in skip.reason for skip in report.skipped)


def test_models_without_transformers_in_them_are_not_concerned() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
    report = memsave.convert_model(model)
    assert "share_mask" not in str(report)
    with pytest.raises(UnsupportedModelError, match=r"ShareMaskConfig\(\): Sequential has nothing"):
        memsave.convert_model(model, SHARE)


def test_models_inside_others_and_under_lora_are_found() -> None:
    peft = pytest.importorskip("peft", reason="LoRA comes from peft (extra: hf)")
    inner = llama()
    model = peft.get_peft_model(inner, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    report = memsave.convert_model(model)
    assert [row.modules for row in report.rows if row.method == "share_mask"] == ["(the model)"]
    assert inner.config._attn_implementation == NAME
    memsave.restore_model(model)
    assert inner.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("check", ['== "sdpa"', "!= 'sdpa'", 'in ("eager", "sdpa")', 'not in ["sdpa"]'])
def test_code_that_asks_for_sdpa_by_name_is_left_alone(check: str) -> None:
    """It would take the other branch, say with a mask of another kind, where the name is not the plain one."""
    from memsave.integrations.attention import asks_for_sdpa

    assert asks_for_sdpa(f"    if self.config._attn_implementation {check}:\n        return mask\n")
    assert not asks_for_sdpa("    interface = get_interface(self.config._attn_implementation, eager)  # or 'sdpa'\n")
