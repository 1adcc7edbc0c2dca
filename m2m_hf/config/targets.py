"""The entries of `targets:`: which rows are scored, and how."""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from m2m_hf.config import checks, presets
from m2m_hf.config.candidates import DataConfig, changed_options
from m2m_hf.config.checks import Rule, absolute, mapping, option, text
from m2m_hf.config.judge import NEEDED, JudgeConfig
from m2m_hf.errors import InputError

COMMON = ("scorer", "metric", "weight", "min_delta")
FEW_SHOT = ("num_fewshot", "fewshot_data", "fewshot_by")


@dataclass(frozen=True)
class ScorerKind:
    """What configuration, data and help ask of a kind of scorer; `scoring/make.py` has its class.

    Args:
        options: what it takes beside `COMMON`, first what is scored, which it cannot do without, and its sealed test.
        needed: what to give for the first of them, said where it is missing.
        help: its options, as `m2m select --help` shows them.
        metrics: those that it computes itself, the default first.
        metric: the default where it computes none itself.
        column: what its rows have beside a prompt (`prompt`: nothing); with `completion` a metric compares texts, else the
            indices of answers.
        described: what it runs, if it scores otherwise than by our own forward passes.
        classifies: it can score classifiers too.
        watchable: what it depends on can be watched for changes.
    """

    options: tuple[str, ...]
    needed: str = "give the validation set as what load_dataset takes"
    help: str = ""
    metrics: tuple[str, ...] = ()
    metric: str = "score"
    column: str = "completion"
    described: str = ""
    classifies: bool = False
    watchable: bool = True


SCORERS = {
    "choice": ScorerKind(
        ("data", "test_data", "normalize", "metric_key", *FEW_SHOT),
        help="""\
data: rows of prompt, choices, answer (index, text, letter or label); metric: accuracy or logprob;
normalize: none, tokens or bytes; num_fewshot: examples ahead of every question, drawn from fewshot_data: {...}, with
fewshot_by: column those of the same value""",
        metrics=("accuracy", "logprob"),
        column="choices",
    ),
    "classification": ScorerKind(
        ("data", "test_data", "normalize", "labels", "metric_key", *FEW_SHOT),
        help="""\
data: rows of prompt, label; labels: {label: word}, or those in the data; metric and the others as above. With
task: sequence_classification rows of text, label, with image_classification of image, label (path: imagefolder,
data_dir: ..., or parquet files); metric: accuracy, macro_f1 or logprob""",
        metrics=("accuracy", "logprob", "macro_f1"),
        column="label",
        classifies=True,
    ),
    "loss": ScorerKind(
        ("data", "test_data", *FEW_SHOT),
        help="data: rows of prompt, completion, or of messages; the score is the log-likelihood per token; num_fewshot",
        metrics=("loglikelihood",),
    ),
    "generation": ScorerKind(
        ("data", "test_data", "generation", "strip", "metric_key", *FEW_SHOT),
        help="""\
data: the same; generation: {max_new_tokens: 64, stop_strings: [...]}; metric: exact_match, numeric_match,
token_f1, instructions (those that code can verify); num_fewshot; strip: <think>…</think> (thoughts, not rated)""",
        metrics=("exact_match", "numeric_match", "token_f1", "instructions"),
    ),
    "preference": ScorerKind(
        ("data", "test_data", "normalize"),
        help="""\
data: rows of prompt, chosen, rejected, as TRL has them, or of chosen and rejected that begin with the prompt; metric:
accuracy (the chosen one is more likely) or margin (of log-likelihood); normalize as above""",
        metrics=("accuracy", "margin"),
        column="chosen",
    ),
    "reward": ScorerKind(
        ("data", "test_data", "reward_model", "generation", "strip", "samples"),
        help="""\
data: rows of prompt; reward_model: a folder or Hub id (one output), which rates prompt and answer; generation and strip
as above; samples: answers to a prompt (1), with generation: {do_sample: true} when more""",
        metrics=("reward",),
        column="prompt",
    ),
    "judge": ScorerKind(
        ("data", "test_data", "judge", "generation", "strip"),
        help="""\
data: rows of prompt; judge: {base_url: http://localhost:8000/v1, model: NAME, rubric: "...", max_requests: 2000}, an
OpenAI-compatible server, which compares each answer with the base model's; also max_tokens, concurrency, timeout; its
token is read from OPENAI_API_KEY; generation and strip as above""",
        metrics=("win_rate",),
        column="prompt",
    ),
    "command": ScorerKind(
        ("command", "test_command", "timeout"),
        "give the program and its arguments, such as [python, score.py, '{adapter}', '{output}']",
        """\
command: [python, score.py, "{adapter}", "{output}"], which writes {"score": 0.5} to {output};
timeout: 3600 (seconds); with expert: full "{model}" in place of "{adapter}\"""",
        described="scored by a command",
        classifies=True,
    ),
    "lm_eval": ScorerKind(
        ("task", "test_task", "num_fewshot", "limit"),
        "give the name of a task, or the path of its YAML",
        "task: a name, or a YAML of your own (with allow_metric_code); num_fewshot, limit; pip install 'm2m_hf[lm_eval]'",
        metric="",
        described="harness task {task}",
        watchable=False,
    ),
    "callable": ScorerKind(("data", "test_data"), described="scored by a function", classifies=True, watchable=False),
}
NAMES = tuple(name for name in SCORERS if name != "callable")  # what `scorer:` may say
SCORER = Rule(
    f"one of {', '.join(NAMES)}, or benchmark: in its place",
    lambda value: callable(value) or (isinstance(value, str) and value in NAMES),
)
COMMAND = Rule("[program, argument, ...]", lambda value: isinstance(value, (list, tuple, str)))
DATA = Rule("what load_dataset takes", lambda value: True)  # checked by DataConfig
STRIP = Rule(
    "two marks with … between them, such as <think>…</think>",
    lambda value: isinstance(value, str) and all(marks(value)),
)
TASK = text("a task of the harness, or the path of its YAML")


@dataclass(frozen=True)
class TargetConfig:
    """What the mixture is chosen for. `test_...` is sealed: scored once, at the end."""

    # In Python also any callable `(model, tokenizer, rows) -> number, numbers of the rows, or Score`.
    scorer: str | Callable[..., Any] = option(SCORER, MISSING)
    # One of the scorer's own, or path or Hub id of an `evaluate` module; of `command` the key of the number in its JSON (default
    # `score`), of `lm_eval` the task's own name for it (default: its first).
    metric: str = option(text("the name of a metric"), MISSING)
    data: DataConfig | None = option(DATA)  # the only rows that the search sees
    test_data: DataConfig | None = option(DATA)
    weight: float = option(checks.POSITIVE, 1.0)  # the search maximises the weighted mean of all targets
    min_delta: float | None = option(checks.number(0))  # a mixture this far below the base model cannot be chosen
    normalize: str = option(checks.one_of("none", "tokens", "bytes"), "none")  # choices of different length
    labels: Mapping[str, str] | None = option(checks.LABELS)  # their words; by default those in the data
    generation: Mapping[str, Any] = option(mapping("fields of GenerationConfig"), dict)
    strip: str | None = option(STRIP)  # what answers lose before they are rated
    reward_model: str | None = option(text("a folder or Hub id of a reward model"))
    samples: int = option(checks.integer(1), 1)  # answers to every prompt
    judge: JudgeConfig | None = option(DATA)  # checked by JudgeConfig
    metric_key: str | None = option(text("the name of a result"))  # of a metric module
    command: tuple[str, ...] = option(COMMAND, ())  # without a shell; {adapter}, {base_model}, {output} are replaced
    test_command: tuple[str, ...] = option(COMMAND, ())
    timeout: float = option(checks.POSITIVE, 3600)  # seconds until a command is stopped; its mixture has no score
    task: str | None = option(TASK)
    test_task: str | None = option(TASK)
    num_fewshot: int | None = option(checks.integer(0))  # examples ahead of every question; default: as the task says
    fewshot_data: DataConfig | None = option(
        DATA
    )  # where they are drawn from with the run's seed; default: out of `data`
    fewshot_by: str | None = option(text("the name of a column"))  # a question's examples have its value there
    limit: int | None = option(checks.integer(1))  # only the first rows of a task

    @property
    def kind(self) -> str:
        """The scorer's name; `callable` for a Python function."""
        return self.scorer if isinstance(self.scorer, str) else "callable"

    @property
    def parts(self) -> dict[str, DataConfig]:
        """The `data`, `test_data` and `fewshot_data`, where it has them."""
        parts = {"data": self.data, "test_data": self.test_data, "fewshot_data": self.fewshot_data}
        return {part: data for part, data in parts.items() if data is not None}

    @classmethod
    def parse(cls, entry: Any, where: str, folder: Path) -> "TargetConfig":
        """Reads one target of the YAML; relative paths are resolved against `folder`."""
        if not isinstance(entry, Mapping):
            raise InputError(f"{where}: expected {{data: ..., scorer: ...}}, got {entry!r}")
        entry = presets.resolve(entry, where)
        scorer = entry.get("scorer")
        checks.check_fields({"scorer": scorer}, {"scorer": SCORER}, where)
        kind = "callable" if callable(scorer) else str(scorer)
        check_options(entry, kind, where)
        values = checks.read_entry(entry, checks.rules(cls), where)
        needed = SCORERS[kind].options[0]
        if kind != "callable" and not values.get(needed):
            raise InputError(f"{where}.{needed} is missing: {SCORERS[kind].needed}")
        if kind == "reward":
            if not values.get("reward_model"):
                raise InputError(
                    f"{where}.reward_model is missing: give the folder or Hub id of a model that rates answers"
                )
            if values.get("samples", 1) > 1 and not (values.get("generation") or {}).get("do_sample"):
                raise InputError(
                    f"{where}.samples: greedy answers to a prompt are all the same, got {values['samples']}; expected 1, or "
                    "generation: {do_sample: true}"
                )
            values["reward_model"] = checks.resolve_existing(values["reward_model"], folder)
        if kind == "judge":
            if "judge" not in values:
                raise InputError(f"{where}.judge is missing: give {NEEDED}")
            values["judge"] = JudgeConfig.parse(values["judge"], f"{where}.judge")
        values["metric"] = resolve_metric(values.get("metric"), kind, where, folder)
        if (given := sorted(values.keys() & {*FEW_SHOT[1:]})) and "num_fewshot" not in values:
            raise InputError(f"{where}.num_fewshot is missing: {given[0]} is given; say how many examples to draw")
        for key in values.keys() & {"data", "test_data", "fewshot_data"}:
            values[key] = DataConfig.parse(values[key], f"{where}.{key}", folder)
        for key in values.keys() & {"command", "test_command"}:
            values[key] = split_command(values[key], f"{where}.{key}", folder)
        for key in values.keys() & {"task", "test_task"}:
            if values[key].endswith((".yaml", ".yml")):
                values[key] = absolute(values[key], folder)
        return cls(**values | {"labels": checks.names_of_labels(values.get("labels"))})

    def to_json(self) -> dict[str, Any]:
        """The mapping that `parse` reads, with paths resolved and without defaults."""
        values = changed_options(self) | {"scorer": str(self.scorer)}
        return {
            key: value.to_json() if isinstance(value, DataConfig | JudgeConfig) else value
            for key, value in values.items()
        }


def check_options(entry: Mapping[str, Any], kind: str, where: str) -> None:
    """Refuses what the scorer does not take, by the scorers that do or the key that was probably meant."""
    known = (*COMMON, *SCORERS[kind].options)
    for key in entry:
        takers = [name for name, scorer in SCORERS.items() if key in scorer.options]
        if key not in known and takers:
            raise InputError(f"{where}.{key}: belongs to scorer {' or '.join(takers)}, not to {kind}")
        if key not in known:
            raise InputError(checks.unknown_key_message(str(key), known, where))


def resolve_metric(metric: str | None, kind: str, where: str, folder: Path) -> str:
    """The metric that a scorer uses: its default, one of its own, or the place of an `evaluate` module."""
    own = SCORERS[kind].metrics
    if metric is None:
        return own[0] if own else SCORERS[kind].metric
    if not own or metric in own:
        return metric
    if "metric_key" not in SCORERS[kind].options:
        raise InputError(f"{where}.metric: expected {', '.join(own)} for scorer {kind}, got {metric!r}")
    if any(metric in scorer.metrics for scorer in SCORERS.values()):
        raise InputError(
            f"{where}.metric: expected {', '.join(own)}, or a module of your own, for scorer {kind}, got {metric!r}"
        )
    return checks.resolve_existing(metric, folder)


def marks(strip: str) -> tuple[str, str]:
    """The marks before and after what is taken out of answers."""
    before, _, after = strip.replace("...", "…").partition("…")
    return before.strip(), after.strip()


def split_command(command: Any, where: str, folder: Path) -> tuple[str, ...]:
    """Program and arguments; files in `folder` are given by their absolute path."""
    try:
        parts = shlex.split(command) if isinstance(command, str) else [str(part) for part in command]
    except ValueError as error:
        raise InputError(f"{where}: {command!r} cannot be split into arguments ({error})") from error
    return tuple(absolute(part, folder) if is_file(folder / part) else part for part in parts)


def is_file(path: Path) -> bool:
    return checks.exists(path) and path.is_file()
