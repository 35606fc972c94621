"""Every method, by the case table: what it computes, what it keeps, and that it can be put back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import memsave
import memsave.methods
from benchmarks.cases import CASES as BENCHMARKS
from memsave import Guarantee, MethodConfig
from memsave.methods import METHODS
from memsave.nn.linear import is_linear

from .cases.methods import APPROXIMATE, CASES, MODEL_SCOPE, NOTED_CASES, WIDTH, MethodCase, NotedCase
from .nn.helpers import assert_same
from .snapshot import bits, snapshot

ROOT = Path(__file__).parents[1]
cases = pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
sampled_cases = pytest.mark.parametrize(
    "case", [c for c in CASES if c.gradients == "sampled"], ids=[c.id for c in CASES if c.gradients == "sampled"]
)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)


def convert(module: nn.Module, configs: tuple[MethodConfig, ...]) -> Any:
    """Convert `module` in place, as the child of a container."""
    memsave.convert_model(nn.Sequential(module), configs)
    return module


@dataclass
class Step:
    """What one forward and backward gave."""

    y: Tensor
    dx: Tensor
    grads: dict[str, Tensor]

    def tensors(self) -> list[Tensor]:
        return [self.y, self.dx, *self.grads.values()]


def weights(of: Step) -> list[str]:
    """The names of the gradients that sampling estimates."""
    return [name for name in of.grads if name.rpartition(".")[2] == "weight"]


def assert_alike(ours: Step, expected: Step, case: MethodCase | NotedCase) -> None:
    """Equal up to 32 roundings in the dtype in which the plain module computes."""
    precision = max(torch.finfo(case.precision).eps, torch.finfo(expected.y.dtype).eps)
    assert list(ours.grads) == list(expected.grads)
    assert_same(ours.tensors(), expected.tensors(), ulps=32 * precision / torch.finfo(expected.y.dtype).eps)


def step(module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor, seed: int = 7) -> Step:
    """One training step with a fixed upstream gradient."""
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    torch.manual_seed(seed)
    y = forward(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype))
    assert x.grad is not None
    return Step(y.detach(), x.grad, {n: p.grad for n, p in module.named_parameters() if p.grad is not None})


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_forward_and_gradients_are_those_of_the_reference(case: MethodCase, dtype: torch.dtype) -> None:
    module = convert(case.plain(dtype), case.configs)
    x = case.input(dtype)
    ours, reference = step(module, module, x), step(module, module.reference, x)
    assert_alike(ours, reference, case)


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_guarantee_holds(case: MethodCase, dtype: torch.dtype) -> None:
    plain = case.plain(dtype)
    module = convert(copy.deepcopy(plain), case.configs)
    x = case.input(dtype)
    ours, expected = step(module, module, x), step(plain, plain, x)
    assert {config.guarantee for config in case.configs} <= {Guarantee.EXACT, Guarantee.UNBIASED_GRAD}
    if case.gradients == "sampled":
        for name in weights(ours):
            mine, theirs = ours.grads.pop(name), expected.grads.pop(name)
            assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
            assert (mine - theirs).norm() > 1e-3 * theirs.norm(), "a sampled gradient that is exact was not sampled"
        assert Guarantee.UNBIASED_GRAD in {config.guarantee for config in case.configs}
    assert_alike(ours, expected, case)


@sampled_cases
def test_the_same_seed_gives_the_same_gradients_and_another_one_others(case: MethodCase) -> None:
    module = convert(case.plain(), case.configs)
    once, again, other = (step(module, module, case.input(), seed) for seed in (7, 7, 8))
    assert all(torch.equal(a, b) for a, b in zip(once.tensors(), again.tensors(), strict=True))
    assert not any(torch.equal(once.grads[name], other.grads[name]) for name in weights(once))


@cases
@dtypes
def test_kept_bytes_are_as_stated_and_never_more_than_plain(case: MethodCase, dtype: torch.dtype) -> None:
    plain = case.plain(dtype)
    module = convert(copy.deepcopy(plain), case.configs)
    x = case.input(dtype)
    kept = memsave.saved_bytes(lambda: module(x))
    assert kept == module.kept_bytes(case.shape, dtype)
    assert kept <= memsave.saved_bytes(lambda: plain(x))
    if case.gradients == "sampled":
        assert kept < 0.6 * memsave.saved_bytes(lambda: plain(x))


class Fan(nn.Module):
    """Linears that read one norm's output; their outputs are added up."""

    def __init__(self, case: NotedCase) -> None:
        super().__init__()
        self.norm = case.norm()
        self.linears = nn.ModuleList(make() for make in case.linears)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return torch.stack([linear(y) for linear in self.linears]).sum(0)


noted_cases = pytest.mark.parametrize(
    "case", NOTED_CASES, ids=["+".join(c.name for c in case.configs) + "-" + case.name for case in NOTED_CASES]
)


@noted_cases
@dtypes
def test_linears_that_read_a_norm_keep_nothing_or_which_rows(case: NotedCase, dtype: torch.dtype) -> None:
    """Siblings share one draw; the note copies the norm's small parameters once."""
    plain = Fan(case).to(dtype)
    model: Any = copy.deepcopy(plain)
    memsave.convert_model(model, case.configs)
    shape = (3, 40, WIDTH)
    x = torch.randn(shape).to(dtype).requires_grad_()
    per_linear = {linear.kept_bytes(shape, dtype, noted=True) for linear in model.linears}
    assert len(per_linear) == 1
    copies = case.copies * WIDTH * dtype.itemsize
    kept = memsave.saved_bytes(lambda: model(x))
    assert kept == model.norm.kept_bytes(shape, dtype) + per_linear.pop() + copies
    assert kept < memsave.saved_bytes(lambda: plain(x))


@noted_cases
def test_gradients_through_a_note(case: NotedCase) -> None:
    """Exact for the norm and the input; the linears' are exact, or estimates from the same rows."""
    torch.manual_seed(0)
    plain = Fan(case).double()
    x = torch.randn(3, 40, WIDTH, dtype=torch.float64)
    expected = step(plain, plain, x)
    model: Any = copy.deepcopy(plain)
    memsave.convert_model(model, case.configs)
    ours = step(model, model, x)
    if any(config.guarantee is Guarantee.UNBIASED_GRAD for config in case.configs):
        mine = [ours.grads.pop(name) for name in list(ours.grads) if name.startswith("linears") and "weight" in name]
        assert all(torch.equal(grad, mine[0]) for grad in mine)
        for name in list(expected.grads):
            if name.startswith("linears") and "weight" in name:
                assert not torch.allclose(expected.grads.pop(name), mine[0])
    assert_alike(ours, expected, case)


@cases
@pytest.mark.parametrize("training", [True, False])
def test_dtype_device_flags_and_parameters_stay(case: MethodCase, training: bool) -> None:
    module = case.plain(torch.bfloat16).train(training)
    before = snapshot(module)
    cls, model = type(module), nn.Sequential(module)
    memsave.convert_model(model, case.configs)
    after = snapshot(module)
    assert type(module) is not cls and isinstance(module, cls)
    assert (after["parameters"], after["keys"]) == (before["parameters"], before["keys"])
    assert module.training is training
    assert module(case.input(torch.bfloat16)).dtype == torch.bfloat16
    memsave.restore_model(model)
    assert snapshot(module) == before


@cases
def test_follows_moves_to_another_dtype(case: MethodCase) -> None:
    module = convert(case.plain(), case.configs).double()
    ours = step(module, module, case.input(torch.float64))
    assert {t.dtype for t in ours.tensors()} == {torch.float64}
    assert_alike(ours, step(module, module.reference, case.input(torch.float64)), case)


@cases
def test_state_dicts_go_both_ways(case: MethodCase) -> None:
    plain, module = case.plain(), convert(case.plain(), case.configs)
    for parameter in module.parameters():
        parameter.data.mul_(2)
    plain.load_state_dict(module.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), module.parameters(), strict=True))
    module.load_state_dict(case.plain().state_dict())
    assert [bits(p) for p in module.parameters()] == [bits(p) for p in case.plain().parameters()]


@cases
def test_copies_compute_the_same(case: MethodCase) -> None:
    module = convert(case.plain(), case.configs)
    copied = copy.deepcopy(module)
    assert type(copied) is type(module) and copied is not module
    ours, theirs = step(module, module, case.input()), step(copied, copied, case.input())
    assert [bits(t) for t in ours.tensors()] == [bits(t) for t in theirs.tensors()]
    for mine, other in zip(module.parameters(), copied.parameters(), strict=True):
        assert mine is not other


@cases
def test_without_gradients_nothing_changes_and_nothing_is_kept(case: MethodCase) -> None:
    plain, module = case.plain(), convert(case.plain(), case.configs)
    x = case.input()

    def output(module: nn.Module) -> bytes | str:
        torch.manual_seed(0)
        return bits(module(x))

    for training in (True, False):
        with torch.no_grad():
            assert output(module.train(training)) == output(plain.train(training))
            assert memsave.saved_bytes(lambda: module(x)) == 0
    with torch.inference_mode():
        assert output(module) == output(plain)


@cases
def test_evaluation_is_exact_and_draws_nothing(case: MethodCase) -> None:
    plain, module = case.plain().eval(), convert(case.plain(), case.configs).eval()
    random_state = torch.get_rng_state()
    ours, expected = step(module, module, case.input()), step(plain, plain, case.input())
    assert_alike(ours, expected, case)
    torch.set_rng_state(random_state)
    module(case.input())
    assert torch.equal(torch.get_rng_state(), random_state)


@cases
def test_frozen_linears_keep_nothing(case: MethodCase) -> None:
    module = convert(case.plain().requires_grad_(False), case.configs)
    if is_linear(module):
        assert module.kept_bytes(case.shape, torch.float32) == 0
        assert memsave.saved_bytes(lambda: module(case.input())) == 0
    assert memsave.saved_bytes(lambda: module(case.input().detach())) == 0


@cases
def test_printing_names_the_method_and_its_settings(case: MethodCase) -> None:
    plain = case.plain()
    module = convert(copy.deepcopy(plain), case.configs)
    assert all(str(config) in module.extra_repr() for config in case.configs)
    assert plain.extra_repr() in module.extra_repr()
    assert type(plain).__name__ in repr(module) and module.extra_repr() in repr(module)


@cases
def test_what_is_kept_goes_through_save_for_backward(case: MethodCase) -> None:
    """Hooks that take the saved tensors over free the input."""
    module = convert(case.plain(), case.configs)
    h = case.input() * 1
    storage = StorageWeakRef(h.untyped_storage())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        node = module(h).grad_fn
    del h
    assert node is not None and storage.expired()


@cases
def test_compiles_without_a_graph_break(case: MethodCase) -> None:
    torch._dynamo.reset()
    module = convert(case.plain(), case.configs)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    plain = case.plain() if case.plain_when_compiled else module
    reference = plain if case.plain_when_compiled else module.reference
    assert_alike(step(module, compiled, case.input()), step(plain, reference, case.input()), case)


def is_documented(name: str, value: object) -> bool:
    """Whether the docstring was written: a dataclass without one gets its signature."""
    documentation = value.__doc__ or ""
    return len(documentation.split()) >= 5 and not documentation.startswith(f"{name}(")


def starts_as_documented(method: type[MethodConfig]) -> bool:
    """The docs page is titled by the method's name and holds results of a benchmark."""
    page = (ROOT / method.docs).read_text() if method.docs and (ROOT / method.docs).is_file() else ""
    return page.startswith(f"# {method.name}") and "<!-- results: cpu/" in page


def has_a_row(method: type[MethodConfig]) -> bool:
    """Whether the method is in `CASES`, or has tests of its own: it needs a whole model, or changes the function."""
    if method.scope == "model" or method.guarantee is Guarantee.APPROXIMATE:
        own = MODEL_SCOPE if method.scope == "model" else APPROXIMATE
        return method.name in own and (ROOT / own[method.name]).is_file()
    return any(type(config) is method for case in CASES for config in case.configs)


def test_every_method_has_its_places() -> None:
    """What adding a method touches; each message says what is missing."""
    readme = (ROOT / "README.md").read_text()
    benchmarks = {case.method for case in BENCHMARKS}
    files = {path.stem for path in (ROOT / "memsave" / "methods").glob("*.py")} - {"__init__"}
    strays = sorted(files - {method.name for method in METHODS})
    missing = [f"memsave/methods/{name}.py holds no method of METHODS" for name in strays]
    for method in METHODS:
        places = {
            "a row in tests/cases/methods.py": has_a_row(method),
            f"its docs page {method.docs!r}": bool(method.docs) and (ROOT / method.docs).is_file(),
            f"'# {method.name}' first and '<!-- results: cpu/...' in its docs page": starts_as_documented(method),
            "a row in README.md's table of methods": any(
                line.startswith("|") and f"`{method.__name__}(" in line for line in readme.splitlines()
            ),
            "a case in benchmarks/cases": method.name in benchmarks,
            "its name in memsave.__all__": method.__name__ in memsave.__all__,
            "its name in memsave.methods.__all__": method.__name__ in memsave.methods.__all__,
            "a docstring of its own": is_documented(method.__name__, method),
            "a file of its own": method.__module__ == f"memsave.methods.{method.name}",
        }
        missing += [f"{method.__name__} lacks {place}" for place, there in places.items() if not there]
    assert not missing, "\n".join(missing)


def test_every_adapter_has_its_places() -> None:
    """Adapters are configs of PEFT, which `convert_model` takes as methods."""
    pytest.importorskip("peft", reason="needs peft (pip install 'memsave[hf]')")
    import memsave.peft
    from memsave.integrations.peft.method import AdapterMethod

    readme = (ROOT / "README.md").read_text()
    pages = [path.read_text() for path in (ROOT / "docs").glob("*.md")]
    assert {method.name for method in AdapterMethod.__subclasses__()} == {"shira", "lamda"}
    for method in AdapterMethod.__subclasses__():
        config = method.config_class.__name__
        assert config in memsave.__all__ and config in memsave.peft.__all__
        assert starts_as_documented(method), method.docs
        assert any(line.startswith("|") and f"`{config}(" in line for line in readme.splitlines())
        assert is_documented(config, method.config_class) and any(f"`{config}(" in page for page in pages)
        assert f"memsave.{config}(" in (ROOT / "benchmarks" / "cases" / "adapters.py").read_text()


@pytest.mark.parametrize("name", sorted(__import__("memsave.peft").peft.__all__))
def test_names_for_peft_are_documented(name: str) -> None:
    assert is_documented(name, getattr(memsave.peft, name))


def test_method_names_are_unique() -> None:
    assert len({method.name for method in METHODS}) == len(METHODS)


@pytest.mark.parametrize("name", sorted(memsave.__all__))
def test_public_names_are_documented(name: str) -> None:
    assert is_documented(name, getattr(memsave, name))
