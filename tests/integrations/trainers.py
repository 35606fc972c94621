"""A tiny Llama, texts, and a Trainer of transformers, for the tests of training loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

VOCABULARY, TOKENS, SAMPLES, BATCH = 64, 16, 10, 2


def llama(**settings: Any) -> Any:
    """The same weights at every call; torch's random state stays as it was."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": TOKENS}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **heads, **settings}))


def dataset(samples: int = SAMPLES) -> list[dict[str, Tensor]]:
    tokens = torch.randint(VOCABULARY, (samples, TOKENS), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


def batch(start: int = 0, size: int = BATCH) -> dict[str, Tensor]:
    """The samples of the dataset from `start` on."""
    rows = torch.stack([sample["input_ids"] for sample in dataset()[start : start + size]])
    return {"input_ids": rows, "labels": rows}


def trainer(
    folder: Path, model: Any, *callbacks: Any, kind: type[transformers.Trainer] = transformers.Trainer, **settings: Any
) -> transformers.Trainer:
    """A Trainer that logs every step and saves nothing; `settings` are fields of TrainingArguments, or of Trainer."""
    of_trainer = {
        key: settings.pop(key)
        for key in ("compute_metrics", "optimizers", "model_init", "data_collator")
        if key in settings
    }
    arguments = transformers.TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 4,
            "per_device_train_batch_size": BATCH,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "report_to": [],
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            **settings,
        }
    )
    data = dataset()
    return kind(
        model=model, args=arguments, train_dataset=data, eval_dataset=data[:4], callbacks=[*callbacks], **of_trainer
    )


def logged(run: transformers.Trainer, key: str = "loss") -> list[float]:
    """What was logged as `key`, in order."""
    return [entry[key] for entry in run.state.log_history if key in entry]
