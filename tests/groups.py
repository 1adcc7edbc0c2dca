"""Fine-tunes of pico models of different lengths, to be trained side by side and one after another."""

from pathlib import Path

import torch
from datasets import Dataset
from pico import DEVICE, TARGETS, USE_CPU, build_model, build_tokenizer, candidate_rows
from pico_families import FAMILIES
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from trl import ModelConfig, SFTConfig

from m2m_hf.console import Terminal
from m2m_hf.modeling.lora import lora_config
from m2m_hf.training.experts import LoraKind
from m2m_hf.training.jobs import Job, train_jobs
from m2m_hf.training.trainers import Settings

ROWS = {"a": 12, "a long word with more": 19, "three is in between": 11, "x y": 7}
FILE = "adapter_model.safetensors"
SAME = 1e-5


def make_jobs(folder: Path, family: str = "llama", lora: dict | None = None, names=tuple(ROWS), **fields) -> list[Job]:
    options = {
        "lora_r": 4,
        "lora_dropout": 0.0,
        "lora_target_modules": TARGETS.get(family, ["q_proj", "v_proj", "down_proj"]),
    }
    args = {"learning_rate": 1e-3, "per_device_train_batch_size": 4, "num_train_epochs": 2.0, "logging_steps": 1}
    args = SFTConfig(str(folder), use_cpu=USE_CPU, **({"bf16": False} | args | fields))
    config = lora_config(ModelConfig(**options | (lora or {})))
    config.fan_in_fan_out = family == "gpt2"
    settings = Settings(args, build_tokenizer(), LoraKind(config))
    return [
        Job(
            name,
            folder / name.replace(" ", "_"),
            Dataset.from_list(candidate_rows(name, ROWS[name])),
            settings,
            name,
            name,
            9,
        )
        for name in names
    ]


def model_of(name: str, **config) -> torch.nn.Module:
    torch.manual_seed(0)
    family = FAMILIES[name]
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family.kind, **(family.config | config))).to(DEVICE)


def train(jobs: list[Job], parallel: int | str, base=None, family: str = "llama") -> dict[str, dict]:
    """Records by name."""
    records, base, said = {}, base or build_model(family), []
    with Terminal(quiet=True).progress("", 9) as bar:
        train_jobs(
            lambda: base,
            jobs,
            parallel,
            bar,
            lambda text, style="": said.append(text),
            lambda job, record: records.update({job.name: record}),
        )
    assert not said
    return records


def apart(one: list[Job], other: list[Job]) -> float:
    """By how much the adapters of two lists of jobs differ."""
    pairs = [
        (load_file(mine.folder / FILE), load_file(theirs.folder / FILE))
        for mine, theirs in zip(one, other, strict=True)
    ]
    return max((mine[name] - theirs[name]).abs().max().item() for mine, theirs in pairs for name in theirs)


def timeless(records: dict[str, dict]) -> dict[str, dict]:
    changing = ("seconds", "peak_memory_bytes", "files")
    return {
        name: {key: value for key, value in record.items() if key not in changing} for name, record in records.items()
    }


def flat(curve: list[list[float]]) -> list[float]:
    return [value for point in curve for value in point]
