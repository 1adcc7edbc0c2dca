"""`m2m select --dry_run`: what a run would do, and about what it would cost, from a short measurement; nothing is kept."""

import copy
import math
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from m2m_hf.console import duration
from m2m_hf.core.mixture import Mixture, row_counts
from m2m_hf.merging.gated_stack import GatedStack
from m2m_hf.run.context import RunContext
from m2m_hf.scoring.judge import JudgeScorer
from m2m_hf.scoring.scorers import Scorer
from m2m_hf.search.loop import planned_mixtures
from m2m_hf.search.model_based import ENUMERABLE, STRATEGIES
from m2m_hf.search.result import Budget
from m2m_hf.training.fine_tune import mixture_steps, planned_steps, train_expert
from m2m_hf.training.jobs import beyond_rows, group_size, is_alone, steps_left

STEPS = 3  # of a training that is measured, the first of which is left out
ROWS = 64  # that are scored to measure
APART = 0.2  # share of rows that two mixtures are taken to answer differently


def show_estimate(run: RunContext) -> None:
    """Prints what `select` would do and about what it would cost; writes nothing."""
    for line in (*estimate(run), *detectable_differences(run)):
        run.terminal.say(line)
    run.terminal.say("nothing was written", "dim")


def estimate(run: RunContext) -> list[str]:
    """Measures a few training steps and a few scored rows, and says what all of them would take."""
    config, candidates, scorers = run.config, run.candidates, run.validation_scorers
    missing, noun = run.bank.check(), run.bank.noun()
    every = [
        planned_steps(run.candidate_settings(name)[0], candidates[name].trained_rows, candidates[name].tokens)
        for name in missing
    ]
    experts = [(run.bank.folder / name, run.bank.identity(name), of) for name, of in zip(missing, every, strict=True)]
    steps = sum(steps_left(experts, config.parallel))
    rows, tokens = sum(one.trained_rows for one in candidates.values()), sum(one.tokens for one in candidates.values())
    final_steps = planned_steps(run.final_settings[0], rows, tokens) if config.train_final else 0
    per_step, memory = measure_training(run)
    per_mixture = sum(scoring_seconds(scorer, run) for scorer in scorers.values())
    mixtures = count_mixtures(run)

    settings = run.training_settings()
    base = run.base.to_train()
    several = (
        not (is_alone(settings) or beyond_rows(base, settings)) and group_size(base, settings, config.parallel) > 1
    )
    less = " of one; several together take less" if several else ""

    def training_time(steps: int, models: int) -> str:
        if per_step is None:
            return "time unknown: the short training failed"
        return f"about {duration(steps * per_step)} ({per_step:.2f} s a step{less * (models > 1)})"

    trained = config.objective == "trained"
    fine_tunes = fine_tuning_steps(run, mixtures - 1 if trained else run.fine_tunes, not missing)
    if (trained or run.fine_tunes) and not config.final:
        final_steps = 0  # the chosen one is there
    lines = [f"{noun}: all trained"]
    if missing:
        lines = [f"{noun}: {len(missing)} to train, {steps:,} steps, {training_time(steps, len(missing))}"]
    lines.append(
        f"search: up to {mixtures:,} mixtures, about {duration(mixtures * per_mixture)} ({per_mixture:.2f} s each"
        + ("), once they are fine-tuned" if trained else ", unless a race ends it early)")
    )
    if trained and not fine_tunes:
        lines.append("fine-tuning: all mixtures are fine-tuned")
    elif fine_tunes:
        lines.append(
            f"fine-tuning: up to {len(fine_tunes):,} mixture{'s' * (len(fine_tunes) > 1)}, {sum(fine_tunes):,} steps, "
            + training_time(sum(fine_tunes), len(fine_tunes))
        )
    final = f"final fine-tune: up to {final_steps:,} steps, {training_time(final_steps, 1)}"
    among = (trained or run.fine_tunes) and config.train_final
    none = "the final model is one of them" if among else "no final fine-tune"
    lines.append(final if final_steps else none)
    lines.append(f"peak memory while measuring: {memory / 2**30:.1f} GiB")
    lines += judge_requests(run, mixtures)
    for name, scorer in scorers.items():
        if not scorer.by_row:
            lines.append(f"not counted: target {name}: external or corpus-level scorer")
    if config.bank and missing:
        where = config.bank if isinstance(config.bank, str) else ", ".join(config.bank.values())
        lines.append(f"not counted: {noun} already in {where}; reused, not trained")
    together = (steps + sum(fine_tunes) + final_steps) * (per_step or 0.0) + mixtures * per_mixture
    return [*lines, f"together about {duration(together)}"]


def judge_requests(run: RunContext, mixtures: int) -> list[str]:
    """How many requests judges would be sent; nothing is sent to tell."""
    lines, models = [], run.config.train_final + run.fine_tunes
    for name, parts in run.scorers.items():
        if not isinstance(scorer := parts["validation"], JudgeScorer):
            continue
        rows = (mixtures - 1 + models) * scorer.examples  # the base model is not compared with itself
        rows += models * parts["test"].examples if "test" in parts and run.config.train_final else 0
        limit, sent = scorer.server.config.max_requests, scorer.server.log.requests
        line = (
            f"judge of {name}: up to about {2 * rows:,} requests, less for equal answers and what was asked before; at most "
            f"{limit:,} may be sent (max_requests), {sent:,} were"
        )
        lines.append(
            line + ("; at that limit the run stops, and goes on with a higher one" if 2 * rows > limit else "")
        )
    return lines


def count_mixtures(run: RunContext) -> int:
    """How many mixtures the search scores at most by forward passes; races end most of them early."""
    if run.config.objective == "ensemble":
        return 1 + len(run.candidates)  # the rest is arithmetic
    strategy, budget = STRATEGIES[run.choose_strategy()[0]], Budget(run.config.max_trials or math.inf)
    return planned_mixtures(strategy, run.space, len(run.candidates), budget)


def fine_tuning_steps(run: RunContext, most: int, begun: bool) -> list[int]:
    """The steps that a search by fine-tuned models makes for each mixture, the largest ones where it chooses them.

    What is trained already is left out, but for spaces that are too large to look for it; `begun`: some may be.
    """
    rows = {name: len(candidate.rows) for name, candidate in run.candidates.items()}
    mixtures = [Mixture.subset(rows)] * most
    if run.space.at_most(ENUMERABLE):
        first = (*(Mixture.subset([name]) for name in rows), Mixture.subset(rows))
        mixtures = list(dict.fromkeys((*first, *run.space.subsets())))
    counts = [row_counts(mixture, rows) for mixture in mixtures]
    steps = [mixture_steps(run.args, run.candidates, one) for one in counts]
    if begun and run.space.at_most(ENUMERABLE):
        folders = map(run.fine_tuned.folder, counts)
        models = [(folder, folder.name, of) for folder, of in zip(folders, steps, strict=True)]
        steps = steps_left(models, run.config.parallel)
    return sorted(filter(None, steps), reverse=True)[: max(0, most - steps.count(0))]


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


def measure_training(run: RunContext) -> tuple[float | None, int]:
    """(seconds that a step takes, or None if the training failed; bytes at the highest), on a middling candidate."""
    rows = {name: candidate.tokens / len(candidate.rows) for name, candidate in run.candidates.items()}
    name = sorted(rows, key=rows.__getitem__)[len(rows) // 2]
    args = copy.deepcopy(run.args)
    args.max_steps, args.save_strategy, args.report_to = STEPS, "no", []
    clock = Clock()
    with tempfile.TemporaryDirectory(prefix="m2m-plan-") as folder:
        base, settings = run.base.to_train(), run.training_settings(args)
        record = train_expert(base, run.candidates[name].rows, settings, Path(folder) / "measured", [clock], "plan")
    return clock.per_step, record.get("peak_memory_bytes", 0)  # none if it failed: of so few steps no wonder


def scoring_seconds(scorer: Scorer, run: RunContext) -> float:
    """Seconds that a mixture takes on all rows of one target; 0 of scorers that run something else."""
    if not scorer.by_row:
        return 0.0
    rows = random.Random(0).sample(range(scorer.examples), min(ROWS, scorer.examples))
    stack = GatedStack(run.base.plain(), {})
    try:
        scorer.rehearse(stack, run.tokens_per_batch, rows)  # which prepares what all mixtures share, such as images
        start = time.monotonic()
        scorer.rehearse(stack, run.tokens_per_batch, rows)
    finally:
        stack.detach()
    return (time.monotonic() - start) * scorer.examples / len(rows)


def detectable_differences(run: RunContext) -> list[str]:
    """What the validation sets can tell, of targets whose rows are right or wrong."""
    lines = []
    for name, scorer in run.validation_scorers.items():
        metric = run.targets[name].config.metric
        if scorer.examples and metric in ("accuracy", "exact_match", "numeric_match", "instructions"):
            least = 1.96 * math.sqrt(APART / scorer.examples)
            lines.append(
                f"{name}: with {scorer.examples:,} rows, mixtures that differ by less than about {least:.3f} in the share of "
                f"right answers cannot be told apart (95 %, if they answer {APART:.0%} of the rows differently); halving "
                "that difference takes four times the rows"
            )
    return lines
