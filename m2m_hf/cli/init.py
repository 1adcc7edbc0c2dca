"""`m2m init`: writes a configuration that runs, from answers or from a configuration of TRL, axolotl or LLaMA-Factory."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from m2m_hf.cli.sources import SUFFIXES, Source, parse_source, parse_sources, read_columns, relocate
from m2m_hf.config.checks import BUILDERS, check_name
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
MESSAGE_NAMES = (("role", "content"), ("from", "value"))  # of messages, as rows may have them
DATA_KEYS = ("path", "name", "data_dir", "data_files", "split", "revision")
SAME = (
    "lora_alpha", "lora_dropout", "learning_rate", "max_steps", "gradient_accumulation_steps", "weight_decay", "seed",
    "max_grad_norm", "warmup_steps", "neftune_noise_alpha",
)  # fmt: skip
AXOLOTL = dict(zip(SAME, SAME, strict=True)) | {  # theirs -> ours
    "lora_r": "lora_r", "lora_target_modules": "lora_target_modules", "num_epochs": "num_train_epochs",
    "micro_batch_size": "per_device_train_batch_size", "sequence_len": "max_length", "lr_scheduler": "lr_scheduler_type",
    "load_in_4bit": "load_in_4bit", "load_in_8bit": "load_in_8bit", "sample_packing": "packing",
    "warmup_ratio": "warmup_steps", "peft_use_rslora": "use_rslora",
}  # fmt: skip
FACTORY = dict(zip(SAME, SAME, strict=True)) | {
    "lora_rank": "lora_r", "num_train_epochs": "num_train_epochs", "cutoff_len": "max_length", "packing": "packing",
    "per_device_train_batch_size": "per_device_train_batch_size", "lr_scheduler_type": "lr_scheduler_type",
    "warmup_ratio": "warmup_steps", "use_rslora": "use_rslora", "optim": "optim",
}  # fmt: skip
TRL_DEFAULTS = {"lora_r": 16, "lora_alpha": 32, "learning_rate": 2.0e-5, "num_train_epochs": 3}
FACTORY_DEFAULTS = {"lora_r": 8, "learning_rate": 5.0e-5, "num_train_epochs": 3.0}
TRL_REPLACED = {
    "datasets", "dataset_name", "dataset_config", "dataset_train_split", "dataset_text_field", "model_name_or_path", "use_peft",
}  # fmt: skip
TRL_LOST = {"output_dir", "eval_strategy", "eval_steps", "push_to_hub", "hub_model_id"}
WHOLE = "full fine-tuning (here adapters; expert: full trains all parameters)"
AXOLOTL_MESSAGES = {
    "type", "field_messages", "field_tools", "message_property_mappings", "message_field_role", "message_field_content",
}  # fmt: skip
AXOLOTL_REPLACED = {"lora_target_linear", "base_model", "datasets", "adapter"}
FACTORY_REPLACED = {
    "model_name_or_path", "dataset", "dataset_dir", "lora_target", "stage", "do_train", "finetuning_type",
}  # fmt: skip

CONVERSATIONS = ("sharegpt", "openai")  # formats of LLaMA-Factory
FACTORY_COLUMNS = ("prompt", "query", "response", "system", "messages", "tools")


@dataclass
class Draft:
    """A configuration in the making."""

    model: str = ""
    candidates: dict[str, Source] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)  # fields of TRL's configurations
    lost: list[str] = field(default_factory=list)  # fields of the other trainer that have no counterpart


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
        given = {"--model": draft.model, "--data": draft.candidates, "--target": command.target}
        if missing := [flag for flag, value in given.items() if not value]:
            raise InputError(f"{' and '.join(missing)}: nothing given, and nobody to ask; see m2m init --help")
    if not draft.model:
        draft.model = ask("1. Which model? A Hub id or a folder", "HuggingFaceTB/SmolLM2-135M-Instruct")
    if not draft.candidates:
        answer = ask("2. Which candidate datasets? Files, folders or Hub ids, separated by commas", "a.jsonl, b.jsonl")
        draft.candidates = parse_sources(part.strip() for part in answer.split(",") if part.strip())
    question = "3. Validation rows of the task that you care about? A file or a Hub id"
    target, rows = parse_source(command.target or ask(question, "validation.jsonl"))
    guess, task = guess_scorer(rows)
    scorer = command.scorer or ask(f"4. How is it scored? {', '.join(SCORED)}", guess)
    if scorer not in SCORED:
        raise InputError(f"--scorer: expected {', '.join(SCORED)}, got {scorer!r}")
    for name in (*draft.candidates, target):
        check_name(name, "candidate or target")
    origin = command.origin.parent if command.origin else Path.cwd()
    draft.candidates = {name: relocate(source, origin, output.parent) for name, source in draft.candidates.items()}
    rows = relocate(rows, Path.cwd(), output.parent)
    if task is None:
        read = {name: read_columns(relocate(one, output.parent, Path.cwd())) for name, one in draft.candidates.items()}
        draft.lost += [
            f"{name}, whose rows have {', '.join(sorted(has))}: they need {COLUMNS[None]}"
            for name, has in read.items()
            if has and not fits(draft.candidates[name], has)
        ]
    output.parent.mkdir(parents=True, exist_ok=True)
    text = write_config(draft, target, rows, scorer, task if scorer == "classification" else None, output)
    output.write_text(text, encoding="utf-8")
    if draft.lost:
        Terminal().say(f"not taken over, as {output} says: {'; '.join(draft.lost)}")
    Terminal().say(f"written: {output}; continue with: m2m select --config {output}")


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
    if "label" not in columns:
        return "loss", None
    if "prompt" in columns or not columns & {"text", "image"}:
        return "classification", None
    return "classification", "sequence_classification" if "text" in columns else "image_classification"


def write_config(draft: Draft, target: str, rows: Source, scorer: str, task: str | None, output: Path) -> str:
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
    data: {flow(rows)}
    # test_data: {{...}}       # sealed: scored once, at the end
    scorer: {scorer}

# strategy: auto           # needed for more than 16 candidates; how to search, see m2m select --help
# verify_top_k: 3          # really fine-tune the best three before choosing
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


def from_trl(config: Mapping[str, Any], folder: Path) -> Draft:
    from m2m_hf.config.parsing import FORMER, TRL_KEYS, UNSUPPORTED  # slow to import

    one = {"path": config.get("dataset_name"), "name": config.get("dataset_config")}
    datasets = config.get("datasets") or [one | {"split": config.get("dataset_train_split")}]
    model = str(config.get("model_name_or_path") or "")
    text, candidates = config.get("dataset_text_field") or "text", read_datasets(datasets)
    settings, lost = {}, [] if config.get("use_peft") else [WHOLE]
    for key, value in config.items():
        name = FORMER.get(key, key)
        if name in TRL_KEYS and name not in {*TRL_REPLACED, *TRL_LOST, *UNSUPPORTED}:
            settings[name] = value
        elif key not in TRL_REPLACED and value:
            lost.append(key)
    lost += [f"datasets.{key}" for entry in datasets for key in entry if key not in (*DATA_KEYS, "columns")]
    for source in candidates.values():
        present = read_columns(relocate(source, folder, Path.cwd()))
        if text in present and not present & {"prompt", "messages", "conversations", "label"}:
            whole_text(source, text)
    return Draft(model, candidates, TRL_DEFAULTS | settings, sorted(lost))


def from_axolotl(config: Mapping[str, Any], folder: Path) -> Draft:
    datasets = config.get("datasets") or []
    candidates = read_datasets(datasets)
    lost = said(config) - {*AXOLOTL, *AXOLOTL_REPLACED} | (
        set() if config.get("adapter") in ("lora", "qlora") else {WHOLE}
    )
    for entry, (name, source) in zip(datasets, candidates.items(), strict=True):
        taken = read_axolotl_rows(entry, name, source, read_columns(relocate(source, folder, Path.cwd())))
        lost |= {f"datasets.{key}" for key in entry if key not in (*DATA_KEYS, "ds_type", *taken)}
        lost |= {earlier_answers(name)} if taken is AXOLOTL_MESSAGES else set()
    settings = translate(config, AXOLOTL)
    if config.get("lora_target_linear"):
        settings.setdefault("lora_target_modules", "all-linear")
    return Draft(str(config["base_model"] or ""), candidates, settings, sorted(lost))


def read_axolotl_rows(entry: Mapping[str, Any], name: str, source: Source, present: set[str]) -> set[str]:
    """Puts into `source` how rows of axolotl become ours; returns the keys of `entry` that say no more than that."""
    kind = entry.get("type")
    if kind in ("chat_template", "sharegpt"):
        old = {"role": entry.get("message_field_role"), "content": entry.get("message_field_content")}
        names = dict(zip(("role", "content"), MESSAGE_NAMES[kind == "sharegpt"], strict=True))
        names |= {key: value for key, value in old.items() if value} | (entry.get("message_property_mappings") or {})
        check_message_names(name, names)
        messages = entry.get("field_messages") or ("conversations" if kind == "sharegpt" else "messages")
        renamed(source, {messages: "messages", entry.get("field_tools") or "tools": "tools"})
        return AXOLOTL_MESSAGES
    if kind == "completion":
        whole_text(source, entry.get("field") or "text")
        return {"type", "field"}
    if kind == "alpaca" and (not present or "instruction" in present):  # of which the words around the prompt are lost
        instructions(source, ["instruction", "input"], "output", present)
    if isinstance(kind, Mapping) and not {"system_prompt", "field_system"} & kind.keys() and "system" not in present:
        names = {key: kind.get(f"field_{key}") or key for key in ("instruction", "input", "output")}
        has_input = names["input"] in present or (not present and "field_input" in kind)
        text = kind.get(*(("format", "{instruction} {input} ") if has_input else ("no_input_format", "{instruction} ")))
        for key in ("instruction", "input"):
            text = text.replace(f"{{{key}}}", f"{{{names[key]}}}")
        instructions(source, [names["instruction"]], names["output"], present, text)
        return {"type"}
    return set()


def check_message_names(name: str, names: Mapping[str, str]) -> None:
    """Refuses messages that are neither of role and content nor of from and value."""
    role, content = names.get("role"), names.get("content")
    others = {key: value for key, value in names.items() if key not in ("role", "content") and key != value}
    if (role, content) not in MESSAGE_NAMES or others:
        raise InputError(
            f"dataset {name}: expected messages of role and content, or of from and value, got {dict(names)}; rename the fields "
            "in its rows, and give them with --data"
        )


def instructions(source: Source, asked: Sequence[str], answer: str, present: set[str], text: str = "") -> None:
    """Makes a prompt of the columns `asked`, or a template, and a completion of `answer`. `present`: all columns, if known."""
    asked = [column for column in asked if not present or column in present]
    if not asked:
        return
    text = text or "\n".join(f"{{{column}}}" for column in asked)
    if text == f"{{{asked[0]}}}":
        renamed(source, {asked[0]: "prompt"})
    else:
        source |= {"template": {"prompt": text}, "columns": {"null": ""}}  # an input may be missing
    renamed(source, {answer: "completion"})


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


def whole_text(source: Source, column: str) -> None:
    """Trains on all of a text, without a prompt."""
    source["template"] = {"prompt": ""}
    renamed(source, {column: "completion"})


def renamed(source: Source, names: Mapping[str, str]) -> None:
    """Adds to `columns` what is called otherwise."""
    if changed := {theirs: ours for theirs, ours in names.items() if theirs != ours}:
        source["columns"] = source.get("columns", {}) | changed


def earlier_answers(name: str) -> str:
    """What others train on, and TRL only with a field."""
    return f"the earlier answers of conversations in {name} (assistant_only_loss: true trains on all)"


def from_llamafactory(config: Mapping[str, Any], folder: Path) -> Draft:
    settings = FACTORY_DEFAULTS | translate(config, FACTORY)
    settings.setdefault("lora_alpha", 2 * settings["lora_r"])
    modules = config.get("lora_target")
    if isinstance(modules, str) and modules != "all":
        settings["lora_target_modules"] = [module.strip() for module in modules.split(",")]
    elif modules:
        settings["lora_target_modules"] = "all-linear"
    draft = Draft(str(config["model_name_or_path"]), settings=settings)
    draft.lost = sorted(said(config) - {*FACTORY, *FACTORY_REPLACED})
    draft.lost += [] if config.get("finetuning_type", "lora") == "lora" else [WHOLE]
    stage = config.get("stage") or "sft"
    draft.lost += [] if stage in ("sft", "pt") else [f"stage: {stage}"]
    index, info = read_dataset_info(str(config.get("dataset_dir") or "data"), folder)
    names = config.get("dataset") or []
    for name in [name.strip() for name in names.split(",")] if isinstance(names, str) else names:
        entry = info.get(name)
        if not isinstance(entry, Mapping):
            raise InputError(f"dataset: {name!r} is not in {index}; it has {', '.join(info)}")
        draft.candidates[parse_source(name)[0]] = read_dataset_entry(name, entry, index.parent, stage)
        columns = entry.get("columns") or {}
        draft.lost += [f"{name}.columns.{key}" for key in columns if key not in FACTORY_COLUMNS]
        draft.lost += [f"{name}.{key}" for key in entry if key in ("folder", "ranking")]
        draft.lost += [earlier_answers(name)] if entry.get("formatting") in CONVERSATIONS else []
    return draft


def said(config: Mapping[str, Any]) -> set[str]:
    """The keys that say something."""
    return {key for key, value in config.items() if value not in (None, False)}


def translate(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {ours: config[theirs] for theirs, ours in names.items() if config.get(theirs) is not None}


def read_datasets(datasets: Any) -> dict[str, Source]:
    """Candidates from a list of TRL or axolotl: mappings with `path`, and `data_files` and the like."""
    candidates: dict[str, Source] = {}
    for entry in datasets:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str):
            raise InputError(f"datasets: expected entries with a path, got {entry!r}")
        source = {key: entry[key] for key in DATA_KEYS if entry.get(key)}
        path = str(entry["path"])
        if path not in BUILDERS and Path(path).suffix in SUFFIXES:
            source = {"path": entry.get("ds_type") or SUFFIXES[Path(path).suffix], "data_files": path}
        files = source.get("data_files") or path
        base = name = parse_source(str(files[0] if isinstance(files, list) else files))[0]
        number = 2
        while name in candidates:
            name, number = f"{base}_{number}", number + 1
        candidates[name] = source
    return candidates


def read_dataset_info(name: str, folder: Path) -> tuple[Path, Any]:
    """LLaMA-Factory's `dataset_info.json`, its path and content; its own examples name it from where it is started."""
    index = folder / name / "dataset_info.json"
    if not index.exists():
        index = Path(name).absolute() / "dataset_info.json"
    try:
        return index, json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"dataset_dir: expected {index} ({error})") from error


def read_dataset_entry(name: str, entry: Mapping[str, Any], folder: Path, stage: str) -> Source:
    """What load_dataset takes, from an entry of `dataset_info.json`."""
    file = entry.get("file_name")
    if not file and not entry.get("hf_hub_url"):
        raise InputError(
            f"dataset {name}: expected file_name or hf_hub_url, got {', '.join(entry) or 'nothing'}; fetch its rows, and give "
            "them with --data"
        )
    source = parse_source(str(folder / file))[1] if file else {"path": entry["hf_hub_url"]}
    columns = entry.get("columns") or {}
    conversations = entry.get("formatting") in CONVERSATIONS
    for key in ("history", *(["system"] if conversations else ["tools"])):
        if columns.get(key):
            raise InputError(
                f"dataset {name}: its {key}, the column {columns[key]!r}, belongs into a conversation; expected rows of "
                "messages. Put it there, and give the new rows with --data"
            )
    source |= {"name": entry.get("subset"), "split": entry.get("split"), "max_examples": entry.get("num_samples")}
    if stage == "pt":
        whole_text(source, columns.get("prompt", "text"))
    elif conversations:
        check_tags(name, entry.get("tags") or {})
        renamed(source, {columns.get("messages", "conversations"): "messages", columns.get("tools", "tools"): "tools"})
    else:
        query = columns.get("query") if columns else "input"
        asked = [columns.get("system"), columns.get("prompt", "instruction"), query]
        names = [column for column in asked if column]
        instructions(source, names, columns.get("response", "output"), read_columns(source))
    return {key: value for key, value in source.items() if value}


def check_tags(name: str, tags: Mapping[str, str]) -> None:
    """Refuses tags that are neither those of ShareGPT nor those of OpenAI."""
    names = {"role": tags.get("role_tag", "from"), "content": tags.get("content_tag", "value")}
    check_message_names(name, names)
    roles = {
        "user": "user",
        "assistant": "assistant",
        "system": "system",
        "observation": "tool",
        "function": "assistant",
    }
    from m2m_hf.data.conversations import ROLES  # slow to import

    for key, role in roles.items():
        tag = tags.get(f"{key}_tag", role)
        if tag != role and (names["role"] == "role" or ROLES.get(tag) != role):
            raise InputError(f"dataset {name}: expected {key}_tag: {role}, got {tag!r}; rename it in its rows")
