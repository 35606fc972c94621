"""Checkpoints of the Trainer for models that `save_pretrained` cannot write so that training can go on from them."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..config import Guarantee, applied_configs
from ..guard import changes_keys, refuse_save_pretrained
from ..saving import save


class SavesByMemsave:
    """Stands for `save_pretrained` of one model: writes what `memsave.save` does, which `memsave.load` reads.

    An attribute of the model object, like the guard whose place it takes. Copies of the model get the guard back.
    """

    stands_for_save_pretrained = True

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)  # the model refers to this

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        *,
        is_main_process: bool = True,
        state_dict: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the model to `save_directory`, over an earlier checkpoint there; `state_dict` as in `memsave.save`."""
        model = self._model()
        if is_main_process and model is not None:
            save(model, save_directory, state_dict=state_dict, overwrite=True)

    def __reduce__(self) -> tuple[Callable[[], Callable[..., Any]], tuple[()]]:
        return _refusing, ()


def _refusing() -> Callable[..., Any]:
    return refuse_save_pretrained


def save_by_memsave(model: nn.Module) -> bool:
    """Let `save_pretrained` of `model` write by `memsave.save` where its own would not do; whether it does now.

    It would not where keys are changed, or for adapters that `convert_model` put in: of these it writes what the
    Trainer cannot load into a model that is no `PeftModel`.
    """
    if not isinstance(model, PreTrainedModel) or not (changes_keys(model) or _has_adapters(model)):
        return False
    if not isinstance(model.__dict__.get("save_pretrained"), SavesByMemsave):
        model.__dict__["save_pretrained"] = SavesByMemsave(model)
    return True


def _has_adapters(model: nn.Module) -> bool:
    return any(c.guarantee is Guarantee.ADAPTER and c.scope == "model" for c in applied_configs(model).values())
