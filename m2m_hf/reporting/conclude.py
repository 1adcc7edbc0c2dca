"""What a search concludes: its analysis, and what a user should know before believing it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from m2m_hf.analysis.fidelity import VERDICTS
from m2m_hf.analysis.selection_bias import SelectionBias, selection_bias
from m2m_hf.analysis.shapley import ShapleyValues, shapley_values
from m2m_hf.core.mixture import Mixture
from m2m_hf.core.space import SearchSpace
from m2m_hf.core.trial import Standing
from m2m_hf.reporting.finished_run import FinishedRun
from m2m_hf.search.result import SearchResult, best_scored, score_of

DECIDED, LOPSIDED = 50, 0.4  # verdicts of a judge that are enough to see that it prefers a place: in 70 % of them
SIGNIFICANT = 1.645  # standard errors, of one-sided tests at 5 %


@dataclass(frozen=True)
class Analysis:
    """What takes long to compute of a search with very many trials."""

    best_single: Standing | None
    shapley: ShapleyValues | None
    selection_bias: SelectionBias | None
    joined: Mapping[str, Sequence[float]]  # candidate -> see `joining`
    worse: tuple[int, int] | None  # see `averages_badly`


def analyse(
    result: SearchResult, space: SearchSpace, usable: Sequence[str], fine_tuned: Sequence[Standing] = ()
) -> Analysis:
    """Shapley values and selection bias of a search.

    Of a verified choice only the bias among the `fine_tuned` mixtures is known (best first), not that of coming among these.
    """
    standings = result.standings
    best_single = best_scored(standings[Mixture.subset([name])] for name in usable)
    trained = {one.mixture: one for one in fine_tuned}
    against = {"base": result.base}
    for name, reference in {"all": standings[Mixture.subset(usable)], "best_single": best_single}.items():
        if reference is not None and (not trained or reference.mixture in trained):
            against[name] = trained.get(reference.mixture, reference)
    bias = selection_bias(
        fine_tuned or result.ranking,
        trained.get(result.best.mixture, result.best),
        {name: one for name, one in against.items() if one.complete},
        () if fine_tuned else others(result, space),
    )
    joined = {name: joining(standings, name) for name in usable}
    return Analysis(best_single, shapley_values(standings, usable), bias, joined, averages_badly(standings))


def others(result: SearchResult, space: SearchSpace) -> list[float] | None:
    """Estimated scores of mixtures that might have been chosen and left a race; None where most are not known at all."""
    standings = [one for one in result.standings.values() if one.mixture in space]
    if result.trials[0].objective == "ensemble" and not space.at_most(len(standings)):
        return None  # only the best thousand were kept
    return [one.estimate for one in standings if one.pruned and one.estimate is not None]


def joining(standings: Mapping[Mixture, Standing], name: str) -> list[float]:
    """By how much the score changes when `name` joins a mixture, for every mixture that was scored with and without it."""
    changes = []
    for mixture, standing in standings.items():
        if mixture.items and name not in mixture.names:
            joined = standings.get(Mixture.subset([*mixture.names, name]))
            if joined is not None and joined.complete and standing.complete:
                changes.append(score_of(joined).value - score_of(standing).value)
    return changes


Warnings = Iterator[tuple[str, str]]  # code, text


def find_warnings(run: FinishedRun, analysis: Analysis, overlap: Mapping[tuple[str, str], int], ended: str) -> Warnings:
    """Everything that a user should know before believing the result, the gravest first.

    `overlap`: (candidate, target) -> rows of the target that the candidate contains; `ended`: see `SearchResult`.
    """
    yield from against_base(run)
    yield from about_candidates(run, analysis.joined)
    for (name, target), rows in overlap.items():
        if rows:
            yield "overlap", f"overlap: {name} contains {rows} rows of {target}, which inflates its score"
    if (worse := analysis.worse) and run.objective != "trained":
        yield (
            "averages_badly",
            f"the {run.expert}s average badly: {worse[0]} of {worse[1]} mixtures score below the mean of their parts, as after "
            "training for too long or at too high a learning rate; merged scores then say little about trained mixtures",
        )
    yield from about_relations(run)
    yield from about_rows(run)
    yield from about_judges(run)
    yield from about_fine_tuning(run)
    if ended == "budget":
        yield ended, "the budget ended the search before the strategy did; with a larger one it continues"
    if ended == "callback":
        yield ended, "a callback stopped the search before the strategy ended; without it, it continues"


def against_base(run: FinishedRun) -> Warnings:
    """Whether the chosen mixture is better than the base model."""
    if run.base is not None and run.choice.value <= run.base.score:
        best = run.choice.value if run.verified else run.top[0].score
        text = "the chosen mixture does not score above the base model"
        if best <= run.base.score:
            how = "fine-tuned, " if run.verified else ""
            text = f"negative transfer: {how}no mixture that may be chosen scores above the base model"
        yield "negative_transfer", text
        return
    gain = run.selection_bias.differences.get("base") if run.selection_bias else None
    if gain is not None and gain.low <= 0:
        shown = f"{gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"
        yield "not_above_base", f"the rows cannot tell the chosen mixture from the base model: {shown}, bias-corrected"


def about_candidates(run: FinishedRun, joined: Mapping[str, Sequence[float]]) -> Warnings:
    """Candidates that lower scores, that have no expert, or whose expert was trained elsewhere."""
    for name, changes in joined.items():
        lowered = sum(change < 0 for change in changes)
        if len(changes) > 2 and lowered > len(changes) / 2 and sum(changes) < 0:
            mean = -sum(changes) / len(changes)
            yield (
                "harmful",
                f"harmful: {name} lowers {lowered} of the {len(changes)} mixtures that it joins, by {mean:.3f} on average",
            )
    for name, one in run.training.items():
        if one.failed is not None:
            yield "no_adapter", f"{name} is in no mixture: the training of its {run.expert} failed: {one.failed}"
        if one.stale is not None:
            apart = "all mixtures are fine-tuned on the rows as they are now"
            if run.objective != "trained":
                apart = (
                    f"mixtures with it are scored by the rows that its {run.expert} was trained on, while the final model and "
                    "fine-tuned mixtures are trained on the rows as they are now: their scores compare different rows"
                )
            yield "stale", f"stale: {name} has changed since its {run.expert} was trained ({one.stale}): {apart}"
    taken = [name for name, one in run.training.items() if one.unknown]
    if taken and run.objective != "trained":
        yield (
            "trained_elsewhere",
            f"how the {run.expert}s of {', '.join(taken)} were trained is not known: averages are fair only if all were trained "
            "alike, from this base model and on these rows",
        )


def about_relations(run: FinishedRun) -> Warnings:
    """Near copies, and experts that were trained for too long."""
    sizes = {name: (one.stale or one).rows for name, one in run.training.items()}
    copies = []
    for one in run.relations.near_copies(sizes):
        shared = f"{one.shared_rows:,} of {min(sizes[name] for name in one.pair):,} rows shared"
        copies.append(f"{' and '.join(one.pair)} ({shared}, cosine of the {run.expert}s {one.cosine:.2f})")
    if copies:
        yield (
            "near_copies",
            f"near copies: {first_of(copies)}; together they count twice in a mixture, so keep one or make them one candidate",
        )
    found = [f"{name} (by {one.over_whole.value:.3f})" for name, one in run.relations.over_trained().items()]
    if found and run.objective != "trained":
        yield (
            "over_trained",
            f"over-trained: the targets' right answers are likelier with half of the {run.expert} than with all of it: "
            f"{first_of(found)}; train fewer epochs, or at a lower learning_rate",
        )


def first_of(words: Sequence[str], most: int = 6) -> str:
    """Words behind each other; of many the first."""
    more = len(words) - most
    return ", ".join(words[:most]) + (f" and {more} more (summary.json)" if more > 0 else "")


def about_rows(run: FinishedRun) -> Warnings:
    """Whether there are rows enough to tell mixtures apart."""
    bias = run.selection_bias
    if bias and bias.tied > 1:
        more = ""
        if bias.rows_needed is not None and bias.rows_needed > 1:
            trials = run.standings[run.best.mixture].trials.values()
            rows = sum(len(trial.score.values) for trial in trials if trial.score)
            needed = rounded(rows * bias.rows_needed)
            more = f"; to tell it from the second best would take about {needed} rows, not {rows:,}"
        yield "few_rows", f"the rows cannot tell {bias.tied} mixtures apart, the chosen one among them{more}"
    elif run.choice.stderr is None:
        yield "no_stderr", "the scorer gives no standard error, so chance differences cannot be told from real ones"


def about_judges(run: FinishedRun) -> Warnings:
    """Judges that give no verdict, or prefer an answer for its place."""
    for name, target in run.targets.items():
        if (said := target.judged) is None:
            continue
        if said.none:
            yield (
                "no_verdict",
                f"target {name}: {said.none:,} of {said.verdicts:,} answers of the judge hold no verdict, and count as ties",
            )
        decided = said.first + said.second
        if decided >= DECIDED and abs(said.first - said.second) > LOPSIDED * decided:
            place = "first" if said.first > said.second else "second"
            share = max(said.first, said.second) / decided
            yield (
                "position_bias",
                f"target {name}: the judge prefers the {place} answer in {share:.0%} of its decisions; as both orders are asked, "
                "this makes ties of what it cannot tell apart, and scores lie nearer to 0.5",
            )


def about_fine_tuning(run: FinishedRun) -> Warnings:
    """What fine-tuned mixtures say against the search."""
    kind = run.objective if run.objective in ("ensemble", "trained") else "merged"
    judged = run.fidelity.verdict.get(kind) if run.fidelity else None  # there is none of trained ones
    if judged and judged.verdict in ("distrust", "prune"):
        yield "fidelity", f"fidelity of {kind} scores here: {VERDICTS[judged.verdict]}, since {judged.why}"
    if run.verified is None:
        if run.objective != "trained" and len(run.usable) > 1:
            yield (
                "not_fine_tuned",
                "chosen by averages alone: in the selection study such a choice loses 0.27 of what the best mixture is better "
                "than the median one, and after three fine-tunes 0.10 (fine_tunes: 3)",
            )
        return
    best, by_search = run.best.mixture, run.verified.by_search
    if by_search != best:
        yield "overruled", f"fine-tuned, {best} scores higher than {by_search}, the choice of the search"
    stratified = (run.verified.baselines or {}).get("stratified")
    over = stratified.validation.over_chosen if stratified and stratified.validation else None
    if over and over.value > SIGNIFICANT * (over.stderr or 0.0):
        yield (
            "stratified",
            f"fine-tuned on equally many rows of every candidate it scores {over.value:.3f} higher than the chosen mixture",
        )
    for one in run.verified.failed:
        yield "failed", f"{one.mixture} could not be fine-tuned and scored: {one.reason}"


def rounded(value: float) -> str:
    """A number of rows to two significant digits."""
    digits = len(str(int(value))) - 2
    return f"{round(value, -max(digits, 0)):,.0f}"


def averages_badly(standings: Mapping[Mixture, Standing]) -> tuple[int, int] | None:
    """(mixtures worse than their parts are on average, mixtures of two or more), where that holds for three quarters of them.

    Compared by the log-probability of the right answers where there is one, which moves where a metric does not. Losses are
    nearly convex along the line between models that share most of their training, so averages of good adapters do better than
    the parts on average (Wortsman et al., Model soups, 2022).
    """
    worse = several = 0
    for mixture, standing in standings.items():
        parts = [one for name in mixture.names if (one := standings.get(Mixture.subset([name])))]
        known = [one for one in (standing, *parts) if one.complete]
        if len(mixture) < 2 or len(known) <= len(mixture):
            continue
        likely = all(trial.score and trial.score.logprobs for one in known for trial in one.trials.values())
        whole, *values = [one.mean_logprob if likely else score_of(one).value for one in known]
        several += 1
        worse += whole < sum(w * v for w, v in zip(mixture.weights.values(), values, strict=True))
    return (worse, several) if several > 2 and worse >= 0.75 * several else None
