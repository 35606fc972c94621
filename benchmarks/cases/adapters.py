"""The benchmark cases of adapters: fine-tuning the same targets of the same model, and switching between adapters.

B sequences of T tokens; every linear but the head is a target. O x D: a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import memsave

from . import models
from .case import Case, short
from .op_case import Contender, Inputs, OpCase

RANK = 16  # LoRA's, and the budget of both SHiRAs: as many values
LEARNING_RATE = 1e-4


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)


@dataclass(frozen=True, kw_only=True)
class AdapterVariant:
    """One way to fine-tune a model.

    Attributes:
        apply: puts the adapter into the plain model in place; returns the PeftModel, or None.
        optimizer: of what `apply` returned, or else of the model.
    """

    name: str
    apply: Callable[[nn.Module], nn.Module | None]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = _adamw


@dataclass(frozen=True, kw_only=True)
class AdapterCase(Case):
    """One model, fine-tuned in several ways on random tokens (B, T).

    Attributes:
        model: makes the plain model in fp32; called after seeding.
        checkpointed: whether activation checkpointing is on.
        gate: the fields that change for the check of the gradients, in fp64.
    """

    kind: ClassVar[str] = "adapters"

    model: Callable[[], nn.Module]
    variants: tuple[AdapterVariant, ...]
    shape: tuple[int, int]
    dtype: torch.dtype = torch.bfloat16
    checkpointed: bool = False
    gate: Mapping[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        settings = {"shape": list(self.shape), "dtype": short(self.dtype), "checkpointed": self.checkpointed}
        return super().describe() | settings


def _all_trained(model: nn.Module) -> None:
    """Full fine-tuning."""


def _peft(model: nn.Module, config: Callable[..., Any], *, cast: bool = True, **settings: Any) -> nn.Module:
    import peft

    made = config(target_modules="all-linear", **settings)
    return peft.get_peft_model(model, made, autocast_adapter_dtype=cast)


def _lora(model: nn.Module, cast: bool) -> nn.Module:
    import peft

    return _peft(model, peft.LoraConfig, cast=cast, r=RANK, lora_alpha=RANK)


def _lora_fa(model: nn.Module) -> torch.optim.Optimizer:
    from peft.optimizers import create_lorafa_optimizer

    return create_lorafa_optimizer(model, r=RANK, lora_alpha=RANK, lr=LEARNING_RATE)


def _peft_shira(model: nn.Module) -> nn.Module:
    import peft

    return _peft(model, peft.ShiraConfig, r=RANK)


def _shira(model: nn.Module, **settings: Any) -> None:
    memsave.convert_model(model, memsave.SHiRAConfig(target_modules="all-linear", **settings))


def _lamda(model: nn.Module) -> None:
    memsave.convert_model(model, memsave.LaMDAConfig(r=32, target_modules="all-linear"))


def _with(
    adapter: Callable[[nn.Module], nn.Module | None], model: nn.Module, *, every: bool = False
) -> nn.Module | None:
    """The adapter, and then the exact methods; `every`: with the MLPs computed again as a whole."""
    made = adapter(model)
    memsave.convert_model(model)
    if every:
        memsave.convert_model(model, memsave.RecomputeMLPConfig(recompute="all"))
    return made


_shira_of_rank = partial(_shira, r=RANK)
_lora_16 = partial(_lora, cast=False)

FULL = AdapterVariant(name="full fine-tuning", apply=_all_trained)
LORA = AdapterVariant(name="PEFT LoRA, r = 16, its default float32 adapters", apply=partial(_lora, cast=True))
LORA_16 = AdapterVariant(name="PEFT LoRA, adapters in the model's dtype", apply=_lora_16)
LORA_EXACT = AdapterVariant(name="PEFT LoRA in the model's dtype + memsave exact", apply=partial(_with, _lora_16))
LORA_FA = AdapterVariant(name="PEFT LoRA-FA", apply=_lora_16, optimizer=_lora_fa)
PEFT_SHIRA = AdapterVariant(name="PEFT SHIRA, as many values as LoRA", apply=_peft_shira)
SHIRA = AdapterVariant(name="memsave SHiRA, as many values as LoRA", apply=_shira_of_rank)
SHIRA_1 = AdapterVariant(name="memsave SHiRA, 1%", apply=partial(_shira, density=0.01))
SHIRA_EXACT = AdapterVariant(name="memsave SHiRA + exact", apply=partial(_with, _shira_of_rank))
LAMDA = AdapterVariant(name="memsave LaMDA, r = 32", apply=_lamda)
LAMDA_EXACT = AdapterVariant(name="memsave LaMDA + exact", apply=partial(_with, _lamda))
LAMDA_ALL = AdapterVariant(name="memsave LaMDA + exact + all", apply=partial(_with, _lamda, every=True))

_VARIANTS = (
    *(FULL, LORA, LORA_16, LORA_EXACT, LORA_FA, PEFT_SHIRA),
    *(SHIRA, SHIRA_1, SHIRA_EXACT, LAMDA, LAMDA_EXACT, LAMDA_ALL),
)
_TOY = {"vocab_size": 64, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
_GATE = {"model": partial(models.llama_narrow, **_TOY), "shape": (2, 16)}

ADAPTER_CASES: tuple[AdapterCase, ...] = tuple(
    AdapterCase(
        name=f"adapters_{name}{'_checkpointed' if checkpointed else ''}",
        title=f"{title}, every linear but the head, {'with' if checkpointed else 'without'} activation checkpointing",
        devices=devices,
        method="shira",
        expected_s=240.0,
        model=model,
        variants=_VARIANTS,
        shape=shape,
        checkpointed=checkpointed,
        gate=_GATE,
        tiny={"model": partial(model, **_TOY), "shape": (2, 32)},
    )
    for name, title, devices, model, shape in (
        ("llama", "full training step of two Llama layers, 1,024 wide, bf16", ("cpu",), models.llama_adapted, (2, 256)),
        ("llama_1b", "full training step of a Llama-3.2-1B shape, bf16", ("cuda",), models.llama_1b, (8, 2048)),
    )
    for checkpointed in (False, True)
)


def _switchable(device: str, D: int, dtype: torch.dtype) -> Inputs:
    """A D x D linear with two SHiRA adapters of 1%, one with two LoRAs of rank 16, one of them merged."""
    import peft

    def linear() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(D, D, bias=False, device=device, dtype=dtype))

    sparse = peft.get_peft_model(linear(), memsave.SHiRAConfig(density=0.01, target_modules=["0"]))
    sparse.add_adapter("other", memsave.SHiRAConfig(density=0.01, seed=1, target_modules=["0"]))
    low_rank = peft.get_peft_model(
        linear(), peft.LoraConfig(r=RANK, target_modules=["0"], init_lora_weights=False), autocast_adapter_dtype=False
    )
    low_rank.add_adapter("other", peft.LoraConfig(r=RANK, target_modules=["0"], init_lora_weights=False))
    shira, lora = sparse.base_model.model[0], low_rank.base_model.model[0]
    for values in shira.memsave_shira_values.values():
        nn.init.normal_(values, std=0.01)
    shira.held.sync(force=True)
    lora.merge(adapter_names=["default"])
    return {"shira": shira, "lora": lora}


def _switch_shira(shira: Any, **_: Any) -> None:
    """There and back again."""
    shira.set_adapter("other")
    shira.set_adapter("default")


def _switch_lora(lora: Any, **_: Any) -> None:
    for name in ("other", "default"):
        lora.unmerge()
        lora.merge(adapter_names=[name])


def _fuse_lora(lora: Any, **_: Any) -> None:
    """The two products and sums alone, without taking off what was fused before."""
    for name in ("other", "default"):
        lora.base_layer.weight.data += lora.get_delta_weight(name)


def _comes_back(shira: Any, **_: Any) -> None:
    weight: Tensor = shira.base_layer.weight
    before = weight.detach().clone()
    shira.set_adapter("other")
    assert not torch.equal(weight, before)
    shira.set_adapter("default")
    assert torch.equal(weight, before)


SWITCH_CASE = OpCase(
    name="switch_adapters",
    title="two switches between two adapters of one D x D linear: LoRA of rank 16, SHiRA of 1%",
    method="shira",
    devices=("cpu", "cuda"),
    inputs=_switchable,
    contenders=(
        Contender(name="PEFT LoRA, unmerge and merge", call=_switch_lora),
        Contender(name="PEFT LoRA, fuse alone", call=_fuse_lora),
        Contender(name="memsave SHiRA, set_adapter", call=_switch_shira),
    ),
    check=_comes_back,
    sizes={
        device: tuple({"D": 4096, "dtype": dtype} for dtype in (torch.float32, torch.bfloat16))
        for device in ("cpu", "cuda")
    },
)
