"""`m2m init`: writes a configuration that runs."""

import csv
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from m2m_hf.config.checks import check_name, resolve_existing
from m2m_hf.config.trainer_configs import Draft, named
from m2m_hf.errors import InputError

SCORERS = ("choice", "classification", "loss", "generation")


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
