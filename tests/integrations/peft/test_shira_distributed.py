"""SHiRA on two gloo processes, DDP and FSDP2: what one process does on the sequences of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed.test_rows import run_processes

from .lamda_models import llama
from .shira_worker import MODES, RANKS, tokens, train, trained_before

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not dist.is_available() or not dist.is_gloo_available(), reason="this PyTorch is built without gloo"
    ),
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank left."""
    folder: Path = tmp_path_factory.mktemp("shira")
    run_processes("tests.integrations.peft.shira_worker", [], RANKS, folder)
    logs = "\n".join(log.read_text()[-3000:] for log in sorted(folder.glob("log.*")))
    found = [folder / f"{rank}.pt" for rank in range(RANKS)]
    assert all(path.exists() for path in found), logs
    return [torch.load(path) for path in found]


@pytest.mark.parametrize("mode", MODES[1:])
def test_two_processes_do_what_one_does(ranks: list[dict[str, Any]], mode: str) -> None:
    expected = train("one process", start=trained_before(mode))
    base = llama()(input_ids=tokens(None)).logits.detach()
    for rank in ranks:
        found = rank[mode]
        assert found["sharded"] == {mode.startswith("fsdp2")}
        torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["without"], base, rtol=1e-5, atol=1e-5)
        assert found["values"].keys() == expected["values"].keys() and len(expected["values"]) == 14
        for name, value in found["values"].items():
            torch.testing.assert_close(value, expected["values"][name], rtol=1e-3, atol=1e-5, msg=name)
        if mode == "ddp":
            torch.testing.assert_close(found["weight"], expected["weight"], rtol=1e-5, atol=1e-6)
