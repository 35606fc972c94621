"""What bare `convert_model` keeps, reports and gives back, for every architecture."""

from __future__ import annotations

import pytest
import torch

import memsave

from ..snapshot import snapshot
from .models import TINY, Architecture
from .step import in_dtype
from .test_exact import DROPOUT, every, every_padding

pytest.importorskip("transformers", reason="needs transformers (pip install 'memsave[hf]')")


@every_padding
@pytest.mark.parametrize("dropout", [0.0, DROPOUT], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keeps_fewer_bytes(architecture: Architecture, padding: str | None, dropout: float, dtype: torch.dtype) -> None:
    model = architecture.make(dropout=dropout).to(dtype)
    batch = in_dtype(architecture.batch(TINY, padding), dtype)
    plain_bytes = memsave.saved_bytes(lambda: model(**batch).loss)
    memsave.convert_model(model)
    assert 0 < memsave.saved_bytes(lambda: model(**batch).loss) < plain_bytes


@every
def test_every_module_with_parameters_is_converted_or_named_with_a_reason(architecture: Architecture) -> None:
    model = architecture.make()
    report = memsave.convert_model(model)
    converted = {name for row in report.rows for name in row.names}
    left = {name: skip.reason for skip in report.skipped for name in skip.names}
    assert converted and not converted & left.keys()
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            assert name in converted or left.get(name), f"{name} ({type(module).__name__}) is not in the report"
            assert name in converted or left[name].split()[1:], f"{name}: {left[name]!r} is no reason"


@every
def test_restoring_gives_back_every_bit(architecture: Architecture) -> None:
    model = architecture.make()
    before = snapshot(model)
    memsave.convert_model(model)
    assert snapshot(model)["modules"] != before["modules"]
    memsave.restore_model(model)
    assert snapshot(model) == before
