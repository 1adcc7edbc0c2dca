"""`MergeToMixSearcher`: the whole method, from candidates to the model trained on the chosen mixture."""

import os
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from datasets import load_dataset
from trl import ModelConfig, SFTConfig

from . import parsing
from .adapters import (
    AdapterBank,
    base_fingerprint,
    differing,
    load_base,
    load_tokenizer,
    lora_config,
    planned_steps,
    train_lora,
    uniform_facts,
)
from .callbacks import BankProgress
from .config import MergeToMixConfig
from .console import Terminal
from .data import FEATURES, Candidate, Target, load_all, overlap
from .errors import InputError
from .journal import Journal, RunFolder, fingerprint, read_json, write_atomic, write_json
from .merging import Adapter, GatedStack
from .mixture import BASE, Mixture, SearchSpace, Trial
from .objectives import MergedObjective, score_mixture
from .recipe import write_recipe
from .report import Outcome, end_table, remarks, summarise
from .scoring import Scorer, make_scorer
from .search import SearchResult, score_of, search
from .strategies import exhaustive

# What may change between two starts on one run folder: nothing that a finished adapter or trial depends on.
FREE = {"one_standard_error", "tokens_per_batch", "train_final", "final", "allow_overlap", "candidates", "output_dir"}


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
        terminal: where to print; silent by default on all processes but the main one.

    Raises:
        InputError: from any method, for whatever is wrong with what was given.
    """

    def __init__(
        self, config: MergeToMixConfig, args: SFTConfig, model_args: ModelConfig, terminal: Terminal | None = None
    ) -> None:
        self.config = config
        self.args = args
        self.model_args = model_args
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
        flags = [part for key, value in overrides.items() for part in (f"--{key}", str(value))]
        return cls(*parsing.parse(Path(path), flags))

    # What a run is made of; loaded when first asked for.

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.model_args, self.args)

    @cached_property
    def data(self) -> tuple[str, dict[str, Candidate], Target]:
        """(format, candidates, target), loaded and checked."""
        data_format, candidates, targets = load_all(
            self.config.parsed_candidates,
            self.config.parsed_targets,
            self.tokenizer,
            seed=self.args.seed,
            max_length=self.args.max_length,
            assistant_only_loss=self.args.assistant_only_loss,
        )
        return data_format, candidates, next(iter(targets.values()))

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What all adapters have in common: see `uniform_facts`."""
        data_format = "messages" if self.args.assistant_only_loss else self.data[0]
        base = base_fingerprint(self.model_args)
        return uniform_facts(self.args, self.lora, self.tokenizer, base, self.model_args.dtype, data_format)

    @cached_property
    def bank(self) -> AdapterBank:
        return AdapterBank(self.run.adapters, self.data[1], self.facts)

    @cached_property
    def base(self) -> Any:
        """The base model, loaded once for the adapters, the search and the final fine-tune."""
        self.terminal.say(f"loading {self.model_args.model_name_or_path} ({self.model_args.dtype})", style="dim")
        return load_base(self.model_args, self.args)

    @cached_property
    def scorer(self) -> Scorer:
        """Of the validation rows."""
        return self._scorer(self.data[2].rows)

    def _scorer(self, rows: Any) -> Scorer:
        positions = getattr(self.base.config.get_text_config(), "max_position_embeddings", None) or 1_000_000
        return make_scorer(self.data[2].config, rows, self.tokenizer, positions)

    # The steps.

    def check(self) -> None:
        """Reads and checks everything that was given, and shows it in a table, before anything is trained or written.

        Raises:
            InputError: anything that would make the run fail or mislead later.
        """
        if self._checked:
            return
        data_format, candidates, target = self.data
        lora_config(self._final_settings()[1])
        steps = {name: planned_steps(self.args, len(one.rows) - one.dropped) for name, one in candidates.items()}
        rows = []
        shared: dict[str, int] = {}
        for name, one in candidates.items():
            shared[name] = overlap(one, [*target.rows, *target.test_rows])
            figures = (len(one.rows), one.tokens, one.longest, one.truncated, steps[name], shared[name])
            rows.append([name, *(f"{figure:,}" for figure in figures)])
        self.terminal.table(
            f"candidates ({data_format} format)",
            ["", "rows", "tokens", "longest", "truncated", "steps", "in target"],
            rows,
        )
        test = f", {len(target.test_rows):,} sealed test rows" if target.test_rows else ", no test set"
        self.terminal.say(f"target {target.name}: {len(target.rows):,} validation rows{test}, {target.config.metric}\n")
        for name, one in candidates.items():
            if one.dropped:
                self.terminal.say(
                    f"{name}: {one.dropped} rows whose prompt alone fills max_length are left out", "yellow"
                )
        leaking = [name for name in candidates if shared[name]]
        if leaking and not self.config.allow_overlap:
            raise InputError(
                f"rows of target {target.name!r} also stand in {', '.join(f'{name} ({shared[name]})' for name in leaking)}: "
                "a candidate that holds the questions looks better than it is. Remove those rows, or say allow_overlap: true"
            )
        self._check_run_folder()
        self.bank.check()
        self._checked = True

    def _check_run_folder(self) -> None:
        """Refuses to go on in a folder whose run was configured otherwise.

        Raises:
            InputError: naming every field that differs.
        """
        if not self.run.config.exists():
            return
        there = yaml.safe_load(self.run.config.read_text(encoding="utf-8"))
        now = yaml.safe_load(self.config_yaml())
        ignored = FREE | {"logging_steps", "report_to", "logging_first_step"}
        differences = differing(*({k: v for k, v in one.items() if k not in ignored} for one in (now, there)))
        if differences:
            raise InputError(
                f"{self.run.root} holds a run with another configuration: {'; '.join(differences)}. "
                "Restore these fields, or choose another --output_dir"
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
        if missing := self.bank.check():
            if self._stack is not None:
                self._stack.detach()
                self._stack = None
            self.prepare()
            self.bank.train_missing(self.base, self.tokenizer, self.args, self.lora, self.terminal)
            self._worked = True
            self.terminal.say(f"trained {len(missing)} adapters: {os.path.relpath(self.run.adapters)}\n")

    def _open_stack(self) -> tuple[GatedStack, Scorer]:
        if self._stack is None:
            self._stack = GatedStack(self.base, self.bank.load())
        return self._stack, self.scorer

    def search(self) -> SearchResult:
        """Scores mixtures and chooses one; trains missing adapters first. What the journal knows is not scored again."""
        self.train_adapters()
        _, candidates, target = self.data
        self.prepare()
        space = SearchSpace(
            tuple(candidates), frozenset(name for name, one in candidates.items() if one.config.required)
        )
        objective = MergedObjective(
            self._open_stack,
            {name: record["fingerprint"] for name, record in self.bank.training().items()},
            target=target.name,
            target_fingerprint=target.fingerprint(target.rows),
            base_fingerprint=fingerprint(
                [self.facts[key] for key in ("base_model", "dtype", "tokenizer", "chat_template")]
            ),
            examples=len(target.rows),
            tokens_per_batch=self._tokens_per_batch,
        )
        journal = Journal(self.run.trials)
        self.state.wait_for_everyone()
        total = len(
            {BASE, *space.subsets(), *(Mixture.subset([name]) for name in space.names), Mixture.subset(space.names)}
        )
        done = 0

        with self.terminal.progress("scoring mixtures", total) as bar:

            def on_trial(trial: Trial, best: Trial | None) -> None:
                nonlocal done
                done += 1
                if best is not None:
                    bar.update(done, f"best so far {score_of(best).value:.4f} {best.mixture}")

            self._result = search(
                exhaustive(space),
                space,
                objective,
                journal,
                costs={name: one.cost for name, one in candidates.items()},
                one_standard_error=self.config.one_standard_error,
                write=self.state.is_main_process,
                on_trial=on_trial,
            )
        if self._result.measured:
            self._worked = True
            self.terminal.say(f"scored {self._result.measured} mixtures: {os.path.relpath(self.run.trials)}\n")
        return self._result

    def write_outcome(self) -> dict[str, Any]:
        """Writes mixture, recipe and summary of the search; keeps a final fine-tune of the same mixture.

        Returns:
            The summary, as in `OUT/summary.json`.
        """
        result = self._result or self.search()
        summary = summarise(self._outcome())
        if self.state.is_main_process:
            data_format, candidates, _ = self.data
            data_format = "messages" if self.args.assistant_only_loss else data_format
            write_recipe(self.run, result.best.mixture, candidates, data_format, *self._final_settings())
            write_json(self.run.summary, summary)
        self.state.wait_for_everyone()
        return summary

    def _final_settings(self) -> tuple[SFTConfig, ModelConfig]:
        return parsing.with_overrides(self.args, self.model_args, self.config.final)

    def _final_fingerprint(self, mixture: Mixture) -> str:
        """What the final fine-tune and its scores depend on."""
        _, candidates, target = self.data
        args, model_args = self._final_settings()
        return fingerprint(
            [
                [[name, weight, candidates[name].fingerprint] for name, weight in mixture.items],
                uniform_facts(
                    args, lora_config(model_args), self.tokenizer, self.facts["base_model"], model_args.dtype, ""
                ),
                target.fingerprint(target.rows),
                target.fingerprint(target.test_rows),
            ]
        )

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
            final = self._train_and_score_final(result)
            if self.state.is_main_process:
                write_json(self.run.final / "training.json", final)
            self.state.wait_for_everyone()
            summary = self.write_outcome()
        return summary

    def _train_and_score_final(self, result: SearchResult) -> dict[str, Any]:
        data_format, _, target = self.data
        data_format = "messages" if self.args.assistant_only_loss else data_format
        mixture = result.best.mixture
        args, model_args = self._final_settings()
        if self._stack is not None:
            self._stack.detach()
            self._stack = None
        train = self.run.mixture / "train.jsonl"
        rows = load_dataset("json", data_files=str(train), split="train").select_columns(list(FEATURES[data_format]))
        steps = planned_steps(args, len(rows))
        start = time.monotonic()
        with self.terminal.progress(f"final fine-tune on {mixture}", steps) as bar:
            record = train_lora(
                self.base,
                self.tokenizer,
                rows,
                args,
                lora_config(model_args),
                self.run.final,
                BankProgress(bar, 0, ""),
            )
        seconds = time.monotonic() - start
        stack = GatedStack(self.base, {"final": Adapter.load(self.run.final)})
        scores: dict[str, Any] = {}
        parts = {"validation": self.scorer} | ({"test": self._scorer(target.test_rows)} if target.test_rows else {})
        for part, scorer in parts.items():
            for who, scored in (("base", BASE), ("final", Mixture.subset(["final"]))):
                score = score_mixture(stack, scorer, scored, self._tokens_per_batch)
                scores.setdefault(who, {})[part] = {"score": score.value, "stderr": score.stderr}
        stack.detach()
        return {
            "fingerprint": self._final_fingerprint(mixture),
            "mixture": mixture.weights,
            "rows": len(rows),
            "scores": scores,
            "total_seconds": round(seconds, 3),
            **record,
        }

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
            candidates=self.data[1],
            target=self.data[2],
            training=self.bank.training(),
            final=self._read_final(result.best.mixture),
        )

    def show(self) -> None:
        """Prints the end table: base, singles, all, the chosen mixture and the final model; and what to do next."""
        outcome = self._outcome()
        columns, rows = end_table(outcome)
        metric = outcome.target.config.metric
        self.terminal.table(f"{outcome.target.name}: {metric} ± standard error", columns, rows)
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
