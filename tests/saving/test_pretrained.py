"""Models of transformers: made again without the caller's help, and kept from writing what cannot be loaded."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import memsave
from memsave import LoadError, RecomputeNormConfig, SaveError

from ..snapshot import snapshot
from ..toys import ToyLowRankConfig
from .test_round_trip import state_bits, structure

hf = pytest.importorskip("transformers", reason="needs transformers (pip install 'memsave[hf]')")
low_rank = ToyLowRankConfig(rank=8, least=0.5, target_modules=["up_proj"])
recompute = RecomputeNormConfig(exclude_modules=["up_proj"])


def llama(**settings: Any) -> Any:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **heads, **settings))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_is_made_from_its_directory_alone(training: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    memsave.convert_model(model, [low_rank, recompute])
    model.to(dtype).train(training)
    model.model.norm.float()
    model.generation_config.max_new_tokens = 7
    memsave.save(model, tmp_path / "c")
    random_state = torch.get_rng_state()
    loaded: Any = memsave.load(tmp_path / "c")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert type(loaded) is hf.LlamaForCausalLM
    assert structure(loaded) == structure(model) and state_bits(loaded) == state_bits(model)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.generation_config.max_new_tokens == 7
    tokens = torch.arange(12)[None]
    assert dtype is not torch.float32 or torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_a_model_that_keeps_its_keys_still_loads_into_the_stock_class(tmp_path: Path) -> None:
    model = llama()
    memsave.convert_model(model)
    memsave.save(model, tmp_path / "c")
    assert state_bits(hf.LlamaForCausalLM.from_pretrained(tmp_path / "c")) == state_bits(model)


def other_class(config: Any) -> None:
    config["architectures"] = ["NoSuchModel"]


def no_class(config: Any) -> None:
    config["architectures"] = None


def odd_class(config: Any) -> None:
    config["architectures"] = [3]


def no_such_shape(config: Any) -> None:
    config["num_attention_heads"] = 5


def class_of_another_config(config: Any) -> None:
    config["architectures"] = ["GPT2LMHeadModel"]


def foreign_code(config: Any) -> None:
    config.update(model_type="mine", auto_map={"AutoConfig": "code.Mine"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_class, "names the class 'NoSuchModel', which transformers .* does not have. Make the model yourself"),
        (no_class, "names the class '', which"),
        (odd_class, "names the class '3', which"),
        (no_such_shape, "transformers cannot read .*config.json"),
        (class_of_another_config, "transformers cannot make a GPT2LMHeadModel from .*embd_pdrop.* Make the model"),
        (foreign_code, "transformers cannot read .*config.json"),
        (None, "has no config.json. Make the model yourself and call memsave.load"),
    ],
)
def test_configs_that_make_no_model(change: Any, message: str, tmp_path: Path) -> None:
    memsave.save(llama(), tmp_path / "c")
    path = tmp_path / "c" / "config.json"
    config = json.loads(path.read_text())
    if change is None:
        path.unlink()
    else:
        change(config)
        path.write_text(json.dumps(config))
        (tmp_path / "c" / "code.py").write_text("raise SystemExit('this code must not run')")
    with pytest.raises(LoadError, match=message):
        memsave.load(tmp_path / "c")


def refuses(model: Any, directory: Path) -> bool:
    """Whether save_pretrained raises, and then writes nothing."""
    try:
        model.save_pretrained(directory)
    except SaveError as error:
        assert "Use memsave.save(model, directory) and memsave.load(directory)" in str(error)
        assert not directory.exists()
        return True
    return False


def test_save_pretrained_raises_while_keys_are_changed(tmp_path: Path) -> None:
    model = llama()
    before = snapshot(model)
    memsave.convert_model(model, low_rank, dry_run=True)
    memsave.convert_model(model, recompute)
    assert not refuses(model, tmp_path / "kept")
    memsave.convert_model(model, low_rank)
    for each in (model, model.model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert refuses(each, tmp_path / "changed")
    assert not refuses(llama(), tmp_path / "other")
    memsave.restore_model(model, methods=["toy_low_rank"], allow_lossy=True)
    assert not refuses(model, tmp_path / "restored")
    memsave.restore_model(model)
    attributes = {name: module["attributes"] for name, module in snapshot(model)["modules"].items()}
    assert attributes[""] == before["modules"][""]["attributes"]


def test_a_model_inside_another_is_guarded_and_a_copy_made_by_load_too(tmp_path: Path) -> None:
    box: Any = nn.ModuleDict({"a": llama(), "b": llama()})
    memsave.convert_model(box, ToyLowRankConfig(target_modules=r"a\..*up_proj"))
    assert refuses(box["a"], tmp_path / "a") and not refuses(box["b"], tmp_path / "b")
    memsave.save(box["a"], tmp_path / "c")
    assert refuses(memsave.load(tmp_path / "c"), tmp_path / "d")


def test_training_resumes_from_a_plain_state_dict(tmp_path: Path) -> None:
    """torch.save and load_state_dict go on working, for a model that is converted in the same way."""
    model = llama()
    memsave.convert_model(model, low_rank)
    memsave.save(model, tmp_path / "structure")
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "step.pt")
    step = torch.load(tmp_path / "step.pt")
    resumed = memsave.load(tmp_path / "structure")
    again = torch.optim.AdamW(resumed.parameters())
    resumed.load_state_dict(step["model"])
    again.load_state_dict(step["optimizer"])
    assert state_bits(resumed) == state_bits(model)
    with pytest.raises(RuntimeError, match="Missing key|Unexpected key"):
        llama().load_state_dict(step["model"])
