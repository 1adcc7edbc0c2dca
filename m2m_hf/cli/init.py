"""`m2m init`: writes a configuration that runs."""

import csv
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import yaml

from m2m_hf.config.checks import check_name, exists, resolve_existing
from m2m_hf.config.trainer_configs import Draft, Source, parse_source
from m2m_hf.errors import InputError

SCORERS = ("choice", "classification", "loss", "generation")
COLUMNS = {
    "sequence_classification": "text and label",
    "image_classification": "image and label",
    None: "prompt and completion, or messages",
}
Ask = Callable[[str, str], str]  # (question, default answer) -> answer


def init(draft: Draft, output: Path, ask: Ask | None, origin: Path = Path()) -> None:
    """Completes a draft and writes it as a configuration.

    Args:
        ask: asks a question; None where nobody can answer.
        origin: the folder that paths in the draft are relative to.

    Raises:
        InputError: the file exists already, or answers are missing.
    """
    if output.exists():
        raise InputError(f"--output: {output} exists already; choose another name")
    name, source = complete(draft, ask, Path.cwd())
    draft.candidates = {key: relocate(candidate, origin, output.parent) for key, candidate in draft.candidates.items()}
    draft.target = name, relocate(source, Path.cwd(), output.parent)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(write_config(draft, *draft.target, output), encoding="utf-8")


def parse_sources(texts: Iterable[str]) -> dict[str, Source]:
    """Candidates by name.

    Raises:
        InputError: two of one name.
    """
    candidates: dict[str, Source] = {}
    for text in texts:
        name, source = parse_source(text)
        if name in candidates:
            raise InputError(
                f"--data: two candidates would be called {name!r}; name them: {name}_2={text.rpartition('=')[2]}"
            )
        candidates[name] = source
    return candidates


def complete(draft: Draft, ask: Ask | None, folder: Path) -> tuple[str, Source]:
    """Fills in what a draft lacks, and returns its target.

    Raises:
        InputError: something is missing, and nobody can be asked.
    """
    if ask is None:
        needed = {"--model": draft.model, "--data": draft.candidates, "--target": draft.target}
        missing = [flag for flag, value in needed.items() if not value]
        if missing:
            raise InputError(f"{' and '.join(missing)}: nothing given, and nobody to ask; see m2m init --help")
        ask = take_default
    if not draft.model:
        draft.model = ask("1. Which model? A Hub id or a folder", "HuggingFaceTB/SmolLM2-135M-Instruct")
    if not draft.candidates:
        answer = ask("2. Which candidate datasets? Files, folders or Hub ids, separated by commas", "a.jsonl, b.jsonl")
        draft.candidates = parse_sources(part.strip() for part in answer.split(",") if part.strip())
    target = draft.target or parse_source(
        ask("3. Validation rows of the task that you care about? A file or a Hub id", "validation.jsonl")
    )
    scorer, task = guess_scorer(target[1], folder)
    draft.scorer = draft.scorer or ask(f"4. How is it scored? {', '.join(SCORERS)}", scorer)
    if draft.scorer not in SCORERS:
        raise InputError(f"--scorer: expected {', '.join(SCORERS)}, got {draft.scorer!r}")
    draft.task = task if draft.scorer == "classification" else None
    for name in (*draft.candidates, target[0]):
        check_name(name, "candidate or target")
    return target


def take_default(question: str, default: str) -> str:
    return default


def guess_scorer(source: Source, folder: Path) -> tuple[str, str | None]:
    """The scorer that fits local rows, `loss` if unknown; and their task, if it is not a language model's."""
    columns = read_columns(source, folder)
    if "choices" in columns:
        return "choice", None
    if "label" not in columns:
        return "loss", None
    if "prompt" in columns or not columns & {"text", "image"}:
        return "classification", None
    return "classification", "sequence_classification" if "text" in columns else "image_classification"


def read_columns(source: Source, folder: Path) -> set[str]:
    """The columns of local data as datasets reads them; none if they cannot be read."""
    path = folder / str(source.get("data_files") or source["path"])
    if not exists(path):
        return set()
    try:
        if source["path"] == "csv":
            with open(path, encoding="utf-8", newline="") as file:
                return set(next(csv.reader(file)))
        if source["path"] == "json" and path.suffix == ".jsonl":
            with open(path, encoding="utf-8") as file:
                return set(json.loads(file.readline()))
        import datasets

        if (path / "state.json").exists():
            return set(datasets.load_from_disk(str(path)).column_names)
        place = {"path": source["path"], "data_files": str(path)} if "data_files" in source else {"path": str(path)}
        rows = datasets.load_dataset(**place, split=source.get("split", "train"), streaming=True)
        return set(next(iter(rows)))
    except Exception:  # datasets may raise anything over a file; the search will name the reason
        return set()


def relocate(source: Source, origin: Path, folder: Path) -> Source:
    """`source` with local paths as seen from `folder`; now they are relative to `origin` or the working directory."""

    def moved(path: str) -> str:
        resolved = resolve_existing(path, origin)
        if os.path.isabs(path) or not os.path.isabs(resolved):
            return path
        return os.path.relpath(resolved, folder.absolute())

    places = {key: source[key] for key in ("path", "data_dir", "data_files") if source.get(key)}
    return source | {
        key: [moved(str(path)) for path in place] if isinstance(place, list) else moved(str(place))
        for key, place in places.items()
    }


def write_config(draft: Draft, target: str, source: Source, output: Path) -> str:
    """The YAML, with comments on what may be changed."""
    settings = {"lora_r": 16, "lora_alpha": 32, "learning_rate": 2.0e-4, "num_train_epochs": 1}
    settings |= ({"lora_target_modules": "all-linear"} if draft.task else {}) | draft.settings
    if draft.settings.get("max_steps", -1) > 0:
        settings.pop("num_train_epochs")
    task = f"task: {draft.task}\n" if draft.task else ""
    candidates = "\n".join(f"  {quoted(name)}: {flow(entry)}" for name, entry in draft.candidates.items())
    lost = f"\n# Not taken over: {', '.join(draft.lost)}\n" if draft.lost else ""
    return f"""\
# Which of these datasets belong in the mixture? m2m select --config {output}
model_name_or_path: {json.dumps(draft.model)}
{task}output_dir: runs/{output.stem}

# The same for every adapter and for the final fine-tune: fields of TRL's SFTConfig and ModelConfig.
{yaml.safe_dump(settings, sort_keys=False).strip()}

# name: what load_dataset takes. Rows have {COLUMNS[draft.task]}; rename with columns: {{theirs: ours}}.
# Also: max_examples, split, where: {{column: value}}, split_by: column, license, cost, required, excluded.
candidates:
{candidates}

targets:
  {quoted(target)}:
    data: {flow(source)}
    # test_data: {{...}}       # sealed: scored once, at the end
    scorer: {draft.scorer}

# strategy: auto           # needed for more than 16 candidates; how to search, see m2m select --help
# verify_top_k: 3          # really fine-tune the best three before choosing
{lost}"""


def flow(source: Source) -> str:
    """A mapping on one line."""
    return yaml.safe_dump(source, default_flow_style=True, sort_keys=False, width=10_000).strip()


def quoted(name: str) -> str:
    """A name as a key; YAML would read 2024 or no as something else."""
    return name if yaml.safe_load(name) == name else json.dumps(name)
