"""The run context: the parts of one run, each made once, when it is first needed."""

from dataclasses import replace
from functools import cached_property, partial
from typing import Any

from accelerate import PartialState
from trl import ModelConfig, SFTConfig

from m2m_hf.analysis.study import Study
from m2m_hf.config import parsing
from m2m_hf.config.run_config import MergeToMixConfig
from m2m_hf.config.search_space import search_space
from m2m_hf.config.yaml_files import dump_yaml
from m2m_hf.console import Terminal
from m2m_hf.core.mixture import Mixture
from m2m_hf.core.objective import Objective, TargetInfo, race_order
from m2m_hf.core.space import SearchSpace
from m2m_hf.data.loading import pin_data, split_candidates
from m2m_hf.data.rows import Candidate, Target, overlap
from m2m_hf.merging.dense_stack import Stack
from m2m_hf.merging.methods import AVERAGE, MergeMethod
from m2m_hf.modeling.devices import broadcast
from m2m_hf.modeling.families import Family
from m2m_hf.modeling.inspection import check_model, meta_model
from m2m_hf.modeling.loading import make_plan, pin_revision, quantization_facts
from m2m_hf.objectives.ensemble import EnsembleObjective
from m2m_hf.objectives.merged import GatedObjective, MergedObjective
from m2m_hf.objectives.trained import FineTunedModels, TrainedObjective
from m2m_hf.run.tasks import Classification, Task
from m2m_hf.scoring.make import make_scorers
from m2m_hf.scoring.probing import CPU_TOKENS, settle
from m2m_hf.scoring.scorers import LogprobScorer, Scorer, Setup
from m2m_hf.search.model_based import choose_strategy, ensemble_shortcut
from m2m_hf.storage.files import fingerprint, read_json_or_empty
from m2m_hf.storage.journal import Journal
from m2m_hf.storage.keys import Keys, base_key
from m2m_hf.storage.run_folder import END, RunFolder
from m2m_hf.training.bank import Bank
from m2m_hf.training.experts import ExpertKind, expert_kind
from m2m_hf.training.fine_tune import mixture_steps
from m2m_hf.training.trainers import Settings
from m2m_hf.training.uniformity import LAUNCH, differing, uniform_facts


class RunContext:
    """What the steps of a run share: data, base model, experts, scorers, objectives. Nothing is loaded before it is used.

    Any property raises an InputError for whatever is wrong with what was given.
    """

    def __init__(
        self, config: MergeToMixConfig, args: SFTConfig, model_args: ModelConfig, terminal: Terminal | None = None
    ) -> None:
        pin_data(config)
        self.config = config = split_candidates(config)
        model_args = pin_revision(model_args)
        self.state = PartialState(cpu=args.use_cpu)
        self.is_main = self.state.is_main_process
        self.terminal = terminal or Terminal(quiet=not self.is_main)
        self.folder = RunFolder(args.output_dir)
        self.started = broadcast(self.folder.started())
        self.merge_method = MergeMethod.of(config.merge_method, config.merge_parameters, args.seed)
        plan = make_plan(model_args, config.task)
        self._family = Family(meta_model(model_args, args, plan), plan, config.expert == "lora")
        self.args, self.model_args, self.settled = self._family.settle(args, model_args)
        say = partial(self.terminal.say, style="dim")
        self.task = (Task if plan is None else Classification)(
            config, self.args, self.model_args, self.folder, self.started, plan, say
        )
        self.base = self.task.base

    # Data

    @property
    def candidates(self) -> dict[str, Candidate]:
        return self.task.data.candidates

    @property
    def targets(self) -> dict[str, Target]:
        return self.task.data.targets

    @cached_property
    def overlap(self) -> dict[tuple[str, str], int]:
        """(candidate, target) -> rows of the target that the candidate contains too."""
        return {
            (name, target): overlap(candidate, self.targets[target].questions)
            for name, candidate in self.candidates.items()
            for target in self.targets
        }

    @property
    def prints_date(self) -> bool:
        """Whether the rows hold a date that the chat template prints."""
        return self.task.data.format != "text" and self.task.dated

    # Experts

    def expert(self, model_args: ModelConfig | None = None) -> ExpertKind:
        """The kind of the experts, with the run's settings or others."""
        kind, config = expert_kind(self.config.expert), self.config
        return kind.of(model_args or self.model_args, self.base.plan, config.trained_parameters, config.delta_dtype)

    def training_settings(self, args: SFTConfig | None = None, model_args: ModelConfig | None = None) -> Settings:
        """How a model is fine-tuned, with the run's own arguments or with others."""
        return self.task.settings(args or self.args, self.expert(model_args))

    def candidate_settings(self, name: str) -> tuple[SFTConfig, ModelConfig]:
        """What a candidate's expert is trained with: the same for all, unless mixed training is allowed."""
        overrides = self.candidates[name].config.training
        if not overrides:
            return self.args, self.model_args
        args, model_args = parsing.with_overrides(self.args, self.model_args, overrides, f"candidates.{name}.training")
        return self._family.settle(args, model_args)[:2]

    @cached_property
    def final_settings(self) -> tuple[SFTConfig, ModelConfig]:
        """What the final model is trained with."""
        return self._family.settle(*parsing.with_overrides(self.args, self.model_args, self.config.final))[:2]

    def training_facts(self, args: SFTConfig, model_args: ModelConfig) -> dict[str, Any]:
        """What a model depends on beside its rows: see `uniform_facts`."""
        about = {
            "base_model": self.base.fingerprint,
            "dtype": model_args.dtype,
            "data_format": self.task.data.format,
            **self.task.facts(),
        }
        if quantization := quantization_facts(model_args):
            about["quantization"] = fingerprint(quantization)
        return uniform_facts(args, self.expert(model_args), about)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What all experts have in common."""
        return self.training_facts(self.args, self.model_args)

    @cached_property
    def bank(self) -> Bank:
        facts = {
            name: self.training_facts(*self.candidate_settings(name)) if candidate.config.training else self.facts
            for name, candidate in self.candidates.items()
        }
        return Bank(
            self.folder.adapters, self.candidates, facts, self.folder.row_digests, self.config.changed_candidates
        )

    @property
    def failed(self) -> dict[str, str]:
        """Candidate -> why its training failed, of those that have no expert."""
        paths = {name: self.folder.adapters / name / "training.json" for name in self.candidates}
        reasons = {name: read_json_or_empty(path).get("failed") for name, path in paths.items()}
        return {name: str(reason) for name, reason in reasons.items() if reason}

    def open_stack(self, method: MergeMethod) -> Stack:
        """The experts on the base model, ready to be merged by `method`."""
        _ = self.task.head  # may need the plain base model
        return self.base.stack(self.bank.load, method)

    # Scoring

    @cached_property
    def scoring_setup(self) -> Setup:
        """What scorers are made of."""
        kind = self.expert()
        positions = check_model(self.model_args, self.args, kind.lora, self.base.plan, kind.parameters)
        return replace(self.task.scoring_setup(positions), base_key=lambda: base_key(self.facts))

    @cached_property
    def scorers(self) -> dict[str, dict[str, Scorer]]:
        """Target -> `validation` and, where there are sealed rows, `test` -> scorer."""
        scorers = {name: make_scorers(target, self.scoring_setup) for name, target in self.targets.items()}
        known = self.folder.known_targets()
        self._settled = [
            one for name, of in scorers.items() for part, one in of.items() if one.recall(known.get(name, {}).get(part))
        ]
        return scorers

    def _settle_scorers(self) -> None:
        """Tries, before anything is scored, how far the model needs rows to be kept apart (collective)."""
        for name, parts in self.scorers.items():
            for part, scorer in parts.items():
                if any(scorer is one for one in self._settled):
                    continue
                stack = self.open_stack(self.merge_method)
                every = Mixture.subset(stack.names).weights
                found = settle(stack, [{}, *([self.merge_method.gates(every)] if every else [])], scorer)
                if found:
                    self.terminal.say(f"target {name}, {part}: {found}", "yellow")

    @property
    def validation_scorers(self) -> dict[str, Scorer]:
        """Target -> scorer of its validation rows."""
        return {name: parts["validation"] for name, parts in self.scorers.items()}

    @property
    def test_scorers(self) -> dict[str, Scorer]:
        """Target -> scorer of its sealed rows, of targets that have any."""
        return {name: parts["test"] for name, parts in self.scorers.items() if "test" in parts}

    @property
    def tokens_per_batch(self) -> int:
        """Tokens in one forward pass of scoring; elsewhere than on a CPU the model is loaded to know (collective)."""
        if given := self.config.tokens_per_batch:
            return given
        return CPU_TOKENS if self.state.device.type == "cpu" else self.base.tokens_per_batch

    def target_fingerprints(self) -> dict[str, dict[str, str]]:
        """Target -> part -> what identifies its rows and how they are scored."""
        return {name: {part: one.fingerprint for part, one in parts.items()} for name, parts in self.scorers.items()}

    @cached_property
    def keys(self) -> dict[str, Keys]:
        """Target -> what makes the keys of its trials; all experts must be there."""
        self._settle_scorers()
        adapters = {name: record["fingerprint"] for name, record in self.bank.training().items()}
        base = base_key(self.facts)
        rows = {name: len(candidate.rows) for name, candidate in self.candidates.items()}
        stale = {name: drift.fingerprint for name, drift in self.bank.changed().items()}
        scorers = self.validation_scorers.items()
        return {name: Keys(base, one.fingerprint, one.examples, adapters, rows, stale) for name, one in scorers}

    def has_gradient(self, scorer: Scorer, method: MergeMethod) -> bool:
        """Whether merged scores have a gradient in the mixture's weights."""
        return isinstance(scorer, LogprobScorer) and method.name == "average" and self.expert().gated

    @property
    def has_gradients(self) -> bool:
        """Whether the search's objectives have gradients."""
        merged = self.config.objective == "merged"
        return merged and all(self.has_gradient(one, self.merge_method) for one in self.validation_scorers.values())

    def objectives(self, kind: str, method: MergeMethod | None = None) -> list[Objective]:
        """What scores mixtures on every target: `merged` (as the run merges, or by another method), `ensemble` or `trained`."""
        if kind == "trained":
            return [*self.trained_objectives(self.fine_tuned)]
        method = (method or self.merge_method) if kind == "merged" else AVERAGE
        objectives: list[Objective] = []
        for name, scorer in self.validation_scorers.items():
            merged = (GatedObjective if self.has_gradient(scorer, method) else MergedObjective)(
                partial(self.open_stack, method),
                scorer,
                self.keys[name],
                self._target_info(name, raced=kind == "merged" and scorer.by_row),
                tokens_per_batch=lambda: self.tokens_per_batch,
                method=method,
            )
            ensemble = self.folder.root / "ensemble"
            objectives.append(merged if kind == "merged" else EnsembleObjective(merged, ensemble))
        return objectives

    def _target_info(self, name: str, raced: bool = False) -> TargetInfo:
        config, scorer = self.targets[name].config, self.validation_scorers[name]
        order = race_order(scorer.fingerprint, scorer.examples) if raced else ()
        return TargetInfo(name, scorer.examples, config.weight, config.min_delta, order)

    # Fine-tuned mixtures

    @cached_property
    def fine_tuned(self) -> FineTunedModels:
        """Models fine-tuned on mixtures, to compare with; all experts must be there."""
        return FineTunedModels(
            self.folder.trained,
            self.candidates,
            next(iter(self.keys.values())).model,
            self.base.to_train,
            self.args,
            self.training_settings,
            self.terminal.progress,
            self.config.parallel,
            self.launch_changes(),
        )

    @property
    def fine_tunes(self) -> int:
        """How many mixtures are fine-tuned before one is chosen; as `auto` as many as take twice the steps of the adapters."""
        if isinstance(count := self.config.to_verify, int):
            return count
        sizes = {name: len(one.rows) for name, one in self.candidates.items()}
        alone = sum(mixture_steps(self.args, self.candidates, {name: rows}) for name, rows in sizes.items())
        return min(8, max(1, 2 * alone // mixture_steps(self.args, self.candidates, sizes)))

    @property
    def fine_tunes_at_once(self) -> int:
        """How many of these are trained in one go, once the first two are."""
        if isinstance(count := self.config.parallel, int):
            return count
        return 1 if self.args.device.type == "cpu" else 4

    def launch_changes(self) -> list[str]:
        """How this launch differs from the one that trained the experts."""
        there = next(iter(self.bank.training().values()))["uniform"]
        return differing({name: self.facts.get(name) for name in LAUNCH}, {name: there.get(name) for name in LAUNCH})

    def trained_objectives(self, models: FineTunedModels) -> list[TrainedObjective]:
        """What scores fine-tuned models, and the base model, on every target."""
        models_of = partial(TrainedObjective, models, self.base.plain, partial(self.open_stack, AVERAGE))
        return [
            models_of(scorer, self.keys[name], self._target_info(name), tokens_per_batch=lambda: self.tokens_per_batch)
            for name, scorer in self.validation_scorers.items()
        ]

    @cached_property
    def study(self) -> Study:
        """Fine-tunes mixtures and compares them with what the surrogates predict; all experts must be there."""
        surrogates = {"merged": self.objectives("merged")}
        if all(scorer.has_ensemble for scorer in self.validation_scorers.values()):
            surrogates["ensemble"] = self.objectives("ensemble")
        mixed = any(one.config.training for one in self.candidates.values())
        return Study(
            self.space,
            surrogates,
            self.trained_objectives(self.fine_tuned),
            self.journal,
            progress=self.terminal.progress,
            broadcast=broadcast,
            uniform=self.merge_method == AVERAGE and not mixed,
        )

    @cached_property
    def study_fingerprint(self) -> str:
        """What a correlation study depends on: a study with another fingerprint belongs to another run."""
        weights = {name: one.config.weight for name, one in self.targets.items()}
        keys = {name: one.facts() for name, one in self.keys.items()}
        return fingerprint([keys, weights, self.merge_method.label, list(self.space.names)])

    # Searching

    @property
    def space(self) -> SearchSpace:
        """The mixtures that may be proposed, of candidates that have or will have an expert; refuses to have none."""
        return search_space(self.config, {name: one.tokens for name, one in self.candidates.items()}, self.failed)

    def choose_strategy(self) -> tuple[str, str | None]:
        """(name of the strategy, why, where `auto` takes it)."""
        if self.config.strategy != "auto":
            return self.config.strategy, None
        return choose_strategy(self.space, self.has_gradients, self.config.max_trials or 0)

    def ensemble_shortcut(self) -> str | None:
        """What the ensemble objective works out in place of a strategy."""
        if self.config.objective != "ensemble":
            return None
        return ensemble_shortcut(self.space, self.config.strategy, len(self.targets))

    @cached_property
    def journal(self) -> Journal:
        """The journal. All processes must ask for it at the same place: one must not write while another still reads."""
        journal = Journal(self.folder.trials, write=self.is_main)
        self.state.wait_for_everyone()
        return journal

    def config_yaml(self) -> str:
        """The resolved configuration as one flat YAML, which `--config` takes again."""
        fields = parsing.trl_fields(self.args, self.model_args)
        model = {"model_name_or_path": fields.pop("model_name_or_path")}
        comment = "The resolved configuration of this run: absolute paths, and defaults that depend on the hardware filled in."
        return dump_yaml({**model, **fields, **self.config.to_yaml()}, comment) + END

    def describe_steps(self) -> str:
        """By what rule mixtures of different sizes train alike."""
        if self.args.max_steps > 0:
            return f"each for the same {self.args.max_steps} steps"
        epochs = self.args.num_train_epochs
        return f"each for the same {epochs:g} epoch{'' if epochs == 1 else 's'}"
