"""`python -m memsave estimate | explain | convert`: they say what the functions say, for a config alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import memsave
from memsave.__main__ import main

transformers = pytest.importorskip("transformers", reason="needs transformers (the extra hf)")

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "dtype": "bfloat16",
}
OTHERS: dict[str, dict[str, Any]] = {
    "encoder": {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "classifier": {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification"],
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    },
    "both": {
        "model_type": "t5",
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": 64,
    },
    "speech": {
        "model_type": "whisper",
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "max_source_positions": 20,
        "vocab_size": 64,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "decoder_start_token_id": 0,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
    },
    "features": {
        "model_type": "gpt2",
        "architectures": ["GPT2ForSequenceClassification"],
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "pad_token_id": 0,
    },
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main(list(arguments))
    return capsys.readouterr().out


def refused(*arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return str(stopped.value.code)


def llama(dtype: torch.dtype = torch.bfloat16) -> Any:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**LLAMA), dtype=dtype).train()


def tokens(rows: int = 1, length: int = 32) -> dict[str, torch.Tensor]:
    ids = torch.full((rows, length), 3)
    return {"input_ids": ids, "labels": ids.clone()}


def test_estimate_is_what_estimate_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = memsave.estimate(llama(), tokens(), optimizer="adamw", device="cpu")
    found = memsave.MemoryProfile.from_json(run(capsys, "estimate", str(folder), "--json", "--device", "cpu"))
    assert found == expected
    assert run(capsys, "estimate", str(folder / "config.json"), "--device", "cpu").strip() == expected.table().strip()


def test_the_step_can_be_chosen(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--batch-size", "3", "--tokens", "10", "--optimizer", "none", "--dtype", "float32", "--checkpointing")
    model = llama(torch.float32)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = memsave.estimate(model, tokens(3, 10), device="cpu")
    found = run(capsys, "estimate", str(folder), "--json", "--device", "cpu", *options)
    assert memsave.MemoryProfile.from_json(found) == expected


def test_converted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = llama()
    report = memsave.convert_model(model)
    method = memsave.WTACRSConfig(target_modules=["down_proj"])
    second = memsave.convert_model(model, method)
    expected = memsave.estimate(model, tokens(), optimizer="adamw", device="cpu")
    options = ("--device", "cpu", "--convert", "--method", method.to_json())
    text = run(capsys, "estimate", str(folder), *options)
    assert str(report) in text and str(second) in text and expected.table() in text


def test_with_lora(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peft = pytest.importorskip("peft", reason="needs peft (the extra hf)")
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules="all-linear"))
    expected = memsave.estimate(model, tokens(), optimizer="adamw", device="cpu")
    found = run(capsys, "estimate", str(folder), "--json", "--device", "cpu", "--lora", "4")
    assert memsave.MemoryProfile.from_json(found) == expected


def test_explain_is_what_explain_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = memsave.explain(llama(), tokens(), optimizer=None, device="cpu")
    options = ("explain", str(folder), "--device", "cpu", "--optimizer", "none")
    assert run(capsys, *options).strip() == str(expected)
    assert json.loads(run(capsys, *options, "--json"))["causes"] == json.loads(expected.to_json())["causes"]


@pytest.mark.parametrize("name", OTHERS)
def test_other_models(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(OTHERS[name]))
    found = run(capsys, "estimate", str(tmp_path), "--json", "--device", "cpu", "--tokens", "8", "--optimizer", "none")
    profile = memsave.MemoryProfile.from_json(found)
    assert profile.by_category["weights"] > 0 and profile.saved_bytes > 0


def test_a_plan_needs_no_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "convert", str(folder))
    assert text.strip() == str(memsave.convert_model(llama(), dry_run=True))


def test_weights_are_converted_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, "dtype": "float32"}))
    plain.save_pretrained(tmp_path / "plain")
    method = memsave.FlashSVDConfig(ratio=0.5, target_modules=r".*mlp\.\w+_proj")
    out = str(tmp_path / "out")
    text = run(capsys, "convert", str(tmp_path / "plain"), "--method", method.to_json(), "--out", out)
    assert "flash_svd" in text and "converted" in text
    ids = tokens()["input_ids"]
    memsave.convert_model(plain, method)
    assert torch.equal(memsave.load(out).eval()(ids).logits, plain.eval()(ids).logits)
    assert "without the conversion" in run(capsys, "estimate", out, "--device", "cpu")
    assert "not empty" in refused("convert", str(tmp_path / "plain"), "--out", out)
    run(capsys, "convert", str(tmp_path / "plain"), "--out", out, "--overwrite")


def test_mistakes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected a folder with config.json" in refused("estimate", str(tmp_path / "nothing"))
    assert "optimizer 'no' is unknown" in refused("estimate", str(folder), "--optimizer", "no")
    assert "is not JSON" in refused("convert", str(folder), "--method", "{")
    assert "method 'no' is unknown" in refused("convert", str(folder), "--method", '{"method": "no"}')
    assert "cannot load the weights" in refused("convert", str(folder), "--out", str(tmp_path / "out"))
    assert "device 'no'" in refused("estimate", str(folder), "--device", "no")
    for arguments in (("estimate",), ("estimate", str(folder), "--tokens", "0"), ("explode", str(folder))):
        assert refused(*arguments) == "2"  # argparse has printed the usage
    (folder / "config.json").write_text("{")
    assert "cannot read it" in refused("explain", str(folder))
    (folder / "config.json").write_text(json.dumps({"model_type": "clap_audio_model"}))
    assert "memsave" in refused("estimate", str(folder))
