"""The keys of some batches, by module: what codebooks are fitted to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import calibrating
from . import codebooks
from .codebooks import KeySample
from .module import is_multihead
from .multihead import keys_of


def key_samples(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    batches: Iterable[Any],
    watching: Callable[[nn.Module, KeySample], AbstractContextManager[object]],
) -> dict[str, Tensor]:
    """Runs `model` over the batches in eval mode, without gradients; for each target a sample (kv, N, D) of its keys.

    The model computes what it did, and is as it was afterwards.

    Args:
        watching: lets the keys of an attention module of transformers go to a sample, within.

    Raises:
        ValueError: no batches, a single one, or a target that no batch reached.
    """
    calibrating.check_batches(batches)
    samples = {name: KeySample(codebooks.SAMPLE_KEYS) for name in targets}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(calibrating.evaluating(model))
        stack.enter_context(calibrating.same_random_numbers(model))
        for name, module in targets.items():
            watch = _watching_multihead if is_multihead(module) else watching
            stack.enter_context(watch(module, samples[name]))
        bar = stack.enter_context(calibrating.progress(batches, "keys", "batch", delay_seconds=2.0))
        count = 0
        for batch in bar:
            calibrating.run(model, batch)
            count += 1
    calibrating.same_count(None, count)
    found = {}
    for name, sample in samples.items():
        if sample.keys is None or not sample.keys.shape[1]:
            raise ValueError(
                f"convert_model: calibration: no batch reached {name}; exclude it, or give batches that do. "
                "The model was not changed."
            )
        found[name] = sample.keys
    return found


@contextmanager
def _watching_multihead(module: nn.Module, sample: KeySample) -> Iterator[None]:
    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample.add(*keys_of(module, args, kwargs))

    handle = module.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
