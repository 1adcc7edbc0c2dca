"""`m2m init`: writes a configuration that runs, from answers or from a configuration of TRL, axolotl or LLaMA-Factory."""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from m2m_hf.cli.drafts.axolotl import from_axolotl
from m2m_hf.cli.drafts.draft import Draft, renamed
from m2m_hf.cli.drafts.llamafactory import from_llamafactory
from m2m_hf.cli.drafts.sources import Source, parse_source, parse_sources, read_columns, relocate
from m2m_hf.cli.drafts.trl import from_trl
from m2m_hf.config import presets
from m2m_hf.config.checks import check_name
from m2m_hf.config.judge import JudgeConfig
from m2m_hf.config.targets import SCORERS
from m2m_hf.config.yaml_files import load_yaml
from m2m_hf.console import Terminal
from m2m_hf.errors import InputError

SCORED = tuple(name for name, kind in SCORERS.items() if kind.metrics)  # those that take rows
COLUMNS = {
    "sequence_classification": "text and label",
    "image_classification": "image and label",
    None: "prompt and completion, or messages",
}


def init(command: argparse.Namespace) -> None:
    """Asks for what neither the flags nor another trainer's file say, and writes the configuration."""
    output: Path = command.output
    if output.exists():
        raise InputError(f"--output: {output} exists already; choose another name")
    draft = read_trainer_config(command.origin) if command.origin else Draft()
    draft.model = command.model or draft.model
    for name, source in draft.candidates.items():
        draft.lost += leave_out(name, source, read_columns(relocate(source, command.origin.parent, Path.cwd())))
    draft.candidates |= parse_sources(command.data)
    if not sys.stdin.isatty():
        given = {"--model": draft.model, "--data": draft.candidates, "--target": command.target or command.benchmark}
        if missing := [flag for flag, value in given.items() if not value]:
            raise InputError(f"{' and '.join(missing)}: nothing given, and nobody to ask; see m2m init --help")
    if not draft.model:
        draft.model = ask("1. Which model? A Hub id or a folder", "HuggingFaceTB/SmolLM2-135M-Instruct")
    if not draft.candidates:
        answer = ask("2. Which candidate datasets? Files, folders or Hub ids, separated by commas", "a.jsonl, b.jsonl")
        draft.candidates = parse_sources(part.strip() for part in answer.split(",") if part.strip())
    target, entry, task = benchmark(command) if command.benchmark else ask_target(command)
    for name in (*draft.candidates, target):
        check_name(name, "candidate or target")
    origin = command.origin.parent if command.origin else Path.cwd()
    draft.candidates = {name: relocate(source, origin, output.parent) for name, source in draft.candidates.items()}
    if task is None:
        read = {name: read_columns(relocate(one, output.parent, Path.cwd())) for name, one in draft.candidates.items()}
        draft.lost += [
            f"{name}, whose rows have {', '.join(sorted(has))}: they need {COLUMNS[None]}"
            for name, has in read.items()
            if has and not fits(draft.candidates[name], has)
        ]
    output.parent.mkdir(parents=True, exist_ok=True)
    text = write_config(draft, target, entry, task, output)
    output.write_text(text, encoding="utf-8")
    if draft.lost:
        Terminal().say(f"not taken over, as {output} says: {'; '.join(draft.lost)}")
    Terminal().say(f"written: {output}; continue with: m2m select --config {output}")


def benchmark(command: argparse.Namespace) -> tuple[str, str, None]:
    """(name, entry, no task) of a target that is a benchmark by name."""
    name = command.benchmark
    presets.text_of(name, "--benchmark")
    if command.target or command.scorer:
        raise InputError(f"--benchmark: {name} has rows and a scorer of its own; leave out --target and --scorer")
    return (
        name,
        f"benchmark: {name}   # m2m targets {name} prints what this stands for; what you write beside it goes over it",
        None,
    )


def ask_target(command: argparse.Namespace) -> tuple[str, str, str | None]:
    """(name, entry, task if it is not a language model's) of a target with rows, from flags or answers."""
    question = "3. Validation rows of the task that you care about? A file or a Hub id"
    target, rows = parse_source(command.target or ask(question, "validation.jsonl"))
    guess, task = guess_scorer(rows)
    scorer = command.scorer or ask(f"4. How is it scored? {', '.join(SCORED)}", guess)
    if scorer not in SCORED:
        raise InputError(f"--scorer: expected {', '.join(SCORED)}, got {scorer!r}")
    task = task if scorer == "classification" else None
    folder = command.output.parent
    if scorer == "reward":
        rated = command.reward_model or ask("5. Which reward model? A Hub id or a folder", "")
        if not rated:
            raise InputError(
                "--reward_model: scorer reward needs a model that rates answers; expected a Hub id or a folder"
            )
        scorer += f"\n    reward_model: {flow(relocate({'path': rated}, Path.cwd(), folder)['path'])}"
    if scorer == "judge":
        address, model = command.judge or (
            ask("5. Which server judges? An OpenAI-compatible one", "http://localhost:8000/v1"),
            ask("6. Which of its models?", ""),
        )
        judge = JudgeConfig.parse({"base_url": address, "model": model}, "--judge").to_json()
        scorer += f"\n    judge: {flow(judge)}"
    data = flow(relocate(rows, Path.cwd(), folder))
    return (
        target,
        f"data: {data}\n    # test_data: {{...}}       # sealed: scored once, at the end\n    scorer: {scorer}",
        task,
    )


def fits(source: Source, columns: set[str]) -> bool:
    """True if rows with these columns become prompts and completions, or conversations."""
    names = {source.get("columns", {}).get(column, column) for column in columns} | {*source.get("template", {})}
    return bool(names & {"messages", "conversations"}) or {"prompt", "completion"} <= names


def ask(question: str, default: str) -> str:
    """The answer to a question; the default where nobody can answer."""
    if not sys.stdin.isatty():
        return default
    try:
        return input(f"{question} [{default}]: ").strip() or default
    except EOFError:
        raise InputError("no answer, so nothing was written") from None


def guess_scorer(source: Source) -> tuple[str, str | None]:
    """The scorer that fits local rows, `loss` if unknown; and their task, if it is not a language model's."""
    columns = read_columns(source)
    if "choices" in columns:
        return "choice", None
    if {"chosen", "rejected"} <= columns:
        return "preference", None
    if "label" not in columns:
        return "loss", None
    if "prompt" in columns or not columns & {"text", "image"}:
        return "classification", None
    return "classification", "sequence_classification" if "text" in columns else "image_classification"


def write_config(draft: Draft, target: str, entry: str, task: str | None, output: Path) -> str:
    """The YAML, with comments on what may be changed."""
    settings = {"lora_r": 16, "lora_alpha": 32, "learning_rate": 2.0e-4, "num_train_epochs": 1}
    settings |= ({"lora_target_modules": "all-linear"} if task else {}) | draft.settings
    if draft.settings.get("max_steps", -1) > 0:
        settings.pop("num_train_epochs")
    task_line = f"task: {task}\n" if task else ""
    candidates = "\n".join(f"  {quoted(name)}: {flow(entry)}" for name, entry in draft.candidates.items())
    lost = f"\n# Not taken over: {', '.join(draft.lost)}\n" if draft.lost else ""
    return f"""\
# Which of these datasets belong in the mixture? m2m select --config {output}
model_name_or_path: {json.dumps(draft.model)}
{task_line}output_dir: runs/{output.stem}

# The same for every adapter and for the final fine-tune: fields of TRL's SFTConfig and ModelConfig.
# Without lora_target_modules, adapters are on PEFT's default layers of the model's family, or on all linear ones.
{yaml.safe_dump(settings, sort_keys=False).strip()}

# name: what load_dataset takes. Rows have {COLUMNS[task]}; rename with columns: {{theirs: ours}}.
# Also: max_examples, split, where: {{column: value}}, split_by: column, license, cost, required, excluded.
candidates:
{candidates}

targets:
  {quoted(target)}:
    {entry}

# strategy: auto           # needed for more than 16 candidates; how to search, see m2m select --help
# fine_tunes: 0            # choose by averages alone; by default three mixtures are really fine-tuned first
# objective: trained       # really fine-tune all that are scored: dear, and the truth; max_trials bounds how many
{lost}"""


def flow(value: Any) -> str:
    """A value on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{flow(key)}: {flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, str) and "\n" in value:
        return json.dumps(value)
    return yaml.safe_dump([value], default_flow_style=True, width=10_000).strip()[1:-1]


def quoted(name: str) -> str:
    """A name as a key; YAML would read 2024 or no as something else."""
    return name if yaml.safe_load(name) == name else json.dumps(name)


def read_trainer_config(path: Path) -> Draft:
    """Reads a configuration that was written for TRL, axolotl or LLaMA-Factory."""
    try:
        config = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"--from {path}: cannot be read ({error})") from error
    reader = None
    if isinstance(config, Mapping):
        if "base_model" in config:
            reader = from_axolotl
        elif "model_name_or_path" in config and "dataset" in config:
            reader = from_llamafactory
        elif "datasets" in config or "dataset_name" in config:
            reader = from_trl
    try:
        if reader:
            return reader(config, path.parent)
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(
            f"--from {path}: is not shaped as its trainer reads it ({error}); expected one that trains there"
        ) from error
    raise InputError(
        f"--from {path}: expected a configuration of TRL (datasets:), axolotl (base_model:) or LLaMA-Factory (dataset:)"
    )


def leave_out(name: str, source: Source, present: set[str]) -> list[str]:
    """Renames columns of a conversation that the other trainer is not told to read, and names them: a run would refuse them."""
    from m2m_hf.data.conversations import UNREAD  # slow to import

    names, texts = source.get("columns", {}), "".join(source.get("template", {}).values())
    read = set() if {"messages", "prompt"} & {*present, *names.values()} else {"conversations"}
    rest = sorted(present & {*UNREAD} - names.keys() - read)
    rest = [column for column in rest if f"{{{column}}}" not in texts]
    renamed(source, {column: f"unused_{column}" for column in rest})
    lost = [f"{name}.{column}, which is renamed to unused_{column}" for column in rest]
    return lost + ([f"in {name} prompts without the line end before an empty column"] if "}\n{" in texts else [])
