"""Imports run one way only, and optional packages are needed by nobody who does not ask for them.

Layers, read from the sources by `ast`; a layer is a file or folder directly in memsave/.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import memsave

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "memsave"
FILES = sorted(PACKAGE.rglob("*.py"))

# For each layer: what it imports when it is imported itself, and what it may import later, inside functions.
ALLOWED: dict[str, tuple[set[str], set[str]]] = {
    "errors": (set(), set()),
    "config": ({"errors"}, set()),
    "wrappers": (set(), set()),
    "text": (set(), set()),
    "report": ({"config", "errors", "text"}, {"memory"}),
    "targets": ({"config"}, set()),
    "guard": ({"config", "errors"}, set()),
    "convert": (
        {"applying", "carrying_out", "planning", "config", "optimizers", "report", "targets", "wrappers", "errors"},
        {"methods", "memory"},
    ),
    "carrying_out": ({"applying", "planning", "config", "targets", "errors"}, set()),
    "planning": ({"applying", "config", "report", "targets", "errors", "text"}, set()),
    "optimizers": ({"errors"}, set()),
    "applying": ({"config", "errors", "guard"}, set()),
    "saving": ({"applying", "config", "errors", "guard", "wrappers"}, {"integrations", "methods", "peft", "__init__"}),
    "methods": ({"nn", "ops", "slicing", "config", "errors"}, {"integrations"}),
    "slicing": ({"memory", "errors", "text"}, set()),
    "nn": ({"ops"}, set()),
    "ops": ({"errors"}, set()),
    "memory": ({"ops", "wrappers", "errors", "text"}, set()),
    "explaining": ({"convert", "methods", "nn", "memory", "config", "errors", "text"}, set()),
    "environment": ({"ops", "__init__"}, set()),
    "commands": ({"__init__", "config", "errors", "explaining", "report"}, {"integrations"}),
    "__init__": (
        set(),
        {
            *(
                "convert",
                "explaining",
                "methods",
                "memory",
                "config",
                "report",
                "errors",
                "ops",
                "nn",
                "saving",
                "peft",
            ),
            "integrations",
        },
    ),
    "__main__": ({"commands", "environment", "errors"}, set()),
    "integrations": (
        {
            *("convert", "methods", "nn", "ops", "memory", "saving", "config", "report", "targets", "errors", "guard"),
            *("text", "__init__"),
        },
        set(),
    ),
    "peft": ({"integrations"}, set()),
}
OPTIONAL = {"transformers", "peft", "accelerate", "matplotlib", "safetensors", "tqdm"}
KERNELS = {"reference", "native", "triton"}


class Import(NamedTuple):
    """`name` is absolute, such as memsave.ops.gather_rows.reference.gather_rows; `late` is true inside functions."""

    name: str
    late: bool
    typing_only: bool


def dotted(path: Path) -> tuple[str, ...]:
    """Name of a file's module as parts: ("memsave", "ops", "draw_rows", "__init__")."""
    return path.relative_to(PACKAGE.parent).with_suffix("").parts


def imports_of(path: Path, source: str | None = None) -> Iterator[Import]:
    tree = ast.parse(path.read_text() if source is None else source)
    yield from _walk(tree, dotted(path), late=False, typing_only=False)


def _walk(node: ast.AST, here: tuple[str, ...], late: bool, typing_only: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, late, typing_only) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = [*here[: len(here) - node.level]] if node.level else []
        prefix = ".".join([*base, *([node.module] if node.module else [])])
        yield from (Import(f"{prefix}.{alias.name}", late, typing_only) for alias in node.names)
    for child in ast.iter_child_nodes(node):
        typed = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and child in node.body
        inner = late or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from _walk(child, here, inner, typing_only or typed)


def layer(name: str) -> str | None:
    """The layer of an absolute name, or None outside of memsave."""
    parts = name.split(".")
    if parts[0] != "memsave":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in ALLOWED else "__init__"


def layer_of(path: Path) -> str:
    return dotted(path)[1]


def files(*layers: str) -> list[Path]:
    return [path for path in FILES if layer_of(path) in layers]


def title(path: Path) -> str:
    return "/".join(dotted(path)[1:])


def faults(path: Path, source: str | None = None) -> list[str]:
    """Imports that `path` may not have, in words."""
    mine = layer_of(path)
    at_import, later = ALLOWED[mine]
    found = []
    for name, late, typing_only in imports_of(path, source):
        theirs = layer(name)
        if theirs is not None and theirs != mine and not (mine == "__init__" and typing_only):
            if theirs not in (at_import | later if late else at_import):
                found.append(f"{title(path)} imports {name}")
        package = name.split(".")[0]
        if package in OPTIONAL and not late and not typing_only and mine != "integrations":
            found.append(f"{title(path)} imports {package} at module level")
        if package in ("tests", "examples", "benchmarks"):
            found.append(f"{title(path)} imports {name}")
        if package == "triton" and path.stem != "triton" and not path.stem.startswith("triton_"):
            found.append(f"{title(path)} imports triton")
    return found


def test_every_file_belongs_to_a_layer() -> None:
    assert len(FILES) > 20
    assert {layer_of(path) for path in FILES} <= set(ALLOWED)


@pytest.mark.parametrize("path", FILES, ids=title)
def test_imports_run_one_way(path: Path) -> None:
    assert faults(path) == []


@pytest.mark.parametrize("path", files("methods"), ids=title)
def test_no_method_imports_another(path: Path) -> None:
    if path.name == "__init__.py" and path.parent == PACKAGE / "methods":
        return
    mine = ".".join(dotted(path)[:3])
    others = [i.name for i in imports_of(path) if i.name.startswith("memsave.methods")]
    assert [name for name in others if not f"{name}.".startswith(f"{mine}.")] == []


@pytest.mark.parametrize("path", [p for p in files("ops") if p.parent.parent == PACKAGE / "ops"], ids=title)
def test_backends_of_an_op_do_not_know_each_other(path: Path) -> None:
    """An op's __init__ imports its reference, on which C++ may build; else a backend imports its own kind only."""
    allowed = {"__init__": {"reference"}, "native": {"native", "reference"}}.get(path.stem, {path.stem})
    for name, late, _ in imports_of(path):
        parts = name.split(".")
        backends = KERNELS & set(parts[2:]) if parts[:2] == ["memsave", "ops"] else set()
        assert backends <= allowed, f"{title(path)} imports {name}"
        assert not (backends and late), f"{title(path)} hides an import of {name} in a function"


@pytest.mark.parametrize(
    ("file", "source", "fault"),
    [
        ("convert.py", "from .methods import WTACRSConfig", "convert imports memsave.methods.WTACRSConfig"),
        ("convert.py", "from .nn.converted import swap", "convert imports memsave.nn.converted.swap"),
        ("nn/linear.py", "from ..config import Guarantee", "nn/linear imports memsave.config.Guarantee"),
        ("nn/linear.py", "def f():\n    import memsave.methods", "nn/linear imports memsave.methods"),
        ("methods/wta_crs.py", "from ..convert import convert_model", "methods/wta_crs imports memsave.convert.conv"),
        ("ops/draw_rows/__init__.py", "from ... import nn", "ops/draw_rows/__init__ imports memsave.nn"),
        ("ops/draw_rows/reference.py", "import triton", "ops/draw_rows/reference imports triton"),
        ("nn/norm.py", "import transformers", "nn/norm imports transformers at module level"),
        ("memory/plot.py", "from matplotlib import pyplot", "memory/plot imports matplotlib at module level"),
        ("errors.py", "from tests import trees", "errors imports tests.trees"),
        ("__init__.py", "from .convert import convert_model", "__init__ imports memsave.convert.convert_model"),
    ],
)
def test_the_rules_find_what_they_forbid(file: str, source: str, fault: str) -> None:
    assert any(found.startswith(fault) for found in faults(PACKAGE / file, source))


def test_the_rules_allow_what_they_should() -> None:
    assert faults(PACKAGE / "convert.py", "def f():\n    from .methods import METHODS") == []
    assert faults(PACKAGE / "memory/plot.py", "def f():\n    import matplotlib") == []
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .convert import convert_model"
    assert faults(PACKAGE / "__init__.py", typed) == []


def in_fresh_process(code: str, **environment: str) -> str:
    """Run `code` in a new interpreter at the root of the sources; its output."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_memsave_imports_nothing_else_and_touches_nothing() -> None:
    code = """
import random, sys, torch
optional = {"transformers", "peft", "matplotlib", "accelerate"}  # torch itself imports triton where it compiles
before, state, python_state = set(sys.modules), torch.get_rng_state(), random.getstate()
dtype, threads, grad = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
namespaces = set(vars(torch.ops))
import memsave
assert torch.equal(state, torch.get_rng_state()) and random.getstate() == python_state
assert (dtype, threads, grad) == (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled())
assert set(vars(torch.ops)) == namespaces
print(sorted(name for name in set(sys.modules) - before if name.startswith(("memsave", "triton"))))
memsave.convert_model(torch.nn.Sequential(torch.nn.LayerNorm(4), torch.nn.Linear(4, 4)))
print(sorted({name.split(".")[0] for name in sys.modules} & optional))
"""
    assert in_fresh_process(code).splitlines() == ["['memsave']", "[]"]


BLOCK = """
import sys
for name in ("triton", "transformers", "peft", "accelerate", "matplotlib", "safetensors", "tqdm", "einops"):
    sys.modules[name] = None
"""


def test_works_without_any_optional_package() -> None:
    code = (
        BLOCK
        + """
import torch, memsave
from torch import nn
needs = dict.fromkeys(("LaMDAConfig", "SHiRAConfig", "export", "fuse_adapters", "load_adapter", "save_adapter"), "peft")
needs |= dict.fromkeys(("low_rank_cache", "MemsaveCallback"), "transformers")
for name in memsave.__all__:
    try:
        getattr(memsave, name)
    except ImportError as error:
        assert name in needs and f"needs {needs[name]}: pip install 'memsave[hf]'" in str(error), name
memsave.backends()
model = nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 1))
memsave.convert_model(model, [memsave.RecomputeNormConfig(),
                              memsave.WTACRSConfig(keep_ratio=0.5, min_rows=1, target_modules=r".*")])
profile = memsave.measure(lambda: model(torch.ones(6, 8)).sum().backward())
assert profile.peak_bytes > 0 and model[1].weight.grad is not None
memsave.restore_model(model)
print(type(model[1]).__name__)
"""
    )
    assert in_fresh_process(code) == "Linear"


def test_public_names_are_listed_and_found() -> None:
    assert set(memsave.__all__) <= set(dir(memsave))
    assert len(set(memsave.__all__)) == len(memsave.__all__)
    for name in ("ops", "nn", "methods", "memory"):
        assert getattr(memsave, name).__name__ == f"memsave.{name}"
    with pytest.raises(AttributeError, match="module 'memsave' has no attribute 'convert_modle'"):
        _ = memsave.convert_modle
