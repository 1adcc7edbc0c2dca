"""The entries of `targets:`: which rows are scored, and how."""

import math
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from m2m_hf.config.candidates import DataConfig
from m2m_hf.config.checks import absolute, is_file, names_of_labels, plain, resolve_existing, unknown_key_message
from m2m_hf.errors import InputError

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
