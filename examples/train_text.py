"""Train a small byte-level language model on real text in several variants and compare memory, time and loss.

    python examples/train_text.py                       # all variants on the Python standard library's source files
    python examples/train_text.py --text FOLDER --variants plain exact --steps 300

Every variant starts from the same weights and sees the same batches. The variants take their steps in turn, so that
whatever else the machine does slows all of them alike. Needs the extras of ``pip install 'memsave[bench]'``.

Shapes: B batch, T length of a sequence in bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from comparison import Result, draw, in_words, table
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import memsave

SIZES = {
    "tiny": {"hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 2},
    "small": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4},
    "medium": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6},
}
# Step 0 creates the optimizer's states and warms up; from step 1 on every step has the same memory profile.
MEASURED_STEP = 1
VALIDATION_BATCHES = 16


def apply_plain(model: LlamaForCausalLM, options: argparse.Namespace) -> None:
    """The model as transformers made it."""


def apply_checkpoint(model: LlamaForCausalLM, options: argparse.Namespace) -> None:
    """Activation checkpointing of every layer: what most people use today."""
    # transformers 5 renamed the method; the old name goes away in version 6.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


def apply_exact(model: LlamaForCausalLM, options: argparse.Namespace) -> None:
    """memsave's exact methods: the same function and gradients up to rounding."""
    print(memsave.convert_model(model))


def apply_all(model: LlamaForCausalLM, options: argparse.Namespace, keep_ratio: float = 1.0) -> None:
    """The exact methods, and of each MLP only the input is kept: backward computes all of it again."""
    mlp = memsave.RecomputeMLPConfig(recompute="all", keep_ratio=keep_ratio, target_modules=r".*")
    others = [method() for method in memsave.methods.METHODS if method.default and method is not type(mlp)]
    print(memsave.convert_model(model, [*others, mlp]))


def apply_all_wta_crs(model: LlamaForCausalLM, options: argparse.Namespace) -> None:
    """The same, and backward estimates the weight gradients of the MLPs from a sample of the rows."""
    apply_all(model, options, options.keep_ratio)


VARIANTS: dict[str, Callable[[LlamaForCausalLM, argparse.Namespace], None]] = {
    "plain": apply_plain,
    "checkpoint": apply_checkpoint,
    "exact": apply_exact,
    "all": apply_all,
    "all+wta_crs": apply_all_wta_crs,
}


@dataclasses.dataclass
class Text:
    """Training and validation bytes as 1-D uint8 tensors, split by file, and where they came from."""

    train: Tensor
    validation: Tensor
    source: str
    files: int


def read_text(folder: Path | None) -> Text:
    """Reads a folder in sorted order, or for ``None`` the standard library's source, and splits it by file.

    The first of each ten files goes to validation. Files that hold a zero byte are not text and are left out. Raises
    ValueError when there is too little to read.
    """
    if folder is None:
        root, pattern, source = Path(sysconfig.get_path("stdlib")), "*.py", f"Python {platform.python_version()} source"
    else:
        root, pattern, source = folder, "*", folder.resolve().name
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder")
    # Installed packages are not the standard library, and its tests hold tables of numbers rather than code.
    left_out = {"site-packages", "dist-packages", "test", "tests"} if folder is None else set()
    paths = [p for p in sorted(root.rglob(pattern)) if p.is_file() and not left_out & set(p.relative_to(root).parts)]
    contents = [content for content in (path.read_bytes() for path in paths) if content and b"\0" not in content]
    if len(contents) < 2:
        raise ValueError(f"{root} holds {len(contents)} text files; at least 2 are needed, one of them for validation")
    train = [content for index, content in enumerate(contents) if index % 10 != 0]
    return Text(to_tensor(train), to_tensor(contents[::10]), source, len(contents))


def to_tensor(contents: Sequence[bytes]) -> Tensor:
    """All of them as one 1-D uint8 tensor."""
    return torch.frombuffer(bytearray(b"\n".join(contents)), dtype=torch.uint8)


def make_batches(data: Tensor, count: int, batch: int, length: int, seed: int) -> Tensor:
    """Random windows of the text, (count, B, T) int64, always the same for one seed."""
    if len(data) < length:
        raise ValueError(f"the text has {len(data)} bytes where one sequence has {length}; use more text")
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(data) - length + 1, (count, batch, 1), generator=generator)
    return data[starts + torch.arange(length)].long()  # (count, B, 1) + (T,) -> (count, B, T)


def build_model(size: str, length: int, seed: int) -> LlamaForCausalLM:
    """A Llama over bytes with random weights, always the same for one seed."""
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=256, max_position_embeddings=length, use_cache=False, **SIZES[size])
    return LlamaForCausalLM(config)


class Run:
    """One variant in training: its model, optimizer and figures."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name = name
        self.options = options
        self.model = build_model(options.size, options.length, options.seed).to(options.device).train()
        VARIANTS[name](self.model, options)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=options.lr, weight_decay=0.01)
        self.losses: list[float] = []
        self.step_seconds: list[float] = []
        self.profile: memsave.MemoryProfile | None = None

    def step(self, index: int, batch: Tensor) -> None:
        """One training step on ``batch``, (B, T): timed, or with its memory measured at ``MEASURED_STEP``."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.lr * learning_rate_factor(index, self.options.steps)
        # Sampling draws from torch's generator: seeded per step, it does not depend on which other variants run.
        torch.manual_seed(self.options.seed + index)
        if index == MEASURED_STEP:
            self.profile = memsave.measure(lambda: self._train(batch))
            return
        synchronize(self.options.device)
        start = time.perf_counter()
        self._train(batch)
        synchronize(self.options.device)
        self.step_seconds.append(time.perf_counter() - start)

    def _train(self, batch: Tensor) -> None:
        loss = self.model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())

    @torch.no_grad()
    def validation_loss(self, batches: Tensor) -> float:
        """Mean loss per byte, in nats, over ``batches``, (count, B, T)."""
        self.model.eval()
        return statistics.fmean(self.model(input_ids=batch, labels=batch).loss.item() for batch in batches)

    def result(self, validation: Tensor) -> Result:
        """The figures, after the last step."""
        if self.profile is None:
            raise RuntimeError(
                f"no step was measured: {len(self.losses)} steps were run, step {MEASURED_STEP} is measured"
            )
        return Result(
            variant=self.name,
            peak_bytes=self.profile.peak_bytes,
            kept_bytes=self.profile.saved_bytes,
            step_seconds=statistics.median(self.step_seconds[1:]),
            validation_loss=self.validation_loss(validation),
            training_losses=self.losses,
            profile=self.profile,
        )


def learning_rate_factor(index: int, steps: int) -> float:
    """Linear warm-up over the first tenth of the steps, then half a cosine down to a tenth."""
    warmup = max(1, steps // 10)
    if index < warmup:
        return (index + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (index - warmup) / max(1, steps - warmup))


def synchronize(device: torch.device) -> None:
    """Waits for the device, whose work is asynchronous everywhere but on the CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def train(options: argparse.Namespace, text: Text) -> list[Result]:
    """Trains every variant to the end, their steps in turn, and returns their figures in the order asked for."""
    batches = make_batches(text.train, options.steps, options.batch, options.length, options.seed)
    validation = make_batches(text.validation, VALIDATION_BATCHES, options.batch, options.length, options.seed + 1)
    runs = [Run(name, options) for name in options.variants]
    parameters = sum(p.numel() for p in runs[0].model.parameters())
    print(f"{parameters / 1e6:.1f}M parameters, {options.steps} steps of {options.batch} x {options.length} bytes")
    print(f"text: {text.source}, {text.files} files, {len(text.train) / 1e6:.1f} MB of them for training")
    seconds_between_updates = 0.1 if sys.stderr.isatty() else 15  # a log file gets few lines
    with tqdm(total=options.steps * len(runs), unit="step", mininterval=seconds_between_updates) as progress:
        for index, batch in enumerate(batches.to(options.device)):
            # Turning the order keeps any variant from always running on caches that the same other one left behind.
            turn = index % len(runs)
            batch = batch.clone()  # a view would count with the bytes of all batches
            for run in runs[turn:] + runs[:turn]:
                run.step(index, batch)
                progress.set_postfix_str(f"{run.name} loss {run.losses[-1]:.3f}", refresh=False)
                progress.update()
    return [run.result(validation.to(options.device)) for run in runs]


def at_least(minimum: int) -> Callable[[str], int]:
    """An argparse type: a whole number of at least ``minimum``."""

    def whole_number(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {minimum}, got {text!r}")
        return int(text)

    return whole_number


def fraction(text: str) -> float:
    """An argparse type: a number in (0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and at most 1, got {text!r}")
    return value


def usable_device(text: str) -> torch.device:
    """An argparse type: a device that this machine has."""
    try:
        device = torch.device(text)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used on this machine: {reason}") from None
    return device


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; wrong options end the program with one line that says what was expected."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="what to train")
    parser.add_argument("--text", type=Path, metavar="FOLDER", help="train on the text files in FOLDER")
    parser.add_argument("--size", choices=SIZES, default="small", help="small: 3M parameters, medium: 11M")
    parser.add_argument("--steps", type=at_least(MEASURED_STEP + 2), default=150, help="training steps, at least 3")
    parser.add_argument("--batch", type=at_least(1), default=4, help="sequences in a batch")
    parser.add_argument("--length", type=at_least(2), default=256, help="bytes in a sequence, at least 2")
    parser.add_argument("--lr", type=fraction, default=1e-3, help="highest learning rate, at most 1")
    parser.add_argument("--keep-ratio", type=fraction, default=0.3, help="share of the rows that all+wta_crs uses")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the weights, the batches and the sampling")
    parser.add_argument("--device", type=usable_device, default="cpu", help="cpu, cuda, cuda:1, mps, ...")
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="folder for results.json and results.png")
    options = parser.parse_args(arguments)
    if len(set(options.variants)) < len(options.variants):
        parser.error(f"argument --variants: each may be given once, got {' '.join(options.variants)}")
    try:
        options.data = read_text(options.text)
        for part in (options.data.train, options.data.validation):
            make_batches(part, 1, 1, options.length, options.seed)
    except (OSError, ValueError) as error:
        parser.error(f"argument --text: {error}")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {error}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, prints the table and what it means, and writes JSON and a picture."""
    options = parse_options(arguments)
    results = train(options, options.data)
    words = in_words(results, options.keep_ratio)
    print(f"\n{table(results)}\n")
    print(*words, sep="\n")
    report = as_json(options, results, words)
    (options.out / "results.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    draw(results, options.out / "results.png")
    print(f"\nWritten: {options.out / 'results.json'}, {options.out / 'results.png'}")


def as_json(options: argparse.Namespace, results: Sequence[Result], words: Sequence[str]) -> dict[str, Any]:
    """Everything that was asked for and found, as plain data."""
    settings = {name: value for name, value in vars(options).items() if name not in ("data", "out", "text")}
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return {
        "settings": {**settings, "device": str(options.device)},
        "versions": versions,
        "threads": torch.get_num_threads(),
        "text": {"source": options.data.source, "files": options.data.files, "training_bytes": len(options.data.train)},
        "results": [dataclasses.asdict(result) for result in results],
        "in_words": list(words),
    }


if __name__ == "__main__":
    main()
