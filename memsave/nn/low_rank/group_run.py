"""One forward of an attention module by groups of heads, each on a copy of the module that has these heads alone.

x is (B, T, d), N = B * T rows; a group has h' query heads and kv' key/value heads of size D; R the rank of the output
projection, r that of each head. The latents of q, k and v are made once, and what each group gives is added up in the
latent of the output, (N, R).

Where every head has factors of its own and nothing acts on the features of queries and keys, heads run in rank space
("absorbed"): with q_i = P_i A^T + a and k_j = P_j B^T + b, the scores are (P_i A^T B + a B) P_j^T, up to what all
keys share and softmax drops; the values stay latents, and their expansion is multiplied into the output projection.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..converted import original_class
from .layout import HeadGroup, HeadLayout
from .linear import LowRankLinear
from .rows import RowWise

ATTENTION = "memsave_heads"
"""The name by which transformers knows the attention function that is given groups of heads."""


class GroupDone(Exception):
    """The forward of a group ends where its part of the output is added up."""


class Change(NamedTuple):
    """Another basis, of another size, for the features of each head: what `attention.py` tries before any factor is.

    Attributes:
        query_key: (D, D'), orthonormal rows, for queries and keys.
        value: (D, D'), for values.
    """

    query_key: Tensor
    value: Tensor


class Run:
    """What the groups of one forward share.

    Attributes:
        total: (N, R), the latent of the output; (N, d) for an output projection that has none.
        change: another basis for every head.
        latents, seen: for the attention function; see `HeadGroup`.
    """

    def __init__(self, root: nn.Module, layout: HeadLayout, change: Change | None = None) -> None:
        self.root, self.layout, self.change = root, layout, change
        self.total: Tensor | None = None
        self.absorbed = change is None and absorbs(root, layout)
        self.latents: Any = None
        self.seen: list[Any] | None = None
        self._made: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def head_size(self) -> int:
        """Of the heads as the attention function sees them."""
        if self.change is not None:
            return self.change.value.shape[1]
        value = self.linear(self.layout.value)
        return value.rank + (value.bias is not None) if self.absorbed else self.layout.head_size

    def linear(self, name: str) -> Any:
        return self.root.get_submodule(name)

    def by_groups(self, groups: Sequence[slice], args: Any, kwargs: Any, cache: Any = None) -> Any:
        """The output of the root's forward. `cache.heads` is set to the heads that run."""
        for number, heads in enumerate(groups):
            last = number == len(groups) - 1
            module = self._with(heads, last)
            if cache is not None:
                cache.heads = heads
            try:
                result = original_class(self.root).forward(module, *args, **kwargs)
            except GroupDone:
                if not last:
                    continue
            else:
                return without_probabilities(result, self.layout, heads)
        raise RuntimeError("memsave: an attention module did not call its output projection once for each group")

    def projected(self, name: str, x: Tensor) -> Tensor:
        """What a projection makes of x before it is divided into heads; the same for every group."""
        if name not in self._made:
            linear = self.linear(name)
            self._made[name] = x, (linear.project(x) if isinstance(linear, LowRankLinear) else linear(x))
        source, made = self._made[name]
        if source is not x and not (source.shape == x.shape and source.data_ptr() == x.data_ptr()):
            raise RuntimeError(f"memsave: {name} was given another tensor by another group of heads")
        return made

    def forget(self) -> None:
        """Free the latents of q, k and v: the last group has been through attention."""
        self._made.clear()

    def _with(self, heads: slice, last: bool) -> nn.Module:
        """A copy of the root that has the key/value heads `heads` alone; its tensors are the root's."""
        layout, copies = self.layout, Copies(self.root)
        for name, blocks in layout.blocks(heads).items():
            copies.put(name, _HeadRows(self, name, heads, blocks))
        if layout.tail:
            copies.put(layout.tail, _HeadTail(self, heads, last))
        else:
            copies.put(layout.output, _HeadColumns(self, heads, last))
        width = self.head_size / layout.head_size
        for module, attribute in layout.scaled:
            whole = layout.num_kv_heads * (1 if _counts(attribute) else layout.head_size)
            part = (heads.stop - heads.start) * (1 if _counts(attribute) else self.head_size)
            copies.change(module, attribute, lambda value, part=part, whole=whole: value * part // whole)
        if width != 1:
            for module, attribute in layout.sized or ():
                copies.change(module, attribute, lambda _: self.head_size)
        inner = copies.copy_of(layout.inner)
        group = HeadGroup(layout, heads, latents=self.latents, seen=self.seen)
        if layout.redirect:
            inner.config = copy.copy(inner.config)
            group.implementation = inner.config._attn_implementation
            inner.config._attn_implementation_internal = ATTENTION
        inner.__dict__["_memsave_group"] = group
        return copies.root


def _counts(attribute: str) -> bool:
    """Whether an attribute counts heads; else it counts features."""
    return "head" in attribute.rpartition(".")[2] and "size" not in attribute


def absorbs(root: nn.Module, layout: HeadLayout) -> bool:
    """Whether the heads can run in rank space, and have fewer features there."""
    if layout.sized is None:
        return False
    names = dict.fromkeys((layout.query, layout.key, layout.value))
    linears = [root.get_submodule(name) for name in (*names, layout.output)]
    if not all(isinstance(linear, LowRankLinear) for linear in linears):
        return False
    heads = [(linear.heads, linear.rank) for linear in linears[:-1]]
    divided = all(count == layout.num_blocks(name) for name, (count, _) in zip(names, heads, strict=True))
    return divided and len({rank for _, rank in heads}) == 1 and int(heads[0][1]) < layout.head_size  # type: ignore[arg-type]


def without_probabilities(result: Any, layout: HeadLayout, heads: slice) -> Any:
    """What an attention module returned, without the probabilities (B, h', T, S) of some heads alone.

    Only functions in a model's own file return them; those that are found by name give None.
    """
    if layout.redirect or not isinstance(result, tuple):
        return result
    query = layout.query_heads(heads)
    part = (isinstance(t, Tensor) and t.dim() == 4 and t.shape[1] == query.stop - query.start for t in result)
    return tuple(None if drop else t for drop, t in zip(part, result, strict=True))


class Copies:
    """Copies of a module and of some modules in it, which share everything with them but what is put in."""

    def __init__(self, root: nn.Module) -> None:
        self._source = root
        self._copies: dict[str, nn.Module] = {}
        self.root = self.copy_of("")

    def copy_of(self, name: str) -> Any:
        if name not in self._copies:
            source = self._source.get_submodule(name)
            cls = original_class(source) if name == "" else type(source)
            clone = cls.__new__(cls)
            clone.__dict__.update(source.__dict__)
            clone.__dict__["_modules"] = dict(source._modules)
            self._copies[name] = clone
            if name:
                self.put(name, clone)
        return self._copies[name]

    def put(self, name: str, module: nn.Module) -> None:
        parent, _, last = name.rpartition(".")
        self.copy_of(parent)._modules[last] = module

    def change(self, name: str, attribute: str, change: Any) -> None:
        """Set an attribute, of the module or of its config, to a function of its value."""
        holder = self.copy_of(name)
        if attribute.startswith("config."):
            holder.config = copy.copy(holder.config)
            holder, attribute = holder.config, attribute.removeprefix("config.")
        setattr(holder, attribute, change(getattr(holder, attribute)))


class _StandIn(nn.Module):
    """Stands for a module of the root while a group runs; what it refers to are no children of it."""

    run: Run
    heads: slice
    last: bool

    def __init__(self, run: Run, heads: slice, last: bool = False) -> None:
        super().__init__()
        self.__dict__.update(run=run, heads=heads, last=last)


class _HeadRows(_StandIn):
    """Stands for a projection: its output's features of one group."""

    name: str
    blocks: Mapping[str, slice]

    def __init__(self, run: Run, name: str, heads: slice, blocks: Mapping[str, slice]) -> None:
        super().__init__(run, heads)
        self.__dict__.update(name=name, blocks=blocks)

    @property
    def weight(self) -> Any:
        return self.run.linear(self.name).weight

    def forward(self, x: Tensor) -> Tensor:
        run, linear = self.run, self.run.linear(self.name)
        made = run.projected(self.name, x)
        if run.absorbed:
            parts = [self._absorbed(made, role, block) for role, block in self.blocks.items()]
            return torch.cat(parts, -1) if parts[1:] else parts[0]
        features = [run.layout.features(block) for block in self.blocks.values()]
        if isinstance(linear, LowRankLinear):
            return linear.expand(made, features)
        parts = [made[..., part] for part in features]
        if run.change is not None:
            parts = [self._changed(part, role) for part, role in zip(parts, self.blocks, strict=True)]
        return torch.cat(parts, -1)

    def _absorbed(self, latent: Tensor, role: str, block: slice) -> Tensor:
        """The latents (..., block * r) of keys and values; of queries, what is multiplied with those of keys."""
        run, linear = self.run, self.run.linear(self.name)
        own = latent[..., block.start * linear.rank : block.stop * linear.rank]
        if role == "query":
            own = self._against_keys(own, block)
        if run.head_size == linear.rank:
            return own
        # One feature more, in which values have 1: the sum of the probabilities, by which their bias counts. It is 0
        # for a token that may attend to nothing.
        own = own.unflatten(-1, (-1, linear.rank))
        return F.pad(own, (0, 1), value=float(role == "value")).flatten(-2)

    def _against_keys(self, latent: Tensor, block: slice) -> Tensor:
        """Latents of queries (..., h' * r) -> what gives their scores with the latents of keys, (..., h' * r)."""
        run, linear = self.run, self.run.linear(self.name)
        key = run.linear(run.layout.key)
        start = run.layout.num_heads if run.layout.fused else 0
        expand_key = key.second[start + self.heads.start : start + self.heads.stop]  # (kv', D, r)
        expand_key = expand_key.repeat_interleave(run.layout.per_kv, 0)  # (h', D, r)
        latent = latent.unflatten(-1, (-1, linear.rank))  # (..., h', r)
        y = torch.einsum("...hr,hrs->...hs", latent, linear.second[block].mT @ expand_key)
        if linear.bias is not None:
            bias = linear.bias[run.layout.features(block)].view(-1, 1, run.layout.head_size)
            y += (bias @ expand_key).squeeze(1)
        return y.flatten(-2)

    def _changed(self, part: Tensor, role: str) -> Tensor:
        assert self.run.change is not None
        basis = self.run.change.value if role == "value" else self.run.change.query_key
        return (part.unflatten(-1, (-1, self.run.layout.head_size)) @ basis).flatten(-2)


class _HeadColumns(_StandIn):
    """Stands for the output projection: adds up what each group gives; the last one has the output."""

    @property
    def weight(self) -> Any:
        return self.run.linear(self.run.layout.output).weight

    def add(self, x: Tensor) -> Tensor:
        """Add the group's output (..., C); after the last group, the sum (..., R), or (..., d) without a latent."""
        run, linear = self.run, self.run.linear(self.run.layout.output)
        flat = x.reshape(-1, x.shape[-1])  # (N, C)
        if run.change is not None:
            flat = (flat.unflatten(-1, (-1, run.head_size)) @ run.change.value.t()).flatten(-2)
        columns = run.layout.features(run.layout.query_heads(self.heads))
        if not isinstance(linear, LowRankLinear):
            self._superpose(flat, linear, columns)
        else:
            if run.total is None:
                run.total = flat.new_zeros(flat.shape[0], linear.latent_features)
            if run.absorbed:
                self._absorb(flat, linear.first[:, columns], run.total)
            else:
                linear.accumulate(run.total, flat, columns)
        if not self.last:
            raise GroupDone
        run.forget()
        assert run.total is not None
        return run.total.view(*x.shape[:-1], run.total.shape[-1])

    def _absorb(self, latent: Tensor, first: Tensor, total: Tensor) -> None:
        """Add what the latents of values (N, h' * r) give through the columns (R, h' * D) of the output projection."""
        run, value = self.run, self.run.linear(self.run.layout.value)
        start = run.layout.num_heads + run.layout.num_kv_heads if run.layout.fused else 0
        blocks = slice(start + self.heads.start, start + self.heads.stop)
        by_head = first.unflatten(-1, (-1, run.layout.head_size)).transpose(0, 1)  # (h', R, D)
        expand = value.second[blocks]  # (kv', D, r)
        if value.bias is not None:
            bias = value.bias[run.layout.features(blocks)].view(-1, run.layout.head_size, 1)
            expand = torch.cat([expand, bias], -1)
        expand = expand.repeat_interleave(run.layout.per_kv, 0)  # (h', D, r)
        total.addmm_(latent, (by_head @ expand).transpose(0, 1).flatten(1).t())

    def _superpose(self, flat: Tensor, linear: nn.Module, columns: slice) -> None:
        """Only to try whether a module can run by groups: the part that a plain linear gives, its weight unread."""
        run = self.run
        padded = flat.new_zeros(flat.shape[0], run.layout.num_heads * run.layout.head_size)
        nothing = linear(padded)
        padded[:, columns] = flat
        part = linear(padded) - nothing
        run.total = part if run.total is None else run.total + part
        if self.last:
            run.total = run.total + nothing

    def forward(self, x: Tensor) -> Tensor:
        return _expanded(self.run.linear(self.run.layout.output), self.add(x))


class _HeadTail(_StandIn):
    """Stands for the module around the output projection, which works row by row on what the last group completes."""

    def forward(self, x: Tensor, *others: Tensor) -> Any:
        layout, tail = self.run.layout, self.run.linear(self.run.layout.tail)
        total = _HeadColumns(self.run, self.heads, self.last).add(x)
        copies = Copies(tail)
        copies.put(layout.output.removeprefix(layout.tail + "."), _Expand(self.run, self.heads))
        clone = copies.root
        if isinstance(tail, RowWise):
            clone.__class__ = type(tail)
        return clone.forward(total, *others)


class _Expand(_StandIn):
    """Stands for the output projection where its latent is there already."""

    @property
    def weight(self) -> Any:
        return self.run.linear(self.run.layout.output).weight

    def forward(self, total: Tensor) -> Tensor:
        return _expanded(self.run.linear(self.run.layout.output), total)


def _expanded(linear: nn.Module, total: Tensor) -> Tensor:
    return linear.expand(total) if isinstance(linear, LowRankLinear) else total
