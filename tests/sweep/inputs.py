"""Generated inputs for any model of transformers, from what its forward takes and its config says.

Several candidates are made, the fullest first: one with labels, one without, one with text alone. The first that the
plain model takes is used.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .overrides import INPUTS
from .shrink import FIRST_WORD

BATCH, TOKENS, FRAMES, SAMPLES, LABELS = 2, 24, 64, 4000, 2
Inputs = dict[str, Any]


class Maker:
    """Makes inputs of one model.

    Attributes:
        takes: the names of the forward's arguments.
        required: those without a default.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config
        parameters = list(inspect.signature(model.forward).parameters.values())
        self.takes = {p.name for p in parameters}
        kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        self.required = [p.name for p in parameters if p.default is p.empty and p.kind not in kinds]
        self.generator = torch.Generator().manual_seed(1)
        self.text = _text_config(self.config)

    def floats(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, max(high, low + 1), shape, generator=self.generator)

    def find(self, *names: str, default: Any = None) -> Any:
        """The first of these fields that the config, or one within it, has."""
        for config in _configs(self.config):
            for name in names:
                if (value := getattr_or(config, name)) is not None:
                    return value
        return default

    def words(self, tokens: int = TOKENS, rows: int = BATCH) -> Tensor:
        size = self.text_vocabulary()
        room = getattr_or(self.text, "max_position_embeddings") or self.find("max_position_embeddings", default=tokens)
        tokens = min(tokens, room) if isinstance(room, int) and room > 4 else tokens
        return self.integers(min(FIRST_WORD, size // 2), size, rows, tokens)

    def text_vocabulary(self) -> int:
        size = getattr_or(self.text, "vocab_size") or self.find("vocab_size", default=FIRST_WORD + 20)
        return int(size) if isinstance(size, int) else FIRST_WORD + 20

    def candidates(self) -> Iterator[tuple[str, Inputs]]:
        """(what it is, inputs), the fullest first."""
        special = INPUTS.get(self.config.model_type) or INPUTS.get(type(self.model).__name__)
        if special is not None:
            made = special(self)
            yield from ((f"own {i}" if i else "own", each) for i, each in enumerate(_listed(made)))
            return
        full = self._full()
        yield from self._variants(full)

    def _variants(self, full: Inputs) -> Iterator[tuple[str, Inputs]]:
        """With labels, without, other shapes of images and sounds, and text alone."""
        labels = {k: v for k, v in self._labels(full).items() if k in self.takes}
        if labels:
            yield "with labels", full | labels
        yield "plain", full
        for name in ("input_values", "input_features", "pixel_values"):
            for number, value in enumerate(self._other_shapes(name) if name in full else ()):
                yield f"other {name} {number}", full | {name: value}
        if "input_ids" in full and len(full.keys() - {"input_ids", "attention_mask"}) > 0:
            words = {"input_ids": self.words()}
            if "labels" in self.takes:
                yield "text alone, with labels", words | {"labels": words["input_ids"].clone()}
            yield "text alone", words
            mask = {"attention_mask": _padded(words["input_ids"])} if "attention_mask" in self.takes else {}
            yield "text and mask", words | mask

    def _other_shapes(self, name: str) -> Iterator[Tensor]:
        """Sounds with and without channels and as spectrograms; images as frames, in pairs and as patches."""
        bins = self.find("num_mel_bins", "input_feat_per_channel", "feature_size", "mel_bins", "mel_dim", default=80)
        bins = bins if isinstance(bins, int) else 80
        if name == "pixel_values":
            image = _image(self)
            if image.dim() == 4:
                yield image[:, None].expand(-1, 4, -1, -1, -1)
                yield image[:, :1]
            patch = self.find("patch_size", default=8)
            patch = patch if isinstance(patch, int) else patch[0]
            times = self.find("temporal_patch_size", default=1)
            yield self.floats(BATCH, 16, 3 * patch * patch)
            yield self.floats(BATCH * 16, 3, patch, patch)
            yield self.floats(BATCH * 16, 3 * (times if isinstance(times, int) else 1) * patch * patch)
            return
        yield self.floats(BATCH, 1, SAMPLES)
        yield self.floats(BATCH, SAMPLES, 1)
        yield self.floats(BATCH, FRAMES, bins)
        yield self.floats(BATCH, bins, FRAMES)
        yield self.floats(BATCH, 1, FRAMES, bins)
        yield self.floats(BATCH, SAMPLES // 96 * 96)
        yield self.floats(BATCH, SAMPLES)

    def _full(self) -> Inputs:
        made: Inputs = {}
        for name, make in _MAKERS.items():
            if name in self.takes and (name in self.required or name in _USUAL):
                value = make(self)
                if value is not None:
                    made[name] = value
        made |= self._grids(made)
        if "input_ids" in made:
            made |= self._placeholders(made)
            if "attention_mask" in self.takes:
                made["attention_mask"] = _padded(made["input_ids"], whole=self._has_media(made))
        if getattr_or(self.config, "is_encoder_decoder") and "decoder_input_ids" in self.takes:
            made["decoder_input_ids"] = self.words(TOKENS // 2)
        if "return_loss" in self.takes:
            made["return_loss"] = True
        return made

    def _has_media(self, made: Inputs) -> bool:
        return any(name.startswith(("pixel_values", "input_features", "input_values")) for name in made)

    def _grids(self, made: Inputs) -> Inputs:
        """Images in patches, with their grids, for models that take images of any size."""
        name = next((n for n in ("image_grid_thw", "grid_thw") if n in self.takes), None)
        if name is None:
            return {}
        patch = self.find("patch_size", default=8)
        times = self.find("temporal_patch_size", default=1)
        channels = self.find("in_channels", "in_chans", "num_channels", default=3)
        grid = torch.tensor([[1, 4, 4]] * BATCH)
        pixels = self.floats(int(grid.prod(1).sum()), channels * times * patch * patch)
        first = "pixel_values" if "pixel_values" in self.takes else self.model.main_input_name
        return {first if first in self.takes else "hidden_states": pixels, name: grid}

    def _placeholders(self, made: Inputs) -> Inputs:
        """Words, with a place in the text for each feature that the model makes of images and sounds."""
        places: list[tuple[int, int]] = []
        for kind in ("image", "audio"):
            token = self.find(f"{kind}_token_id", f"{kind}_token_index")
            count = self._feature_count(kind, made)
            if isinstance(token, int) and count:
                places.append((token, count // BATCH if count % BATCH == 0 else count))
        if not places:
            return {}
        ids = self.words()
        for token, count in places:
            start = self.find("vision_start_token_id") if "grid" in " ".join(made) else None
            run = torch.full((BATCH, count), token)
            if isinstance(start, int):
                run = torch.cat((torch.full((BATCH, 1), start), run), 1)
            ids = torch.cat((ids[:, :2], run, ids[:, 2:]), 1)
        changed: Inputs = {"input_ids": ids}
        if "mm_token_type_ids" in self.takes:
            kinds = torch.zeros_like(ids)
            for i, (token, _) in enumerate(places):
                kinds[ids == token] = i + 1
            changed["mm_token_type_ids"] = kinds
        return changed

    def _feature_count(self, kind: str, made: Inputs) -> int:
        """How many vectors the model makes of all images, or sounds."""
        function = getattr(self.model, f"get_{kind}_features", None)
        function = function or getattr(getattr(self.model, "model", None), f"get_{kind}_features", None)
        if function is None:
            return 0
        known = inspect.signature(function).parameters
        given = {k: v for k, v in made.items() if k in known and k not in ("input_ids", "attention_mask")}
        if not given:
            return 0
        try:
            with torch.no_grad():
                found = function(**given)
        except Exception:  # then the model itself fails too, or takes no placeholders
            return 0
        return _rows(getattr(found, "pooler_output", found))

    def _labels(self, made: Inputs) -> Inputs:
        name = type(self.model).__name__
        if "decoder_input_ids" in made:
            return {"labels": made["decoder_input_ids"].clone()}
        if re.search(
            r"ImageClassification|VideoClassification|AudioClassification|SequenceClassification|XVector", name
        ):
            return {"labels": torch.arange(BATCH) % LABELS}
        if re.search(r"CTC", name):
            return {"labels": self.integers(1, self.text_vocabulary(), BATCH, 3)}
        if "input_ids" in made and re.search(r"LM|Generation|MaskedLM|CausalLM|ImageTextToText", name):
            labels = made["input_ids"].clone()
            if "attention_mask" in made:
                labels[made["attention_mask"] == 0] = -100
            return {"labels": labels.masked_fill(labels < FIRST_WORD // 10, -100)}
        return {}


def getattr_or(config: Any, name: str) -> Any:
    """A config's field, or None; some raise errors of their own for fields that differ between layers."""
    try:
        return getattr(config, name, None)
    except Exception:
        return None


def _listed(made: Any) -> list[Inputs]:
    return made if isinstance(made, list) else [made]


def _configs(config: Any) -> Iterator[Any]:
    yield config
    for value in list(vars(config).values()):
        if hasattr(value, "model_type"):
            yield from _configs(value)


def _text_config(config: Any) -> Any:
    try:
        return config.get_text_config(decoder=True)
    except Exception:  # several of them
        return config


def _padded(ids: Tensor, whole: bool = False) -> Tensor:
    """A mask under which the last row is a third shorter."""
    mask = torch.ones_like(ids)
    if not whole:
        mask[-1, -(ids.shape[1] // 3) :] = 0
    return mask


def _rows(found: Any) -> int:
    if isinstance(found, Tensor):
        return found[..., 0].numel() if found.dim() > 1 else 0
    return sum(map(_rows, found)) if isinstance(found, (list, tuple)) else 0


def _size(value: Any, default: int = 32) -> tuple[int, int]:
    if isinstance(value, (list, tuple)) and len(value) >= 2:
        return int(value[-2]), int(value[-1])
    if isinstance(value, (list, tuple)):
        value = value[0]
    if isinstance(value, dict):
        return int(value.get("height", default)), int(value.get("width", default))
    return (int(value), int(value)) if isinstance(value, int) else (default, default)


def _image(maker: Maker) -> Tensor:
    height, width = _size(maker.find("image_size", "img_size"), 64)
    channels = maker.find("num_channels", "in_channels", "in_chans", default=3)
    channels = channels if isinstance(channels, int) else 3
    frames = maker.find("num_frames", "frames_per_clip")
    name = type(maker.model).__name__
    if isinstance(frames, int) and re.search(r"Video|Vivit|Timesformer|VJEPA|XCLIP|Tvp", name):
        return maker.floats(BATCH, frames, channels, height, width)
    return maker.floats(BATCH, channels, height, width)


def _features(maker: Maker) -> Tensor:
    bins = maker.find("num_mel_bins", "input_feat_per_channel", "feature_size", "mel_bins", default=80)
    frames = maker.find("max_source_positions")
    order = 2 * frames if isinstance(frames, int) and frames <= 1500 and _channels_first(maker) else FRAMES
    shape = (bins, order) if _channels_first(maker) else (order, bins)
    return maker.floats(BATCH, *shape)


def _channels_first(maker: Maker) -> bool:
    """Whether mel bins come before frames: where the first layer is a convolution over as many channels."""
    first = next((m for m in maker.model.modules() if isinstance(m, torch.nn.Conv1d)), None)
    bins = maker.find("num_mel_bins", "feature_size", default=80)
    return first is not None and first.in_channels == bins


def _samples(maker: Maker) -> Tensor:
    channels = maker.find("audio_channels")
    codec = isinstance(channels, int) or re.search(
        "Dac|Codec|Tokenizer|XCodec|Mimi|Encodec", type(maker.model).__name__
    )
    return (
        maker.floats(BATCH, channels if isinstance(channels, int) else 1, SAMPLES)
        if codec
        else maker.floats(BATCH, SAMPLES)
    )


def _boxes(maker: Maker) -> Tensor:
    corners = maker.integers(0, 50, BATCH, TOKENS, 2)
    return torch.cat((corners, corners + maker.integers(1, 50, BATCH, TOKENS, 2)), -1)


_Make = Callable[[Maker], Any]
_MAKERS: dict[str, _Make] = {
    "input_ids": lambda m: m.words(),
    "pixel_values": _image,
    "input_features": _features,
    "input_values": _samples,
    "bbox": _boxes,
    "inputs_embeds": lambda m: m.floats(BATCH, TOKENS, m.find("hidden_size", "d_model", default=64)),
    "hidden_states": lambda m: m.floats(BATCH, TOKENS, m.find("hidden_size", "d_model", default=64)),
    "encoder_hidden_states": lambda m: m.floats(BATCH, TOKENS, m.find("hidden_size", "d_model", default=64)),
    "attention_mask": lambda m: torch.ones(BATCH, TOKENS, dtype=torch.long),
    "past_values": lambda m: m.floats(
        BATCH, m.find("context_length", default=32), m.find("num_input_channels", default=1)
    ),
    "flattened_patches": lambda m: m.floats(BATCH, 16, 2 + m.find("patch_embed_hidden_size", default=768)),
    "position_ids": lambda m: torch.arange(TOKENS).expand(BATCH, -1),
}
_MASKS = ("input_features_mask", "audio_mel_mask", "mask", "padding_mask", "feature_attention_mask")
_MAKERS |= {name: lambda m: torch.ones(BATCH, FRAMES, dtype=torch.bool) for name in _MASKS}
_MAKERS |= {
    "image": _image,
    "query_embeds": lambda m: m.floats(BATCH, 8, m.find("hidden_size", default=64)),
    "pixel_values_videos": lambda m: m.floats(
        BATCH, m.find("num_frames", "frames_per_clip", default=4), *_image(m).shape[-3:]
    ),
    "noise_embeds": lambda m: m.floats(BATCH, TOKENS, m.find("hidden_size", default=64)),
    "prompt_depth": lambda m: m.floats(BATCH, 1, 8, 8).abs(),
    "audio_mel": lambda m: m.floats(BATCH, FRAMES, m.find("input_feat_size", "num_mel_bins", default=80)),
    "visual_embeds": lambda m: m.floats(BATCH, 6, m.find("visual_embedding_dim", default=64)),
    "aspect_ratio_ids": lambda m: torch.ones(BATCH, 1, dtype=torch.long),
    "aspect_ratio_mask": lambda m: torch.ones(BATCH, 1, 4, dtype=torch.long),
    "qformer_input_ids": lambda m: m.words(8),
    "object_queries": lambda m: m.floats(BATCH, TOKENS, m.find("hidden_size", "d_model", default=64)),
}
_USUAL = {
    "input_ids",
    "pixel_values",
    "input_features",
    "input_values",
    "bbox",
    "input_features_mask",
    "feature_attention_mask",
}
