"""Wrapping in DDP or FSDP2 loses none of the bytes that a conversion frees, in a process group of one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from torch import nn

import memsave

from .rows import ROWS, Row
from .worker import MODES

pytest.importorskip("transformers", reason="needs transformers (pip install 'memsave[hf]')")
NOTED = [row for row in ROWS if "noted" in row.id or "llama" in row.id]


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this PyTorch is built without gloo")
    store = f"file://{tmp_path_factory.mktemp('group')}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("row", NOTED, ids=[row.id for row in NOTED])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_a_wrapped_model_frees_the_same_bytes(mode: str, row: Row) -> None:
    """Also where each linear is a unit of its own and gets its input as a view: notes and draws are shared still."""

    def kept(model: nn.Module) -> int:
        model(row.batch(0, 0)).backward()  # the first forward of a sharded model sets it up
        return memsave.saved_bytes(lambda: model(row.batch(0, 0)))

    freed = kept(row.plain()) - kept(row.converted())
    wrapped = MODES[mode](row.plain()), MODES[mode](row.converted())
    assert freed > 0
    assert kept(wrapped[0]) - kept(wrapped[1]) == freed
