"""Applying a plan: module by module, with a log that puts the model back as it was on any exception."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from torch import nn

from .config import MethodConfig, TargetedConfig, applied_configs
from .errors import ConflictError
from .guard import guard_saving

_UNCHANGED = "The model was not changed."


class Change(NamedTuple):
    name: str
    module: nn.Module
    config: MethodConfig


class Application:
    """Converts one module at a time; as a context manager, it undoes all of it on any exception.

    What a config calls `irrevocable` stays: its originals are gone, and the model is left with what was converted.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._current: dict[str, nn.Module] = {}
        self._undo: list[Callable[[], None]] = []
        self._irrevocable: list[str] = []

    def __enter__(self) -> Application:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            return
        for step in reversed(self._undo):
            step()
        if self._irrevocable:
            guard_saving(self._model)
            warnings.warn(
                f"memsave: {len(self._irrevocable)} modules, {self._irrevocable[0]} first, had been converted and "
                "given up their originals when the conversion failed; they stay converted, and the rest is as before",
                stacklevel=2,
            )

    def convert(self, change: Change, how: Callable[[nn.Module], nn.Module]) -> None:
        """Convert the module of `change` by calling `how` with it."""
        name, module, config = change
        old = self._current.get(name, module)
        if old is not module and isinstance(config, TargetedConfig) and not config.fits(old):
            other = next(iter(applied_configs(old).values()), "another method")
            raise ConflictError(f"{other} replaces {name}, so {config} cannot convert it. {_UNCHANGED}")
        earlier = applied_configs(old).get(config.name)
        new = how(old)
        if config.irrevocable and new is not old:
            self._irrevocable.append(name)
        else:
            model = self._model  # without a reference to self, which would be a cycle around the model
            self._undo.append(lambda: _put_back(model, new, old, config, earlier))
        if new is not old:
            if config.scope == "model":
                raise TypeError(f"{config}: a method of model scope must return the model itself")
            new.train(old.training)
            _replace(self._model, old, new)
        new.__dict__.setdefault("_memsave", {})[config.name] = config
        self._current[name] = new

    def finish(self) -> None:
        """To be called when everything is converted."""
        guard_saving(self._model)


def _convert(change: Change, module: nn.Module) -> nn.Module:
    return change.config.convert(module)


def apply_changes(
    model: nn.Module,
    changes: Iterable[Change],
    convert: Callable[[Change, nn.Module], nn.Module] = _convert,
) -> None:
    """Convert one module at a time; on any exception, also of the iterable, undo all of it."""
    with Application(model) as application:
        for change in changes:
            application.convert(change, partial(convert, change))
        application.finish()


def _put_back(
    model: nn.Module, new: nn.Module, old: nn.Module, config: MethodConfig, earlier: MethodConfig | None
) -> None:
    if new is old and earlier is not None:
        earlier.convert(new).__dict__["_memsave"][config.name] = earlier
    elif new is old:
        config.restore(new, adapters="drop")
        _forget(new, config)
    else:
        _replace(model, new, old)


def unapply_changes(model: nn.Module, changes: Sequence[Change], adapters: str | None) -> None:
    """Restore one module at a time; on any exception convert again what was restored."""
    current: dict[int, nn.Module] = {}
    undo: list[Callable[[], None]] = []
    try:
        for _, module, config in changes:
            new = current.get(id(module), module)
            record = applied_configs(new)
            old = config.restore(new, adapters=adapters)
            undo.append(lambda old=old, new=new, c=config, r=record: _convert_again(model, old, new, c, r))  # type: ignore[misc]
            if old is not new:
                old.train(new.training)
                _replace(model, new, old)
            _forget(old, config)
            current[id(module)] = old
        guard_saving(model)
    except BaseException:
        for step in reversed(undo):
            step()
        raise


def _convert_again(
    model: nn.Module, old: nn.Module, new: nn.Module, config: MethodConfig, record: dict[str, MethodConfig]
) -> None:
    """`record` is what was applied before, oldest first."""
    if new is old:
        config.convert(old).__dict__["_memsave"] = record
    else:
        _replace(model, old, new)


def _forget(module: nn.Module, config: MethodConfig) -> None:
    """Drop the record of `config` where the method keeps none of its own."""
    record = module.__dict__.get("_memsave")
    if record is not None:
        record.pop(config.name, None)
        if not record:
            del module.__dict__["_memsave"]


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` is a child, also in the plain lists that some modules keep of theirs, and call."""
    for parent, name in list(_places(model, old)):
        setattr(parent, name, new)
        for value in parent.__dict__.values():
            if type(value) is list and any(item is old for item in value):
                value[:] = [new if item is old else item for item in value]


def _places(model: nn.Module, child: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for parent in model.modules():
        for name, module in parent._modules.items():
            if module is child:
                yield parent, name
