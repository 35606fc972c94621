"""The schedule on two gloo processes, DDP and FSDP2: what one process does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .lamda_worker import MODES, RANKS, train
from .processes import left_by, needs_gloo

pytestmark = [pytest.mark.slow, needs_gloo]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank left."""
    return left_by("lamda_worker", RANKS, tmp_path_factory.mktemp("lamda"))


@pytest.mark.parametrize("mode", MODES[1:])
def test_two_processes_do_what_one_does(ranks: list[dict[str, Any]], mode: str) -> None:
    expected = train("one process")
    assert expected["frozen"] == [1, 2, 4, 5, 6, 8, 8, 8]
    for rank in ranks:
        found = rank[mode]
        assert found["frozen"] == expected["frozen"] and found["states"] == expected["states"]
        torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-5, atol=1e-6)
        assert found["values"].keys() == expected["values"].keys()
        for name, value in found["values"].items():
            torch.testing.assert_close(value, expected["values"][name], rtol=1e-4, atol=1e-5, msg=name)
