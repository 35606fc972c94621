"""Registers an op with PyTorch: one schema, one fake kernel, and up to three implementations.

Each op is a folder: `reference.py` (plain PyTorch, for every device), and where they pay `native.py` (C++ on the CPU)
and `triton.py` (CUDA, ROCm). Each of these files has the op, under its own name in reference.py and as `launch` in the
others, and `workspace_bytes`, with the same arguments: the bytes that it allocates, beyond inputs and outputs, at its
peak.

PyTorch's dispatcher picks by device. The kernels under its CPU and CUDA keys look up the active backend and call it.
Ops have no derivative: that is the business of the `autograd.Function`s in `memsave.nn`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from inspect import signature
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import _backend

_LIBRARY = torch.library.Library("memsave", "FRAGMENT")
_OPS: dict[str, Op] = {}


class Op:
    """One op and its implementations.

    Args:
        reference: the module of the plain PyTorch implementation.
        kernels: which of "native" and "triton" exist beside it.
        needs_no_grad: refuse inputs that require grad while grad mode is on.
    """

    def __init__(self, name: str, reference: ModuleType, kernels: Sequence[str], needs_no_grad: bool) -> None:
        self.name = name
        self.parameters = tuple(signature(reference.workspace_bytes).parameters)
        self.kernels = tuple(kernels)
        self._reference = reference
        self._needs_no_grad = needs_no_grad
        self._active: dict[str, Callable[..., Any]] = {}
        _backend.on_change(self._active.clear)

    def run(self, device: str, args: tuple[Any, ...]) -> Any:
        """Compute the op on tensors of one device type by its active backend."""
        self.refuse_grad(args)
        implementation = self._active.get(device)
        if implementation is None:
            implementation = self._active[device] = self._implementation(self.choose(device))
        return implementation(*args)

    def refuse_grad(self, args: tuple[Any, ...]) -> None:
        """Without this, plain PyTorch would record a graph through the op, and a kernel would silently cut it."""
        if not (self._needs_no_grad and torch.is_grad_enabled()):
            return
        if any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            raise RuntimeError(
                f"memsave::{self.name} has no derivative, and an input requires grad: call it in an "
                "autograd.Function or under torch.no_grad()."
            )

    def choose(self, device: str) -> str:
        """The backend that serves tensors of a device type.

        Raises:
            BackendError: one was asked for by name and cannot serve.
        """
        wish = _backend.wish()
        if wish is None:
            return next((b for b in self.kernels if self.why_not(b, device) is None), "reference")
        if wish not in self.kernels:
            return "reference"
        if reason := self.why_not(wish, device):
            raise _backend.BackendError(
                f"memsave::{self.name}: backend {wish!r} was asked for (MEMSAVE_BACKEND or use_backend), but {reason}."
            )
        return wish

    def why_not(self, backend: str, device: str) -> str | None:
        """Why a backend cannot serve this op on tensors of a device type, or None."""
        if backend == "reference":
            return None
        if backend not in self.kernels:
            return "this op has no such kernel"
        if _backend.DEVICE_OF_KERNELS[backend] != device:
            return f"it serves {_backend.DEVICE_OF_KERNELS[backend]} tensors, not {device}"
        return _backend.missing(backend)

    def _module(self, backend: str) -> ModuleType:
        if backend == "reference":
            return self._reference
        return import_module(f"{self._reference.__package__}.{backend}")

    def _implementation(self, backend: str) -> Callable[..., Any]:
        return getattr(self._module(backend), self.name if backend == "reference" else "launch")

    def workspace_bytes(self, device: str, args: tuple[Any, ...]) -> int:
        return self._module(self.choose(device)).workspace_bytes(*args)

    def report(self, device: str) -> dict[str, Any]:
        """The active backend and why each other one is not, as plain data."""
        if device == "cuda" and not torch.cuda.is_available():
            reason = "torch sees no CUDA or ROCm device"
            return {"active": None, "why_not": dict.fromkeys(_backend.BACKENDS, reason)}
        try:
            active, error = self.choose(device), None
        except _backend.BackendError as caught:
            active, error = None, str(caught)
        others = [backend for backend in _backend.BACKENDS if backend != active]
        why_not = {b: self.why_not(b, device) or error or self._unused(b, active) for b in others}
        return {"active": active, "why_not": why_not}

    @staticmethod
    def _unused(backend: str, active: str | None) -> str:
        wish = _backend.wish()
        return f"{wish} was asked for" if wish else f"{active} is active and preferred to {backend}"


def register(
    schema: str,
    *,
    fake: Callable[..., Any],
    reference: ModuleType,
    kernels: Sequence[str] = (),
    needs_no_grad: bool = True,
    tags: Sequence[torch.Tag] = (),
) -> Any:
    """Define `memsave::<schema>` and return its overload, `torch.ops.memsave.<name>.default`.

    Args:
        schema: as `torch.library.define` takes it, without defaults (PyTorch leaves out arguments equal to them).
        fake: output shapes and dtypes from fake inputs.
        reference, kernels, needs_no_grad: see `Op`.
        tags: PyTorch's own, such as `nondeterministic_seeded`.
    """
    name = schema.partition("(")[0]
    op = _OPS[name] = Op(name, reference, kernels, needs_no_grad)
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))

    def checked_fake(*args: Any) -> Any:
        op.refuse_grad(args)
        return fake(*args)

    torch.library.register_fake(f"memsave::{name}", checked_fake, lib=_LIBRARY)
    _LIBRARY.impl(name, lambda *args: op.run("other", args), "CompositeExplicitAutograd")
    for kernel in op.kernels:
        device = _backend.DEVICE_OF_KERNELS[kernel]
        _LIBRARY.impl(name, lambda *args, device=device: op.run(device, args), device.upper())
    return getattr(torch.ops.memsave, name).default


def backends() -> dict[str, dict[str, Any]]:
    """For each op and each device ("cpu", "cuda"): the active backend, and why each other one is not; plain data."""
    return {name: {device: op.report(device) for device in ("cpu", "cuda")} for name, op in sorted(_OPS.items())}


def serving(name: str, devices: Iterable[str]) -> str:
    """The backend that serves an op on tensors of these device types; "reference" where no kernel does."""
    active = {_OPS[name].report(device)["active"] for device in devices if device in ("cpu", "cuda")}
    return next(filter(None, active), "reference")


def workspace_bytes(func: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> int:
    """Bytes that an op allocates inside itself at its peak, beyond inputs and outputs, with the backend now active.

    Args:
        func: an overload such as `torch.ops.memsave.gather_rows.default`, or its name, with or without "memsave::".
        args, kwargs: what the op is called with; only shapes, strides, dtypes and devices are read.

    Returns:
        0 for anything that is not an op of memsave.
    """
    namespace, _, name = (func if isinstance(func, str) else getattr(func, "_schema", func).name).rpartition("::")
    if namespace not in ("", "memsave") or name not in _OPS:
        return 0
    op, named = _OPS[name], kwargs or {}
    arguments = (*args, *(named[parameter] for parameter in op.parameters[len(args) :]))
    device = next(arg.device.type for arg in arguments if isinstance(arg, Tensor))
    return op.workspace_bytes(device, arguments)
