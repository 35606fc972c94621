"""PEFT, checkpointing, accelerate, compilation and plain loops, before and after a conversion."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import memsave
from memsave import LaMDAConfig, RoutedFFNConfig, SHiRAConfig, SparseMHAConfig, WTACRSConfig
from memsave.config import applied_configs
from memsave.nn.routed_ffn import set_balance_scale

from ..test_compile import needs_compiler
from .trainers import batch, dataset, llama

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*use_reentrant:UserWarning")
ROUTED = RoutedFFNConfig(target_modules=r".*\.mlp")
SAMPLED = WTACRSConfig(keep_ratio=0.3, min_rows=2, target_modules=["up_proj", "down_proj"])
SPARSE = SparseMHAConfig(
    keep=4, granularity="token", codebook="ema", num_subspaces=4, dense_below=8, target_modules=r".*self_attn"
)


def gradients(model: Any, run: Callable[..., Any] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one step."""
    model.zero_grad()
    torch.manual_seed(5)
    loss = (model if run is None else run)(**batch()).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(ours: Any, expected: Any, tolerance: float = 2e-5) -> None:
    (loss, grads), (plain_loss, plain_grads) = ours, expected
    torch.testing.assert_close(loss, plain_loss, rtol=1e-6, atol=0)
    assert list(grads) == list(plain_grads)
    for name, grad in plain_grads.items():
        assert (grads[name] - grad).abs().max() <= tolerance * grad.abs().max() + 1e-9, name


def kept(model: Any) -> int:
    return memsave.saved_bytes(lambda: model(**batch()).loss)


def adapted(model: Any, **settings: Any) -> Any:
    """With LoRA whose factors are not zero, the same at every call."""
    torch.manual_seed(3)
    made = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], **settings))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    return made


def converted(model: Any) -> Any:
    memsave.convert_model(model)
    return model


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}], ids=str)
def test_lora_before_and_after_the_conversion(settings: dict[str, Any]) -> None:
    """After it works, and keeps more; converting again repairs that."""
    plain, before, after = (
        adapted(llama(), **settings),
        adapted(llama(), **settings),
        adapted(converted(llama()), **settings),
    )
    memsave.convert_model(before)
    expected = gradients(plain)
    assert any("lora_A" in name for name in expected[1])
    assert ("modules_to_save" in str(list(expected[1]))) == ("modules_to_save" in settings)
    assert_same_step(gradients(before), expected)
    assert_same_step(gradients(after), expected)
    assert kept(before) < kept(after) < kept(plain)
    memsave.convert_model(after)
    assert_same_step(gradients(after), expected)
    assert kept(after) == kept(before)


def test_a_module_to_save_is_converted_with_the_model() -> None:
    for model in (
        converted(adapted(llama(), modules_to_save=["lm_head"])),
        adapted(converted(llama()), modules_to_save=["lm_head"]),
    ):
        memsave.convert_model(model)
        head = model.base_model.model.lm_head
        assert applied_configs(head.modules_to_save["default"]) and applied_configs(head.original_module)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_before_and_after_the_conversion(use_reentrant: bool) -> None:
    plain, before, after = llama(), llama(), llama()
    before.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for model in (before, after):
        memsave.convert_model(model)
    after.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    expected = gradients(plain)
    for model in (before, after):
        assert_same_step(gradients(model), expected)
    assert kept(before) == kept(after) < kept(converted(llama()))


def double(model: Any) -> Any:
    return model.double()


@pytest.mark.parametrize(
    "config",
    [None, LaMDAConfig(r=4, target_modules="all-linear"), SHiRAConfig(density=0.2, target_modules=["q_proj"])],
    ids=["exact", "lamda", "shira"],
)
def test_accumulated_batches_are_one_large_batch(config: Any) -> None:
    models = [double(llama()) for _ in range(2)]
    for model in models:
        if config is not None:
            memsave.convert_model(model, config)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(torch.linspace(0.0, 0.1, parameter.numel()).view_as(parameter))
        memsave.convert_model(model)
    models[0](**batch(0, 8)).loss.backward()
    for start in range(0, 8, 2):
        (models[1](**batch(start, 2)).loss / 4).backward()
    found = {name: p.grad for name, p in models[0].named_parameters() if p.grad is not None}
    assert found and all(grad.abs().max() > 0 for grad in found.values())
    for name, grad in found.items():
        torch.testing.assert_close(models[1].get_parameter(name).grad, grad, rtol=1e-5, atol=1e-9, msg=name)


def train(accelerator: Any, model: Any, optimizer: Any, loader: Any) -> list[float]:
    """One pass over the loader with what a script does around a step."""
    losses = []
    for samples in loader:
        with accelerator.accumulate(model):
            set_balance_scale(model, 1 / accelerator.gradient_accumulation_steps)
            loss = model(**samples).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


def prepared(configs: list[Any], *, steps: int = 2, precision: str = "no", late: bool = False) -> tuple[Any, ...]:
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=steps, mixed_precision=precision)
    torch.manual_seed(0)
    model = llama()
    for config in [] if late else configs:
        memsave.convert_model(model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loader = torch.utils.data.DataLoader(dataset(8), batch_size=2)
    found = (accelerator, *accelerator.prepare(model, optimizer, loader))
    for config in configs if late else []:
        memsave.convert_model(found[1], config)
    return found


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("late", [False, True])
def test_accelerate_trains_the_converted_model_as_the_plain_one(precision: str, late: bool) -> None:
    """In one process, exact methods may also come after `prepare`: the parameters stay the optimizer's."""
    expected = train(*prepared([], precision=precision))
    found = prepared([None], precision=precision, late=late)
    assert applied_configs(found[1].model.norm)
    assert train(*found) == pytest.approx(expected, rel=2e-3 if precision == "bf16" else 1e-5)


@pytest.mark.parametrize(
    "configs",
    [[None], [SAMPLED], [ROUTED, None], [SPARSE], [LaMDAConfig(r=4, target_modules="all-linear"), None]],
    ids=["exact", "wta_crs", "routed_ffn", "sparse_mha", "lamda"],
)
def test_accelerate_goes_on_from_a_saved_state(configs: list[Any], tmp_path: Path) -> None:
    accelerator, *rest = prepared(configs)
    train(accelerator, *rest)
    accelerator.save_state(str(tmp_path / "state"))
    whole = train(accelerator, *rest)
    accelerator, *other = prepared(configs)
    accelerator.load_state(str(tmp_path / "state"))
    assert train(accelerator, *other) == whole
    for mine, theirs in zip(other[0].state_dict().values(), rest[0].state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_parameters_made_after_prepare_are_noticed() -> None:
    found = prepared([ROUTED], steps=1, late=True)
    with pytest.warns(UserWarning, match="router.weight first.*no optimizer trains: AdamW was made before"):
        train(*found)


class Toy(nn.Module):
    """What each method of `COMPILED` finds something in, small enough for a compiler."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 1, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x, x, x, need_weights=False)[0] + x
        return self.mlp(self.norm(x)).square().mean()


COMPILED: dict[str, list[Any]] = {
    "exact": [None],
    "adapters": [LaMDAConfig(r=4, target_modules=["mlp.0"]), None],
    "shira": [SHiRAConfig(density=0.2, target_modules=["mlp.0"]), None],
    "spt": [
        RoutedFFNConfig(target_modules=["mlp"]),
        SparseMHAConfig(
            **{"keep": 4, "granularity": "token", "num_subspaces": 4, "dense_below": 8, "target_modules": ["attention"]}
        ),
    ],
}


@needs_compiler
@pytest.mark.parametrize("configs", COMPILED.values(), ids=COMPILED)
def test_the_default_mode_of_the_compiler_gives_what_eager_mode_gives(configs: list[Any]) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = Toy(), torch.randn(2, 24, 8)
    for config in configs:
        calibrated = isinstance(config, SparseMHAConfig)
        memsave.convert_model(model, config, calibration=[x] if calibrated else None)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.1)  # adapters begin at zero
    found = []
    for run in (model, torch.compile(model)):
        model.zero_grad()
        loss = run(x)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) >= 2
    for eager, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()
