"""The benchmark cases of `SparseMHAConfig`: attention alone, what of it chosen keys hold, and what models lose by it.

One sequence of T tokens, h query and kv key/value heads. What trains the demo's model belongs to the suite "quality".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

import memsave

from .case import Case, short
from .demo_case import DemoCase

EAGER, SDPA, FLEX = "eager", "SDPA", "FlexAttention"
BLOCK_8, TOKEN_8, BLOCK_4 = "memsave, blocks, 1/8", "memsave, tokens, 1/8", "memsave, blocks, 1/4"


@dataclass(frozen=True, kw_only=True)
class AttentionCase(Case):
    """Attention alone at growing lengths, forward and backward. Queries, keys and values exist before.

    Attributes:
        heads: (h, kv).
        peers: of memsave: `EAGER`, `SDPA`, and `FLEX` with the lists of blocks that the first of the ways chooses.
        ways: of memsave: by name, the granularity and the share of the keys.
        checked_length: up to so many tokens, all ways are compared with dense attention to the same keys.
        most_score_bytes: eager attention is left out where one matrix of scores would be larger.
        seconds: of the turns of one length; once they are over, no further round begins. There are two at least.
        faster_from: the aim: with so many tokens and more, the first of the ways is faster than SDPA.
    """

    kind: ClassVar[str] = "sparse_attention"

    heads: tuple[int, int] = (8, 8)
    head_size: int = 64
    lengths: tuple[int, ...]
    is_causal: bool = True
    dtype: torch.dtype = torch.float32
    block_size: int = 64
    peers: tuple[str, ...] = (EAGER, SDPA, FLEX)
    ways: Mapping[str, tuple[str, float]] = field(
        default_factory=lambda: {BLOCK_8: ("block", 0.125), TOKEN_8: ("token", 0.125), BLOCK_4: ("block", 0.25)}
    )
    checked_length: int = 2048
    most_score_bytes: int = 2**30
    seconds: float = 40.0
    faster_from: int = 4096
    method: str | None = "sparse_mha"
    tiny: Mapping[str, Any] = field(default_factory=lambda: {"lengths": (256, 320)})

    def describe(self) -> dict[str, Any]:
        names = ("heads", "head_size", "is_causal", "block_size")
        described = super().describe() | {name: getattr(self, name) for name in names} | {"dtype": short(self.dtype)}
        aim = {"device": self.devices[0], "way": next(iter(self.ways)), "of": SDPA, "from_tokens": self.faster_from}
        return described | {"heads": list(self.heads), "aim": aim}


@dataclass(frozen=True, kw_only=True)
class RecallCase(DemoCase):
    """The share of the attention that chosen keys hold, in the demo's model after some training.

    Attributes:
        steps: of the training.
        keeps: what is chosen, as a share of all keys.
        block_sizes: of the blocks that are chosen.
        calibration: batches of training text that codebooks are fitted to.
        evaluated: batches of validation text, whose later three quarters of the queries count.
    """

    kind: ClassVar[str] = "recall"

    steps: int = 150
    length: int = 1024
    keeps: tuple[float, ...] = (0.125, 0.25)
    block_sizes: tuple[int, ...] = (16, 32, 64)
    calibration: int = 4
    evaluated: int = 1
    method: str | None = "sparse_mha"

    def describe(self) -> dict[str, Any]:
        return super().describe() | {name: getattr(self, name) for name in ("steps", "calibration", "evaluated")}


@dataclass(frozen=True, kw_only=True)
class ContinuedCase(DemoCase):
    """The demo's model, trained as it is and then further on the same batches in every variant, from the same weights.

    The variants of a seed take their steps in turn. More seeds or variants may be added later: only what is missing is
    trained.

    Attributes:
        seeds: how many, from 0 on. A seed fixes the weights and the batches.
        steps: of the model as it is.
        further_steps: of every variant after that.
        further_lr: the highest learning rate of these.
        steps_per_point: a training loss is the mean of so many steps.
        calibration: batches of training text for the methods that need some.
        variants: by name, what the trained model is converted with; None for nothing.
    """

    kind: ClassVar[str] = "continued"

    seeds: int = 1
    steps: int = 200
    further_steps: int = 60
    further_lr: float = 5e-4
    steps_per_point: int = 5
    length: int = 1024
    calibration: int = 4
    variants: Mapping[str, memsave.MethodConfig | None]
    method: str | None = "sparse_mha"

    def describe(self) -> dict[str, Any]:
        names = ("steps", "further_steps", "further_lr", "steps_per_point", "calibration")
        return super().describe() | {name: getattr(self, name) for name in names}


_CAUSAL = AttentionCase(
    name="sparse_mha_causal",
    title="causal attention, 8 heads of 64, fp32; FlexAttention is given the lists that memsave makes",
    lengths=(512, 1024, 2048, 4096, 8192, 16384),
    expected_s=600,
)
_ON_GPU = replace(
    _CAUSAL,
    name="sparse_mha_causal_bf16",
    title="causal attention, 16 heads of 64, bf16; FlexAttention is given the lists that memsave makes",
    heads=(16, 16),
    dtype=torch.bfloat16,
    lengths=(1024, 4096, 16384, 65536),
    devices=("cuda",),
    most_score_bytes=2**33,
    seconds=10.0,
    expected_s=90,
)
ATTENTION_CASES = (
    _CAUSAL,
    replace(
        _CAUSAL,
        name="sparse_mha_bidirectional",
        title="attention of an encoder, 8 heads of 64, fp32; FlexAttention is given the lists that memsave makes",
        is_causal=False,
        lengths=(512, 1024, 2048, 4096, 8192),
        expected_s=400,
    ),
    replace(
        _CAUSAL,
        name="sparse_mha_gqa",
        title="causal attention, 8 query heads of 64 on 2 key/value heads, fp32; FlexAttention is given the lists "
        "that memsave makes",
        heads=(8, 2),
        lengths=(512, 1024, 2048, 4096, 8192),
        expected_s=300,
    ),
    _ON_GPU,
    replace(
        _ON_GPU,
        name="sparse_mha_bidirectional_bf16",
        title="attention of an encoder, 16 heads of 64, bf16; FlexAttention is given the lists that memsave makes",
        is_causal=False,
    ),
    replace(
        _ON_GPU,
        name="sparse_mha_gqa_bf16",
        title="causal attention, 32 query heads of 128 on 8 key/value heads, bf16; FlexAttention is given the lists "
        "that memsave makes",
        heads=(32, 8),
        head_size=128,
    ),
)

RECALL_CASE = RecallCase(
    name="sparse_mha_recall",
    title="share of the attention that the chosen keys hold: mean (lowest to highest layer), and the keys of a query",
    expected_s=240,
    tiny={
        "size": "tiny",
        "steps": 2,
        "batch": 2,
        "length": 128,
        "block_sizes": (16,),
        "calibration": 1,
        "evaluated": 1,
    },
)


def _sparse(**settings: Any) -> memsave.SparseMHAConfig:
    return memsave.SparseMHAConfig(target_modules=r".*self_attn", dense_below=0, block_size=32, **settings)


CONTINUED_CASE = ContinuedCase(
    name="sparse_mha_quality",
    title="validation losses in nats per byte; *converted* is the trained model before any further step",
    variants={
        "dense": None,
        "tokens, 1/8": _sparse(granularity="token"),
        "tokens, 1/4": _sparse(granularity="token", keep=0.25),
        "blocks of 32, 1/8": _sparse(),
        "blocks of 32, 1/4": _sparse(keep=0.25),
        'blocks of 32, 1/8, codebook="ema"': _sparse(codebook="ema"),
        "routed FFN, 2 of 4 blocks": memsave.RoutedFFNConfig(
            target_modules=r".*mlp", blocks=4, active=2, clustering="coactivation"
        ),
    },
    expected_s=1400,
    tiny={"size": "tiny", "seeds": 1, "steps": 4, "further_steps": 4, "batch": 2, "length": 128, "calibration": 1},
)
