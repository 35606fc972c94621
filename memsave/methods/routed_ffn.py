"""Routed feed-forward blocks: the hidden units in blocks, of which each token uses the best few.

Half of the blocks means half of the block's matrix products and half of its pre-activations. The function changes, so a
converted model is trained, or fine-tuned, as it is. Source: SPT, arXiv 2312.10365; the balance loss: Switch
Transformers, arXiv 2101.03961; blocks of units that are active together: MoEfication, arXiv 2110.01786.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from sys import float_info
from typing import Any, ClassVar

from torch import Tensor, nn

from .. import ops
from ..config import Guarantee, Survey, TargetedConfig, applied_configs
from ..nn.mlp_graph import looks_like_mlp, mlp_graph
from ..nn.routed_ffn.fitting import fit_routing
from ..nn.routed_ffn.module import RoutedFFN
from ..nn.routed_ffn.replacing import Fitted, dense, empty_routed_ffn, fill, roles, why_not_routed

CLUSTERINGS = ("contiguous", "coactivation")


@dataclass(frozen=True, kw_only=True)
class RoutedFFNConfig(TargetedConfig):
    """Gated and plain feed-forward blocks, recognized by what their forward does, of which tokens use a part.

    Args:
        blocks: into how many equal blocks the hidden units are divided.
        active: how many of them each token uses.
        balance_loss: weight of the loss that makes blocks serve equally many tokens; 0 for none. Its gradient is added
            in backward, so the training loop need not know of it.
        lora_rank: 0 (default): the weights are trained as before; above 0 they are frozen, and low-rank factors of this
            rank beside each of them are trained, with the router.
        lora_alpha: the product of the factors is multiplied by lora_alpha / lora_rank; None means lora_rank.
        clustering: "contiguous" (default): blocks of units that follow on each other, and a random router;
            "coactivation": blocks of units that are active for the same tokens, and a router fitted to that, by
            batches in `convert_model(..., calibration=batches)`.
        calibration_bytes: how many bytes of statistics may live at once, those of one block at least (None). More
            bytes mean fewer passes over the batches.

    Raises:
        ValueError: a value outside its range, or no target_modules.
    """

    name: ClassVar[str] = "routed_ffn"
    guarantee: ClassVar[Guarantee] = Guarantee.APPROXIMATE
    changes_keys: ClassVar[bool] = True
    docs: ClassVar[str] = "docs/routed_ffn.md"

    blocks: int = 4
    active: int = 2
    balance_loss: float = 0.01
    lora_rank: int = 0
    lora_alpha: float | None = None
    clustering: str = "contiguous"
    calibration_bytes: int | None = 2**28

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("blocks", 1), ("active", 1), ("lora_rank", 0)):
            if not _is_count(value := getattr(self, name), least):
                raise ValueError(f"RoutedFFNConfig.{name}: expected a whole number of at least {least}, got {value!r}")
        if self.active > self.blocks:
            raise ValueError(
                f"RoutedFFNConfig.active: expected at most blocks, which is {self.blocks}, got {self.active}"
            )
        if not (_is_number(self.balance_loss) and self.balance_loss >= 0):
            raise ValueError(
                f"RoutedFFNConfig.balance_loss: expected a number of at least 0, got {self.balance_loss!r}"
            )
        if self.lora_alpha is not None and not (_is_number(self.lora_alpha) and self.lora_alpha > 0):
            raise ValueError(f"RoutedFFNConfig.lora_alpha: expected a number above 0 or None, got {self.lora_alpha!r}")
        if self.lora_alpha is not None and not self.lora_rank:
            raise ValueError(f"RoutedFFNConfig.lora_alpha: expected lora_rank with it, got {self.lora_alpha!r} alone")
        if self.clustering not in CLUSTERINGS:
            raise ValueError(
                f"RoutedFFNConfig.clustering: expected one of {list(CLUSTERINGS)}, got {self.clustering!r}"
            )
        if self.calibration_bytes is not None and not _is_count(self.calibration_bytes, 1):
            raise ValueError(
                f"RoutedFFNConfig.calibration_bytes: expected a whole number or None, got {self.calibration_bytes!r}"
            )

    @property
    def calibrated(self) -> bool:
        return self.clustering == "coactivation"

    def candidate(self, module: nn.Module) -> bool:
        return looks_like_mlp(module)

    def why_not(self, module: nn.Module) -> str | None:
        for name, inner in module.named_modules():
            lossy = [c.name for c in applied_configs(inner).values() if c.guarantee is not Guarantee.EXACT]
            if lossy and lossy != [self.name]:
                return f"{f'its {name}' if name else 'it'} is converted by {', '.join(lossy)}; restore that first"
        return None if isinstance(module, RoutedFFN) else why_not_routed(module, self.blocks)

    def survey(
        self, model: nn.Module, targets: Sequence[tuple[str, nn.Module]], calibration: Iterable[Any] | None
    ) -> Survey:
        refused = {name: reason for name, module in targets if (reason := self._why_not_here(model, module))}
        state = {"permuted": self.calibrated}
        moved = {
            f"{name}.{linear}": "its weight moves into the routed block"
            for name, module in targets
            if name not in refused
            for linear in roles(mlp_graph(module)).values()
        }
        return Survey(refused, reasons=moved, states={name: state for name, _ in targets})

    def _why_not_here(self, model: nn.Module, module: nn.Module) -> str | None:
        """What only the whole model shows, or matters only where values are made."""
        linears = {name: module.get_submodule(name) for name in roles(mlp_graph(module)).values()}
        mine = {id(p): name for name, linear in linears.items() for p in linear.parameters()}
        if any(p.is_meta for linear in linears.values() for p in linear.parameters()):
            return "its weights are on the meta device and have no values; load the weights first"
        own = {id(inner) for inner in module.modules()}
        others = ((name, m) for name, m in model.named_modules() if id(m) not in own)
        for name, other in others:
            for parameter in other._parameters.values():
                if parameter is not None and id(parameter) in mine:
                    return f"the weight of its {mine[id(parameter)]} is tied with one of {name}"
        return None

    def carry_out(
        self,
        model: nn.Module,
        targets: Sequence[tuple[str, nn.Module]],
        survey: Survey | None,
        calibration: Iterable[Any] | None,
        convert: Callable[[str, Callable[[nn.Module], nn.Module]], None],
    ) -> None:
        fitted: dict[str, Fitted] = {}
        if self.calibrated and calibration is not None:
            try:
                fitted = fit_routing(model, dict(targets), calibration, self.blocks, self.calibration_bytes)
            except ValueError as error:
                raise ValueError(f"convert_model: calibration: {error}. The model was not changed.") from error
        for name, _ in targets:
            convert(name, lambda module, name=name: self._routed(module, fitted.get(name)))  # type: ignore[misc]

    def convert(self, module: nn.Module) -> nn.Module:
        return self._routed(module, None)

    def _routed(self, module: nn.Module, fitted: Fitted | None) -> RoutedFFN:
        return fill(self._empty(module, permuted=fitted is not None), module, fitted)

    def _empty(self, module: nn.Module, *, permuted: bool) -> RoutedFFN:
        alpha = self.lora_rank if self.lora_alpha is None else self.lora_alpha
        return empty_routed_ffn(
            module, self.blocks, self.active, self.balance_loss, self.lora_rank, alpha, permuted=permuted
        )

    def module_state(self, module: nn.Module) -> dict[str, Any]:
        return {"permuted": isinstance(module, RoutedFFN) and module.unit_order is not None}

    def rebuild(self, module: nn.Module, state: Mapping[str, Any]) -> nn.Module:
        return self._empty(module, permuted=state["permuted"])

    def why_not_load(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> str | None:
        order = tensors.get("unit_order")
        if order is None or order.sort().values.tolist() == list(range(len(order))):
            return None
        return f"unit_order is no order of its {len(order)} hidden units"

    def restore(self, module: nn.Module, *, adapters: str | None = None) -> nn.Module:
        assert isinstance(module, RoutedFFN)
        return dense(module, merge=adapters != "drop")

    def backend(self, module: nn.Module) -> str:
        gated = isinstance(module, RoutedFFN) and module.layout.gated
        op = "gated_activation" if gated else "activation"
        return ops.serving(op, {p.device.type for p in module.parameters()})


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= float_info.max


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
