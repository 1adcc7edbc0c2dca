"""`m2m select --dry_run`: what a run would do, and about what it would cost, from a short measurement; nothing is kept."""

import copy
import math
import random
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from m2m_hf.console import duration
from m2m_hf.merging.gated_stack import GatedStack
from m2m_hf.run.context import RunContext
from m2m_hf.scoring.scorers import Scorer
from m2m_hf.search.loop import planned_mixtures
from m2m_hf.search.model_based import STRATEGIES, choose_strategy
from m2m_hf.search.result import Budget
from m2m_hf.storage.records import experts_noun
from m2m_hf.training.fine_tune import TrainingFailedError, planned_steps, train_expert

STEPS = 3  # of a training that is measured, the first of which is left out
ROWS = 64  # that are scored to measure
APART = 0.2  # share of rows that two mixtures are taken to answer differently


@dataclass(frozen=True)
class Estimate:
    """What a run would do.

    Args:
        adapters: to be trained.
        experts: what these are called, `adapters` or `experts`.
        steps: of them together; `final_steps` of the final fine-tune on all candidates, the most that it can take.
        mixtures: to be scored at most; races end most of them early.
        seconds_per_step: measured; None where nothing is to be trained.
        seconds_per_mixture: measured; without scorers that run something else.
        memory: bytes at the highest while measuring.
        apart: what is not part of the figures.
    """

    adapters: int
    experts: str
    steps: int
    final_steps: int
    mixtures: int
    seconds_per_step: float | None
    seconds_per_mixture: float
    memory: int
    apart: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """To print."""
        step = self.seconds_per_step or 0.0

        def about(seconds: float) -> str:
            return (
                f"about {duration(seconds)} ({step:.2f} s a step)"
                if step
                else "time unknown: the short training failed"
            )

        adapters, search, final = self.steps * step, self.mixtures * self.seconds_per_mixture, self.final_steps * step
        lines = [
            f"{self.experts}: {self.adapters} to train, {self.steps:,} steps, {about(adapters)}"
            if self.adapters
            else f"{self.experts}: all trained",
            f"search: up to {self.mixtures:,} mixtures, about {duration(search)} ({self.seconds_per_mixture:.2f} s each, unless "
            "a race ends it early)",
            f"final fine-tune: up to {self.final_steps:,} steps, {about(final)}"
            if self.final_steps
            else "no final fine-tune",
            f"peak memory while measuring: {self.memory / 2**30:.1f} GiB",
        ]
        lines += [f"not counted: {one}" for one in self.apart]
        return [*lines, f"together about {duration(adapters + search + final)}"]


def estimate(run: RunContext, mixtures: int) -> Estimate:
    """Measures a few training steps and a few scored rows.

    Args:
        mixtures: that the search would score at most.

    Raises:
        InputError: whatever would be wrong with the run.
    """
    candidates, args = run.candidates, copy.deepcopy(run.args)
    missing = run.bank.check()
    word = experts_noun({"expert": run.config.expert})
    steps = sum(
        planned_steps(run.candidate_settings(name)[0], candidates[name].trained_rows, candidates[name].tokens)
        for name in missing
    )
    together = [
        sum(figures) for figures in zip(*((one.trained_rows, one.tokens) for one in candidates.values()), strict=True)
    ]
    final = planned_steps(run.final_settings[0], *together)
    seconds: float | None = None
    memory = 0
    args.max_steps, args.save_strategy, args.report_to = STEPS, "no", []
    name = sorted(candidates, key=lambda one: candidates[one].tokens / len(candidates[one].rows))[len(candidates) // 2]
    with tempfile.TemporaryDirectory(prefix="m2m-plan-") as folder:
        clock = Clock()
        try:
            settings = run.training_settings(args, run.model_args)
            record = train_expert(
                run.base.to_train(), candidates[name].rows, settings, Path(folder) / "measured", [clock], "plan"
            )
            memory = record["peak_memory_bytes"]
        except TrainingFailedError:
            pass  # of so few steps no wonder
        seconds = clock.per_step
    scored = sum(scoring_seconds(scorers["validation"], run) for scorers in run.scorers.values())
    apart = [
        f"target {name}: external or corpus-level scorer"
        for name, scorers in run.scorers.items()
        if not scorers["validation"].by_row
    ]
    if run.config.verify_top_k:
        apart.append(f"verify_top_k: the best {run.config.verify_top_k} mixtures and the baselines, fine-tuned")
    if run.config.bank and missing:
        where = run.config.bank if isinstance(run.config.bank, str) else ", ".join(run.config.bank.values())
        apart.append(f"{word} already in {where}; reused, not trained")
    last = final if run.config.train_final else 0
    return Estimate(len(missing), word, steps, last, mixtures, seconds, scored, memory, tuple(apart))


class Clock(TrainerCallback):
    """Times steps, but for the first, which does what is done once."""

    def __init__(self) -> None:
        self._ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._ends.append(time.monotonic())

    @property
    def per_step(self) -> float | None:
        """Seconds."""
        return (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1) if len(self._ends) > 1 else None


def scoring_seconds(scorer: Scorer, run: RunContext) -> float:
    """Seconds that a mixture takes on all rows of one target; 0 of scorers that run something else."""
    if not scorer.by_row:
        return 0.0
    rows = random.Random(0).sample(range(scorer.examples), min(ROWS, scorer.examples))
    stack = GatedStack(run.base.plain(), {})
    try:
        scorer.score(stack, [{}], run.tokens_per_batch, rows)  # which prepares what all mixtures share, such as images
        start = time.monotonic()
        scorer.score(stack, [{}], run.tokens_per_batch, rows)
    finally:
        stack.detach()
    return (time.monotonic() - start) * scorer.examples / len(rows)


def detectable_differences(scorers: Mapping[str, Scorer], metrics: Mapping[str, str]) -> list[str]:
    """What the validation sets can tell, of targets whose rows are right or wrong."""
    lines = []
    for name, scorer in scorers.items():
        if scorer.examples and metrics[name] in ("accuracy", "exact_match", "numeric_match"):
            least = 1.96 * math.sqrt(APART / scorer.examples)
            lines.append(
                f"{name}: with {scorer.examples:,} rows, mixtures that differ by less than about {least:.3f} in the share of "
                f"right answers cannot be told apart (95 %, if they answer {APART:.0%} of the rows differently); halving "
                "that difference takes four times the rows"
            )
    return lines


def show_estimate(run: RunContext) -> None:
    """Prints what `select` would do and about what it would cost, from a short measurement; writes nothing."""
    space, config = run.space, run.config
    strategy = config.strategy
    if strategy == "auto":
        strategy = choose_strategy(space, False, config.max_trials or 0)[0]
    if config.objective == "ensemble":
        mixtures = 1 + len(run.candidates)  # passes; the rest is arithmetic
    else:
        mixtures = planned_mixtures(STRATEGIES[strategy], space, len(run.candidates), Budget())
    found = estimate(run, int(min(mixtures, config.max_trials or math.inf)))
    metrics = {name: target.config.metric for name, target in run.targets.items()}
    for line in (*found.lines(), *detectable_differences(run.validation_scorers, metrics)):
        run.terminal.say(line)
    run.terminal.say("nothing was written", "dim")
