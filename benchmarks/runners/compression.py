"""Measures what compressed weights do to the embeddings of a sentence encoder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import memsave
from benchmarks.cases.compression import ONE_PASS_BYTES, CompressionCase
from benchmarks.checks import CheckFailed
from benchmarks.sentences import Batch, Encoder, disjoint_texts, embeddings
from memsave.nn.low_rank.moments import second_moments
from memsave.nn.low_rank.replacing import low_rank

from .timing import elapsed

# Of an entry of an embedding, whose norm is 1.
TOLERANCE = 1e-4
# Of a squared error, for what is rounded.
ROUNDING = 1e-3


def run_compression_case(
    case: CompressionCase, device: str, rounds: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """For each ratio and way: how close the embeddings are, the parameters of the weights, seconds to compress.

    `rounds` has no use here: each compression runs once.

    Raises:
        CheckFailed: factors of full rank change the embeddings, or streaming does, or whitening is no gain on the
            inputs that it was made for.
        PackageMissing: the encoder is not installed.
    """
    encoder = Encoder(device, case.layers)
    texts, others = disjoint_texts(case.texts, case.evaluated, case.calibration)
    batches, calibration = (encoder.batches(part, case.batch, case.max_length) for part in (texts, others))
    check_full_rank(encoder.model, case.target_modules, calibration)
    check_streaming(encoder.model, case, calibration)
    check_whitening(encoder.model, case, calibration)
    original = embeddings(encoder.model, batches)
    results = []
    for ratio in case.ratios:
        for way, settings in case.ways.items():
            model = deepcopy(encoder.model)
            config = config_of(case, ratio, settings)
            wall_s, cpu_s = elapsed(partial(compress, model, config, calibration), 1, device)
            row = {"ratio": ratio, "way": way, "s": wall_s, "cpu_s": cpu_s}
            row |= closeness(original, embeddings(model, batches), case.pairs)
            results.append(row | parameters(encoder.model, model, case.target_modules))
    return results, {}


def config_of(case: CompressionCase, ratio: float, settings: Mapping[str, Any]) -> memsave.FlashSVDConfig:
    return memsave.FlashSVDConfig(ratio=ratio, target_modules=case.target_modules, **settings)


def compress(model: nn.Module, config: memsave.FlashSVDConfig, calibration: Sequence[Batch]) -> None:
    memsave.convert_model(model, config, calibration=calibration if config.calibrated else None)


def closeness(original: Tensor, compressed: Tensor, pairs: int) -> dict[str, float]:
    """How close the compressed embeddings (N, D) are to the original ones, both of norm 1."""
    cosines = (original.double() * compressed.double()).sum(1)
    ranks = rank_correlation(*(similarities(found, pairs) for found in (original, compressed)))
    return {"mean_cosine": float(cosines.mean()), "lowest_cosine": float(cosines.min()), "rank_correlation": ranks}


def similarities(found: Tensor, pairs: int) -> Tensor:
    """The cosines of different texts, of at most so many pairs; always the same pairs."""
    one, other = torch.triu_indices(len(found), len(found), offset=1)
    chosen = torch.randperm(len(one), generator=torch.Generator().manual_seed(0))[:pairs]
    return (found @ found.t())[one[chosen], other[chosen]].double()


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's: the correlation of the ranks, where equal values share the mean of theirs."""
    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])


def ranks(values: Tensor) -> Tensor:
    _, places, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2).double()[places]


def linears(model: nn.Module, target_modules: str) -> dict[str, nn.Module]:
    """The linears of a plain model that are compressed, by name."""
    named = ((name, module) for name, module in model.named_modules() if re.fullmatch(target_modules, name))
    return {name: module for name, module in named if isinstance(module, nn.Linear)}


def parameters(original: nn.Module, compressed: nn.Module, target_modules: str) -> dict[str, int]:
    """Of the targets' weights, without biases: what is left, and what there was."""
    names = linears(original, target_modules)
    models = {"parameters": compressed, "of_parameters": original}
    return {key: sum(weight_elements(model.get_submodule(name)) for name in names) for key, model in models.items()}


def weight_elements(linear: nn.Module) -> int:
    return sum(parameter.numel() for name, parameter in linear.named_parameters() if name != "bias")


def check_full_rank(original: nn.Module, target_modules: str, calibration: Sequence[Batch]) -> None:
    """Factors of full rank give the original's embeddings, whitened ones also of texts that they were not made for."""
    batches = calibration[-1:]
    for way in ("plain", "whitened"):
        model = deepcopy(original)

        def replace(names: Sequence[str], moment: Tensor | None, model: nn.Module = model) -> None:
            for name in names:
                linear = model.get_submodule(name)
                rank = min(linear.weight.shape)
                model.set_submodule(name, low_rank(linear, rank, moment=moment))

        targets = linears(model, target_modules)
        if way == "whitened":
            second_moments(model, targets, calibration[:1], replace)
        else:
            replace(list(targets), None)
        check_same(f"{way} factors of full rank", embeddings(model, batches), embeddings(original, batches))


def check_streaming(original: nn.Module, case: CompressionCase, calibration: Sequence[Batch]) -> None:
    """A compressed model gives the embeddings of its dense equivalent, which does not stream."""
    batches = calibration[-1:]
    model = deepcopy(original)
    compress(model, config_of(case, min(case.ratios), {}), calibration)
    streamed = embeddings(model, batches)
    memsave.restore_model(model, allow_lossy=True)
    check_same("the compressed model beside its dense equivalent", streamed, embeddings(model, batches))


def check_same(what: str, found: Tensor, expected: Tensor) -> None:
    error = float((found - expected).abs().max())
    if not error <= TOLERANCE:
        raise CheckFailed(f"{what}: an embedding differs by {error:.1e}, allowed is {TOLERANCE:.0e}")


def check_whitening(original: nn.Module, case: CompressionCase, calibration: Sequence[Batch]) -> None:
    """On the inputs that it was made for, no linear's error is larger with whitened factors than with plain ones."""
    ways = {"plain": {}, "whitened": {"whiten": "activation", "calibration_bytes": ONE_PASS_BYTES}}
    for ratio in sorted({min(case.ratios), max(case.ratios)}):
        plain, whitened = (
            output_errors(original, config_of(case, ratio, settings), calibration) for settings in ways.values()
        )
        for name in plain:
            if not whitened[name] <= (1 + ROUNDING) * plain[name]:
                raise CheckFailed(
                    f"{name}, ratio {ratio}: on the calibration inputs the squared error of whitened factors is "
                    f"{whitened[name]:.4g}, that of plain ones {plain[name]:.4g}"
                )


@torch.no_grad()
def output_errors(
    original: nn.Module, config: memsave.FlashSVDConfig, calibration: Sequence[Batch]
) -> dict[str, float]:
    """By linear: the sum of the squared errors of its outputs on the inputs that it has in the original model."""
    dense = deepcopy(original)
    compress(dense, config, calibration)
    memsave.restore_model(dense, allow_lossy=True)
    watched, errors, hooks = linears(original, config.target_modules), {}, []
    for name, linear in watched.items():
        error = dense.get_submodule(name).weight - linear.weight  # (O, D)

        def add(_: nn.Module, inputs: tuple[Tensor], name: str = name, error: Tensor = error) -> None:
            squares = (inputs[0] @ error.t()).square().sum(dtype=torch.float64)
            errors[name] = errors.get(name, 0.0) + float(squares)

        hooks.append(linear.register_forward_pre_hook(add))
    embeddings(original, calibration)
    for hook in hooks:
        hook.remove()
    return errors
