"""Random damage to what was saved: to bytes, to JSON, to tensors."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Iterator
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors import torch as safetensors
from torch import Tensor

from .examples import json_values
from .op_arguments import Draw

_NAMES = ["", ".", "..", "../../x", "/etc/passwd", "0.", "__class__", "weight", "attention.out_proj", "\0", "ü" * 40]
_TEXTS = [b"", b"null", b"[]", b"{" * 5000, b"[" * 100_000, b'{"format": 1, "format": 2}', b"\xff\xfe{}", b"NaN"]
_TEXTS += [b'{"format": 1e999}', b'{"format": %s}' % (b"9" * 5000), b'{"a":' * 50_000 + b"1" + b"}" * 50_000]
_LENGTHS = [0, 1, 7, 2**20, 2**31, 2**40, 2**63 - 1, 2**64 - 1]
_DTYPES = [torch.float16, torch.float64, torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool]
_DTYPES += [torch.complex64, torch.float8_e4m3fn]
_INTEGERS = [-1, 0, 1, 7, 255, 2**31 - 1, -(2**31), 2**62]


def damaged_bytes(draw: Draw, data: bytes) -> bytes:
    """Cut, flipped, repeated, with another length in front, or nothing of it."""
    how = draw(st.sampled_from(["cut", "flip", "repeat", "length", "text"]))
    place = draw(st.integers(0, max(0, len(data) - 1)) | st.integers(0, min(200, max(0, len(data) - 1))))
    if how == "cut":
        return data[:place]
    if how == "flip" and data:
        return data[:place] + bytes([data[place] ^ 1 << draw(st.integers(0, 7))]) + data[place + 1 :]
    if how == "repeat":
        return data[:place] + data[max(0, place - draw(st.integers(0, 64))) :]
    if how == "length":
        return struct.pack("<Q", draw(st.sampled_from(_LENGTHS))) + data[8:]
    return draw(st.sampled_from(_TEXTS) | st.binary(max_size=20))


def damaged_json(draw: Draw, data: bytes) -> bytes:
    """One value is another, is missing, or has another name. Also within texts that are JSON themselves."""
    tree = json.loads(data)
    paths = list(_paths(tree))
    if not paths:
        return draw(st.sampled_from(_TEXTS))
    *parents, last = draw(st.sampled_from(paths))
    inner = tree
    for key in parents:
        inner = inner[key]
    how = draw(st.sampled_from(["value", "value", "name", "missing", "within"]))
    if how == "within" and isinstance(inner[last], str) and inner[last][:1] == "{":
        inner[last] = damaged_json(draw, inner[last].encode()).decode(errors="replace")
    elif how == "missing":
        del inner[last]
    elif how == "name" and isinstance(inner, dict):
        name = draw(st.sampled_from(_NAMES) | st.text(max_size=5) | st.sampled_from(sorted(inner)))
        inner[name] = inner.pop(last)
    else:
        others = [copy.deepcopy(_at(tree, path)) for path in paths]
        inner[last] = draw(json_values | st.sampled_from(_NAMES) | st.sampled_from(others))
    return json.dumps(tree).encode()


def _paths(tree: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*here, key)
        yield from _paths(value, (*here, key))


def _at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def damaged_tensors(draw: Draw, data: bytes) -> bytes:
    """One tensor is missing, has another name, dtype, shape or other values, or there is one more."""
    tensors = safetensors.load(data)
    name = draw(st.sampled_from(sorted(tensors)))
    how = draw(st.sampled_from(["missing", "name", "dtype", "shape", "values", "values", "swap"]))
    if how == "missing":
        del tensors[name]
    elif how == "name":
        tensors[draw(st.sampled_from(_NAMES))] = tensors.pop(name)
    elif how == "swap":
        other = draw(st.sampled_from(sorted(tensors)))
        tensors[name], tensors[other] = tensors[other].clone(), tensors[name].clone()
    elif how == "dtype":
        tensors[name] = tensors[name].to(draw(st.sampled_from(_DTYPES)))
    elif how == "shape":
        tensors[name] = _reshaped(draw, tensors[name])
    else:
        tensors[name] = _other_values(draw, tensors[name])
    return safetensors.save({name: tensor.contiguous() for name, tensor in tensors.items()})


def _reshaped(draw: Draw, tensor: Tensor) -> Tensor:
    choices = [tensor.reshape(-1), tensor[None], tensor.new_empty(0), torch.zeros((), dtype=tensor.dtype)]
    if tensor.ndim:
        choices += [tensor[:-1], torch.cat((tensor, tensor)), tensor.t() if tensor.ndim == 2 else tensor[:1]]
    return choices[draw(st.integers(0, len(choices) - 1))].clone()


def _other_values(draw: Draw, tensor: Tensor) -> Tensor:
    """Any bits in some place; for integers, numbers that are no place in anything."""
    changed = tensor.clone()
    if not changed.numel():
        return changed
    flat = changed.view(-1)
    place = draw(st.integers(0, flat.numel() - 1))
    if tensor.dtype in (torch.int32, torch.int64):
        info = torch.iinfo(tensor.dtype)
        flat[place] = min(max(draw(st.sampled_from(_INTEGERS) | st.integers(-5, 40)), info.min), info.max)
    else:
        bits = flat.view(torch.uint8)
        bits[place * tensor.element_size() + draw(st.integers(0, tensor.element_size() - 1))] = draw(
            st.integers(0, 255)
        )
    return changed


def damaged(draw: Draw, files: dict[str, bytes]) -> dict[str, bytes]:
    """One of the files, in one way."""
    name = draw(st.sampled_from(sorted(files)))
    by_content = damaged_json if name.endswith(".json") else damaged_tensors
    how = draw(st.sampled_from([by_content, by_content, by_content, damaged_bytes]))
    return {**files, name: how(draw, files[name])}
