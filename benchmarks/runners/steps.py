"""One variant of a model case, ready to run: its model, its input, and the gradients for the check.

B sequences of T tokens, d features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from inspect import getmembers, isclass

import torch
from torch import Tensor

from benchmarks.cases.methods import MethodsCase
from benchmarks.cases.training import ModelCase, StepCase, TrainingCase
from benchmarks.cases.variants import Variant
from memsave.config import applied_configs
from memsave.nn.linear import is_linear


class Step:
    """Forward, backward and what else belongs to a step. A step with a dtype of its own, for the check, keeps the
    values that the weights have in the dtype of the case."""

    def __init__(self, case: ModelCase, variant: Variant, device: str, dtype: torch.dtype | None = None) -> None:
        torch.manual_seed(0)
        with torch.device(device):
            model = case.model()
        self.model = model.to(device, case.dtype).to(dtype or case.dtype).train()
        variant.apply(self.model)

    def forward(self) -> Tensor:
        raise NotImplementedError

    def backward(self) -> None:
        """Forward and backward."""
        raise NotImplementedError

    def run(self) -> None:
        """What is measured."""
        self.backward()

    def clear(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def gradients(self) -> dict[str, Tensor]:
        """Of every parameter by name, in fp64."""
        self.clear()
        self.backward()
        named = {name.replace("block.", ""): p.grad for name, p in self.model.named_parameters()}
        return {name: grad.detach().double() for name, grad in named.items() if grad is not None}

    def sampled(self) -> set[str]:
        """The names of the parameters whose gradient is estimated: the linears of what a sampling method converted."""
        found = set()
        for name, module in self.model.named_modules():
            if any(getattr(config, "keep_ratio", 1.0) < 1 for config in applied_configs(module).values()):
                linears = (inner for inner, linear in module.named_modules(prefix=name) if is_linear(linear))
                found |= {f"{linear}.weight" for linear in linears}
        return found


class ForwardBackward(Step):
    """Of a random x (B, T, d), with a random gradient of the output."""

    def __init__(self, case: TrainingCase, variant: Variant, device: str, dtype: torch.dtype | None = None) -> None:
        super().__init__(case, variant, device, dtype)
        self.forward_of = case.forward
        generator = torch.Generator().manual_seed(1)
        x, dy = (torch.randn(case.shape, generator=generator).to(case.dtype).to(device, dtype) for _ in range(2))
        # A token here and there has a large gradient, as in real training; the same in every variant.
        self.dy = dy * torch.randn(*case.shape[:2], 1, generator=generator).exp().to(dy)
        self.x = x.requires_grad_(case.input_grad)

    def forward(self) -> Tensor:
        return self.forward_of(self.model, self.x)

    def backward(self) -> None:
        self.forward().backward(self.dy)

    def clear(self) -> None:
        super().clear()
        self.x.grad = None

    def gradients(self) -> dict[str, Tensor]:
        found = super().gradients()
        return found if self.x.grad is None else found | {"x": self.x.grad.double()}


class FullStep(Step):
    """On random tokens (B, T): the model's own loss for them, backward and AdamW."""

    def __init__(self, case: StepCase, variant: Variant, device: str, dtype: torch.dtype | None = None) -> None:
        super().__init__(case, variant, device, dtype)
        generator = torch.Generator().manual_seed(1)
        vocabulary = self.model.config.vocab_size
        self.tokens, self.labels = torch.randint(vocabulary, (2, *case.shape), generator=generator).to(device)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)

    def forward(self) -> Tensor:
        return self.model(input_ids=self.tokens, labels=self.labels).loss

    def backward(self) -> None:
        self.forward().backward()

    def run(self) -> None:
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


STEPS = {TrainingCase: ForwardBackward, StepCase: FullStep, MethodsCase: FullStep}


@contextmanager
def opened(case: ModelCase, variant: Variant, device: str, dtype: torch.dtype | None = None) -> Iterator[Step]:
    """A step of a variant; what the variant changed outside of its model is put back afterwards."""
    with put_back(variant.patches), variant.within():
        yield STEPS[type(case)](case, variant, device, dtype)  # type: ignore[arg-type]


@contextmanager
def put_back(modules: Sequence[str]) -> Iterator[None]:
    """Afterwards, these modules and the classes they define are as they were before."""
    with ExitStack() as stack:
        for name in modules:
            module = import_module(name)
            owners = [module, *(owned for _, owned in getmembers(module, isclass) if owned.__module__ == name)]
            for owner in owners:
                stack.callback(_set_attributes, owner, dict(vars(owner)))
        yield


def _set_attributes(owner: object, attributes: dict[str, object]) -> None:
    for name in vars(owner).keys() - attributes.keys():
        delattr(owner, name)
    for name, value in attributes.items():
        if vars(owner).get(name) is not value:
            setattr(owner, name, value)
