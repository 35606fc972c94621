"""Fine-tune a small language model for another kind of text: in full, with LoRA, SHiRA and LaMDA, side by side.

    python examples/finetune_adapters.py                # all variants, text from the packages that are installed
    python examples/finetune_adapters.py --text FOLDER --variants lora lamda --steps 300

The byte-level Llama of train_text.py is pretrained for a short while on the Python standard library's source. Every
variant then goes on from these weights, with the same batches of licenses and descriptions of installed packages, and
AdamW without weight decay. The variants take their steps in turn, so that whatever else the machine does slows all of
them alike. The learning rates in RATES are the best of the two or three named there, by the validation loss after one
run of 50 steps with seed 1 (other windows of the same validation files, --pretrain-steps 400). Needs the extras of
``pip install 'memsave[bench]'``.

Shapes: B batch, T length of a sequence in bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from adapter_figures import Result, draw, in_words, table
from package_text import read_package_text
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from tqdm import tqdm
from train_text import (
    MEASURED_STEP,
    SIZES,
    VALIDATION_BATCHES,
    Text,
    at_least,
    build_model,
    learning_rate_factor,
    make_batches,
    read_text,
)
from transformers import LlamaForCausalLM

import memsave
from memsave.peft import LaMDAConfig, LaMDAFreezer, SHiRAConfig, lamda_param_groups

PRETRAINING_RATE = 1e-3
EVALUATIONS = 8
CALIBRATION_BATCHES = 4
Weights = dict[str, Tensor]

# The best of: full 3e-4 1e-3; lora 1e-3 3e-3 1e-2; shira 3e-3 1e-2 3e-2; shira-gradient 3e-3 1e-2; lamda as shira.
RATES = {"full": 1e-3, "lora": 3e-3, "shira": 1e-2, "shira-gradient": 3e-3, "lamda": 1e-2}


def adapter_config(name: str, options: argparse.Namespace) -> peft.PeftConfig | None:
    """The adapter of a variant, on all linears but the head; None for full fine-tuning."""
    if name == "full":
        return None
    if name == "lora":
        return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    if name == "lamda":
        return LaMDAConfig(r=32, freeze_until=0.3, target_modules="all-linear")
    if name == "shira":  # as many values as LoRA of the same r
        return SHiRAConfig(r=16, mask="random", seed=options.seed, target_modules="all-linear")
    batches = make_batches(options.new.train, CALIBRATION_BATCHES, options.batch, options.length, options.seed + 2)
    calibration = [{"input_ids": batch, "labels": batch} for batch in batches]
    return SHiRAConfig(r=16, mask="gradient", calibration=calibration, target_modules="all-linear")


class Run:
    """One variant in training: its model, optimizer and figures."""

    def __init__(self, name: str, weights: Weights, options: argparse.Namespace) -> None:
        self.name = name
        self.options = options
        self.model: Any = pretrained_model(weights, options).train()
        if (config := adapter_config(name, options)) is not None:
            self.model = get_peft_model(self.model, config)
        # For every model but LaMDA's this is one group of all that trains.
        groups = lamda_param_groups(self.model, weight_decay=0.0)
        self.trained_parameters = sum(p.numel() for group in groups for p in group["params"])
        self.optimizer = torch.optim.AdamW(groups, lr=RATES[name])
        self.freezer = LaMDAFreezer(self.model, options.steps) if name == "lamda" else None
        self.step_seconds: list[float] = []
        self.new_losses: list[tuple[int, float]] = []
        self.profile: memsave.MemoryProfile | None = None
        self.optimizer_bytes = 0

    def step(self, index: int, batch: Tensor) -> None:
        """One training step on ``batch``, (B, T): timed, or with its memory measured at ``MEASURED_STEP``."""
        for group in self.optimizer.param_groups:
            group["lr"] = RATES[self.name] * learning_rate_factor(index, self.options.steps)
        if index == MEASURED_STEP:
            self.optimizer_bytes = state_bytes(self.optimizer)
            self.profile = memsave.measure(lambda: self._train(batch))
        else:
            start = time.perf_counter()
            self._train(batch)
            self.step_seconds.append(time.perf_counter() - start)

    def _train(self, batch: Tensor) -> None:
        train_on(self.model, self.optimizer, batch)
        if self.freezer is not None:
            self.freezer.step(self.optimizer)

    def evaluate(self, step: int, validation: Tensor) -> None:
        """Notes the loss on the new kind of text after so many steps."""
        self.new_losses.append((step, mean_loss(self.model, validation)))

    def result(self, old_loss_before: float, old: Tensor, batch: Tensor) -> Result:
        """The figures, and the adapter on disk, after the last step."""
        old_loss = mean_loss(self.model, old)
        disk_bytes = self.save()
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0  # one more step, which changes no weight, to see its memory
        late_optimizer_bytes = state_bytes(self.optimizer)
        late_profile = memsave.measure(lambda: train_on(self.model, self.optimizer, batch))
        assert self.profile is not None
        return Result(
            variant=self.name,
            learning_rate=RATES[self.name],
            new_losses=self.new_losses,
            old_loss_before=old_loss_before,
            old_loss=old_loss,
            trained_parameters=self.trained_parameters,
            peak_bytes=self.profile.peak_bytes,
            kept_bytes=self.profile.saved_bytes,
            optimizer_bytes=self.optimizer_bytes,
            late_optimizer_bytes=late_optimizer_bytes,
            disk_bytes=disk_bytes,
            step_seconds=statistics.median(self.step_seconds[1:]),
            profile=self.profile,
            late_profile=late_profile,
        )

    def save(self) -> int:
        """Writes the adapter, or the whole model, and returns the bytes of the weights' files."""
        folder = self.options.out / self.name
        if isinstance(self.model, PeftModel):
            memsave.save_adapter(self.model, folder, overwrite=True)
        else:
            self.model.save_pretrained(folder)
        return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def pretrained_model(weights: Weights, options: argparse.Namespace) -> LlamaForCausalLM:
    """The model with a copy of these weights."""
    model = build_model(options.size, options.length, options.seed)
    model.load_state_dict(weights)
    return model


def train_on(model: Any, optimizer: torch.optim.Optimizer, batch: Tensor) -> None:
    """One training step on ``batch``, (B, T)."""
    model(input_ids=batch, labels=batch).loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def mean_loss(model: Any, batches: Tensor) -> float:
    """Mean loss per byte, in nats, over ``batches``, (count, B, T)."""
    was_training = model.training
    model.eval()
    loss = statistics.fmean(model(input_ids=batch, labels=batch).loss.item() for batch in batches)
    model.train(was_training)
    return loss


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors that the optimizer keeps from step to step."""
    kept = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.nbytes for value in kept if isinstance(value, Tensor))


def steps_bar(steps: int, what: str) -> Any:
    seconds_between_updates = 0.1 if sys.stderr.isatty() else 15  # a log file gets few lines
    return tqdm(total=steps, desc=what, unit="step", mininterval=seconds_between_updates)


def pretrain(options: argparse.Namespace) -> Weights:
    """The weights after some steps on the old kind of text."""
    model = build_model(options.size, options.length, options.seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAINING_RATE, weight_decay=0.01)
    steps = options.pretrain_steps
    with steps_bar(steps, "pretraining") as progress:
        batches = make_batches(options.old.train, steps, options.batch, options.length, options.seed)
        for index, batch in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = PRETRAINING_RATE * learning_rate_factor(index, steps)
            train_on(model, optimizer, batch)
            progress.update()
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def finetune(options: argparse.Namespace, weights: Weights) -> list[Result]:
    """Trains every variant to the end, their steps in turn, and returns their figures in the order asked for."""
    batches = make_batches(options.new.train, options.steps, options.batch, options.length, options.seed)
    new, old = validation_batches(options.new, options), validation_batches(options.old, options)
    runs = [Run(name, weights, options) for name in options.variants]
    for run in runs:
        run.evaluate(0, new)
    old_loss_before = mean_loss(pretrained_model(weights, options), old)
    every = max(1, options.steps // EVALUATIONS)
    with steps_bar(options.steps * len(runs), "fine-tuning") as progress:
        for index, batch in enumerate(batches):
            # Turning the order keeps any variant from always running on caches that the same other one left behind.
            turn, done = index % len(runs), index + 1
            batch = batch.clone()  # a view would count with the bytes of all batches
            for run in runs[turn:] + runs[:turn]:
                run.step(index, batch)
                if done == options.steps or (done % every == 0 and options.steps - done >= every):
                    run.evaluate(done, new)
                progress.update()
    return [run.result(old_loss_before, old, batches[0].clone()) for run in runs]


def validation_batches(text: Text, options: argparse.Namespace) -> Tensor:
    """Windows of text that no variant trains on."""
    return make_batches(text.validation, VALIDATION_BATCHES, options.batch, options.length, options.seed + 1)


def switch(options: argparse.Namespace, weights: Weights, names: Sequence[str]) -> list[dict[str, Any]]:
    """Loads the adapters of these variants into one model and switches between them; the time and loss of each.

    Raises RuntimeError if the base does not come back bit for bit.
    """
    validation = validation_batches(options.new, options)
    first, *others = names
    base = pretrained_model(weights, options)
    model = PeftModel.from_pretrained(base, str(options.out / first), adapter_name=first)
    for name in others:
        model.load_adapter(str(options.out / name), adapter_name=name)
    switches = []
    for name in [*others, first]:
        start = time.perf_counter()
        model.set_adapter(name)
        seconds = time.perf_counter() - start
        switches.append({"to": name, "seconds": seconds, "new_loss": mean_loss(model, validation)})
    plain = model.unload()
    for name, weight in plain.state_dict().items():
        if not torch.equal(weight.view(torch.uint8), weights[name].view(torch.uint8)):
            raise RuntimeError(f"{name} is not what it was before the adapters were loaded")
    return switches


def switching_in_words(switches: Sequence[dict[str, Any]]) -> list[str]:
    """How it is done, and what came of it."""
    first, *others = [s["to"] for s in switches[-1:] + switches[:-1]]
    code = [f'model = PeftModel.from_pretrained(base, "{first}", adapter_name="{first}")']
    code += [f'model.load_adapter("{name}", adapter_name="{name}")' for name in others]
    made = [
        f'model.set_adapter("{s["to"]}")'.ljust(40) + f"# {s['seconds'] * 1e3:.1f} ms, loss {s['new_loss']:.4f}"
        for s in switches
    ]
    return [*code, *made, "base = model.unload()".ljust(40) + "# bit for bit what it was"]


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; wrong options end the program with one line that says what was expected."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", choices=RATES, default=list(RATES), help="how to fine-tune")
    parser.add_argument("--text", type=Path, metavar="FOLDER", help="fine-tune on the texts in FOLDER")
    parser.add_argument(
        "--size", choices=[s for s in SIZES if s != "medium"], default="small", help="small: 3M parameters"
    )
    parser.add_argument("--pretrain-steps", type=at_least(1), default=300, help="steps on the old kind of text")
    parser.add_argument("--steps", type=at_least(MEASURED_STEP + 2), default=120, help="fine-tuning steps, at least 3")
    parser.add_argument("--batch", type=at_least(1), default=4, help="sequences in a batch")
    parser.add_argument("--length", type=at_least(2), default=256, help="bytes in a sequence, at least 2")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the weights, the batches and the masks")
    parser.add_argument("--out", type=Path, default=Path("build/adapters"), help="folder for what is written")
    options = parser.parse_args(arguments)
    if len(set(options.variants)) < len(options.variants):
        parser.error(f"argument --variants: each may be given once, got {' '.join(options.variants)}")
    try:
        options.old, options.new = read_text(None), read_package_text(options.text)
        for part in (options.new.train, options.new.validation):
            make_batches(part, 1, 1, options.length, options.seed)
    except (OSError, ValueError) as error:
        parser.error(f"argument --text: {error}")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {error}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, prints the table and what it means, and writes adapters, JSON and a picture."""
    options = parse_options(arguments)
    for when, text in (("pretrained on", options.old), ("fine-tuned on", options.new)):
        print(f"{when} {text.source}: {text.files} files, {len(text.train) / 1e6:.1f} MB of them for training")
    weights = pretrain(options)
    results = finetune(options, weights)
    words = in_words(results)
    print(f"\n{table(results)}\n")
    print(*words, sep="\n")
    shira = [name for name in options.variants if name.startswith("shira")]
    switches = switch(options, weights, shira) if shira else []
    if switches:
        print("\nAdapters in one model, and back:\n", *switching_in_words(switches), sep="\n    ")
    report = as_json(options, results, words, switches)
    (options.out / "results.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    draw(results, options.out / "results.png")
    print(f"\nWritten: {options.out / 'results.json'}, {options.out / 'results.png'}, and the adapters")


def as_json(
    options: argparse.Namespace, results: Sequence[Result], words: Sequence[str], switches: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Everything that was asked for and found, as plain data."""
    settings = {name: value for name, value in vars(options).items() if name not in ("old", "new", "out", "text")}
    modules = (torch, transformers, peft)
    text = {
        kind: {"source": t.source, "files": t.files, "training_bytes": len(t.train)}
        for kind, t in (("old", options.old), ("new", options.new))
    }
    return {
        "settings": settings,
        "versions": {"python": platform.python_version()} | {m.__name__: m.__version__ for m in modules},
        "threads": torch.get_num_threads(),
        "text": text,
        "results": [dataclasses.asdict(result) for result in results],
        "switches": list(switches),
        "in_words": list(words),
    }


if __name__ == "__main__":
    main()
