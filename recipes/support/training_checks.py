"""How fast adapters train side by side on a device: a step, a bank, and every mixture of five candidates."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets
from scoring_methods import now
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, SFTConfig

from m2m_hf.console import Terminal
from m2m_hf.modeling.lora import lora_config
from m2m_hf.training.experts import LoraKind
from m2m_hf.training.jobs import Job, train_jobs
from m2m_hf.training.trainers import Settings

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
WORDS = "red green blue one two three four yes no cold warm big small".split()
STEP, BANK, MIXTURES = 1.5, 2.0, 120.0  # a step of eight to one of one, a bank of eight to one, seconds for 31 mixtures


def random_texts(seed: int, count: int) -> Dataset:
    """Rows of 10 to 30 words."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        words = [
            WORDS[n]
            for n in torch.randint(len(WORDS), (int(torch.randint(10, 30, (), generator=draw)),), generator=draw)
        ]
        rows.append({"prompt": " ".join(words[:-5]), "completion": " " + " ".join(words[-5:])})
    return Dataset.from_list(rows)


def trainings(folder: Path, device: str, check: Callable[[bool, str], None], limit: bool) -> None:
    """Trains on the model in `folder`, and checks the times where there is a `limit`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    lora = lora_config(ModelConfig(lora_r=8, lora_dropout=0.0, lora_target_modules=LAYERS))
    turns = itertools.count()

    def seconds(parts: Sequence[Dataset], steps: int, parallel: int | str) -> float:
        out = folder.with_name(f"trained{next(turns)}")
        args = SFTConfig(
            str(out), use_cpu=device == "cpu", bf16=True, max_steps=steps, per_device_train_batch_size=8,
            learning_rate=1e-4, activation_checkpointing=False, num_train_epochs=1,
        )  # fmt: skip
        settings = Settings(args, tokenizer, LoraKind(lora))
        jobs = [Job(f"{n}", out / f"{n}", part, settings, f"{n}", f"{n}", steps) for n, part in enumerate(parts)]
        start = now(base.device)
        with Terminal(quiet=True).progress("", 1) as bar:
            train_jobs(lambda: base, jobs, parallel, bar, lambda text, style="": check(False, text))
        return now(base.device) - start

    few, many = (25, 8) if limit else (1, 2)
    rows = [random_texts(seed, 200 if limit else 16) for seed in range(many)]
    seconds(rows[:1], 2, 1)  # warms up
    one, eight = ([seconds(part, steps, "auto") for steps in (few, 2 * few)] for part in (rows[:1], rows))
    step = (eight[1] - eight[0]) / (one[1] - one[0])
    check(
        not limit or step <= STEP,
        f"{many} adapters side by side: a step takes {step:.2f} times as long as that of one ({(one[1] - one[0]) / few:.3f} s)"
        + (f" (at most {STEP})" if limit else ""),
    )
    check(
        not limit or eight[0] <= BANK * one[0],
        f"a bank of {many}, {few} steps each: {eight[0]:.1f} s, {eight[0] / one[0]:.2f} times as long as a bank of one"
        + (f" (at most {BANK})" if limit else ""),
    )
    count = 5 if limit else 2
    mixtures = [some for size in range(count) for some in itertools.combinations(rows[:count], size + 1)]
    spent = seconds([concatenate_datasets(some) for some in mixtures], -1, "auto")
    check(
        not limit or spent < MIXTURES,
        f"{len(mixtures)} mixtures of {count} candidates of {len(rows[0])} rows, really fine-tuned: {spent:.1f} s"
        + (f" (less than {MIXTURES:.0f})" if limit else ""),
    )
