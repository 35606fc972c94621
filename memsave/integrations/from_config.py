"""A transformers model from its config alone, on the meta device, and a batch that it takes: no weights are read.

B sequences of T tokens; images (B, channels, H, W); sound as spectrograms (B, mel bins, frames).
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ..errors import LoadError

# Where a config names no class: the first of these that has one for it.
_AUTO = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForMaskedLM",
    "AutoModelForImageClassification",
    "AutoModel",
)
_TOKEN_LABELS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration", "ForTokenClassification")
_CLASS_LABELS = ("ForSequenceClassification", "ForImageClassification")
_PYTHON = "Make the model and the batch yourself, and call memsave.estimate, memsave.explain or memsave.convert_model"


def read_config(source: str) -> transformers.PretrainedConfig:
    """The config in a folder or file, or of a model that transformers knows by name; no code of the model's is run.

    Raises:
        LoadError: there is none, or transformers cannot read it.
    """
    try:
        if Path(source).is_file():
            settings = json.loads(Path(source).read_text(encoding="utf-8"))
            return transformers.AutoConfig.for_model(**settings)
        return transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # its validators raise classes of their own
        message = str(error).strip().partition("\n")[0]
        raise LoadError(
            f"{source!r}: expected a folder with config.json, such a file, or a name that transformers knows; "
            f"transformers cannot read it: {message}"
        ) from error


def model_on_meta(config: transformers.PretrainedConfig, dtype: torch.dtype | None) -> nn.Module:
    """The model that `config` describes, in training mode, without bytes for its weights.

    Args:
        config: names its class in `architectures`; without that, the first usual one for its type is taken.
        dtype: of the weights; None for the config's own, else float32.

    Raises:
        LoadError: transformers has no class for it, or cannot make one.
    """
    try:
        with torch.device("meta"):
            model = _class_of(config)._from_config(config, dtype=dtype or config.dtype or torch.float32)
    except Exception as error:
        raise LoadError(
            f"transformers cannot make a {config.model_type} from this config: {error}. {_PYTHON}"
        ) from error
    return model.train()


def _class_of(config: transformers.PretrainedConfig) -> Any:
    named = getattr(transformers, str(next(iter(config.architectures or []), "")), None)
    if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
        return named
    for name in _AUTO:
        if (cls := getattr(transformers, name)._model_mapping.get(type(config), None)) is not None:
            return cls[0] if isinstance(cls, tuple) else cls
    raise LoadError(f"transformers has no model for the type {config.model_type!r}")


def with_lora(model: nn.Module, rank: int) -> nn.Module:
    """The model with LoRA on all its linears but the head, in PEFT's defaults, and everything else frozen."""
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules="all-linear"))


def example_batch(model: nn.Module, batch_size: int, tokens: int | None) -> dict[str, Tensor]:
    """Random inputs and labels for a model of text, images or spectrograms, as the keywords of its forward.

    Args:
        model: a transformers model, on any device.
        batch_size: B.
        tokens: T; None for 2,048, or as many as the model has positions, if these are fewer.

    Raises:
        ValueError: the model takes something else.
    """
    inner = getattr(model, "get_base_model", lambda: model)()  # a PeftModel's
    config: Any = inner.config
    text = config.get_text_config(decoder=True)
    positions = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or 2048
    length = tokens or min(2048, int(positions))
    generator = torch.Generator().manual_seed(0)

    def ids() -> Tensor:
        return torch.randint(2, max(int(text.vocab_size), 3), (batch_size, length), generator=generator)

    name = type(inner).__name__
    batch = {str(inner.main_input_name): _main_input(inner, batch_size, ids)}
    if "labels" in inspect.signature(inner.forward).parameters:
        if name.endswith(_TOKEN_LABELS):
            batch["labels"] = ids() % config.num_labels if name.endswith("ForTokenClassification") else ids()
        elif name.endswith(_CLASS_LABELS):
            batch["labels"] = torch.zeros(batch_size, dtype=torch.long)
    if config.is_encoder_decoder:  # made from labels where a config names the first token; not all do
        batch["decoder_input_ids"] = ids()
    return batch


def _main_input(model: Any, batch_size: int, ids: Any) -> Tensor:
    config, name = model.config, model.main_input_name
    if name == "input_ids":
        return ids()
    dtype = next(model.parameters()).dtype
    vision = getattr(config, "vision_config", config)
    if name == "pixel_values" and (size := getattr(vision, "image_size", None)) is not None:
        height, width = (size, size) if isinstance(size, int) else size
        return torch.randn(batch_size, getattr(vision, "num_channels", 3), height, width).to(dtype)
    if name == "input_features" and hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        return torch.randn(batch_size, config.num_mel_bins, 2 * config.max_source_positions).to(dtype)
    raise ValueError(f"{type(model).__name__} takes {name!r}, for which there is no example batch. {_PYTHON}")


def load_pretrained(source: str, dtype: torch.dtype | None) -> nn.Module:
    """The model in a folder, with its weights, as the class that its config names.

    Raises:
        LoadError: transformers cannot load it.
    """
    config = read_config(source)
    try:
        return _class_of(config).from_pretrained(source, dtype=dtype or "auto", trust_remote_code=False)
    except Exception as error:
        raise LoadError(f"{source!r}: transformers cannot load the weights: {error}") from error
