"""Philox 4x32-10 against the known answers that come with its authors' library, Random123."""

from __future__ import annotations

import ctypes

import pytest
import torch

from memsave.ops import _native
from memsave.ops.philox import philox, row_words

# (counter, key, answer)
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers_in_pytorch(counter: tuple[int, ...], key: tuple[int, ...], answer: tuple[int, ...]) -> None:
    c0, c1, c2, c3 = (torch.tensor([word, 0]) for word in counter)
    words = philox((c0, c1, c2, c3), (torch.tensor(key[0]), torch.tensor(key[1])))
    assert tuple(int(word[0]) for word in words) == answer


@pytest.mark.skipif(_native.library() is None, reason=f"no C++ kernels: {_native.state()}")
@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers_in_cpp(counter: tuple[int, ...], key: tuple[int, ...], answer: tuple[int, ...]) -> None:
    words = (ctypes.c_uint32 * 6)(*counter, *key)
    _native.function("ms_philox", ctypes.c_void_p)(words)
    assert tuple(words[:4]) == answer


def test_row_words_put_row_stream_and_seed_where_the_specification_says() -> None:
    row, stream, seed = 2**40 + 3, 7, 2**45 + 9
    words = row_words(torch.tensor([row]), stream, torch.tensor(seed))
    counter = [torch.tensor(value) for value in (row % 2**32, row // 2**32, stream, 0)]
    expected = philox((counter[0], counter[1], counter[2], counter[3]), (torch.tensor(9), torch.tensor(2**13)))
    assert [int(word[0]) for word in words] == [int(word) for word in expected]
