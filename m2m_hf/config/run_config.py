"""The configuration: what a run is made of, validated before anything heavy is imported.

`MergeToMixConfig` stands beside TRL's `SFTConfig` and `ModelConfig` in one flat YAML; it holds only what those two do not.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from m2m_hf.config.candidates import CandidateConfig
from m2m_hf.config.checks import check_name, names_of_labels, resolve_existing, unknown_key_message
from m2m_hf.config.targets import OPTIONS, TargetConfig
from m2m_hf.errors import InputError

MERGE_PARAMETERS: dict[str, dict[str, Any]] = {  # what each merge method takes, with its default
    "average": {},
    "task_arithmetic": {"scaling": 0.4},  # this and the next as Yadav et al. (2023) advise where nothing is tuned
    "ties": {"scaling": 1.0, "density": 0.2},
    "dare": {"density": 0.5},
    "svd": {"rank": None},
    "linear": {},
}


def check_merge_parameters(method: str, given: Any, where: str) -> None:
    """Refuses parameters that a merge method does not take.

    Raises:
        InputError: with what it takes.
    """
    taken = MERGE_PARAMETERS[method]
    if not isinstance(given, Mapping):
        raise InputError(f"{where}: expected names and numbers, got {given!r}")
    value: Any
    for key, value in given.items():
        if key not in taken:
            raise InputError(f"{where}.{key}: merge_method {method} takes {', '.join(taken) or 'none'}")
        right = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
        if not right or (key == "density" and value > 1) or (key == "rank" and not isinstance(value, int)):
            words = {"rank": "an integer above 0", "density": "a share above 0, at most 1"}.get(key, "a number above 0")
            raise InputError(f"{where}.{key}: expected {words}, got {value!r}")


@dataclass
class MergeToMixConfig:
    """Everything about a run that TRL's own configurations do not say. Its fields share one flat YAML with theirs.

    Raises:
        InputError: at construction, naming the field, what was given and what was expected.
    """

    candidates: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "YAML only: name -> what load_dataset takes, plus max_examples, columns, where, split_by, required, "
            "excluded, cost, license, labels."
        },
    )
    targets: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "YAML only: name -> scorer, data, test_data, metric, weight, min_delta; see below."},
    )
    task: str = field(
        default="causal_lm",
        metadata={
            "help": "causal_lm (TRL's SFTTrainer), sequence_classification (text and label) or image_classification (image and "
            "label): transformers' Trainer, with one frozen head for all, the model's own or made of the labels' names."
        },
    )
    expert: str = field(
        default="lora",
        metadata={
            "help": "What is trained for every candidate: lora (an adapter) or full (all parameters; kept as what they changed)."
        },
    )
    trained_parameters: str | None = field(
        default=None,
        metadata={
            "help": "expert: full: a regular expression; only parameters with such a name are trained and kept (default: all)."
        },
    )
    delta_dtype: str = field(
        default="float32",
        metadata={
            "help": "expert: full: what is kept in: float32 loses nothing; bfloat16 or float16 take half the disk."
        },
    )
    labels: str | None = field(
        default=None,
        metadata={
            "help": "YAML only; classification: the label space, a list or {label: words}. Every row is then a choice among "
            "all of it (default: the model's own classifier's, else among the labels of the row's own dataset)."
        },
    )
    label_template: str = field(
        default="{label}",
        metadata={"help": "Classification: the text that is embedded for a label, such as 'a photo of a {label}'."},
    )
    strategy: str = field(
        default="exhaustive",
        metadata={
            "help": "How mixtures are proposed: exhaustive (all 2^N-1 subsets), random, greedy, beam, annealing, surrogate, "
            "bayes, gradient, or auto, which chooses and says why."
        },
    )
    objective: str = field(
        default="merged",
        metadata={
            "help": "What scores a mixture: merged (the adapters' exact average) or ensemble (their probabilities' average)."
        },
    )
    weights: str = field(
        default="equal",
        metadata={"help": "equal (mixtures are subsets) or continuous (any weights; they become shares of the data)."},
    )
    race: bool | None = field(
        default=None,
        metadata={
            "help": "Stop scoring mixtures that cannot win any more (default: with every strategy but exhaustive)."
        },
    )
    adapters: str | None = field(
        default=None,
        metadata={
            "help": "Take missing adapters from org/name or org/name@revision, as m2m push wrote them, or from a folder; of the "
            "same data and settings only. In the YAML also {candidate: org/name or a folder}, adapters that somebody has "
            "trained otherwise than with m2m."
        },
    )
    experts: str | None = field(
        default=None,
        metadata={
            "help": "The same with expert: full: org/name or a folder with the experts of another run, or in the YAML "
            "{candidate: org/name or a folder} of finished fine-tunes of the base model."
        },
    )
    max_trials: int | None = field(
        default=None,
        metadata={"help": "At most so many mixtures, the base, singles and all together included."},
    )
    max_example_evaluations: int | None = field(
        default=None,
        metadata={"help": "At most so many examples scored, over all mixtures."},
    )
    max_seconds: float | None = field(
        default=None,
        metadata={"help": "At most so long scoring mixtures."},
    )
    min_datasets: int = field(
        default=1,
        metadata={"help": "Fewest candidates in a mixture."},
    )
    max_datasets: int | None = field(
        default=None,
        metadata={"help": "Most candidates in a mixture."},
    )
    max_cost: float | None = field(
        default=None,
        metadata={
            "help": "Most that the candidates of a mixture may cost together; a candidate costs its tokens, or its cost."
        },
    )
    licenses: list[str] | None = field(
        default=None,
        metadata={"help": "Only candidates with one of these as their license may be in a mixture."},
    )
    merge_method: str = field(
        default="average",
        metadata={
            "help": "How adapters are merged: average (the method's own), or to compare with: task_arithmetic, ties, dare, svd, "
            "linear."
        },
    )
    merge_parameters: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "YAML only: scaling (task_arithmetic 0.4, ties 1), density (ties 0.2, dare 0.5), rank (svd: the adapters')."
        },
    )
    one_standard_error: bool = field(
        default=False,
        metadata={"help": "Take mixtures within one standard error of the best as tied, and choose the smallest."},
    )
    tokens_per_batch: int | None = field(
        default=None,
        metadata={"help": "Scoring: tokens in one forward pass with padding (1024 on a CPU, else 16384)."},
    )
    allow_overlap: bool = field(
        default=False,
        metadata={"help": "Go on although rows of a target also stand in a candidate."},
    )
    allow_metric_code: bool = field(
        default=False,
        metadata={"help": "Load metrics and harness tasks of your own, which runs the code in them."},
    )
    allow_mixed_training: bool = field(
        default=False,
        metadata={
            "help": "Let candidates have training: of their own. Their adapters then no longer stand for one model trained on "
            "all of them; recipes/ablate_uniformity.py measures what that costs."
        },
    )
    verify_top_k: int = field(
        default=0,
        metadata={
            "help": "Really fine-tune this many of the top mixtures, and the baselines, and choose by what those score."
        },
    )
    fidelity_mixtures: int | None = field(
        default=None,
        metadata={"help": "m2m fidelity: mixtures to fine-tune (default: all where there are up to 15, else 16)."},
    )
    train_final: bool = field(
        default=True,
        metadata={"help": "Fine-tune on the chosen mixture at the end, and score it."},
    )
    final: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "YAML only: fields of SFTConfig or ModelConfig for the final fine-tune alone."},
    )
    folder: str | None = field(
        default=None,
        metadata={"help": "What relative data paths are relative to (default: where the YAML is)."},
    )

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name}: expected {' or '.join(map(str, allowed))}, got {getattr(self, name)!r}")
        for name, lowest in LOWEST.items():
            given: Any = getattr(self, name)
            kinds, words = ((int, float), "a number") if name in ("max_seconds", "max_cost") else ((int,), "an integer")
            right = isinstance(given, kinds) and not isinstance(given, bool) and lowest <= given < math.inf
            if given is not None and not right:
                raise InputError(f"{name}: expected {words} of at least {lowest}, got {given!r}")
        for name, one in (
            ("candidates", "my_data: {path: json, data_files: my_data.jsonl}"),
            ("targets", "my_task: {...}"),
        ):
            given = getattr(self, name)
            if not isinstance(given, Mapping) or not given:
                raise InputError(f"{name}: expected at least one, as in\n  {name}:\n    {one}\ngot {given!r}")
        if self.race is not None and not isinstance(self.race, bool):
            raise InputError(f"race: expected true or false, got {self.race!r}")
        self._check_task()
        for key in ("adapters", "experts"):
            setattr(self, key, self._checked_bank(key, getattr(self, key)))
        if self.licenses is not None and not (
            isinstance(self.licenses, list) and all(isinstance(one, str) for one in self.licenses)
        ):
            raise InputError(f"licenses: expected a list of names, got {self.licenses!r}")
        if not isinstance(self.final, Mapping):
            raise InputError(f"final: expected fields of SFTConfig or ModelConfig, got {self.final!r}")
        if self.strategy == "exhaustive" and len(self.candidates) > MAX_EXHAUSTIVE:
            raise InputError(
                f"candidates: {len(self.candidates)} given, and exhaustive search scores 2^N-1 mixtures; "
                f"at most {MAX_EXHAUSTIVE} are possible. Use strategy: auto"
            )
        if self.weights == "continuous" and self.strategy not in CONTINUOUS:
            raise InputError(
                f"strategy: {self.strategy} proposes subsets only; for weights: continuous expected {', '.join(CONTINUOUS)}"
            )
        check_merge_parameters(self.merge_method, self.merge_parameters, "merge_parameters")
        if self.expert == "full" and self.merge_method == "linear":
            raise InputError(
                "merge_method: linear is defined by the factors of LoRA adapters, which full experts have not"
            )
        if self.expert == "full" and self.merge_method == "svd" and "rank" not in self.merge_parameters:
            raise InputError(
                "merge_parameters.rank is missing: full experts have no rank of their own for svd; give one"
            )
        if self.merge_method != "average" and self.weights == "continuous":
            raise InputError(f"weights: continuous needs merge_method: average, got {self.merge_method}")
        folder = Path(self.folder or ".").absolute()
        names = [check_name(name, "candidate") for name in self.candidates]
        twice = {name.lower() for name in names if [other.lower() for other in names].count(name.lower()) > 1}
        if twice:
            raise InputError(f"candidates: names that differ only in case share a folder: {', '.join(sorted(twice))}")
        self.parsed_candidates = {
            name: CandidateConfig.parse(self.candidates[name], f"candidates.{name}", folder) for name in sorted(names)
        }
        mixed = [name for name, one in self.parsed_candidates.items() if one.training]
        if mixed and not self.allow_mixed_training:
            raise InputError(
                f"candidates.{mixed[0]}.training: an adapter that is trained otherwise than the others cannot be averaged with "
                "them and stand for one model trained on all. Leave it out, or say allow_mixed_training: true to measure what "
                "that does"
            )
        self.parsed_targets = {
            check_name(name, "target"): TargetConfig.parse(given, f"targets.{name}", folder)
            for name, given in self.targets.items()
        }
        self._check_scorers()

    def _check_task(self) -> None:
        """Refuses what does not belong to the task, or to the kind of expert.

        Raises:
            InputError: with the reason.
        """
        foreign = {
            "labels": self.task == "causal_lm" and self.labels is not None,
            "label_template": self.task == "causal_lm" and self.label_template != "{label}",
            "trained_parameters": self.expert == "lora" and self.trained_parameters is not None,
            "delta_dtype": self.expert == "lora" and self.delta_dtype != "float32",
            "experts": self.expert == "lora" and self.experts is not None,
            "adapters": self.expert == "full" and self.adapters is not None,
        }
        for name, wrong in foreign.items():
            if wrong:
                other = (
                    "task: sequence_classification or image_classification"
                    if name.startswith("label")
                    else "expert: full"
                )
                other = "expert: lora; with full give experts:" if name == "adapters" else other
                raise InputError(f"{name}: {getattr(self, name)!r} belongs to {other}")
        if "{label}" not in str(self.label_template):
            raise InputError(f"label_template: expected a text with {{label}} in it, got {self.label_template!r}")
        labels: Any = self.labels
        if labels is not None and (not isinstance(labels, (list, tuple, Mapping)) or len(labels) < 2):
            raise InputError(f"labels: expected a list of names, or {{label: words}}, of two at least; got {labels!r}")
        self.parsed_labels = names_of_labels(labels)
        if labels is not None and len(self.parsed_labels or ()) < len(labels):
            raise InputError(f"labels: one of them stands there twice: {labels!r}")
        if self.trained_parameters is not None:
            try:
                re.compile(self.trained_parameters)
            except (re.error, TypeError) as error:
                raise InputError(
                    f"trained_parameters: {self.trained_parameters!r} is no regular expression ({error})"
                ) from error

    def _check_scorers(self) -> None:
        """Refuses scorers that the task does not have.

        Raises:
            InputError: with those that it has.
        """
        for name, target in self.parsed_targets.items():
            allowed = {"causal_lm": tuple(OPTIONS)}.get(self.task, ("classification", "command", "callable"))
            if target.kind not in allowed:
                raise InputError(
                    f"targets.{name}.scorer: expected {' or '.join(allowed[:2])} for {self.task}, got {target.kind}"
                )
            data = [one for one in (target.data, target.test_data) if one is not None]
            place, other = ("{model}", "{adapter}") if self.expert == "full" else ("{adapter}", "{model}")
            for part in (*target.command, *target.test_command):
                if other in part:
                    raise InputError(
                        f"targets.{name}.command: with expert: {self.expert} it is given {place}, not {other}"
                    )
            if self.task != "causal_lm" and (target.normalize != "none" or any(one.template for one in data)):
                raise InputError(f"targets.{name}: normalize and template belong to task: causal_lm")
        for name, one in self.parsed_candidates.items():
            if self.task != "causal_lm" and one.data.template:
                raise InputError(f"candidates.{name}.template: belongs to task: causal_lm")
            if self.task == "causal_lm" and one.labels is not None:
                raise InputError(
                    f"candidates.{name}.labels: belongs to task: sequence_classification or image_classification"
                )

    @property
    def bank(self) -> str | dict[str, str] | None:
        """Where experts come from that are not trained here: `adapters` or `experts`."""
        found: str | dict[str, str] | None = self.experts if self.expert == "full" else self.adapters
        return found

    def _checked_bank(self, key: str, bank: Any) -> Any:
        """`adapters` or `experts`, with paths resolved.

        Raises:
            InputError: something else than places.
        """
        sources = list(bank.values()) if isinstance(bank, Mapping) else [] if bank is None else [bank]
        if bank is not None and not (sources and all(isinstance(one, str) and one for one in sources)):
            raise InputError(
                f"{key}: expected org/name, org/name@revision, a folder, or {{candidate: any of these}}, got {bank!r}"
            )
        here = Path(self.folder or ".").absolute()
        if not isinstance(bank, Mapping):
            return None if bank is None else resolve_existing(bank, here)
        for name in bank:
            # The names of a candidate's parts are known, and checked, once it has been split.
            parts = any(isinstance(one, Mapping) and one.get("split_by") for one in self.candidates.values())
            if name not in self.candidates and not parts:
                raise InputError(unknown_key_message(str(name), tuple(self.candidates), key))
        return {name: resolve_existing(source, here) for name, source in sorted(bank.items())}

    def to_yaml(self) -> dict[str, Any]:
        """The fields as they are written to `OUT/config.yaml`: paths resolved, defaults included."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "folder"}
        values["candidates"] = {name: given.to_json() for name, given in self.parsed_candidates.items()}
        values["targets"] = {name: given.to_json() for name, given in self.parsed_targets.items()}
        values["final"] = dict(self.final)
        return values


CHOICES: dict[str, tuple[Any, ...]] = {
    "task": ("causal_lm", "sequence_classification", "image_classification"),
    "expert": ("lora", "full"),
    "delta_dtype": ("float32", "bfloat16", "float16"),
    "strategy": (
        "exhaustive", "auto", "random", "greedy", "beam", "annealing", "surrogate", "bayes", "gradient",
    ),
    "objective": ("merged", "ensemble"),
    "weights": ("equal", "continuous"),
    "merge_method": tuple(MERGE_PARAMETERS),
}  # fmt: skip
CONTINUOUS = ("auto", "random", "bayes", "gradient")
LOWEST = {
    "tokens_per_batch": 1,
    "max_trials": 1,
    "max_example_evaluations": 1,
    "max_seconds": 0,
    "min_datasets": 1,
    "max_datasets": 1,
    "max_cost": 0,
    "verify_top_k": 0,
    "fidelity_mixtures": 4,
}
MAX_EXHAUSTIVE = 16


def field_help() -> Iterable[tuple[str, str, str]]:
    """(name, default, help) of every field of `MergeToMixConfig`, for `--help`."""
    for item in fields(MergeToMixConfig):
        default = item.default if item.default is not MISSING else {}
        yield item.name, str(default), item.metadata["help"]
