"""SHiRA on two gloo processes, DDP and FSDP2: what one process does on the sequences of both."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .lamda_models import llama
from .processes import left_by, needs_gloo
from .shira_worker import MODES, RANKS, tokens, train, trained_before

pytestmark = [pytest.mark.slow, needs_gloo]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank left."""
    return left_by("shira_worker", RANKS, tmp_path_factory.mktemp("shira"))


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
