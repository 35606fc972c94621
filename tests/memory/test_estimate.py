"""`estimate` against `measure` on the same step, byte for byte, and everything that it must leave alone."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils.checkpoint import checkpoint

import memsave
from memsave import EstimateError, MemoryProfile, WTACRSConfig, estimate, measure

from ..snapshot import snapshot

transformers = pytest.importorskip("transformers", reason="needs transformers (the extra hf)")

BATCH, LENGTH, VOCABULARY = 4, 32, 256
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
Change = Callable[[nn.Module], object]


def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))


def labelled(mask: bool = False) -> dict[str, Tensor]:
    batch = {"input_ids": tokens(), "labels": tokens()}
    if mask:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, :5] = 0
    return batch


def llama(*changes: Change, **settings: Any) -> nn.Module:
    """A tiny Llama (B, T) -> (B, T, V) in training mode, changed in place by each of `changes`."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, num_key_value_heads=2, use_cache=False, **{**SIZES, **settings}
    )
    model = transformers.LlamaForCausalLM(config).train()
    for change in changes:
        model = change(model) or model
    return model


def checkpointed(reentrant: bool = False) -> Change:
    def change(model: Any) -> None:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": reentrant})

    return change


def lora(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft", reason="needs peft (the extra hf)")
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))


def exact(model: nn.Module) -> None:
    memsave.convert_model(model)


def rerun(model: nn.Module) -> None:
    exact(model)
    memsave.convert_model(model, memsave.RecomputeMLPConfig(recompute="all"))


def rerun_with_rows(model: nn.Module) -> None:
    exact(model)
    config = memsave.RecomputeMLPConfig(recompute="all", keep_ratio=0.3, target_modules=r".*")
    memsave.convert_model(model, config)


def sampled(model: nn.Module) -> None:
    memsave.convert_model(model, WTACRSConfig(keep_ratio=0.3, target_modules=r".*(down_proj|lora_A).*"))


def frozen(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" in name)


def half(model: nn.Module) -> None:
    model.to(torch.bfloat16)


def steady_step(
    model: nn.Module, loss_of: Callable[[], Tensor], optimizer: Callable[..., Any] | None
) -> Callable[[], None]:
    """The step that `estimate` predicts, run once already."""
    made = optimizer([p for p in model.parameters() if p.requires_grad]) if optimizer else None

    def step() -> None:
        loss_of().backward()
        if made is not None:
            made.step()
        for parameter in model.parameters():
            parameter.grad = None

    step()
    return step


def assert_equal(predicted: MemoryProfile, real: MemoryProfile) -> None:
    assert predicted.peak_bytes == real.peak_bytes
    assert predicted.saved_bytes == real.saved_bytes
    assert predicted.baseline_bytes == real.baseline_bytes
    assert predicted.by_category == real.by_category
    assert predicted.phase == real.phase
    assert predicted.recomputed_modules == real.recomputed_modules
    assert predicted.by_module == real.by_module


MODELS: dict[str, tuple[Change, ...]] = {
    "plain": (),
    "checkpointed": (checkpointed(),),
    "reentrant": (checkpointed(reentrant=True),),
    "lora": (lora,),
    "lora_checkpointed": (checkpointed(), lora),
    "exact": (exact,),
    "rerun": (rerun,),
    "rerun_with_rows": (rerun_with_rows,),
    "rerun_checkpointed": (rerun, checkpointed()),
    "lora_rerun": (lora, rerun),
    "sampled": (exact, sampled),
    "sampled_checkpointed": (exact, sampled, checkpointed()),
    "lora_sampled": (lora, exact, sampled),
    "frozen": (frozen,),
    "bf16": (half,),
}
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "adamw": AdamW,
    "adamw_foreach": lambda parameters: AdamW(parameters, foreach=True),
    "sgd": lambda parameters: SGD(parameters, lr=0.1),
    "sgd_momentum": lambda parameters: SGD(parameters, lr=0.1, momentum=0.9),
}


def check(model: nn.Module, batch: dict[str, Tensor], autocast: torch.dtype | None, optimizer: Any = AdamW) -> None:
    def loss_of() -> Tensor:
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            return model(**batch).loss

    predicted = estimate(model, batch, optimizer=optimizer, autocast=autocast)
    assert_equal(predicted, measure(steady_step(model, loss_of, optimizer)))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["", "autocast"])
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, autocast: torch.dtype | None) -> None:
    check(llama(*MODELS[name]), labelled(mask=autocast is not None), autocast)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["plain", "checkpointed", "lora", "sampled"])
def test_optimizers(name: str, optimizer: str) -> None:
    check(llama(*MODELS[name]), labelled(), None, OPTIMIZERS[optimizer])


def test_tied_weights() -> None:
    check(llama(tie_word_embeddings=True), labelled(), None)


def test_without_an_optimizer() -> None:
    model, batch = llama(), labelled()
    predicted = estimate(model, batch)
    assert_equal(predicted, measure(steady_step(model, lambda: model(**batch).loss, None)))
    assert predicted.by_category["optimizer"] == 0


def test_a_name_stands_for_the_optimizer() -> None:
    model = llama()
    assert estimate(model, labelled(), optimizer="adamw") == estimate(model, labelled(), optimizer=AdamW)


def test_a_model_on_meta() -> None:
    on_meta = llama().to("meta")
    assert_equal(estimate(on_meta, labelled(), optimizer="AdamW"), estimate(llama(), labelled(), optimizer="AdamW"))
    assert all(p.device.type == "meta" for p in on_meta.parameters())


def test_a_batch_on_meta() -> None:
    on_meta = {name: tensor.to("meta") for name, tensor in labelled().items()}
    assert_equal(estimate(llama(), on_meta), estimate(llama(), labelled()))


def test_a_model_in_eval_mode_is_trained() -> None:
    model = llama(attention_dropout=0.1).eval()
    predicted = estimate(model, labelled())
    assert not model.training and not any(module.training for module in model.modules())
    assert_equal(predicted, estimate(model.train(), labelled()))


class _Triple(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.also = x * 2
        return 3 * x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return 3 * dy + 0 * ctx.saved_tensors[0] * ctx.also


class Branching(nn.Module):
    """Reads values of integers: masks, random numbers, lengths. x (B, D), keep (B,) bool."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 16)
        self.unused = nn.Linear(8, 8)
        self.register_buffer("period", torch.tensor(2))
        self.constant = torch.ones(16)

    def forward(self, x: Tensor, keep: Tensor) -> dict[str, Tensor]:
        y = _Triple.apply(self.linear(x)) * self.constant
        if keep.all() or torch.rand([]) > 2:
            y = y.exp()
        selected = y[keep]  # (sum(keep), 16)
        every = y[torch.arange(len(y)) % self.period == 0]
        picked = y.masked_select(keep[:, None])
        chunks = y.split([int(keep.sum()), len(keep) - int(keep.sum())])
        return {"y": selected.sum() + every.sum() + picked.sum() + sum(chunk.sum() for chunk in chunks)}


@pytest.mark.parametrize("keep", [[True] * 6, [True, False, True, True, False, False]], ids=["all", "some"])
def test_values_of_integers_are_known(keep: list[bool]) -> None:
    model, x = Branching(), torch.randn(6, 8)
    mask = torch.tensor(keep)
    predicted = estimate(model, (x, mask), loss=lambda output: output["y"], optimizer="adamw")
    assert_equal(predicted, measure(steady_step(model, lambda: model(x, mask)["y"], AdamW)))
    assert model.period == 2


def test_integer_buffers_do_not_change() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(2, 3, 8, 8)
    predicted = estimate(model, x, loss=lambda y: y.square().mean(), optimizer="sgd")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert_equal(predicted, measure(steady_step(model, lambda: model(x).square().mean(), SGD)))


class _Experts(nn.Module):
    """Mixture of experts by grouped products, in fp32: torch's own fake kernel refuses that."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        ends = torch.tensor([x.shape[0] // 2, x.shape[0]], dtype=torch.int32)
        return torch._grouped_mm(x, self.weight, offs=ends)


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="this torch has no grouped product")
def test_grouped_products() -> None:
    model, x = _Experts(), torch.randn(8, 16)
    assert_equal(
        estimate(model, x, loss=lambda y: y.square().sum()),
        measure(steady_step(model, lambda: model(x).square().sum(), None)),
    )


class _Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


def test_recomputed_modules_are_named() -> None:
    assert estimate(_Blocks(), torch.randn(4, 8)).recomputed_modules == ["blocks.1", "blocks.0"]
    assert estimate(llama(), labelled()).recomputed_modules == []


def test_everything_else_stays_as_it_is() -> None:
    model = llama(exact, sampled)
    model(**labelled()).loss.backward()
    batch = labelled(mask=True)
    before, copies = snapshot(model), {name: tensor.clone() for name, tensor in batch.items()}
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    estimate(model, batch, optimizer="adamw", autocast=torch.bfloat16)
    assert snapshot(model) == before
    assert all(torch.equal(batch[name], copies[name]) for name in batch)
    assert torch.equal(torch.get_rng_state(), torch_state) and random.getstate() == python_state
    assert not torch.is_autocast_enabled("cpu") and torch._C._len_torch_dispatch_stack() == 0


def test_hooks_run_on_the_copy() -> None:
    """The owner of a hook is not copied: it may lead to a whole trainer."""

    class Owner:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def hook(self, module: nn.Module, args: Any, output: Tensor) -> None:
            self.seen.append(id(module))

        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("copied")

    owner, model = Owner(), nn.Sequential(nn.Linear(4, 4))
    model[0].register_forward_hook(owner.hook)
    estimate(model, torch.randn(2, 4))
    assert len(owner.seen) == 1 and owner.seen != [id(model[0])]


def test_nothing_is_allocated() -> None:
    """64 TiB of activations."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2**20, 2**22), nn.ReLU())
    profile = estimate(model, torch.empty(2**22, 2**20, device="meta"))
    assert profile.saved_bytes == 4 * (2**22 * 2**20 + 2**22 * 2**22)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA or ROCm device")
@pytest.mark.parametrize("name", MODELS)
def test_models_on_the_gpu(name: str) -> None:
    model, batch = llama(*MODELS[name]).cuda(), {name: tensor.cuda() for name, tensor in labelled().items()}
    predicted = estimate(model, batch, optimizer="adamw")
    real = measure(steady_step(model, lambda: model(**batch).loss, AdamW))
    assert predicted.peak_bytes == pytest.approx(real.peak_bytes, rel=0.01)
    assert predicted.saved_bytes == pytest.approx(real.saved_bytes, rel=0.01)


_EIGHT_BILLION = """
import resource, torch, transformers, memsave
shape = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32)
config = transformers.LlamaConfig(vocab_size=128256, num_key_value_heads=8, use_cache=False, **shape)
with torch.device("meta"):
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
ids = torch.zeros(1, 2048, dtype=torch.int64)
profile = memsave.estimate(model, {"input_ids": ids, "labels": ids}, optimizer="adamw")
weights_bytes = sum(p.nbytes for p in model.parameters())
print(profile.peak_bytes / weights_bytes, profile.phase, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's largest size in Linux's units")
def test_a_model_of_eight_billion_parameters_in_two_gibibytes() -> None:
    run = subprocess.run([sys.executable, "-c", _EIGHT_BILLION], capture_output=True, text=True, check=True)
    ratio, phase, process_bytes = run.stdout.split()
    # Weights, gradients and two states of AdamW are 4; its step needs a temporary of the largest weight.
    assert 4.05 < float(ratio) < 4.2 and phase == "optimizer"
    assert int(process_bytes) < 2 * 2**30


class _Unpredictable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y if y.sum() > 0 else -y


class _Uncopyable(nn.Linear):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("it holds a lock")


X = torch.zeros(2, 4)
MISTAKES: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "batch": (
        lambda: estimate(nn.Linear(5, 4), X),
        EstimateError,
        r"Linear fails on this batch \(float32 \(2, 4\)\): RuntimeError: .*\. Nothing was changed",
    ),
    "tokens": (
        lambda: estimate(nn.Embedding(9, 4), torch.tensor([[3, 9]])),
        EstimateError,
        r"Embedding fails on this batch .*: IndexError: indices from 3 to 9 into an embedding of 9 rows\.",
    ),
    "keyword": (
        lambda: estimate(nn.Linear(4, 4), {"x": X}),
        EstimateError,
        r"Linear fails on this batch \(x: float32 \(2, 4\)\): TypeError: .*unexpected keyword argument 'x'",
    ),
    "optimizer": (
        lambda: estimate(nn.Linear(4, 4), X, optimizer=lambda p: SGD(p, lr=-1)),
        EstimateError,
        "optimizer fails for the 2 parameters that need gradients: ValueError: Invalid learning rate: -1",
    ),
    "no_optimizer": (
        lambda: estimate(nn.Linear(4, 4), X, optimizer=lambda p: 3),
        EstimateError,
        "expected a function that returns a torch.optim.Optimizer, and it returned int",
    ),
    "step": (
        lambda: estimate(nn.Linear(4, 4), X, optimizer="LBFGS"),
        EstimateError,
        "the step of LBFGS fails: TypeError: .*closure",
    ),
    "name": (
        lambda: estimate(nn.Linear(4, 4), X, optimizer="adamx"),
        ValueError,
        "'adamx' is unknown; expected one of .*AdamW",
    ),
    "loss": (
        lambda: estimate(nn.Linear(4, 4), X, loss=lambda y: y.loss),
        EstimateError,
        r"loss fails on the model's output \(Tensor\): AttributeError",
    ),
    "loss_shape": (
        lambda: estimate(nn.Linear(4, 4), X, loss=lambda y: y),
        EstimateError,
        r"expected a scalar tensor with a gradient, got a tensor of shape \(2, 4\)\. ",
    ),
    "no_gradient": (
        lambda: estimate(nn.Linear(4, 4).requires_grad_(False), X),
        EstimateError,
        r"the model's output \(Tensor\) has no .loss and no tensor that needs a gradient",
    ),
    "values": (
        lambda: estimate(nn.Sequential(nn.Sequential(_Unpredictable())), X),
        EstimateError,
        "0.0 reads values that only a real run has .*memsave.measure",
    ),
    "copy": (lambda: estimate(_Uncopyable(4, 4), X), EstimateError, "_Uncopyable cannot be copied.*it holds a lock"),
    "wrapped": (
        lambda: estimate(nn.DataParallel(nn.Linear(4, 4)), X),
        memsave.UnsupportedModelError,
        "wrapped in DataParallel: .*model.module",
    ),
    "model": (lambda: estimate(3, X), TypeError, "expected a torch.nn.Module, got int"),  # type: ignore[arg-type]
    "batch_type": (lambda: estimate(nn.Linear(4, 4), 3), TypeError, "batch: expected a mapping .* got int"),  # type: ignore[arg-type]
    "loss_type": (lambda: estimate(nn.Linear(4, 4), X, loss=3), TypeError, "loss: expected a function.* got int"),  # type: ignore[arg-type]
    "optimizer_type": (
        lambda: estimate(nn.Linear(4, 4), X, optimizer=AdamW([X])),  # type: ignore[arg-type]
        TypeError,
        "optimizer: expected a name such as 'adamw', or a function .* got AdamW",
    ),
    "autocast": (
        lambda: estimate(nn.Linear(4, 4), X, autocast="bf16"),  # type: ignore[arg-type]
        TypeError,
        "expected a floating dtype such as torch.bfloat16, got 'bf16'",
    ),
    "autocast_dtype": (
        lambda: estimate(nn.Linear(4, 4), X, autocast=torch.int8),
        TypeError,
        "autocast: expected a floating dtype .*, got torch.int8",
    ),
    "device": (
        lambda: estimate(nn.Linear(4, 4), X, device="nonsense"),
        ValueError,
        "device 'nonsense' cannot be used on this machine",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str) -> None:
    call, kind, message = MISTAKES[name]
    with pytest.raises(kind, match=message):
        call()
    assert torch._C._len_torch_dispatch_stack() == 0


def test_workspaces_that_torch_does_not_tell_are_named() -> None:
    with pytest.warns(UserWarning, match="LSTM calls aten.*rnn.*too low"):
        estimate(nn.LSTM(4, 8), torch.randn(3, 2, 4))


@pytest.mark.parametrize("change", [(), (checkpointed(),)], ids=["plain", "checkpointed"])
def test_the_report_of_a_conversion(change: tuple[Change, ...]) -> None:
    model, before = llama(*change), estimate(llama(*change), labelled())
    planned = memsave.convert_model(model, batch=labelled(), dry_run=True).estimate
    report = memsave.convert_model(model, batch=labelled())
    after = estimate(model, labelled())
    assert report.estimate == planned and planned is not None
    assert planned.kept_bytes == (before.saved_bytes, after.saved_bytes)
    assert planned.peak_bytes == (before.peak_bytes, after.peak_bytes)
    assert ("activation checkpointing is on" in str(report)) == bool(change)
    assert report.to_dict()["estimate"]["peak_bytes"] == planned.peak_bytes


def test_a_batch_that_fails_leaves_the_model_as_it_was(unchanged: Callable[[nn.Module], nn.Module]) -> None:
    with pytest.raises(EstimateError, match="fails on this batch"):
        memsave.convert_model(unchanged(llama()), batch={"input_ids": tokens().float()})
