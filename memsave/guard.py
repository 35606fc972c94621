"""`save_pretrained` of a model whose keys a method changed raises, instead of writing what no plain model can load.

The guard is an attribute of the one model object, a plain function: it is copied and pickled with the model, and goes
away when the methods do. No class is touched.
"""

from __future__ import annotations

from typing import NoReturn

from torch import nn

from .config import applied_configs
from .errors import SaveError


def refuse_save_pretrained(*args: object, **kwargs: object) -> NoReturn:
    """Stands for `save_pretrained` of a model whose keys were changed.

    Raises:
        SaveError: always.
    """
    raise SaveError(
        "save_pretrained: a memsave method changed the keys of this model, so from_pretrained could not load what this "
        "would write. Use memsave.save(model, directory) and memsave.load(directory), or restore_model first. "
        "Nothing was written."
    )


refuse_save_pretrained.stands_for_save_pretrained = True  # type: ignore[attr-defined]


def guard_saving(model: nn.Module) -> None:
    """Make `save_pretrained` raise on every transformers model in `model` that has changed keys, and work elsewhere.

    What else of memsave stands for it (`integrations/checkpoints.py`) stays as long as the keys are changed.
    """
    for module in model.modules():
        if not is_pretrained(module):
            continue
        ours = getattr(module.__dict__.get("save_pretrained"), "stands_for_save_pretrained", False)
        if changes_keys(module):
            if not ours:
                module.__dict__["save_pretrained"] = refuse_save_pretrained
        elif ours:
            del module.__dict__["save_pretrained"]


def changes_keys(model: nn.Module) -> bool:
    """Whether a method changed the keys of the state dict of `model`."""
    return any(config.changes_keys for inner in model.modules() for config in applied_configs(inner).values())


def is_pretrained(module: nn.Module) -> bool:
    """Whether `module` is a model of transformers; does not import that package."""
    return any(cls.__name__ == "PreTrainedModel" for cls in type(module).__mro__)
