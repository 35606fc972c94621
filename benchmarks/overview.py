"""The README's table of all methods: what each promises and keeps, and what was measured beside its alternative.

In a page, `<!-- methods: cpu -->` is followed by that table from benchmarks/results/cpu/, up to `<!-- end -->`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import result_files
from benchmarks.result_files import ResultError


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the table.

    Attributes:
        method: name of the method, and of its page.
        config: how it is called.
        guarantee: what it promises of the numbers.
        keeps: what it keeps for backward, or holds, in words.
        case: the result file.
        where: what was measured, in words.
        plain, ours, peer: variants of the case: what the others are divided by, memsave's, and what a user would pick.
        size: which size of the case.
        not_when: when not to use it.
    """

    method: str
    config: str
    guarantee: str
    keeps: str
    case: str
    where: str
    ours: str
    peer: str
    not_when: str
    plain: str = "plain"
    size: dict[str, Any] = field(default_factory=dict)


_CHECKPOINT = "activation checkpointing"
_LORA = "PEFT LoRA, adapters in the model's dtype"

_LEGEND = (
    "Kept, peak and time: of the plain model, or of what is named first in its page, in the same run; of the "
    "alternative in the same order. Each page has the whole table with its machine, versions and date."
)

ENTRIES = (
    Entry(
        method="recompute_norm",
        config="RecomputeNormConfig()",
        guarantee="exact",
        keeps="a norm: its input, 1 number a row; linears behind it: nothing",
        case="recompute_norm_llama_fp32",
        where="2 Llama blocks, with recompute_activation and recompute_mlp",
        ours="memsave exact",
        peer=_CHECKPOINT,
        not_when="where layers are checkpointed anyway, or second derivatives are needed",
    ),
    Entry(
        method="recompute_activation",
        config="RecomputeActivationConfig()",
        guarantee="exact",
        keeps="the activation's input; the linear behind it: nothing",
        case="recompute_activation_mlp",
        where="linears and GELUs",
        ours="memsave recompute_activation",
        peer=_CHECKPOINT,
        not_when="likewise",
    ),
    Entry(
        method="recompute_dropout",
        config="RecomputeDropoutConfig()",
        guarantee="exact",
        keeps="1 bit an element",
        case="recompute_dropout_bert",
        where="2 BERT blocks with dropout, with recompute_norm and recompute_activation",
        ours="memsave exact",
        peer=_CHECKPOINT,
        not_when="where the model calls `F.dropout` instead of a module, as OPT and Whisper do",
    ),
    Entry(
        method="recompute_mlp",
        config='RecomputeMLPConfig(recompute="elementwise")',
        guarantee="exact",
        keeps='gate and up, or with `"all"` the input alone',
        case="recompute_mlp_llama",
        where='2 Llama blocks, "all"',
        ours="memsave all",
        peer=_CHECKPOINT,
        not_when='`"all"` where time is scarcer than memory: the block runs twice',
    ),
    Entry(
        method="share_mask",
        config="ShareMaskConfig()",
        guarantee="exact",
        keeps="one mask a model; 1 bit for each dropped attention weight",
        case="share_mask_bert",
        where="2 BERT blocks with attention dropout, padded",
        ours="memsave share_mask",
        peer=_CHECKPOINT,
        not_when="without a padding mask, dropout in attention or grouped heads it changes nothing",
    ),
    Entry(
        method="linear_cross_entropy",
        config="LinearCrossEntropyConfig()",
        guarantee="exact",
        keeps="the gradients of hidden states and head, no logits",
        case="step_large_vocabulary",
        where="full step, 8,192 classes",
        ours="memsave linear_cross_entropy alone",
        peer=_CHECKPOINT,
        not_when="where the loss is not a cross entropy of the head's output, or all logits are read",
    ),
    Entry(
        method="wta_crs",
        config="WTACRSConfig(keep_ratio=0.3, target_modules=...)",
        guarantee="unbiased gradient",
        keeps="30% of a linear's input rows, or nothing behind a norm",
        case="wta_crs_llama",
        where="2 Llama blocks, every linear, with the exact methods",
        ours="memsave exact + pps 0.3",
        peer=_CHECKPOINT,
        not_when="where noise in the gradients costs more than time does: see its table of quality",
    ),
    Entry(
        method="sparse_mha",
        config="SparseMHAConfig(keep=0.125, target_modules=...)",
        guarantee="approximate",
        keeps="what SDPA keeps",
        case="sparse_mha_causal",
        where="causal attention, 4,096 tokens, 1/8 of the keys",
        plain="SDPA",
        ours="memsave, blocks, 1/8",
        peer="SDPA",
        size={"T": 4096},
        not_when="for sequences below 1,024 tokens, or where memory is the problem: it saves time",
    ),
    Entry(
        method="routed_ffn",
        config="RoutedFFNConfig(blocks=4, active=2, target_modules=...)",
        guarantee="approximate",
        keeps="half of the hidden units, a choice a token",
        case="routed_ffn_gated_1024",
        where="a gated block, 2 blocks of 4",
        plain="dense",
        ours="memsave, 2 of 4",
        peer="dense, checkpointed",
        not_when="where the model is not trained further as it is",
    ),
    Entry(
        method="shira",
        config="SHiRAConfig(density=0.01, target_modules=...)",
        guarantee="adapter",
        keeps="linears' inputs, nothing behind a converted norm",
        case="adapters_llama",
        where="full step of 2 Llama layers, bf16, with the exact methods",
        plain="full fine-tuning",
        ours="memsave SHiRA + exact",
        peer=_LORA,
        not_when="where several adapters serve one batch: its values replace the weight's",
    ),
    Entry(
        method="lamda",
        config="LaMDAConfig(r=32, target_modules=...)",
        guarantee="adapter",
        keeps="r numbers a row and linear, never an input",
        case="adapters_llama",
        where="the same, r = 32",
        plain="full fine-tuning",
        ours="memsave LaMDA + exact",
        peer=_LORA,
        not_when="where the adapter has to learn much: it trains the fewest numbers",
    ),
    Entry(
        method="flash_svd",
        config="FlashSVDConfig(ratio=0.5, target_modules=...)",
        guarantee="approximate",
        keeps="inference: a few heads, some tokens at a time",
        case="flash_svd_bert_layer",
        where="a BERT-base layer, 8 x 512 tokens, beside the dense one",
        plain="dense",
        ours="memsave",
        peer="low-rank",
        size={"B": 8, "T": 512, "ratio": 0.5},
        not_when="where quality must not change",
    ),
    Entry(
        method="patch_conv",
        config="PatchConvConfig(input_size=(1, 3, 224, 224))",
        guarantee="exact",
        keeps="inference: a few rows of each map",
        case="patch_conv_mobilenet_v2_1024",
        where="MobileNetV2, 1,024 x 1,024 pixels",
        plain="whole",
        ours="memsave stream",
        peer="whole, channels_last",
        not_when="for training, or where maps are small already",
    ),
)


def overview(folder: Path) -> str:
    """The Markdown table, with the figures of the result files in `folder`. Raises ResultError for one of no use."""
    header = ["method", "guarantee", "keeps", "measured on", "kept", "peak", "time", "the alternative"]
    rows = [header, ["---"] * len(header), *(_row(entry, folder) for entry in ENTRIES)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    not_when = "\n".join(f"- [{e.method}](docs/{e.method}.md): {e.not_when}." for e in ENTRIES)
    return f"{table}\n\n{_LEGEND}\n\nWhen not to use each:\n\n{not_when}"


def _row(entry: Entry, folder: Path) -> list[str]:
    results = result_files.read(folder / f"{entry.case}.json")["results"]
    rows = {_name(row): row for row in results if row.get("size", {}).items() >= entry.size.items()}
    if missing := sorted({entry.plain, entry.ours, entry.peer} - rows.keys()):
        raise ResultError(f"{entry.case}: no figures of {', '.join(missing)}, which the table of methods shows")
    plain = rows[entry.plain]
    ours, peer = (_ratios(rows[name], plain) for name in (entry.ours, entry.peer))
    call = f"[{entry.method}](docs/{entry.method}.md) `{entry.config}`"
    return [call, entry.guarantee, entry.keeps, entry.where, *ours, f"{entry.peer}: {', '.join(peer)}"]


def _name(row: dict[str, Any]) -> str:
    return str(row.get("variant") or row.get("way") or row.get("contender"))


def _ratios(row: dict[str, Any], plain: dict[str, Any]) -> tuple[str, str, str]:
    """Kept bytes, peak and time, each over that of the plain variant."""
    peak = next(name for name in ("peak_bytes", "temporary_bytes") if name in row)
    kept = _ratio(row.get("kept_bytes"), plain.get("kept_bytes"))
    return kept, _ratio(row[peak], plain[peak]), _ratio(_seconds(row), _seconds(plain))


def _ratio(value: float | None, beside: float | None) -> str:
    return "-" if value is None or not beside else f"{value / beside:.2f}x"


def _seconds(row: dict[str, Any]) -> float:
    return float(row["median_s"] if "median_s" in row else row["forward"]["median_s"] + row["backward"]["median_s"])
