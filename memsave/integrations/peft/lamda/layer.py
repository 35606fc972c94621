"""The layer that LaMDA puts around a linear: the base layer as it was, and A, S and B of each adapter.

x is (..., D), N rows; y (..., O); A (D, r) is a buffer that is not saved, S (r, r) a Parameter, B (r, O) up to 8
Parameters: segments of rows, from the largest singular value on; or buffers, where only S trains. Those that the
schedule has frozen stay frozen, whatever PEFT does.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ....nn.bottleneck import add_bottleneck, add_bottleneck_plain, is_ordinary
from ....nn.converted import original_class
from ....nn.eager import plain
from .config import LaMDAConfig
from .decomposition import decompose
from .fingerprint import make_record, why_not_same

MAX_SEGMENTS = 8

# The DistributedDataParallel in whose forward a layer ran last; not in the layer, which could not be pickled then.
_ddp_of: weakref.WeakKeyDictionary[nn.Module, weakref.ref[DistributedDataParallel]] = weakref.WeakKeyDictionary()


def weight_of(linear: nn.Module) -> Tensor:
    """The stored weight: (O, D), or (D, O) of a Conv1D."""
    return linear.weight.detach()  # type: ignore[operator]


def matrix_of(linear: nn.Module, weight: Tensor) -> Tensor:
    """(O, D) -> (D, O) and back; as it is for a Conv1D, which stores (D, O)."""
    return weight.t() if issubclass(original_class(linear), nn.Linear) else weight


def segment_ends(rank: int) -> list[int]:
    """Where the segments of B's rows end: up to 8 of nearly equal size."""
    count = min(rank, MAX_SEGMENTS)
    return [rank * (i + 1) // count for i in range(count)]


class Records(BufferDict):
    """adapter -> record of the base weight; one that a loader brings is compared with it, and never taken over."""

    def __setattr__(self, name: str, value: Any) -> None:
        own = self.__dict__.get("_buffers", {}).get(name)
        if own is None or not isinstance(value, Tensor):
            super().__setattr__(name, value)
        elif (check := on_record.get(self)) is not None:
            check(name, value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, own in list(self.items()):
            stored = state_dict.get(prefix + name)
            if isinstance(stored, Tensor):
                if reason := why_not_same(stored, own, None, compare_sketch=False):
                    args[-1].append(f"{prefix}{name}: {reason}")  # torch raises all that goes wrong together
                state_dict[prefix + name] = own
        super()._load_from_state_dict(state_dict, prefix, *args)


# What is called with a record that a loader which does not ask the tuner, such as transformers', puts in place.
on_record: weakref.WeakKeyDictionary[nn.Module, Callable[[str, Tensor], None]] = weakref.WeakKeyDictionary()


class LaMDALinear(nn.Module, BaseTunerLayer):
    """y = base_layer(x) + alpha * ((x A) S) B for each active adapter, keeping x A (N, r) alone for backward."""

    adapter_layer_names = ("memsave_lamda_S", "memsave_lamda_B")
    # What BaseTunerLayer has, for type checkers.
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool
    get_base_layer: Callable[[], nn.Linear]
    other_param_names = (
        "memsave_lamda_A",
        "memsave_lamda_record",
        "r",
        "alpha",
        "freeze_until",
        "frozen_segments",
        "loading",
        "recipes",
    )

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = matrix_of(base_layer, weight_of(base_layer)).shape
        self.memsave_lamda_A = BufferDict()
        self.memsave_lamda_S = nn.ParameterDict()
        self.memsave_lamda_B = nn.ModuleDict()
        self.memsave_lamda_record = Records(persistent=True)
        self.r: dict[str, int] = {}
        self.alpha: dict[str, float] = {}
        self.freeze_until: dict[str, float] = {}
        self.frozen_segments: dict[str, int] = {}
        self.loading: dict[str, bool] = {}  # made from a saved config whose values have not come yet
        self.recipes: dict[str, LaMDAConfig] = {}
        self.merged_adapters: list[str] = []
        self._active_adapter: str | list[str] = []
        self._unmerged: list[Tensor] = []

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}: r={r}, alpha={self.alpha[name]:g}, frozen {self.frozen_rows(name)} of {r} rows"
            for name, r in self.r.items()
        )

    @torch.no_grad()
    def update_layer(self, adapter_name: str, rank: int, config: LaMDAConfig, inference_mode: bool = False) -> None:
        """Add an adapter of this rank, decomposed from the unmerged base weight."""
        base = self.get_base_layer()
        weight = (self._unmerged[0] if self._unmerged else base.weight).detach()
        a, b, _ = decompose(matrix_of(base, weight), rank, config)
        dtype = weight.dtype if config.dtype is None else getattr(torch, config.dtype)
        self.r[adapter_name], self.alpha[adapter_name] = rank, config.alpha
        self.freeze_until[adapter_name] = config.freeze_until
        self.loading[adapter_name] = config.memsave_version is not None
        self.recipes[adapter_name] = config
        self.memsave_lamda_A.register_buffer(adapter_name, a.to(weight.device, dtype), persistent=config.save_factors)
        self.memsave_lamda_record[adapter_name] = make_record(weight, a).to(weight.device)
        s = torch.zeros(rank, rank) if config.init_weights else torch.randn(rank, rank) / rank**0.5
        self.memsave_lamda_S[adapter_name] = nn.Parameter(s.to(weight.device, dtype))
        self.memsave_lamda_B[adapter_name] = self._new_segments(b.to(weight.device, dtype), config)
        self.frozen_segments[adapter_name] = 0 if config.freeze_until else len(segment_ends(rank))
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A base weight that is loaded brings its own A, B and record; what the state dict has of B follows."""
        weight = state_dict.get(f"{prefix}base_layer.weight")
        own = self.get_base_layer().weight
        if isinstance(weight, Tensor) and weight.shape == own.shape and not _same_values(weight, own):
            self._rebase(weight.detach().to(own.dtype))
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.no_grad()
    def _rebase(self, weight: Tensor) -> None:
        """Make A, B and the record of every adapter from another base weight."""
        for name, config in self.recipes.items():
            a, b, _ = decompose(matrix_of(self.get_base_layer(), weight), self.r[name], config)
            self.memsave_lamda_A[name].copy_(a)
            self.memsave_lamda_record._buffers[name] = make_record(weight, a).to(weight.device)
            for segment, rows in zip(self.segments(name), b.split([len(s) for s in self.segments(name)]), strict=True):
                segment.copy_(rows)

    def _new_segments(self, b: Tensor, config: LaMDAConfig) -> nn.Module:
        """B (r, O) in segments: Parameters, or buffers if they never train, which are saved only with the factors."""
        ends = segment_ends(len(b))
        # Named "rows0", since PEFT could take "0" for the name of an adapter.
        segments = {f"rows{i}": b[s:e].clone() for i, (s, e) in enumerate(zip([0, *ends[:-1]], ends, strict=True))}
        if not config.freeze_until:
            return BufferDict(segments, persistent=config.save_factors)
        found = nn.ParameterDict()
        for name, rows in segments.items():
            found[name] = parameter = nn.Parameter(rows)
            found._parameters[name] = parameter  # under low_cpu_mem_usage that would be on meta, but these have values
        return found

    def segments(self, adapter_name: str) -> list[Tensor]:
        """B of an adapter: (rows, O) each, from the largest singular value on."""
        return list(self.memsave_lamda_B[adapter_name].values())  # type: ignore[operator]

    def frozen_rows(self, adapter_name: str) -> int:
        """How many rows of B the schedule has frozen, from the largest singular value on."""
        return (0, *segment_ends(self.r[adapter_name]))[self.frozen_segments[adapter_name]]

    def freeze_rows(self, adapter_name: str, due: int) -> list[Tensor]:
        """Freeze the segments whose rows are all among the first `due`; returns the newly frozen, without gradient."""
        count = sum(end <= due for end in segment_ends(self.r[adapter_name]))
        newly = self.segments(adapter_name)[self.frozen_segments[adapter_name] : count]
        self.frozen_segments[adapter_name] = max(count, self.frozen_segments[adapter_name])
        for parameter in newly:
            parameter.requires_grad_(False)
            parameter.grad = None
        return newly

    def _freeze_again(self) -> None:
        for name, count in self.frozen_segments.items():
            for parameter in self.segments(name)[:count]:
                parameter.requires_grad_(False)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._freeze_again()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        self._freeze_again()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """To the device alone: PEFT would cast to the base's dtype, too."""
        device = weight_of(self.get_base_layer()).device if device is None else device
        for name in ("memsave_lamda_A", "memsave_lamda_record", *self.adapter_layer_names):
            container = getattr(self, name)
            if adapter_name not in container or device.type == "meta":
                continue
            item = container[adapter_name]
            for tensor in item.values() if isinstance(item, (nn.ParameterDict, BufferDict)) else [item]:
                if not tensor.is_meta:
                    tensor.data = tensor.data.to(device)

    def active_names(self) -> list[str]:
        """The active adapters that this layer has."""
        return [name for name in self.active_adapters if name in self.memsave_lamda_S]

    def _factors(self, name: str) -> tuple[Tensor, Tensor, list[Tensor], float]:
        return self.memsave_lamda_A[name], self.memsave_lamda_S[name], self.segments(name), self.alpha[name]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        y = self.base_layer(x, *args, **kwargs)
        if self.merged:
            return y
        eager = not plain(x) and is_ordinary(y)
        if eager and torch.is_grad_enabled():
            self._note_ddp()
        own_y = eager and not _is_watched(self.base_layer)
        for name in self.active_names():
            if eager:
                y = add_bottleneck(y, x, *self._factors(name), own_y=own_y)
            else:
                y = add_bottleneck_plain(y, x, *self._factors(name))
        return y

    def reference(self, x: Tensor) -> Tensor:
        """The same function and gradients in plain autograd."""
        y = self.base_layer(x)
        for name in () if self.disable_adapters or self.merged else self.active_names():
            y = add_bottleneck_plain(y, x, *self._factors(name))
        return y

    def kept_bytes(self, input_shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """Bytes that one training forward keeps, parameters and buffers not counted: N * r elements per active adapter
        with anything that trains, in `dtype`, that of the output; and what the base layer keeps: nothing if frozen."""
        base, num_rows = self.base_layer, prod(input_shape[:-1])
        kept = 0
        if hasattr(base, "kept_bytes"):
            kept = base.kept_bytes(input_shape, dtype)  # type: ignore[operator]
        elif base.weight.requires_grad:
            kept = num_rows * self.in_features * dtype.itemsize
        if self.disable_adapters or self.merged:
            return kept
        training = [
            n for n in self.active_names() if any(p.requires_grad for p in (self.memsave_lamda_S[n], *self.segments(n)))
        ]
        return kept + sum(num_rows * self.r[name] * dtype.itemsize for name in training)

    def _note_ddp(self) -> None:
        active = getattr(DistributedDataParallel, "_active_ddp_module", None)
        if active is not None:
            _ddp_of[self] = weakref.ref(active)

    def ddp(self) -> DistributedDataParallel | None:
        """The DistributedDataParallel in whose forward this layer ran last, if it is still there."""
        found = _ddp_of.get(self)
        return None if found is None else found()

    @torch.no_grad()
    def _delta(self, adapter_name: str) -> Tensor:
        """alpha (A S B) as the base stores its weight, in float32 at least."""
        a, s, segments, alpha = self._factors(adapter_name)
        dtype = torch.promote_types(a.dtype, torch.float32)
        delta = (a.to(dtype) @ (alpha * s).to(dtype)) @ torch.cat([segment.to(dtype) for segment in segments])
        return matrix_of(self.get_base_layer(), delta)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the base weight: shape and dtype of that."""
        weight = weight_of(self.get_base_layer())
        return self._delta(adapter).to(weight.dtype).to(weight.device)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Give the base layer a new Parameter, W plus what the adapters add, rounded once; the old one is kept.

        So unmerge is exact, and whatever shares the old Parameter (tied embeddings) keeps its values. Raises
        ValueError, changing nothing, for a sharded weight, or with `safe_merge` if the result would not be finite.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.memsave_lamda_S]
        if not names:
            return
        base = self.get_base_layer()
        old: Tensor = self._unmerged[0] if self._unmerged else base.weight
        if type(old.data) is not Tensor:
            kind = type(old.data).__name__
            raise ValueError(
                f"LaMDA: cannot merge into a weight that is a {kind}; gather it first. Nothing was changed."
            )
        deltas = [self._delta(name).to(old.device) for name in (*self.merged_adapters, *names)]
        weight = torch.stack([old.to(deltas[0].dtype), *deltas]).sum(0) if len(deltas) > 1 else old + deltas[0]
        weight = weight.to(old.dtype)
        if safe_merge and not bool(torch.isfinite(weight).all()):
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter(s) {', '.join(names)} seem to be broken"
            )
        self._unmerged = [old]
        base.weight = nn.Parameter(weight, requires_grad=old.requires_grad)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Give the base layer its old Parameter back, on the device where it is now."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base, (old,) = self.get_base_layer(), self._unmerged
        now = weight_of(base)
        if (now.device, now.dtype) != (old.device, old.dtype):
            old.data = old.data.to(device=now.device, dtype=now.dtype)
        base.weight = old
        self._unmerged = []
        self.merged_adapters.clear()

    def merged_weight(self) -> Tensor:
        """A copy of the weight with what the adapters in force add."""
        old: Tensor = self._unmerged[0] if self._unmerged else self.get_base_layer().weight
        names = self.merged_adapters or self.active_names()
        wide = torch.promote_types(old.dtype, torch.float32)
        return sum((self._delta(n).to(old.device) for n in names), old.detach().to(wide)).to(old.dtype)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The linear without this layer, merged or as it was; PEFT's unload calls it."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        elif self.merged:
            self.unmerge()
        return self.base_layer

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def why_not_record(self, adapter_name: str, record: Tensor) -> str | None:
        """Why a stored record is not that of this layer's base weight, in words, or None."""
        base = self.get_base_layer()
        weight = (self._unmerged[0] if self._unmerged else base.weight).detach()
        # With factors in the file (A is saved then), it does not matter how they come out here.
        saved = adapter_name not in self.memsave_lamda_A._non_persistent_buffers_set
        return why_not_same(record, self.memsave_lamda_record[adapter_name], weight, compare_sketch=not saved)


def _same_values(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.device == b.device and not b.is_meta and torch.equal(a.to(b.dtype), b))


def _is_watched(base_layer: nn.Module) -> bool:
    """Whether something other than memsave's counting may hold the base layer's output.

    That is a hook, a forward of its own, or a dispatch mode: selective checkpointing caches the outputs of products.
    """
    watchers = [*torch.nn.modules.module._global_forward_hooks.values()]
    if torch._C._len_torch_dispatch_stack():
        watchers += [type(mode) for mode in _get_current_dispatch_mode_stack() if type(mode) is not FakeTensorMode]
    foreign = any(not (getattr(watcher, "__module__", None) or "").startswith("memsave.") for watcher in watchers)
    return foreign or bool(base_layer._forward_hooks) or "forward" in base_layer.__dict__
