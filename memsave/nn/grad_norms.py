"""A memory of gradient norms: how large each token's gradient was when its dataset sample was last trained on.

The best probability for row i of a linear's input is |x_i| |dy_i|, but forward does not know dy_i. With
`with memsave.sample_ids(ids):` around a step, forward takes |x_i| (1 + r_i) / 2 instead, where r_i is the norm that
dy_i had when the same sample was last visited, relative to the mean of its batch. Any positive guess leaves the
gradient unbiased; a good one lowers its variance, and a bad one roughly doubles it at worst, because half of the guess
is what is used without a memory (a defensive mixture: Hesterberg 1995). The idea is that of Liu et al. 2023, arXiv
2305.15265, whose released code takes r_i alone, and is biased at a sample's first visit; here, a token without a past
is average.

Relative to the mean, loss scaling, gradient accumulation and the size of the batch cancel out. Backward only collects
the norms; they are written to the memory when the next `sample_ids` block begins, so that a forward that is run again
in backward (activation checkpointing) draws as the first one did.

Shapes: B samples in the batch, T tokens of each, N = B * T rows; the memory is (S, L) uint8: S samples, L tokens.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import index
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from .matrix import row_norms

# Codes. Code c from 2 on is the norm 2^((c - 2) / 8 - 5) over the mean; from 1/32 down it makes no difference.
UNKNOWN, ZERO, SMALLEST = 0, 1, 2
STEPS_PER_OCTAVE, OCTAVES_BELOW_MEAN = 8, 5
# Zero is mostly padding, which stays zero. Where it does not, this bounds by how much the variance can grow.
FACTOR_OF_ZERO = 1 / 16
_NORMS = [2.0 ** ((code - SMALLEST) / STEPS_PER_OCTAVE - OCTAVES_BELOW_MEAN) for code in range(SMALLEST, 256)]
# On the CPU, like all tensors of the memory: a default device of torch's, or "meta", must not take them over.
_CPU = torch.device("cpu")
_FACTORS = torch.tensor([1.0, FACTOR_OF_ZERO, *((1 + norm) / 2 for norm in _NORMS)], dtype=torch.float32, device=_CPU)
LARGEST_ID = 2**31 - 1


class Block:
    """The dataset samples of one `sample_ids` block, `ids` (B,) int64. Two blocks with equal ids are not equal."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = torch.tensor(ids, device=_CPU)
        last = {sample: place for place, sample in enumerate(ids)}
        self.different = torch.tensor(list(last), device=_CPU)  # (U,)
        self.places = torch.tensor(
            list(last.values()), device=_CPU
        )  # (U,): where each different sample is in the batch, at last


# Not local to a thread: on a GPU, backward and the forwards that it runs again are in another thread.
_open: Block | None = None
_pending: list[Visit] = []
_warned: set[str] = set()


@contextmanager
def sample_ids(ids: Tensor | Iterable[int]) -> Iterator[None]:
    """Say which dataset samples the batch holds, for models converted with `WTACRSConfig(grad_norms="sample_cache")`.

    Put forward inside; backward may be inside or follow before the next block. The batch is the first dimension of
    what the linears read, and token t of a sample is the same token at every visit: pad on the right, not the left.

    Args:
        ids: (B,) integer tensor, best on the CPU, or a sequence of B whole numbers: indices of the samples in the
            dataset, from 0 on. Of a sample that is in the batch twice, the last place is remembered.

    Raises:
        ValueError: ids of another kind, none at all, or a block inside another one. Nothing was changed.
    """
    global _open
    block = Block(_checked(ids))
    if _open is not None:
        raise ValueError("sample_ids: a block is open already; leave it before the next one. Nothing was changed")
    remember()
    _open = block
    try:
        yield
    finally:
        _open = None


def _checked(ids: object) -> list[int]:
    kind = f"{type(ids).__name__} {ids!r:.80}"
    if isinstance(ids, Tensor):
        kind = f"a tensor of shape {tuple(ids.shape)} and dtype {ids.dtype}"
        fits = ids.dim() == 1 and not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
        values = ids.tolist() if fits else []
    else:
        try:
            values = [-1 if isinstance(i, bool) else index(i) for i in ids]  # type: ignore[attr-defined]
        except TypeError:
            values = []
    if not values or not all(0 <= i <= LARGEST_ID for i in values):
        raise ValueError(
            "sample_ids: expected the dataset index of each sample of the batch, as a 1-D integer tensor or a sequence "
            f"of whole numbers from 0 to {LARGEST_ID}; got {kind}. Nothing was changed"
        )
    return values


class GradNormCache:
    """The memory of one converted linear, or of all that share its samples of rows (q, k, v): the first one owns it.

    Copies and pickles of a model begin with an empty memory, unless it is `saved`.

    Attributes:
        codes: (S, L) uint8, on the CPU: L is the longest sample's number of tokens, S the largest id plus one, rounded
            up by at most an eighth. It takes S * L bytes.
        saved: whether it goes into copies, pickles and the `state_dict`.
    """

    def __init__(self, saved: bool = False) -> None:
        self.saved = saved
        self.codes = torch.zeros(0, 0, dtype=torch.uint8, device=_CPU)
        self._block: Block | None = None
        self._visit: Visit | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(GradNormCache(self.saved)) | ({"codes": self.state()} if self.saved else {})

    def state(self) -> Tensor:
        """The codes, with those of the last backward."""
        remember()
        return self.codes

    @torch.inference_mode(False)  # see remember()
    def load(self, codes: Tensor) -> None:
        """Remember `codes` (S, L) uint8 from a `state_dict` instead. Raises ValueError for anything else."""
        if codes.dim() != 2 or codes.dtype != torch.uint8:
            raise ValueError(f"grad_norms: expected a uint8 matrix, got {codes.dtype} of shape {tuple(codes.shape)}")
        remember()
        self.codes = codes.detach().to("cpu", copy=True)

    def visit(self, x: Tensor, module: nn.Module) -> Visit | None:
        """The visit of the batch that `module` reads as x (B, ..., D); None without ids, or where they do not fit x.

        Called in every training forward. One that backward runs again belongs to the block of the first one.
        """
        again = torch._C._current_graph_task_id() != -1
        self._block = _open or (self._block if again else None)
        if not torch.is_grad_enabled() or is_fake(x):
            return None
        if self._block is None:
            _warn_once(
                'WTACRSConfig(grad_norms="sample_cache"): a training forward ran outside of `with memsave.sample_ids('
                "ids):`, so no gradient norms are used or remembered there; rows are drawn by |x| alone"
            )
            return None
        samples, rows = len(self._block.ids), x.numel() // x.shape[-1]
        if x.shape[0] % samples:
            _warn_once(
                f"{module._get_name()} of shape {tuple(module.get_parameter('weight').shape)} reads rows that are not "
                f"{samples} samples of equal length, one for each of the ids (a wrong number of ids? routed or packed "
                "tokens?), so its rows are drawn by |x| alone"
            )
            return None
        if self._visit is None or not self._visit.is_of(self._block, rows):
            self._visit = Visit(self, self._block, rows)
        return self._visit

    def factors(self, ids: Tensor, tokens: int, device: torch.device) -> Tensor | None:
        """(B, T) fp32: by how much each token's weight is multiplied; 1 where nothing is known of it."""
        known = (ids < self.codes.shape[0]).nonzero().flatten()  # (K,)
        width = min(tokens, self.codes.shape[1])
        if not (len(known) and width):
            return None
        codes = torch.zeros(len(ids), tokens, dtype=torch.uint8, device=_CPU)
        codes[known, :width] = self.codes[ids[known], :width]
        return decode(codes).to(device, non_blocking=True)

    def write(self, block: Block, codes: Tensor) -> None:
        """Remember the codes (B, T) of a block's samples; where they are `UNKNOWN` the old ones stay."""
        samples, length = self.codes.shape
        needed, tokens = int(block.different.max()) + 1, codes.shape[1]
        if needed > samples or tokens > length:
            shape = (max(rounded_up(needed), samples), max(tokens, length))
            larger = torch.zeros(shape, dtype=torch.uint8, device=_CPU)
            larger[:samples, :length] = self.codes
            self.codes = larger
        new, old = codes[block.places], self.codes[block.different, :tokens]  # (U, T)
        self.codes[block.different, :tokens] = torch.where(new != UNKNOWN, new, old)


class Visit:
    """The gradient norms of one batch at one input: forward asks for the previous ones, backward adds the new ones.

    Every linear that shares the sample of rows adds its squared norms: the best weight of a row for all of them is the
    root of the sum. So does a linear that runs twice. It holds no tensor before backward.
    """

    def __init__(self, cache: GradNormCache, block: Block, rows: int) -> None:
        self._cache = weakref.ref(cache)
        self.block = block
        self.rows = rows
        self._squares: Tensor | None = None  # (N,)

    def is_of(self, block: Block, rows: int) -> bool:
        return self.block is block and self.rows == rows

    def factors(self, device: torch.device) -> Tensor | None:
        """(N,): by how much each row's weight |x_i| is multiplied; None while nothing is known."""
        cache, ids = self._cache(), self.block.ids
        found = cache.factors(ids, self.rows // len(ids), device) if cache is not None else None
        return None if found is None else found.flatten()

    def add(self, dy: Tensor) -> None:
        """Collect the norms of dy (N, O); no host sync."""
        norms = row_norms(dy)
        if self._squares is None:
            self._squares = norms.square()
            _pending.append(self)
        else:
            self._squares += norms.square()

    def take_codes(self) -> Tensor:
        """(B, T) uint8, on the device that backward ran on; what was collected is forgotten."""
        squares, self._squares = self._squares, None
        if squares is None:
            raise RuntimeError("a visit was to be remembered whose backward has not run")
        return encode(squares.sqrt()).view(len(self.block.ids), -1)

    def write(self, codes: Tensor) -> None:
        if (cache := self._cache()) is not None:
            cache.write(self.block, codes)


@torch.inference_mode(False)  # what is made in inference mode could not be written to outside of it
def remember() -> None:
    """Write what backward has collected to the memories: all copies to the CPU at once, then one wait for them."""
    visits = _pending.copy()
    _pending.clear()
    codes = [visit.take_codes() for visit in visits]
    moved = [c.to("cpu", non_blocking=True) for c in codes]
    for device in {c.device for c in codes if c.device.type != "cpu"}:
        torch.accelerator.synchronize(device)
    for visit, c in zip(visits, moved, strict=True):
        visit.write(c)


def encode(norms: Tensor) -> Tensor:
    """(N,) uint8 codes of norms relative to the mean of those that are not 0 (padding has none).

    All are `UNKNOWN`, so that the visit counts for nothing, where one is not finite (a loss scaler's overflow) or none
    is above 0.
    """
    mean = norms.sum() / (norms > 0).sum()
    steps = STEPS_PER_OCTAVE * ((norms / mean).log2() + OCTAVES_BELOW_MEAN)
    codes = torch.where(norms > 0, steps.round().clamp(0, 255 - SMALLEST) + SMALLEST, ZERO)
    return torch.where(mean.isfinite(), codes, UNKNOWN).to(torch.uint8)


def decode(codes: Tensor) -> Tensor:
    """fp32 factors: (1 + r) / 2 for a norm of r times the mean, r within a 16th of an octave."""
    return _FACTORS[codes.int()]


def rounded_up(samples: int) -> int:
    """The next number with only its four highest bits set: few different sizes, at most an eighth too large."""
    step = 2 ** max(0, (samples - 1).bit_length() - 4)
    return -(-samples // step) * step


def sample_cache_bytes(model: nn.Module) -> int:
    """Bytes that the memories of gradient norms of `model` take on the CPU: one per sample and token of each input.

    For each input that converted linears sample (q, k and v share one): the largest id plus one, rounded up by at most
    an eighth, times the largest number of tokens of a sample. What the last backward collected is counted from the next
    `sample_ids` block on.
    """
    caches = (module.__dict__.get("_memsave_grad_norms") for module in model.modules())
    return sum(cache.codes.nbytes for cache in caches if cache is not None)


def warn_of_compiler() -> None:
    _warn_once(
        'WTACRSConfig(grad_norms="sample_cache"): compiled linears neither use nor remember gradient norms; their rows '
        "are drawn by |x| alone"
    )


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=2)
