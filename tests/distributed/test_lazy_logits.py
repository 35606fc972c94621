"""Lazy logits under DDP and FSDP2, in a process group of one: where they are lazy, and losses outside of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import memsave
from memsave import LinearCrossEntropyConfig
from memsave.nn.lazy_logits import LazyLogits

pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
CLASSES, WIDTH = 64, 8


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this PyTorch is built without gloo")
    store = f"file://{tmp_path_factory.mktemp('group')}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def model(*, lazy: bool) -> Any:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Sequential(nn.Linear(WIDTH, CLASSES)))
    if lazy:
        memsave.convert_model(made, LinearCrossEntropyConfig(target_modules=["1.0"], min_logits_bytes=0))
    return made


def whole(made: Any) -> nn.Module:
    """The root unit holds the head."""
    fully_shard(made[0])
    return fully_shard(made)


def head_alone(made: Any) -> nn.Module:
    fully_shard(made[1][0])
    return fully_shard(made)


def around_the_head(made: Any) -> nn.Module:
    fully_shard(made[1])
    return fully_shard(made)


def ddp(made: Any) -> nn.Module:
    return nn.parallel.DistributedDataParallel(made)


def ddp_unused(made: Any) -> nn.Module:
    return nn.parallel.DistributedDataParallel(made, find_unused_parameters=True)


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(40, WIDTH, generator=generator), torch.randint(0, CLASSES, (40,), generator=generator)


def losses(wrapped: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> list[float]:
    optimizer, seen = torch.optim.SGD(wrapped.parameters(), lr=0.5), []
    for _ in range(4):
        x, target = inputs()
        value = loss(wrapped(x), target)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(value.item())
    return seen


@pytest.mark.parametrize(
    "loss",
    [F.cross_entropy, lambda z, t: F.nll_loss(z.log_softmax(-1), t)],
    ids=["without logits", "with logits"],
)
@pytest.mark.parametrize("wrap", [ddp, ddp_unused, whole, head_alone])
def test_a_loss_outside_of_the_model_trains_as_the_plain_model(wrap: Any, loss: Any) -> None:
    """FSDP's hooks on the logits are passed on to what the loss is computed from."""
    assert losses(wrap(model(lazy=True)), loss) == pytest.approx(losses(model(lazy=False), loss), rel=1e-5)


@pytest.mark.parametrize(("wrap", "expected"), [(ddp, LazyLogits), (whole, LazyLogits), (head_alone, Tensor)])
def test_where_logits_are_lazy(wrap: Any, expected: type) -> None:
    assert type(wrap(model(lazy=True))(inputs()[0])) is expected


def test_a_weight_that_was_freed_before_the_loss_is_an_error() -> None:
    x, target = inputs()
    logits = around_the_head(model(lazy=True))(x)
    with pytest.raises(RuntimeError, match=r"head's weight was freed \(sharded again\) after the model's forward"):
        F.cross_entropy(logits, target)
