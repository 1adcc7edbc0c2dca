"""`MergeToMixSearcher`: the whole method, from candidates to the model trained on the chosen mixture."""

import copy
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from peft import LoraConfig
from trl import ModelConfig, SFTConfig

from m2m_hf.analysis.fidelity import sample
from m2m_hf.analysis.similarity import candidate_content, similarity, target_content
from m2m_hf.analysis.study import RANDOM, Choice
from m2m_hf.analysis.study_report import StudyReport
from m2m_hf.config import parsing
from m2m_hf.config.run_config import MergeToMixConfig
from m2m_hf.console import Terminal
from m2m_hf.core.jsonable import from_json
from m2m_hf.core.mixture import Mixture
from m2m_hf.core.objective import Differentiable, Objective
from m2m_hf.core.score import Failure, Score, paired
from m2m_hf.core.space import SearchSpace
from m2m_hf.core.trial import Standing
from m2m_hf.data.mixture_rows import mixture_dataset
from m2m_hf.errors import InputError
from m2m_hf.merging.methods import MergeMethod
from m2m_hf.modeling.devices import StopTogether, shared_clock
from m2m_hf.modeling.inspection import adapted_layers
from m2m_hf.modeling.lora import model_config
from m2m_hf.objectives.ensemble import MAX_SUBSETS, EnsembleObjective
from m2m_hf.objectives.fine_tuned import FineTunedModels
from m2m_hf.objectives.trained import TrainedObjective
from m2m_hf.publish.hub import check_login, fetch_bank, fetch_expert, push
from m2m_hf.publish.recipe import write_label_recipe, write_recipe
from m2m_hf.reporting.conclude import Analysis, analyse, conclude
from m2m_hf.reporting.finished_run import FinishedRun
from m2m_hf.reporting.page import write_report
from m2m_hf.reporting.tables import (
    baselines_table,
    end_table,
    fidelity_remarks,
    fidelity_tables,
    remarks,
    verified_table,
)
from m2m_hf.run.context import Ingredients
from m2m_hf.run.estimate import plan, told_apart
from m2m_hf.scoring.scorers import Scorer
from m2m_hf.search.callbacks import ProgressCallback, SearchCallback, SearchControl
from m2m_hf.search.loop import planned_mixtures, planned_proposals, search
from m2m_hf.search.model_based import FEW, STRATEGIES, choose_strategy
from m2m_hf.search.result import Budget, SearchResult, default_budget, score_of
from m2m_hf.search.strategies import SearchProblem, Strategy, exhaustive, listed
from m2m_hf.storage.files import fingerprint, read_json, read_json_or_empty, staging_path, write_json
from m2m_hf.storage.records import experts_noun, find_incomplete
from m2m_hf.training.bank import LAUNCH
from m2m_hf.training.experts import expert_kind
from m2m_hf.training.fine_tune import publish
from m2m_hf.training.imported_experts import check_sources, make_importer
from m2m_hf.training.trackers import SearchTracker, Tracker


class TargetMemory(SearchCallback):
    """Writes down what the targets are as soon as a mixture is scored on them."""

    def __init__(self, remember: Callable[[], None]) -> None:
        self._remember = remember
        self._done = False

    def on_standing(self, standing: Standing, best: Standing | None, control: SearchControl) -> None:
        if not self._done:
            self._remember()
            self._done = True


class MergeToMixSearcher(Ingredients):
    """Chooses the mixture of candidate datasets to fine-tune on (Merge to Mix, arXiv 2505.16066).

    Every step does only what is not done yet in the run folder (`args.output_dir`), so that calling it again, or after an
    interruption, goes on from where it stands.

    ```python
    searcher = MergeToMixSearcher.from_yaml("recipes/demo.yaml")
    result = searcher.search()          # trains the adapters first, where they are missing
    print(result.best.mixture, result.best.score.value)
    summary = searcher.train_final()    # one fine-tune on the chosen mixture, scored on the sealed test set
    ```

    Args:
        config: candidates, target and how to search.
        args: TRL's training arguments, the same for every adapter and for the final fine-tune.
        model_args: base model and LoRA shape.
        terminal: where to print; by default standard output, and nothing on processes other than the main one.

    Raises:
        InputError: from any method, for whatever is wrong with what was given. Everything is checked before anything is
            trained or written.
    """

    def __init__(
        self, config: MergeToMixConfig, args: SFTConfig, model_args: ModelConfig, terminal: Terminal | None = None
    ) -> None:
        super().__init__(config, args, model_args, terminal)
        self._worked = False
        self._result: SearchResult | None = None
        self._verified: dict[str, Any] | None = None
        self._fine_tuned: list[Standing] = []
        self._analysis: tuple[SearchResult, Analysis] | None = None
        self.closing: list[dict[str, Any]] = []  # what `select` printed at its end

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> "MergeToMixSearcher":
        """A searcher from a configuration file, with `overrides` put over its fields.

        Raises:
            InputError: see `parsing.parse`.
        """
        return cls(*parsing.parse(Path(path), values=overrides))

    @classmethod
    def from_trl(
        cls,
        model: str,
        args: SFTConfig,
        peft_config: LoraConfig,
        candidates: Mapping[str, Any],
        targets: Mapping[str, Any],
        **fields: Any,
    ) -> "MergeToMixSearcher":
        """A searcher for a script that has what TRL's SFTTrainer takes; `chosen_rows` then is its training set.

        Adapters are trained with the script's own settings, but for what it does with the final model: evaluating, keeping the
        best checkpoint, going on from a checkpoint, pushing to the Hub. The run folder stands beside the script's `output_dir`,
        which a push would publish: `<output_dir>-m2m`.

        Args:
            model: a Hub id or a folder, loaded in float32 unless `args.model_init_kwargs` say another `dtype`, as TRL does it.
            args: what the script trains with.
            peft_config: the LoRA shape.
            candidates, targets: as in a configuration file; relative paths are relative to the working directory.
            **fields: of `MergeToMixConfig`.

        Raises:
            InputError: for whatever cannot be used.
        """
        for name, value, kinds, words in (
            ("model", model, (str, Path), "a Hub id or a folder"),
            ("args", args, (SFTConfig,), "a SFTConfig"),
            ("peft_config", peft_config, (LoraConfig,), "a LoraConfig"),
        ):
            if not isinstance(value, kinds):
                raise InputError(f"{name}: expected {words}, got {type(value).__name__}")
        args = copy.deepcopy(args)
        out = Path(args.output_dir).absolute()
        args.output_dir = str(out.with_name(f"{out.name}-m2m"))
        args.eval_strategy, args.eval_on_start, args.load_best_model_at_end = "no", False, False
        args.push_to_hub, args.hub_token, args.resume_from_checkpoint = False, None, None
        args.use_cpu = args.use_cpu or not (torch.cuda.is_available() or torch.backends.mps.is_available())
        loading = dict(args.model_init_kwargs or {})
        args.model_init_kwargs = None
        config = MergeToMixConfig(candidates=dict(candidates), targets=dict(targets), **fields)
        return cls(config, args, model_config(str(model), peft_config, loading))

    def chosen_rows(self) -> Dataset:
        """The rows of the chosen mixture, shuffled, as `OUT/mixture/train.jsonl` has them; searches first where it must."""
        self.write_outcome()
        counts = self.models.counts(self.choose().best.mixture)
        self._detach()
        vars(self).pop("base", None)  # or a script that trains on them would have the model in memory twice
        return mixture_dataset(counts, self.candidates, self.args.seed)

    def train_adapters(self) -> None:
        """Trains one adapter per candidate, where it is missing.

        Raises:
            InputError: adapters in the run folder that were trained otherwise.
        """
        self.check()
        if isinstance(self.config.bank, Mapping):
            check_sources(self.bank, self.config.bank, experts_noun(self.facts))
        missing = self.bank.check()
        if missing and self.config.bank:
            self.prepare()
            self._take_experts(self.config.bank, missing)
            missing = self.bank.check()
        if missing:
            self.prepare()

            self.bank.train_missing(
                self._base_to_train, lambda name: self._training(*self._settings(name)), self.terminal
            )
            self._worked = True
            noun = expert_kind(self.config.expert).noun()
            self.terminal.say(f"trained {len(missing)} {noun}: {os.path.relpath(self.run.adapters)}\n")

    def _take_experts(self, given: str | Mapping[str, str], missing: Sequence[str]) -> None:
        """Takes missing experts from a published bank, or one by one from where others have them."""
        key = experts_noun(self.facts)
        if isinstance(given, str):
            with self.state.local_main_process_first():  # one process of every machine fetches
                bank = fetch_bank(given, key)
            self.bank.take(bank, missing, self.terminal)
        else:
            wanted = {name: source for name, source in given.items() if name in missing}
            with self.state.local_main_process_first():
                others = {name: (source, fetch_expert(source, key)) for name, source in wanted.items()}
            make_importer(
                self._expert(self.model_args), self.bank, self.plan, self.terminal,
                lambda lora: adapted_layers(self.model_args, self.args, lora, self.plan),
                self._plain_base, self._load_other,
            ).run(others)  # fmt: skip

    def check_hub(self) -> None:
        """Refuses before hours of work what could not be pushed after them.

        Raises:
            InputError: nobody is logged in, or the Hub is out of reach.
        """
        if self.args.push_to_hub:
            check_login(self.args.hub_model_id)

    def push_to_hub(self, repo_id: str | None = None, private: bool | None = None, dry_run: bool = False) -> list[str]:
        """Puts adapters, final model and the chosen mixture on the Hub, each with a card; see `hub.push`.

        Args:
            repo_id: `org/name` (default: `hub_model_id`).
            private: whether repositories that are made are private (default: `hub_private_repo`).
            dry_run: only tell what would go.

        Returns:
            The addresses of the repositories; none on processes other than the main one.
        """
        repo_id = repo_id or self.args.hub_model_id
        if not repo_id:
            raise InputError("repo_id: expected org/name, or hub_model_id: org/name in the configuration")
        found = []
        if self.state.is_main_process:
            private = self.args.hub_private_repo if private is None else private
            found = push(self.run, repo_id, self.terminal, private, dry_run)
        self.state.wait_for_everyone()
        return found

    def search(self, callbacks: Sequence[SearchCallback] = ()) -> SearchResult:
        """Scores mixtures and chooses one; trains missing adapters first. What the journal knows is not scored again.

        Args:
            callbacks: are told of every scored trial and mixture, and may stop the search.
        """
        self.train_adapters()
        candidates, config = self.candidates, self.config
        self.prepare()
        if self.state.is_main_process and self.head is not None and self.head.vectors is not None:
            self.head.save(self.run.head, self._head_fingerprint)  # before commands score, which classify by it
        space = self.space
        objectives = self._objectives(config.objective)
        strategy = self._strategy(space, objectives)
        journal = self.journal
        budget = Budget(
            config.max_trials or math.inf,
            config.max_example_evaluations or math.inf,
            math.inf if config.max_seconds is None else config.max_seconds,
        )
        race = strategy is not exhaustive if config.race is None else config.race
        if race and config.objective == "merged":
            why = {
                "a target has no value for every example by itself": not all(one.target.order for one in objectives),
                "a target's min_delta needs scores of all examples": any(
                    one.target.min_delta is not None for one in objectives
                ),
                "one_standard_error needs scores of all examples": config.one_standard_error,
            }
            for reason in (text for text, holds in why.items() if holds):
                self.terminal.say(f"no racing: {reason}", "yellow")
        total = planned_mixtures(strategy, space, len(candidates), budget)
        known = len(journal.trials)
        # A search that goes on is a run of its own, which shows the curve from its beginning.
        run = f"search-from-{known}" if known else "search"
        with (
            Tracker(self.args, run, enabled=self.state.is_main_process) as tracker,
            self.terminal.progress("scoring mixtures", total) as bar,
        ):
            self._result = search(
                strategy,
                space,
                objectives,
                journal,
                names=tuple(candidates),
                costs=space.costs,
                failed=self.failed,
                one_standard_error=config.one_standard_error,
                race=race,
                budget=budget,
                seed=self.args.seed,
                callbacks=[
                    TargetMemory(self.remember_targets),
                    ProgressCallback(bar),
                    SearchTracker(tracker),
                    *callbacks,
                    StopTogether(),
                ],
                clock=shared_clock,
            )
        if self._stack is not None and self._stack.shrink > 1:
            less = max(1, self._tokens_per_batch // self._stack.shrink)
            self.terminal.say(
                f"memory did not suffice for tokens_per_batch: {self._tokens_per_batch}; went on with {less}", "yellow"
            )
        if self._result.measured:
            self._worked = True
            what = "mixtures" if len(objectives) == 1 else f"trials on {len(objectives)} targets"
            self.terminal.say(f"scored {self._result.measured} {what}: {os.path.relpath(self.run.trials)}\n")
        return self._result

    def _strategy(self, space: SearchSpace, objectives: list[Objective]) -> Callable[[SearchProblem], Strategy]:
        """What proposes mixtures; where the choice was ours, said with its reason."""
        chosen = self.config.strategy
        if isinstance(objectives[0], EnsembleObjective) and len(objectives) == 1 and chosen in ("auto", "exhaustive"):
            ensemble = objectives[0].ensemble(space.names)
            if space.continuous:
                self.terminal.say("strategy: the best weights, since those of an ensemble are a convex problem")
                return listed(ensemble.best_weights(space))
            if len(space.names) <= MAX_SUBSETS and not space.at_most(FEW):
                self.terminal.say(
                    "strategy: all subsets, of which the best 1000 are kept, since they cost no forward pass"
                )
                return listed(ensemble.best_subsets(space))
        if chosen == "auto":
            likelihoods = all(isinstance(one, Differentiable) for one in objectives)
            chosen, why = choose_strategy(space, likelihoods, self.config.max_trials or 0)
            self.terminal.say(f"strategy: {chosen}, since {why}")
        return STRATEGIES[chosen]

    def choose(self) -> SearchResult:
        """The search, and what `verify_top_k` makes of it."""
        result = self._result or self.search()
        return self.verify() if self.config.verify_top_k else result

    @cached_property
    def _study_fingerprint(self) -> str:
        """What a correlation study depends on: one that has another is of another run."""
        weights = {name: one.config.weight for name, one in self.targets.items()}
        keys = {name: asdict(one) for name, one in self.keys.items()}
        return fingerprint([keys, weights, self.merge_method.label, list(self.space.names)])

    def _read_study(self) -> dict[str, Any] | None:
        found = read_json_or_empty(self.run.fidelity)
        return found if found.get("fingerprint") == self._study_fingerprint else None

    def fidelity(self) -> dict[str, Any]:
        """The correlation study: fine-tunes mixtures, and compares what they score with what the surrogates said they would.

        Beside them the baselines (all, best single, similarity, stratified, random, and the best of all where all were
        fine-tuned), trained and scored alike. Models that were fine-tuned before are not trained again. The sealed test set is
        scored only where the final model of the chosen mixture is there, so that nothing is chosen after it was seen.

        Returns:
            What stands in `OUT/fidelity.json`.
        """
        result = self.choose()
        ranking = [one.mixture for one in result.ranking]
        mixtures = sample(self.space, ranking, self.config.fidelity_mixtures, self.args.seed)
        study = self.study
        self.terminal.say(f"fidelity: {len(mixtures)} mixtures to fine-tune and score, {self._uniformly()}")
        found = study.run(mixtures, result.base)
        choices = self._choices(result, random=RANDOM)
        if found["all_mixtures"]:
            allowed = [one for one in study.trained_standings(mixtures, result.base) if one.may_be_chosen]
            allowed = [one for one in allowed if one.mixture in self.space]
            if allowed:
                choices["oracle"] = study.choice(max(allowed, key=lambda one: score_of(one).value).mixture)
        sealed = self._test_scorers if self._read_final(result.best.mixture) else {}
        if self._test_scorers and not sealed:
            self.terminal.say(
                "the sealed test set stays sealed until m2m select or m2m sft has made the final model", "dim"
            )
        found = {
            "fingerprint": self._study_fingerprint,
            "uniform": self._uniformly(),
            **found,
            "similarity": self._similarities,
            "baselines": study.baselines(choices, result.base, sealed),
        }
        if self.state.is_main_process:
            write_json(self.run.fidelity, found)
        self.state.wait_for_everyone()
        return found

    def verify(self) -> SearchResult:
        """Fine-tunes the `verify_top_k` best mixtures of the search and the baselines, and chooses by what these score.

        Mixtures that make a target worse than the base model by more than its `min_delta` cannot be chosen. The stratified
        baseline is no mixture of whole candidates and is compared, not chosen.

        Raises:
            InputError: not one of them could be fine-tuned, or may be chosen.
        """
        result = self._result or self.search()
        if self._verified is not None:
            return result
        study = self.study
        top = dict.fromkeys([result.best.mixture, *(one.mixture for one in result.ranking)])
        choices = self._choices(result)
        others = [choices[name].mixture for name in ("all", "best_single", "similarity") if name in choices]
        others = [one for one in others if one in result.standings and result.standings[one].score]
        mixtures = list(
            dict.fromkeys([*list(top)[: self.config.verify_top_k], *(one for one in others if one in self.space)])
        )
        self.terminal.say(f"verifying: {len(mixtures)} mixtures to fine-tune and score, {self._uniformly()}")
        found = study.run(mixtures, result.base)
        allowed = [one for one in study.trained_standings(mixtures, result.base) if one.may_be_chosen]
        if not allowed:
            raise InputError(
                "fine-tuned, every mixture makes a target worse than the base model by more than its min_delta allows; raise it, "
                "or a larger verify_top_k. What was trained and scored is kept"
            )
        # Stable, so that of equal ones the search's order holds.
        self._fine_tuned = sorted(allowed, key=lambda one: -score_of(one).value)
        best = self._fine_tuned[0].mixture
        (standing,) = study.standings(self._objectives(self.config.objective), [best], "scoring mixtures")
        result.standings[best] = replace(standing, short=())
        self._verified = {
            "by_search": result.best.mixture.weights,
            "uniform": self._uniformly(),
            **{key: found[key] for key in ("mixtures", "failed", "agreement", "training_noise")},
            "baselines": None,
        }
        self._result = replace(result, best=result.standings[best])
        return self._result

    def _choices(self, result: SearchResult, random: int = 0) -> dict[str, Choice]:
        objectives = self._objectives(self.config.objective)
        return self.study.choices(result, objectives, list(self._similarities), random, self.args.seed)

    def _compare_with_baselines(self) -> None:
        """At the very end of a verified run: every baseline's fine-tuned model on validation and sealed test rows."""
        assert self._verified is not None
        assert self._result is not None
        choices = self._choices(self._result)
        self._verified["baselines"] = self.study.baselines(choices, self._result.base, self._test_scorers)

    def truth(self) -> tuple[list[Mixture], list[Standing], bool]:
        """(mixtures, how they stand fine-tuned, whether these are all that there are) of the correlation study.

        The study is made where it is missing.
        """
        result = self._result or self.search()
        found = self._read_study() or self.fidelity()
        mixtures = [Mixture.of(one["mixture"]) for one in found["mixtures"]]
        return mixtures, self.study.trained_standings(mixtures, result.base), found["all_mixtures"]

    def surrogate(
        self, mixtures: Sequence[Mixture], kind: str = "merged", method: MergeMethod | None = None
    ) -> list[Standing]:
        """How mixtures stand by a surrogate, `merged` or `ensemble`, scored on all rows; trains missing adapters first.

        Args:
            method: how to merge, if not as the run does.
        """
        self.train_adapters()
        self.prepare()
        label = (method or self.merge_method).label if kind == "merged" else kind
        return self.study.standings(self._objectives(kind, method), mixtures, f"scoring mixtures, {label}")

    def _uniformly(self) -> str:
        """By what rule mixtures of different size train alike."""
        if self.args.max_steps > 0:
            return f"each for the same {self.args.max_steps} steps"
        epochs = self.args.num_train_epochs
        return f"each for the same {epochs:g} epoch{'' if epochs == 1 else 's'}"

    @cached_property
    def _similarities(self) -> dict[str, float]:
        """Name -> cosine with the targets in the base model's hidden states, most similar first; kept on the disk."""
        labelled = self.plan is not None
        asked = {
            name: target_content(one.rows, self.processing, self.args.seed, labelled)
            for name, one in self.targets.items()
        }
        asked = {name: content for name, content in asked.items() if content}
        if not asked:
            return {}
        weights = {name: self.targets[name].config.weight for name in asked}
        path = self.run.trained / "similarity.json"
        of = fingerprint([weights, {name: asdict(keys) for name, keys in self.keys.items()}, list(self.space.names)])
        known = self._broadcast(read_json_or_empty(path))
        if known.get("fingerprint") == of:
            return dict(known["cosine"])
        base = self._plain_base()
        content = {
            name: candidate_content(self.candidates[name], self.processing, self.args.seed) for name in self.space.names
        }
        longest = min(512, self._length.limit) if self.config.task == "sequence_classification" else 512
        total = dict.fromkeys(self.space.names, 0.0)
        for target, rows in asked.items():
            cosines = similarity(base, content, rows, self._tokens_per_batch, longest, self.processing)
            for name, cosine in cosines.items():
                total[name] += weights[target] / sum(weights.values()) * cosine
        found = dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))
        if self.state.is_main_process:
            write_json(path, {"fingerprint": of, "cosine": found})
        self.state.wait_for_everyone()
        return found

    def write_outcome(self) -> dict[str, Any]:
        """Writes mixture, recipe and summary of the search; keeps a final fine-tune of the same mixture.

        Returns:
            The summary, as in `OUT/summary.json`.
        """
        result = self.choose()
        summary = self._finished_run().summary()
        if self.state.is_main_process:
            args, model_args = self._final_settings()
            if self.plan is None:
                how = self.config.expert, self.config.trained_parameters
                write_recipe(self.run, result.best.mixture, self.candidates, self._data.format, args, model_args, *how)
            else:
                training = self._training(args, model_args)
                write_label_recipe(self.run, result.best.mixture, self.candidates, training, model_args)
            write_json(self.run.summary, summary)
        self.state.wait_for_everyone()
        return summary

    def _final_model(self, counts: Mapping[str, int]) -> str:
        """Fingerprint of a final model with settings of its own, trained on so many rows of each candidate."""
        facts = self._facts(*self._final_settings())
        # A final model is not made again because another number of processes looks at it.
        facts = {name: value for name, value in facts.items() if name not in LAUNCH}
        sources = [[name, count, self.candidates[name].fingerprint] for name, count in sorted(counts.items())]
        return fingerprint([sources, facts])

    def _final_fingerprint(self, mixture: Mixture) -> str:
        """What the final model and its scores depend on."""
        scored = {name: {part: one.fingerprint for part, one in parts.items()} for name, parts in self.scorers.items()}
        return fingerprint([self._final_model(self.models.counts(mixture)), mixture.items, scored])

    def train_final(self) -> dict[str, Any]:
        """Fine-tunes on the chosen mixture, scores base and final model on validation and on the sealed test set.

        Done before with the same mixture and arguments, it is not done again, and the test set not looked at again.

        Returns:
            The summary, as in `OUT/summary.json`.
        """
        result = self.choose()
        summary = self.write_outcome()
        if summary["final"] is None:
            self._worked = True
            self._train_and_score_final(result)
            summary = self.write_outcome()
        if self._verified is not None:
            self._compare_with_baselines()
            summary = self.write_outcome()
        return summary

    def _train_and_score_final(self, result: SearchResult) -> None:
        mixture = result.best.mixture
        models = self._final_models
        counts = models.counts(mixture)
        start = time.monotonic()
        with self.terminal.progress(f"final fine-tune on {mixture}", models.steps(counts)) as bar:
            trained = models.train(counts, bar, run="final")
        seconds = time.monotonic() - start
        scores: dict[str, Any] = {}
        total = sum(2 * len(parts) for parts in self.scorers.values())
        objectives = {who: self._trained_objectives(of) for who, of in (("base", self.models), ("final", models))}
        with self.terminal.progress("scoring base and final model", total) as bar:
            for place, (target, parts) in enumerate(self.scorers.items()):
                scores[target] = {"base": {}, "final": {}}
                for part, scorer in parts.items():
                    found: dict[str, Score] = {}
                    for who, of in (("base", {}), ("final", counts)):
                        score = self._score_of(objectives[who][place], of, part, scorer)
                        if isinstance(score, Failure):
                            raise InputError(f"the {who} model has no score on {target}: {score.reason}")
                        found[who] = score
                        scores[target][who][part] = {"score": score.value, "stderr": score.stderr}
                        bar.advance()
                    value, stderr = paired({target: found["final"]}, {target: found["base"]}, {target: 1.0})
                    scores[target]["final"][part]["over_base"] = {"value": value, "stderr": stderr}
        record = models.record(counts)
        if self.state.is_main_process:
            self._put_old_final_aside()
            shutil.rmtree(staging_path(self.run.final), ignore_errors=True)
            self._make_final(trained)
        publish(
            self.run.final,
            {
                **record,
                **expert_kind(self.config.expert).origin(record),
                "fingerprint": self._final_fingerprint(mixture),
                "mixture": mixture.weights,
                "rows": sum(counts.values()),
                "scores": scores,
                "total_seconds": round(max(seconds, record["seconds"]), 3),
            },
        )
        with Tracker(self.args, "scores", enabled=self.state.is_main_process) as tracker:
            for step, who in enumerate(("base", "final")):
                values = {
                    ("eval_" if part == "validation" else "test_") + target: one["score"]
                    for target, of in scores.items()
                    for part, one in of[who].items()
                }
                tracker.log(step, values)

    def _make_final(self, trained: Path) -> None:
        """Puts together what `OUT/final` is to hold: the adapter, or the whole model as it was scored; and the head beside it."""
        folder = staging_path(self.run.final)
        expert_kind(self.config.expert).write_final(trained, folder, self._plain_base, self.processing)
        if self.head is not None and self.head.vectors is not None:
            shutil.copyfile(self.run.head, folder / self.run.head.name)

    @cached_property
    def _final_models(self) -> FineTunedModels:
        """Where the final model is made: without settings of its own it is the very model that a study would fine-tune."""
        if not self.config.final and not self._launched_otherwise:
            return self.models
        args, model_args = self._final_settings()
        return FineTunedModels(
            self.run.trained, self.candidates, self._final_model, self._base_to_train, args,
            lambda: self._training(args, model_args),
        )  # fmt: skip

    def _score_of(
        self, objective: TrainedObjective, counts: Mapping[str, int], part: str, scorer: Scorer
    ) -> Score | Failure:
        """A model's score on validation or sealed test rows; the latter are looked at once."""
        if part == "test":
            return objective.sealed(counts, scorer)
        return objective.score(counts)

    def _put_old_final_aside(self) -> None:
        """A final model of another mixture or of other arguments is renamed, not overwritten."""
        name = read_json_or_empty(self.run.final / "training.json").get("fingerprint")
        if find_incomplete(self.run.final) is None and isinstance(name, str) and name.isalnum():
            old = self.run.final.with_name(f"final.{name}")
            if not old.exists():
                self.run.final.rename(old)
                self.terminal.say(f"the final model that was there is now {os.path.relpath(old)}")

    def _read_final(self, mixture: Mixture) -> dict[str, Any] | None:
        final = read_json_or_empty(self.run.final / "training.json")
        whole = find_incomplete(self.run.final) is None and final.get("fingerprint") == self._final_fingerprint(mixture)
        return final if whole else None

    def _finished_run(self) -> FinishedRun:
        result = self.choose()
        training = self.bank.training()
        if self._analysis is None or self._analysis[0] is not result:  # takes long with very many trials
            usable = [name for name in self.candidates if name not in self.failed]
            self._analysis = result, analyse(result, self.space, usable, self._fine_tuned)
        final = self._read_final(result.best.mixture)
        return conclude(
            result,
            self._analysis[1],
            config=yaml.safe_load(self.config_yaml()),
            targets={name: one.config for name, one in self.targets.items()},
            rows={name: {part: one.examples for part, one in parts.items()} for name, parts in self.scorers.items()},
            keys=self.keys,
            training=training,
            space=self.space,
            study=self._study_fingerprint,
            overlap=self.overlap,
            fidelity=self._read_study(),
            verified=self._verified,
            final=final,
            compare_seconds=self.models.seconds(without=final),
        )

    def show(self) -> None:
        """Prints the end table: base, singles, all, the chosen mixture and the final model; and what to do next."""
        run = self._finished_run()
        self.terminal.table(*end_table(run))
        if run.verified:
            self.terminal.say("")
            self.terminal.table(*verified_table(run.verified))
            if run.verified.baselines:
                self.terminal.say("")
                self.terminal.table(*baselines_table(run.verified.baselines))
        for line in remarks(run):
            self.terminal.say(line)
        if self.state.is_main_process:
            self.terminal.say(f"report: {os.path.relpath(write_report(self.run.root))}")
        how = "trl sft" if self.plan is None else "m2m recipe classify"
        self.terminal.say(f"recipe: {how} --config {os.path.relpath(self.run.recipe)}")
        if run.final is None:
            self.terminal.say(f"next: m2m sft {os.path.relpath(self.run.root)}")

    def select(self) -> dict[str, Any]:
        """Everything in order: check, adapters, search, recipe and, with `train_final`, the final fine-tune.

        Returns:
            The summary, as in `OUT/summary.json`.
        """
        self.check_hub()
        self.check()
        self.choose()
        summary = self.train_final() if self.config.train_final else self.write_outcome()
        with self.terminal.keep() as self.closing:
            self.show()
        if not self._worked and not self.study.worked:
            self.terminal.say(f"nothing to do: {os.path.relpath(self.run.root)} is complete", style="green")
        if self.args.push_to_hub:
            self.push_to_hub()
        return summary

    def show_plan(self) -> None:
        """Prints what `select` would do and about what it would cost, from a short measurement; writes nothing."""
        self.check()
        space, config, known = self.space, self.config, 2 + len(self.candidates)
        few = config.strategy == "exhaustive" or (config.strategy == "auto" and space.at_most(FEW))
        proposed = planned_proposals(exhaustive, space) if few else default_budget(len(space.names))
        if config.objective == "ensemble":
            proposed, known = 0, 1 + len(self.candidates)  # passes; the rest is arithmetic
        made = plan(self, int(min(known + proposed, config.max_trials or math.inf)))
        scorers = {name: parts["validation"] for name, parts in self.scorers.items()}
        metrics = {name: target.config.metric for name, target in self.targets.items()}
        for line in (*made.lines(), *told_apart(scorers, metrics)):
            self.terminal.say(line)
        self.terminal.say("nothing was written", "dim")

    def show_fidelity(self) -> None:
        """Prints what the correlation study found."""
        found = from_json(StudyReport, read_json(self.run.fidelity))
        for table in (*fidelity_tables(found), baselines_table(found.baselines)):
            self.terminal.table(*table)
            self.terminal.say("")
        for line in fidelity_remarks(found):
            self.terminal.say(line)
        if self.state.is_main_process:
            self.terminal.say(f"report: {os.path.relpath(write_report(self.run.root))}")
