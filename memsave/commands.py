"""The subcommands of `python -m memsave`: estimate, explain and convert, for a transformers model.

For estimate and explain the config is enough: the model is made on the meta device, and no weights are read.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import convert_model, estimate, explain, save
from .config import MethodConfig
from .errors import LoadError
from .explaining.changes import enable_checkpointing
from .report import Report

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_to(commands: Any) -> None:
    """Add the subcommands to the parsers of `python -m memsave`."""
    for name, run, text in (
        ("estimate", _estimate, "predict the memory of a training step: peak by category, module and phase"),
        ("explain", _explain, "what is kept for backward, why, and what would change it"),
        ("convert", _convert, "plan a conversion, or with --out convert the weights and write them"),
    ):
        parser = commands.add_parser(name, help=text, description=f"memsave {name}: {text}.")
        parser.set_defaults(run=run)
        _add_model(parser)
        if name == "convert":
            parser.add_argument("--out", metavar="DIR", help="read the weights, convert them, and write them to DIR")
            parser.add_argument("--overwrite", action="store_true", help="replace an earlier checkpoint in DIR")
        else:
            _add_step(parser)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a folder with config.json, a config file, or a name that transformers knows")
    parser.add_argument("--dtype", choices=_DTYPES, help="of the weights (default: the config's, else float32)")
    parser.add_argument(
        "--method",
        action="append",
        default=[],
        metavar="JSON",
        help='convert by this config, as its to_json() writes it: {"method": "wta_crs", "target_modules": [...]}; '
        "repeatable",
    )
    parser.add_argument("--json", action="store_true", help="as JSON")


def _add_step(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=_positive, default=1, help="default 1")
    parser.add_argument(
        "--tokens", type=_positive, help="length of the sequences (default 2048, or what the model takes)"
    )
    parser.add_argument("--optimizer", default="adamw", help='a class of torch.optim, or "none" (default adamw)')
    parser.add_argument("--autocast", choices=_DTYPES, help="dtype of torch.autocast")
    parser.add_argument("--device", help="where the step would run (default: CUDA where torch sees it, else the CPU)")
    parser.add_argument("--checkpointing", action="store_true", help="with activation checkpointing")
    parser.add_argument("--lora", type=_positive, metavar="RANK", help="with LoRA on all linears, the rest frozen")
    parser.add_argument("--convert", action="store_true", help="after memsave.convert_model(model)")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _estimate(options: argparse.Namespace) -> str:
    model, reports = _model(options)
    profile = estimate(model, _batch(model, options), **_step(options))
    if options.json:
        return profile.to_json()
    return "\n\n".join([*map(str, reports), profile.table()])


def _explain(options: argparse.Namespace) -> str:
    model, reports = _model(options)
    explanation = explain(model, _batch(model, options), **_step(options))
    if options.json:
        return explanation.to_json()
    return "\n\n".join([*map(str, reports), explanation.table()])


def _convert(options: argparse.Namespace) -> str:
    from .integrations import from_config

    dtype = _DTYPES.get(options.dtype)
    if options.out is None:
        model = from_config.model_on_meta(from_config.read_config(options.model), dtype)
        report = convert_model(model, _methods(options), dry_run=True)
    else:
        model = from_config.load_pretrained(options.model, dtype)
        report = convert_model(model, _methods(options))
        save(model, options.out, overwrite=options.overwrite)
    return report.to_json() if options.json else str(report)


def _model(options: argparse.Namespace) -> tuple[nn.Module, list[Report | str]]:
    """The model on the meta device, with everything that was asked for, and what is to be said of it first."""
    from .integrations import from_config

    model = from_config.model_on_meta(from_config.read_config(options.model), _DTYPES.get(options.dtype))
    if options.lora is not None:
        model = from_config.with_lora(model, options.lora)
    reports: list[Report | str] = []
    if (Path(options.model) / "memsave.json").is_file():
        reports.append("memsave.save wrote this folder; below is the plain model, without the conversion kept in it")
    if options.convert:
        reports.append(convert_model(model))
    if methods := _methods(options):
        reports.append(convert_model(model, methods))
    if options.checkpointing:
        enable_checkpointing(model)
    return model, reports


def _batch(model: nn.Module, options: argparse.Namespace) -> dict[str, Tensor]:
    from .integrations import from_config

    return from_config.example_batch(model, options.batch_size, options.tokens)


def _step(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "optimizer": None if options.optimizer.lower() == "none" else options.optimizer,
        "autocast": _DTYPES.get(options.autocast),
        "device": options.device,
    }


def _methods(options: argparse.Namespace) -> list[MethodConfig] | None:
    """The configs that were given as JSON; None for none."""
    found = []
    for text in options.method:
        try:
            found.append(MethodConfig.from_json(text))
        except json.JSONDecodeError as error:
            raise LoadError(f"--method: {text!r} is not JSON: {error}") from error
    return found or None
