"""Keeps a SHiRA layer's weight in step with its values: W[masked] = originals + scaling * values, at all times.

The values are written into W when an optimizer has stepped (torch's global step hooks), after loads, moves and changes
of the active adapter; an eager forward checks the versions as a safety net, a compiled one does not. The originals are
kept and written back, never subtracted, so that W returns bit for bit.

Where W is no plain tensor (sharded by FSDP2 or ZeRO-3, quantized), or another object than before (FSDP2 shows its
gathered copy in forward), it is left alone: what it lacks is added in forward as a sparse product. What it held at the
moment of sharding is "baked" in, and taken into account.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ....errors import MemsaveError

if TYPE_CHECKING:
    from .layer import SHiRALinear

# In the order in which they were made, which is the same in all processes: sharded values are gathered together.
_layers: weakref.WeakValueDictionary[int, SHiRALinear] = weakref.WeakValueDictionary()
_numbers = itertools.count()
_hooks: list[Any] = []


class HeldWeight:
    """The weight of one layer.

    Attributes:
        names: the adapters whose values W holds, in the order in which they were written.
        sharded: whether W is left alone because values would not stay in it.
        by_choice: whether they are not to be, unless they are merged.
    """

    def __init__(self, layer: SHiRALinear) -> None:
        self.layer = layer
        self.names: list[str] = []
        self.sharded = not is_plain(self.weight)
        self.by_choice = False
        self._seen: list[object] | None = None
        self._known: weakref.ref[Tensor] | None = None
        self._masks: dict[str, tuple[Tensor, int]] = {}
        self._switches = 0
        self.revive(layer)

    @property
    def weight(self) -> Tensor:
        return self.layer.get_base_layer().weight

    def revive(self, layer: SHiRALinear) -> None:
        """Let optimizers' steps reach this layer: a new one, a copy or one that was unpickled."""
        if not _hooks:
            _hooks.append(register_optimizer_step_pre_hook(_before_step))
            _hooks.append(register_optimizer_step_post_hook(_after_step))
        self._known = weakref.ref(self.weight)
        self._number = next(_numbers)
        _layers[self._number] = layer

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": None, "_known": None}

    def forget(self) -> None:
        """Let the weight go as it is now."""
        _layers.pop(self._number, None)
        self.names.clear()
        self.layer.memsave_shira_originals.clear()

    def sync(self, *, force: bool = False) -> None:
        """Bring the weight in line with the adapters that are wanted now, if anything changed since."""
        if not force and self._seen is not None and self._is_as_seen():
            return
        with torch.inference_mode(False), torch.no_grad():
            self.follow_masks()
            self.notice_sharding()
            if not self.sharded:
                if self._on_meta():
                    return
                wanted = self._to_hold()
                if wanted != self.names:
                    self.put_back()
                    self._switches += 1
                # A copy with fake tensors holds what its model held: a real step does not write in forward.
                if wanted != self.names or force or not is_fake(self.weight):
                    self._write(wanted)
            self._seen = [weakref.ref(x) if isinstance(x, Tensor) else x for x in self._state()]
            self._known = weakref.ref(self.weight)

    def _to_hold(self) -> list[str]:
        layer = self.layer
        if self.by_choice and not layer.merged:
            return []
        return [name for name in layer.adapters_wanted() if name in layer.memsave_shira_indices]

    def _write(self, wanted: list[str]) -> None:
        again = len(wanted) == 1 and self.names == wanted
        if not again:
            self.put_back()
        for name in wanted:
            if name not in self.names:
                self.layer.memsave_shira_originals[name] = self._entries(self._flat(), name)
                self.names.append(name)
            self._flat().index_copy_(0, self._indices(name), self.target(name))

    def put_back(self) -> None:
        """Write the originals back, the last written first."""
        self._seen = None
        with torch.inference_mode(False), torch.no_grad():
            for name in reversed(self.names):
                originals = self.layer.memsave_shira_originals[name]
                self._flat().index_copy_(0, self._indices(name), originals.to(self.weight.dtype))
            self.names.clear()
            self.layer.memsave_shira_originals.clear()

    def release(self, name: str) -> None:
        """Forget the adapter `name`, which is about to be deleted."""
        if name in self.names:
            self.put_back()
        if name in self.layer.memsave_shira_baked:
            del self.layer.memsave_shira_baked[name]
        self._masks.pop(name, None)
        self._seen = None

    def target(self, name: str) -> Tensor:
        """(K,) what the weight holds, or is to hold, at the masked entries of adapter `name`."""
        layer = self.layer
        held = layer.memsave_shira_originals
        originals = held[name] if name in held else self._entries(self._flat(), name)
        return (originals + self._delta(name)).to(self.weight.dtype)

    def _delta(self, name: str) -> Tensor:
        values = _whole(self.layer.memsave_shira_values[name].detach())
        scaling = self.layer.scaling[name]
        return values if scaling == 1.0 else values * scaling

    def missing(self) -> list[tuple[str, Tensor]]:
        """What forward must add to the linear's output, as values of sparse matrices: nothing where W holds all."""
        if not (self.sharded or self.by_choice):
            return []
        return [(name, self._delta(name)) for name in self.layer.adapters_wanted()] + self.baked()

    def baked(self) -> list[tuple[str, Tensor]]:
        """The negative of what W held when it was sharded."""
        return [(name, -values) for name, values in self.layer.memsave_shira_baked.items()]

    def differences(self) -> list[tuple[str, Tensor]]:
        """What must be added to W, as values of sparse matrices, to make it the original."""
        found = self.baked()
        for name in self.names:
            originals = self.layer.memsave_shira_originals[name]
            wide = torch.promote_types(originals.dtype, torch.float32)
            found.append((name, originals.to(wide) - self.target(name).to(wide)))
        return found

    @contextmanager
    def originals(self) -> Iterator[None]:
        """Within it, W, which is in step, has its original values; its version counter does not notice."""
        flat = None if self.sharded or not self.names else self.weight.data.view(-1)
        if flat is None:
            yield
            return
        current = [self._entries(flat, name) for name in self.names]
        try:
            for name in reversed(self.names):
                flat.index_copy_(0, self._indices(name), self.layer.memsave_shira_originals[name].to(flat.dtype))
            yield
        finally:
            for name, values in zip(self.names, current, strict=True):
                flat.index_copy_(0, self._indices(name), values)

    @torch.no_grad()
    def original_weight(self) -> Tensor:
        """A copy of the weight as it is without adapters."""
        weight = self.weight.detach().clone()
        for name in reversed(self.names):
            originals = self.layer.memsave_shira_originals[name].to(weight.dtype)
            weight.view(-1).index_copy_(0, self._indices(name), originals)
        return weight

    def guard(self) -> Callable[[], None]:
        """Raises when it is called after other adapters became active."""
        reference, switches = weakref.ref(self), self._switches

        def unchanged() -> None:
            held = reference()
            if held is not None and held._switches != switches:
                raise RuntimeError(
                    "SHiRA: other adapters were made active between forward and backward (set_adapter, merge, "
                    "delete_adapter), so the weight has other values than in forward. Run backward first; "
                    "disable_adapter is allowed in between."
                )

        return unchanged

    @torch.no_grad()
    def _leave_sharded(self) -> None:
        """The weight was sharded: what its shards hold of the values, which cannot be written any more, is baked in."""
        layer = self.layer
        # Gathered once, one layer at a time. ZeRO-3 cannot be asked: what was written last is what its parts hold.
        flat = None
        if self.names and not hasattr(self.weight, "ds_id"):
            whole = self.weight.full_tensor() if hasattr(self.weight, "full_tensor") else self.weight
            flat = whole.detach().reshape(-1).clone()
        for name in reversed(self.names):
            originals = layer.memsave_shira_originals[name]
            held = self.target(name) if flat is None else self._entries(flat, name)
            wide = torch.promote_types(originals.dtype, torch.float32)
            difference = held.to(wide) - originals.to(wide)
            if bool(difference.any()):
                layer.memsave_shira_baked[name] = difference
            if flat is not None:
                flat.index_copy_(0, self._indices(name), originals)
        self.names.clear()
        layer.memsave_shira_originals.clear()
        self.sharded, self._seen = True, None

    def notice_sharding(self) -> None:
        """See whether the weight was sharded; called while its shards hold what was written last."""
        known = self._known is None or self._known() is self.weight
        if not self.sharded and not (known and is_plain(self.weight)):
            self._leave_sharded()

    def before_load(self, *, replaced: bool) -> None:
        """Values, masks or, if `replaced`, the weight itself are about to be loaded; `sync` comes after it."""
        self.notice_sharding()
        if not self.sharded:
            self.put_back()
            self._known = None if replaced else self._known  # loading may assign another
        elif replaced:
            self.layer.memsave_shira_baked.clear()
        self._seen = None

    def let_go(self) -> None:
        """The tensors are about to be moved or cast; torch cannot swap those that are weakly referenced."""
        self._seen = self._known = None

    def changed(self) -> None:
        """The tensors were moved or cast: the masks are the same, the sums must be rounded again."""
        self._known = weakref.ref(self.weight)
        masks = self.layer.memsave_shira_mask
        self._masks = {name: (masks[name], _version(masks[name])) for name in self._masks if name in masks}
        self._seen = None

    def follow_masks(self) -> None:
        """Make the indices from masks that are new, or were loaded since."""
        layer = self.layer
        for name, mask in layer.memsave_shira_mask.items():
            before = self._masks.get(name)
            if mask.is_meta or (before is not None and before[0] is mask and before[1] == _version(mask)):
                continue
            stored = layer.stored_masks[name]
            if is_fake(self.weight):
                if name not in layer.memsave_shira_indices:
                    layer.memsave_shira_indices[name] = mask.new_zeros((stored.count,), dtype=torch.int32)
                self._masks[name] = (mask, _version(mask))
                continue
            if name in self.names:
                self.put_back()
            if bool(mask.any()):
                try:
                    indices = stored.indices(mask)
                except ValueError as error:
                    raise MemsaveError(f"SHiRA: adapter {name!r}: {error}.") from error
                layer.memsave_shira_indices[name] = indices.to(mask.device)
            elif name in layer.memsave_shira_indices:
                del layer.memsave_shira_indices[name]
            self._masks[name] = (mask, _version(mask))

    def _entries(self, flat: Tensor, name: str) -> Tensor:
        return flat.index_select(0, self.layer.memsave_shira_indices[name])  # several times as fast as flat[...]

    def _indices(self, name: str) -> Tensor:
        return self.layer.memsave_shira_indices[name].long()

    def check_mask(self, name: str) -> None:
        """Raise MemsaveError if the mask of adapter `name` is yet to be loaded."""
        if name not in self.layer.memsave_shira_indices:
            kind = self.layer.stored_masks[name].kind
            raise MemsaveError(
                f"SHiRA: the {kind} mask of adapter {name!r} has not been loaded: the config was read from a file, its "
                "weights were not. Load them, or set config.masks = 'select' to choose the entries anew."
            )

    def _on_meta(self) -> bool:
        values = self.layer.memsave_shira_values
        return self.weight.is_meta or any(values[name].is_meta for name in self.layer.adapters_wanted())

    def _state(self) -> list[object]:
        """What the weight depends on: objects, versions and names."""
        layer, found = self.layer, [self.weight, self.sharded, bool(self.layer.merged)]
        for name in layer.adapters_wanted():
            values, mask = layer.memsave_shira_values[name], layer.memsave_shira_mask[name]
            found += [name, values, _version(values), mask, _version(mask)]
        return found

    def _is_as_seen(self) -> bool:
        """Whether nothing has changed; tensors are held weakly, so that what a wrapper replaces is freed."""
        now, seen = self._state(), self._seen or []
        return len(now) == len(seen) and all(
            b() is a if isinstance(b, weakref.ref) else a == b for a, b in zip(now, seen, strict=True)
        )

    def _flat(self) -> Tensor:
        return self.weight.detach().view(-1)


def is_plain(weight: Tensor) -> bool:
    """Whether values can be written into `weight`: not into shards, subclasses and quantized numbers."""
    known = type(weight) in (Tensor, nn.Parameter) or is_fake(weight)
    return known and weight.is_floating_point() and not hasattr(weight, "ds_id") and weight.is_contiguous()


def is_fake(weight: Tensor) -> bool:
    """Whether `weight` is one of `memsave.estimate`, which has a size but no values."""
    return isinstance(weight, FakeTensor)


def _whole(values: Tensor) -> Tensor:
    """The values of all processes, where they are sharded."""
    return values.full_tensor() if hasattr(values, "full_tensor") else values


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for layer in list(_layers.values()):
        layer.held.notice_sharding()


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for layer in list(_layers.values()):
        mine = any(id(layer.memsave_shira_values[name]) in stepped for name in layer.held.names)
        layer.held.sync(force=mine)
