"""Converting and restoring, and training between, again and again: nothing is left behind in the process.

What is counted: the objects of Python, tensors and the bytes of their storages, hooks that torch calls for every module
or optimizer, classes of modules, everything of memsave's own that has a length, and what is registered elsewhere.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sized
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import memsave
from tests.methods import ffn_models, sparse
from tests.mlp import make, wta

ROUNDS = 1000 if "MEMSAVE_FUZZ" in os.environ else 40
WARM = 20
"""Rounds after which everything is as large as it gets."""


class Kind(NamedTuple):
    """A plain model, what it is called with, and how it is converted and restored."""

    plain: Callable[[], nn.Module]
    batch: Callable[[], Any]
    configs: Callable[[], list[Any] | None]
    calibration: Callable[[], list[Any]] | None = None
    restore: dict[str, Any] = {}
    every: int = 1
    """Only each so many-th round is done, where one takes long."""
    of_torch: int = 0
    """Objects that torch itself keeps of a round."""


def rows() -> Tensor:
    return torch.linspace(-1, 1, 24).view(6, 4)


def tokens() -> Tensor:
    return torch.arange(24).view(2, 12)


def images() -> Tensor:
    return torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="needs transformers (pip install 'memsave[hf]')")
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, attention_dropout=0.1)
    return transformers.LlamaForCausalLM(config)


def convolutions() -> nn.Module:
    return nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))).eval()


def adapter(name: str, **settings: Any) -> Kind:
    pytest.importorskip("peft", reason="needs peft (pip install 'memsave[hf]')")
    targets = ["up_proj", "down_proj"]
    return Kind(make, rows, lambda: [getattr(memsave, name)(target_modules=targets, **settings)])


LOSSY = {"allow_lossy": True}
KINDS: dict[str, Callable[[], Kind]] = {
    "exact": lambda: Kind(make, rows, lambda: None),
    "llama": lambda: Kind(llama, tokens, lambda: None),
    "sampling": lambda: Kind(
        make, rows, lambda: [memsave.RecomputeNormConfig(), wta(min_rows=1, grad_norms="sample_cache")]
    ),
    "recompute_all": lambda: Kind(make, rows, lambda: [memsave.RecomputeMLPConfig(recompute="all")]),
    "flash_svd": lambda: Kind(
        make, rows, lambda: [memsave.FlashSVDConfig(rank=2, target_modules=["up_proj", "down_proj"])], None, LOSSY
    ),
    "routed_ffn": lambda: Kind(
        lambda: ffn_models.Model().float(),
        lambda: ffn_models.batches()[0].float(),
        lambda: [ffn_models.config(lora_rank=2)],
        None,
        {"adapters": "drop", **LOSSY},
    ),
    "sparse_mha": lambda: Kind(
        lambda: sparse.blocks(1), sparse.tokens, lambda: [sparse.config()], lambda: [sparse.tokens()], LOSSY
    ),
    "sparse_mha_ema": lambda: Kind(
        lambda: sparse.blocks(1), sparse.tokens, lambda: [sparse.config(codebook="ema")], None, LOSSY
    ),
    # torch.fx never forgets the source of a graph that it made (in `linecache`); a plan traces a dozen.
    "patch_conv": lambda: Kind(
        convolutions,
        images,
        lambda: [memsave.PatchConvConfig(input_size=(1, 3, 32, 32), num_patches=2)],
        every=5,
        of_torch=80,
    ),
    "shira": lambda: adapter("SHiRAConfig", density=0.2)._replace(restore={"adapters": "merge"}),
    "lamda": lambda: adapter("LaMDAConfig", r=2)._replace(restore={"adapters": "drop"}),
}


def subclasses(cls: type) -> Iterator[type]:
    for sub in cls.__subclasses__():
        yield sub
        yield from subclasses(sub)


def of_memsave() -> Iterator[tuple[str, int]]:
    """Everything in a module of memsave that has a length or a cache, by name."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != "memsave":
            continue
        for attribute, value in list(vars(module).items()):
            if isinstance(value, CACHED):
                yield f"{name}.{attribute}", value.cache_info().currsize
            elif isinstance(value, Sized) and not isinstance(value, (str, type)) and not attribute.startswith("__"):
                yield f"{name}.{attribute}", len(value)


def counted() -> dict[str, int]:
    gc.collect()
    objects = gc.get_objects()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in objects if type(t) in _TENSORS}
    found = {"objects": len(objects), "tensors": sum(type(t) in _TENSORS for t in objects)}
    found |= {"bytes": sum(storages.values()), "classes": len(set(subclasses(nn.Module)))}
    for module in (sys.modules["torch.nn.modules.module"], sys.modules["torch.optim.optimizer"]):
        found |= {f"torch {n}": len(v) for n, v in vars(module).items() if n.startswith("_global") and "hooks" in n}
    if "transformers" in sys.modules:
        from transformers import AttentionInterface, AttentionMaskInterface

        found |= {cls.__name__: len(cls().valid_keys()) for cls in (AttentionInterface, AttentionMaskInterface)}
    return found | dict(of_memsave())


_TENSORS = (Tensor, nn.Parameter)
CACHED = type(functools.lru_cache(len))


def step(model: nn.Module, batch: Any, optimizer: torch.optim.Optimizer) -> None:
    """A step of training, as far as the model can be trained."""
    with memsave.sample_ids(torch.arange(len(batch))):
        output = model(batch) if batch.is_floating_point() else model(batch, labels=batch).loss
        if output.requires_grad:
            output.sum().backward()
    optimizer.step()
    model.zero_grad(set_to_none=True)


def one_round(model: nn.Module, kind: Kind) -> None:
    calibration = None if kind.calibration is None else kind.calibration()
    memsave.convert_model(model, kind.configs(), calibration=calibration)
    trained = [p for p in model.parameters() if p.requires_grad]
    step(model, kind.batch(), torch.optim.SGD(trained, lr=1e-6))  # a thousand larger steps would diverge
    memsave.restore_model(model, **kind.restore)


def steady_growth(seen: list[dict[str, int]], rounds: int, of_torch: int = 0) -> dict[str, Any]:
    """What became more each time: something that is made once, such as a table of a lazy import, does not."""
    first, second = (growth(before, after, rounds, of_torch) for before, after in pairwise(seen))
    return {name: (*first[name], second[name][1]) for name in first.keys() & second.keys()}


def growth(before: dict[str, int], after: dict[str, int], rounds: int, of_torch: int = 0) -> dict[str, tuple[int, int]]:
    """What became more. Of Python's objects a few may: what a round leaves is one in each round at least."""
    slack = {"objects": max(rounds // 10, 20) + rounds * of_torch}
    return {n: (before.get(n, 0), c) for n, c in after.items() if c > before.get(n, 0) + slack.get(n, 0)}


@pytest.mark.parametrize("name", KINDS)
def test_rounds_leave_nothing_behind(name: str) -> None:
    kind = KINDS[name]()
    torch.manual_seed(0)
    model = kind.plain()
    warm, rounds = max(2, WARM // kind.every), (ROUNDS - WARM) // kind.every
    for _ in range(warm):
        one_round(model, kind)
    seen = [counted()]
    for _ in range(2):
        for _ in range(rounds // 2):
            one_round(model, kind)
        seen.append(counted())
    assert steady_growth(seen, rounds // 2, kind.of_torch) == {}


def test_steps_between_rounds_leave_nothing_behind() -> None:
    """One optimizer throughout, as in training that is converted and restored now and then."""
    kind = KINDS["llama"]()
    torch.manual_seed(0)
    model = kind.plain()
    optimizer = torch.optim.AdamW(model.parameters())
    seen: list[dict[str, int]] = []
    for i in range(200):
        if i % 10 == 0:
            memsave.convert_model(model, kind.configs())
        step(model, tokens(), optimizer)
        if i % 10 == 9:
            memsave.restore_model(model)
            seen.append(counted())
    assert steady_growth([seen[1], seen[10], seen[19]], 90) == {}


def test_what_a_round_leaves_is_noticed() -> None:
    """A test of the test: a tensor, an entry, a hook, a class."""
    before = counted()
    kept = [torch.zeros(3) for _ in range(5)]
    made = type("Made", (nn.Linear,), {})
    memsave.nn.converted._classes[made, made] = made
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        found = growth(before, counted(), 10)
    finally:
        handle.remove()
        del memsave.nn.converted._classes[made, made]
    assert len(kept) == 5
    assert {"tensors", "bytes", "classes", "memsave.nn.converted._classes", "torch _global_forward_hooks"} <= set(found)
