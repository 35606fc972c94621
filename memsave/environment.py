"""What is installed, on which machine, and which backend serves each op: what `python -m memsave` prints."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import torch

import memsave
from memsave.ops import _native

PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "einops")


def collect() -> dict[str, Any]:
    """Everything the report shows, as plain data that JSON can hold. Sizes are in bytes."""
    return {
        "versions": {
            "memsave": memsave.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        "system": platform.platform(),
        "cpu": {
            "name": _cpu_name(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
        },
        "devices": _devices(),
        "native": {"loaded": _native.library() is not None, "state": _native.state()},
        "backends": memsave.backends(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    """The processor's name; Linux keeps it in a file, other systems tell `platform`."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _devices() -> list[dict[str, Any]]:
    """The devices of torch's accelerator backend, none on a machine that has only a CPU."""
    if not torch.accelerator.is_available():
        return []
    kind = str(torch.accelerator.current_accelerator())
    devices: list[dict[str, Any]] = [{"device": f"{kind}:{i}"} for i in range(torch.accelerator.device_count())]
    if kind == "cuda":
        for index, device in enumerate(devices):
            properties = torch.cuda.get_device_properties(index)
            device.update(name=properties.name, memory_bytes=properties.total_memory)
    return devices


def as_text(report: dict[str, Any]) -> str:
    """The report of `collect` as aligned lines."""
    cpu, devices = report["cpu"], report["devices"]
    rows = [(name, version or "not installed") for name, version in report["versions"].items()]
    rows += [
        ("system", report["system"]),
        ("cpu", f"{cpu['name']}, {cpu['capability']}, {cpu['cores']} cores, torch uses {cpu['torch_threads']} threads"),
        ("devices", ", ".join(_device_text(device) for device in devices) or "cpu only"),
        ("native", report["native"]["state"]),
    ]
    lines = [f"{name:<13} {value}" for name, value in rows]
    return "\n".join([*lines, "", *_active_lines(report["backends"]), "", *_why_not_lines(report["backends"])])


def _device_text(device: dict[str, Any]) -> str:
    if "memory_bytes" not in device:
        return device["device"]
    return f"{device['device']} {device['name']} ({device['memory_bytes'] / 2**30:.1f} GiB)"


def _active_lines(backends: dict[str, dict[str, Any]]) -> list[str]:
    """One line per op: the backend that serves it on each device."""
    width = max(map(len, backends))
    lines = [f"{'op':<{width}} {'on cpu':<11} on cuda"]
    for op, devices in backends.items():
        cpu, cuda = (devices[device]["active"] or "none" for device in ("cpu", "cuda"))
        lines.append(f"{op:<{width}} {cpu:<11} {cuda}")
    return lines


def _why_not_lines(backends: dict[str, dict[str, Any]]) -> list[str]:
    """One line for each reason why a backend serves nothing; ops that share one share a line."""
    ops_of: dict[tuple[str, str, str], list[str]] = {}
    for op, devices in backends.items():
        for device, state in devices.items():
            for backend, reason in state["why_not"].items():
                ops_of.setdefault((device, backend, reason), []).append(op)
    groups: dict[tuple[str, str, str], list[str]] = {}
    for (device, backend, reason), ops in ops_of.items():
        which = "all ops" if len(ops) == len(backends) else ", ".join(ops)
        groups.setdefault((device, reason, which), []).append(backend)
    lines = [f"{'not on':<8}{'backend':<28}why (ops)"]
    for (device, reason, which), names in sorted(groups.items()):
        lines.append(f"{device:<7} {', '.join(names):<27} {reason} ({which})")
    return lines
