"""What a run is made of: data, model, scorers, objectives; each loaded when it is first asked for, and checked before use."""

import contextlib
import os
import socket
import time
from dataclasses import asdict, fields, replace
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments
from trl import ModelConfig, SFTConfig

from m2m_hf.analysis.study import Study
from m2m_hf.config import parsing
from m2m_hf.config.run_config import MergeToMixConfig
from m2m_hf.config.search_space import search_space
from m2m_hf.config.yaml_files import dump_yaml, plain
from m2m_hf.console import Terminal
from m2m_hf.core.objective import Objective, TargetInfo
from m2m_hf.core.space import SearchSpace
from m2m_hf.data.causal_lm import load_causal_lm_data
from m2m_hf.data.classification import Length, label_words, load_classification_data, words_of
from m2m_hf.data.loading import pin_data, split_candidates
from m2m_hf.data.rows import Candidate, LoadedData, Target, overlap
from m2m_hf.errors import InputError, holds_secret
from m2m_hf.merging.dense_stack import Stack, open_stack
from m2m_hf.merging.methods import AVERAGE, MergeMethod
from m2m_hf.modeling.devices import is_sharded, shared_clock
from m2m_hf.modeling.heads import LONGEST, SCALE, Head, cut, own_head
from m2m_hf.modeling.inspection import check_model
from m2m_hf.modeling.loading import (
    base_fingerprint,
    load_base,
    load_config,
    load_head,
    make_plan,
    pin_revision,
    quantization_facts,
)
from m2m_hf.modeling.processing import image_mode, load_image_processor, load_tokenizer, patches
from m2m_hf.objectives.ensemble import ENSEMBLE_METRICS, EnsembleObjective
from m2m_hf.objectives.fine_tuned import FineTunedModels
from m2m_hf.objectives.merged import GatedObjective, MergedObjective
from m2m_hf.objectives.trained import TrainedObjective
from m2m_hf.scoring.causal_lm import make_causal_lm_scorer
from m2m_hf.scoring.classification import ClassificationScorer
from m2m_hf.scoring.external import CallableScorer, CommandScorer, HarnessScorer
from m2m_hf.scoring.scorers import LogprobScorer, Scorer
from m2m_hf.search.model_based import choose_strategy
from m2m_hf.storage.files import fingerprint, read_json_or_empty, write_atomic, write_json
from m2m_hf.storage.journal import Journal
from m2m_hf.storage.keys import Keys, base_key
from m2m_hf.storage.run_folder import END, RunFolder, read_config
from m2m_hf.training.bank import LAUNCH, OPERATIONAL, Bank, differing, tokenizer_facts, uniform_facts
from m2m_hf.training.experts import ExpertKind, expert_kind
from m2m_hf.training.fine_tune import planned_steps
from m2m_hf.training.trackers import check_trackers
from m2m_hf.training.trainers import Settings

# What may change between two starts on one run folder: nothing that a finished adapter or trial depends on.
MUTABLE_FIELDS = {
    "strategy", "objective", "weights", "race", "max_trials", "max_example_evaluations", "max_seconds", "min_datasets",
    "max_datasets", "max_cost", "licenses", "one_standard_error", "tokens_per_batch", "train_final", "final",
    "allow_overlap", "allow_metric_code", "candidates", "verify_top_k", "fidelity_mixtures",
    "merge_method", "merge_parameters", "allow_mixed_training", "adapters", "experts",
    "output_dir",
    "model_name_or_path", "model_revision",  # the adapters' fingerprints know the weights themselves
}  # fmt: skip


def has_content(path: Path, content: str, patience: float = 10.0) -> bool:
    """Whether a file has this content, at the latest after some seconds: shared file systems take a moment to show it."""
    end = time.monotonic() + patience
    while True:
        with contextlib.suppress(OSError, UnicodeError):
            if path.read_text(encoding="utf-8") == content:
                return True
        if time.monotonic() >= end:
            return False
        time.sleep(0.1)


def has_ensemble(scorer: Scorer, metric: str) -> bool:
    """Whether the ensemble objective can be had of a target."""
    return isinstance(scorer, LogprobScorer) and metric in ENSEMBLE_METRICS


class Ingredients:
    """What a run is made of.

    Args:
        config: candidates, target and how to search.
        args: TRL's training arguments, the same for every adapter and for the final fine-tune.
        model_args: base model and LoRA shape.
        terminal: where to print; by default standard output, and nothing on processes other than the main one.

    Raises:
        InputError: from any method, for whatever is wrong with what was given.
    """

    def __init__(
        self, config: MergeToMixConfig, args: SFTConfig, model_args: ModelConfig, terminal: Terminal | None = None
    ) -> None:
        parsing.check_trl(args, model_args)
        check_trackers(args)
        for name, value in {**parsing.trl_fields(args, model_args), **config.to_yaml()}.items():
            if holds_secret(str(value)):
                raise InputError(
                    f"{name}: a token or password stands in it, which the run folder would show; use an environment variable"
                )
        pin_data(config)
        self.config = config = split_candidates(config)
        self.args = args
        self.model_args = pin_revision(model_args)
        self.state = PartialState(cpu=args.use_cpu)
        self.terminal = terminal or Terminal(quiet=not self.state.is_main_process)
        self.plan = make_plan(self.model_args, config.task)
        self._check_kind()
        self._expert(self.model_args)
        self.run = RunFolder(args.output_dir)
        self._tokens_per_batch = config.tokens_per_batch or (1024 if self.state.device.type == "cpu" else 16384)
        self._checked = False
        self._stack: Stack | None = None
        self._stack_method = AVERAGE
        self._head_of_names: Head | None = None
        self.merge_method = MergeMethod.of(config.merge_method, config.merge_parameters, args.seed)

    @cached_property
    def tokenizer(self) -> Any:
        """That of texts: of the rows, or of the names of images' labels."""
        return load_tokenizer(self.model_args, self.args, generates=self.plan is None)

    @cached_property
    def processing(self) -> Any:
        """What makes the model's input of rows: the tokenizer, or the image processor."""
        images = self.config.task == "image_classification"
        return load_image_processor(self.model_args) if images else self.tokenizer

    @cached_property
    def head(self) -> Head | None:
        """The frozen head of a classification run; None for a causal LM. Made of names, it is made when the base is loaded."""
        if self.plan is None:
            return None
        if self.plan.own is not None:
            return own_head(self.plan, tuple(self._words))
        found = Head.read(self.run.head, self.plan, self._label_space is not None, self._head_fingerprint)
        if found is None:
            _ = self.base  # loads it, and makes the head
            found = self._head_of_names
        return found

    def _known_head(self) -> Head:
        assert self.head is not None
        return self.head

    @cached_property
    def _length(self) -> Length:
        """Counts the tokens of a classifier's input."""
        if self.config.task == "image_classification":
            return Length(patches(load_config(self.model_args)))
        positions = check_model(self.model_args, self.args, None, self.plan)
        limit = min(positions, self.tokenizer.model_max_length, self.args.max_length or positions)
        return Length(int(limit), self.tokenizer)

    @cached_property
    def _head_fingerprint(self) -> str:
        """What recognises a head that is made of names."""
        assert self.plan is not None
        about = [asdict(self.plan), self._words, self.config.label_template, SCALE, LONGEST]
        return fingerprint(
            [self._base_fingerprint, self.model_args.dtype, tokenizer_facts(self.tokenizer, False), *about]
        )

    @property
    def _label_space(self) -> dict[str, str] | None:
        """Label -> words of the space that every row is a choice in; None where it is one among its own dataset's labels.

        Raises:
            InputError: labels that the model's own classifier does not have.
        """
        given = self.config.parsed_labels
        if self.plan is None or self.plan.own is None:
            return given and {label: label_words(word) for label, word in given.items()}
        if others := sorted(set(given or ()) - set(self.plan.own)):
            raise InputError(
                f"labels: {', '.join(others)} are none of the labels of the model's classifier: {', '.join(self.plan.own)[:300]}"
            )
        return {label: label for label in self.plan.own if given is None or label in given}

    @cached_property
    def _words(self) -> dict[str, str]:
        """Label -> words, of every label that the head knows."""
        return words_of(self._label_space, self.candidates, self.targets)

    @cached_property
    def _data(self) -> LoadedData:
        if self.plan is not None:
            return load_classification_data(
                self.config.parsed_candidates,
                self.config.parsed_targets,
                self.config.task,
                None if self._label_space is None else tuple(self._label_space),
                self._length,
                seed=self.args.seed,
                mode=image_mode(load_config(self.model_args)),
            )
        return load_causal_lm_data(
            self.config.parsed_candidates,
            self.config.parsed_targets,
            self.tokenizer,
            seed=self.args.seed,
            max_length=None if self.args.packing else self.args.max_length,
            assistant_only_loss=self.args.assistant_only_loss,
        )

    @property
    def candidates(self) -> dict[str, Candidate]:
        """The candidates by name, loaded and checked."""
        return self._data.candidates

    @property
    def targets(self) -> dict[str, Target]:
        """The targets by name, loaded and checked."""
        return self._data.targets

    @cached_property
    def overlap(self) -> dict[tuple[str, str], int]:
        """(candidate, target) -> rows of the target that stand in the candidate too."""
        return {
            (name, target): overlap(one, self.targets[target].questions)
            for name, one in self.candidates.items()
            for target in self.targets
        }

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What all adapters have in common: see `uniform_facts`."""
        return self._facts(self.args, self.model_args)

    @cached_property
    def bank(self) -> Bank:
        mixed = {
            name: self._facts(*self._settings(name)) for name, one in self.candidates.items() if one.config.training
        }
        return Bank(self.run.adapters, self.candidates, self.facts, mixed)

    def _expert(self, model_args: ModelConfig) -> ExpertKind:
        """The kind of the experts, with its settings."""
        parameters, dtype = self.config.trained_parameters, self.config.delta_dtype
        return expert_kind(self.config.expert).of(model_args, self.plan, parameters, dtype)

    def _training(self, args: SFTConfig, model_args: ModelConfig) -> Settings:
        """How a model is fine-tuned with these arguments."""
        return Settings(
            args,
            self.processing,
            self._expert(model_args),
            self.head,
            self._length.limit if self.plan is not None else 0,
            {name: sorted(one.rows.unique("label")) for name, one in self.candidates.items()} if self.plan else {},
        )

    def _settings(self, name: str) -> tuple[SFTConfig, ModelConfig]:
        """What a candidate's expert is trained with: the same for all, unless mixed training is allowed."""
        overrides = self.candidates[name].config.training
        where = f"candidates.{name}.training"
        return (
            parsing.with_overrides(self.args, self.model_args, overrides, where)
            if overrides
            else (self.args, self.model_args)
        )

    def _facts(self, args: SFTConfig, model_args: ModelConfig) -> dict[str, Any]:
        """What a model depends on beside its data: see `uniform_facts`."""
        images = self.config.task == "image_classification"
        processing = (
            {"image_processor": fingerprint(plain(self.processing.to_dict()))}
            if images
            else tokenizer_facts(self.tokenizer, self._data.format in ("chat", "messages"))
        )
        more: dict[str, Any] = {}
        if quantization := quantization_facts(model_args):
            more["quantization"] = fingerprint(quantization)
        if self.plan is not None:
            more["head"] = fingerprint(asdict(self.plan))
            more["labels"] = None if self._label_space is None else fingerprint(self._label_space)
            more["label_template"] = self.config.label_template
            if self.plan.two_towers:
                more |= tokenizer_facts(self.tokenizer, False)
            if not images:
                more["limit"] = self._length.limit
                more["sides"] = [self.tokenizer.truncation_side, self.tokenizer.padding_side]
        return uniform_facts(
            args,
            self._expert(model_args),
            processing,
            self._base_fingerprint,
            model_args.dtype,
            self._data.format,
            more,
        )

    @cached_property
    def _base_fingerprint(self) -> str:
        return base_fingerprint(self.model_args)

    @cached_property
    def base(self) -> Any:
        """The base model, loaded once for the adapters, the search and the final fine-tune."""
        model = self._load_base()
        if self.config.task == "sequence_classification":  # some models find by it where a text ends
            model.config.pad_token_id = self.tokenizer.pad_token_id
        # Now, while nothing is on the model that changes what it says.
        if self.plan is not None and self.plan.own is None:
            closed, template = self._label_space is not None, self.config.label_template
            self._head_of_names = load_head(
                self.plan, self._words, closed, template, model, self.tokenizer, self.model_args, self.args
            )
        return model

    def _load_base(self, to_train: bool = False) -> Any:
        self.terminal.say(f"loading {self.model_args.model_name_or_path} ({self.model_args.dtype})", style="dim")
        return load_base(self.model_args, self.args, to_train, self.plan)

    def _load_other(self, folder: Path) -> Any:
        """Another model, loaded as the base model is."""
        other = replace(self.model_args, model_name_or_path=str(folder), model_revision="main")
        return load_base(other, self.args, plan=self.plan)

    def _plain_base(self) -> Any:
        """The base model without the adapters' stack on it."""
        self._detach()
        return self.base

    def _detach(self) -> None:
        if self._stack is not None:
            self._stack.detach()
            self._stack = None

    def _base_to_train(self) -> Any:
        """The base model; one of its own for every training that cuts it into pieces."""
        return self._load_base(to_train=True) if is_sharded() else self._plain_base()

    def _open_stack(self, method: MergeMethod) -> Stack:
        """The adapters on the base model, ready to be merged so; one stack at a time."""
        wanted = AVERAGE if method.gated else method
        _ = self.head  # made or read now, where gradients may follow
        if self._stack is None or self._stack_method != wanted:
            base = self._plain_base()
            adapters = self.bank.load()
            self._stack = open_stack(base, adapters, wanted)
            self._stack_method = wanted
        return self._stack

    @cached_property
    def scorers(self) -> dict[str, dict[str, Scorer]]:
        """Of every target `validation` and, where there are sealed rows, `test`."""
        positions = self._expert(self.model_args).check_model(self.model_args, self.args, self.plan)
        return {name: self._scorers(target, positions) for name, target in self.targets.items()}

    def _scorers(self, target: Target, positions: int) -> dict[str, Scorer]:
        config, where = target.config, f"targets.{target.name}"
        allow = self.config.allow_metric_code
        if config.kind == "command":
            base = self.model_args.model_name_or_path
            commands = {"validation": config.command, "test": config.test_command}
            return {
                part: CommandScorer(one, config.metric, base, config.timeout) for part, one in commands.items() if one
            }
        if config.kind == "lm_eval":
            tasks = {"validation": config.task, "test": config.test_task}
            return {
                part: HarnessScorer(config, task, self.tokenizer, allow, where) for part, task in tasks.items() if task
            }
        rows = {"validation": target.rows, "test": target.test_rows}
        if config.kind == "callable":
            given = {part: rows[part] for part in rows if part == "validation" or rows[part]}
            return {part: CallableScorer(config.scorer, one, self.processing) for part, one in given.items()}
        if self.plan is not None:
            return {
                part: ClassificationScorer(
                    config,
                    one,
                    self.processing,
                    self._known_head,
                    self._length,
                    allow_metric_code=allow,
                    where=where,
                )
                for part, one in rows.items()
                if one
            }
        return {
            part: make_causal_lm_scorer(config, one, self.tokenizer, positions, allow_metric_code=allow, where=where)
            for part, one in rows.items()
            if one
        }

    @property
    def _test_scorers(self) -> dict[str, Scorer]:
        return {name: parts["test"] for name, parts in self.scorers.items() if "test" in parts}

    @property
    def failed(self) -> dict[str, str]:
        """Candidate -> why its training came to nothing, of those of which that is so."""
        told = {
            name: read_json_or_empty(self.run.adapters / name / "training.json").get("failed")
            for name in self.candidates
        }
        return {name: str(reason) for name, reason in told.items() if reason}

    @property
    def space(self) -> SearchSpace:
        """The mixtures that may be proposed, of candidates that have or will have an adapter.

        Raises:
            InputError: there are none.
        """
        return search_space(self.config, {name: one.tokens for name, one in self.candidates.items()}, self.failed)

    @cached_property
    def keys(self) -> dict[str, Keys]:
        """Of every target what makes the keys of its trials; the adapters must be there."""
        adapters = {name: record["fingerprint"] for name, record in self.bank.training().items()}
        base = base_key(self.facts)
        scorers = {name: parts["validation"] for name, parts in self.scorers.items()}
        return {name: Keys(base, one.fingerprint, one.examples, adapters) for name, one in scorers.items()}

    def _objectives(self, kind: str, method: MergeMethod | None = None) -> list[Objective]:
        """What scores mixtures, `merged` (as the run merges, or by another method) or `ensemble`; one for every target."""
        objectives: list[Objective] = []
        method = (method or self.merge_method) if kind == "merged" else AVERAGE
        for name, target in self.targets.items():
            scorer = self.scorers[name]["validation"]
            gated = expert_kind(self.config.expert).gated
            differentiable = gated and method.name == "average" and isinstance(scorer, LogprobScorer)
            merged = (GatedObjective if differentiable else MergedObjective)(
                partial(self._open_stack, method),
                scorer,
                self.keys[name],
                self._target_info(target),
                tokens_per_batch=self._tokens_per_batch,
                method=method,
                gated=gated,
            )
            if kind == "merged":
                objectives.append(merged)
                continue
            assert isinstance(scorer, LogprobScorer)
            objectives.append(EnsembleObjective(merged, scorer, target.config, self.run.root / "ensemble"))
        return objectives

    def _target_info(self, target: Target) -> TargetInfo:
        """The target as the search sees it."""
        examples = self.scorers[target.name]["validation"].examples
        return TargetInfo(target.name, examples, target.config.weight, target.config.min_delta)

    @cached_property
    def models(self) -> FineTunedModels:
        """The models that were fine-tuned on mixtures to be compared; the adapters must be there."""
        return FineTunedModels(
            self.run.trained, self.candidates, next(iter(self.keys.values())).model, self._base_to_train, self.args,
            lambda: self._training(self.args, self.model_args), self._launched_otherwise,
        )  # fmt: skip

    @property
    def _launched_otherwise(self) -> list[str]:
        """In what this launch differs from the one that trained the adapters."""
        there = next(iter(self.bank.training().values()))["uniform"]
        return differing({name: self.facts.get(name) for name in LAUNCH}, {name: there.get(name) for name in LAUNCH})

    def _trained_objectives(self, models: FineTunedModels) -> list[TrainedObjective]:
        """What scores those models, or the base model; one for every target."""
        return [
            TrainedObjective(
                models,
                self._plain_base,
                partial(self._open_stack, AVERAGE),
                self.scorers[name]["validation"],
                self.keys[name],
                self._target_info(target),
                tokens_per_batch=self._tokens_per_batch,
            )
            for name, target in self.targets.items()
        ]

    @cached_property
    def journal(self) -> Journal:
        """The one that this process reads and writes; all processes must ask for it first at the same place."""
        found = Journal(self.run.trials, write=self.state.is_main_process)
        self.state.wait_for_everyone()  # or one would read what another writes already
        return found

    @cached_property
    def study(self) -> Study:
        """Fine-tunes mixtures and compares; the adapters must be there."""
        surrogates = {"merged": self._objectives("merged")}
        if all(has_ensemble(self.scorers[name]["validation"], one.config.metric) for name, one in self.targets.items()):
            surrogates["ensemble"] = self._objectives("ensemble")
        mixed = any(one.config.training for one in self.candidates.values())
        return Study(
            self.space,
            surrogates,
            self._trained_objectives(self.models),
            self.journal,
            progress=self.terminal.progress,
            failed=self.failed,
            clock=shared_clock,
            uniform=self.merge_method == AVERAGE and not mixed,
        )

    def _final_settings(self) -> tuple[SFTConfig, ModelConfig]:
        return parsing.with_overrides(self.args, self.model_args, self.config.final)

    def _broadcast(self, value: Any) -> Any:
        """What the main process has."""
        return broadcast_object_list([value])[0] if self.state.num_processes > 1 else value

    def _check_kind(self) -> None:
        """Refuses what this task, or this kind of expert, cannot do.

        Raises:
            InputError: with the reason.
        """
        overrides = {"final": self.config.final} | {
            f"candidates.{name}.training": one.training for name, one in self.config.parsed_candidates.items()
        }
        expert_kind(self.config.expert).check_settings(self.args, self.model_args, overrides)
        if self.plan is not None and (self.model_args.load_in_4bit or self.model_args.load_in_8bit):
            raise InputError(f"load_in_4bit, load_in_8bit: only for LoRA adapters of causal LMs; {self.config.task}")
        if self.plan is not None:
            named = self.plan.own is not None
            words = [label for label, word in (self.config.parsed_labels or {}).items() if label != word]
            images = self.config.task == "image_classification"
            useless = {
                "label_template": named and self.config.label_template != "{label}",
                f"labels: words for {', '.join(words)}": named and bool(words),
                "pad_token": named and images and self.args.pad_token is not None,
                "max_length": images and self.args.max_length != SFTConfig.max_length,
            }
            for name in (name for name, wrong in useless.items() if wrong):
                what = (
                    "images are not cut"
                    if name == "max_length"
                    else "the model's own classifier knows its labels by itself"
                )
                raise InputError(f"{name}: without effect, as {what}; leave it out")
            own = {item.name for item in fields(TrainingArguments)} | {"max_length", "pad_token"}
            plain_args = SFTConfig(output_dir="out", use_cpu=self.args.use_cpu, bf16=False)
            for item in fields(SFTConfig):
                given = getattr(self.args, item.name)
                if item.name not in own and item.init and given != getattr(plain_args, item.name):
                    raise InputError(f"{item.name}: belongs to task: causal_lm, got {given!r}")
            for name, none in (("label_smoothing_factor", 0.0), ("use_liger_kernel", False)):
                if getattr(self.args, name) != none:
                    raise InputError(f"{name}: not for classification with a frozen head; expected {none}")
            if str(getattr(self.args.train_sampling_strategy, "value", self.args.train_sampling_strategy)) != "random":
                raise InputError(f"train_sampling_strategy: expected random, got {self.args.train_sampling_strategy!r}")

    def check(self) -> None:
        """Reads and checks everything that was given, and shows it in a table, before anything is trained or written.

        Raises:
            InputError: anything that would make the run fail or mislead later.
        """
        if self._checked:
            return
        candidates, targets, scorers = self.candidates, self.targets, self.scorers
        least = len(candidates) + 2
        if self.config.max_trials is not None and self.config.max_trials < least:
            raise InputError(
                f"max_trials: at least {least} are needed for the base model, every single candidate and all together, "
                f"got {self.config.max_trials}"
            )
        self._check_search()
        self._check_words()
        if self.config.final:
            args, model_args = self._final_settings()
            self._expert(model_args).check_model(model_args, args, self.plan)
        rows = []
        shared = self.overlap
        for name, one in candidates.items():
            steps = planned_steps(self.args, one.trained_rows, one.tokens)
            found = sum(shared[name, target] for target in targets)
            figures = {"rows": len(one.rows), "tokens": one.tokens, "longest": one.longest, "truncated": one.truncated}
            if self.plan is not None:
                figures |= {"labels": len(one.rows.unique("label"))}
            if self.config.task == "image_classification":  # all of one size
                figures = {"rows": len(one.rows), "labels": figures["labels"]}
            figures |= {"steps": steps, "in target": found}
            rows.append([name, *(f"{figure:,}" for figure in figures.values())])
        self.terminal.table(f"candidates ({self._data.format} format)", ["", *figures], rows)
        if self.plan is not None:
            self.terminal.say(self._describe_head())
        for target in targets.values():
            self.terminal.say(f"target {target.name}: {self._describe(target)}")
        self.terminal.say("")
        for scored, parts in scorers.items():
            for part, scorer in parts.items():
                if scorer.truncated:
                    what = "prompts are too long for the model; their beginning"
                    what = "texts are too long; their end" if self.plan is not None else what
                    self.terminal.say(f"{scored}, {part}: {scorer.truncated} {what} is cut", "yellow")
        for name, one in candidates.items():
            if one.dropped:
                self.terminal.say(
                    f"{name}: {one.dropped} rows whose prompt alone fills max_length are left out", "yellow"
                )
        for asked in targets:
            leaking = [f"{name} ({shared[name, asked]})" for name in candidates if shared[name, asked]]
            if leaking and not self.config.allow_overlap:
                raise InputError(
                    f"rows of target {asked!r} also stand in {', '.join(leaking)}: a candidate that holds the questions looks "
                    "better than it is. Remove those rows, or say allow_overlap: true"
                )
        self._check_run_folder()
        self._check_targets()
        self.bank.check()
        self._checked = True

    def _check_words(self) -> None:
        """Refuses labels among which a row is a choice and that are the same words to the model.

        Raises:
            InputError: naming two of them.
        """
        if self.plan is None or self.plan.own is not None:
            return
        sets = {f"candidates.{name}": one.rows.unique("label") for name, one in self.candidates.items()}
        sets |= {f"targets.{name}": one.questions[0].choices for name, one in self.targets.items() if one.questions}
        if self._label_space is not None:
            sets = {"labels": tuple(self._label_space)}
        for where, labels in sets.items():
            seen: dict[tuple[int, ...], str] = {}
            for label in labels:
                text = self.config.label_template.replace("{label}", self._words[label])
                other = seen.setdefault(tuple(self.tokenizer(text, **cut(self.tokenizer))["input_ids"]), label)
                if other != label:
                    raise InputError(
                        f"{where}: {other!r} and {label!r} are the same words to the model; give them others"
                    )

    def _describe_head(self) -> str:
        """What classifies, for the line under the first table."""
        assert self.plan is not None
        if self.plan.own is not None:
            return f"head: the model's own classifier of {len(self.plan.own)} labels, frozen"
        among = "all of them" if self._label_space is not None else "those of its own dataset"
        tower = "the text tower" if self.plan.two_towers else "the base model"
        return f"head: {tower}'s embedding of {len(self._words)} labels' names, frozen; a row is a choice among {among}"

    def _describe(self, target: Target) -> str:
        """What a target is scored on and how, for the line under the first table."""
        config, parts = target.config, self.scorers[target.name]

        def rows(part: str) -> str:
            return f"{parts[part].examples:,} " if parts[part].examples else ""

        own = {
            "command": "scored by a command",
            "lm_eval": f"harness task {config.task}",
            "callable": "scored by a function",
        }
        words = [own.get(config.kind), f"{rows('validation')}validation rows" if rows("validation") else None]
        words += [f"{rows('test')}sealed test rows" if "test" in parts else "no test set", config.metric]
        if len(self.targets) > 1:
            words.append(f"weight {config.weight:g}")
        if config.min_delta is not None:
            words.append(f"at most {config.min_delta:g} worse than the base model")
        return ", ".join(filter(None, words))

    def _check_run_folder(self) -> None:
        """Refuses to go on in a folder whose run was configured otherwise.

        Raises:
            InputError: naming every field that differs.
        """
        self.run.refuse_links()
        if not self.run.config.exists() or len(self.bank.check()) == len(self.candidates):
            return  # nothing is there yet that another configuration could spoil
        try:
            there, now = read_config(self.run.config), yaml.safe_load(self.config_yaml())
        except InputError:
            return  # a crash cut it short; it is written again, and every adapter says how it was trained
        for one in (there, now):
            for key in (MUTABLE_FIELDS | OPERATIONAL) & set(one):
                del one[key]
            for target in one["targets"].values():
                for key in ("test_data", "test_command", "test_task", "weight", "min_delta", "timeout"):
                    target.pop(key, None)  # a sealed test may come later; the others only choose among scores
                (target.get("data") or {}).pop("revision", None)  # the fingerprints know the rows themselves
        # Targets may join and go; the journal keeps what was scored. But a name stands for one thing.
        for one, other in ((now, there), (there, now)):
            one["targets"] = {name: target for name, target in one["targets"].items() if name in other["targets"]}
        differences = differing(now, there)
        if differences:
            hint = ", or give a target that has changed another name" if now["targets"] != there["targets"] else ""
            raise InputError(
                f"{self.run.root} holds a run with another configuration: {'; '.join(differences)}. "
                f"Restore these fields, or choose another --output_dir{hint}"
            )

    def _target_fingerprints(self) -> dict[str, dict[str, str]]:
        """Target -> part -> what recognises its rows and how they are scored."""
        return {name: {part: one.fingerprint for part, one in parts.items()} for name, parts in self.scorers.items()}

    def _check_targets(self) -> None:
        """Refuses a target whose rows have changed since they were scored: old and new scores must not be compared.

        Raises:
            InputError: naming it.
        """
        known = read_json_or_empty(self.run.targets)
        for name, parts in self._target_fingerprints().items():
            for part, now in parts.items():
                there = known.get(name, {}).get(part, now)
                if there != now:
                    raise InputError(
                        f"targets.{name}: its {part} rows, or the code of its metric, have changed since they were scored "
                        f"({there} there, {now} now). Restore them, or give the target another name"
                    )

    def remember_targets(self) -> None:
        """Writes down what the targets are, now that something has been scored on them."""
        known = read_json_or_empty(self.run.targets)
        if not known and self.run.targets.exists():
            self.terminal.say(
                f"{os.path.relpath(self.run.targets)} was damaged: from now on it holds the targets as they are now",
                "yellow",
            )
        now = self._target_fingerprints()
        if self.state.is_main_process:
            write_json(self.run.targets, known | {name: known.get(name, {}) | parts for name, parts in now.items()})

    def _check_search(self) -> None:
        """Refuses objectives and strategies that the targets do not allow, before anything is trained."""
        kind = expert_kind(self.config.expert)
        config, space = self.config, self.space  # making the space refuses impossible constraints
        scorers = {name: parts["validation"] for name, parts in self.scorers.items()}
        likelihoods = config.objective == "merged" and config.merge_method == "average" and kind.gated
        likelihoods = likelihoods and all(isinstance(one, LogprobScorer) for one in scorers.values())
        for name, scorer in scorers.items():
            metric = self.targets[name].config.metric
            if config.objective == "ensemble" and not has_ensemble(scorer, metric):
                raise InputError(
                    f"targets.{name}: objective ensemble averages the probabilities of right answers; it needs scorer choice, "
                    f"classification or loss with one of {', '.join(ENSEMBLE_METRICS)} as its metric"
                )
        if not self.merge_method.gated:
            if self.model_args.load_in_4bit or self.model_args.load_in_8bit:
                raise InputError(
                    f"merge_method: {config.merge_method} writes merged weights, which a quantised base has not; expected average"
                )
            if not kind.whole_model and any(isinstance(one, CommandScorer) for one in scorers.values()):
                raise InputError(
                    f"merge_method: {config.merge_method} gives no adapter to hand to a command; expected average"
                )
        strategy = config.strategy
        if strategy == "gradient" and not likelihoods:
            raise InputError(
                "strategy: gradient needs expert: lora, objective: merged, merge_method: average and targets whose scorer is "
                "choice, classification or loss"
            )
        alone = config.objective == "ensemble" and len(scorers) == 1
        if strategy == "auto" and config.weights == "continuous" and not alone:
            strategy = choose_strategy(space, likelihoods)[0]
        if strategy == "bayes" and find_spec("optuna") is None:
            raise InputError("strategy bayes needs Optuna. Type: pip install 'm2m_hf[bayes]'")

    def config_yaml(self) -> str:
        """The resolved configuration as one flat YAML, which `--config` takes again."""
        fields = parsing.trl_fields(self.args, self.model_args)
        comment = (
            "The resolved configuration of this run: paths absolute, defaults that depend on the hardware filled in."
        )
        model = fields.pop("model_name_or_path")
        return dump_yaml({"model_name_or_path": model, **fields, **self.config.to_yaml()}, comment) + END

    def prepare(self) -> None:
        """Claims the run folder and writes the resolved configuration."""
        if self.state.is_main_process:
            self.run.lock()
            # Another process may have been at work since they were looked at first.
            self._check_run_folder()
            self._check_targets()
            write_atomic(self.run.config, self.config_yaml())
        self.state.wait_for_everyone()
        self._check_machines()

    def _check_machines(self) -> None:
        """Refuses machines that do not see what the first one does.

        Raises:
            InputError: on the machine where it is so.
        """
        mine = {
            "configuration": yaml.safe_load(self.config_yaml()),
            "settings": self.facts,
            "candidates": {name: one.fingerprint for name, one in self.candidates.items()},
            "targets": self._target_fingerprints(),
        }
        text = self.run.config.read_text(encoding="utf-8") if self.state.is_main_process else ""
        told, theirs = self._broadcast([text, mine])
        host = socket.gethostname()
        for what, facts in mine.items():
            if different := differing(facts, theirs[what]):
                raise InputError(f"{what}: on {host} not what the first process has: {'; '.join(different)}")
        if not has_content(self.run.config, told):
            raise InputError(
                f"output_dir: {self.run.root} on {host} is not the folder of that name on the first machine; expected one on "
                "a file system that all machines share"
            )
