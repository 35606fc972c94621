"""Random module trees for property tests: all that a real model may hold and a conversion must respect.

Every module maps (N, D) to (N, D) with D = `WIDTH`, so that any tree runs. A tree has at least one linear of its own,
the child "last" of the root; around it, by chance: containers of every kind, norms, embeddings, modules under two
parents, tied parameters, frozen parts, odd names, hooks, buffers, and parts in another mode than the rest.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor, nn

WIDTH = 4
property_settings = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)


class HFRMSNorm(nn.Module):
    """A norm as transformers' models write it: known to nobody by class, only by name and structure."""

    def __init__(self, width: int = WIDTH, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)


class Tree(nn.Module):
    """A container of one's own: its children run in order."""

    def forward(self, x: Tensor) -> Tensor:
        return run(self, x)


def run(container: nn.Module, x: Tensor) -> Tensor:
    """Run the children of `container` one after the other on x (N, D)."""
    for child in container._modules.values():
        assert child is not None
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            x = run(child, x)
        elif isinstance(child, nn.Embedding):
            x = x + child(torch.arange(x.shape[0]) % child.num_embeddings)
        else:
            x = child(x)
    return x


def on_forward(module: nn.Module, args: Any, output: Any) -> None:
    """A forward hook that only looks."""


def on_call(module: nn.Module, args: Any) -> None:
    """A forward pre-hook that only looks."""


_leaves = st.sampled_from(
    [
        lambda: nn.Linear(WIDTH, WIDTH),
        lambda: nn.Linear(WIDTH, WIDTH, bias=False),
        lambda: nn.LayerNorm(WIDTH),
        lambda: nn.LayerNorm(WIDTH, elementwise_affine=False),
        lambda: nn.RMSNorm(WIDTH),
        HFRMSNorm,
        lambda: nn.Embedding(WIDTH, WIDTH),
        nn.Tanh,
    ]
)
_decorations = st.sampled_from(["frozen", "hook", "pre-hook", "buffer", "attribute", "eval"])
_odd_names = st.sampled_from(["0", "00", "7", "weight", "q_proj", "_x", "ü", "²", "a-b", "names with blanks", "bias"])


@st.composite
def names(draw: st.DrawFn) -> str:
    """A name that PyTorch accepts for a child of any container."""
    name = draw(st.one_of(_odd_names, st.text(min_size=1, max_size=3)))
    taken = any(hasattr(container, name) for container in (nn.Module(), nn.ModuleDict(), nn.ModuleList()))
    return "n" + name.replace(".", "_") if taken or "." in name else name


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    """A random tree; its weights depend on the shape of the tree alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        root = Tree()
        made: list[nn.Module] = []
        _fill(draw, root, depth=draw(st.integers(1, 3)), made=made)
        root.add_module("last", nn.Linear(WIDTH, WIDTH))
        _tie(draw, made)
        for module in root.modules():
            _decorate(draw, module)
    return root


def _fill(draw: st.DrawFn, container: nn.Module, depth: int, made: list[nn.Module]) -> None:
    """Give `container` up to three children; some are modules made before, so that they have two parents."""
    for i in range(draw(st.integers(0, 3))):
        if made and draw(st.integers(0, 4)) == 0:
            child = draw(st.sampled_from(made))
        elif depth > 1 and draw(st.booleans()):
            child = draw(st.sampled_from([Tree, nn.Sequential, nn.ModuleList, nn.ModuleDict]))()
            _fill(draw, child, depth - 1, made)
        else:
            child = draw(_leaves)()
            made.append(child)
        if isinstance(container, nn.Sequential) and isinstance(child, (nn.ModuleList, nn.ModuleDict, nn.Embedding)):
            child = _wrapped(child)
        numbered = isinstance(container, (nn.Sequential, nn.ModuleList))
        name = str(i) if numbered else draw(names().filter(lambda n: n not in container._modules))
        container._modules[name] = child


def _wrapped(child: nn.Module) -> Tree:
    tree = Tree()
    tree.child = child
    return tree


def _tie(draw: st.DrawFn, made: list[nn.Module]) -> None:
    """Let two modules share one weight, as an embedding and an output head do."""
    square = [m for m in made if isinstance(m, (nn.Linear, nn.Embedding))]
    if len(square) > 1 and draw(st.booleans()):
        square[-1].weight = square[0].weight


def _decorate(draw: st.DrawFn, module: nn.Module) -> None:
    """Freeze, hook, annotate and switch `module` by chance."""
    for kind in draw(st.sets(_decorations, max_size=2)):
        if kind == "frozen":
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
        elif kind == "hook":
            module.register_forward_hook(on_forward)
        elif kind == "pre-hook":
            module.register_forward_pre_hook(on_call, with_kwargs=False)
        elif kind == "buffer" and isinstance(module, Tree):
            module.register_buffer("table", torch.arange(3.0), persistent=draw(st.booleans()))
        elif kind == "attribute":
            module.remark = "mine"  # type: ignore[assignment]
        elif kind == "eval":
            module.training = False
