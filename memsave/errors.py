"""What can go wrong, as classes that a caller can tell apart.

Every message says what was given, what was expected, where, what to do, and that the model was not changed.
"""

from __future__ import annotations

from collections.abc import Sequence


class MemsaveError(Exception):
    """Base of every error that memsave raises on purpose."""


class NoMatchError(MemsaveError, ValueError):
    """A target names no module, or only modules that the method cannot convert."""


class ConflictError(MemsaveError, ValueError):
    """Two methods, or two configs of one method, want the same part of one module."""


class UnsupportedModelError(MemsaveError, ValueError):
    """The model cannot be converted as it is (a wrapper, a compiled module, the root itself)."""


class RestoreError(MemsaveError, ValueError):
    """The model cannot be restored in the way that was asked for."""


class EstimateError(MemsaveError, ValueError):
    """A training step could not be predicted: the batch, the loss or the optimizer fails, or values are needed."""


class SaveError(MemsaveError, ValueError):
    """The model, or the directory to write to, is not fit for what was asked; nothing was written."""


class LoadError(MemsaveError, ValueError):
    """A checkpoint is missing, damaged or of another format, or does not fit the model; the model was not changed."""


class NotAModelError(MemsaveError, AttributeError, TypeError):
    """A report was used as if it were the converted model."""


class ConversionError(MemsaveError, ValueError):
    """Several problems were found in one plan; `problems` holds each of them."""

    def __init__(self, problems: Sequence[MemsaveError]) -> None:
        self.problems = tuple(problems)
        texts = (str(p).removesuffix(" The model was not changed.") for p in self.problems)  # said once is enough
        lines = "\n".join(
            f"  {i}. {type(p).__name__}: {text}"
            for i, (p, text) in enumerate(zip(self.problems, texts, strict=True), 1)
        )
        super().__init__(f"{len(self.problems)} problems; the model was not changed:\n{lines}")


def raise_all(problems: Sequence[MemsaveError]) -> None:
    """Raise nothing, the one problem there is, or all of them together."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise ConversionError(problems)
