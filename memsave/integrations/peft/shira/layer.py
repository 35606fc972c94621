"""The layer of a SHiRA adapter: a linear whose weight holds the trained values at the masked entries.

x is (..., D); W (O, D), or (D, O) for Conv1D; K masked entries; per adapter `values` (K,) Parameter (what is added),
`mask` (bytes,) uint8 (the entries, or the seed that draws them), `indices` (K,) int32 made of it, and while W holds the
values, `originals` (K,) of W's dtype.

W holds the values of the active adapters at all times (`held_weight.py` says how), so that a forward is the linear's
own, one matrix product. It reads the values of no other module, and only the values' gradients are added to it.
"""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.save_and_load import get_peft_model_state_dict
from torch import Tensor, nn

from .... import ops
from ....nn.masked_values import Masked, sparse_linear, with_gradient_of_values
from ....nn.rows import KeepRows, kept_bytes
from .config import SHiRAConfig
from .held_weight import HeldWeight
from .stored_mask import StoredMask


class SHiRALinear(nn.Module, BaseTunerLayer):
    """`nn.Linear` or `Conv1D` with SHiRA adapters.

    Args:
        base_layer: the linear; it stays the same object.
    """

    adapter_layer_names = ("memsave_shira_values",)
    other_param_names = (
        "memsave_shira_mask",
        "memsave_shira_indices",
        "memsave_shira_originals",
        "memsave_shira_baked",
        "scaling",
        "keep",
        "stored_masks",
    )

    if TYPE_CHECKING:
        active_adapters: list[str]

        def get_base_layer(self) -> Any: ...

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.memsave_shira_values = nn.ParameterDict()
        self.memsave_shira_mask = BufferDict(persistent=True)
        self.memsave_shira_indices = BufferDict(persistent=False)
        self.memsave_shira_originals = BufferDict(persistent=False)
        self.memsave_shira_baked = BufferDict(persistent=False)
        self.scaling: dict[str, float] = {}
        self.keep: dict[str, KeepRows | None] = {}
        self.stored_masks: dict[str, StoredMask] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        linear = self.get_base_layer()
        self.transposed = not isinstance(linear, nn.Linear)
        self.in_features, self.out_features = linear_features(linear)
        self.weight_shape = weight_shape(linear)
        self.held = HeldWeight(self)
        self.register_state_dict_post_hook(_with_original_weight)
        self.register_load_state_dict_post_hook(_after_load)

    def update_layer(
        self, adapter_name: str, config: SHiRAConfig, mask: StoredMask, code: Tensor, inference_mode: bool
    ) -> None:
        """Add an adapter with the entries that `code` says and, unless the config differs, values of zero."""
        device, dtype = self._place(config)
        start = torch.zeros(mask.count) if config.init_weights else torch.randn(mask.count)
        self.memsave_shira_values[adapter_name] = nn.Parameter(start.to(dtype))
        self.memsave_shira_mask[adapter_name] = code
        self.scaling[adapter_name] = 1.0
        self.keep[adapter_name] = config.keep
        self.stored_masks[adapter_name] = mask
        self.held.by_choice |= config.apply == "added"
        self._move_adapter(adapter_name, device)
        with torch.inference_mode(False):
            self.held.follow_masks()  # also of an adapter that is not active
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _place(self, config: SHiRAConfig) -> tuple[torch.device, torch.dtype]:
        weight = self.get_base_layer().weight
        dtype = getattr(torch, config.dtype) if config.dtype else _values_dtype(self.get_base_layer())
        return weight.device, dtype

    def _move_adapter(self, adapter_name: str, device: torch.device) -> None:
        if device.type == "meta":
            return
        values = self.memsave_shira_values[adapter_name]
        if values.device.type != "meta":
            values.data = values.data.to(device)
        self.memsave_shira_mask[adapter_name] = self.memsave_shira_mask[adapter_name].to(device)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Let the weight hold the values of these adapters; the values that it held are put back first."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.held.sync()

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply the values of `adapter` by `scale` before they are added (1 in training)."""
        if adapter in self.scaling:
            self.scaling[adapter] = float(scale)
            self.held.sync(force=True)

    def delete_adapter(self, adapter_name: str) -> None:
        self.held.release(adapter_name)
        super().delete_adapter(adapter_name)
        self.held.sync()

    def adapters_wanted(self) -> list[str]:
        """The adapters whose values are in force: the merged ones, or else the active ones."""
        names = self.merged_adapters or self.active_adapters
        return [name for name in names if name in self.memsave_shira_values]

    def masked(self, name: str, *, guard: bool = False) -> Masked:
        """What adapter `name` trains; with `guard`, backward raises if the weight holds other values by then."""
        check = self.held.guard() if guard and not torch.compiler.is_compiling() else None
        return Masked(self.memsave_shira_indices[name], self.transposed, self.scaling[name], check)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self._original(x, *args, **kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        compiling = torch.compiler.is_compiling()
        if not compiling:
            self.held.sync()
        names = self.adapters_wanted()
        for name in names:
            self.held.check_mask(name)
        seed = {name: ops.new_seed(x) for name in names if self._samples(name, x)}
        y = self.base_layer(x, *args, **kwargs)
        for name, values in self.held.missing():
            y = y + self._sparse(x, name, values).to(y.dtype)
        if not torch.is_grad_enabled():
            return y
        for name in names:
            values = self.memsave_shira_values[name]
            if values.requires_grad:
                keep = self.keep[name] if name in seed else None
                masked = self.masked(name, guard=True)
                y = with_gradient_of_values(self, x, y, values, masked, keep, seed.get(name))
        return y

    def _samples(self, name: str, x: Tensor) -> bool:
        """Whether rows of x are sampled for adapter `name`: in training, where that keeps fewer than all."""
        keep, num_rows = self.keep[name], x.shape[:-1].numel()
        trains = self.training and self.memsave_shira_values[name].requires_grad
        return keep is not None and trains and 0 < keep.num_rows(num_rows) < num_rows

    def _original(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the linear gives without any adapter.

        Without gradients the originals are in the weight for the time of this forward, unknown to its version counter:
        a graph that was recorded before with the adapter on is still right. With gradients the difference is added.
        """
        compiling = torch.compiler.is_compiling()
        if not compiling:
            self.held.sync()
        if not (torch.is_grad_enabled() or compiling):
            with self.held.originals():
                y = self.base_layer(x, *args, **kwargs)
                additions = self.held.baked()
        else:
            y = self.base_layer(x, *args, **kwargs)
            additions = self.held.differences()
        for name, values in additions:
            y = y + self._sparse(x, name, values).to(y.dtype)
        return y

    def _sparse(self, x: Tensor, name: str, values: Tensor) -> Tensor:
        masked = Masked(self.memsave_shira_indices[name], self.transposed, 1.0)
        return sparse_linear(x, values, masked, (self.in_features, self.out_features))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Leave the values in the weight as if they were its own, until `unmerge`.

        Raises:
            ValueError: `safe_merge`, and a merged entry is not finite.
            MemsaveError: the mask of an adapter has not been loaded.
            RuntimeError: the weight is sharded or quantized.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.memsave_shira_values]
        if not names:
            return
        if self.held.sharded:
            raise RuntimeError(
                "SHiRA: merge: the weight is sharded or quantized, so the values cannot be written into it. Gather or "
                "dequantize the model first. Nothing was changed."
            )
        for name in names:
            self.held.check_mask(name)
            if safe_merge and not bool(torch.isfinite(self.held.target(name)).all()):
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken. Nothing was changed."
                )
        self.merged_adapters += names
        self.held.sync()

    def unmerge(self) -> None:
        """Undo `merge`, bit for bit: the weight holds the active adapters again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.merged_adapters.clear()
        self.held.sync()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The linear without this layer, with the values merged or with its original bits; PEFT's unload calls it."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        else:
            self.held.put_back()
        self.held.forget()
        return self.base_layer

    def merged_weight(self) -> Tensor:
        """A copy of the weight with the values of the wanted adapters."""
        self.held.sync()
        for name in self.adapters_wanted():
            self.held.check_mask(name)
        if self.held.sharded or self.held.by_choice:
            weight = self.held.original_weight()
            for name in self.adapters_wanted():
                weight = (weight + self.get_delta_weight(name).detach().to_dense()).to(weight.dtype)
            return weight
        return self.get_base_layer().weight.detach().clone()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What adapter `adapter` adds to the weight, as a sparse COO tensor of its shape."""
        self.held.check_mask(adapter)
        indices = self.memsave_shira_indices[adapter].long()
        columns = self.weight_shape[1]
        places = torch.stack((torch.div(indices, columns, rounding_mode="floor"), indices % columns))
        values = self.memsave_shira_values[adapter] * self.scaling[adapter]
        return torch.sparse_coo_tensor(places, values, self.weight_shape, check_invariants=False)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False  # the difference has full rank

    def reference(self, x: Tensor) -> Tensor:
        """The same function and gradients in plain autograd, with a dense weight; without sampling."""
        weight = self.held.original_weight()
        for name in [] if self.disable_adapters else self.adapters_wanted():
            delta = torch.zeros(weight.numel(), dtype=weight.dtype, device=weight.device)
            values = (self.memsave_shira_values[name] * self.scaling[name]).to(weight.dtype)
            weight = weight + delta.index_put((self.memsave_shira_indices[name].long(),), values).view_as(weight)
        linear = self.get_base_layer()
        return nn.functional.linear(x, weight.t() if self.transposed else weight, linear.bias)

    def kept_bytes(self, input_shape: tuple[int, ...], dtype: torch.dtype, *, noted: bool = False) -> int:
        """Bytes of the input that one training forward keeps; parameters and buffers are not counted.

        N * D elements, or none beside a note; with `keep_ratio`, 8 bytes a row and D elements, and the k rows unless
        there is a note. Nothing depends on the size of the weight.
        """
        trained = [n for n in self.adapters_wanted() if self.memsave_shira_values[n].requires_grad]
        if self.disable_adapters or self.merged or not trained:
            return 0
        x = torch.empty(input_shape, device="meta")
        keeps = {self.keep[name] if self._samples(name, x) else None for name in trained}
        return sum(kept_bytes(input_shape, dtype, keep, noted=noted) for keep in keeps)

    def extra_repr(self) -> str:
        return ", ".join(f"{n}: {m.kind}, {m.count} of {m.numel} entries" for n, m in self.stored_masks.items())

    def __repr__(self) -> str:
        return "shira." + super().__repr__()

    def _apply(self, fn: Any, recurse: bool = True) -> SHiRALinear:
        self.held.let_go()
        super()._apply(fn, recurse)
        self.held.changed()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        base = [key for key in state_dict if key == f"{prefix}base_layer.weight"]
        self.held.before_load(replaced=bool(base))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.held.revive(self)


def _with_original_weight(layer: SHiRALinear, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """State dicts hold the weight as it is without adapters; where parameters themselves are asked for, they stay."""
    key = f"{prefix}base_layer.weight"
    weight = state_dict.get(key)
    if layer.held.names and weight is not None and not isinstance(weight, nn.Parameter) and not _only_adapters():
        state_dict[key] = layer.held.original_weight()


def _only_adapters() -> bool:
    """Whether PEFT asks for a state dict to take the adapters out of it: then no weight is copied in vain."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is get_peft_model_state_dict.__code__:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _after_load(layer: SHiRALinear, _: Any) -> None:
    layer.held.sync(force=True)


def linear_features(linear: Any) -> tuple[int, int]:
    """(D, O) of a linear or a Conv1D, whatever its weight is stored as."""
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    return linear.nx, linear.nf


def weight_shape(linear: Any) -> tuple[int, int]:
    """The shape of the weight as it would be stored dense: (O, D), or (D, O) for Conv1D."""
    inputs, outputs = linear_features(linear)
    return (outputs, inputs) if isinstance(linear, nn.Linear) else (inputs, outputs)


def _values_dtype(linear: Any) -> torch.dtype:
    weight = linear.weight
    if weight.is_floating_point():
        return weight.dtype
    found = getattr(linear, "compute_dtype", None) or getattr(getattr(linear, "bias", None), "dtype", None)
    return found if isinstance(found, torch.dtype) else torch.get_default_dtype()
