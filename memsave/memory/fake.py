"""Fake twins of tensors and modules: they have shapes, dtypes, devices and storages with sizes, but no bytes.

A fake tensor has no values, and models branch on some: on whether a mask is all ones, on a random number for layer
drop. So small integer and boolean tensors stay real: their twins are copies, and so is what is computed from them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import EstimateError
from .storages import tensors_in

MAX_REAL_INTEGERS = 2**20
MAX_REAL_FLOATS = 2**10
_NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException)


class Fakes:
    """Makes fake twins, one for each tensor, and runs code on them.

    Args:
        device: where the twins are; None leaves each where its tensor is. Tensors on the meta device are nowhere: their
            twins are on a CUDA device where torch sees one, else on the CPU.
        where: tells what runs now, for error messages.
    """

    def __init__(self, device: torch.device | None, where: Callable[[], str]) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.integers = RealIntegers(where)
        self._device = device
        self._default = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._twins: Any = WeakIdKeyDictionary()

    def tensor(self, tensor: Tensor) -> Tensor:
        """The twin of a tensor: the same one at every call."""
        if tensor not in self._twins:
            self._twins[tensor] = twin = self._make(tensor.detach()).requires_grad_(tensor.requires_grad)
            if isinstance(tensor, nn.Parameter):
                twin._is_param = True  # what isinstance(..., Parameter) reads
        return self._twins[tensor]

    def _make(self, tensor: Tensor) -> Tensor:
        device = self._device or (self._default if tensor.device.type == "meta" else tensor.device)
        if has_value(tensor) and not _is_float(tensor):
            return tensor.to(device, copy=True)
        if tensor.device.type != "meta" and not isinstance(tensor, FakeTensor) and device == tensor.device:
            return self.mode.from_tensor(tensor, static_shapes=True)
        with self.mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

    def batch(self, value: Any) -> Any:
        """Nested containers with every tensor replaced by its twin; integers on the meta device by ones."""

        def twin(tensor: Tensor) -> Tensor:
            if tensor.device.type == "meta" and not _is_float(tensor) and _is_small(tensor):
                return torch.ones(tensor.shape, dtype=tensor.dtype, device=self._device or self._default)
            return self.tensor(tensor)

        return tree_map_only(Tensor, twin, value)

    def module(self, module: nn.Module) -> nn.Module:
        """A copy of a module with twins for all its tensors; the module itself is not touched.

        Everything that the module refers to is copied with it, except the objects whose methods are its hooks. Hooks of
        parameters are not copied.

        Raises:
            EstimateError: it cannot be copied.
        """
        known: dict[int, Any] = {}
        try:
            for submodule in module.modules():
                known |= {id(owner): owner for owner in _owners_of_hooks(submodule)}
                held = (*submodule._parameters.values(), *submodule._buffers.values(), *vars(submodule).values())
                for tensor in held:
                    if isinstance(tensor, Tensor) and not nn.parameter.is_lazy(tensor):
                        known[id(tensor)] = self.tensor(tensor)
            with self.mode, _CopiesAs(self.tensor):
                return copy.deepcopy(module, known)
        except Exception as error:
            raise EstimateError(
                f"estimate: {type(module).__name__} cannot be copied, and fake tensors need a copy to run on "
                f"({type(error).__name__}: {error}). Measure a real step instead: memsave.measure(step)."
            ) from error


class _CopiesAs(TorchFunctionMode):
    """`copy.deepcopy` of a tensor that lies in a list, a dict or another object gives what `twin` makes of it."""

    def __init__(self, twin: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._twin = twin

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        memo[id(tensor)] = twin = self._twin(tensor)
        return twin


def _owners_of_hooks(module: nn.Module) -> Iterable[object]:
    for name, hooks in vars(module).items():
        if name.endswith("_hooks") and isinstance(hooks, dict):
            owners = (getattr(hook, "__self__", None) for hook in hooks.values())
            yield from (owner for owner in owners if owner is not None and not isinstance(owner, nn.Module))


class RealIntegers(TorchDispatchMode):
    """Computes with real numbers what takes and gives small integer and boolean tensors; the rest is fake.

    So are small results that no tensor goes into, such as `torch.rand([])`. Entered after the `FakeTensorMode`.
    """

    supports_higher_order_operators = True

    def __init__(self, where: Callable[[], str]) -> None:
        super().__init__()
        self._where = where

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = list(tensors_in((args, kwargs)))
        real = getattr(func, "_schema", None) is not None and all(map(has_value, inputs))
        if real and inputs and func._schema.is_mutable:
            return _compute(func, args, kwargs)
        if func in _UNPREDICTED:
            warnings.warn(
                f"estimate: {self._where()} calls {func}, whose workspace torch does not tell for fake tensors: the "
                "estimate is too low by that. memsave.measure counts it.",
                stacklevel=2,
            )
        try:
            result = _FAKE.get(func, func)(*args, **kwargs)
        except _NEEDS_VALUES as error:
            if real:
                return _compute(func, args, kwargs)
            raise EstimateError(
                f"estimate: {self._where()} reads values that only a real run has (in {func}), so what it does next "
                "cannot be predicted. Measure a real step instead: memsave.measure(step)."
            ) from error
        if real and all(map(_is_small, tensors_in(result))):
            return _compute(func, args, kwargs)
        return result


def _compute(func: Any, args: Any, kwargs: Any) -> Any:
    with _disable_current_modes():
        return func(*args, **kwargs)


def _index(x: Tensor, indices: list[Tensor | None]) -> Tensor:
    """`x[indices]`, where real masks tell how many elements they select."""
    numbers: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8) and has_value(index):
            numbers += _compute(torch.nonzero, (index,), {"as_tuple": True})
        else:
            numbers.append(index)
    return torch.ops.aten.index.Tensor(x, numbers)


def _masked_select(x: Tensor, mask: Tensor) -> Tensor:
    if not has_value(mask):
        return torch.ops.aten.masked_select.default(x, mask)
    shape = torch.broadcast_shapes(x.shape, mask.shape)
    return x.new_empty(_compute(lambda: int(mask.expand(shape).count_nonzero()), (), {}))


def _grouped_mm(a: Tensor, b: Tensor, *others: Any, **settings: Any) -> Tensor:
    """torch's own fake kernel refuses the dtypes that only the CPU's kernel takes."""
    half = torch.ops.aten._grouped_mm.default(a.to(torch.bfloat16), b.to(torch.bfloat16), *others, **settings)
    return torch.empty_strided(half.shape, half.stride(), dtype=a.dtype, device=a.device)


def _embedding(weight: Tensor, indices: Tensor, *settings: Any) -> Tensor:
    if has_value(indices) and indices.numel():
        smallest, largest = _compute(lambda: [int(i) for i in indices.aminmax()], (), {})
        if not 0 <= smallest <= largest < weight.shape[0]:
            raise IndexError(f"indices from {smallest} to {largest} into an embedding of {weight.shape[0]} rows")
    return torch.ops.aten.embedding.default(weight, indices, *settings)


_FAKE = {
    torch.ops.aten.embedding.default: _embedding,
    torch.ops.aten.index.Tensor: _index,
    torch.ops.aten.masked_select.default: _masked_select,
    torch.ops.aten._grouped_mm.default: _grouped_mm,
}
_UNPREDICTED = {
    torch.ops.aten.mkldnn_rnn_layer.default,
    torch.ops.aten._cudnn_rnn.default,
    torch.ops.aten.miopen_rnn.default,
}


def has_value(tensor: Tensor) -> bool:
    """Whether a tensor is small and real."""
    return not isinstance(tensor, FakeTensor) and tensor.device.type != "meta" and _is_small(tensor)


def _is_small(tensor: Tensor) -> bool:
    return tensor.numel() <= (MAX_REAL_FLOATS if _is_float(tensor) else MAX_REAL_INTEGERS)


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
