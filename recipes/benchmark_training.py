"""Measures what training the adapters of a bank costs, side by side with a loop over plain Trainers, on the same rows.

```bash
python recipes/benchmark_training.py --config x.yaml --max_steps 25        # its model, its candidates
python recipes/benchmark_training.py --random pico                         # nothing is downloaded
python recipes/benchmark_training.py --random 135m --candidates 8 --lora_r 8 --max_steps 25
```

All methods train the same adapters in one process and take turns:

- **bare**: TRL's SFTTrainer (a classifier: transformers' Trainer), one adapter after another on one base model;
- **one by one**: our bank with `parallel_adapters: 1`;
- **side by side**: our bank with `parallel_adapters` as it is given;
- **single**: our bank where one adapter alone is missing.

A time is that of the whole bank, from the loaded base model to the files of the last adapter: making the Trainers, the checks of
what was trained, and writing are in it. Fields of the configuration can be given as `--field value`.
"""

import sys

sys.path[0] += "/support"  # not this folder, whose select.py would hide the standard library's

from m2m_hf.console import LibraryLog

LOG = LibraryLog()  # libraries have things to say when they are imported

import argparse
import copy
import gc
import json
import math
import shutil
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from safetensors.torch import load_file
from scoring_methods import SIZES, now, peak_memory, random_model, random_rows
from transformers import PrinterCallback, Trainer, set_seed
from trl import SFTTrainer

from m2m_hf import InputError, MergeToMixSearcher
from m2m_hf.config import parsing
from m2m_hf.console import Terminal
from m2m_hf.storage.files import read_json
from m2m_hf.training.fine_tune import BaseSnapshot
from m2m_hf.training.trainers import Collate, LabelTrainer

WEIGHTS = "adapter_model.safetensors"


@dataclass
class Measured:
    """What a method took: seconds of each turn, and for how many adapters."""

    adapters: int
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def to(self, other: "Measured") -> float:
        """How many times as long as another method, turn by turn; the median."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


class BareLabels(Trainer):
    """transformers' Trainer with a classifier's loss, and nothing else of ours."""

    loss_is_scaled_for_ga = False
    compute_loss = LabelTrainer.compute_loss


class Bank:
    """Our bank in a folder of its own; `train` makes it anew."""

    def __init__(
        self, given: argparse.Namespace, flags: list[str], values: dict[str, Any] | None, folder: Path
    ) -> None:
        flags = [*flags, "--output_dir", str(folder)]
        self.searcher = MergeToMixSearcher(*parsing.parse(given.config, flags, values), Terminal(quiet=True))
        self.run = self.searcher.run
        if self.run.expert().lora is None:
            raise InputError("expert: full: the benchmark trains adapters; leave it out")
        self.searcher.prepare()
        self.run.base.to_train()

    def train(self) -> None:
        shutil.rmtree(self.run.folder.adapters, ignore_errors=True)
        self.searcher.train_adapters()

    def train_single(self) -> None:
        """Trains the first adapter alone, of a bank that has all."""
        shutil.rmtree(self.run.folder.adapters / next(iter(self.run.candidates)))
        self.searcher.train_adapters()


def bare_loop(bank: Bank, folder: Path) -> Callable[[], None]:
    """Trains the bank's adapters as one would write it with the libraries alone; writes them to `folder`."""
    run = bank.run

    def train() -> None:
        for name, candidate in run.candidates.items():
            settings = run.training_settings(*run.candidate_settings(name))
            base, args, head = run.base.to_train(), copy.deepcopy(settings.args), settings.head
            args.output_dir, args.save_strategy, args.report_to, args.disable_tqdm = str(folder), "no", [], True
            snapshot = BaseSnapshot(base, settings.expert)
            lora = settings.expert.prepare(base, None if head is None else head.plan)
            set_seed(args.seed)
            if head is None:
                trainer: Any = SFTTrainer(base, args, None, candidate.rows, None, settings.processing, peft_config=lora)
            else:
                args.remove_unused_columns = False
                collate = Collate(settings.processing, head, settings.among, settings.limit)
                trainer = BareLabels(get_peft_model(base, lora), args, collate, candidate.rows)
                trainer._head = head
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            trainer.model.save_pretrained(folder / name, save_embedding_layers=False)
            snapshot.restore(trainer.model)

    return train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="a configuration of m2m select")
    parser.add_argument("--random", choices=SIZES, help="instead: a random model of this size and random rows")
    parser.add_argument("--candidates", type=int, default=6, help="with --random: how many (default: 6)")
    parser.add_argument("--rows", type=int, default=200, help="with --random: of each candidate (default: 200)")
    parser.add_argument(
        "--repeats", type=int, default=3, help="turns of each method, after one to warm up (default: 3)"
    )
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    given, flags = parser.parse_known_args()
    if (given.config is None) == (given.random is None):
        parser.error("give either --config or --random")
    LOG.silence_libraries()
    terminal = Terminal()
    gc.freeze()  # as m2m does: every Trainer begins with a collection, which would look at all that was imported
    with tempfile.TemporaryDirectory(prefix="m2m-benchmark-") as name:
        folder = Path(name)
        values = random_run(given, folder) if given.random else None
        try:
            bank = Bank(given, [*flags, "--parallel_adapters", "1"], values, folder / "one by one")
            results, steps, tokens = measure(bank, given, flags, values, folder, terminal)
        except InputError as error:
            parser.error(str(error))
        device, args = bank.run.base.to_train().device, bank.run.args
        differs = {
            name: difference(folder / name / "adapters", folder / "bare") for name in ("one by one", "side by side")
        }
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    terminal.say("")
    rows = report(results, steps, tokens)
    title = f"{where}, {bank.run.base.to_train().dtype}, medians of {given.repeats} turns"
    terminal.table(title, ["", "bank", "per step", "tokens/s", "to bare", "to single", "peak"], rows)
    terminal.say(
        f"{len(bank.run.candidates)} adapters, {sum(steps.values()):,} steps of {args.per_device_train_batch_size} rows, "
        f"{sum(tokens.values()):,} tokens; adapters differ from bare ones by at most "
        + ", ".join(f"{largest:.1e} ({name})" for name, largest in differs.items())
    )
    if given.output:
        figures = {name: vars(one) for name, one in results.items()}
        found = figures | {"steps": steps, "tokens": tokens, "differences": differs, "device": where}
        given.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def measure(
    bank: Bank,
    given: argparse.Namespace,
    flags: list[str],
    values: dict[str, Any] | None,
    folder: Path,
    terminal: Terminal,
) -> tuple[dict[str, Measured], dict[str, int], dict[str, int]]:
    """Lets all methods take turns; the first turn warms up and is not counted.

    Returns:
        method -> what it took; candidate -> its steps; candidate -> its tokens, padding excluded (0 of images).
    """
    methods: dict[str, Callable[[], None]] = {"bare": bare_loop(bank, folder / "bare"), "one by one": bank.train}
    count = len(bank.run.candidates)
    methods["side by side"] = Bank(given, flags, values, folder / "side by side").train
    methods["single"] = bank.train_single
    results = {name: Measured(1 if name == "single" else count) for name in methods}
    device = bank.run.base.to_train().device
    for turn in range(given.repeats + 1):
        for name, train in methods.items():
            terminal.say(f"{name}, turn {turn} of {given.repeats}" if turn else f"{name}, warming up", style="dim")
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            start = now(device)
            train()
            if turn:
                results[name].seconds.append(now(device) - start)
            results[name].peak_bytes = max(results[name].peak_bytes, peak_memory(device))
    records = {name: read_json(bank.run.folder.adapters / name / "training.json") for name in bank.run.candidates}
    if failed := [f"{name}: {record['failed']}" for name, record in records.items() if "failed" in record]:
        raise InputError(f"training failed: {'; '.join(failed)}")
    steps, tokens = ({name: record[key] for name, record in records.items()} for key in ("steps", "tokens"))
    return results, steps, tokens


def report(results: dict[str, Measured], steps: dict[str, int], tokens: dict[str, int]) -> list[list[str]]:
    """The rows of the table; a step is that of one adapter."""
    rows = []
    for name, one in results.items():
        names = list(steps)[: one.adapters]
        made, seen = sum(steps[each] for each in names), sum(tokens[each] for each in names)
        seconds = statistics.median(one.seconds)
        rows.append([
            name,
            f"{seconds:.2f} s",
            f"{seconds / made * 1e3:,.2f} ms",
            f"{seen / seconds:,.0f}" if seen else "–",
            "–" if name == "single" else f"{one.to(results['bare']):.2f}",
            f"{one.to(results['single']):.2f}",
            f"{one.peak_bytes / 2**20:,.0f} MiB",
        ])  # fmt: skip
    return rows


def difference(ours: Path, theirs: Path) -> float:
    """The largest difference of a weight between the adapters of two folders."""
    largest = 0.0
    for folder in sorted(path for path in theirs.iterdir() if (path / WEIGHTS).exists()):
        a, b = load_file(ours / folder.name / WEIGHTS), load_file(folder / WEIGHTS)
        largest = max(largest, *(float((a[key].float() - b[key].float()).abs().max()) for key in b))
    return largest if math.isfinite(largest) else math.inf


def random_run(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A configuration with a random model and random rows; nothing is scored."""
    rows = [
        {"prompt": row.prompt, "completion": row.choices[0]} for row in random_rows(given.rows * given.candidates, 36)
    ]
    parts = {f"random{n}": rows[n * given.rows : (n + 1) * given.rows] for n in range(given.candidates)}
    return {
        "model_name_or_path": str(random_model(folder / "model", given.random)),
        "candidates": {name: Dataset.from_list(part) for name, part in parts.items()},
        "targets": {"unused": {"scorer": "command", "command": ["true"]}},
        "lora_r": 8,
        "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "learning_rate": 5e-4,
        "max_steps": 25,
        "per_device_train_batch_size": 8,
        "activation_checkpointing": False,
    }


if __name__ == "__main__":
    main()
