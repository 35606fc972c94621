"""Which ops of a graph can be computed part by part along given axes, and how: a rule for each, or a reason why not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from .errors import NotLocal
from .rules.convolution import convolution, transposed_convolution
from .rules.features import WithinRows
from .rules.local import Local, Reduction
from .rules.pointwise import BatchNorm, Pointwise, is_pointwise
from .rules.pooling import average_pooling, max_pooling
from .rules.resampling import MODES, Interpolation
from .rules.shapes import Concatenation, Cut, Expansion, Padding, PixelShuffle, Reshape, SameRows
from .rules.statistics import (
    ChannelMoments,
    EuclideanNorm,
    Extremum,
    ScaleChannels,
    Sum,
    Variance,
    channel_moments,
    scale_channels,
)

aten = torch.ops.aten
Dims = tuple[int, ...]


@dataclass(eq=False)
class Rules:
    """How each op is computed along the sliced axes.

    Attributes:
        axes: the sliced axes; see `regions`.
        local: rules of the ops whose output is sliced.
        reductions: rules of the ops that gather one small value from a sliced one.
        dims: for each sliced value, the dimension of each axis.
        reasons: why an op with a sliced input is computed whole.
    """

    axes: tuple[int, ...]
    local: dict[fx.Node, Local] = field(default_factory=dict)
    reductions: dict[fx.Node, Reduction] = field(default_factory=dict)
    dims: dict[fx.Node, Dims] = field(default_factory=dict)
    reasons: dict[fx.Node, str] = field(default_factory=dict)


def classify(nodes: Sequence[fx.Node], axes: Sequence[int]) -> Rules:
    """The rules of `nodes`, which are in topological order and know their shapes (`meta["val"]`)."""
    rules = Rules(tuple(axes))
    fixed = _fixed(nodes)
    for node in nodes:
        if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor) or node in fixed:
            continue
        sliced = [n for n in node.all_input_nodes if n in rules.dims]
        try:
            rule = _rule(node, sliced, rules)
        except NotLocal as reason:
            if sliced:
                rules.reasons[node] = str(reason)
            continue
        if isinstance(rule, Reduction):
            rules.reductions[node] = rule
        elif rule is not None:
            rules.local[node] = rule
            rules.dims[node] = rule.dims
    return rules


def _fixed(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """What is computed from parameters and constants alone, such as a standardized weight: it is no map."""
    fixed: set[fx.Node] = set()
    for node in nodes:
        if all(n in fixed or n.meta.get("is_fixed", False) for n in node.all_input_nodes):
            fixed.add(node)
    return fixed


def _rule(node: fx.Node, sliced: Sequence[fx.Node], rules: Rules) -> Local | Reduction | None:
    target = node.target
    if is_pointwise(node):
        return _pointwise(node, sliced, rules)
    packet = getattr(target, "overloadpacket", target)
    build = BUILDERS.get(packet)
    if build is None:
        raise NotLocal(f"{packet} is not known to work part by part")
    x = node.args[0][0] if packet is aten.cat else node.args[0]  # type: ignore[index]
    if not isinstance(x, fx.Node) or set(sliced) - {x} and packet not in (aten.cat, scale_channels, aten.expand_as):
        raise NotLocal(f"{packet} mixes several maps")
    if packet is aten.expand_as and sliced and x not in sliced:
        return Expansion(node, rules.dims[sliced[0]])
    dims = rules.dims.get(x) or _free_dims(x, rules.axes)
    if packet is aten.cat:
        dims = next((rules.dims[n] for n in sliced), dims)
        if any(rules.dims[n] != dims for n in sliced):
            raise NotLocal("its inputs have their rows in different dimensions")
    return build(node, dims)


def _free_dims(x: fx.Node, axes: Sequence[int]) -> Dims:
    """Where a whole value has the axes: its spatial dimensions, after batch and channels."""
    rank = x.meta["val"].dim() if isinstance(x.meta.get("val"), Tensor) else 0
    if rank < 3 or max(axes) + 2 >= rank:
        raise NotLocal("its input has no rows")
    dims = tuple(2 + axis for axis in axes)
    if any(x.meta["val"].shape[d] == 1 for d in dims):
        raise NotLocal("its input has one row")
    return dims


def _pointwise(node: fx.Node, sliced: Sequence[fx.Node], rules: Rules) -> Local | None:
    if sliced:
        return Pointwise(node, sliced, [rules.dims[n] for n in sliced])
    # Maps that are all whole: an input image that is scaled first, say.
    value = node.meta["val"]
    whole = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    whole = [n for n in whole if n.meta["val"].shape == value.shape]
    if not whole or value.dim() < 4:
        return None
    return Pointwise(node, whole[:1], [_free_dims(whole[0], rules.axes)])


def _over(node: fx.Node, dim: Any) -> list[int]:
    """The dimensions that an argument means; None or none for all."""
    rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    dims = range(rank) if dim in (None, [], ()) else [dim] if isinstance(dim, int) else dim
    return sorted({int(d) % rank for d in dims})


def _batch_norm(node: fx.Node, dims: Dims) -> Local:
    return BatchNorm(node, dims)


def _norm_over_channels(node: fx.Node, dims: Dims) -> Local:
    """`layer_norm(x, shape)` over the last dimensions."""
    count = len(node.args[1])  # type: ignore[arg-type]
    return WithinRows(node, dims, dims, range(-count, 0), extra_bytes_per_element=0)


def _linear(node: fx.Node, dims: Dims) -> Local:
    width = node.args[0].meta["val"].shape[-1]  # type: ignore[union-attr]
    return WithinRows(node, dims, dims, [-1], macs_per_element=int(width))


def _matmul(node: fx.Node, dims: Dims) -> Local:
    """By a matrix that is the same for all rows."""
    x, weight = node.args[:2]
    if not isinstance(weight, fx.Node) or weight.meta["val"].dim() != 2:
        raise NotLocal("a product of two maps")
    return WithinRows(node, dims, dims, [-1], macs_per_element=int(x.meta["val"].shape[-1]))  # type: ignore[union-attr]


def _along(place: int, default: int = -1) -> Callable[[fx.Node, Dims], Local]:
    """An op along the one dimension in argument number `place`, which stays."""

    def build(node: fx.Node, dims: Dims) -> Local:
        dim: Any = node.args[place] if len(node.args) > place else default
        return WithinRows(node, dims, dims, [dim])

    return build


def _given(node: fx.Node, name: str, default: Any) -> Any:
    """The argument `name` of `node`."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    at = names.index(name) if name in names else len(node.args)
    return node.args[at] if at < len(node.args) else node.kwargs.get(name, default)


def _reducing(gather: Callable[[fx.Node, Dims, list[int]], Reduction]) -> Callable[[fx.Node, Dims], Local | Reduction]:
    """An op that reduces dimensions `dim`: gathered by `gather` if they are sliced, and within rows if not."""

    def build(node: fx.Node, dims: Dims) -> Local | Reduction:
        over = _over(node, _given(node, "dim", None))
        if set(over) & set(dims):
            return gather(node, dims, over)
        rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
        kept = [d for d in range(rank) if d not in over or _given(node, "keepdim", False)]
        return WithinRows(node, dims, [kept.index(d) for d in dims], over)

    return build


def _mean(node: fx.Node, dims: Dims, over: list[int]) -> Reduction:
    return Sum(node, dims, over, mean=True)


def _sum(node: fx.Node, dims: Dims, over: list[int]) -> Reduction:
    return Sum(node, dims, over, mean=False)


def _amax(node: fx.Node, dims: Dims, over: list[int]) -> Reduction:
    return Extremum(node, dims, over, largest=True)


def _amin(node: fx.Node, dims: Dims, over: list[int]) -> Reduction:
    return Extremum(node, dims, over, largest=False)


def _norm(node: fx.Node, dims: Dims, over: list[int]) -> Reduction:
    if _given(node, "ord", 2) != 2:
        raise NotLocal("a norm over all rows that is not the euclidean one")
    return EuclideanNorm(node, dims, over)


def _variance(root: bool) -> Callable[[fx.Node, Dims, list[int]], Reduction]:
    def gather(node: fx.Node, dims: Dims, over: list[int]) -> Reduction:
        correction = _given(node, "correction", None)
        if correction is None:
            correction = int(_given(node, "unbiased", True))
        return Variance(node, dims, over, correction, root)

    return gather


def _no_gathering(node: fx.Node, dims: Dims, over: list[int]) -> Reduction:
    raise NotLocal("it mixes the rows")


def _adaptive(node: fx.Node, dims: Dims) -> Local | Reduction:
    size = node.args[1]
    sizes = size if isinstance(size, (list, tuple)) else [size]
    rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    over = list(range(rank - len(sizes), rank))
    if not set(over) & set(dims):
        return WithinRows(node, dims, dims, over)
    if any(s != 1 for s in sizes):
        raise NotLocal("an adaptive pooling to more than one row")
    return Sum(node, dims, over, mean=True)


def _permute(node: fx.Node, dims: Dims) -> Local:
    rank = node.meta["val"].dim()
    order = [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr, arg-type]
    return SameRows(node, dims, [order.index(d) for d in dims], view=True)


def _transpose(node: fx.Node, dims: Dims) -> Local:
    rank = node.meta["val"].dim()
    a, b = (int(d) % rank for d in node.args[1:3])  # type: ignore[arg-type]
    moved = {a: b, b: a}
    return SameRows(node, dims, [moved.get(d, d) for d in dims], view=True)


def _unsqueeze(node: fx.Node, dims: Dims) -> Local:
    at = int(node.args[1]) % node.meta["val"].dim()  # type: ignore[arg-type]
    return SameRows(node, dims, [d + (d >= at) for d in dims], view=True)


def _squeeze(node: fx.Node, dims: Dims) -> Local:
    shape = node.args[0].meta["val"].shape  # type: ignore[union-attr]
    gone = {d for d in _over(node, node.args[1] if len(node.args) > 1 else None) if shape[d] == 1}
    if gone & set(dims):
        raise NotLocal("it drops the rows")
    return SameRows(node, dims, [d - sum(g < d for g in gone) for d in dims], view=True)


def _same(node: fx.Node, dims: Dims) -> Local:
    return SameRows(node, dims, dims)


def _select(node: fx.Node, dims: Dims) -> Local:
    along = int(node.args[1]) % node.args[0].meta["val"].dim()  # type: ignore[union-attr, arg-type]
    if along in dims:
        raise NotLocal("it takes one row")
    return SameRows(node, dims, [d - (along < d) for d in dims], view=True)


_SLICE: dict[str, Any] = {"dim": 0, "start": None, "end": None, "step": 1}


def _slice(node: fx.Node, dims: Dims) -> Local:
    x = node.args[0].meta["val"]  # type: ignore[union-attr]
    along, start, stop, step = (_given(node, name, default) for name, default in _SLICE.items())
    along = int(along) % x.dim()
    size = int(x.shape[along])
    first, _, step = slice(start, stop, step).indices(size)
    return Cut(node, dims, along, first, step)


def _expand(node: fx.Node, dims: Dims) -> Local:
    further = node.meta["val"].dim() - node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    return Expansion(node, [d + further for d in dims])


def _cat(node: fx.Node, dims: Dims) -> Local:
    along = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
    return Concatenation(node, list(node.args[0]), dims, along % node.meta["val"].dim())  # type: ignore[arg-type]


def _reshape(node: fx.Node, dims: Dims) -> Local:
    """Where each sliced dimension goes: the products of the sizes before and after it tell."""
    old, new = node.args[0].meta["val"].shape, node.meta["val"].shape  # type: ignore[union-attr]
    if node.args[0].meta["val"].dtype != node.meta["val"].dtype:  # type: ignore[union-attr]
        raise NotLocal("a view of the bytes as another dtype")
    old, new = [int(s) for s in old], [int(s) for s in new]
    found: list[tuple[int, int, int]] = []  # where, how many rows of it a row is, how many rows a row of it is
    for d in dims:
        before = math.prod(old[:d])
        i = next((i for i in range(len(new)) if math.prod(new[:i]) == before and new[i] != 1), None)
        if i is None or old[d] == 1:
            raise NotLocal("a view that tears the rows apart")
        if new[i] % old[d] == 0:  # the row is whole in it: other dimensions may have been merged behind
            found.append((i, new[i] // old[d], 1))
        elif old[d] % new[i] == 0:  # several rows become one, with the rest of them behind
            found.append((i, 1, old[d] // new[i]))
        else:
            raise NotLocal("a view that tears the rows apart")
    placed, merged, split = zip(*found, strict=True)
    if len(set(placed)) < len(placed):
        raise NotLocal("a view that joins the sliced axes")
    return Reshape(node, dims, placed, merged, split)


def _pad(node: fx.Node, dims: Dims) -> Local:
    return Padding(node, dims)


def _pixel_shuffle(node: fx.Node, dims: Dims) -> Local:
    return PixelShuffle(node, dims, int(node.args[1]), up=True)  # type: ignore[arg-type]


def _pixel_unshuffle(node: fx.Node, dims: Dims) -> Local:
    return PixelShuffle(node, dims, int(node.args[1]), up=False)  # type: ignore[arg-type]


def _channel_shuffle(node: fx.Node, dims: Dims) -> Local:
    return WithinRows(node, dims, dims, [1])


def _moments(node: fx.Node, dims: Dims) -> Local | Reduction:
    """Moments (2, B, C) belong to one example each."""
    return WithinRows(node, dims, (1,), [1]) if dims == (0,) else ChannelMoments(node, dims)


BUILDERS: dict[Any, Callable[[fx.Node, Dims], Local | Reduction]] = {
    **dict.fromkeys((aten.conv1d, aten.conv2d, aten.conv3d), convolution),
    **dict.fromkeys((aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d), transposed_convolution),
    **dict.fromkeys((aten.max_pool1d, aten.max_pool2d, aten.max_pool3d), max_pooling),
    **dict.fromkeys((aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d), average_pooling),
    **dict.fromkeys(MODES, Interpolation),
    aten.batch_norm: _batch_norm,
    aten.layer_norm: _norm_over_channels,
    aten.linear: _linear,
    aten.matmul: _matmul,
    **dict.fromkeys((aten.softmax, aten.log_softmax), _along(1)),
    aten.glu: _along(1),
    aten.mean: _reducing(_mean),
    aten.sum: _reducing(_sum),
    aten.amax: _reducing(_amax),
    aten.amin: _reducing(_amin),
    aten.linalg_vector_norm: _reducing(_norm),
    aten.var: _reducing(_variance(root=False)),
    aten.std: _reducing(_variance(root=True)),
    **dict.fromkeys((aten.logsumexp, aten.argmax, aten.argmin), _reducing(_no_gathering)),
    aten.adaptive_avg_pool1d: _adaptive,
    aten.adaptive_avg_pool2d: _adaptive,
    aten.adaptive_avg_pool3d: _adaptive,
    aten.permute: _permute,
    aten.transpose: _transpose,
    aten.unsqueeze: _unsqueeze,
    aten.squeeze: _squeeze,
    **dict.fromkeys((aten.clone, aten.contiguous), _same),
    **dict.fromkeys((aten.expand, aten.expand_as), _expand),
    aten.select: _select,
    aten.slice: _slice,
    aten.cat: _cat,
    **dict.fromkeys((aten.view, aten.reshape, aten.flatten, aten.unflatten), _reshape),
    aten.pad: _pad,
    aten.pixel_shuffle: _pixel_shuffle,
    aten.pixel_unshuffle: _pixel_unshuffle,
    aten.channel_shuffle: _channel_shuffle,
    channel_moments: _moments,
    scale_channels: ScaleChannels,
}
