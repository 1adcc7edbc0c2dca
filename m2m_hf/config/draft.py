"""`m2m init`: a configuration that runs, from four answers, or from one that was written for another trainer."""

import csv
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from m2m_hf.config.entries import BUILDERS, check_name, resolve_existing
from m2m_hf.errors import InputError

SUFFIXES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text", ".arrow": "arrow"}
SCORERS = ("choice", "classification", "loss", "generation")


@dataclass
class Draft:
    """What a configuration is made of.

    Args:
        model: a Hub id or a local folder.
        candidates: name -> what load_dataset takes.
        target: name and what load_dataset takes.
        scorer: one of `SCORERS`.
        settings: fields of TRL's configurations.
        lost: fields of the configuration that this was made from, which have no counterpart.
        task: one that is not a language model's.
    """

    model: str = ""
    candidates: dict[str, dict[str, Any]] = field(default_factory=dict)
    target: tuple[str, dict[str, Any]] | None = None
    scorer: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    task: str | None = None


def named(source: str) -> tuple[str, dict[str, Any]]:
    """(a name, what load_dataset takes) of `name=source` or `source`: a file, a folder, or a Hub id."""
    name, given, path = source.rpartition("=")
    if not given:
        name, path = "", source
    file = Path(path)
    builder = SUFFIXES.get(file.suffix.lower())
    made: dict[str, Any] = {"path": builder, "data_files": path} if builder else {"path": path}
    name = (
        name or re.sub(r"[^A-Za-z0-9_-]", "_", file.stem if builder else path.rsplit("/", 1)[-1]).strip("_-") or "data"
    )
    return name[:64], made


def all_named(sources: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Candidates by name.

    Raises:
        InputError: two of one name.
    """
    found: dict[str, dict[str, Any]] = {}
    for source in sources:
        name, given = named(source)
        if name in found:
            raise InputError(
                f"--data: two candidates would be called {name!r}; name them: {name}_2={source.rpartition('=')[2]}"
            )
        found[name] = given
    return found


def columns_of(source: Mapping[str, Any], folder: Path) -> set[str]:
    """The columns of local data, as datasets reads them; none where that cannot be told."""
    path = folder / str(source.get("data_files") or source["path"])
    if not path.exists():
        return set()
    import datasets  # only now: it takes a second

    given = {"path": source["path"], "data_files": str(path)} if "data_files" in source else {"path": str(path)}
    try:
        if source["path"] == "csv":
            with open(path, encoding="utf-8", newline="") as file:
                return set(next(csv.reader(file)))
        if (path / "state.json").exists():
            return set(datasets.load_from_disk(str(path)).column_names)
        # As a stream: of large files the first rows are enough.
        return set(next(iter(datasets.load_dataset(**given, split=source.get("split", "train"), streaming=True))))
    except Exception:  # whatever it makes of what is there; a search says more of it
        return set()


def guess_scorer(source: Mapping[str, Any], folder: Path) -> tuple[str, str | None]:
    """The scorer that local rows ask for, `loss` where they do not tell; and their task, if it is not a language model's."""
    columns = columns_of(source, folder)
    if "choices" in columns:
        return "choice", None
    tasks = {"text": "sequence_classification", "image": "image_classification"}
    task = next((task for content, task in tasks.items() if content in columns and "prompt" not in columns), None)
    return ("classification", task) if "label" in columns else ("loss", None)


AXOLOTL = {
    "lora_r": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "lora_target_modules": "lora_target_modules",
    "learning_rate": "learning_rate", "num_epochs": "num_train_epochs", "max_steps": "max_steps",
    "micro_batch_size": "per_device_train_batch_size", "gradient_accumulation_steps": "gradient_accumulation_steps",
    "sequence_len": "max_length", "lr_scheduler": "lr_scheduler_type", "weight_decay": "weight_decay", "seed": "seed",
    "load_in_4bit": "load_in_4bit", "load_in_8bit": "load_in_8bit", "sample_packing": "packing",
}  # fmt: skip
FACTORY = {
    "lora_rank": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "learning_rate": "learning_rate",
    "num_train_epochs": "num_train_epochs", "max_steps": "max_steps", "cutoff_len": "max_length", "seed": "seed",
    "per_device_train_batch_size": "per_device_train_batch_size", "weight_decay": "weight_decay", "packing": "packing",
    "gradient_accumulation_steps": "gradient_accumulation_steps", "lr_scheduler_type": "lr_scheduler_type",
}  # fmt: skip


def translated(given: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {ours: given[theirs] for theirs, ours in names.items() if given.get(theirs) is not None}


def entries(datasets: Any) -> dict[str, dict[str, Any]]:
    """Candidates of a list as TRL and axolotl have it: mappings with `path`, and `data_files` and the like."""
    found: dict[str, dict[str, Any]] = {}
    for one in datasets:
        if not isinstance(one, Mapping) or not one.get("path"):
            raise InputError(f"datasets: expected entries with a path, got {one!r}")
        source = {
            key: one[key] for key in ("path", "name", "data_dir", "data_files", "split", "revision") if one.get(key)
        }
        path = str(one["path"])
        if path not in BUILDERS and Path(path).suffix in SUFFIXES:
            source = {"path": one.get("ds_type") or SUFFIXES[Path(path).suffix], "data_files": path}
        files = source.get("data_files")
        first = files[0] if isinstance(files, list) else files
        name = base = named(str(first or source["path"]))[0]
        number = 1
        while name in found:
            number += 1
            name = f"{base}_{number}"
        found[name] = source
    return found


def from_trl(given: Mapping[str, Any], folder: Path) -> Draft:
    if "datasets" in given:
        candidates = entries(given["datasets"])
    else:
        candidates = entries([{"path": given["dataset_name"], "name": given.get("dataset_config")}])
    apart = {"datasets", "dataset_name", "dataset_config", "model_name_or_path", "use_peft"}
    dropped = {
        "output_dir", "eval_strategy", "eval_steps", "test_split_size", "streaming", "push_to_hub", "hub_model_id", "env",
        "dataset_train_split", "dataset_test_split",
    }  # fmt: skip
    settings = {"lora_r": 16, "lora_alpha": 32, "learning_rate": 2.0e-5, "num_train_epochs": 3}  # TRL's defaults
    settings |= {key: value for key, value in given.items() if key not in apart | dropped}
    return Draft(
        str(given.get("model_name_or_path") or ""), candidates, None, "", settings, sorted(dropped & set(given))
    )


def from_axolotl(given: Mapping[str, Any], folder: Path) -> Draft:
    read = ("path", "name", "data_dir", "data_files", "split", "revision", "ds_type")
    unread = {f"datasets.{key}" for one in given.get("datasets") or [] for key in one if key not in read}
    known = {*AXOLOTL, "base_model", "datasets", "adapter"}
    return Draft(
        str(given["base_model"]), entries(given.get("datasets") or []), None, "", translated(given, AXOLOTL),
        sorted((set(given) - known) | unread),
    )  # fmt: skip


def from_llamafactory(given: Mapping[str, Any], folder: Path) -> Draft:
    place = folder / str(given.get("dataset_dir") or "data")
    if not (place / "dataset_info.json").exists():  # its own examples name it from where it is started
        place = Path(str(given.get("dataset_dir") or "data")).absolute()
    try:
        info = json.loads((place / "dataset_info.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"dataset_dir: expected {place / 'dataset_info.json'} ({error})") from error
    candidates = {}
    lost: list[str] = []
    names = given.get("dataset") or []
    for name in [one.strip() for one in names.split(",")] if isinstance(names, str) else names:
        about = info.get(name)
        if not isinstance(about, Mapping):
            raise InputError(f"dataset: {name!r} is not in {place / 'dataset_info.json'}; it has {', '.join(info)}")
        local = about.get("file_name")
        source = named(str(place / local))[1] if local else {"path": about.get("hf_hub_url") or name}
        columns = about.get("columns") or {}
        renames = {columns.get("prompt", "instruction"): "prompt", columns.get("response", "output"): "completion"}
        if about.get("formatting") in ("sharegpt", "openai"):
            renames = {columns.get("messages", "conversations"): "messages"}
        for theirs, ours in (("subset", "name"), ("split", "split"), ("num_samples", "max_examples")):
            if about.get(theirs):
                source[ours] = about[theirs]
        kept = {"prompt", "response", "messages"}
        lost += [f"{name}.columns.{one}" for one in columns if one not in kept]
        lost += [f"{name}.{one}" for one in about if one in ("folder", "tags", "ranking")]
        source["columns"] = {theirs: ours for theirs, ours in renames.items() if theirs != ours}
        candidates[named(name)[0]] = {key: value for key, value in source.items() if value}
    settings = {"lora_r": 8, "learning_rate": 5.0e-5, "num_train_epochs": 3.0} | translated(
        given, FACTORY
    )  # its defaults
    settings.setdefault("lora_alpha", 2 * settings["lora_r"])
    targets = given.get("lora_target")
    if isinstance(targets, str) and targets != "all":
        settings["lora_target_modules"] = [one.strip() for one in targets.split(",")]
    elif targets:
        settings["lora_target_modules"] = "all-linear"
    known = {
        *FACTORY,
        "model_name_or_path",
        "dataset",
        "dataset_dir",
        "lora_target",
        "stage",
        "do_train",
        "finetuning_type",
    }
    return Draft(str(given["model_name_or_path"]), candidates, None, "", settings, [*sorted(set(given) - known), *lost])


def read_other(path: Path) -> Draft:
    """The draft of a configuration that was written for TRL, axolotl or LLaMA-Factory.

    Raises:
        InputError: it is none of them.
    """
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"--from {path}: cannot be read ({error})") from error
    if isinstance(given, Mapping):
        if "base_model" in given:
            return from_axolotl(given, path.parent)
        if "model_name_or_path" in given and "dataset" in given:
            return from_llamafactory(given, path.parent)
        if "datasets" in given or "dataset_name" in given:
            return from_trl(given, path.parent)
    raise InputError(
        f"--from {path}: expected a configuration of TRL (datasets:), axolotl (base_model:) or LLaMA-Factory (dataset:)"
    )


def ask(draft: Draft, question: Callable[[str, str], str] | None, folder: Path) -> None:
    """Fills in what is missing of a draft.

    Args:
        question: asks (a question, a default answer); None where nobody can be asked.

    Raises:
        InputError: nobody can be asked.
    """
    missing = [
        flag
        for flag, known in (("--model", draft.model), ("--data", draft.candidates), ("--target", draft.target))
        if not known
    ]
    if question is None:
        if missing:
            raise InputError(f"{' and '.join(missing)}: nothing given, and nobody to ask; see m2m init --help")
    else:
        if not draft.model:
            draft.model = question("1. Which model? a Hub id or a folder", "HuggingFaceTB/SmolLM2-135M-Instruct")
        if not draft.candidates:
            answer = question(
                "2. Which candidate datasets? files, folders or Hub ids, with commas between", "a.jsonl, b.jsonl"
            )
            draft.candidates = all_named(one.strip() for one in answer.split(",") if one.strip())
        if draft.target is None:
            draft.target = named(
                question("3. Validation rows of the task that you care about? a file or a Hub id", "validation.jsonl")
            )
    assert draft.target is not None
    guess, task = guess_scorer(draft.target[1], folder)
    if not draft.scorer:
        draft.scorer = question(f"4. How is it scored? {', '.join(SCORERS)}", guess) if question else guess
    if draft.scorer not in SCORERS:
        raise InputError(f"--scorer: expected {', '.join(SCORERS)}, got {draft.scorer!r}")
    draft.task = task if draft.scorer == "classification" else None
    for name in (*draft.candidates, draft.target[0]):
        check_name(name, "candidate or target")


def relocated(source: Mapping[str, Any], origin: Path, folder: Path) -> dict[str, Any]:
    """`source` with local paths, seen from `origin` or the working directory, as seen from `folder`."""

    def moved(path: str) -> str:
        there = resolve_existing(path, origin)
        return os.path.relpath(there, folder.absolute()) if os.path.isabs(there) and not os.path.isabs(path) else path

    found = dict(source)
    for key in ("path", "data_dir", "data_files"):
        if isinstance(found.get(key), str):
            found[key] = moved(found[key])
        elif isinstance(found.get(key), list):
            found[key] = [moved(str(one)) for one in found[key]]
    return found


def configuration(draft: Draft, name: str) -> str:
    """The YAML, with comments that tell what may be changed."""
    assert draft.target is not None

    def shown(value: Mapping[str, Any]) -> str:
        return yaml.safe_dump(dict(value), default_flow_style=True, sort_keys=False, width=10_000).strip()

    def key(name: str) -> str:
        return name if yaml.safe_load(name) == name else json.dumps(name)  # 2024 and no would be something else

    settings = {"lora_r": 16, "lora_alpha": 32, "learning_rate": 2.0e-4, "num_train_epochs": 1}
    settings |= ({"lora_target_modules": "all-linear"} if draft.task else {}) | draft.settings
    rows = {"sequence_classification": "text and label", "image_classification": "image and label"}.get(
        draft.task or "", "prompt and completion, or messages"
    )
    if draft.settings.get("max_steps", -1) > 0:
        settings.pop("num_train_epochs")
    target, source = draft.target
    lines = [
        f"# Which of these datasets belong in the mixture? m2m select --config {name}",
        f"model_name_or_path: {json.dumps(draft.model)}",
        *([f"task: {draft.task}"] if draft.task else []),
        f"output_dir: runs/{Path(name).stem}",
        "",
        "# The same for every adapter and for the final fine-tune: fields of TRL's SFTConfig and ModelConfig.",
        yaml.safe_dump(settings, sort_keys=False).strip(),
        "",
        f"# name: what load_dataset takes. Rows have {rows}; rename with columns: {{theirs: ours}}.",
        "# Also: max_examples, split, where: {column: value}, split_by: column, license, cost, required, excluded.",
        "candidates:",
        *(f"  {key(one)}: {shown(given)}" for one, given in draft.candidates.items()),
        "",
        "targets:",
        f"  {key(target)}:",
        f"    data: {shown(source)}",
        "    # test_data: {...}       # sealed: scored once, at the end",
        f"    scorer: {draft.scorer}",
        "",
        "# strategy: auto           # needed for more than 16 candidates; how to search, see m2m select --help",
        "# verify_top_k: 3          # really fine-tune the best three before choosing",
    ]
    if draft.lost:
        lines += ["", f"# Not taken over: {', '.join(draft.lost)}"]
    return "\n".join(lines) + "\n"


def init(draft: Draft, output: Path, question: Callable[[str, str], str] | None, origin: Path = Path()) -> None:
    """Writes a configuration.

    Args:
        origin: what paths in the draft are relative to.

    Raises:
        InputError: the file is there already, or answers are missing.
    """
    if output.exists():
        raise InputError(f"--output: {output} is there already; choose another name")
    ask(draft, question, Path.cwd())
    assert draft.target is not None
    draft.candidates = {name: relocated(one, origin, output.parent) for name, one in draft.candidates.items()}
    draft.target = draft.target[0], relocated(draft.target[1], Path.cwd(), output.parent)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(configuration(draft, str(output)), encoding="utf-8")
