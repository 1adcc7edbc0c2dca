"""The entries of `targets:`: which rows are scored, and how."""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m2m_hf.config import checks
from m2m_hf.config.candidates import DataConfig, changed_fields
from m2m_hf.config.yaml_files import plain
from m2m_hf.errors import InputError

METRICS: dict[str, tuple[str, ...]] = {  # of each scorer the metrics that it computes itself, the default first
    "choice": ("accuracy", "logprob"),
    "classification": ("accuracy", "logprob", "macro_f1"),
    "loss": ("loglikelihood",),
    "generation": ("exact_match", "numeric_match", "token_f1"),
    "command": (),
    "lm_eval": (),
}
OWN_METRICS = {metric for metrics in METRICS.values() for metric in metrics}
OPTIONS: dict[str, tuple[str, ...]] = {  # what each scorer takes beside scorer, metric, weight and min_delta
    "choice": ("data", "test_data", "normalize", "metric_key"),
    "classification": ("data", "test_data", "normalize", "labels", "metric_key"),
    "loss": ("data", "test_data"),
    "generation": ("data", "test_data", "generation", "metric_key"),
    "command": ("command", "test_command", "timeout"),
    "lm_eval": ("task", "test_task", "num_fewshot", "limit"),
    "callable": ("data", "test_data"),
}
NEEDED = {  # of each scorer the option that it cannot do without, and what to give
    **dict.fromkeys(
        ("choice", "classification", "loss", "generation"),
        ("data", "give the validation set as what load_dataset takes"),
    ),
    "command": ("command", "give the program and its arguments, such as [python, score.py, '{adapter}', '{output}']"),
    "lm_eval": ("task", "give the name of a task, or the path of its YAML"),
}


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
        weight: of this target among several; the search maximises the weighted mean of their scores.
        min_delta: a mixture that scores lower than the base model by more than this cannot be chosen (None: no limit).
        normalize: how log-probabilities of choices of different length are compared: as they are (`none`), by token, by byte.
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
        """The scorer's name; `callable` for a Python function."""
        return self.scorer if isinstance(self.scorer, str) else "callable"

    @classmethod
    def parse(cls, entry: Any, where: str, folder: Path) -> "TargetConfig":
        """Reads one target of the YAML; relative paths are resolved against `folder`.

        Raises:
            InputError: an unknown, foreign or missing key, a wrong value, an unknown scorer or metric.
        """
        if not isinstance(entry, Mapping):
            raise InputError(f"{where}: expected {{data: ..., scorer: ...}}, got {entry!r}")
        scorer = entry.get("scorer")
        if not RULES["scorer"].accepts(scorer):
            raise InputError(f"{where}.scorer: expected {RULES['scorer'].expected}, got {scorer!r}")
        kind = "callable" if callable(scorer) else str(scorer)
        check_options(entry, kind, where)
        values = checks.read_entry(entry, RULES, where)
        if kind in NEEDED and not values.get(NEEDED[kind][0]):
            raise InputError(f"{where}.{NEEDED[kind][0]} is missing: {NEEDED[kind][1]}")
        values["metric"] = resolve_metric(values.get("metric"), kind, where, folder)
        for key in values.keys() & {"data", "test_data"}:
            values[key] = DataConfig.parse(values[key], f"{where}.{key}", folder)
        for key in values.keys() & {"command", "test_command"}:
            values[key] = split_command(values[key], f"{where}.{key}", folder)
        for key in values.keys() & {"task", "test_task"}:
            if values[key].endswith((".yaml", ".yml")):
                values[key] = checks.absolute(values[key], folder)
        return cls(**values | {"labels": checks.names_of_labels(values.get("labels"))})

    def to_json(self) -> dict[str, Any]:
        """The mapping that `parse` reads, with paths resolved and without defaults."""
        values = changed_fields(self)
        parts = {key: value.to_json() for key, value in values.items() if isinstance(value, DataConfig)}
        return {key: plain(value) for key, value in values.items()} | parts | {"scorer": str(self.scorer)}


COMMAND = checks.Rule("[program, argument, ...]", lambda value: isinstance(value, (list, tuple, str)))
DATA = checks.Rule("what load_dataset takes", lambda value: True)  # checked by DataConfig
RULES: dict[str, checks.Rule] = {
    "scorer": checks.Rule(
        f"one of {', '.join(METRICS)}",
        lambda value: callable(value) or (isinstance(value, str) and value in METRICS),
    ),
    "metric": checks.Rule("the name of a metric", checks.is_text),
    "data": DATA,
    "test_data": DATA,
    "weight": checks.POSITIVE,
    "min_delta": checks.number(0),
    "normalize": checks.one_of("none", "tokens", "bytes"),
    "labels": checks.LABELS,
    "generation": checks.Rule("fields of GenerationConfig", checks.is_mapping),
    "metric_key": checks.Rule("the name of a result", checks.is_text),
    "command": COMMAND,
    "test_command": COMMAND,
    "timeout": checks.POSITIVE,
    "task": checks.Rule("a task of the harness, or the path of its YAML", checks.is_text),
    "test_task": checks.Rule("a task of the harness, or the path of its YAML", checks.is_text),
    "num_fewshot": checks.integer(0),
    "limit": checks.integer(1),
}


def check_options(entry: Mapping[str, Any], kind: str, where: str) -> None:
    """Refuses keys that the scorer does not take.

    Raises:
        InputError: with the scorers that do, or with the key that was probably meant.
    """
    known = ("scorer", "metric", "weight", "min_delta", *OPTIONS[kind])
    for key in entry:
        takers = [scorer for scorer, options in OPTIONS.items() if key in options]
        if key not in known and takers:
            raise InputError(f"{where}.{key}: belongs to scorer {' or '.join(takers)}, not to {kind}")
        if key not in known:
            raise InputError(checks.unknown_key_message(str(key), known, where))


def resolve_metric(metric: str | None, kind: str, where: str, folder: Path) -> str:
    """The metric that a scorer uses: its default, one of its own, or the place of an `evaluate` module.

    Raises:
        InputError: a metric of another scorer.
    """
    own = METRICS.get(kind, ())
    if metric is None:
        return own[0] if own else "" if kind == "lm_eval" else "score"
    if not own or metric in own:
        return metric
    if kind == "loss":
        raise InputError(f"{where}.metric: expected loglikelihood for scorer loss, got {metric!r}")
    if metric in OWN_METRICS:
        raise InputError(
            f"{where}.metric: expected {', '.join(own)}, or a module of your own, for scorer {kind}, got {metric!r}"
        )
    return checks.resolve_existing(metric, folder)


def split_command(command: Any, where: str, folder: Path) -> tuple[str, ...]:
    """Program and arguments; files in `folder` are given by their absolute path.

    Raises:
        InputError: a quote without its counterpart.
    """
    try:
        parts = shlex.split(command) if isinstance(command, str) else [str(part) for part in command]
    except ValueError as error:
        raise InputError(f"{where}: {command!r} cannot be split into arguments ({error})") from error
    return tuple(checks.absolute(part, folder) if checks.is_file(folder / part) else part for part in parts)
