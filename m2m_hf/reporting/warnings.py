"""What a user should know before believing a result."""

from typing import TYPE_CHECKING

from m2m_hf.analysis.fidelity import VERDICTS
from m2m_hf.core.mixture import Mixture
from m2m_hf.core.trial import Standing
from m2m_hf.search.result import SearchResult, score_of

if TYPE_CHECKING:
    from m2m_hf.reporting.outcome import Outcome


def one_of_the_worse(pruned: Standing, best: Standing) -> bool:
    """Whether a mixture that left a race lies below the best by more than 1.645 standard errors of its own rung's examples."""
    if pruned.estimate is None or best.score is None:
        return True
    return pruned.estimate < best.score.value - 1.645 * (pruned.score.stderr or 0.0 if pruned.score else 0.0)


def joining(result: SearchResult, name: str) -> list[float]:
    """By how much the score changes when `name` joins a mixture, for every mixture that was scored with and without it."""
    changes = []
    for mixture, standing in result.standings.items():
        if mixture.items and name not in mixture.names:
            joined = result.standings.get(Mixture.subset([*mixture.names, name]))
            if joined is not None and joined.score and standing.score and joined.complete and standing.complete:
                changes.append(joined.score.value - standing.score.value)
    return changes


def cautions(outcome: "Outcome") -> list[tuple[str, str]]:
    """(code, text) of everything that a user should know before believing the result, the gravest first."""
    result, found = outcome.result, []
    choice, base = outcome.choice, result.base
    best = result.best
    sure = outcome.certainty
    how = "fine-tuned, " if outcome.fine_tuned else ""
    if base.score and score_of(choice).value <= base.score.value:
        top = list(outcome.fine_tuned) or result.ranking
        if score_of(top[0]).value <= base.score.value:
            text = f"negative transfer: {how}no mixture that may be chosen scores above the base model"
        else:
            text = "the chosen mixture does not score above the base model"
        found.append(("negative_transfer", text))
    elif sure and "base" in sure.differences and sure.differences["base"][1] <= 0:
        value, low, high = sure.differences["base"]
        told = f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"
        found.append(
            (
                "not_above_base",
                f"the chosen mixture cannot be told from the base model: {told}, the luck of the best of many taken off",
            )
        )
    for name in outcome.candidates:
        changes = joining(result, name)
        lowered = sum(change < 0 for change in changes)
        if len(changes) > 2 and lowered > len(changes) / 2 and sum(changes) < 0:
            found.append(
                (
                    "harmful",
                    f"harmful: {name} lowers {lowered} of the {len(changes)} mixtures that it joins, by "
                    f"{-sum(changes) / len(changes):.3f} on average",
                )
            )
    for name, record in outcome.training.items():
        if "failed" in record:
            text = f"{name} is in no mixture: the training of its {outcome.experts[:-1]} failed: {record['failed']}"
            found.append(("no_adapter", text))
    if taken := [name for name, record in outcome.training.items() if record.get("unknown")]:
        found.append(
            (
                "trained_elsewhere",
                f"how the {outcome.experts} of {', '.join(taken)} were trained is not known: averages mean something only "
                "if they were all trained alike, from this base model and on these rows",
            )
        )
    for (name, target), rows in outcome.overlap.items():
        if rows:
            found.append(
                (
                    "overlap",
                    f"overlap: {rows} rows of {target} stand in {name} too, which makes it look better than it is",
                )
            )
    if worse := averages_badly(result):
        found.append(
            (
                "averages_badly",
                f"the {outcome.experts} average badly: {worse[0]} of {worse[1]} mixtures are worse than their parts are on "
                f"average, as of {outcome.experts} that were trained for too long or with too high a learning rate; the scores "
                "of mixtures then say little of models trained on them",
            )
        )
    if sure and sure.tied > 1:
        more = ""
        if sure.rows_needed is not None and sure.rows_needed > 1:
            rows = sum(len(trial.score.values) for trial in choice.trials.values() if trial.score)
            more = f"; to tell it from the second best it would take about {rounded(rows * sure.rows_needed)} rows, not {rows:,}"
        found.append(("few_rows", f"the rows cannot tell {sure.tied} mixtures apart, the chosen one among them{more}"))
    elif score_of(choice).stderr is None:
        found.append(
            ("no_stderr", "the scorer gives no standard error, so nothing tells how much of the differences is chance")
        )
    kind = "ensemble" if next(iter(best.trials.values())).objective == "ensemble" else "merged"
    judged = (outcome.fidelity or {}).get("verdict", {}).get(kind)
    if judged and judged["verdict"] in ("distrust", "prune"):
        found.append(
            ("fidelity", f"fidelity of {kind} scores here: {VERDICTS[judged['verdict']]}, since {judged['why']}")
        )
    if outcome.verified and outcome.verified["by_search"] != best.mixture.weights:
        first = Mixture.of(outcome.verified["by_search"])
        found.append(("overruled", f"fine-tuned, {best.mixture} scores higher than {first}, the choice of the search"))
    stratified = (((outcome.verified or {}).get("baselines") or {}).get("stratified") or {}).get("validation")
    over = (stratified or {}).get("over_chosen")
    if over and over["value"] > 1.645 * (over["stderr"] or 0.0):
        found.append(
            (
                "stratified",
                f"fine-tuned on equally many rows of every candidate it scores higher than the chosen, by {over['value']:.3f}",
            )
        )
    for one in (outcome.verified or {}).get("failed", []):
        found.append(("failed", f"{Mixture.of(one['mixture'])} could not be fine-tuned and scored: {one['reason']}"))
    return found


def rounded(value: float) -> str:
    """A number of rows to two significant digits."""
    digits = len(str(int(value))) - 2
    return f"{round(value, -max(digits, 0)):,.0f}"


def averages_badly(result: SearchResult) -> tuple[int, int] | None:
    """(mixtures worse than their parts are on average, mixtures of two or more), where that holds for three quarters of them.

    Compared by the log-probability of the right answers where there is one, which moves where a metric does not. Losses are
    nearly convex along the line between models that share most of their training, so averages of good adapters do better than
    the parts on average (Wortsman et al., Model soups, 2022).
    """
    worse = several = 0
    for mixture, standing in result.standings.items():
        parts = [result.standings.get(Mixture.subset([name])) for name in mixture.names]
        if len(mixture) < 2 or not standing.complete or any(one is None or not one.complete for one in parts):
            continue
        known = [one for one in (standing, *parts) if one is not None]
        likely = all(trial.score and trial.score.logprobs for one in known for trial in one.trials.values())
        values = [one.mean_logprob if likely else score_of(one).value for one in known]
        several += 1
        worse += values[0] < sum(w * v for w, v in zip(mixture.weights.values(), values[1:], strict=True))
    return (worse, several) if several > 2 and worse >= 0.75 * several else None
