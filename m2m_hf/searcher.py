"""`MergeToMixSearcher`: the whole method, from candidates to the model trained on the chosen mixture."""

import math
import os
import time
from collections.abc import Callable
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import load_dataset
from trl import ModelConfig, SFTConfig

from . import parsing
from .adapters import (
    LAUNCH,
    OPERATIONAL,
    AdapterBank,
    base_fingerprint,
    check_model,
    differing,
    load_base,
    load_tokenizer,
    lora_config,
    pin_revision,
    planned_steps,
    publish,
    quantization_facts,
    sharded,
    train_lora,
    uniform_facts,
)
from .callbacks import BankProgress
from .config import MergeToMixConfig
from .console import Terminal
from .data import FEATURES, Candidate, Target, load_all, overlap, shares
from .ensemble import ENSEMBLE_METRICS, MOST_SUBSETS, EnsembleObjective
from .errors import InputError
from .external import CallableScorer, CommandScorer, HarnessScorer
from .journal import Journal, RunFolder, fingerprint, read_json, write_atomic, write_json
from .merging import Adapter, GatedStack
from .mixture import Failure, Mixture, SearchSpace, Standing
from .objectives import MergedObjective, Objective
from .recipe import write_recipe
from .report import Outcome, end_table, remarks, summarise
from .scoring import LogprobScorer, Scorer, make_scorer
from .search import Budget, SearchResult, default_budget, score_of, search
from .strategies import Strategy, Task, exhaustive, listed
from .surrogates import FEW, STRATEGIES, choose_strategy

# What may change between two starts on one run folder: nothing that a finished adapter or trial depends on.
FREE = {
    "strategy", "objective", "weights", "race", "max_trials", "max_example_evaluations", "max_seconds", "min_datasets",
    "max_datasets", "max_cost", "licenses", "one_standard_error", "tokens_per_batch", "train_final", "final",
    "allow_overlap", "allow_metric_code", "candidates",
    "output_dir",
    "model_name_or_path", "model_revision",  # the adapters' fingerprints know the weights themselves
}  # fmt: skip


class MergeToMixSearcher:
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
        parsing.check_trl(args, model_args)
        self.config = config
        self.args = args
        self.model_args = pin_revision(model_args)
        self.state = PartialState(cpu=args.use_cpu)
        self.terminal = terminal or Terminal(quiet=not self.state.is_main_process)
        self.lora = lora_config(model_args)
        self.run = RunFolder(args.output_dir)
        self._tokens_per_batch = config.tokens_per_batch or (1024 if self.state.device.type == "cpu" else 16384)
        self._checked = False
        self._worked = False
        self._stack: GatedStack | None = None
        self._result: SearchResult | None = None

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> "MergeToMixSearcher":
        """A searcher from a configuration file, with `overrides` put over its fields.

        Raises:
            InputError: see `parsing.parse`.
        """
        return cls(*parsing.parse(Path(path), values=overrides))

    # What a run is made of; loaded when first asked for.

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.model_args, self.args)

    @cached_property
    def _data(self) -> tuple[str, dict[str, Candidate], dict[str, Target]]:
        return load_all(
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
        return self._data[1]

    @property
    def targets(self) -> dict[str, Target]:
        """The targets by name, loaded and checked."""
        return self._data[2]

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What all adapters have in common: see `uniform_facts`."""
        base = base_fingerprint(self.model_args)
        quantization = quantization_facts(self.model_args)
        return uniform_facts(
            self.args, self.lora, self.tokenizer, base, self.model_args.dtype, self._data[0], quantization
        )

    @cached_property
    def bank(self) -> AdapterBank:
        return AdapterBank(self.run.adapters, self.candidates, self.facts)

    @cached_property
    def base(self) -> Any:
        """The base model, loaded once for the adapters, the search and the final fine-tune."""
        return self._load_base()

    def _load_base(self, to_train: bool = False) -> Any:
        self.terminal.say(f"loading {self.model_args.model_name_or_path} ({self.model_args.dtype})", style="dim")
        return load_base(self.model_args, self.args, to_train)

    def _base_to_train(self) -> Any:
        """The base model; one of its own for every training that cuts it into pieces."""
        return self._load_base(to_train=True) if sharded() else self.base

    @cached_property
    def scorers(self) -> dict[str, dict[str, Scorer]]:
        """Of every target `validation` and, where there are sealed rows, `test`."""
        positions = check_model(self.model_args, self.args, self.lora)
        return {name: self._scorers(target, positions) for name, target in self.targets.items()}

    def _scorers(self, target: Target, positions: int) -> dict[str, Scorer]:
        config, where = target.config, f"targets.{target.name}"
        allow = self.config.allow_metric_code
        if config.kind == "command":
            base = self.model_args.model_name_or_path
            commands = {"validation": config.command, "test": config.test_command}
            return {part: CommandScorer(one, config.metric, base) for part, one in commands.items() if one}
        if config.kind == "lm_eval":
            tasks = {"validation": config.task, "test": config.test_task}
            return {
                part: HarnessScorer(config, task, self.tokenizer, allow, where) for part, task in tasks.items() if task
            }
        rows = {"validation": target.rows, "test": target.test_rows}
        if config.kind == "callable":
            given = {part: rows[part] for part in rows if part == "validation" or rows[part]}
            return {part: CallableScorer(config.scorer, one, self.tokenizer) for part, one in given.items()}
        return {
            part: make_scorer(config, one, self.tokenizer, positions, allow_metric_code=allow, where=where)
            for part, one in rows.items()
            if one
        }

    # The steps.

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
        if self.config.final:
            args, model_args = self._final_settings()
            check_model(model_args, args, lora_config(model_args))
        rows = []
        shared = {
            (name, target): overlap(one, targets[target].questions)
            for name, one in candidates.items()
            for target in targets
        }
        for name, one in candidates.items():
            steps = planned_steps(self.args, one.trained_rows, one.tokens)
            found = sum(shared[name, target] for target in targets)
            figures = (len(one.rows), one.tokens, one.longest, one.truncated, steps, found)
            rows.append([name, *(f"{figure:,}" for figure in figures)])
        columns = ["", "rows", "tokens", "longest", "truncated", "steps", "in target"]
        self.terminal.table(f"candidates ({self._data[0]} format)", columns, rows)
        for target in targets.values():
            self.terminal.say(f"target {target.name}: {self._describe(target)}")
        self.terminal.say("")
        for scored, parts in scorers.items():
            for part, scorer in parts.items():
                if scorer.cut:
                    self.terminal.say(
                        f"{scored}, {part}: {scorer.cut} prompts are too long for the model; their beginning is cut",
                        "yellow",
                    )
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
        self.bank.check()
        self._checked = True

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
        if not self.run.config.exists() or len(self.bank.check()) == len(self.candidates):
            return  # nothing is there yet that another configuration could spoil
        there, now = parsing.read_yaml(self.run.config), yaml.safe_load(self.config_yaml())
        for one in (there, now):
            for key in (FREE | OPERATIONAL) & set(one):
                del one[key]
            for target in one["targets"].values():
                for key in ("test_data", "test_command", "test_task", "weight", "min_delta"):
                    target.pop(key, None)  # a sealed test may come later; the others only choose among scores
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

    def config_yaml(self) -> str:
        """The resolved configuration as one flat YAML, which `--config` takes again."""
        fields = parsing.trl_fields(self.args, self.model_args)
        comment = (
            "The resolved configuration of this run: paths absolute, defaults that depend on the hardware filled in."
        )
        model = fields.pop("model_name_or_path")
        return parsing.dump_yaml({"model_name_or_path": model, **fields, **self.config.to_yaml()}, comment)

    def prepare(self) -> None:
        """Claims the run folder and writes the resolved configuration."""
        if self.state.is_main_process:
            self.run.lock()
            if not self.run.config.exists() or self.run.config.read_text(encoding="utf-8") != self.config_yaml():
                write_atomic(self.run.config, self.config_yaml())
        self.state.wait_for_everyone()

    def train_adapters(self) -> None:
        """Trains one adapter per candidate, where it is missing.

        Raises:
            InputError: adapters in the run folder that were trained otherwise.
        """
        self.check()
        if missing := self.bank.check():
            if self._stack is not None:
                self._stack.detach()
                self._stack = None
            self.prepare()
            self.bank.train_missing(self._base_to_train, self.tokenizer, self.args, self.lora, self.terminal)
            self._worked = True
            self.terminal.say(f"trained {len(missing)} adapters: {os.path.relpath(self.run.adapters)}\n")

    def _open_stack(self) -> GatedStack:
        if self._stack is None:
            self._stack = GatedStack(self.base, self.bank.load())
        return self._stack

    def search(self) -> SearchResult:
        """Scores mixtures and chooses one; trains missing adapters first. What the journal knows is not scored again."""
        self.train_adapters()
        candidates, config = self.candidates, self.config
        self.prepare()
        space = self.space
        objectives = self._objectives()
        strategy = self._strategy(space, objectives)
        journal = Journal(self.run.trials)
        self.state.wait_for_everyone()
        budget = Budget(
            config.max_trials or math.inf,
            config.max_example_evaluations or math.inf,
            math.inf if config.max_seconds is None else config.max_seconds,
        )
        race = strategy is not exhaustive if config.race is None else config.race
        if race and config.objective == "merged":
            why = {
                "a target has no value for every example by itself": not all(one.order for one in objectives),
                "a target's min_delta needs scores of all examples": any(
                    one.min_delta is not None for one in objectives
                ),
                "one_standard_error needs scores of all examples": config.one_standard_error,
            }
            for reason in (text for text, holds in why.items() if holds):
                self.terminal.say(f"no racing: {reason}", "yellow")
        total = 2 + len(candidates) + min(self._proposals(space, strategy), budget.max_trials)
        done = 0

        with self.terminal.progress("scoring mixtures", int(total)) as bar:

            def on_standing(standing: Standing, best: Standing | None) -> None:
                nonlocal done
                done += 1
                if best is not None:
                    bar.update(min(done, int(total)), f"best so far {score_of(best).value:.4f} {best.mixture}")

            self._result = search(
                strategy,
                space,
                objectives,
                journal,
                names=tuple(candidates),
                costs={name: one.cost for name, one in candidates.items()},
                one_standard_error=config.one_standard_error,
                race=race,
                budget=budget,
                seed=self.args.seed,
                write=self.state.is_main_process,
                agree=self._agree,
                on_standing=on_standing,
            )
        if self._result.measured:
            self._worked = True
            what = "mixtures" if len(objectives) == 1 else f"trials on {len(objectives)} targets"
            self.terminal.say(f"scored {self._result.measured} {what}: {os.path.relpath(self.run.trials)}\n")
        return self._result

    def _agree(self, value: Any) -> Any:
        """What the main process has."""
        return broadcast_object_list([value])[0] if self.state.num_processes > 1 else value

    @cached_property
    def space(self) -> SearchSpace:
        """The mixtures that may be proposed.

        Raises:
            InputError: there are none.
        """
        config, candidates = self.config, self.candidates
        allowed = config.licenses
        unlicensed = [name for name, one in candidates.items() if allowed and one.config.license not in allowed]
        for name in unlicensed:
            if candidates[name].config.required:
                given = candidates[name].config.license
                raise InputError(f"candidates.{name}: it is required, but its license {given!r} is not among licenses")
        names = [name for name, one in candidates.items() if not one.config.excluded and name not in unlicensed]
        if not names:
            raise InputError("every candidate is excluded, by itself or by licenses: no mixture is possible")
        return SearchSpace(
            tuple(names),
            frozenset(name for name in names if candidates[name].config.required),
            config.min_datasets,
            config.max_datasets,
            {name: one.cost for name, one in candidates.items()},
            math.inf if config.max_cost is None else config.max_cost,
            config.weights == "continuous",
        )

    def _check_search(self) -> None:
        """Refuses objectives and strategies that the targets do not allow, before anything is trained."""
        config, space = self.config, self.space  # making the space refuses impossible constraints
        scorers = {name: parts["validation"] for name, parts in self.scorers.items()}
        likelihoods = config.objective == "merged" and all(isinstance(one, LogprobScorer) for one in scorers.values())
        for name, scorer in scorers.items():
            metric = self.targets[name].config.metric
            fits = isinstance(scorer, LogprobScorer) and metric in ENSEMBLE_METRICS
            if config.objective == "ensemble" and not fits:
                raise InputError(
                    f"targets.{name}: objective ensemble averages the probabilities of right answers; it needs scorer choice, "
                    f"classification or loss with one of {', '.join(ENSEMBLE_METRICS)} as its metric"
                )
        strategy = config.strategy
        if strategy == "gradient" and not likelihoods:
            raise InputError(
                "strategy: gradient needs objective: merged and targets whose scorer is choice, classification or loss"
            )
        alone = config.objective == "ensemble" and len(scorers) == 1
        if strategy == "auto" and config.weights == "continuous" and not alone:
            strategy = choose_strategy(space, likelihoods)[0]
        if strategy == "bayes" and find_spec("optuna") is None:
            raise InputError("strategy bayes needs Optuna. Type: pip install 'm2m_hf[bayes]'")

    def _objectives(self) -> list[Objective]:
        """What scores mixtures, one for every target."""
        adapters = {name: record["fingerprint"] for name, record in self.bank.training().items()}
        base = fingerprint(
            [self.facts.get(key) for key in ("base_model", "dtype", "tokenizer", "chat_template", "quantization")]
        )
        made: list[Objective] = []
        for name, target in self.targets.items():
            scorer = self.scorers[name]["validation"]
            merged = MergedObjective(
                self._open_stack,
                scorer,
                adapters,
                target=name,
                base_fingerprint=base,
                tokens_per_batch=self._tokens_per_batch,
                weight=target.config.weight,
                min_delta=target.config.min_delta,
            )
            if self.config.objective == "merged":
                made.append(merged)
                continue
            assert isinstance(scorer, LogprobScorer)
            made.append(EnsembleObjective(merged, scorer, target.config, self.run.root / "ensemble"))
        return made

    def _strategy(self, space: SearchSpace, objectives: list[Objective]) -> Callable[[Task], Strategy]:
        """What proposes mixtures; where the choice was ours, said with its reason."""
        chosen = self.config.strategy
        if isinstance(objectives[0], EnsembleObjective) and len(objectives) == 1 and chosen in ("auto", "exhaustive"):
            ensemble = objectives[0].ensemble(space.names)
            if space.continuous:
                self.terminal.say("strategy: the best weights, since those of an ensemble are a convex problem")
                return listed(ensemble.best_weights(space))
            if len(space.names) <= MOST_SUBSETS and not space.at_most(FEW):
                self.terminal.say(
                    "strategy: all subsets, of which the best 1000 are kept, since they cost no forward pass"
                )
                return listed(ensemble.best_subsets(space))
        if chosen == "auto":
            likelihoods = all(one.differentiable for one in objectives)
            chosen, why = choose_strategy(space, likelihoods, self.config.max_trials or 0)
            self.terminal.say(f"strategy: {chosen}, since {why}")
        return STRATEGIES[chosen]

    @staticmethod
    def _proposals(space: SearchSpace, strategy: Callable[[Task], Strategy]) -> int:
        """About how many mixtures a strategy will propose."""
        if strategy is exhaustive:
            known = [*(Mixture.subset([name]) for name in space.names), Mixture.subset(space.names)]
            return sum(mixture not in known for mixture in space.subsets())
        return default_budget(len(space.names))

    def write_outcome(self) -> dict[str, Any]:
        """Writes mixture, recipe and summary of the search; keeps a final fine-tune of the same mixture.

        Returns:
            The summary, as in `OUT/summary.json`.
        """
        result = self._result or self.search()
        summary = summarise(self._outcome())
        if self.state.is_main_process:
            write_recipe(self.run, result.best.mixture, self.candidates, self._data[0], *self._final_settings())
            write_json(self.run.summary, summary)
        self.state.wait_for_everyone()
        return summary

    def _final_settings(self) -> tuple[SFTConfig, ModelConfig]:
        return parsing.with_overrides(self.args, self.model_args, self.config.final)

    def _final_fingerprint(self, mixture: Mixture) -> str:
        """What the final fine-tune and its scores depend on."""
        args, model_args = self._final_settings()
        base, dtype = self.facts["base_model"], model_args.dtype
        quantization = quantization_facts(model_args)
        facts = uniform_facts(args, lora_config(model_args), self.tokenizer, base, dtype, self._data[0], quantization)
        # A final model is not made again because another number of processes looks at it.
        facts = {name: value for name, value in facts.items() if name not in LAUNCH}
        sources = [[name, weight, self.candidates[name].fingerprint] for name, weight in mixture.items]
        scored = {name: {part: one.fingerprint for part, one in parts.items()} for name, parts in self.scorers.items()}
        return fingerprint([sources, facts, scored])

    def train_final(self) -> dict[str, Any]:
        """Fine-tunes on the chosen mixture, scores base and final model on validation and on the sealed test set.

        Done before with the same mixture and arguments, it is not done again, and the test set not looked at again.

        Returns:
            The summary, as in `OUT/summary.json`.
        """
        result = self._result or self.search()
        summary = self.write_outcome()
        if summary["final"] is None:
            self._worked = True
            self._train_and_score_final(result)
            summary = self.write_outcome()
        return summary

    def _train_and_score_final(self, result: SearchResult) -> None:
        mixture = result.best.mixture
        args, model_args = self._final_settings()
        if self._stack is not None:
            self._stack.detach()
            self._stack = None
        train = self.run.mixture / "train.jsonl"
        rows = load_dataset("json", data_files=str(train), split="train").select_columns(list(FEATURES[self._data[0]]))
        chosen = [(self.candidates[name], count) for name, count in self._shares(mixture).items()]
        trained = sum(one.trained_rows * count // len(one.rows) for one, count in chosen)
        steps = planned_steps(args, trained, sum(one.tokens * count // len(one.rows) for one, count in chosen))
        partial = self.run.root / ".final.partial"
        start = time.monotonic()
        with self.terminal.progress(f"final fine-tune on {mixture}", steps) as bar:
            progress = BankProgress(bar, 0, "")
            record = train_lora(
                self._base_to_train(), self.tokenizer, rows, args, lora_config(model_args), partial, progress
            )
        seconds = time.monotonic() - start
        stack = GatedStack(self.base, {"final": Adapter.load(partial)})
        scores: dict[str, Any] = {}
        total = sum(2 * len(parts) for parts in self.scorers.values())
        with self.terminal.progress("scoring base and final model", total) as bar:
            for target, parts in self.scorers.items():
                for part, scorer in parts.items():
                    for who, weights in (("base", {}), ("final", {"final": 1.0})):
                        score = scorer.score(stack, [weights], self._tokens_per_batch)[0]
                        if isinstance(score, Failure):
                            raise InputError(f"the {who} model has no score on {target}: {score.reason}")
                        shown = {"score": score.value, "stderr": score.stderr}
                        scores.setdefault(target, {}).setdefault(who, {})[part] = shown
                        bar.advance()
        stack.detach()
        self._put_old_final_aside()
        publish(
            partial,
            self.run.final,
            {
                "fingerprint": self._final_fingerprint(mixture),
                "mixture": mixture.weights,
                "rows": len(rows),
                "scores": scores,
                "total_seconds": round(seconds, 3),
                **record,
            },
        )

    def _shares(self, mixture: Mixture) -> dict[str, int]:
        return shares(mixture, {name: len(self.candidates[name].rows) for name in mixture.names})

    def _put_old_final_aside(self) -> None:
        """A final model of another mixture or of other arguments is renamed, not overwritten."""
        record = self.run.final / "training.json"
        if record.exists() and self.state.is_main_process:
            old = self.run.final.with_name(f"final.{read_json(record).get('fingerprint', 'unknown')}")
            if not old.exists():
                self.run.final.rename(old)
                self.terminal.say(f"the final model that was there is now {os.path.relpath(old)}")

    def _read_final(self, mixture: Mixture) -> dict[str, Any] | None:
        path = self.run.final / "training.json"
        if not path.exists():
            return None
        final: dict[str, Any] = read_json(path)
        return final if final.get("fingerprint") == self._final_fingerprint(mixture) else None

    def _outcome(self) -> Outcome:
        result = self._result or self.search()
        return Outcome(
            result=result,
            candidates=self.candidates,
            targets=self.targets,
            examples={
                name: {part: one.examples for part, one in parts.items()} for name, parts in self.scorers.items()
            },
            training=self.bank.training(),
            final=self._read_final(result.best.mixture),
        )

    def show(self) -> None:
        """Prints the end table: base, singles, all, the chosen mixture and the final model; and what to do next."""
        outcome = self._outcome()
        self.terminal.table(*end_table(outcome))
        args = self._final_settings()[0]
        steps = args.max_steps if args.max_steps > 0 else None
        for line in remarks(outcome, steps=steps, epochs=args.num_train_epochs, overrides=self.config.final):
            self.terminal.say(line)
        self.terminal.say(f"recipe: trl sft --config {os.path.relpath(self.run.recipe)}")
        if outcome.final is None:
            self.terminal.say(f"next: m2m sft {os.path.relpath(self.run.root)}")

    def select(self) -> dict[str, Any]:
        """Everything in order: check, adapters, search, recipe and, with `train_final`, the final fine-tune.

        Returns:
            The summary, as in `OUT/summary.json`.
        """
        self.check()
        self.search()
        summary = self.train_final() if self.config.train_final else self.write_outcome()
        self.show()
        if not self._worked:
            self.terminal.say(f"nothing to do: {os.path.relpath(self.run.root)} is complete", style="green")
        return summary
