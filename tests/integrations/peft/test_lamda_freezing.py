"""The schedule: what is frozen when, bit by bit, in plain loops, under DDP and in transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import memsave
from memsave.integrations.peft.lamda import LaMDACallback, LaMDAFreezer, lamda_param_groups
from memsave.integrations.peft.lamda.freezing import FreezeError, due_rows
from memsave.integrations.peft.lamda.layer import segment_ends

from .lamda_models import LINEARS_PER_LAYER, RANK, adapted, batch, block, config, layers, llama, rows


@pytest.mark.parametrize(
    ("rank", "step", "total", "freeze_until", "due"),
    [
        (32, 0, 100, 0.3, 0),
        (32, 1, 100, 0.3, 1),
        (32, 15, 100, 0.3, 16),
        (32, 29, 100, 0.3, 30),
        (32, 30, 100, 0.3, 32),  # 0.3 * 100 is 30.000000000000004 in floats
        (32, 100, 100, 0.3, 32),
        (32, 10, 100, 0.1, 32),  # the float 0.1 is a little more than a tenth
        (5, 0, 10, 0.0, 5),
        (8, 5, 10, 1.0, 4),
        (8, 9, 10, 1.0, 7),
        (8, 10, 10, 1.0, 8),
        (3, 1, 1, 0.3, 3),
    ],
)
def test_due_rows(rank: int, step: int, total: int, freeze_until: float, due: int) -> None:
    assert due_rows(rank, step, total, freeze_until) == due


@pytest.mark.parametrize("rank", [1, 3, 7, 8, 9, 12, 32, 65])
def test_segments_are_of_nearly_equal_size(rank: int) -> None:
    ends = segment_ends(rank)
    sizes = [b - a for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    assert sum(sizes) == rank and len(sizes) == min(rank, 8) and max(sizes) - min(sizes) <= 1


def train(model: nn.Module, optimizer: torch.optim.Optimizer, freezer: LaMDAFreezer | None, steps: int) -> None:
    for _ in range(steps):
        model(rows()).square().mean().backward()
        optimizer.step()
        if freezer is not None:
            freezer.step(optimizer)
        optimizer.zero_grad()


def test_rows_are_bit_frozen_and_lose_their_optimizer_state() -> None:
    model = adapted()
    # Weight decay on everything, B too: what is frozen must not decay either.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    freezer, bytes_held = LaMDAFreezer(model, 20), []
    table, frozen_values = [], dict[int, Tensor]()
    for _ in range(12):
        train(model, optimizer, freezer, 1)
        table.append(layers(model)[0].frozen_rows("default"))
        for layer in layers(model):
            for i, segment in enumerate(layer.segments("default")):
                frozen = i < layer.frozen_segments["default"]
                assert segment.requires_grad != frozen and (segment in optimizer.state) != frozen
                assert not frozen or segment.grad is None
                if frozen:
                    assert torch.equal(frozen_values.setdefault(id(segment), segment.clone()), segment)
        bytes_held.append(sum(t.nbytes for state in optimizer.state.values() for t in state.values()))
    # Due after each step: 2, 4, 6, ... of 12 rows; segments end at 1, 3, 4, 6, 7, 9, 10, 12.
    assert table == [1, 4, 6, 7, 10, *[12] * 7]
    assert bytes_held == sorted(bytes_held, reverse=True) and bytes_held[-1] < bytes_held[0]
    assert len(frozen_values) == 16
    assert all(layer.memsave_lamda_S["default"] in optimizer.state for layer in layers(model))


def test_what_is_frozen_loses_its_gradient_at_once() -> None:
    model = adapted()
    model(rows()).square().sum().backward()
    LaMDAFreezer(model, 10).step()  # 4 rows
    grads = [[segment.grad is None for segment in layer.segments("default")] for layer in layers(model)]
    assert grads == [[True] * 3 + [False] * 5] * 2


def test_freeze_until_zero_never_trains_b() -> None:
    model = adapted(freeze_until=0.0)
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"memsave_lamda_S"}
    assert all(layer.frozen_rows("default") == RANK for layer in layers(model))


def test_freeze_until_one_keeps_rows_to_the_end() -> None:
    model = adapted(freeze_until=1.0)
    freezer = LaMDAFreezer(model, 4)
    for expected in (3, 6, 9, 12):
        freezer.step()
        assert layers(model)[0].frozen_rows("default") == expected


def test_only_active_adapters_are_frozen() -> None:
    model = adapted()
    model.add_adapter("other", config())
    LaMDAFreezer(model, 1).step()
    assert [layer.frozen_segments for layer in layers(model)] == [{"default": 8, "other": 0}] * 2


def test_gradients_of_what_trains_are_those_of_the_unfrozen_model() -> None:
    torch.manual_seed(0)
    model, frozen = adapted(), adapted()
    for tuned in (model, frozen):
        with torch.no_grad():
            for layer in layers(tuned):
                layer.memsave_lamda_S["default"].copy_(torch.eye(RANK))
    LaMDAFreezer(frozen, 10).apply(2)
    for tuned in (model, frozen):
        tuned(rows()).square().sum().backward()
    expected = dict(model.named_parameters())
    for name, p in frozen.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, expected[name].grad)


def test_param_groups() -> None:
    model = adapted(modules_to_save=["down"], target_modules=["up"])
    groups = lamda_param_groups(model, weight_decay=0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    b = {id(p) for p in layers(model)[0].segments("default")}
    assert {id(p) for p in groups[1]["params"]} == b
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for p in groups[0]["params"]} == trained - b and len(trained) == 8 + 1 + 1
    assert [len(g["params"]) for g in lamda_param_groups(adapted(freeze_until=0.0))] == [2]


def test_state_dict_resumes_the_schedule() -> None:
    model = adapted()
    freezer = LaMDAFreezer(model, 20)
    for _ in range(3):
        freezer.step()
    resumed = adapted()
    again = LaMDAFreezer(resumed, 20)
    again.load_state_dict(freezer.state_dict())
    assert again.steps_done == 3 and layers(resumed)[0].frozen_rows("default") == 6
    with pytest.raises(ValueError, match="expected a state of 30 steps, got 20"):
        LaMDAFreezer(resumed, 30).load_state_dict(freezer.state_dict())


def test_refusals() -> None:
    with pytest.raises(ValueError, match="expected total_steps to be a positive integer, got 0"):
        LaMDAFreezer(adapted(), 0)
    with pytest.raises(ValueError, match="the model has no LaMDA layer"):
        LaMDAFreezer(block(), 10)


@pytest.fixture
def one_process(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("given_inner", [False, True])
@pytest.mark.parametrize("settings", [{}, {"find_unused_parameters": True, "static_graph": True}])
def test_ddp_that_waits_for_all_gradients_is_refused(one_process: Any, settings: Any, given_inner: bool) -> None:
    model = adapted()
    ddp = DistributedDataParallel(model, **settings)
    optimizer = torch.optim.AdamW(lamda_param_groups(model))
    freezer = LaMDAFreezer(model if given_inner else ddp, 20)
    train(ddp, optimizer, None, 1)
    states = len(optimizer.state)
    with pytest.raises(FreezeError, match="find_unused_parameters=True .*wrap the model again.*Nothing was changed"):
        freezer.step(optimizer)
    assert freezer.steps_done == 0 and len(optimizer.state) == states
    assert all(layer.frozen_rows("default") == 0 for layer in layers(model))
    train(ddp, optimizer, None, 1)
    # Dropped, the schedule goes on, and the model can be wrapped again.
    del ddp
    freezer = LaMDAFreezer(model, 20)
    freezer.apply(2, optimizer)
    train(DistributedDataParallel(model), optimizer, None, 2)
    assert layers(model)[0].frozen_rows("default") == 4


def test_ddp_with_unused_parameters_follows_the_schedule(one_process: Any) -> None:
    model, plain = adapted(), adapted()
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    for wrapped, inner in ((ddp, model), (plain, plain)):
        optimizer = torch.optim.AdamW(lamda_param_groups(inner), lr=0.01)
        train(wrapped, optimizer, LaMDAFreezer(inner, 20), 8)
    assert layers(model)[0].frozen_rows("default") == RANK
    for p, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, expected)


def test_ddp_without_b_needs_nothing(one_process: Any) -> None:
    model = adapted(freeze_until=0.0)
    ddp = DistributedDataParallel(model)
    train(ddp, torch.optim.AdamW(lamda_param_groups(model)), LaMDAFreezer(model, 4), 3)


def trainer(folder: Path, model: nn.Module, steps: int, **given: Any) -> transformers.Trainer:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        save_strategy="steps",
        save_steps=4,
        logging_steps=100,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        **given,
    )
    ids = torch.randint(64, (16, 12), generator=torch.Generator().manual_seed(5))
    data = [{"input_ids": row, "labels": row} for row in ids]
    return transformers.Trainer(model, arguments, train_dataset=data, callbacks=[LaMDACallback()])


def tuned_llama() -> Any:
    return adapted(llama(), r=8, target_modules="all-linear", freeze_until=0.5)


def test_trainer_follows_the_schedule_and_resumes_to_the_same_result(tmp_path: Path) -> None:
    whole = tuned_llama()
    trainer(tmp_path / "whole", whole, 16).train()
    assert all(layer.frozen_rows("default") == 8 for layer in layers(whole))
    # Step 4 of 8: half of B is frozen in the checkpoint from which a new process goes on.
    resumed = tuned_llama()
    again = trainer(tmp_path / "resumed", resumed, 16)
    seen: list[int] = []
    again.add_callback(_Watch(seen))
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert seen[0] == 4 and seen[-1] == 8
    for (name, p), expected in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(p, expected), name
    b = {id(p) for layer in layers(resumed) for p in layer.segments("default")}
    assert not any(id(p) in b for p in again.optimizer.state)


class _Watch(transformers.TrainerCallback):
    """Notes how many rows are frozen while training runs, from before the first step on."""

    def __init__(self, seen: list[int]) -> None:
        self.seen = seen

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self.seen.append(layers(model)[0].frozen_rows("default"))


def test_a_whole_model_keeps_t_times_r_per_linear_and_less_than_lora() -> None:
    targets, tokens, kept = "all-linear", 2 * 16, {}
    lora = peft.LoraConfig(r=8, target_modules=targets)
    for name, model in (
        ("base", llama(torch.bfloat16).requires_grad_(False)),
        ("lamda", adapted(llama(torch.bfloat16), r=8, target_modules=targets)),
        ("lora", peft.get_peft_model(llama(torch.bfloat16), lora, autocast_adapter_dtype=False)),
    ):
        model.enable_input_require_grads()  # so that all blocks, also of the frozen base, keep what dx needs
        kept[name] = memsave.saved_bytes(lambda model=model: model(**batch()).loss)
    assert kept["lamda"] - kept["base"] == 2 * LINEARS_PER_LAYER * tokens * 8 * 2
    assert kept["lamda"] < kept["lora"]
