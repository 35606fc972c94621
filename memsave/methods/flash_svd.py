"""FlashSVD: linears as two low-rank factors, and attention and feed-forward blocks that stream in rank space.

A weight W (O, D) becomes second (O, R) first (R, D), the best of rank R for the weight, or for the inputs of some
batches. Without gradients, attention then runs a few heads at a time and feed-forward blocks some tokens at a time, so
that neither queries, keys, values nor hidden units are ever whole, and nothing is computed twice. Sources: FlashSVD,
arXiv 2508.01506; whitening: SVD-LLM, arXiv 2403.07378.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from sys import float_info
from typing import Any, ClassVar

from torch import Tensor, nn

from ..config import Guarantee, Survey, TargetedConfig, applied_configs
from ..nn.calibrating import progress
from ..nn.converted import swap, unswap, why_not_back, why_not_in_place
from ..nn.linear import is_linear
from ..nn.low_rank.attention import attention_projections
from ..nn.low_rank.heads import HeadStreaming
from ..nn.low_rank.layout import HeadLayout
from ..nn.low_rank.linear import LowRankLinear
from ..nn.low_rank.moments import second_moments
from ..nn.low_rank.planning import LowRankPlan, low_rank_plan
from ..nn.low_rank.replacing import dense, empty_low_rank, low_rank, structure
from ..nn.low_rank.rows import RowWise, RowWork

WHITEN = ("none", "activation")
ALLOCATIONS = ("uniform", "energy")


@dataclass(frozen=True, kw_only=True)
class FlashSVDConfig(TargetedConfig):
    """Low-rank factors for `nn.Linear` and `Conv1D`, and streaming execution of what is around them.

    Exactly one of rank, ratio and energy is given. Ranks from 64 on that follow from a ratio or an energy are multiples
    of 8, which matrix products prefer; by a ratio they are rounded down. A linear whose factors would not be smaller
    than its weight stays as it is, and the report says so.

    Args:
        rank: R of every linear.
        ratio: what is kept of the parameters of each weight, in (0, 1]; with allocation="energy", of all of them.
        energy: the least R whose singular values hold this share of the sum of squares, in (0, 1].
        allocation: "uniform" (default), or "energy": the ranks of all targets share the budget `ratio`, and are spent
            where a parameter holds most of its weight's energy.
        whiten: "none" (default): the least error of the weight; "activation": the least error of the output on the
            batches in `convert_model(..., calibration=batches)`.
        damping: part of the mean second moment that is added to each feature's, so that features that the batches
            never use still count.
        per_head: factors of each head of queries, keys and values of their own, with R per head; a ratio or an energy
            counts as without.
        fuse: whether attention and feed-forward blocks stream, where they can.
        kernel: whether feed-forward blocks that are one module run as one op, in which hidden units exist on the chip
            alone. On a GPU that is a Triton kernel, which has not been measured there yet; off by default.
        piece_bytes: how many bytes the widest tensor of one chunk of tokens may take; a group of heads may take twice
            that. None means 4 MiB on the CPU and 64 MiB elsewhere. Larger pieces are quicker.
        keep_originals: whether the plain weights live until all are converted, so that an error undoes everything.
            False gives each one up at once: the peak stays near one layer above the model.
        calibration_bytes: how many bytes of second moments may live at once, those of the largest at least (None).
            More bytes mean fewer passes over the batches. Each pass reads the model as it is then: what earlier passes
            served is compressed.

    Raises:
        ValueError: a value outside its range, not exactly one of rank, ratio and energy, or no target_modules.
    """

    name: ClassVar[str] = "flash_svd"
    guarantee: ClassVar[Guarantee] = Guarantee.APPROXIMATE
    changes_keys: ClassVar[bool] = True
    docs: ClassVar[str] = "docs/flash_svd.md"

    rank: int | None = None
    ratio: float | None = None
    energy: float | None = None
    allocation: str = "uniform"
    whiten: str = "none"
    damping: float = 1e-6
    per_head: bool = False
    fuse: bool = True
    kernel: bool = False
    piece_bytes: int | None = None
    keep_originals: bool = True
    calibration_bytes: int | None = 2**28

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = {name: getattr(self, name) for name in ("rank", "ratio", "energy")}
        given = [name for name, value in sizes.items() if value is not None]
        if len(given) != 1:
            raise ValueError(f"FlashSVDConfig: expected exactly one of rank, ratio and energy, got {given or 'none'}")
        if self.rank is not None and not _is_count(self.rank):
            raise ValueError(f"FlashSVDConfig.rank: expected a whole number of at least 1, got {self.rank!r}")
        for name in ("ratio", "energy"):
            if sizes[name] is not None and not (_is_number(sizes[name]) and 0 < sizes[name] <= 1):
                raise ValueError(f"FlashSVDConfig.{name}: expected a fraction in (0, 1], got {sizes[name]!r}")
        if self.allocation not in ALLOCATIONS or (self.allocation == "energy" and (self.ratio is None)):
            raise ValueError(
                f"FlashSVDConfig.allocation: expected one of {list(ALLOCATIONS)}, 'energy' with a ratio, got "
                f"{self.allocation!r} with {given[0]}"
            )
        if self.whiten not in WHITEN:
            raise ValueError(f"FlashSVDConfig.whiten: expected one of {list(WHITEN)}, got {self.whiten!r}")
        if not (_is_number(self.damping) and 0 <= self.damping <= float_info.max):
            raise ValueError(f"FlashSVDConfig.damping: expected a number of at least 0, got {self.damping!r}")
        if self.per_head and (self.energy is not None or self.allocation == "energy"):
            raise ValueError("FlashSVDConfig.per_head: expected rank or a uniform ratio with it, got energy")
        for name in ("per_head", "fuse", "kernel", "keep_originals"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"FlashSVDConfig.{name}: expected True or False, got {getattr(self, name)!r}")
        for name in ("piece_bytes", "calibration_bytes"):
            if (value := getattr(self, name)) is not None and not _is_count(value):
                raise ValueError(f"FlashSVDConfig.{name}: expected a whole number or None, got {value!r}")

    @property
    def calibrated(self) -> bool:
        return self.whiten == "activation"

    @property
    def irrevocable(self) -> bool:
        return not self.keep_originals

    def candidate(self, module: nn.Module) -> bool:
        return is_linear(module)

    def fits(self, module: nn.Module) -> bool:
        return True  # also what is around a linear: what serves it was tried

    def why_not(self, module: nn.Module) -> str | None:
        if not is_linear(module):
            return None
        lossy = [c.name for c in applied_configs(module).values() if c.guarantee is not Guarantee.EXACT]
        if lossy and lossy != [self.name]:
            return f"it is converted by {', '.join(lossy)}; restore that first"
        if reason := _why_not_weight(module):
            return reason
        if getattr(module, "parametrizations", None):
            return "it is parametrized (torch.nn.utils.parametrize), and its weight is made anew at each access"
        return "its forward was replaced on the instance" if "forward" in module.__dict__ else None

    def survey(
        self, model: nn.Module, targets: Sequence[tuple[str, nn.Module]], calibration: Iterable[Any] | None
    ) -> Survey:
        chosen = self.energy is not None or self.allocation == "energy"
        if chosen and any(applied_configs(module).get(self.name) == self for module in model.modules()):
            # Ranks that are chosen by values would be others now that the rest of the model is another.
            left = "an earlier call with the same settings has left it as it is"
            return Survey({name: left for name, _ in targets})
        if self.fuse:
            _register_attention(model)
        plan = low_rank_plan(model, dict(targets), self, self._moments(model, dict(targets), calibration))
        around = [(name, model.get_submodule(name)) for name in (*plan.heads, *plan.rows)]
        reasons = dict(plan.reasons)
        for name, module in list(around):
            if reason := self._why_not_around(module):
                reasons[name] = f"not fused: {reason}"
        around = [(name, module) for name, module in around if name not in reasons]
        return Survey(plan.refused, around, reasons, _states(plan))

    def _moments(
        self, model: nn.Module, targets: Mapping[str, nn.Module], calibration: Iterable[Any] | None
    ) -> Callable[[Callable[[str, Tensor | None], None]], None]:
        """Calls its argument with every target's name and its second moment, or None."""

        def each(use: Callable[[str, Tensor | None], None]) -> None:
            if not self.calibrated or calibration is None:
                for name in targets:
                    use(name, None)
                return

            def use_all(names: tuple[str, ...], moment: Tensor) -> None:
                for name in names:
                    use(name, moment)

            try:
                second_moments(model, targets, calibration, use_all, budget_bytes=self.calibration_bytes)
            except ValueError as error:
                raise ValueError(f"convert_model: calibration: {error}") from error

        return each

    def _why_not_around(self, module: nn.Module) -> str | None:
        others = [c.name for c in applied_configs(module).values() if c.name != self.name]
        return f"it is converted by {', '.join(others)}" if others else why_not_in_place(module)

    def carry_out(
        self,
        model: nn.Module,
        targets: Sequence[tuple[str, nn.Module]],
        survey: Survey | None,
        calibration: Iterable[Any] | None,
        convert: Callable[[str, Callable[[nn.Module], nn.Module]], None],
    ) -> None:
        assert survey is not None
        states = survey.states

        def compress(name: str, moment: Tensor | None) -> None:
            def how(linear: nn.Module) -> nn.Module:
                made = low_rank(linear, **states[name], moment=moment, damping=self.damping)
                if not self.keep_originals:
                    linear._parameters["weight"] = None
                return made

            convert(name, how)

        linears = {name: module for name, module in targets if "rank" in states[name]}
        if self.calibrated:
            self._moments(model, linears, calibration)(compress)
        else:
            with progress(linears, "low-rank factors", "layer", delay_seconds=2.0) as names:
                for name in names:
                    compress(name, None)
        for name, _ in targets:
            if name not in linears:
                convert(name, lambda module, name=name: self.rebuild(module, states[name]))  # type: ignore[misc]

    def convert(self, module: nn.Module) -> nn.Module:
        raise TypeError("FlashSVDConfig converts all targets of a model together; see carry_out")

    def module_state(self, module: nn.Module) -> dict[str, Any]:
        if isinstance(module, LowRankLinear):
            return dict(structure(module))
        if isinstance(module, HeadStreaming):
            return {"heads": module._layout.to_dict()}
        return {"rows": module._work.to_dict()}  # type: ignore[operator, union-attr]

    def rebuild(self, module: nn.Module, state: Mapping[str, Any]) -> nn.Module:
        if "rank" in state:
            return empty_low_rank(module, **state)
        if "heads" in state:
            layout = HeadLayout.from_dict(state["heads"])
            _register_attention(module)
            swap(module, HeadStreaming, self)
            module.__dict__["_memsave_heads"] = layout
        else:
            work = RowWork.from_dict(state["rows"])
            swap(module, RowWise, self)
            module.__dict__["_memsave_rows"] = work
        return module

    def why_not_restore(self, module: nn.Module) -> str | None:
        return None if isinstance(module, LowRankLinear) else why_not_back(module)

    def restore(self, module: nn.Module, *, adapters: str | None = None) -> nn.Module:
        if isinstance(module, LowRankLinear):
            return dense(module)
        for name in ("_memsave_heads", "_memsave_rows"):
            module.__dict__.pop(name, None)
        return unswap(module, self.name)

    def backend(self, module: nn.Module) -> str:
        if is_linear(module) or isinstance(module, LowRankLinear):
            return "torch"
        return "by heads" if any(attention_projections(module)) else "by rows"

    def __str__(self) -> str:
        said = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return f"FlashSVDConfig({', '.join(f'{name}={value!r}' for name, value in said.items())})"

    def __reduce__(self) -> tuple[Callable[..., FlashSVDConfig], tuple[dict[str, Any]]]:
        # A process that reads a pickled model must know the attention function that its modules ask for.
        return _registered, ({f.name: getattr(self, f.name) for f in fields(self)},)


def _registered(settings: dict[str, Any]) -> FlashSVDConfig:
    with suppress(ImportError):
        from ..integrations import head_groups

        head_groups.register()
    return FlashSVDConfig(**settings)


def _register_attention(model: nn.Module) -> None:
    """Make the attention function of groups of heads known, where modules of transformers may ask for it."""
    if any(getattr(getattr(m, "config", None), "_attn_implementation", None) is not None for m in model.modules()):
        from ..integrations import head_groups

        head_groups.register()


def _states(plan: LowRankPlan) -> dict[str, Mapping[str, Any]]:
    states: dict[str, Mapping[str, Any]] = dict(plan.linears)
    states |= {name: {"heads": layout.to_dict()} for name, layout in plan.heads.items()}
    return states | {name: {"rows": work.to_dict()} for name, work in plan.rows.items()}


def _why_not_weight(module: nn.Module) -> str | None:
    weight = module.weight
    if type(weight) not in (nn.Parameter, Tensor):
        return f"its weight is a {type(weight).__name__} (quantized or sharded), which has no singular values to keep"
    assert isinstance(weight, Tensor)
    if weight.is_meta:
        return "its weight is on the meta device and has no values; load the weights first"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}; expected a floating-point one"
    return None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
