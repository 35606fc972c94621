"""How the features of an attention module fall into heads: plain data.

h query heads and kv key/value heads of size D, h a multiple of kv.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class HeadLayout:
    """The parts of an attention module, by the names of its modules from its root on.

    Attributes:
        query, key, value: the projections; one name three times for a fused one, whose features are q, k, v in turn.
        output: the output projection.
        inner: the module that calls the projections and the attention function; "" for the root.
        tail: the module around the output projection that works row by row; "" if the root or `inner` calls that.
        scaled: attributes that count heads or features of heads, as (module, attribute).
        sized: attributes that are the size of a head, as (module, attribute); None if that must not change: positions
            or norms act on the features of queries and keys.
        redirect: whether the attention function is found by a name in `config`, so that another can stand before it.
        latent: how a query may attend to latents of keys: "absorbed" (nothing acts on the features of keys), "rotated"
            (they are normed by `key_norm` and rotated as in a Llama); "" if it cannot.
        key_norm: the module with the weight of the norm, and whether one is added to that.
    """

    query: str
    key: str
    value: str
    output: str
    inner: str
    tail: str
    num_heads: int
    num_kv_heads: int
    head_size: int
    scaled: tuple[tuple[str, str], ...] = ()
    sized: tuple[tuple[str, str], ...] | None = None
    redirect: bool = False
    latent: str = ""
    key_norm: tuple[str, bool] | None = None

    @property
    def fused(self) -> bool:
        return self.query == self.key

    @property
    def per_kv(self) -> int:
        """How many query heads read one key/value head."""
        return self.num_heads // self.num_kv_heads

    def query_heads(self, heads: slice) -> slice:
        """The query heads that read the key/value heads `heads`."""
        return slice(heads.start * self.per_kv, heads.stop * self.per_kv)

    def blocks(self, heads: slice) -> dict[str, dict[str, slice]]:
        """By projection and role: which heads of the projection's output belong to the key/value heads `heads`."""
        query = self.query_heads(heads)
        if not self.fused:
            return {self.query: {"query": query}, self.key: {"key": heads}, self.value: {"value": heads}}
        starts = self.num_heads, self.num_heads + self.num_kv_heads
        key, value = (slice(start + heads.start, start + heads.stop) for start in starts)
        return {self.query: {"query": query, "key": key, "value": value}}

    def num_blocks(self, projection: str) -> int:
        """Of how many heads the output of a projection consists."""
        if self.fused:
            return self.num_heads + 2 * self.num_kv_heads
        return self.num_heads if projection == self.query else self.num_kv_heads

    def features(self, heads: slice) -> slice:
        """The features that such heads have."""
        return slice(heads.start * self.head_size, heads.stop * self.head_size)

    def to_dict(self) -> dict[str, Any]:
        """As JSON data, for `from_dict`."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> HeadLayout:
        """What `to_dict` described."""
        check_counts(data, "num_heads", "num_kv_heads", "head_size")
        scaled, sized = (None if data[name] is None else _pairs(data[name]) for name in ("scaled", "sized"))
        norm = data["key_norm"]
        norm = None if norm is None else (str(norm[0]), bool(norm[1]))
        return HeadLayout(**{**data, "scaled": scaled or (), "sized": sized, "key_norm": norm})


def check_counts(data: Mapping[str, Any], *names: str) -> None:
    """Raises ValueError unless these entries of what was read are whole numbers of at least 1."""
    for name in names:
        if isinstance(value := data[name], bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")


def _pairs(items: Any) -> tuple[tuple[str, str], ...]:
    return tuple((str(module), str(attribute)) for module, attribute in items)


@dataclass
class HeadGroup:
    """The group of heads that runs, for the attention function: `module._memsave_group`.

    Attributes:
        heads: the key/value heads.
        implementation: the name of the model's own attention function.
        latents: what stands for the keys and values of all tokens so far; None if they are what the function is given.
        seen: where the function puts what it was given, for `attention.py` to look at.
    """

    layout: HeadLayout
    heads: slice
    implementation: str | None = None
    latents: Any = None
    seen: list[Any] | None = None

    @property
    def query_heads(self) -> slice:
        return self.layout.query_heads(self.heads)


def asks_by_name(inner: object) -> bool:
    """Whether a module's config names its attention function, other than the one in the module's own file."""
    return getattr(getattr(inner, "config", None), "_attn_implementation", "eager") != "eager"
