"""What a run ends with on the terminal: tables, and the lines under them."""

from collections.abc import Iterator, Mapping, Sequence

from m2m_hf.analysis.fidelity import LARGER, VERDICTS
from m2m_hf.analysis.study_report import Baseline, BaselineScore, Figures, Resilience, StudyReport, Verification
from m2m_hf.console import duration
from m2m_hf.core.jsonable import Measurement
from m2m_hf.core.trial import Standing
from m2m_hf.reporting.conclude import SIGNIFICANT
from m2m_hf.reporting.finished_run import FinishedRun, MixtureScore

Table = tuple[str, list[str], list[list[str]]]  # title, columns, rows
INTERVAL = 1.96  # standard errors


def with_error(value: float | None, stderr: float | None = None) -> str:
    """`0.842 ± 0.033`; empty without a value."""
    if value is None:
        return ""
    return f"{value:.3f}" + ("" if stderr is None else f" ± {stderr:.3f}")


def figure(found: Measurement | None) -> str:
    return with_error(found.value, found.stderr) if found else ""


def score_figure(found: MixtureScore | Figures | BaselineScore | None) -> str:
    return with_error(found.score, found.stderr) if found else ""


def signed(found: Measurement | None) -> str:
    """`+0.012 ± 0.004`; empty where nothing is known."""
    if found is None:
        return ""
    return f"{found.value:+.3f}" + ("" if found.stderr is None else f" ± {found.stderr:.3f}")


def interval(value: float, stderr: float | None) -> str:
    """`0.777 to 0.907`: 95 %."""
    return "" if stderr is None else f"{value - INTERVAL * stderr:.3f} to {value + INTERVAL * stderr:.3f}"


def number(value: float | None, digits: int = 2) -> str:
    """A dash where it is not known, or no number."""
    return "–" if value is None or value != value else f"{value:.{digits}f}"


def span(ends: Sequence[float] | None) -> str:
    """`[0.40, 0.95]`; a dash where it is not known."""
    return "–" if ends is None else f"[{ends[0]:.2f}, {ends[1]:.2f}]"


def end_table(run: FinishedRun) -> Table:
    """A column for each target, and one for their mean where there are several; of a single target one for the sealed test."""
    several = len(run.targets) > 1
    targets = list(run.targets) if several else []
    test = not several and run.final_score("final", "test") is not None

    def row(label: str, shown: MixtureScore | None, *more: str) -> list[str]:
        cells = [score_figure(shown), *(figure(run.on_target(shown, name) if shown else None) for name in targets)]
        return [label, *(cell or "failed" for cell in cells), *[""] * test, *more]

    def final_row(model: str, part: str) -> list[str]:
        return [figure(run.final_score(model, part, name)) for name in (None, *targets)]

    rows = [row("base model", run.base)]
    for name, one in run.training.items():
        gain = signed(run.shapley.shapley.get(name)) if run.shapley else ""
        label = f"{name}, stale" if one.stale else name
        rows.append(row(label, run.singles.get(name), gain, f"{one.steps:,}", duration(one.seconds)))
    rows.append(row(f"all {len(run.usable)}, {run.scored_as}", run.all))
    rows.append(row(f"{run.best.mixture}, {run.scored_as}", run.best))
    if run.final is not None:
        cost = ["", f"{run.final.steps:,}", duration(run.costs.final_seconds or 0)]
        sealed = final_row("final", "test") if test else []
        rows.append(["final model", *final_row("final", "validation"), *sealed, *cost])
        if test:
            (rows[0][2],) = final_row("base", "test")
        elif several and any(final_row("final", "test")):
            rows.append(["base model, sealed test", *final_row("base", "test")])
            rows.append(["final model, sealed test", *final_row("final", "test")])
    if several:
        title = "weighted mean and every target, validation ± standard error"
        columns = ["mean", *(f"{name} ({one.label})" for name, one in run.targets.items())]
    else:
        (title,) = (f"{name}: {one.label} ± standard error" for name, one in run.targets.items())
        columns = ["validation", *["test"] * test]
    return title, ["", *columns, "Shapley value", "steps", "time"], rows


def remarks(run: FinishedRun) -> Iterator[str]:
    """The lines under the end table: what was chosen, what to beware of, what the figures mean and what they cost."""
    yield ""
    yield f"chosen: {run.best.mixture}" + (f"; left out: {', '.join(run.left_out)}" if run.left_out else "")
    yield from about_expectation(run)
    yield from about_selection_bias(run)
    yield from (one.text for one in run.warnings)
    yield from about_search(run)
    yield from explanations(run)
    yield cost_line(run)


def about_expectation(run: FinishedRun) -> Iterator[str]:
    """How far the choice may be from the best mixture, and whether more fine-tunes would pay."""
    if run.verified is None:
        return
    found = run.verified.expectation
    most, half, noise = (number(value, 3) for value in (found.behind["0.9"], found.behind["0.5"], found.training_noise))
    yield (
        f"90 % sure: no mixture is better by more than {most} (50 %: {half}); within one training's noise (about {noise}) of the "
        f"best: {100 * found.within_noise:.0f} %"
    )
    if found.next:
        yield f"one more fine-tune, of {found.next.mixture}, would find a better one with {100 * found.next.probability:.0f} %"


def about_selection_bias(run: FinishedRun) -> Iterator[str]:
    """How sure the choice is."""
    bias = run.selection_bias
    if bias is None:
        return
    how, among = ("fine-tuned, ", "those fine-tuned") if run.verified else ("", "the mixtures looked at")
    line = f"{how}bias-corrected score {bias.corrected:.3f} ({-bias.optimism:+z.3f} for selection bias)"
    if bias.probability_best is not None:
        line += f"; the best of {among} with a probability of {bias.probability_best:.2f}"
    yield line
    words = {"base": "base model", "all": "all together", "best_single": "best single"}
    gains = [
        f"{words[name]} {one.value:+.3f} [{one.low:+.3f}, {one.high:+.3f}]"
        for name, one in bias.differences.items()
        if name in words
    ]
    if gains:
        yield f"gain over (paired 95 % CI, bias-corrected): {'; '.join(gains)}"


def about_search(run: FinishedRun) -> Iterator[str]:
    """What of the search is not in the table."""
    for name, target in run.targets.items():
        if target.short:
            yield (
                f"{target.short} mixtures could not be chosen: they make {name} worse than the base model by more than "
                f"{target.min_delta:g} (min_delta)"
            )
    if len(run.targets) > 1:
        front = len(run.pareto_front)
        yield f"{front} mixtures are on the Pareto front of the {len(run.targets)} targets; summary.json lists them"
    pruned = [one for one in run.standings.values() if one.pruned]
    if pruned:
        tied = sum(may_win(one, run.best.score) for one in pruned)
        found = f"{tied} of them may be as good as the chosen one" if tied else "none is close to the chosen one"
        yield f"{len(pruned)} mixtures were pruned before all rows were scored; {found}"
    if run.counts.failed:
        trials = [trial for one in run.standings.values() for trial in one.trials.values()]
        reason = next((trial.reason for trial in trials if trial.state == "failed"), "see trials.jsonl")
        yield f"{run.counts.failed} trials failed; their mixtures cannot be chosen. The first: {reason}"


def may_win(pruned: Standing, best: float) -> bool:
    """True unless a mixture that left a race lies below the best by more than chance on the rows that it was shown."""
    if pruned.estimate is None or pruned.score is None:
        return False
    return pruned.estimate >= best - SIGNIFICANT * (pruned.score.stderr or 0.0)


def stand_in(run: FinishedRun) -> str:
    """What was scored in place of a model trained on a mixture."""
    words = {
        "merged": f"the exact average of the {run.expert}s",
        "ensemble": f"the average of the {run.expert}s' probabilities",
    }
    return words.get(run.objective, f"the {run.expert}s by {run.objective}")


def explanations(run: FinishedRun) -> Iterator[str]:
    """What the words of the table mean."""
    if run.shapley:
        how = "" if run.shapley.exact else ", estimated from the mixtures scored"
        yield f"Shapley value: a candidate's mean marginal gain over all orders{how}; the first to join gains most"
    if run.objective == "trained":
        yield "trained: a model fine-tuned on the mixture; errors are over rows, and leave out the noise of training"
    else:
        yield f"merged: {stand_in(run)}, not trained"
    steps, epochs = run.config.get("max_steps", -1), run.config.get("num_train_epochs", 3.0)
    if overrides := run.config.get("final"):
        how = f"as final: says ({', '.join(f'{key}: {value}' for key, value in overrides.items())})"
    elif steps > 0:
        how = f"for the same {steps} steps"
    else:
        how = f"for the same {epochs:g} epoch{'' if epochs == 1 else 's'}, so steps in proportion to its rows"
    yield f"final model: {'' if run.final else 'to be '}fine-tuned on the chosen mixture, {how}"


def cost_line(run: FinishedRun) -> str:
    parts = [
        f"{run.expert}s {duration(run.costs.train_seconds)}",
        f"{len(run.standings)} mixtures scored in {duration(run.costs.search_seconds)}",
    ]
    if run.costs.compare_seconds:
        parts.append(f"mixtures fine-tuned {duration(run.costs.compare_seconds)}")
    if run.costs.final_seconds:
        parts.append(f"final model {duration(run.costs.final_seconds)}")
    if asked := sum(one.judged.requests for one in run.targets.values() if one.judged):
        parts.append(f"{asked:,} requests to judges")
    return f"cost: {', '.join(parts)}"


def fidelity_tables(study: StudyReport) -> list[Table]:
    """The correlations of a study, a table for every measure."""
    tables: list[Table] = []
    measures = dict.fromkeys(measure.removesuffix(LARGER) for of in study.agreement.values() for measure in of)
    for measure in measures:
        parts = {
            name + (", 2 or more" if suffix else ""): of[measure + suffix]
            for name, of in study.agreement.items()
            for suffix in ("", LARGER)
            if measure + suffix in of
        }
        several = list(parts.values())
        rows = [["mixtures", *(str(one.mixtures) for one in several)]]
        for key in ("pearson", "spearman", "kendall"):
            estimates = [getattr(one, key) for one in several]
            rows.append([key.title(), *(number(one.value) for one in estimates)])
            rows.append(["  95 % CI over rows", *(span(one.row_ci) for one in estimates)])
            rows.append(["  95 % CI over candidates", *(span(one.candidate_ci) for one in estimates)])
        rows.append(["Pearson across halves of the rows", *(number(one.halves) for one in several)])
        for k in (1, 3, 5):
            if all(k in one.recall for one in several):
                rows.append([f"share of the best {k} found", *(number(one.recall[k].value) for one in several)])
        rows.append(["regret of its choice", *(number(one.regret.value, 3) for one in several)])
        rows.append(["  of a random choice", *(number(one.random_regret, 3) for one in several)])
        tables.append((f"{measure}: predicted against fine-tuned", ["", *parts], rows))
    return tables


BASELINES = {
    "base": "base model",
    "chosen": "chosen",
    "all": "all candidates",
    "best_single": "best single",
    "similarity": "most similar",
    "stratified": "equally many rows of each",
    "oracle": "best of all fine-tuned",
}


def baselines_table(baselines: Mapping[str, Baseline]) -> Table:
    """What ways of choosing come to."""
    rows = []
    for name, one in baselines.items():
        label = BASELINES.get(name, name.replace("_", " "))
        label += f" ({' + '.join(one.mixture.names)})" if name not in ("base", "all", "stratified") else ""
        cells = []
        for part in (one.validation, one.test):
            cells += [score_figure(part), signed(part.over_chosen) if part and name != "chosen" else ""]
        rows.append([label, f"{one.rows:,}", f"{one.steps:,}", *cells])
    columns = ["", "rows", "steps", "validation", "over chosen", "sealed test", "over chosen"]
    return "ways of choosing, all fine-tuned alike ± standard error (of the paired difference)", columns, rows


def fidelity_remarks(study: StudyReport) -> Iterator[str]:
    """The lines under the tables: the verdicts, and what else was seen."""
    for name, one in study.verdict.items():
        yield f"{name}: {VERDICTS[one.verdict]}, since {one.why}"
    if study.training_noise is not None:
        noise = f"{study.training_noise:.3f} (root mean square over the singles)"
        yield f"training noise: two trainings on the same rows in another order differ by {noise}"
    if study.stale:
        apart = sum(not set(one.mixture.names).isdisjoint(study.stale) for one in study.mixtures)
        yield (
            f"stale: {', '.join(study.stale)}; of {apart} of the {len(study.mixtures)} mixtures different rows are compared, as "
            "only what is fine-tuned is trained on the rows as they are now"
        )
    for name, measures in study.resilience.items():
        for measure, found in measures.items():
            if found.hurt:
                yield resilience_line(name, measure, found)
    for failed in study.failed:
        yield f"left out: {failed.mixture} could not be fine-tuned and scored: {failed.reason}"


def resilience_line(name: str, measure: str, one: Resilience) -> str:
    line = (
        f"mixtures that hurt, by {measure}: {one.hurt} of {one.mixtures}; {name} is below the base model too for {one.noticed} "
        "of them"
    )
    if one.shielded:
        line += (
            f"; picked and measured on different rows, fine-tuned {one.trained:+.3f}, {name} {one.surrogate:+.3f}, higher by "
            f"{figure(one.shielded)}"
        )
    return line


def verified_table(verified: Verification) -> Table:
    """What was fine-tuned before choosing, best first."""
    rows = []
    for one in sorted(verified.mixtures, key=lambda one: -(one.trained.score or 0.0)):
        scores = [with_error(part.score, part.stderr) or "failed" for part in (one.trained, one.merged)]
        rows.append([str(one.mixture), *scores, f"{one.steps:,}"])
    return "fine-tuned before choosing, validation ± standard error", ["", "fine-tuned", "merged", "steps"], rows
