"""Finds every Triton function of a package by its source, and those that a set of kernels calls."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path
from typing import Any

JIT = {"jit", "JITFunction"}


def names_in(source: str) -> list[str]:
    """The functions that `jit` decorates.

    Raises:
        ValueError: `jit` is used in a way that this cannot follow, so that a kernel might be missed.
    """
    tree = ast.parse(source)
    found, followed = [], set()
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        for decorator in node.decorator_list:
            function = decorator.func if isinstance(decorator, ast.Call) else decorator
            if _last_name(function) in JIT:
                found.append(node.name)
                followed.add(function)
    for node in ast.walk(tree):
        if _last_name(node) in JIT and node not in followed and ast.unparse(node) != "torch.jit":
            raise ValueError(f"line {node.lineno}: jit is not used as a decorator: {ast.unparse(node)}")
        if isinstance(node, (ast.Import, ast.ImportFrom)) and any(a.name in JIT and a.asname for a in node.names):
            raise ValueError(f"line {node.lineno}: jit gets another name: {ast.unparse(node)}")
    return found


def _last_name(node: ast.AST) -> str | None:
    """`jit` for jit and for triton.jit; None for what is no name."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else None


def functions_of(package: Path) -> set[str]:
    """Every Triton function below a folder, as "memsave.ops.gather_rows.triton.gather_kernel"."""
    found = set()
    for path in sorted(package.rglob("*.py")):
        module = ".".join(path.relative_to(package.parent).with_suffix("").parts)
        try:
            found |= {f"{module}.{name}" for name in names_in(path.read_text())}
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return found


def reached_from(kernels: Iterable[Any]) -> set[str]:
    """The names of kernels and of all Triton functions that they call, however deep."""
    found: dict[str, Any] = {}
    waiting = list(kernels)
    while waiting:
        function = waiting.pop().fn
        name = f"{function.__module__}.{function.__name__}"
        if name not in found:
            found[name] = function
            used = (function.__globals__.get(name) for name in function.__code__.co_names)
            waiting += [value for value in used if hasattr(value, "fn") and hasattr(value, "arg_names")]
    return set(found)
