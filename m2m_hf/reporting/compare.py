"""`m2m compare`: two runs side by side, from their files alone: what was asked differently, and what came of it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m2m_hf.console import Terminal, duration
from m2m_hf.core.mixture import Mixture
from m2m_hf.core.trial import Standing
from m2m_hf.reporting.finished_run import FinishedRun
from m2m_hf.reporting.tables import score_figure, signed, with_error
from m2m_hf.search.result import score_of

MOST = 10  # lines of a list


def compare(out: Path, other: Path, terminal: Terminal) -> None:
    """Prints two runs side by side."""
    first, second = FinishedRun.from_pretrained(out), FinishedRun.from_pretrained(other)
    names = [path.absolute().name for path in (out, other)]
    if names[0] == names[1]:
        names = [os.path.relpath(path) for path in (out, other)]
    if settings := differences(first, second):
        rows = [[shorten(cell) for cell in row] for row in settings[:MOST]]
        terminal.table("different settings", ["", *names], rows)
        if len(settings) > MOST:
            terminal.say(f"and {len(settings) - MOST} more fields: see both config.yaml")
        terminal.say("")
    terminal.table("results", ["", *names], outcomes(first, second))
    terminal.say("")
    for line in remarks(first, second):
        terminal.say(line)


def shorten(text: str, most: int = 48) -> str:
    """`text`, without its middle if it is long."""
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-most // 2 :]}"


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    if isinstance(value, Mapping) and value:
        return {k: v for key, one in value.items() for k, v in flat(one, f"{name}.{key}" if name else str(key)).items()}
    return {name: value}


def differences(first: FinishedRun, second: FinishedRun) -> list[list[str]]:
    """Fields of the configuration, and what they are in either run."""
    configs = [flat(run.config) for run in (first, second)]
    ignored = {"output_dir", *same_content(first, second)}
    keys = [key for key in dict.fromkeys(key for one in configs for key in one) if key not in ignored]
    return [
        [key, *(str(one.get(key, "")) for one in configs)] for key in keys if configs[0].get(key) != configs[1].get(key)
    ]


def results(run: FinishedRun) -> dict[str, str]:
    """What came of a run."""
    return {
        "chosen": str(run.best.mixture),
        "its score": score_figure(run.best),
        "base model": score_figure(run.base),
        "all together": score_figure(run.all),
        "best single": score_figure(run.best_single),
        "final model, validation": with_error(run.final.validation if run.final else None),
        "final model, test": with_error(run.final.test if run.final else None),
        "trials": f"{run.counts.trials:,}",
        "failed": f"{run.counts.failed:,}",
        "time: training the adapters": duration(run.costs.train_seconds),
        "time: scoring": duration(run.costs.search_seconds),
        "time: fine-tuning mixtures": duration(spent) if (spent := run.costs.compare_seconds) else "",
        "time: final model": duration(run.costs.final_seconds or 0),
    }


def outcomes(first: FinishedRun, second: FinishedRun) -> list[list[str]]:
    """What, and what it is in either run, where it is known of one."""
    theirs = results(second)
    return [[name, cell, theirs[name]] for name, cell in results(first).items() if cell or theirs[name]]


def same_content(first: FinishedRun, second: FinishedRun) -> list[str]:
    """Fields whose content is the same in both, as the fingerprints tell, although it may lie in another place."""
    fields = []
    for name in first.training.keys() & second.training.keys():
        ours, theirs = first.training[name], second.training[name]
        if (ours.stale or ours).data == (theirs.stale or theirs).data:
            fields.append(f"candidates.{name}.data_files")
        if ours.uniform["base_model"] == theirs.uniform["base_model"]:
            fields.append("model_name_or_path")
    same = scorers(first).items() & scorers(second).items()
    return [*fields, *(f"targets.{name}.data.data_files" for name, _ in same)]


def scorers(run: FinishedRun) -> dict[str, str]:
    """Target -> fingerprint of its rows, scorer and metric."""
    return {name: one.fingerprints["scorer"] for name, one in run.targets.items()}


def remarks(first: FinishedRun, second: FinishedRun) -> list[str]:
    """How far both agree on the mixtures that both have scored.

    Scores are compared only where both were measured on the same rows with the same scorer, as the fingerprints tell; mixtures
    by the names of their candidates.
    """
    ours, theirs = scorers(first), scorers(second)
    if ours != theirs:
        apart = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
        return [f"scores are not comparable: the rows or the metric of {', '.join(apart)} differ"]
    kinds = [
        (run.objective, run.config.get("merge_method"), {name: one.weight for name, one in run.targets.items()})
        for run in (first, second)
    ]
    if kinds[0] != kinds[1]:
        return ["scores are not comparable: objective, merge_method or the targets' weights differ"]
    scored = [{one.mixture: one for one in run.scored} for run in (first, second)]
    lines = common_mixtures(*scored)
    if first.best.mixture == second.best.mixture:
        return [*lines, "both chose the same mixture"]
    ours_best, theirs_best = first.best.mixture, second.best.mixture
    for known, name, best, other, rival in (
        (scored[0], "first", ours_best, "second", theirs_best),
        (scored[1], "second", theirs_best, "first", ours_best),
    ):
        if best in known and rival in known:
            gain = signed(known[best].over(known[rival]))
            lines.append(f"by the scores of the {name} its choice is {gain} over the {other}'s, on the same rows")
    return lines


def common_mixtures(first: Mapping[Mixture, Standing], second: Mapping[Mixture, Standing]) -> list[str]:
    """How many mixtures both have scored, and how alike."""
    both = [mixture for mixture in first if mixture in second]
    lines = [f"{len(both)} mixtures were scored on all rows in both"]
    x, y = ([score_of(scored[mixture]).value for mixture in both] for scored in (first, second))
    if len(both) > 2:
        if len(set(x)) > 1 and len(set(y)) > 1:
            from scipy.stats import spearmanr

            lines[0] += f"; rank correlation {spearmanr(x, y).statistic:.2f} (Spearman)"
        far = max(range(len(both)), key=lambda number: abs(x[number] - y[number]))
        if x[far] != y[far]:
            lines.append(f"furthest apart: {both[far]}, {x[far]:.3f} in the first and {y[far]:.3f} in the second")
    return lines
