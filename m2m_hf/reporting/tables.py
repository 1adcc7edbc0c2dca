"""What a run ends with on the terminal: tables, and the lines under them."""

from collections.abc import Mapping, Sequence
from typing import Any

from m2m_hf.analysis.fidelity import LARGER, VERDICTS, Agreement
from m2m_hf.console import duration
from m2m_hf.core.mixture import Mixture
from m2m_hf.core.score import Score
from m2m_hf.core.trial import Standing
from m2m_hf.reporting.outcome import Outcome, summarise
from m2m_hf.reporting.warnings import cautions, one_of_the_worse


def figure(score: Score | None) -> str:
    """`0.842 ± 0.033`; without the latter where it is not known."""
    if score is None:
        return ""
    return f"{score.value:.3f}" + ("" if score.stderr is None else f" ± {score.stderr:.3f}")


def end_table(outcome: Outcome) -> tuple[str, list[str], list[list[str]]]:
    """(title, columns, rows) of the end table: a column for each target, and one for their mean where there are several."""
    targets = list(outcome.targets)
    several = len(targets) > 1
    test = outcome.final_score("final", "test") is not None

    def row(label: str, standing: Standing, adds: str = "", steps: str = "", time: str = "") -> list[str]:
        shown = [figure(standing.score) if standing.score else "failed"]
        if several:
            shown += [figure(standing.trials[name].score) or "failed" for name in targets]
        return [label, *shown, *[""] * (test and not several), adds, steps, time]

    def final_row(who: str, part: str) -> list[str]:
        return [figure(outcome.final_score(who, part, name)) for name in ([None, *targets] if several else [None])]

    rows = [row("base model", outcome.result.base)]
    for name in outcome.candidates:
        one = outcome.training[name]
        value, stderr = (outcome.worth.shapley if outcome.worth else {}).get(name, (None, None))
        adds = "" if value is None else f"{value:+.3f}" + ("" if stderr is None else f" ± {stderr:.3f}")
        rows.append(row(name, outcome.merged([name]), adds, f"{one['steps']:,}", duration(one["seconds"])))
    rows.append(row(f"all {len(outcome.usable)}, merged", outcome.merged(outcome.usable)))
    rows.append(row(f"{outcome.result.best.mixture}, merged", outcome.result.best))
    if outcome.final is not None:
        cost = ["", f"{outcome.final['steps']:,}", duration(outcome.final["seconds"])]
        if several:
            rows.append(["final model", *final_row("final", "validation"), *cost])
            if any(final_row("final", "test")):
                rows.append(["base model, sealed test", *final_row("base", "test"), "", "", ""])
                rows.append(["final model, sealed test", *final_row("final", "test"), "", "", ""])
        else:
            rows.append(["final model", *final_row("final", "validation"), *final_row("final", "test")[:test], *cost])
            if test:
                rows[0][2] = final_row("base", "test")[0]
    metrics = {name: target.config.metric or "the task's metric" for name, target in outcome.targets.items()}
    if several:
        title = "weighted mean and every target, validation ± standard error"
        columns = ["", "mean", *(f"{name} ({metrics[name]})" for name in targets)]
    else:
        title = f"{targets[0]}: {metrics[targets[0]]} ± standard error"
        columns = ["", "validation", *["test"] * test]
    return title, [*columns, "worth", "steps", "time"], rows


def certainty_lines(outcome: Outcome) -> list[str]:
    """What the rows tell about the choice."""
    sure = outcome.certainty
    if sure is None:
        return []
    what = "its fine-tuned score" if outcome.fine_tuned else "its score"
    chance = ""
    if sure.probability_best is not None:
        among = "those fine-tuned" if outcome.fine_tuned else "the mixtures looked at"
        chance = f"; it truly is the best of {among} with a probability of {sure.probability_best:.2f}"
    lines = [
        f"how sure: {what} is {sure.corrected:.3f} with the luck of the best of many taken off ({-sure.optimism:+.3f}){chance}"
    ]
    words = {"base": "base model", "all": "all together", "best_single": "best single"}
    shown = [
        f"{words[name]} {value:+.3f} [{low:+.3f}, {high:+.3f}]"
        for name, (value, low, high) in sure.differences.items()
        if name in words
    ]
    if shown:
        lines.append(f"  over (paired, 95 %, corrected alike): {'; '.join(shown)}")
    return lines


def remarks(outcome: Outcome, *, steps: int | None, epochs: float, overrides: Mapping[str, Any]) -> list[str]:
    """The lines under the end table: what was chosen, what is harmful, what the figures mean and what they cost.

    Args:
        steps: the final fine-tune's `max_steps`, or None where it goes by epochs.
        epochs: its `num_train_epochs`.
        overrides: what `final:` changes.
    """
    result, final = outcome.result, outcome.final
    summary = summarise(outcome)
    best, costs = result.best.mixture, summary["costs"]
    left_out = [name for name in outcome.candidates if name not in best.names]
    lines = ["", f"chosen: {best}" + (f"; left out: {', '.join(left_out)}" if left_out else "")]
    lines += certainty_lines(outcome)
    lines += [text for _, text in cautions(outcome)]
    for name, target in outcome.targets.items():
        worse = sum(name in one.short for one in result.standings.values())
        if worse:
            lines.append(
                f"{worse} mixtures could not be chosen: they make {name} worse than the base model by more than "
                f"{target.config.min_delta:g} (min_delta)"
            )
    if len(outcome.targets) > 1:
        front = result.pareto_front
        lines.append(
            f"{len(front)} mixtures are on the Pareto front of the {len(outcome.targets)} targets: summary.json lists them"
        )
    pruned = [one for one in result.standings.values() if one.pruned]
    if pruned:
        tied = sum(not one_of_the_worse(one, result.best) for one in pruned)
        told = f"{tied} of them may be as good as the chosen one" if tied else "none of them comes near the chosen one"
        lines.append(
            f"not scored on all examples, since they could not win: {len(pruned)}; as far as they were, {told}"
        )
    if result.ended == "budget":
        lines.append("the budget ended the search before the strategy did: a larger one goes on from here")
    if summary["counts"]["failed"]:
        reasons = [trial.reason or "" for trial in result.trials if trial.state == "failed"]
        lines.append(
            f"{len(reasons)} trials failed; their mixtures cannot be chosen; trials.jsonl says why, the first: {reasons[0]}"
        )
    if outcome.worth:
        how = "over all orders" if outcome.worth.exact else "over orders, estimated from the mixtures scored"
        lines.append(
            f"worth: what a candidate adds when all join the base model one by one, on average {how} (Shapley value); the "
            "first to join adds the most"
        )
    kind = next(iter(result.best.trials.values())).objective
    explained = {
        "merged": f"merged: the exact average of the {outcome.experts}, not trained",
        "ensemble": f"merged: scored by the average of the {outcome.experts}' probabilities, not trained",
    }
    lines.append(explained.get(kind, f"merged: the {outcome.experts} by {kind}, not trained"))
    uniform = (
        f"for the same {steps} steps"
        if steps
        else f"for the same {epochs:g} epoch{'' if epochs == 1 else 's'}, so steps in proportion to its rows"
    )
    lines.append(
        f"final model: {'' if final else 'to be '}fine-tuned on the chosen mixture, "
        + (
            f"as final: says ({', '.join(f'{key}: {value}' for key, value in overrides.items())})"
            if overrides
            else uniform
        )
    )
    lines.append(
        f"cost: {outcome.experts} {duration(costs['train_seconds'])}, {len(result.standings)} mixtures scored in "
        f"{duration(costs['search_seconds'])}"
        + (f", mixtures fine-tuned to compare {duration(costs['compare_seconds'])}" if costs["compare_seconds"] else "")
        + (f", final model {duration(costs['final_seconds'])}" if final else "")
    )
    return lines


NAMES = {
    "base": "base model",
    "chosen": "chosen",
    "all": "all candidates",
    "best_single": "best single",
    "similarity": "most similar",
    "stratified": "equally many rows of each",
    "oracle": "best of all fine-tuned",
}


def span(ends: Sequence[float] | None) -> str:
    """`[0.40, 0.95]`; a dash where it cannot be known."""
    return "–" if ends is None else f"[{ends[0]:.2f}, {ends[1]:.2f}]"


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


Table = tuple[str, list[str], list[list[str]]]


def fidelity_tables(found: Mapping[str, Any]) -> list[Table]:
    """(title, columns, rows) of what `fidelity.json` holds: the correlations, a table for every measure."""
    tables = []
    measures = dict.fromkeys(measure.removesuffix(LARGER) for of in found["agreement"].values() for measure in of)
    for measure in measures:
        columns, parts = [""], []
        for name, of in found["agreement"].items():
            for suffix in ("", LARGER):
                if measure + suffix in of:
                    columns.append(name + (", 2 or more" if suffix else ""))
                    parts.append(of[measure + suffix])
        rows = [["mixtures", *(str(one["mixtures"]) for one in parts)]]
        for key in ("pearson", "spearman", "kendall"):
            rows.append([key.title(), *(number(one[key]["value"]) for one in parts)])
            rows.append(["  with endless rows", *(span(one[key]["here"]) for one in parts)])
            rows.append(["  with other candidates", *(span(one[key]["elsewhere"]) for one in parts)])
        rows.append(["Pearson across halves of the rows", *(number(one["halves"]) for one in parts)])
        for k in ("1", "3", "5"):
            if all(k in one["recall"] for one in parts):
                rows.append([f"share of the best {k} found", *(number(one["recall"][k]["value"]) for one in parts)])
        rows.append(["regret of its choice", *(number(one["regret"]["value"], 3) for one in parts)])
        rows.append(["  of a random choice", *(number(one["random_regret"], 3) for one in parts)])
        tables.append((f"{measure}: predicted against fine-tuned, 95 % intervals", columns, rows))
    return tables


def comparison_tables(title: str, found: Mapping[str, Mapping[str, Agreement]]) -> list[Table]:
    """(title, columns, rows) by measure: of surrogates the correlations over mixtures of two or more, and regret over all."""
    columns = ["", "Pearson", "with endless rows", "Spearman", "with endless rows", "regret", "of random"]
    tables = []
    for measure in ("score", "logprob"):
        if not all(measure in of for of in found.values()):
            continue
        rows = []
        for name, of in found.items():
            cells = [name]
            for figure in (
                (of[measure + LARGER].pearson, of[measure + LARGER].spearman) if measure + LARGER in of else ()
            ):
                cells += [number(figure.to_json()["value"]), span(figure.here)]
            cells += ["–"] * (5 - len(cells))
            rows.append([*cells, number(of[measure].regret.value, 3), number(of[measure].random_regret, 3)])
        tables.append((f"{measure}: {title}", columns, rows))
    return tables


def baselines_table(found: Mapping[str, Any]) -> Table:
    """(title, columns, rows) of what ways of choosing come to: `baselines` of `fidelity.json` or `verified.json`."""
    rows = []
    for name, one in found.items():
        label = NAMES.get(name, name.replace("_", " "))
        label += f" ({' + '.join(one['mixture'])})" if name not in ("base", "all", "stratified") else ""
        cells = []
        for part in ("validation", "test"):
            of = one[part]
            cells.append(figure(Score(of["score"], of["stderr"])) if of else "")
            behind = of and name != "chosen" and of["over_chosen"]
            cells.append(figure(Score(behind["value"], behind["stderr"])) if behind else "")
        rows.append([label, f"{one['rows']:,}", f"{one['steps']:,}", *cells])
    columns = ["", "rows", "steps", "validation", "over chosen", "sealed test", "over chosen"]
    return "ways of choosing, all fine-tuned alike ± standard error (of the paired difference)", columns, rows


def fidelity_remarks(found: Mapping[str, Any]) -> list[str]:
    """The lines under the tables: the verdicts, and what else was seen."""
    lines = []
    for name, one in found["verdict"].items():
        lines.append(f"{name}: {VERDICTS[one['verdict']]}, since {one['why']}")
    if found["training_noise"] is not None:
        lines.append(
            f"chance in training: two trainings on the same rows in another order differ by {found['training_noise']:.3f} "
            "(root mean square over the singles)"
        )
    for name, measures in found["resilience"].items():
        for measure, one in measures.items():
            if one["hurt"]:
                line = (
                    f"mixtures that hurt, by {measure}: {one['hurt']} of {one['mixtures']}; {name} is below the base model too "
                    f"for {one['noticed']} of them"
                )
                if one["shielded"]:
                    shielded = figure(Score(one["shielded"]["value"], one["shielded"]["stderr"]))
                    line += (
                        f"; picked and measured on different rows, fine-tuned {one['trained']:+.3f}, {name} "
                        f"{one['surrogate']:+.3f}, which is higher by {shielded}"
                    )
                lines.append(line)
    for one in found["failed"]:
        lines.append(f"left out: {Mixture.of(one['mixture'])} could not be fine-tuned and scored: {one['reason']}")
    return lines


def verified_table(found: Mapping[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """(title, columns, rows) of what was fine-tuned before choosing, best first."""
    rows = []
    for one in sorted(found["mixtures"], key=lambda one: -one["trained"]["score"]):
        cells = [one[key] and Score(one[key]["score"], one[key]["stderr"]) for key in ("trained", "merged")]
        shown = [figure(score) if score.value is not None else "failed" for score in cells]
        rows.append([str(Mixture.of(one["mixture"])), *shown, f"{one['steps']:,}"])
    return "fine-tuned before choosing, validation ± standard error", ["", "fine-tuned", "merged", "steps"], rows
