"""`linear_cross_entropy` with its classes divided over two and four gloo processes does what one process does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from memsave import linear_cross_entropy

from .test_rows import run_processes
from .vocabulary_worker import CHUNK_TOKENS, IGNORE, OPTIONS, SHARDS, D, N, V, inputs, run

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this PyTorch is built without gloo"
)


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank left."""
    folder: Path = tmp_path_factory.mktemp("vocabulary")
    run_processes("tests.distributed.vocabulary_worker", [str(request.param)], request.param, folder)
    logs = "\n".join(log.read_text()[-3000:] for log in sorted(folder.glob("log.*")))
    found = [folder / f"{rank}.pt" for rank in range(request.param)]
    assert all(path.exists() for path in found), logs
    return [torch.load(path) for path in found]


@pytest.mark.parametrize("name", OPTIONS)
def test_several_processes_do_what_one_does(ranks: list[dict[str, Any]], name: str) -> None:
    expected = run(name, 1, 0, None)
    *shared, d_weight, d_bias = zip(*(rank["results"][name] for rank in ranks), strict=True)
    for values in shared:
        assert all(torch.equal(value, values[0]) for value in values), "the ranks differ"
    found = [*(values[0] for values in shared), torch.cat(d_weight), torch.cat(d_bias)]
    assert [len(part) for part in d_bias] == list(SHARDS[len(ranks)])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert all(t.isfinite().all() and t.count_nonzero() for t in found)


@pytest.mark.parametrize("name", OPTIONS)
def test_messages(ranks: list[dict[str, Any]], name: str) -> None:
    """The sizes of the shards, the statistics (of each chunk for a mean or a sum), the gradient of hidden."""
    options, counting = OPTIONS[name], int((inputs(name)[3] != IGNORE).sum())
    chunks = math.ceil(counting / CHUNK_TOKENS)
    assert chunks > 1 and N != counting
    per_token = options.get("reduction") == "none" or "return_logsumexp" in options
    expected = 3 if per_token else 2 + chunks
    assert [rank["messages"][name] for rank in ranks] == [expected] * len(ranks)


def test_a_target_out_of_range_raises_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert f"target {V} is out of bounds, expected classes from 0 to {V - 1}" in rank["refusal"]


def test_a_process_group_under_a_compiler_is_refused() -> None:
    hidden, weight, target = torch.ones(3, D), torch.ones(V, D), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="a process group was given under torch.compile.*expected eager mode"):
        torch.func.grad(lambda h: linear_cross_entropy(h, weight, target, process_group="any"))(hidden)


class Model(nn.Module):
    """Calls the function in its own forward, with the weight of its head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(D, D), nn.Linear(D, V)

    def forward(self, x: Tensor, target: Tensor, **options: Any) -> Tensor:
        return linear_cross_entropy(self.body(x), self.head.weight, target, self.head.bias, **options).mean()


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("wrap", [fully_shard, nn.parallel.DistributedDataParallel])
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_in_the_forward_of_a_wrapped_model(wrap: Any, reduction: str) -> None:
    plain, wrapped = Model(), wrap(Model())
    x, target = torch.randn(7, D), torch.arange(7)
    losses = [model(x, target, reduction=reduction) for model in (plain, wrapped)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[0], losses[1])
    found = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in wrapped.parameters()]
    torch.testing.assert_close(found, [p.grad for p in plain.parameters()])


@pytest.mark.usefixtures("one_process")
def test_a_sharded_weight_is_refused() -> None:
    weight = fully_shard(Model()).head.weight
    expected = r"not a DTensor: call it where FSDP has gathered the weight.*to_local\(\)"
    with pytest.raises(ValueError, match=expected):
        linear_cross_entropy(torch.ones(3, D), weight, torch.zeros(3, dtype=torch.int64))
