"""Result files: what is in them, how they are written, read and told apart from broken ones.

A result is the content of one file of benchmarks/results/<device>/<case>.json: its `format`, whether it is from a dry
run at toy size (`tiny`), the `case`, the `machine`, the `results` and what was `left_out` and why. A bundle is one file
with many of them, by name, as `make gpu` writes it.
"""

from __future__ import annotations

import json
import platform
import re
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases.case import Case

FORMAT = 2
RESULTS = Path(__file__).parent / "results"
# What the examples write, in a form of their own; they draw their own pictures.
OF_EXAMPLES = ("demo", "adapters_example")
_AGAIN = "`make bench` or `make quality`, or `make gpu` on that device"
_PACKAGES_OF_LOSSES = ("python", "torch", "transformers")
_KEYS = ("case", "machine", "results", "left_out", "tiny")


class ResultError(ValueError):
    """A result file that cannot be used."""


def result(
    case: Case, device: str, tiny: bool, results: list[dict[str, Any]], left_out: dict[str, str]
) -> dict[str, Any]:
    """The content of a result file, measured now on this machine."""
    return {
        "format": FORMAT,
        "tiny": tiny,
        "case": case.describe(),
        "machine": machine(device),
        "results": results,
        "left_out": left_out,
    }


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    names = [line for line in _cpu_info() if line.startswith("model name")]
    packages = ("torch", "triton", "transformers", "diffusers", "peft", "liger_kernel")
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "cpu": names[0].partition(":")[2].strip() if names else platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | {p: v for p in packages if (v := _version(p))},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def slug(device: str) -> str:
    """The folder of a device's results: "NVIDIA H200" gives "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def read(path: Path) -> dict[str, Any]:
    """One result file.

    Raises:
        ResultError: it is missing, broken or of another format; what to do about it.
    """
    return checked(_load(path, "python -m benchmarks.run --case NAME --out DIR"), str(path))


def begun(path: Path, new: dict[str, Any]) -> dict[str, Any]:
    """The result to go on with: that of the file, or without a file `new`, which has no results yet.

    Raises:
        ResultError: the file is of no use, or its results were made with other settings than those of `new`.
    """
    if not path.exists():
        return new
    try:
        data = read(path)
    except ResultError as error:
        raise ResultError(f"{error} To begin anew, remove the file first.") from None
    before, now = _settings(data), _settings(new)
    names = [name for name in before | now if before.get(name) != now.get(name)]
    if names:
        theirs, ours = ({name: settings.get(name) for name in names} for settings in (before, now))
        raise ResultError(
            f"{path}: its results were made with {theirs}, this call has {ours}. It was not changed. "
            "Name another folder by --out, or remove the file."
        )
    return data


def _settings(data: dict[str, Any]) -> dict[str, Any]:
    """What results depend on besides the code, and must share to be in one file."""
    case, made = data["case"], data["machine"]
    settings = {name: value for name, value in case.items() if name != "title"}
    settings |= {"tiny": data["tiny"], "device": made["device"], "threads": made["threads"]}
    return settings | {name: made["versions"].get(name) for name in _PACKAGES_OF_LOSSES}


def read_bundle(path: Path) -> dict[str, dict[str, Any]]:
    """The results of a bundle by name. Raises ResultError as `read` does, before any of them is used."""
    data = _load(path, "make gpu OUT=DIR")
    _check_format(data, str(path))
    if not isinstance(data.get("results"), dict):
        raise ResultError(f"{path}: no results by name in it. It is no file that `make gpu` wrote.")
    return {name: checked(content, f"{path}, {name}") for name, content in data["results"].items()}


def checked(data: Any, where: str) -> dict[str, Any]:
    _check_format(data, where)
    missing = [key for key in _KEYS if key not in data]
    if missing:
        raise ResultError(f"{where}: {', '.join(missing)} missing. Measure it again: {_AGAIN}.")
    return data


def _load(path: Path, command: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ResultError(f"{path}: there is no such result file. Make it: `{command}`.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ResultError(f"{path}: not JSON ({error}). Make it again: `{command}`.") from None


def _check_format(data: Any, where: str) -> None:
    found = data.get("format") if isinstance(data, dict) else None
    if found != FORMAT:
        raise ResultError(
            f"{where}: result format {found} was found, this version of memsave reads format {FORMAT}. "
            f"Nothing was changed. Measure it again: {_AGAIN}."
        )


def write(path: Path, data: dict[str, Any]) -> None:
    """Writes JSON whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
