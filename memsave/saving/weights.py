"""The tensors of a state dict: to a file, ties noted, and back into a model that they must fit exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..config import MethodConfig, applied_configs
from ..errors import LoadError, SaveError

FILE = "model.safetensors"
_EXTRA_STATE = "_extra_state"  # torch's ending of the keys of what `get_extra_state` returns
_SHOWN = 3


def tensors_of(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What to write of `state_dict`: each tensor once, contiguous; and for its other names, the name written.

    Raises:
        SaveError: a value is no tensor, or one that has no values here.
    """
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    names: dict[tuple[object, ...], str] = {}
    readers: dict[int, int] = {}
    for name, value in state_dict.items():
        if value is None and name.endswith(_EXTRA_STATE):
            continue
        if reason := _why_not_written(value):
            raise SaveError(f"save: {name}: {reason}. Nothing was written.")
        turned = value.is_conj(), value.is_neg()  # views with other values at the same place
        place = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype, turned)
        written = names.setdefault(place, name) if value.numel() else name
        if written != name:
            tied[name] = written
            continue
        tensors[name] = value.detach()
        storage = value.untyped_storage().data_ptr()
        readers[storage] = readers.get(storage, 0) + 1
    for name, tensor in tensors.items():
        tensor = tensor.resolve_conj().resolve_neg()
        alone = readers[tensors[name].untyped_storage().data_ptr()] == 1
        # Different views of one storage are written as tensors of their own.
        tensors[name] = tensor.contiguous() if alone else tensor.clone(memory_format=torch.contiguous_format)
    return tensors, tied


def _why_not_written(value: object) -> str | None:
    if not isinstance(value, Tensor):
        return f"expected a tensor, got {type(value).__name__}; memsave writes no pickles"
    if is_lazy(value):
        return "it is made by the first forward; run the model once first"
    if value.is_meta:
        return "it is on the meta device and has no values"
    if type(value).__name__ == "DTensor":
        return (
            "it is sharded; gather the weights by get_model_state_dict(model, options=StateDictOptions("
            "full_state_dict=True)) of torch.distributed.checkpoint.state_dict, and pass them as state_dict= on rank 0"
        )
    wraps = hasattr(type(value), "__tensor_flatten__")
    if value.layout is not torch.strided or value.is_quantized or wraps:
        kind = type(value).__name__ if wraps else value.layout
        return f"safetensors holds plain dense tensors, not {kind} or quantized ones"
    return None


def check_fit(model: nn.Module, tensors: Mapping[str, Tensor], tied: Mapping[str, str], *, any_dtype: bool) -> None:
    """Raise LoadError unless `tensors` are what the state dict of `model` holds, by name, shape, dtype and ties.

    Args:
        tied: which names of `tensors` were one tensor with another.
        any_dtype: whether the model takes over the dtypes of `tensors`.
    """
    own = model.state_dict(keep_vars=True)
    optional = _optional_names(model)
    needed = {name for name, value in own.items() if value is not None} - optional
    problems = _listed("not in the file", needed - tensors.keys())
    problems += _listed("not in the model", tensors.keys() - own.keys() - optional)
    both = [name for name in own if name in tensors and not name.endswith(_EXTRA_STATE) and name not in optional]
    shapes = [f"{n} {[*tensors[n].shape]}, not {[*own[n].shape]}" for n in both if tensors[n].shape != own[n].shape]
    problems += _listed("of another shape in the file", shapes)
    problems += _listed(
        "of another kind of number in the file", [n for n in both if _kind(tensors[n]) != _kind(own[n])]
    )
    every = [*model.named_parameters(), *model.named_buffers()]
    problems += _listed("on meta and not in any file", [n for n, t in every if t.is_meta and n not in own])
    if not any_dtype:
        dtypes = [f"{n} {tensors[n].dtype}, not {own[n].dtype}" for n in both if tensors[n].dtype != own[n].dtype]
        problems += _listed("of another dtype in the file (see model.to)", dtypes)
    one: dict[int, str] = {}
    pairs = [(one.setdefault(id(own[name]), name), name) for name in both]
    untied = [f"{a} and {b}" for a, b in pairs if tied.get(a, a) != tied.get(b, b)]
    problems += _listed("tied in the model and not in the file", untied)
    if not problems:
        problems = list(_refused(model, tensors))
    if problems:
        found = "; ".join(problems)
        raise LoadError(f"load: the checkpoint does not fit the model: {found}. The model was not changed.")


def _kind(tensor: Tensor) -> object:
    """What a tensor of another dtype must share with this one to stand for it."""
    if tensor.is_floating_point() and tensor.dtype.itemsize > 1:  # formats of 8 bits cannot be computed with
        return "floating"
    return "complex" if tensor.is_complex() else tensor.dtype


def _refused(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """What the methods of converted modules say against values that fit otherwise."""
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        for config in applied_configs(module).values():
            if type(config).why_not_load is not MethodConfig.why_not_load:
                own = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
                if reason := config.why_not_load(module, own):
                    yield f"{name}: {reason}" if name else reason


def _optional_names(model: nn.Module) -> set[str]:
    """Names of the state dict's entries that the converted modules of `model` may lack, and that have any shape."""
    return {
        f"{name}.{key}".removeprefix(".")
        for name, module in model.named_modules(remove_duplicate=False)
        for config in applied_configs(module).values()
        for key in config.optional_keys
    }


def _listed(what: str, names: Any) -> list[str]:
    """One line that shows the first few of `names`, or nothing."""
    shown = sorted(names)
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return [f"{what}: {', '.join(shown[:_SHOWN])}{more}"] if shown else []


def fill(model: nn.Module, tensors: Mapping[str, Tensor], *, replace: bool) -> None:
    """Load `tensors`, which fit, into `model`: by copying into its own, or by new ones that take their places.

    Tied tensors stay tied, and `requires_grad` and the device stay, except that what was on meta goes to the CPU.
    Raises LoadError if a module refuses its values.
    """
    state = dict(tensors)
    if replace:
        made: dict[int, Tensor] = {}
        for name, own in model.state_dict(keep_vars=True).items():
            if name in state and isinstance(own, Tensor) and not name.endswith(_EXTRA_STATE):
                if id(own) not in made:
                    # A copy: safetensors maps the file, and a parameter should not depend on it.
                    value = state[name].clone().to("cpu" if own.is_meta else own.device)
                    parameter = isinstance(own, nn.Parameter)
                    made[id(own)] = nn.Parameter(value, requires_grad=own.requires_grad) if parameter else value
                state[name] = made[id(own)]
    try:
        model.load_state_dict(state, strict=False, assign=replace)
    except Exception as error:  # of a module's own `set_extra_state`, say
        raise LoadError(
            f"load: the model does not take the values: {error}. Its structure is as it was, but some of its values "
            "may be those of the file."
        ) from error
