"""Finding the attention modules of a model, and how their features fall into heads.

Found by structure: projections by the names of their role, sizes from the shapes and the attributes of the module, and
then by trying: the module runs on a few random tokens, as it is and by groups of heads, and both must agree.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..calibrating import evaluating
from ..converted import original_class
from ..linear import is_linear
from ..mlp_graph import in_features, out_features
from .group_run import Change, Run, without_probabilities
from .latents import key_norm
from .layout import HeadLayout, asks_by_name
from .linear import LowRankLinear

_ROLES = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("linear_q", "linear_k", "linear_v"),
    ("query_proj", "key_proj", "value_proj"),
)
_FUSED = ("qkv_proj", "qkv", "c_attn", "query_key_value", "Wqkv", "W_pack")
_OUTPUTS = ("o_proj", "out_proj", "o", "dense", "out_lin", "c_proj", "to_out", "wo", "linear_out", "proj", "projection")
_HEAD_SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size", "dim_per_head", "d_kv")
_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
_KV_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
_WIDTHS = ("split_size", "embed_dim", "all_head_size", "inner_dim", "hidden_size", "q_size")
_TOKENS = 5
_UNKNOWN_TO_LATENTS = ("softcap", "s_aux", "sinks")
Attributes = tuple[tuple[str, str], ...]
_ACCURACY = {torch.float64: 1e-9, torch.float32: 1e-4}


def attention_projections(model: nn.Module) -> Iterator[tuple[str, dict[str, str]]]:
    """Every module that holds the projections of queries, keys and values: its name, and their names by role."""
    for name, module in model.named_modules():
        for roles in _ROLES:
            if all(is_projection(getattr(module, role, None)) for role in roles):
                yield name, dict(zip(("query", "key", "value"), roles, strict=True))
                break
        else:
            fused = next((role for role in _FUSED if is_projection(getattr(module, role, None))), None)
            if fused is not None:
                yield name, dict.fromkeys(("query", "key", "value"), fused)


def is_projection(module: object) -> bool:
    """Whether `module` is a linear or a low-rank one."""
    return isinstance(module, nn.Module) and (is_linear(module) or isinstance(module, LowRankLinear))


def head_layout(model: nn.Module, inner: str, roles: Mapping[str, str]) -> tuple[str, HeadLayout] | str:
    """The attention module around the projections `roles` of the module `inner`, by name, and its layout.

    Or why it cannot run by groups of heads, in words.
    """
    found = _output_of(model, inner, set(roles.values()))
    if found is None:
        return "no output projection was found beside its projections"
    root_name, output, tail = found
    root, within = model.get_submodule(root_name), inner.removeprefix(root_name).removeprefix(".")
    names = {role: f"{within}.{name}".removeprefix(".") for role, name in roles.items()}
    sizes = _sizes(root, within, names, output)
    if not sizes:
        return "its heads do not follow from its attributes and the shapes of its projections"
    reason = "its one key/value head cannot be divided"
    for num_heads, num_kv_heads, head_size in sizes:
        if num_kv_heads == 1:
            continue
        layout = HeadLayout(
            query=names["query"],
            key=names["key"],
            value=names["value"],
            output=output,
            inner=within,
            tail=tail,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            redirect=asks_by_name(root.get_submodule(within)),
        )
        tried = _tried(root, layout)
        if isinstance(tried, HeadLayout):
            return root_name, tried
        reason = tried
    return reason


def _output_of(model: nn.Module, inner: str, taken: set[str]) -> tuple[str, str, str] | None:
    """The root, the output projection by its name from there, and the module around that one if it is not the root."""
    module = model.get_submodule(inner)
    for name in _OUTPUTS:
        if name not in taken and is_projection(getattr(module, name, None)):
            return inner, name, ""
    if not inner:
        return None
    parent_name, _, last = inner.rpartition(".")
    for sibling, child in model.get_submodule(parent_name).named_children():
        if sibling == last:
            continue
        if is_projection(child) and sibling in _OUTPUTS:
            return parent_name, sibling, ""
        linears = [name for name, m in child.named_children() if is_projection(m)]
        if len(linears) == 1 and linears[0] in _OUTPUTS:
            return parent_name, f"{sibling}.{linears[0]}", sibling
    return None


def _sizes(root: nn.Module, inner: str, names: Mapping[str, str], output: str) -> list[tuple[int, int, int]]:
    """(query heads, key/value heads, head size) as they may be."""
    module = root.get_submodule(inner)
    wide, narrow = (out_features(root.get_submodule(names[role])) for role in ("query", "key"))
    width = in_features(root.get_submodule(output))
    sizes = [value for name in _HEAD_SIZES if (value := _number(module, name))]
    counts = [value for name in _COUNTS if (value := _number(module, name))]
    sizes += [width // count for count in counts if width % count == 0]
    found = []
    for size in dict.fromkeys(sizes):
        if width % size:
            continue
        heads = width // size
        if names["query"] == names["key"]:
            kv, rest = divmod(wide - width, 2 * size)
        else:
            kv, rest = divmod(narrow, size)
            rest += wide - width
        if not rest and kv > 0 and heads % kv == 0:
            found.append((heads, kv, size))
    return list(dict.fromkeys(found))


def _number(module: nn.Module, name: str) -> int | None:
    """An attribute of the module or of its config that is a number."""
    for holder in (module, getattr(module, "config", None)):
        value = getattr(holder, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _tried(root: nn.Module, layout: HeadLayout) -> HeadLayout | str:
    """The layout with the attributes that must count a group's heads, as it computes the same; or why none does."""
    try:
        with torch.no_grad(), evaluating(root):
            args, kwargs = _example(root, layout)
            expected = original_class(root).forward(root, *args, **kwargs)
            expected = without_probabilities(expected, layout, slice(0, layout.num_kv_heads))
            scaled, problem = _first_alike(root, layout, _scalings(root, layout), args, kwargs, expected)
            if scaled is None:
                return problem
            return _with_latents(root, _resized(root, scaled, args, kwargs, expected), args, kwargs)
    except Exception as error:
        return f"its forward could not be tried ({type(error).__name__}: {str(error).partition('. ')[0][:80]})"


def _first_alike(
    root: nn.Module,
    layout: HeadLayout,
    scalings: Iterable[Attributes],
    args: Any,
    kwargs: Any,
    expected: Any,
    change: Change | None = None,
) -> tuple[HeadLayout | None, str]:
    """The layout with the first of `scalings` by which groups compute what is expected; or None, and why."""
    problem = "by groups of heads it computes something else"
    groups = [slice(i, i + 1) for i in range(layout.num_kv_heads)]
    for scaled in scalings:
        candidate = replace(layout, scaled=scaled)
        try:
            found = Run(root, candidate, change).by_groups(groups, args, kwargs)
        except Exception as error:  # whatever its forward does with fewer heads
            problem = f"its forward fails for a group of heads ({type(error).__name__})"
            continue
        if _alike(found, expected):
            return candidate, ""
    return None, problem


def _resized(root: nn.Module, layout: HeadLayout, args: Any, kwargs: Any, expected: Any) -> HeadLayout:
    """The layout, with the attributes that are the size of a head if heads may have another size and basis."""
    inner = root.get_submodule(layout.inner)
    like = next(root.get_submodule(layout.query).parameters())
    size, generator = layout.head_size, torch.Generator().manual_seed(1)
    shape = 2 * size, size
    numbers = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    bases = (torch.linalg.qr(each)[0].t().to(like) for each in numbers)
    names = [
        (layout.inner, prefix + name)
        for prefix, holder in (("", inner), ("config.", getattr(inner, "config", None)))
        for name in _HEAD_SIZES
        if getattr(holder, name, None) == size
    ]
    change, scalings = Change(*bases), list(_scalings(root, layout))
    for sized in ((), tuple(names)):
        found, _ = _first_alike(root, replace(layout, sized=sized), scalings, args, kwargs, expected, change)
        if found is not None:
            return found
    return layout


def _with_latents(root: nn.Module, layout: HeadLayout, args: Any, kwargs: Any) -> HeadLayout:
    """The layout, with how queries may attend to latents of keys: tried on what the attention function is given."""
    if not layout.redirect:
        return layout
    run = Run(root, layout)
    run.seen = []
    run.by_groups([slice(0, layout.num_kv_heads)], args, kwargs)
    if len(run.seen) != 1 or any(run.seen[0][2].get(name) is not None for name in _UNKNOWN_TO_LATENTS):
        return layout
    if layout.sized is not None:
        return replace(layout, latent="absorbed")
    if "position_embeddings" not in kwargs:
        return layout
    block = layout.blocks(slice(0, layout.num_kv_heads))[layout.key]["key"]
    raw = run.projected(layout.key, args[0])[..., layout.features(block)]
    raw = raw.unflatten(-1, (-1, layout.head_size)).transpose(1, 2)  # (B, kv, T, D)
    inner = root.get_submodule(layout.inner)
    # The norm of the keys first: that of the queries may have the same values.
    names = sorted(
        (name for name, child in inner.named_children() if _is_norm(child, layout)), key=lambda n: "k" not in n
    )
    norms = [f"{layout.inner}.{name}".strip(".") for name in names]
    for norm in (None, *((name, plus_one) for name in norms for plus_one in (False, True))):
        candidate = replace(layout, latent="rotated", key_norm=norm)
        if _near(rotated(root, candidate, raw, *kwargs["position_embeddings"]), run.seen[0][1]):
            return candidate
    return layout


def rotated(root: nn.Module, layout: HeadLayout, key: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Keys (B, kv, T, D) as `ops.low_rank_attention` norms and rotates them."""
    weight, eps = key_norm(root, layout)
    if weight is not None:
        wide = key.float()
        key = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(key.dtype)
    first, second = key.chunk(2, -1)
    return key * cos.unsqueeze(1) + torch.cat([-second, first], -1) * sin.unsqueeze(1)


def _is_norm(module: nn.Module, layout: HeadLayout) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.shape == (layout.head_size,)


def _example(root: nn.Module, layout: HeadLayout) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Arguments for a forward on random tokens (2, T, d).

    Raises:
        TypeError: the forward requires something that is not known.
    """
    query = root.get_submodule(layout.query)
    like = next(query.parameters())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, _TOKENS, in_features(query), generator=generator).to(like)
    angles = torch.rand(2, _TOKENS, layout.head_size // 2, generator=generator).repeat(1, 1, 2)
    known = {"position_embeddings": (angles.cos().to(like), angles.sin().to(like)), "attention_mask": None}
    first, *parameters = list(inspect.signature(original_class(root).forward).parameters.values())[1:]
    kwargs = {p.name: known[p.name] for p in parameters if p.name in known}
    required = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if unknown := sorted(set(required) - known.keys()):
        raise TypeError(f"it requires {', '.join(unknown)}")
    return (x,), kwargs


def _scalings(root: nn.Module, layout: HeadLayout) -> Iterator[Attributes]:
    """Sets of attributes that may have to count the heads of a group, the smallest sets first."""
    inner = root.get_submodule(layout.inner)
    counts = [
        (layout.inner, prefix + name)
        for prefix, holder in (("", inner), ("config.", getattr(inner, "config", None)))
        for name in (*_COUNTS, *_KV_COUNTS)
        if getattr(holder, name, None) == (layout.num_kv_heads if name in _KV_COUNTS else layout.num_heads)
    ]
    width = layout.num_heads * layout.head_size
    widths = [(layout.inner, name) for name in _WIDTHS if getattr(inner, name, None) == width]
    own = [item for item in counts if not item[1].startswith("config.")]
    tried = [[], own, counts, own + widths, counts + widths]
    tried += [list(some) for size in (1, 2) for some in combinations(counts + widths, size)]
    yield from dict.fromkeys(map(tuple, tried))


def _alike(found: Any, expected: Any) -> bool:
    ours, theirs = ([t for t in tree_leaves(value) if isinstance(t, Tensor)] for value in (found, expected))
    if len(ours) != len(theirs):
        return False
    return all(_near(a, b) for a, b in zip(ours, theirs, strict=True))


def _near(a: Tensor, b: Tensor) -> bool:
    accuracy = _ACCURACY.get(b.dtype, 0.05)
    scale = float(b.abs().max()) if b.numel() else 0.0
    return a.shape == b.shape and bool(torch.allclose(a, b, rtol=accuracy, atol=accuracy * scale))
