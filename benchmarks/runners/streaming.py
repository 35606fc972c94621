"""Measures FlashSVD without gradients: outputs checked first, then temporary bytes, FLOPs, and times in turns.

Streaming is checked against the same factors without it, and the factors against nothing: what they cost in accuracy
is another case's (`compression`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import memsave
from benchmarks.cases.streaming import DecodingCase, StreamingCase
from benchmarks.checks import CheckFailed, check_exact

from .timing import elapsed, in_turns, no_garbage_collection, summary

_CHECKED_TOKENS = 24


def run_streaming_case(case: StreamingCase, device: str, rounds: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """For each size and way: `temporary_bytes` beyond model and input, `flops`, times, `error` of the streaming.

    Raises:
        CheckFailed: a streaming model computes something else than its factors without streaming.
    """
    rows: list[dict[str, Any]] = []
    plain = _plain(case.model, case.dtype, device)
    for ratio in dict.fromkeys(ratio for _, _, ratio in case.sizes):
        models = {name: _converted(plain, ratio, way) for name, way in case.ways.items()}
        errors = {n: _checked(case, plain, ratio, n, models[n], device) for n in models}
        for batch, length, of_ratio in case.sizes:
            if of_ratio == ratio:
                x = case.example(batch, length).to(device)
                x = x.to(case.dtype) if x.is_floating_point() else x
                size = {"B": batch, "T": length, "ratio": ratio}
                calls = {n: _call(case.forward, model, x) for n, model in models.items()}
                for name, figures in _measured(calls, device, rounds):
                    rows.append({"size": size, "way": name, "error": errors[name]} | figures)
    return rows, {}


def _plain(make: Callable[[], nn.Module], dtype: torch.dtype, device: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = make().to(device, dtype).eval()
    return model


def _converted(plain: nn.Module, ratio: float, way: Mapping[str, Any] | None, targets: str = r".*") -> nn.Module:
    model = copy.deepcopy(plain)
    if way is not None:
        memsave.convert_model(model, memsave.FlashSVDConfig(ratio=ratio, target_modules=targets, **way))
    return model


def _call(forward: Callable[[nn.Module, Tensor], Tensor], model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.no_grad():
            return forward(model, x)

    return call


def _checked(
    case: StreamingCase, plain: nn.Module, ratio: float, name: str, model: nn.Module, device: str
) -> float | None:
    """The error of a streaming model over that of its factors without streaming, both against fp64; None for others."""
    way = case.ways[name]
    if way is None or way.get("fuse") is False:
        return None
    still = _converted(plain, ratio, {**way, "fuse": False})
    batch, length, _ = min(case.sizes, key=lambda size: size[0] * size[1])
    x = case.example(batch, length).to(device)
    x = x.to(case.dtype) if x.is_floating_point() else x
    truth = _call(case.forward, copy.deepcopy(still).double(), x.double() if x.is_floating_point() else x)()
    found, expected = (_call(case.forward, each, x)().double() for each in (model, still))
    return check_exact(name, {"output": found}, {"output": expected}, {"output": truth}, set(), case.dtype)


def _measured(calls: Mapping[str, Callable[[], Any]], device: str, rounds: int) -> Iterator[tuple[str, dict[str, Any]]]:
    figures: dict[str, dict[str, Any]] = {}
    for name, call in calls.items():
        call()
        profile = memsave.measure(call)
        with FlopCounterMode(display=False) as counter:
            call()
        temporary_bytes = profile.peak_bytes - profile.baseline_bytes
        figures[name] = {"temporary_bytes": temporary_bytes, "flops": counter.get_total_flops()}
    yield from ((name, figures[name] | times) for name, times in _times(calls, device, rounds))


def _times(calls: Mapping[str, Callable[[], Any]], device: str, rounds: int) -> Iterator[tuple[str, dict[str, Any]]]:
    names = list(calls)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    with no_garbage_collection():
        for index in in_turns(len(names), rounds):
            times[names[index]].append(elapsed(calls[names[index]], 1, device))
    yield from ((name, asdict(summary(times[name]))) for name in names)


def run_decoding_case(case: DecodingCase, device: str, rounds: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """For each number of past tokens and way: `cache_bytes` per token and layer, and the times of one further token.

    Raises:
        CheckFailed: a way decodes other logits than the same factors with transformers' cache.
    """
    plain = _plain(case.model, case.dtype, device)
    attention = r".*\.(c_attn|c_proj|[qkvo]_proj)"
    low_rank = _converted(plain, case.ratio, {"fuse": True}, attention)
    models = {"dense": plain, "low-rank": low_rank, "memsave": low_rank}
    _check_decoding(models, device)
    rows = []
    for past_tokens in case.past_tokens:
        caches = {name: _filled(name, model, past_tokens, case, device) for name, model in models.items()}
        calls = {name: _decode(models[name], caches[name], past_tokens, device) for name in models}
        for call in calls.values():
            call()
        layers = len(caches["dense"].layers)
        for name, times in _times(calls, device, max(rounds, 15)):
            held = _cache_bytes(caches[name]) / past_tokens / layers
            rows.append({"size": {"past tokens": past_tokens}, "way": name, "cache_bytes": held} | times)
    return rows, {}


def _new_cache(name: str, model: Any) -> Any:
    import transformers

    return memsave.low_rank_cache(model) if name == "memsave" else transformers.DynamicCache(config=model.config)


def _check_decoding(models: Mapping[str, nn.Module], device: str) -> None:
    ids = torch.randint(1000, (2, _CHECKED_TOKENS), generator=torch.Generator().manual_seed(0)).to(device)
    logits = {}
    for name in ("low-rank", "memsave"):
        cache, model = _new_cache(name, models[name]), models[name]
        with torch.no_grad():
            parts = [_with_cache(model, part, cache) for part in ids.split([_CHECKED_TOKENS - 2, 1, 1], 1)]
        logits[name] = torch.cat(parts, 1).float()
    off = float((logits["memsave"] - logits["low-rank"]).abs().max() / logits["low-rank"].abs().max())
    if not off <= (1e-5 if next(models["dense"].parameters()).dtype == torch.float32 else 5e-2):
        raise CheckFailed(f"with a cache of latents the logits differ by {off:.1e} of the largest")


def _with_cache(model: Any, ids: Tensor, cache: Any) -> Tensor:
    name = "cache" if "cache" in model.forward.__code__.co_varnames else "past_key_values"
    return model(input_ids=ids, use_cache=True, **{name: cache}).logits


def _filled(name: str, model: Any, past_tokens: int, case: DecodingCase, device: str) -> Any:
    """A cache with random contents: how long a token takes does not depend on them."""
    cache = _new_cache(name, model)
    generator = torch.Generator().manual_seed(2)
    config = model.config
    kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    size = config.hidden_size // config.num_attention_heads

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, case.dtype)

    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if index is None or not hasattr(module, "scaling"):
            continue
        layer = cache.layers[index]
        if name != "memsave":
            layer.update(random(1, kv_heads, past_tokens, size), random(1, kv_heads, past_tokens, size))
            continue
        key, value = memsave.nn.low_rank.latents.latent_widths(module, module._layout)
        turned = None
        if module._layout.latent == "rotated":
            turned = random(1, past_tokens, size), random(1, past_tokens, size)
        layer.append(random(1, past_tokens, key), random(1, past_tokens, value) if value else None, turned)
    return cache


def _decode(model: Any, cache: Any, past_tokens: int, device: str) -> Callable[[], None]:
    ids = torch.zeros(1, 1, dtype=torch.long, device=device)

    @torch.no_grad()
    def call() -> None:
        cache.crop(past_tokens - cache.get_seq_length())  # the token of the last call; drops none at first
        _with_cache(model, ids, cache)

    return call


def _cache_bytes(cache: Any) -> int:
    layers = [*cache.layers, *([cache.table] if hasattr(cache, "table") else [])]
    held = [t for layer in layers for t in (layer.keys, layer.values)]
    return sum(t.numel() * t.element_size() for t in held if isinstance(t, Tensor))
