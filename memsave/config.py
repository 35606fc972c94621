"""The contract of a method: a config that says what it targets, what it guarantees, and how it converts a module.

A config is data: frozen, keyword-only, validated when it is made, and round-trips through JSON. `convert.py` works
with what is declared here and knows no method by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from typing import Any, ClassVar

from torch import Tensor, nn


class Guarantee(str, Enum):
    """What a method promises about the numbers."""

    EXACT = "exact"
    """Same function and same gradients, up to rounding."""
    UNBIASED_GRAD = "unbiased gradient"
    """Same function; the gradient is right in expectation."""
    ADAPTER = "adapter"
    """The base is frozen; new parameters are trained."""
    APPROXIMATE = "approximate"
    """The function changes."""

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Base of every method's config. Subclasses are frozen, keyword-only dataclasses in `memsave/methods/`.

    A method with `scope = "modules"` subclasses `TargetedConfig`. A method with `scope = "model"` subclasses this
    class, and its `convert` receives the whole model.
    """

    name: ClassVar[str]
    guarantee: ClassVar[Guarantee]
    scope: ClassVar[str] = "model"
    default: ClassVar[bool] = False
    """Whether `convert_model(model)` without configs applies the method."""
    changes_keys: ClassVar[bool] = False
    """Whether converted modules have other `state_dict` keys or shapes than plain ones: then `save_pretrained` of the
    model raises, and `memsave.save` and `memsave.load` keep it."""
    replaces_itself: ClassVar[bool] = False
    """Whether converting a module again with other settings of the method replaces the earlier ones: `convert` must
    then work on a module that the method has converted. A call without configs leaves such a module as it is."""
    docs: ClassVar[str] = ""

    @property
    def calibrated(self) -> bool:
        """Whether the method needs batches of data: `convert_model(..., calibration=batches)`."""
        return False

    @property
    def irrevocable(self) -> bool:
        """Whether a conversion that fails midway leaves what it has converted, because the originals are given up."""
        return False

    @property
    def optional_keys(self) -> tuple[str, ...]:
        """Keys that a converted module's `state_dict` may have or lack, with tensors of any shape."""
        return ()

    def applies(self, model: nn.Module) -> bool:
        """Whether `model` has anything that this method of model scope is about, judged by classes alone."""
        return True

    def why_not(self, module: nn.Module) -> str | None:
        """Say in words why `module` cannot be converted, or return None. Changes nothing."""
        return None

    def missed(self, module: nn.Module) -> list[str]:
        """Targets of a method of model scope that lead to nothing in `module`, each in words with what was meant."""
        return []

    def within(self, module: nn.Module) -> Sequence[tuple[str, nn.Module]]:
        """What a method of model scope converts within `module`, by names from there on; only the report asks."""
        return [("", module)]

    @property
    def label(self) -> str:
        """The name by which messages call the config."""
        return type(self).__name__

    def parts(self, module: nn.Module) -> Mapping[str, object]:
        """Name the parts of a shared module (see `nn/linear.py`) that this method sets, with their settings.

        Two methods conflict on a module only when they set the same part differently. The substrate sets none.
        """
        return {}

    def survey(
        self, model: nn.Module, targets: Sequence[tuple[str, nn.Module]], calibration: Iterable[Any] | None
    ) -> Survey | None:
        """Look at all that is to be converted, by name, before the first module is; None for a method that need not.

        Changes nothing. `convert_model` calls it after planning, also for a dry run, and before anything is converted.

        Raises:
            MemsaveError or ValueError: it cannot be converted, or the batches are not as the method needs them.
        """
        return None

    def carry_out(
        self,
        model: nn.Module,
        targets: Sequence[tuple[str, nn.Module]],
        survey: Survey | None,
        calibration: Iterable[Any] | None,
        convert: Callable[[str, Callable[[nn.Module], nn.Module]], None],
    ) -> None:
        """Convert the targets, in any order: `convert(name, how)` converts one by calling `how` with the module."""
        for name, _ in targets:
            convert(name, self.convert)

    def convert(self, module: nn.Module) -> nn.Module:
        """Convert `module`: in place (then the same object is returned), or by a new module for all its parents.

        It either succeeds or raises and leaves `module` as it was. A new module takes over the hooks of `module`; its
        training flag and its place in the model are the caller's work.
        """
        raise TypeError(f"{type(self).__name__} does not define convert(module)")

    def why_not_restore(self, module: nn.Module) -> str | None:
        """Say in words why `module` cannot be restored as it is now, or return None. Changes nothing."""
        return None

    def restore(self, module: nn.Module, *, adapters: str | None = None) -> nn.Module:
        """Undo `convert` on a module that it returned; give back the original, or what stands for it.

        It either succeeds or raises and leaves `module` as it was. One that gives back another object does not change
        `module`, so that it can be put back if a later module cannot be restored. `adapters` is "merge" or "drop".
        """
        raise TypeError(f"{type(self).__name__} does not define restore(module)")

    def module_state(self, module: nn.Module) -> dict[str, Any]:
        """What `rebuild` must know of the converted `module` besides this config: JSON data, such as the rank it chose.

        Tensors do not belong here: parameters, buffers and tensors from `get_extra_state` are saved as they are.
        """
        return {}

    def rebuild(self, module: nn.Module, state: Mapping[str, Any]) -> nn.Module:
        """Convert a plain `module` as `convert` does, into the structure from which `module_state` gave `state`.

        The values are loaded afterwards, so any will do; `module` may be on the meta device.
        """
        return self.convert(module)

    def why_not_load(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> str | None:
        """Say in words why the converted `module` cannot take `tensors`, its part of a file by its own names, or None.

        Names, shapes and kinds of numbers are known to fit. What a method reads as positions, or compares with other
        values, is to be checked here: once values are being loaded, an error comes too late to leave the model alone.
        """
        return None

    def backend(self, module: nn.Module) -> str:
        """Name the kernels that serve `module` now: "torch", "native", "triton" or "reference"."""
        return "torch"

    def to_dict(self) -> dict[str, Any]:
        """The config as plain data; `MethodConfig.from_dict` reads it back."""
        return {"method": self.name} | {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def to_json(self) -> str:
        """The config as JSON; `MethodConfig.from_json` reads it back."""
        return json.dumps(self.to_dict())

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> MethodConfig:
        """Make the config that `to_dict` described. Raises ValueError for an unknown method or field."""
        if not isinstance(data, Mapping):
            raise ValueError(f"expected a method and its settings by name, got {data!r}")
        settings = dict(data)
        name = settings.pop("method", None)
        known = {cls.name: cls for cls in _subclasses(MethodConfig) if "name" in cls.__dict__}
        if not isinstance(name, str) or name not in known:
            raise ValueError(f"method {name!r} is unknown; expected one of {sorted(known)}")
        cls = known[name]
        if strange := set(settings) - {f.name for f in fields(cls)}:
            raise ValueError(f"{cls.__name__} has no field {sorted(strange)}; it has {[f.name for f in fields(cls)]}")
        return cls(**settings)

    @staticmethod
    def from_json(text: str) -> MethodConfig:
        """Make the config that `to_json` wrote. Raises ValueError for any other text."""
        try:
            data = json.loads(text)
        except RecursionError as error:
            raise ValueError(f"a config is one object; this text is nested too deeply: {error}") from None
        return MethodConfig.from_dict(data)

    def __str__(self) -> str:
        settings = {f.name: getattr(self, f.name) for f in fields(self)}
        shown = ", ".join(f"{name}={value!r}" for name, value in settings.items() if value is not None)
        return f"{type(self).__name__}({shown})"


@dataclass(frozen=True)
class Survey:
    """What a method found when it looked at all its targets together, by their names.

    Attributes:
        refused: targets that stay as they are after all, and why.
        around: further modules, around the targets, that are converted after them.
        reasons: modules around the targets that are not, and why.
        states: what `rebuild` must know to convert each target and each module around one; see `module_state`.
        converted: what a method of model scope converts, by name; None: what `within` says of the model.
        notes: what the report says besides, each a paragraph.
    """

    refused: Mapping[str, str] = field(default_factory=dict)
    around: Sequence[tuple[str, nn.Module]] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)
    states: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    converted: Sequence[tuple[str, nn.Module]] | None = None
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class TargetedConfig(MethodConfig):
    """A method that converts single modules.

    Args:
        target_modules: which modules, by PEFT's rule: a string is a regular expression that must match the whole
            qualified name; a list holds exact names or dotted suffixes (`"q_proj"` matches `layers.0.attn.q_proj`), and
            every entry must match something. None means every module that the method can convert, and is allowed only
            where the guarantee is `EXACT`.
        exclude_modules: modules to leave out, by the same rule; it wins over `target_modules`.
    """

    scope: ClassVar[str] = "modules"

    target_modules: str | Collection[str] | None = None
    exclude_modules: str | Collection[str] | None = None

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            object.__setattr__(self, name, _checked_targets(type(self).__name__, name, getattr(self, name)))
        if self.target_modules is None and self.guarantee is not Guarantee.EXACT:
            raise ValueError(
                f"{type(self).__name__} changes results ({self.guarantee}), so it must be aimed: give target_modules, "
                "a list of module names or a regular expression; r'.*' means every module that it can convert"
            )

    def candidate(self, module: nn.Module) -> bool:
        """Whether `module` is of a kind that this method converts (judged by its class and structure alone)."""
        raise TypeError(f"{type(self).__name__} does not define candidate(module)")

    def companions(self, module: nn.Module) -> Sequence[str]:
        """Names, from `module` on, of modules within it that are converted with it, whether they are targets or not."""
        return ()

    def fits(self, module: nn.Module) -> bool:
        """Whether `convert` takes a module of this kind: a candidate, or a companion of one."""
        return self.candidate(module)

    def found_in(self, modules: Collection[nn.Module]) -> list[nn.Module]:
        """Which of all the `modules` of a model are meant where no target_modules are given: every candidate."""
        return [module for module in modules if self.candidate(module)]


def applied_configs(module: nn.Module) -> dict[str, MethodConfig]:
    """The configs that `module` itself is converted by, by method name, oldest first."""
    return dict(module.__dict__.get("_memsave", {}))


def _subclasses(cls: type[MethodConfig]) -> Iterator[type[MethodConfig]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def _checked_targets(owner: str, field: str, value: object) -> str | tuple[str, ...] | None:
    """Validate a target filter; lists become tuples so that the config can be hashed."""
    if value is None:
        return None
    if isinstance(value, str) and value:
        try:
            re.compile(value)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{owner}.{field}: {value!r} is not a regular expression: {error}") from None
        return value
    if isinstance(value, (list, tuple, set, frozenset)) and value and all(isinstance(v, str) and v for v in value):
        return tuple(sorted(value)) if isinstance(value, (set, frozenset)) else tuple(value)
    raise ValueError(
        f"{owner}.{field}: expected a regular expression or a non-empty list of module names, got {value!r}"
    )


def matches(targets: str | Collection[str], fqn: str) -> list[str]:
    """The entries of `targets` that match the qualified name `fqn` (a lone string is one entry)."""
    if isinstance(targets, str):
        return [targets] if re.fullmatch(targets, fqn) else []
    return [entry for entry in targets if fqn == entry or fqn.endswith(f".{entry}")]
