"""A small config of any model type: the default one with fewer and narrower layers, by the names of its fields."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, ResNetConfig

from .overrides import CONFIGS

WIDTH, HEAD, HEADS, VOCABULARY = 64, 16, 4, 160
FIRST_WORD = 100
"""Ids from here on are words; those below are special tokens."""
POSITIONS = 512
_NEVER = re.compile(
    r"^(_.*|chunk_size_feed_forward|id2label|label2id|.*_act|.*sampling_rate|num_labels|num_channels|num_mel_bins|"
    r"type_vocab_size|pretraining_tp|in_chans|.*kernel.*|.*stride.*|.*dilation.*|.*scale.*|"
    r"(?!n_group|topk_group|upsample_group).*groups?|"
    r".*temporal_patch_size|.*merge_size|.*bias|.*ratio|num_nextn.*|.*version.*|.*norm_num.*)$"
)
_INDICES = re.compile(r".*(ind(ex|ices|exes)(es)?|_idx|_layers?|layer_ids?|_blocks?|features)$")


@dataclasses.dataclass(frozen=True)
class Level:
    """How far a config is shrunk: `width` all widths alike, `narrow` by a common factor, or neither."""

    name: str
    width: bool = False
    factor: int = 1


LEVELS = (Level("small", width=True), Level("narrow", factor=8), Level("shallow"))


def small_config(cls: Any, level: Level = LEVELS[0], *, dropout: bool = False) -> Any:
    """A small config of the class `cls`, with its dropout or without any."""
    return _shrunk(_default_of(cls), level, _Ids(), dropout)


def _resnet() -> Any:
    """What stands for a backbone of timm, which is another package."""
    widths = [16, 16, 32, 32]
    stages = ["stage1", "stage2", "stage3", "stage4"]
    return ResNetConfig(embedding_size=16, hidden_sizes=widths, depths=[1] * 4, out_features=stages)


def _default_of(cls: Any) -> Any:
    return cls(**CONFIGS.get(f"{cls.model_type}@default", {}))


class _Ids:
    """Special tokens, one id for each name, below `FIRST_WORD`."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def of(self, name: str, value: int) -> int:
        name = name.replace("_index", "_id").replace("_idx", "_id")
        if value < 0:
            return value
        if name not in self._known:
            taken = set(self._known.values())
            free = value < 10 and value not in taken
            self._known[name] = value if free else next(i for i in range(10, FIRST_WORD) if i not in taken)
        return self._known[name]


def _shrunk(config: Any, level: Level, ids: _Ids, dropout: bool) -> Any:
    known = {f.name for f in dataclasses.fields(config)} - {"transformers_version", "dtype"}
    old = {name: value for name, value in vars(config).items() if name in known}  # getattr may refuse some
    depth = _depth(old)
    divisor = _divisor(old)
    settings: dict[str, Any] = {}
    for name, value in old.items():
        if isinstance(value, PreTrainedConfig) and value.model_type == "timm_backbone" and "backbone" in name:
            settings |= {name: _resnet(), "use_timm_backbone": False, "use_pretrained_backbone": False}
        elif isinstance(value, PreTrainedConfig):
            settings[name] = _shrunk(value, level, ids, dropout)
        elif isinstance(value, (list, tuple)) and value and all(isinstance(v, PreTrainedConfig) for v in value):
            settings[name] = [_shrunk(v, level, ids, dropout) for v in value]
        else:
            settings[name] = _value(name, value, depth, divisor, level, ids)
            if not dropout and isinstance(value, float) and re.search("drop|jitter", name):
                settings[name] = 0.0
    settings |= _fitting(settings, old)
    if level.width and isinstance(settings.get("rope_parameters"), dict) and _reads_sections(type(config)):
        _add_sections(settings["rope_parameters"])
    known_settings = {n: v for n, v in settings.items() if n in known or n in ("out_indices", "out_features")}
    settings = known_settings | CONFIGS.get(config.model_type, {})
    if level.width:
        settings |= CONFIGS.get(f"{config.model_type}@small", {})
    changed = {k: v for k, v in settings.items() if not _same(v, _default(config, k))}
    return type(config)(**changed)


def _default(config: Any, name: str) -> Any:
    field = next((f for f in dataclasses.fields(config) if f.name == name), None)
    if field is None:
        return dataclasses.MISSING
    return field.default


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and a == b


def _depth(values: Mapping[str, Any]) -> int:
    """How many layers lists of one entry for each layer have; 0 if unknown."""
    for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers"):
        if isinstance(values.get(name), int):
            return int(values[name])
    return 0


def _value(name: str, value: Any, depth: int, divisor: int, level: Level, ids: _Ids) -> Any:
    if isinstance(value, (bool, str)) or value is None or _NEVER.match(name):
        return value
    if re.search(r"token_(id|index|idx)$", name) or name in ("image_token_ids",):
        if isinstance(value, (list, tuple)):
            return type(value)(ids.of(f"{name}{i}", v) for i, v in enumerate(value))
        return ids.of(name, value) if isinstance(value, int) else value
    if isinstance(value, int):
        return value if name == "in_channels" else _number(name, value, level)
    if isinstance(value, Mapping) and name.startswith("rope"):
        return _rope(value)
    if isinstance(value, (list, tuple)) and value:
        return _sequence(name, value, depth, divisor if level.width or level.factor > 1 else 1)
    return value


_Rule = tuple[str, Callable[[int], int]]


def _at_most(limit: int) -> Callable[[int], int]:
    return lambda value: min(value, limit)


_ALWAYS: tuple[_Rule, ...] = (
    (r"n_group|num_expert_groups?|topk_group", _at_most(1)),
    (r".*top_?k.*|.*experts_per_tok(en)?|moe_k|num_selected.*|.*_active_experts", _at_most(2)),
    (r".*experts|.*experts_num|expert_num", _at_most(4)),
    (r"first_k_dense_replace", _at_most(1)),
    (r".*vocab_size|.*vocab_size_.*|vocab_.*", _at_most(VOCABULARY)),
    (r"max_.*positions?.*|n_positions|n_ctx|.*max_position.*|max_seq.*|seq_length|block_size", _at_most(POSITIONS)),
    (r".*image_size|resolution|input_size|img_size", _at_most(64)),
    (r".*sliding_window.*|.*window_length|local_attention|attention_window", _at_most(16)),
    (r"num_.*layers|n_layers?|.*_layers|.*depth|num_layer|num_.*blocks|n_blocks|.*_n_layers?", _at_most(2)),
    (r"upsample_groups", _at_most(WIDTH)),
    (r".*queries|num_query_tokens|.*latents|num_detection_tokens", _at_most(16)),
    (r".*codebook_size|.*num_embeddings|num_codevectors.*", _at_most(64)),
)
_WIDE: tuple[_Rule, ...] = (
    (r".*(kv|key_value).*heads", _at_most(2)),
    (r".*heads?|num_head.*", _at_most(HEADS)),
    (r"qk_head_dim", _at_most(2 * HEAD)),
    (r".*head_dim|d_kv|dim_head|head_size|.*head_dim_.*|.*head_size|kv_channels", _at_most(HEAD)),
    (r".*(rank|lora).*", _at_most(WIDTH // 2)),
    (r".*(moe|expert).*(intermediate|inter|ffn|hidden|dim).*", _at_most(WIDTH // 2)),
    (r".*(intermediate|ffn|d_ff|inner|feed_?forward|mlp_dim|mlp_hidden|ff_dim).*", _at_most(2 * WIDTH)),
    (r".*(hidden|dim|width|channels|embd|d_model|d_embed|features|filters|embedding_size|_size).*", _at_most(WIDTH)),
)


def _number(name: str, value: int, level: Level) -> int:
    for pattern, small in _ALWAYS:
        if re.fullmatch(pattern, name):
            return small(value)
    if re.fullmatch(r".*patch_size", name):
        return min(value, 8) if level.width else value
    for pattern, small in _WIDE:
        if re.fullmatch(pattern, name):
            if level.width:
                return small(value)
            is_width = "head" not in name or "hidden" in name
            return max(value // level.factor, min(value, 16)) if is_width and level.factor > 1 else value
    return value


def _divisor(values: Mapping[str, Any]) -> int:
    """By what all lists of widths can be divided, so that they go on fitting together."""
    lists = [v for name, v in values.items() if _is_widths(name, v)]
    widths = [width for value in lists for width in value if width > 4]
    fitting = (d for d in (16, 8, 4, 2) if all(w % d == 0 and w // d >= 4 for w in widths))
    return next(fitting, 1) if widths else 1


def _is_widths(name: str, value: Any) -> bool:
    numbers = isinstance(value, (list, tuple)) and len(value) > 0 and all(type(v) is int for v in value)
    named = re.fullmatch(r".*(dims?|sizes?|channels?|widths?|filters|hidden_dim)(_.*)?", name)
    return bool(numbers and named and max(value) >= 16 and "image" not in name and "kernel" not in name)


def _sequence(name: str, value: Sequence[Any], depth: int, divisor: int) -> Any:
    """A list: one entry for each layer loses the entries of the layers that go; widths are divided alike."""
    kind: Any = type(value)
    if depth > 2 and len(value) == depth:
        return kind(_one_of_each(value))
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        return value
    if re.fullmatch(r"(depths|.*num_blocks|.*layers|num_conv_layers|.*depths?|blocks_per_stage|layers)", name):
        return kind(1 for _ in value) if not _is_increasing(value) or "depth" in name else value
    if "image_size" in name or name == "resolution":
        return kind(min(v, 64) for v in value)
    if _is_widths(name, value):
        return kind(v // divisor if v > 4 else v for v in value)
    return value


def _is_increasing(value: Sequence[int]) -> bool:
    return len(value) > 1 and all(a < b for a, b in zip(value, value[1:], strict=False))


def _one_of_each(value: Sequence[Any]) -> list[Any]:
    """Two entries of a list with one for each layer, of different kinds if there are several."""
    kinds = list(dict.fromkeys(map(repr, value)))
    first = {kind: next(v for v in value if repr(v) == kind) for kind in kinds}
    chosen = [first[kind] for kind in kinds[:2]]
    return chosen if len(chosen) == 2 else [value[0], value[1]]


def _rope(value: Mapping[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, v in value.items():
        if isinstance(v, Mapping):
            made[name] = _rope(v)
        elif "section" in name and isinstance(v, (list, tuple)):
            made[name] = _shares(v, HEAD // 2)
        else:
            made[name] = v
    return made


@cache
def _reads_sections(cls: Any) -> bool:
    """Whether the models of this config divide their rotary features in sections, by default of a full-size head's."""
    package = Path(inspect.getfile(cls)).parent
    return any("mrope_section" in path.read_text() for path in package.glob("modeling_*.py"))


def _add_sections(rope: dict[str, Any]) -> None:
    for value in (rope, *(v for v in rope.values() if isinstance(v, dict))):
        if "rope_type" in value:
            half = int(HEAD * (value.get("partial_rotary_factor") or 1)) // 2
            value["mrope_section"] = _shares((2, 3, 3), half)


def _shares(sections: Sequence[int], total: int) -> list[int]:
    """`sections` in proportion, with the given sum."""
    scaled = [max(1, section * total // sum(sections)) for section in sections]
    scaled[-1] += total - sum(scaled)
    return scaled


def _fitting(new: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    """What must fit together: as many key heads as heads where it was so, layers for every one that is named, ..."""
    changes: dict[str, Any] = {}
    for name, value in old.items():
        if isinstance(value, int) and re.search(r"(kv|key_value).*heads|num_kv", name):
            pairs = [n for n in ("num_attention_heads", "n_heads", "n_head", "num_heads") if n in old]
            if pairs and old[pairs[0]] == value:
                changes[name] = new[pairs[0]]
    named = old.get("_out_indices")
    if named and len(named) > 1 and isinstance(new.get("num_hidden_layers"), int):
        changes |= {"num_hidden_layers": len(named), "out_indices": list(range(1, len(named) + 1))}
    heads = old.get("num_heads")
    if isinstance(heads, (list, tuple)) and isinstance(old.get("embed_dim"), int):
        changes["embed_dim"] = HEAD * heads[0]
    return changes | _mamba(new)


def _mamba(new: Mapping[str, Any]) -> dict[str, Any]:
    """Heads of a state space layer: as many as its width has room for."""
    heads = next((n for n in ("mamba_n_heads", "n_mamba_heads", "mamba_num_heads") if n in new), None)
    size = next((n for n in ("mamba_d_head", "mamba_head_dim", "mamba_headdim") if n in new), None)
    expand = new.get("mamba_expand", new.get("expand"))
    if heads is None or size is None or not isinstance(expand, (int, float)):
        return {}
    inner = int(expand * new["hidden_size"])
    found = {heads: inner // HEAD, size: HEAD}
    return found | ({"mamba_d_ssm": inner} if "mamba_d_ssm" in new else {})
