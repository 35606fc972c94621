"""Wrappers around a model that memsave must come before: DDP, FSDP, compiled and scripted modules."""

from __future__ import annotations

from torch import nn

_ADVICE = {
    "DistributedDataParallel": "convert, restore or estimate the model before wrapping it",
    "DataParallel": "convert, restore or estimate the model before wrapping it",
    "FullyShardedDataParallel": "convert, restore or estimate the model before wrapping it",
    "FSDPModule": "convert, restore or estimate the model before fully_shard",
    "OptimizedModule": "convert, restore or estimate the model before torch.compile",
    "ScriptModule": "a scripted module has no Python forward to convert",
    "DeepSpeedEngine": "convert, restore or estimate the model before deepspeed.initialize",
}
INSIDE = {
    "DistributedDataParallel": "model.module",
    "DataParallel": "model.module",
    "OptimizedModule": "model._orig_mod",
}


def wrapping(model: nn.Module) -> str | None:
    """Say how `model` or a module in it is wrapped and what to do instead, or return None."""
    for name, module in model.named_modules():
        for cls in type(module).__mro__:
            if cls.__name__ in _ADVICE:
                where = f"its submodule {name!r}" if name else "the model"
                advice = _ADVICE[cls.__name__]
                if not name and cls.__name__ in INSIDE:
                    advice += f", or pass the module inside: {INSIDE[cls.__name__]}"
                return f"{where} is wrapped in {cls.__name__}: {advice}"
    return None
