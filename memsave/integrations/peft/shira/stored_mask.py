"""Which entries a layer trains, as it is stored: the seed of a random mask, or the code of any other.

The code is a buffer of fixed length, so that a checkpoint's shapes are known before it is read: 8 bytes for a random
mask, else about 1.1 bytes for each value at 1% (`nn/sparse_mask/elias_fano.py`) and 4 bytes of checksum, without which
a damaged code could be that of another mask. A code of zeros stands for a mask that is yet to be loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from ....nn.sparse_mask import elias_fano, random_indices

RANDOM = "random"
_MAX_ENTRIES = 2**31 - 1
_CHECKSUM_BYTES = 4


@dataclass(frozen=True)
class StoredMask:
    """The kind and the size of one layer's mask.

    Attributes:
        kind: "random", or any other, which is stored entry by entry.
        count: K, how many entries are trained.
        numel: of how many.
    """

    kind: str
    count: int
    numel: int

    @property
    def num_bytes(self) -> int:
        return 8 if self.kind == RANDOM else elias_fano.num_bytes(self.count, self.numel) + _CHECKSUM_BYTES

    def of_seed(self, seed: int) -> Tensor:
        """The code of the random mask of a seed in [1, 2^63)."""
        return torch.tensor([seed], dtype=torch.int64, device="cpu").view(torch.uint8)

    def of_indices(self, indices: Tensor) -> Tensor:
        """The code of a mask of any other kind, given its entries (K,), ascending."""
        code = elias_fano.encode(indices, self.numel)
        return torch.cat((code, _checksum(code)))

    def unknown(self) -> Tensor:
        """What stands for a mask that is yet to be loaded."""
        return torch.zeros(self.num_bytes, dtype=torch.uint8, device="cpu")

    def indices(self, code: Tensor) -> Tensor:
        """The entries (K,) int32, ascending, on the CPU.

        Raises:
            ValueError: `code` is not that of such a mask.
        """
        if code.dtype != torch.uint8 or code.ndim != 1:
            raise ValueError(f"expected a mask as bytes, got {code.dtype} of shape {tuple(code.shape)}")
        if self.kind != RANDOM:
            code, checksum = code[:-_CHECKSUM_BYTES].cpu(), code[-_CHECKSUM_BYTES:].cpu()
            indices = elias_fano.decode(code, self.count, self.numel)
            if not torch.equal(checksum, _checksum(code)):
                raise ValueError("the mask is damaged: its checksum does not fit")
            return indices
        if code.dtype != torch.uint8 or tuple(code.shape) != (8,):
            raise ValueError(f"expected the seed of a mask as 8 bytes, got {code.dtype} of shape {tuple(code.shape)}")
        return random_indices(self.numel, self.count, int(code.cpu().clone().view(torch.int64)))


def _checksum(code: Tensor) -> Tensor:
    """CRC-32 of bytes on the CPU, as 4 bytes."""
    code = code.contiguous()
    data = (ctypes.c_char * code.numel()).from_address(code.data_ptr()) if code.numel() else b""
    return torch.tensor(list(zlib.crc32(data).to_bytes(_CHECKSUM_BYTES, "little")), dtype=torch.uint8, device="cpu")


def seed_of_layer(seed: int, name: str) -> int:
    """The seed of one layer's random mask, in [1, 2^62): another one for every name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 2 | 1


def why_not_masked(numel: int, count: int) -> str | None:
    """Say in words why no mask of `count` of `numel` entries can be made, or return None."""
    if numel > _MAX_ENTRIES:
        return f"its weight has {numel} entries, more than the {_MAX_ENTRIES} that 32-bit positions reach"
    if count > numel:
        return f"{count} values were asked for, more than its {numel} entries; lower r or density"
    return None
