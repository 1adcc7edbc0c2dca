"""The entries of `candidates:` and `targets:`: where rows come from, what they are called, how they are scored."""

import difflib
import enum
import math
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from m2m_hf.errors import InputError, holds_secret

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
BUILDERS = ("json", "csv", "parquet", "arrow", "text", "xml", "webdataset", "imagefolder")
ANSWERS = ("accuracy", "logprob")
TEXTS = ("exact_match", "numeric_match", "token_f1")
METRICS: dict[str, tuple[str, ...]] = {  # of each scorer the metrics that it knows by itself, the default first
    "choice": ANSWERS,
    "classification": (*ANSWERS, "macro_f1"),
    "loss": ("loglikelihood",),
    "generation": TEXTS,
    "command": (),
    "lm_eval": (),
}
OPTIONS: dict[str, tuple[str, ...]] = {  # what each scorer takes beside scorer, metric, weight and min_delta
    "choice": ("data", "test_data", "normalize", "metric_key"),
    "classification": ("data", "test_data", "normalize", "labels", "metric_key"),
    "loss": ("data", "test_data"),
    "generation": ("data", "test_data", "generation", "metric_key"),
    "command": ("command", "test_command", "timeout"),
    "lm_eval": ("task", "test_task", "num_fewshot", "limit"),
    "callable": ("data", "test_data"),
}
NORMALIZE = ("none", "tokens", "bytes")


def unknown_key_message(key: str, known: Iterable[str], where: str) -> str:
    """Names the key that is not known and the one that was probably meant."""
    known = list(known)
    near = difflib.get_close_matches(key, known, n=1)
    listed = (
        f"expected one of: {', '.join(sorted(known))}"
        if len(known) < 30
        else "`m2m select --help` tells which there are"
    )
    hint = f"did you mean {near[0]!r}?" if near else listed
    return f"{where}: unknown key {key!r}; {hint}"


def check_name(name: Any, what: str) -> str:
    """A name that is safe as a folder name; anything else is refused."""
    if not isinstance(name, str) or not NAME.fullmatch(name) or ".." in name:
        raise InputError(
            f"{what} name {name!r} is not allowed: use 1 to 64 letters, digits, '_', '-' and single '.', "
            "starting with a letter or digit"
        )
    return name


@dataclass(frozen=True)
class DataConfig:
    """What `load_dataset` takes, and how its rows become ours.

    Args:
        path: a builder (`json`, `csv`, `parquet`, `text`), a Hub id, or a folder written by `save_to_disk`.
        name: the Hub dataset's configuration.
        data_dir: folder of files, for a builder.
        data_files: file or files, for a builder; relative ones are relative to the YAML file.
        split: default `train`.
        revision: commit, tag or branch of a Hub dataset.
        columns: renames, `{theirs: ours}`, for datasets whose columns are not called prompt/completion or messages.
        template: `{prompt: "...{column}...", completion: "...{column}..."}`, texts made of columns, for datasets without a
            prompt.
        where: `{column: value}`, only the rows that have this value there (before columns are renamed).
        max_examples: at most this many rows, drawn with the run's seed.
        rows: a `datasets.Dataset` already in memory, instead of a path (Python only).
    """

    path: str | None = None
    name: str | None = None
    data_dir: str | None = None
    data_files: str | tuple[str, ...] | None = None
    split: str = "train"
    revision: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    template: Mapping[str, str] = field(default_factory=dict)
    where: Mapping[str, Any] = field(default_factory=dict)
    max_examples: int | None = None
    rows: Any = None

    @classmethod
    def parse(cls, given: Any, where: str, folder: Path) -> "DataConfig":
        """Reads one mapping of the YAML; relative paths are resolved against `folder`.

        Raises:
            InputError: unknown keys, wrong types.
        """
        if not isinstance(given, Mapping):
            if hasattr(given, "column_names"):
                return cls(rows=given)
            raise InputError(
                f"{where}: expected what load_dataset takes, such as {{path: json, data_files: file.jsonl}}, "
                f"got {given!r}"
            )
        for key in given:
            if key not in DATA_KEYS:
                raise InputError(unknown_key_message(str(key), DATA_KEYS, where))
        types: dict[str, tuple[type, ...]] = {
            "max_examples": (int,),
            "data_files": (str, list, tuple),
            "columns": (Mapping,),
            "template": (Mapping,),
            "where": (Mapping,),
        }
        for key, value in given.items():
            expected = types.get(key, (str,))
            if value is not None and (not isinstance(value, expected) or isinstance(value, bool)):
                raise InputError(f"{where}.{key}: expected {expected[0].__name__}, got {value!r}")
        values = {key: value for key, value in given.items() if value is not None}
        if not values.get("path"):
            raise InputError(f"{where}.path is missing: give json, csv, parquet, a Hub id or a folder of save_to_disk")
        if values.get("max_examples", 1) < 1:
            raise InputError(f"{where}.max_examples: expected at least 1, got {values['max_examples']}")
        if values["path"] in BUILDERS and not values.get("data_files") and not values.get("data_dir"):
            raise InputError(f"{where}.data_files is missing: give the file or files that {values['path']} is to read")
        addresses = [values["path"], *([files] if isinstance(files := values.get("data_files", ()), str) else files)]
        if any(holds_secret(str(one)) for one in addresses):
            raise InputError(
                f"{where}: credentials must not stand in a file; use `hf auth login` or an environment variable"
            )
        values["path"] = resolve_existing(values["path"], folder)
        for column, value in values.get("where", {}).items():
            if not isinstance(column, str) or not (value is None or isinstance(value, (str, int, float))):
                raise InputError(f"{where}.where: expected {{column: value}}, got {{{column!r}: {value!r}}}")
        for theirs, ours in values.get("columns", {}).items():
            if not isinstance(theirs, str) or not isinstance(ours, str):
                raise InputError(f"{where}.columns: expected {{theirs: ours}}, both text, got {{{theirs!r}: {ours!r}}}")
        for key, text in values.get("template", {}).items():
            if key not in ("prompt", "completion") or not isinstance(text, str):
                raise InputError(
                    f"{where}.template: expected texts for prompt and completion, got {{{key!r}: {text!r}}}"
                )
        if "data_files" in values:
            files = values["data_files"]
            values["data_files"] = tuple([files] if isinstance(files, str) else files)
        # Beside a Hub id or a folder they are relative to it, which datasets resolves.
        if values["path"] in BUILDERS:
            if "data_dir" in values:
                values["data_dir"] = absolute(values["data_dir"], folder)
            if "data_files" in values:
                values["data_files"] = tuple(
                    file if "://" in file else absolute(file, folder) for file in values["data_files"]
                )
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """The mapping that `parse` reads, with paths resolved; rows in memory are only counted."""
        if self.rows is not None:
            return {"in_memory_rows": len(self.rows)}
        given = {key: getattr(self, key) for key in DATA_KEYS if getattr(self, key) not in (None, {})}
        if "data_files" in given:
            given["data_files"] = list(given["data_files"])
        for key in ("columns", "template", "where"):
            if key in given:
                given[key] = dict(given[key])
        return given


DATA_KEYS = tuple(item.name for item in fields(DataConfig) if item.name != "rows")


@dataclass(frozen=True)
class CandidateConfig:
    """A dataset that may enter the mixture.

    Args:
        data: where its rows come from.
        required: every proposed mixture contains it.
        excluded: no proposed mixture contains it; its adapter is trained and shown all the same.
        cost: what choosing it costs, in any unit, to break ties (default: its tokens).
        license: recorded with the chosen mixture.
        split_by: a column; every value in it makes a candidate of its own, called `<name>-<value>`.
        labels: in classification, other names for its labels, `{theirs: ours}`; those that are not named keep theirs.
        training: fields of SFTConfig or ModelConfig for its adapter alone, with `allow_mixed_training`. Adapters that are
            trained otherwise no longer stand for one model trained on all; this is for measuring what that does.
    """

    data: DataConfig
    required: bool = False
    excluded: bool = False
    cost: float | None = None
    license: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    split_by: str | None = None
    labels: Mapping[str, str] | None = None

    @classmethod
    def parse(cls, given: Any, where: str, folder: Path) -> "CandidateConfig":
        """Reads `{path: ..., required: ..., ...}`: the keys of `DataConfig` and of this class on one level."""
        if not isinstance(given, Mapping):
            return cls(DataConfig.parse(given, where, folder))
        own: dict[str, tuple[type, ...]] = {
            "required": (bool,),
            "excluded": (bool,),
            "cost": (int, float),
            "license": (str,),
            "training": (Mapping,),
            "split_by": (str,),
            "labels": (Mapping,),
        }
        for key in given:
            if key not in (*DATA_KEYS, *own):
                raise InputError(unknown_key_message(str(key), (*DATA_KEYS, *own), where))
        for key, expected in own.items():
            value = given.get(key)
            if value is not None and (not isinstance(value, expected) or (key == "cost" and isinstance(value, bool))):
                raise InputError(
                    f"{where}.{key}: got {value!r}, expected {key}: {'true' if own[key] == (bool,) else '...'}"
                )
            if key == "cost" and isinstance(value, (int, float)) and not 0 <= value < math.inf:
                raise InputError(f"{where}.cost: expected a number, 0 or above, got {value!r}")
        if given.get("required") and given.get("excluded"):
            raise InputError(f"{where}: it is both required and excluded")
        data = DataConfig.parse({key: value for key, value in given.items() if key not in own}, where, folder)
        flags = bool(given.get("required")), bool(given.get("excluded"))
        training, by = dict(given.get("training") or {}), given.get("split_by")
        labels = names_of_labels(given.get("labels"))
        return cls(data, *flags, given.get("cost"), given.get("license"), training, by, labels)

    def to_json(self) -> dict[str, Any]:
        own = {
            "required": self.required or None,
            "excluded": self.excluded or None,
            "cost": self.cost,
            "license": self.license,
            "training": dict(self.training) or None,
            "split_by": self.split_by,
            "labels": None if self.labels is None else dict(self.labels),
        }
        return self.data.to_json() | {key: value for key, value in own.items() if value is not None}


@dataclass(frozen=True)
class TargetConfig:
    """What the mixture is chosen for.

    Args:
        scorer: how a model is scored; `m2m select --help` and the README tell what each takes. In Python also any callable
            `(model, tokenizer, rows) -> number, numbers of the rows, or Score`.
        metric: for `choice` and `classification` `accuracy` (default) or `logprob`, for the latter also `macro_f1`; for
            `loss` `loglikelihood`; for `generation` `exact_match` (default), `numeric_match` or `token_f1`; for these also
            path or Hub id of an `evaluate` module; for `command` the key of the number in its JSON (default `score`); for
            `lm_eval` the task's own name for it (default its first).
        data: the validation set, the only rows that the search sees.
        test_data: sealed; scored once, at the end.
        weight: of this target in a search with several; what is maximised is the weighted mean of their scores.
        min_delta: a mixture whose score is lower than the base model's by more than this cannot be chosen (None: no matter).
        normalize: how the log-probabilities of choices of different length are compared: as they are (`none`), by token, by byte.
        labels: the words of a classification's labels, `{label: word}`, or a list of them; by default those in the data.
        generation: fields of transformers' `GenerationConfig`, such as `max_new_tokens` and `stop_strings`.
        metric_key: which result of a metric module is the score.
        command: program and arguments, run without a shell; `{adapter}`, `{base_model}` and `{output}` in them are replaced.
        test_command: the same for the sealed test.
        timeout: seconds after which a command is stopped and its mixture has no score.
        task: a task of the lm-evaluation-harness by name, or the path of its YAML.
        test_task: the same for the sealed test.
        num_fewshot: examples in the prompt of a harness task (default: as the task says).
        limit: only the first rows of a harness task.
    """

    scorer: str | Callable[..., Any]
    metric: str
    data: DataConfig | None = None
    test_data: DataConfig | None = None
    weight: float = 1.0
    min_delta: float | None = None
    normalize: str = "none"
    labels: Mapping[str, str] | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    metric_key: str | None = None
    command: tuple[str, ...] = ()
    test_command: tuple[str, ...] = ()
    timeout: float = 3600
    task: str | None = None
    test_task: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None

    @property
    def kind(self) -> str:
        """The scorer's name; `callable` for one of Python."""
        return self.scorer if isinstance(self.scorer, str) else "callable"

    @classmethod
    def parse(cls, given: Any, where: str, folder: Path) -> "TargetConfig":
        """Reads one target of the YAML.

        Raises:
            InputError: unknown keys, a scorer or metric that does not exist.
        """
        if not isinstance(given, Mapping):
            raise InputError(f"{where}: expected {{data: ..., scorer: ...}}, got {given!r}")
        scorer = given.get("scorer")
        kind = "callable" if callable(scorer) else scorer
        if kind not in METRICS and kind != "callable":
            raise InputError(f"{where}.scorer: expected one of {', '.join(METRICS)}, got {scorer!r}")
        known = ("scorer", "metric", "weight", "min_delta", *OPTIONS[kind])
        every = {option for options in OPTIONS.values() for option in options}
        for key in given:
            if key not in known:
                takers = [name for name, options in OPTIONS.items() if key in options]
                if key in every:
                    raise InputError(f"{where}.{key}: belongs to scorer {' or '.join(takers)}, not to {kind}")
                raise InputError(unknown_key_message(str(key), known, where))
        types: dict[str, tuple[tuple[type, ...], str]] = {
            "metric": ((str,), "a name"),
            "weight": ((int, float), "a number above 0"),
            "min_delta": ((int, float), "a number, 0 or above"),
            "labels": ((list, tuple, Mapping), "{label: word} or a list of words"),
            "generation": ((Mapping,), "fields of GenerationConfig"),
            "metric_key": ((str,), "a name"),
            "command": ((list, tuple, str), "[program, argument, ...]"),
            "test_command": ((list, tuple, str), "[program, argument, ...]"),
            "timeout": ((int, float), "seconds, above 0"),
            "task": ((str,), "a task of the harness, or the path of its YAML"),
            "test_task": ((str,), "a task of the harness, or the path of its YAML"),
            "num_fewshot": ((int,), "an integer"),
            "limit": ((int,), "an integer above 0"),
            "normalize": ((str,), f"one of {', '.join(NORMALIZE)}"),
        }
        values = {key: value for key, value in given.items() if value is not None}
        lowest = {"min_delta": 0, "num_fewshot": 0, "limit": 1}
        for key, (expected, words) in types.items():
            value = values.get(key)
            if value is None:
                continue
            wrong = not isinstance(value, expected) or isinstance(value, bool)
            if (
                wrong
                or (key in lowest and value < lowest[key])
                or (key in ("weight", "timeout") and not 0 < value < math.inf)
            ):
                raise InputError(f"{where}.{key}: expected {words}, got {value!r}")
        needed = {"command": "command", "lm_eval": "task"}.get(kind, "data" if kind != "callable" else None)
        if needed is not None and not values.get(needed):
            hint = {
                "data": "give the validation set as what load_dataset takes",
                "command": "give the program and its arguments, such as [python, score.py, '{adapter}', '{output}']",
                "task": "give the name of a task, or the path of its YAML",
            }[needed]
            raise InputError(f"{where}.{needed} is missing: {hint}")
        if values.get("normalize", "none") not in NORMALIZE:
            raise InputError(f"{where}.normalize: expected one of {', '.join(NORMALIZE)}, got {values['normalize']!r}")
        for key in ("command", "test_command"):
            if key in values:
                try:
                    parts = shlex.split(values[key]) if isinstance(values[key], str) else list(map(str, values[key]))
                except ValueError as error:
                    raise InputError(
                        f"{where}.{key}: {values[key]!r} cannot be split into arguments ({error})"
                    ) from error
                values[key] = tuple(absolute(part, folder) if is_file(folder / part) else part for part in parts)
        for key in ("task", "test_task"):
            if key in values and Path(values[key]).suffix in (".yaml", ".yml"):
                values[key] = absolute(values[key], folder)
        if "labels" in values:
            values["labels"] = names_of_labels(values["labels"])
        if "labels" in values and len(values["labels"]) < 2:
            raise InputError(f"{where}.labels: expected at least two, got {given['labels']!r}")
        default = (METRICS.get(kind) or ("score" if kind in ("command", "callable") else "",))[0]
        metric = values.get("metric", default)
        if kind == "loss" and metric not in METRICS["loss"]:
            raise InputError(f"{where}.metric: expected loglikelihood for scorer loss, got {metric!r}")
        foreign = {name for names in METRICS.values() for name in names} - set(METRICS.get(kind, ()))
        if METRICS.get(kind) and metric in foreign:
            raise InputError(
                f"{where}.metric: expected {', '.join(METRICS[kind])}, or a module of your own, for scorer {kind}, got {metric!r}"
            )
        if METRICS.get(kind) and metric not in METRICS[kind]:
            metric = resolve_existing(metric, folder)
        for key in ("data", "test_data"):
            if key in values:
                values[key] = DataConfig.parse(values[key], f"{where}.{key}", folder)
        return cls(**values | {"metric": metric})

    def to_json(self) -> dict[str, Any]:
        """The mapping that `parse` reads, with paths resolved."""
        given: dict[str, Any] = {"scorer": self.scorer if isinstance(self.scorer, str) else str(self.scorer)}
        for item in fields(self):
            value = getattr(self, item.name)
            if (
                item.name == "scorer"
                or value in (None, "", (), {})
                or (item.default == value and item.name != "metric")
            ):
                continue
            given[item.name] = value.to_json() if isinstance(value, DataConfig) else plain(value)
        return given


def names_of_labels(given: Any) -> dict[str, str] | None:
    """Label -> what stands for it, of a list or a mapping."""
    if given is None:
        return None
    pairs = given.items() if isinstance(given, Mapping) else zip(given, given, strict=True)
    return {str(label): str(word) for label, word in pairs}


def plain(value: Any) -> Any:
    """`value` as YAML can hold it."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return value


def resolve_existing(path: str, folder: Path) -> str:
    """`path` made absolute where it exists, seen from `folder` or from the working directory; otherwise as it is.

    A model or dataset is named by a local folder or by a Hub id, and both look alike.
    """
    if path in BUILDERS:
        return path
    for root in (folder, Path.cwd()):
        if exists(root / path):
            return absolute(path, root)
    if path.startswith((".", "/", "~")):
        return absolute(str(Path(path).expanduser()), folder)
    return path


def exists(path: Path) -> bool:
    """Whether there is a file or folder; there is none under a name that no file can have."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def is_file(path: Path) -> bool:
    return exists(path) and path.is_file()


def absolute(path: str, folder: Path) -> str:
    """`path` seen from `folder`, without `..`; links stay as they are."""
    return os.path.normpath(folder.absolute() / path)
