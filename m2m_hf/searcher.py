"""`MergeToMixSearcher`: the whole method, from candidates to the model trained on the chosen mixture."""

import copy
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import ModelConfig, SFTConfig

from m2m_hf.config import parsing
from m2m_hf.config.run_config import MergeToMixConfig
from m2m_hf.console import Terminal
from m2m_hf.core.objective import Objective
from m2m_hf.core.space import SearchSpace
from m2m_hf.data.mixture_rows import mixture_dataset, write_mixture
from m2m_hf.errors import InputError
from m2m_hf.modeling.devices import broadcast
from m2m_hf.modeling.lora import model_config
from m2m_hf.objectives.ensemble import EnsembleObjective
from m2m_hf.publish.hub import check_login, fetch_bank, push
from m2m_hf.publish.recipe import write_recipe
from m2m_hf.reporting.page import write_report
from m2m_hf.reporting.tables import baselines_table, end_table, remarks, verified_table
from m2m_hf.run.checks import (
    RememberTargets,
    adapter_importer,
    check_run,
    check_settings,
    check_values,
    claim_folder,
    fetch_missing,
)
from m2m_hf.run.comparison import Selection, baseline_scores, study_fidelity, verify
from m2m_hf.run.context import RunContext
from m2m_hf.run.cut_off import WarnOfCutOff
from m2m_hf.run.final import make_final, read_final
from m2m_hf.search.callbacks import ProgressCallback, SearchCallback
from m2m_hf.search.loop import planned_mixtures, search
from m2m_hf.search.measure import SearchState
from m2m_hf.search.model_based import STRATEGIES, SUBSETS
from m2m_hf.search.race import reasons_against_racing
from m2m_hf.search.result import Budget, SearchResult
from m2m_hf.search.strategies import Strategy, exhaustive, listed
from m2m_hf.storage.files import write_json
from m2m_hf.training.imported_experts import AdapterImporter, ModelImporter, import_experts
from m2m_hf.training.trackers import SearchTracker, Tracker


class MergeToMixSearcher:
    """Chooses the mixture of candidate datasets to fine-tune on (Merge to Mix, arXiv 2505.16066).

    Every step does only what is not done yet in the run folder (`args.output_dir`), so calling it again, or after an
    interruption, goes on from where it stands.

    ```python
    searcher = MergeToMixSearcher.from_yaml("recipes/demo.yaml")
    result = searcher.search()          # trains missing adapters first
    print(result.best.mixture, result.best.score.value)
    summary = searcher.train_final()    # one fine-tune on the chosen mixture, scored on the sealed test set
    ```

    Args:
        config: candidates, targets and how to search.
        args: TRL's training arguments, the same for every adapter and for the final fine-tune.
        model_args: base model and LoRA shape.
        terminal: where to print; by default standard output, and nothing on processes other than the main one.

    Attributes:
        run: the parts of the run: data, base model, bank, scorers, objectives.

    Raises:
        InputError: from any method, for whatever is wrong with what was given. Everything is checked before anything is
            trained or written.
    """

    def __init__(
        self, config: MergeToMixConfig, args: SFTConfig, model_args: ModelConfig, terminal: Terminal | None = None
    ) -> None:
        check_values(config, args, model_args)
        self.run = RunContext(config, args, model_args, terminal)
        check_settings(self.run)
        self._checked = self._worked = False
        self._selection: Selection | None = None
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
        """A searcher from what TRL's SFTTrainer takes; `chosen_rows` is then its training set.

        Adapters train with the script's own settings, except for what concerns its final model: evaluation, the best
        checkpoint, resuming, pushing to the Hub. The run folder is `<output_dir>-m2m`, beside the script's `output_dir`, which
        a push would publish.

        Args:
            model: a Hub id or a folder, loaded in float32 unless `args.model_init_kwargs` set another `dtype`, as in TRL.
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

    def check(self) -> None:
        """Reads and checks everything that was given, once, and prints it; nothing is trained or written.

        Raises:
            InputError: anything that would make the run fail or mislead later.
        """
        if not self._checked:
            check_run(self.run)
            self._checked = True

    def prepare(self, pushes: bool = False) -> None:
        """Checks everything, claims the run folder and writes the resolved configuration to it.

        Args:
            pushes: the run ends on the Hub where `push_to_hub` says so, which must let us in.
        """
        self.check()
        if pushes and self.run.args.push_to_hub:
            check_login(self.run.args.hub_model_id)
        claim_folder(self.run)

    def train_adapters(self) -> None:
        """Trains one adapter per candidate, where it is missing.

        Raises:
            InputError: the run folder holds adapters that were trained differently.
        """
        self.prepare()
        run = self.run
        if run.config.bank and (missing := run.bank.check()):
            self._import_experts(missing)
        if missing := run.bank.check():
            run.bank.train_missing(
                run.base.to_train,
                lambda name: run.training_settings(*run.candidate_settings(name)),
                run.terminal,
                run.config.parallel,
            )
            self._worked = True
            noun = run.bank.noun(len(missing))
            run.terminal.say(f"trained {len(missing)} {noun}: {os.path.relpath(run.folder.adapters)}\n")

    def _import_experts(self, missing: Sequence[str]) -> None:
        """Takes missing experts from a published bank, or each from where somebody else has it."""
        run, source = self.run, self.run.config.bank
        if isinstance(source, str):
            with run.state.local_main_process_first():  # one process of every machine fetches
                bank = fetch_bank(source, run.bank.noun())
            run.bank.take(bank, missing, run.terminal)
        elif others := fetch_missing(run, missing):
            importer: AdapterImporter | ModelImporter | None = adapter_importer(run)
            if importer is None:
                importer = ModelImporter(run.base.plan, run.terminal, run.base.plain(), run.base.load_other)
            import_experts(run.bank, others, importer, run.terminal)

    def search(self, callbacks: Sequence[SearchCallback] = ()) -> SearchResult:
        """Scores mixtures and chooses one, training missing adapters first. What the journal knows is not scored again.

        With `fine_tunes` some are then fine-tuned, and the choice goes by what these score.

        Args:
            callbacks: are told of every scored trial and mixture, and may stop the search. Where the search is done already,
                they are told of its trials as the journal has them.
        """
        return self._select(callbacks).result

    def _select(self, callbacks: Sequence[SearchCallback] = ()) -> Selection:
        """See `search`."""
        if self._selection is None or callbacks:
            self.train_adapters()
            result = self._search(callbacks)
            self._selection = verify(self.run, result) if self.run.fine_tunes else Selection(self.run, result)
        return self._selection

    def _search(self, callbacks: Sequence[SearchCallback]) -> SearchResult:
        run, config = self.run, self.run.config
        if run.is_main:
            run.task.save_head()
        space, objectives, journal = run.space, run.objectives(config.objective), run.journal
        strategy = self._strategy(space, objectives)
        budget = Budget(
            config.max_trials or math.inf,
            config.max_example_evaluations or math.inf,
            math.inf if config.max_seconds is None else config.max_seconds,
        )
        race = strategy is not exhaustive if config.race is None else config.race
        if race and config.objective == "merged":
            for reason in reasons_against_racing([one.target for one in objectives], config.one_standard_error):
                run.terminal.say(f"no racing: {reason}", "yellow")
        known = len(journal.trials)
        # A search that goes on is a run of its own, which shows the curve from its beginning.
        name = f"search-from-{known}" if known else "search"
        total = planned_mixtures(strategy, space, len(run.candidates), budget)
        if config.objective == "trained":
            run.terminal.say(f"up to {total - 1} mixtures to fine-tune and score, {run.describe_steps()}")
        with (
            Tracker(run.args, name, enabled=run.is_main) as tracker,
            run.terminal.progress("scoring mixtures", total) as bar,
        ):
            own = [
                RememberTargets(run),
                WarnOfCutOff(run),
                ProgressCallback(bar),
                SearchTracker(tracker, live=config.objective != "trained"),
            ]
            state = SearchState(
                space, objectives, journal, [*own, *callbacks], budget, failed=run.failed, broadcast=broadcast
            )
            rule, seed = config.one_standard_error, run.args.seed
            result = search(state, strategy, tuple(run.candidates), one_standard_error=rule, race=race, seed=seed)
        if (divisor := run.base.batch_divisor) > 1:
            less = max(1, run.tokens_per_batch // divisor)
            run.terminal.say(
                f"memory did not suffice for tokens_per_batch: {run.tokens_per_batch}; went on with {less}", "yellow"
            )
        if result.measured:
            self._worked = True
            what = "mixtures" if len(objectives) == 1 else f"trials on {len(objectives)} targets"
            run.terminal.say(f"scored {result.measured} {what}: {os.path.relpath(run.folder.trials)}\n")
        return result

    def _strategy(self, space: SearchSpace, objectives: list[Objective]) -> Strategy:
        """What proposes mixtures; a choice of ours is printed with its reason."""
        run, first = self.run, objectives[0]
        shortcut = run.ensemble_shortcut()
        if isinstance(first, EnsembleObjective) and shortcut == "weights":
            run.terminal.say("strategy: the best weights, since those of an ensemble are a convex problem")
            return listed(first.ensemble(space.names).best_weights(space))
        if isinstance(first, EnsembleObjective) and shortcut == "subsets":
            run.terminal.say(f"strategy: all subsets, keeping the best {SUBSETS}, since they cost no forward pass")
            return listed(first.ensemble(space.names).best_subsets(space))
        chosen, why = run.choose_strategy()
        if why:
            run.terminal.say(f"strategy: {chosen}, since {why}")
        return STRATEGIES[chosen]

    def fidelity(self) -> dict[str, Any]:
        """The correlation study: fine-tunes a sample of mixtures, and tells how well their scores were predicted.

        Returns:
            The content of `OUT/fidelity.json`.
        """
        result = self.search()
        found = study_fidelity(self.run, result, unseal=read_final(self.run, result.best.mixture) is not None)
        self.write_outcome()
        return found

    def train_final(self) -> dict[str, Any]:
        """Fine-tunes on the chosen mixture, and scores base and final model on validation and on the sealed test set.

        What was done before with the same mixture and settings is not done again, and the test set not looked at again.

        Returns:
            The summary, as in `OUT/summary.json`.
        """
        selection = self._select()
        summary = self.write_outcome()
        if summary["final"] is None:
            self._worked = True
            make_final(self.run, selection.result.best.mixture)
            summary = self._write_summary()
        if selection.verified is not None:
            scores = baseline_scores(self.run, selection.result)
            selection.verified = replace(selection.verified, baselines=scores)
            summary = self._write_summary()
        return summary

    def select(self) -> dict[str, Any]:
        """Everything in order: check, adapters, search, recipe and, with `train_final`, the final fine-tune.

        Returns:
            The summary, as in `OUT/summary.json`.
        """
        run = self.run
        self.prepare(pushes=True)
        summary = self.train_final() if run.config.train_final else self.write_outcome()
        with run.terminal.keep() as self.closing:
            self.show()
        if not self._worked and not run.fine_tuned.worked:
            run.terminal.say(f"nothing to do: {os.path.relpath(run.folder.root)} is complete", style="green")
        if run.args.push_to_hub:
            self.push_to_hub()
        return summary

    def chosen_rows(self) -> Dataset:
        """The rows of the chosen mixture, shuffled, as in `OUT/mixture/train.jsonl`; searches first where it must.

        Frees the base model: a script that trains on the rows would have it in memory twice.
        """
        self.write_outcome()
        counts = self.run.fine_tuned.counts(self.search().best.mixture)
        self.run.base.release()
        return mixture_dataset(counts, self.run.candidates, self.run.args.seed)

    def push_to_hub(self, repo_id: str | None = None, private: bool | None = None, dry_run: bool = False) -> list[str]:
        """Puts adapters, final model and the chosen mixture on the Hub, each with a card; see `hub.push`.

        Args:
            repo_id: `org/name` (default: `hub_model_id`).
            private: whether new repositories are private (default: `hub_private_repo`).
            dry_run: only list what would be sent.

        Returns:
            The addresses of the repositories; none on processes other than the main one.
        """
        args = self.run.args
        repo_id = repo_id or args.hub_model_id
        if not repo_id:
            raise InputError("repo_id: expected org/name, or hub_model_id: org/name in the configuration")
        addresses = []
        if self.run.is_main:
            private = args.hub_private_repo if private is None else private
            addresses = push(self.run.folder, repo_id, self.run.terminal, private, dry_run)
        self.run.state.wait_for_everyone()
        return addresses

    def write_outcome(self) -> dict[str, Any]:
        """Writes mixture, recipe and summary of the search.

        Returns:
            The summary, as in `OUT/summary.json`.
        """
        run = self.run
        mixture = self.search().best.mixture
        if run.is_main:
            args, model_args = run.final_settings
            train = write_mixture(run.folder.mixture, mixture, run.candidates, args.seed)
            settings = run.training_settings(args, model_args)
            write_recipe(run.folder, mixture, train, run.task.data, settings, model_args)
        return self._write_summary()

    def _write_summary(self) -> dict[str, Any]:
        run, summary = self.run, self._select().finished().summary()
        if run.is_main:
            write_json(run.folder.summary, summary)
        run.state.wait_for_everyone()
        return summary

    def show(self) -> None:
        """Prints the end table, what was chosen and why, and what to do next."""
        run, finished = self.run, self._select().finished()
        run.terminal.table(*end_table(finished))
        if finished.verified:
            run.terminal.say("")
            run.terminal.table(*verified_table(finished.verified))
        if finished.verified and finished.verified.baselines:
            run.terminal.say("")
            run.terminal.table(*baselines_table(finished.verified.baselines))
        for line in remarks(finished):
            run.terminal.say(line)
        if run.is_main:
            run.terminal.say(f"report: {os.path.relpath(write_report(run.folder.root))}")
        run.terminal.say(f"recipe: {finished.recipe_runner} --config {os.path.relpath(run.folder.recipe)}")
        if finished.final is None:
            run.terminal.say(f"next: m2m sft {os.path.relpath(run.folder.root)}")
