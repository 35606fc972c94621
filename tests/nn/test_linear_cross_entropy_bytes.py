"""What `memsave.linear_cross_entropy` keeps, needs at its peak and multiplies, by formula; and what it refuses.

N tokens; D features; V classes; chunks of C tokens, or of D where the weight trains: as large as its gradient then.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import memsave
from memsave import linear_cross_entropy
from memsave.nn import linear_cross_entropy as module
from memsave.ops import _native

N, IGNORED, V, D, C = 96, 32, 640, 48, 8
INDEX_BYTES = 8


def inputs(dtype: torch.dtype = torch.float32, ignored: int = 0, frozen: bool = False) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, D, dtype=dtype), torch.randn(V, D, dtype=dtype)
    target = torch.randint(V, (N,))
    target[:ignored] = -100
    return hidden.requires_grad_(), weight.requires_grad_(not frozen), target


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", C * V * 4)


def peak_bytes(tensors: tuple[Tensor, ...], **options: Any) -> int:
    def step() -> None:
        result = linear_cross_entropy(*tensors, **options)
        if result.requires_grad:
            result.sum().backward()

    profile = memsave.measure(step)
    return profile.peak_bytes - profile.baseline_bytes


def assert_close_to(found: int, formula: int, dtype: torch.dtype = torch.float32) -> None:
    """Within a few vectors over the tokens and the gradient of a chunk's tokens, which the formula leaves out."""
    assert formula <= found <= formula + 8 * (N * 4) + D * D * 4


@pytest.mark.usefixtures("chunks")
@pytest.mark.skipif(_native.library() is None, reason="plain PyTorch takes blocks of rows beside a chunk")
class TestPeak:
    """Of forward and backward, above the inputs; the gradients that result are in it."""

    def test_mean(self) -> None:
        gradients_bytes = (N * D + V * D) * 4
        assert_close_to(peak_bytes(inputs()), 2 * gradients_bytes)

    def test_mean_with_large_chunks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "CHUNK_BYTES", N * V * 4)
        product_bytes = N * D * 4  # a chunk's share of the gradient of hidden
        assert_close_to(peak_bytes(inputs()), (N * D + V * D + N * V) * 4 + product_bytes)

    def test_per_token(self) -> None:
        assert_close_to(peak_bytes(inputs(), reduction="none"), (N * D + V * D + D * V) * 4)

    def test_passes_over_the_gradient_limit_how_small_chunks_become(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "MIN_TOKENS_PER_PASS", 12)
        assert_close_to(peak_bytes(inputs(), reduction="none"), (N * D + V * D + 12 * V) * 4)

    def test_frozen_weight(self) -> None:
        assert_close_to(peak_bytes(inputs(frozen=True)), (N * D + C * V) * 4)

    def test_without_gradients(self) -> None:
        with torch.no_grad():
            assert_close_to(peak_bytes(inputs()), C * V * 4)

    def test_a_softcap_takes_no_bytes(self) -> None:
        assert_close_to(peak_bytes(inputs(frozen=True), softcap=3.0), (N * D + C * V) * 4)

    def test_bfloat16(self) -> None:
        """The weight's gradient is summed in float32, and each chunk's share of it exists in bfloat16."""
        tokens = D * 4 // 2
        formula = N * D * 2 + V * D * (4 + 2) + tokens * V * 2
        assert_close_to(peak_bytes(inputs(torch.bfloat16)), formula)


@pytest.mark.parametrize(
    ("options", "frozen", "kept_bytes"),
    [
        ({}, False, (N * D + V * D) * 4),
        ({}, True, N * D * 4),
        ({"reduction": "sum"}, False, (N * D + V * D) * 4),
        ({"reduction": "none"}, False, (N * D + V * D) * 4 + N * (INDEX_BYTES + 8)),  # inputs, logsumexp in two parts
        ({"return_logsumexp": True}, True, (N * D + V * D) * 4 + N * (INDEX_BYTES + 8)),
    ],
)
def test_kept_bytes(options: dict[str, Any], frozen: bool, kept_bytes: int) -> None:
    tensors = inputs(frozen=frozen)
    kept: list[Any] = []
    assert memsave.saved_bytes(lambda: kept.append(linear_cross_entropy(*tensors, **options))) == kept_bytes


@pytest.mark.parametrize(
    ("options", "frozen", "products"),
    [({}, False, 3), ({}, True, 2), ({"reduction": "none"}, False, 4), ({"reduction": "none"}, True, 3)],
)
def test_ignored_tokens_and_frozen_weights_cost_no_products(
    options: dict[str, Any], frozen: bool, products: int
) -> None:
    tensors = inputs(ignored=IGNORED, frozen=frozen)
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        linear_cross_entropy(*tensors, **options).sum().backward()
    assert counter.get_total_flops() == products * 2 * (N - IGNORED) * V * D


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(D, D), nn.Linear(D, V)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy(self.body(x), self.head.weight, labels, self.head.bias, softcap=5.0)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_estimate_equals_measure(dtype: torch.dtype | None) -> None:
    model, x, labels = Model(), torch.randn(N, D), inputs(ignored=IGNORED)[2]

    def step() -> None:
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = model(x, labels)
        loss.backward()
        model.zero_grad()

    predicted = memsave.estimate(model, {"x": x, "labels": labels}, loss=lambda loss: loss, autocast=dtype)
    measured = memsave.measure(step)
    assert predicted.peak_bytes - predicted.baseline_bytes == measured.peak_bytes - measured.baseline_bytes


def test_meta_and_fake_tensors() -> None:
    tensors = inputs(ignored=IGNORED)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in tensors]
    for twins, context in (([t.to("meta") for t in tensors], torch.enable_grad()), (fake, mode)):
        leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in twins]
        with context:
            loss = linear_cross_entropy(*leaves)
            loss.backward()
        assert loss.shape == () and loss.dtype == torch.float32
        assert [t.grad.shape for t in leaves[:2]] == [(N, D), (V, D)]


def good() -> dict[str, Any]:
    hidden, weight, target = inputs()
    return {"hidden": hidden, "weight": weight, "target": target}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hidden": torch.ones(N, D + 1)}, r"expected hidden \(..., D\), weight \(V, D\).*hidden \(96, 49\) float32"),
        ({"weight": torch.ones(D)}, r"expected hidden \(..., D\), weight \(V, D\)"),
        ({"target": torch.zeros(N, 1, dtype=torch.int64)}, "target of the shape of hidden without its last"),
        ({"target": torch.zeros(N)}, r"target of dtype torch.int64.*target \(96,\) float32"),
        ({"bias": torch.ones(V + 1)}, r"bias \(V,\) for weight"),
        ({"hidden": torch.ones(N, D, dtype=torch.float64)}, "one dtype, or autocast"),
        ({"hidden": torch.ones(N, D, dtype=torch.int64)}, "floating point"),
        ({"weight": torch.ones(V, D, device="meta")}, "all tensors on one device"),
        ({"ignore_index": None}, "a whole number as ignore_index, not None"),
        ({"label_smoothing": 1.5}, "label_smoothing from 0 to 1, not 1.5"),
        ({"softcap": 0.0}, "softcap above 0 or None, not 0.0"),
        ({"z_loss": -0.1}, "z_loss of at least 0, not -0.1"),
        ({"reduction": "avg"}, "reduction 'none', 'mean' or 'sum', not 'avg'"),
    ],
)
def test_what_does_not_fit_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**good() | wrong)


@pytest.mark.parametrize("target", [V, -1, -101])
def test_a_target_out_of_range_raises_as_in_torch(target: int) -> None:
    tensors = good()
    tensors["target"][5] = target
    with pytest.raises(IndexError, match="out of bounds"):
        torch.nn.functional.cross_entropy(tensors["hidden"] @ tensors["weight"].t(), tensors["target"])
    with pytest.raises(IndexError, match=f"target {target} is out of bounds, expected classes from 0 to 639"):
        linear_cross_entropy(**tensors)
