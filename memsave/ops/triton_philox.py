"""Philox 4x32-10 for the Triton kernels: the same words as ``memsave.ops.philox``.

A counter is (row low, row high, stream, 0) and the key (seed low, seed high), all uint32. Each counter is cast before
it reaches `tl.philox`, which silently turns into another generator (4x64) when its first counter has 64 bits.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl


@triton.jit
def philox4x32(counter0, counter1, counter2, counter3, seed):
    """Four uint32 words of the uint32 counters under the 64-bit key `seed`; all arguments broadcast."""
    return tl.philox(
        seed,
        tl.cast(counter0, tl.uint32),
        tl.cast(counter1, tl.uint32),
        tl.cast(counter2, tl.uint32),
        tl.cast(counter3, tl.uint32),
    )


@triton.jit
def row_words(rows, stream, seed):
    """Four uint32 words of each int64 row number: the counter is (row low, row high, stream, 0)."""
    return philox4x32(rows & 0xFFFFFFFF, rows >> 32, stream, 0, seed)
