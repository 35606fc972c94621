"""PEFT's own suite for custom models, run on memsave's tuners where PEFT's test files are available.

    PEFT_TESTS=/path/to/peft/tests pytest tests/integrations/peft/test_peft_suite.py

They are not part of PEFT's package, and none is kept here. What is always run is in `test_tuners.py`.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from memsave.peft import SHiRAConfig

from .tuners import SUITE_CASES, TUNERS

FOLDER = os.environ.get("PEFT_TESTS")
_CASES, _CLASSES = "test_name, model_id, config_cls, config_kwargs", "config_cls"
_HALVES = (torch.float16, torch.bfloat16)


def fails_by_design(test: str, parameters: dict[str, Any]) -> str | None:
    """Why we do not want what `test` expects of these cases, or None."""
    if test == "test_adapter_dtype_autocast":
        if parameters["autocast_adapter_dtype"] and parameters["dtype"] in _HALVES:
            return "adapters have the dtype of the base weight: float32 would make them keep more"
    if test == "test_only_params_are_updated":
        if parameters["config_cls"] is SHiRAConfig and parameters["config_kwargs"].get("apply") != "added":
            return "the base weight holds the values; state_dict has the originals (test_shira_weight.py)"
    return None


@pytest.fixture(autouse=True)
def by_design(request: pytest.FixtureRequest) -> None:
    """Marks the cases whose failure is meant."""
    callspec = getattr(request.node, "callspec", None)
    if callspec and (reason := fails_by_design(request.node.originalname, callspec.params)):
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))


def suite(folder: str) -> types.ModuleType:
    """PEFT's tests for custom models, as part of a package of another name than ours."""
    package = types.ModuleType("peft_tests")
    package.__path__ = [folder]
    sys.modules["peft_tests"] = package
    # PEFT's helpers import these for tests that are not run here; others must not take the stand-ins for the packages.
    stand_ins = []
    for name, attribute in (("diffusers", "StableDiffusionPipeline"), ("datasets", "load_dataset")):
        if find_spec(name) is None:
            sys.modules[name] = types.ModuleType(name)
            setattr(sys.modules[name], attribute, type(attribute, (), {}))
            stand_ins.append(name)
    try:
        return importlib.import_module("peft_tests.test_custom_models")
    finally:
        for name in stand_ins:
            del sys.modules[name]


def ours(function: Callable[..., Any], parameters: dict[str, list[Any]]) -> Callable[..., Any] | None:
    """A copy of a test with our cases in place of PEFT's; None for one that is about other methods alone."""
    marks = [mark for mark in getattr(function, "pytestmark", []) if mark.name == "parametrize"]
    if not any(mark.args[0] in parameters and len(mark.args[1]) > 20 for mark in marks):
        return None
    copy = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    for mark in marks:
        values = parameters.get(mark.args[0], mark.args[1])
        copy = pytest.mark.parametrize(mark.args[0], values)(copy)
    return copy


def cases_of(module: types.ModuleType) -> Iterator[tuple[str, Callable[..., Any]]]:
    parameters = {_CASES: SUITE_CASES, _CLASSES: TUNERS}
    for cls in module.TestPeftCustomModel.__mro__:
        for name, function in vars(cls).items():
            if name.startswith("test_") and (copy := ours(function, parameters)) is not None:
                yield name, copy


if FOLDER is None or not (Path(FOLDER) / "test_custom_models.py").is_file():

    @pytest.mark.skip(reason="PEFT's own test files are not available; name their folder in PEFT_TESTS")
    def test_custom_models() -> None: ...

else:
    _module = suite(FOLDER)
    TestOnOurTuners = type("TestOnOurTuners", (_module.TestPeftCustomModel,), dict(cases_of(_module)))
    for _name in set(dir(TestOnOurTuners)) - set(vars(TestOnOurTuners)):
        if _name.startswith("test_"):
            setattr(TestOnOurTuners, _name, None)  # those that are about other methods
