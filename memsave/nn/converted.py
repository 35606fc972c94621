"""Converting a module in place: its class becomes a subclass of its own class, and back.

The parameters, the hooks and every reference to the module survive, and `isinstance` checks go on working. What was
applied is kept in the instance: `_memsave` maps each method's name to its config, `_memsave_parts` holds the merged
parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import nn


class Applied(Protocol):
    """What this file needs to know of a method's config."""

    @property
    def name(self) -> str: ...

    def parts(self, module: nn.Module) -> Mapping[str, object]: ...


class Converted:
    """Mixin of every class that memsave gives to a module; stands before the original class in the bases.

    Subclasses implement `forward`, `reference` (the same mathematics in plain autograd) and `kept_bytes`.
    """

    _memsave_base: ClassVar[type[nn.Module]]
    _memsave_mixin: ClassVar[type[Converted]]
    _memsave: dict[str, Any]
    _memsave_parts: dict[str, Any]

    def reference(self, x: torch.Tensor) -> torch.Tensor:
        """The same function and gradients as `forward`, written in plain autograd and keeping what that keeps."""
        raise NotImplementedError

    def kept_bytes(self, input_shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """Bytes that one training forward keeps for backward, parameters and buffers not counted."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        configs = ", ".join(str(config) for config in self._memsave.values())
        return ", ".join(filter(None, [super().extra_repr(), f"memsave: {configs}"]))  # type: ignore[misc]

    def __repr__(self) -> str:
        text = super().__repr__()
        # Classes with a __repr__ of their own, such as Conv1D, do not ask for extra_repr.
        return text if "memsave: " in text else f"{text} ({self.extra_repr()})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so it is rebuilt from its two halves instead of being looked up by name.
        state = super().__reduce_ex__(protocol)[2:]
        return (_new_instance, (self._memsave_mixin, self._memsave_base), *state)


_classes: dict[tuple[type, type], type] = {}


def converted_class(mixin: type[Converted], base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `base` that puts `mixin` before it; the same object at every call."""
    if (mixin, base) not in _classes:
        # The name keeps "RMSNorm" or "LayerNorm": trainers and weight initializers look for it.
        attributes = {
            "_memsave_base": base,
            "_memsave_mixin": mixin,
            "__module__": mixin.__module__,
            "__doc__": base.__doc__,
        }
        _classes[mixin, base] = type(f"Memsave{base.__name__}", (mixin, base), attributes)
    return _classes[mixin, base]


def _new_instance(mixin: type[Converted], base: type[nn.Module]) -> nn.Module:
    cls = converted_class(mixin, base)
    return cls.__new__(cls)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that `module` had before memsave, or has now."""
    return getattr(type(module), "_memsave_base", type(module))


def is_watched(module: nn.Module, *, besides: str = "") -> bool:
    """Whether hooks watch the calls of `module`, or something stands in for its forward: it must be called as it was.

    besides: the name of hook functions that do not count.
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    watching = (hook for each in hooks for hook in each.values())
    return "forward" in module.__dict__ or any(not besides or getattr(h, "__name__", "") != besides for h in watching)


def why_not_in_place(module: nn.Module) -> str | None:
    """Say why the class of `module` cannot be swapped without losing something, or return None."""
    cls = original_class(module)
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "its parameters are made by its first forward, which changes its class; run the model once first"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance, which would bypass the new class"
    if getattr(module, "parametrizations", None):
        return "it is parametrized (torch.nn.utils.parametrize), which swaps its class too"
    if module._compiled_call_impl is not None:
        return "it was compiled in place by module.compile(); convert first, compile afterwards"
    if cls.__reduce_ex__ is not object.__reduce_ex__ or cls.__reduce__ is not object.__reduce__:
        return f"{cls.__name__} defines its own pickling"
    if any("__slots__" in c.__dict__ for c in cls.__mro__ if c not in nn.Module.__mro__):
        return f"{cls.__name__} has __slots__"
    return None


def why_not_back(module: nn.Module) -> str | None:
    """Say why the class of a converted `module` cannot be put back, or return None."""
    if type(module) is not converted_class(module._memsave_mixin, original_class(module)):  # type: ignore[arg-type]
        return f"its class was changed to {type(module).__name__} since (parametrize, fully_shard); undo that first"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance since (accelerate's hooks do that); undo that first"
    return None


def swap(module: nn.Module, mixin: type[Converted], config: Applied) -> nn.Module:
    """Give `module` the class `mixin` + its own, or add `config` to one that has it; returns `module`."""
    applied = {**module.__dict__.get("_memsave", {}), config.name: config}
    parts = _merged_parts(module, applied)
    module.__class__ = converted_class(mixin, original_class(module))
    module.__dict__.update(_memsave=applied, _memsave_parts=parts)
    return module


def unswap(module: nn.Module, name: str) -> nn.Module:
    """Take the method `name` off `module`; without any method left it has its old class again. Returns `module`."""
    applied = {k: v for k, v in module.__dict__["_memsave"].items() if k != name}
    if applied:
        module.__dict__.update(_memsave=applied, _memsave_parts=_merged_parts(module, applied))
    else:
        module.__class__ = original_class(module)
        del module.__dict__["_memsave"], module.__dict__["_memsave_parts"]
    return module


def _merged_parts(module: nn.Module, applied: Mapping[str, Applied]) -> dict[str, object]:
    return {part: setting for config in applied.values() for part, setting in config.parts(module).items()}
