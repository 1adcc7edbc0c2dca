"""The configuration of a run, checked before anything heavy is imported.

`MergeToMixConfig` stands beside TRL's `SFTConfig` and `ModelConfig` in one flat YAML; it holds only what those two do not.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

from m2m_hf.config import checks
from m2m_hf.config.candidates import CandidateConfig
from m2m_hf.config.checks import BOOLEAN, LABELS, Rule, integer, mapping, number, one_of, option
from m2m_hf.config.targets import SCORERS, TargetConfig
from m2m_hf.core.jsonable import is_number
from m2m_hf.errors import InputError

MERGE_PARAMETERS: dict[str, dict[str, Any]] = {  # what each merge method takes, with its default
    "average": {},
    "task_arithmetic": {"scaling": 0.4},  # this and the next as Yadav et al. (2023) advise where nothing is tuned
    "ties": {"scaling": 1.0, "density": 0.2},
    "dare": {"density": 0.5},
    "linear": {},
}
MERGE_RULES = {
    "scaling": checks.POSITIVE,
    "density": Rule("a share above 0, at most 1", lambda value: is_number(value) and 0 < value <= 1),
}
YAML_ONLY = ("candidates", "targets", "labels", "merge_parameters", "final")
CLASSIFICATION = "task: sequence_classification or image_classification"
CONTINUOUS = ("auto", "random", "bayes", "gradient")
NOT_TRAINED = {  # field -> what objective: trained takes, and why nothing else
    "fine_tunes": ((None, "0", 0), "fine-tunes every mixture that it scores"),
    "method": ((None,), "merges nothing"),
    "merge_method": (("average",), "merges nothing"),
    "weights": (("equal",), "could not tell apart weights that come to the same rows"),
    "race": ((None, False), "spends its time on fine-tuning, and no race saves that"),
    "max_example_evaluations": ((None,), "is bounded by max_trials"),
    "max_seconds": ((None,), "is bounded by max_trials"),
    "allow_mixed_training": ((False,), "trains every mixture with the run's own settings"),
}
MERGE_TO_MIX = {  # what method: merge_to_mix takes
    "objective": ("merged",),
    "merge_method": ("average",),
    "weights": ("equal",),
    "fine_tunes": (None, "0", 0),
    "one_standard_error": (False,),
}
MAX_EXHAUSTIVE = 16
FINE_TUNES = 3
NUMBER = re.compile("[0-9]{1,6}")
SOURCES = Rule(
    "org/name, org/name@revision, a folder, or {candidate: any of these}",
    lambda value: (
        checks.is_text(value) or (bool(value) and mapping("", str, str).accepts(value) and all(value.values()))
    ),
)


def number_of(value: Any) -> int:
    """The whole number that a value or a flag is; 0 for anything else."""
    return int(value) if type(value) is int or (isinstance(value, str) and NUMBER.fullmatch(value)) else 0


def filled(example: str) -> Rule:
    return Rule(f"at least one, such as {example}", lambda value: isinstance(value, Mapping) and len(value) > 0)


@dataclass
class MergeToMixConfig:
    """Everything about a run that TRL's own configurations do not say. Its fields share one flat YAML with theirs.

    Raises:
        InputError: at construction, naming the field, what was given and what was expected.
    """

    candidates: dict[str, Any] = option(
        filled("my_data: {path: json, data_files: my_data.jsonl}"),
        dict,
        "YAML only: name -> what load_dataset takes, plus max_examples, columns, template, where, split_by, required, excluded, "
        "cost, license, labels.",
    )
    targets: dict[str, Any] = option(
        filled("my_task: {scorer: choice, data: {path: json, data_files: validation.jsonl}}"),
        dict,
        "YAML only: name -> scorer, data, test_data, metric, weight, min_delta; see below.",
    )
    task: str = option(
        one_of("causal_lm", "sequence_classification", "image_classification"),
        "causal_lm",
        "causal_lm (TRL's SFTTrainer), sequence_classification (text and label) or image_classification (image and label): "
        "transformers' Trainer, with one frozen head for all, the model's own or made of the labels' names.",
    )
    expert: str = option(
        one_of("lora", "full"),
        "lora",
        "What is trained for every candidate: lora (an adapter) or full (all parameters; stored as weight deltas).",
    )
    trained_parameters: str | None = option(
        checks.text("a regular expression"),
        help="expert: full: a regular expression; only parameters with such a name are trained and kept (default: all).",
    )
    delta_dtype: str = option(
        one_of("float32", "bfloat16", "float16"),
        "float32",
        "expert: full: dtype of the stored deltas: float32 is lossless; bfloat16 or float16 halve the disk space.",
    )
    labels: list[str] | dict[str, str] | None = option(
        LABELS,
        help="YAML only; classification: the label space, a list or {label: words}. Every row is then a choice among all of it "
        "(default: the model's own classifier's, else among the labels of the row's own dataset).",
    )
    label_template: str = option(
        Rule("a text with {label} in it", lambda value: isinstance(value, str) and "{label}" in value),
        "{label}",
        "Classification: the text that is embedded for a label, such as 'a photo of a {label}'.",
    )
    strategy: str = option(
        one_of("exhaustive", "auto", "random", "greedy", "beam", "surrogate", "bayes", "gradient"),
        "exhaustive",
        "How mixtures are proposed: exhaustive (all 2^N-1 subsets), random, greedy, beam, surrogate, bayes, gradient, or "
        "auto, which chooses and says why.",
    )
    objective: str = option(
        one_of("merged", "ensemble", "trained"),
        "merged",
        "What scores a mixture: merged (the adapters' exact average), ensemble (their probabilities' average) or trained (a "
        "model fine-tuned on the mixture; max_trials bounds how many).",
    )
    weights: str = option(
        one_of("equal", "continuous"),
        "equal",
        "equal (mixtures are subsets) or continuous (any weights; they become shares of the data).",
    )
    race: bool | None = option(
        BOOLEAN, help="Stop scoring mixtures that can no longer win (default: with every strategy but exhaustive)."
    )
    adapters: str | dict[str, str] | None = option(
        SOURCES,
        help="Take missing adapters from org/name or org/name@revision, as m2m push wrote them, or from a folder; of the same "
        "data and settings only. In the YAML also {candidate: org/name or a folder}, adapters that were trained without m2m.",
    )
    experts: str | dict[str, str] | None = option(
        SOURCES,
        help="The same with expert: full: org/name or a folder with the experts of another run, or in the YAML {candidate: "
        "org/name or a folder} of finished fine-tunes of the base model.",
    )
    changed_candidates: str = option(
        one_of("refuse", "retrain", "keep"),
        "refuse",
        "When a candidate's rows have changed since its adapter was trained: refuse, saying how many are new, gone and the same; "
        "retrain (that adapter alone, and score the mixtures with it again); or keep (the adapter stands in, marked stale, and "
        "whatever is fine-tuned is trained on the rows as they are now).",
    )
    max_trials: int | None = option(
        integer(1), help="Maximum number of mixtures, including base, singles and all together."
    )
    max_example_evaluations: int | None = option(
        integer(1), help="Maximum number of examples scored, over all mixtures."
    )
    max_seconds: float | None = option(number(0), help="Maximum time for scoring mixtures, in seconds.")
    min_datasets: int = option(integer(1), 1, "Fewest candidates in a mixture.")
    max_datasets: int | None = option(integer(1), help="Most candidates in a mixture.")
    max_cost: float | None = option(
        number(0),
        help="Most that the candidates of a mixture may cost together; a candidate costs its tokens, or its cost.",
    )
    licenses: list[str] | None = option(
        Rule("a list of names", checks.is_texts),
        help="Only candidates with one of these as their license may be in a mixture.",
    )
    merge_method: str = option(
        one_of(*MERGE_PARAMETERS),
        "average",
        f"How adapters are merged: average (the method's own), or to compare with: {', '.join([*MERGE_PARAMETERS][1:])}.",
    )
    merge_parameters: dict[str, Any] = option(
        mapping("names and numbers"),
        dict,
        "YAML only: scaling (task_arithmetic 0.4, ties 1), density (ties 0.2, dare 0.5).",
    )
    one_standard_error: bool = option(
        BOOLEAN, False, "Take mixtures within one standard error of the best as tied, and choose the smallest."
    )
    parallel_adapters: str = option(
        Rule("auto, or an integer of at least 1", lambda value: value == "auto" or number_of(value) >= 1),
        "auto",
        "How many adapters train side by side on one base, each as if alone: a number, 1 for one after another, or auto (on a "
        "GPU up to 32, as memory allows; on a CPU one, but for very small models).",
    )
    tokens_per_batch: int | None = option(
        integer(1), help="Scoring: tokens in one forward pass with padding (1024 on a CPU; measured on a GPU)."
    )
    allow_overlap: bool = option(BOOLEAN, False, "Continue even if a candidate contains rows of a target.")
    allow_other_bases: bool = option(
        BOOLEAN,
        False,
        "Take adapters: that name another base model than this run's, where both names mean the same weights.",
    )
    allow_metric_code: bool = option(
        BOOLEAN, False, "Load metrics and harness tasks of your own, which runs the code in them."
    )
    allow_mixed_training: bool = option(
        BOOLEAN,
        False,
        "Let candidates have training: of their own. Their adapters then no longer stand for one model trained on all of "
        "them; recipes/ablate_uniformity.py measures what that costs.",
    )
    method: str | None = option(
        one_of("merge_to_mix"),
        help="merge_to_mix: the paper's method, unchanged: the best average of all subsets, nothing fine-tuned before choosing.",
    )
    fine_tunes: str | None = option(
        Rule(
            "auto, or an integer of at least 0",
            lambda value: value == "auto" or NUMBER.fullmatch(str(value)) is not None,
        ),
        help="How many mixtures to really fine-tune before choosing by their scores: the best of two or more by the search, all "
        "candidates together, then those from which the choice is expected to gain most. 0: choose by the search alone; auto: as "
        "many as take twice the steps of the adapters, 1 to 8 (default: 3).",
    )
    fidelity_mixtures: int | None = option(
        integer(4), help="m2m fidelity: mixtures to fine-tune (default: all where there are up to 15, else 16)."
    )
    train_final: bool = option(BOOLEAN, True, "Fine-tune on the chosen mixture at the end, and score it.")
    final: dict[str, Any] = option(
        mapping("fields of SFTConfig or ModelConfig"),
        dict,
        "YAML only: fields of SFTConfig or ModelConfig for the final fine-tune alone.",
    )
    folder: str | None = option(
        Rule("a folder", lambda value: isinstance(value, (str, PathLike))),
        help="What relative data paths are relative to (default: where the YAML is).",
    )

    def __post_init__(self) -> None:
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        optional = {item.name for item in fields(self) if item.default is None}
        given = {key: value for key, value in values.items() if value is not None or key not in optional}
        checks.check_fields(given, checks.rules(MergeToMixConfig))
        self.parallel = number_of(self.parallel_adapters) or "auto"
        self.to_verify = self._to_verify()
        folder = Path(self.folder or ".").absolute()
        self.adapters, self.experts = resolve_sources(self.adapters, folder), resolve_sources(self.experts, folder)
        self.parsed_labels = checks.names_of_labels(self.labels)
        self.parsed_candidates = {
            name: CandidateConfig.parse(self.candidates[name], f"candidates.{name}", folder)
            for name in sorted([checks.check_name(name, "candidate") for name in self.candidates])
        }
        self.parsed_targets = {
            checks.check_name(name, "target"): TargetConfig.parse(entry, f"targets.{name}", folder)
            for name, entry in self.targets.items()
        }
        for problems in (task_problems, expert_problems, search_problems, candidate_problems):
            for problem in problems(self):
                raise InputError(problem)

    def _to_verify(self) -> int | str:
        """How many mixtures are fine-tuned before one is chosen, or `auto`."""
        if self.fine_tunes is None:
            return 0 if self.method or self.objective == "trained" else FINE_TUNES
        return "auto" if self.fine_tunes == "auto" else number_of(self.fine_tunes)

    @property
    def bank(self) -> str | dict[str, str] | None:
        """Where experts come from that are not trained here: `adapters` or `experts`."""
        return self.experts if self.expert == "full" else self.adapters

    def to_yaml(self) -> dict[str, Any]:
        """The fields as they are written to `OUT/config.yaml`: paths resolved, defaults included."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "folder"}
        values["candidates"] = {name: candidate.to_json() for name, candidate in self.parsed_candidates.items()}
        values["targets"] = {name: target.to_json() for name, target in self.parsed_targets.items()}
        values["final"] = dict(self.final)
        return values


def resolve_sources(sources: str | dict[str, str] | None, folder: Path) -> str | dict[str, str] | None:
    """`adapters` or `experts` with local paths made absolute."""
    if isinstance(sources, Mapping):
        return {name: checks.resolve_existing(source, folder) for name, source in sorted(sources.items())}
    return None if sources is None else checks.resolve_existing(sources, folder)


def check_merge_parameters(method: str, parameters: Any, where: str) -> None:
    """Refuses parameters that a merge method does not take."""
    checks.check_fields({where: parameters}, {where: mapping("names and numbers")})
    for key in parameters:
        if key not in MERGE_PARAMETERS[method]:
            raise InputError(
                f"{where}.{key}: merge_method {method} takes {', '.join(MERGE_PARAMETERS[method]) or 'none'}"
            )
    checks.check_fields(parameters, MERGE_RULES, where)


def task_problems(config: MergeToMixConfig) -> Iterator[str]:
    """What belongs to another kind of task than the run's."""
    language = config.task == "causal_lm"
    if language and config.labels is not None:
        yield f"labels: {config.labels!r} belongs to {CLASSIFICATION}"
    if language and config.label_template != "{label}":
        yield f"label_template: {config.label_template!r} belongs to {CLASSIFICATION}"
    if config.labels is not None and len(config.parsed_labels or ()) < len(config.labels):
        yield f"labels: expected every label once, got {config.labels!r}"
    for name, candidate in config.parsed_candidates.items():
        if language and candidate.labels is not None:
            yield f"candidates.{name}.labels: belongs to {CLASSIFICATION}"
        if not language and candidate.data.template:
            yield f"candidates.{name}.template: belongs to task: causal_lm"
    scorers = tuple(name for name, kind in SCORERS.items() if language or kind.classifies)
    for name, target in config.parsed_targets.items():
        templates = any(data.template for data in target.parts.values())
        if not language and (templates or target.normalize != "none" or target.num_fewshot is not None):
            yield f"targets.{name}: normalize, template and num_fewshot belong to task: causal_lm"
        if target.kind not in scorers:
            yield f"targets.{name}.scorer: expected {' or '.join(scorers[:2])} for {config.task}, got {target.kind}"


def expert_problems(config: MergeToMixConfig) -> Iterator[str]:
    """What belongs to another kind of expert than the run's."""
    full = config.expert == "full"
    if full and config.adapters is not None:
        yield f"adapters: {config.adapters!r} belongs to expert: lora; with expert: full give experts:"
    for name, default in (("trained_parameters", None), ("delta_dtype", "float32"), ("experts", None)):
        if not full and getattr(config, name) != default:
            yield f"{name}: {getattr(config, name)!r} belongs to expert: full"
    if full and config.merge_method == "linear":
        yield "merge_method: linear averages the factors of LoRA adapters, which full experts do not have"
    try:
        re.compile(config.trained_parameters or "")
    except re.error as error:
        yield f"trained_parameters: {config.trained_parameters!r} is no regular expression ({error})"
    place, other = ("{model}", "{adapter}") if full else ("{adapter}", "{model}")
    for name, target in config.parsed_targets.items():
        if any(other in part for part in (*target.command, *target.test_command)):
            yield f"targets.{name}.command: with expert: {config.expert} give {place}, not {other}"


def search_problems(config: MergeToMixConfig) -> Iterator[str]:
    """A strategy or a merge method that cannot do what is asked."""
    if config.strategy == "exhaustive" and len(config.candidates) > MAX_EXHAUSTIVE:
        yield (
            f"candidates: {len(config.candidates)} given, but exhaustive search scores 2^N-1 mixtures and takes at most "
            f"{MAX_EXHAUSTIVE}. Use strategy: auto"
        )
    if config.weights == "continuous" and config.strategy not in CONTINUOUS:
        yield (
            f"strategy: {config.strategy} proposes subsets only; with weights: continuous expected one of "
            f"{', '.join(CONTINUOUS)}"
        )
    if config.weights == "continuous" and config.merge_method != "average":
        yield f"weights: continuous needs merge_method: average, got {config.merge_method}"
    for name, (taken, why) in NOT_TRAINED.items() if config.objective == "trained" else ():
        if (value := getattr(config, name)) not in taken:
            yield f"{name}: {value!r} does not go with objective: trained, which {why}; leave it out"
    for name, allowed in MERGE_TO_MIX.items() if config.method else ():
        if (value := getattr(config, name)) not in allowed:
            yield f"{name}: {value!r} is not of method: merge_to_mix, the method of the paper; leave out one of the two"
    check_merge_parameters(config.merge_method, config.merge_parameters, "merge_parameters")


def candidate_problems(config: MergeToMixConfig) -> Iterator[str]:
    """Names that clash or are unknown, and trainings that may not differ."""
    shared = [name for name, count in Counter(name.lower() for name in config.candidates).items() if count > 1]
    if shared:
        yield f"candidates: names that differ only in case share a folder: {', '.join(sorted(shared))}"
    split = any(candidate.split_by for candidate in config.parsed_candidates.values())
    for key in ("adapters", "experts"):
        sources = getattr(config, key)
        for name in sources if isinstance(sources, Mapping) else ():
            if name not in config.candidates and not split:  # parts of a split are checked once they are known
                yield checks.unknown_key_message(name, config.candidates, key)
    for name, candidate in config.parsed_candidates.items():
        if candidate.training and not config.allow_mixed_training:
            yield (
                f"candidates.{name}.training: an adapter that is trained differently cannot be averaged with the others and "
                "stand for one model trained on all. Leave it out, or set allow_mixed_training: true to measure its effect"
            )
