"""The tuners that the tests of this folder run on, and the models and settings for PEFT's own suite."""

from __future__ import annotations

from typing import Any

from memsave.peft import LaMDAConfig, SHiRAConfig

TUNERS: list[Any] = [SHiRAConfig, LaMDAConfig]

SETTINGS: list[tuple[str, Any, dict[str, Any]]] = [
    ("shira", SHiRAConfig, {"density": 0.2}),
    ("shira added", SHiRAConfig, {"density": 0.2, "apply": "added"}),
    ("lamda", LaMDAConfig, {"r": 1, "svd": "exact"}),
]

SUITE_CASES: list[tuple[str, str, Any, dict[str, Any]]] = [
    (f"{kind} {name}", model, cls, {**settings, **chosen})
    for kind, cls, chosen in SETTINGS
    for name, model, settings in (
        ("linear 1", "MLP", {"target_modules": "lin0"}),
        ("linear 2", "MLP", {"target_modules": ["lin0"]}),
        ("linear 3", "MLP", {"target_modules": ["lin1"]}),
        ("linear 4", "MLP", {"target_modules": ["lin0", "lin1"]}),
        ("linear 5", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
        ("conv1d", "EmbConv1D", {"target_modules": ["conv1d"]}),
    )
]
