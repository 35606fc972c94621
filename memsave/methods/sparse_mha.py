"""SPT's sparse multi-head attention: each query attends to the keys that matter by product quantization.

The keys with the largest estimated products are chosen, one by one or in blocks, and attention is computed and
differentiated there alone. Source: SPT, arXiv 2312.10365, which compares codes of queries and of keys; here a query's
products with all codewords are looked up ("asymmetric distance computation", Jégou et al. 2011), which finds more of
the attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import ops
from ..config import Guarantee, Survey, TargetedConfig, applied_configs
from ..nn.converted import swap, unswap, why_not_back, why_not_in_place
from ..nn.sparse_attention import state as sparse
from ..nn.sparse_attention.calibration import key_samples
from ..nn.sparse_attention.codebooks import KeySample
from ..nn.sparse_attention.crossover import crossover
from ..nn.sparse_attention.module import SparseAttention, head_size, is_multihead, takes_attention
from ..nn.sparse_attention.multihead import SparseMultiheadAttention, not_in_one_kernel
from ..nn.sparse_attention.selecting import Choice

GRANULARITIES = ("block", "token")
CODEBOOKS = ("fit", "ema")
MEASURE = "measure"
MAX_CODEBOOK = 2**26
"""Numbers: 16 codewords for all features of 1,024 heads of 4,096."""


@dataclass(frozen=True, kw_only=True)
class SparseMHAConfig(TargetedConfig):
    """Attention to chosen keys, for `nn.MultiheadAttention` and attention modules of transformers that use SDPA.

    Args:
        keep: what a query attends to: a fraction of the keys in (0, 1] if a float, or how many keys if an integer.
            A query that sees fewer attends to all of them.
        granularity: "block" (default): blocks of keys are chosen for blocks of queries, always with the first block and
            the queries' own, three at least; matrix products then do the work. "token": keys are chosen one by one,
            for each query, as in the paper: more of the attention for the same number of keys, and much slower.
        block_size: tokens of a block, a power of two from 16 to 128.
        num_subspaces: M, into which the features of a head are divided for quantization; None: one for each 8 features.
        num_codewords: C of each subspace, 2 to 16.
        codebook: "fit" (default): by k-means on the keys of the batches in `convert_model(..., calibration=batches)`;
            "ema": averages that follow the keys while training. They begin after the first optimizer step; until then
            all attention is dense.
        ema_decay: of these averages, for each optimizer step, in [0, 1).
        dense_below: calls with fewer keys are dense. "measure": times both on this machine when the model is
            converted, and the report says what was found; the number is saved with the model.

    Raises:
        ValueError: a value outside its range, or no target_modules.
    """

    name: ClassVar[str] = "sparse_mha"
    guarantee: ClassVar[Guarantee] = Guarantee.APPROXIMATE
    changes_keys: ClassVar[bool] = True
    docs: ClassVar[str] = "docs/sparse_mha.md"

    keep: float | int = 0.125
    granularity: str = "block"
    block_size: int = 64
    num_subspaces: int | None = None
    num_codewords: int = 16
    codebook: str = "fit"
    ema_decay: float = 0.95
    dense_below: int | str = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        keep = self.keep
        fraction = isinstance(keep, float) and 0 < keep <= 1
        if not (fraction or (_is_whole(keep) and keep >= 1)):
            raise ValueError(
                "SparseMHAConfig.keep: expected a fraction of the keys in (0, 1] (a float) or how many (a whole number "
                f"of at least 1), got {keep!r}"
            )
        for name, known in (("granularity", GRANULARITIES), ("codebook", CODEBOOKS)):
            if getattr(self, name) not in known:
                raise ValueError(f"SparseMHAConfig.{name}: expected one of {list(known)}, got {getattr(self, name)!r}")
        if not (_is_whole(self.block_size) and self.block_size in (16, 32, 64, 128)):
            raise ValueError(f"SparseMHAConfig.block_size: expected 16, 32, 64 or 128, got {self.block_size!r}")
        if self.num_subspaces is not None and not (_is_whole(self.num_subspaces) and 1 <= self.num_subspaces <= 64):
            raise ValueError(
                f"SparseMHAConfig.num_subspaces: expected a whole number from 1 to 64 or None, got "
                f"{self.num_subspaces!r}"
            )
        if not (_is_whole(self.num_codewords) and 2 <= self.num_codewords <= 16):
            raise ValueError(
                f"SparseMHAConfig.num_codewords: expected a whole number from 2 to 16 (four bits), got "
                f"{self.num_codewords!r}"
            )
        decay = self.ema_decay
        if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 <= decay < 1:
            raise ValueError(f"SparseMHAConfig.ema_decay: expected a number in [0, 1), got {decay!r}")
        if self.dense_below != MEASURE and not (_is_whole(self.dense_below) and self.dense_below >= 0):  # type: ignore[operator]
            raise ValueError(
                f"SparseMHAConfig.dense_below: expected a number of keys from 0 on, or {MEASURE!r}, got "
                f"{self.dense_below!r}"
            )

    @property
    def calibrated(self) -> bool:
        return self.codebook == "fit"

    @property
    def optional_keys(self) -> tuple[str, ...]:
        return () if self.calibrated else sparse.BUFFERS  # empty until the first optimizer step

    def candidate(self, module: nn.Module) -> bool:
        return is_multihead(module) or takes_attention(module)

    def why_not(self, module: nn.Module) -> str | None:
        if reason := why_not_in_place(module):
            return reason
        lossy = [c.name for c in applied_configs(module).values() if c.guarantee is not Guarantee.EXACT]
        if lossy and lossy != [self.name]:
            return f"it is converted by {', '.join(lossy)}; restore that first"
        if is_multihead(module):
            extra = module.bias_k is not None or module.add_zero_attn
            return "it adds keys of its own (add_bias_kv, add_zero_attn)" if extra else None
        return registered().why_not(module)

    def survey(
        self, model: nn.Module, targets: Sequence[tuple[str, nn.Module]], calibration: Iterable[Any] | None
    ) -> Survey:
        codebooks: dict[str, Tensor] = {}
        sizes: dict[str, tuple[int, ...]] = {}
        if self.calibrated and calibration is not None:
            fitted = self._state(0)
            for name, sample in key_samples(model, dict(targets), calibration, self._watching).items():
                try:
                    codebooks[name] = fitted.fitted(sample)
                except ValueError as error:
                    raise ValueError(f"{name}: SparseMHAConfig.{error}. The model was not changed.") from error
                sizes[name] = (sample.shape[0], sample.shape[2])
        for name, module in targets:  # found now, not in the first step of an optimizer
            if not self.calibrated and (size := head_size(module)):
                try:
                    sparse.subspaces_of(size, self.num_subspaces)
                except ValueError as error:
                    raise ValueError(f"{name}: SparseMHAConfig.{error}. The model was not changed.") from error
        dense_below, notes = self._dense_below(model, sizes)
        shapes = {name: list(codebook.shape) for name, codebook in codebooks.items()}
        states = {name: {"codebook": shapes.get(name), "dense_below": dense_below} for name, _ in targets}
        return _Fitted(states=states, notes=notes, codebooks=codebooks)

    @contextmanager
    def _watching(self, module: nn.Module, sample: KeySample) -> Iterator[None]:
        """Keys of an attention module of transformers go to `sample`, within."""
        state = self._state(0)
        state.watch = sample
        sparse.set_state(module, state)
        registered().use(module)
        try:
            yield
        finally:
            registered().use_no_more(module)
            sparse.release(module)

    def _dense_below(self, model: nn.Module, sizes: Mapping[str, tuple[int, ...]]) -> tuple[int, Sequence[str]]:
        """From how many keys on attention is sparse, and what the report says of it."""
        if self.dense_below != MEASURE:
            assert isinstance(self.dense_below, int)
            return self.dense_below, ()
        parameter = next(model.parameters())
        groups, head_size = next(iter(sizes.values()), (4, 64))
        found = crossover(
            Choice(self.keep, self.granularity, self.block_size), groups, head_size, parameter.dtype, parameter.device
        )
        return found.keys, (found.describe(),)

    def carry_out(
        self,
        model: nn.Module,
        targets: Sequence[tuple[str, nn.Module]],
        survey: Survey | None,
        calibration: Iterable[Any] | None,
        convert: Callable[[str, Callable[[nn.Module], nn.Module]], None],
    ) -> None:
        assert isinstance(survey, _Fitted)
        for name, _ in targets:
            codebook, dense_below = survey.codebooks.get(name), survey.states[name]["dense_below"]
            convert(name, lambda module, c=codebook, d=dense_below: self._convert(module, c, d))  # type: ignore[misc]

    def convert(self, module: nn.Module) -> nn.Module:
        raise TypeError("SparseMHAConfig converts all targets of a model together; see carry_out")

    def _convert(self, module: nn.Module, codebook: Tensor | None, dense_below: int) -> nn.Module:
        mixin = SparseMultiheadAttention if is_multihead(module) else SparseAttention
        try:
            sparse.hold(module, self._state(dense_below), codebook)
            if is_multihead(module):
                module.register_forward_pre_hook(not_in_one_kernel)
            else:
                registered().use(module)
            return swap(module, mixin, self)
        except BaseException:
            _release(module)
            raise

    def _state(self, dense_below: int) -> sparse.SparseState:
        choice = Choice(self.keep, self.granularity, self.block_size)
        decay = float(self.ema_decay) if self.codebook == "ema" else None
        return sparse.SparseState(choice, self.num_subspaces, self.num_codewords, dense_below, decay)

    def module_state(self, module: nn.Module) -> dict[str, Any]:
        state = sparse.state_of(module)
        assert state is not None
        return {"codebook": list(module.codebook.shape), "dense_below": state.dense_below}  # type: ignore[arg-type]

    def rebuild(self, module: nn.Module, state: Mapping[str, Any]) -> nn.Module:
        shape, dense_below = state["codebook"], state["dense_below"]
        if not (_is_whole(dense_below) and dense_below >= 0):
            raise ValueError(f"dense_below: expected a number of keys, got {dense_below!r}")
        return self._convert(module, None if shape is None else torch.zeros(_checked_shape(shape)), dense_below)

    def why_not_restore(self, module: nn.Module) -> str | None:
        return why_not_back(module)

    def restore(self, module: nn.Module, *, adapters: str | None = None) -> nn.Module:
        _release(module)
        return unswap(module, self.name)

    def backend(self, module: nn.Module) -> str:
        op = "selected_attention" if self.granularity == "token" else "pq_select_blocks"
        return ops.serving(op, {p.device.type for p in module.parameters()})

    def __str__(self) -> str:
        said = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return f"SparseMHAConfig({', '.join(f'{name}={value!r}' for name, value in said.items())})"

    def __reduce__(self) -> tuple[Callable[..., SparseMHAConfig], tuple[dict[str, Any]]]:
        # A process that reads a pickled model must know the attention function that its modules ask for.
        return _registered, ({f.name: getattr(self, f.name) for f in fields(self)},)


@dataclass(frozen=True)
class _Fitted(Survey):
    """A survey with the codebooks, by module; they are no JSON data."""

    codebooks: Mapping[str, Tensor] = None  # type: ignore[assignment]


def _release(module: nn.Module) -> None:
    """Take what a conversion gave to `module` besides its class."""
    sparse.release(module)
    if is_multihead(module):
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is not_in_one_kernel]:
            del hooks[key]
    else:
        registered().use_no_more(module)


def registered() -> Any:
    """What registers the attention function with transformers; imported when it is needed."""
    from ..integrations import sparse_attention

    return sparse_attention


def _registered(settings: dict[str, Any]) -> SparseMHAConfig:
    with suppress(ImportError):  # without transformers no module of it can be in the pickle
        registered().register()
    return SparseMHAConfig(**settings)


def _checked_shape(shape: Any) -> tuple[int, ...]:
    """That of a codebook. Raises ValueError for any other, which might be of any size."""
    known = isinstance(shape, (list, tuple)) and len(shape) == 4 and all(map(_is_whole, shape))
    if not known or min(shape) < 0 or math.prod(shape) > MAX_CODEBOOK:
        raise ValueError(
            "codebook: expected the sizes of heads, subspaces, codewords and features, in all at most "
            f"{MAX_CODEBOOK} numbers, got {shape!r}"
        )
    return tuple(shape)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
