"""How good is every strategy, and how much does it spend? Replays all of them on the scores of an exhaustive run.

```bash
python recipes/scale_search.py --run runs/scale                 # an exhaustive run, such as that of recipes/scale.yaml
python recipes/scale_search.py --run runs/scale --likelihood    # the score is the log-probability of the right answers
```

1. On the recorded scores: the share of exhaustive's example evaluations that each strategy spends, and how often its winner is
   exhaustive's, or one that a paired test over all examples cannot tell from it, over many seeds (row orders and draws).
2. On made-up landscapes of 24 and of 100 candidates, whose shape is fitted to the recorded scores: how far below the best value
   known each strategy ends, as a share of the way from the base model to it, after a fixed number of mixtures.
3. What the loop itself costs: strategy, journal and statistics, without any model.
"""

import sys

sys.path[0] += "/support"  # not this folder, whose select.py would hide the standard library's

from m2m_hf.console import LibraryLog, Terminal

LOG = LibraryLog()  # libraries have things to say when they are imported

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from replay import Landscape, Replay, larger_landscape, tells_apart

from m2m_hf.core.mixture import BASE, Mixture
from m2m_hf.core.objective import Objective
from m2m_hf.core.score import Score
from m2m_hf.core.space import SearchSpace
from m2m_hf.core.trial import Standing
from m2m_hf.search.callbacks import SearchCallback, SearchControl
from m2m_hf.search.loop import search
from m2m_hf.search.measure import SearchState
from m2m_hf.search.model_based import STRATEGIES, choose_strategy
from m2m_hf.search.result import Budget
from m2m_hf.search.strategies import exhaustive
from m2m_hf.storage.journal import Journal

Curve = list[tuple[float, float]]


class CurveCallback(SearchCallback):
    """Keeps, for every settled mixture, the rows scored so far and the best score so far."""

    def __init__(self, objective: Objective) -> None:
        self.curve: Curve = []
        self._objective = objective

    def on_standing(self, standing: Standing, best: Standing | None, control: SearchControl) -> None:
        if best is not None and best.score is not None:
            self.curve.append((getattr(self._objective, "spent", 0), best.score.value))


def replay(
    objective: Objective, names: tuple[str, ...], strategy: str, race: bool, seed: int, budget: Budget
) -> tuple[Standing, float, Curve]:
    """(the chosen mixture, examples scored, [examples scored, best score so far]) of one search."""
    watch = CurveCallback(objective)
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder) / "trials.jsonl", write=False)
        state = SearchState(SearchSpace(names), [objective], journal, [watch], budget)
        result = search(state, STRATEGIES[strategy], names, race=race, seed=seed)
    return result.best, result.evaluations, watch.curve


def recorded(given: argparse.Namespace, terminal: Terminal) -> tuple[dict[str, Any], dict[str, list[Curve]], Replay]:
    """Part 1."""
    objective = Replay.of_run(given.run / "trials.jsonl", likelihood=given.likelihood)
    names = tuple(sorted({name for mixture in objective.table for name in mixture.names}))
    if len(objective.table) != 2 ** len(names):
        raise SystemExit(
            f"{given.run}: expected all {2 ** len(names)} mixtures scored in full, got {len(objective.table)}"
        )
    scores = {mixture: score for mixture, score in objective.table.items() if mixture.items}
    best = max(scores, key=lambda mixture: (scores[mixture].value, -len(mixture)))
    full = len(objective.table) * objective.target.examples
    values = sorted((score.value for score in scores.values()), reverse=True)
    tied = sum(not tells_apart(scores[best], score) for score in scores.values())
    terminal.say(
        f"{len(names)} candidates, {objective.target.examples} examples; base {objective.table[BASE].value:.4f}, median "
        f"{statistics.median(values):.4f}, best {values[0]:.4f} ({best}); {tied} mixtures cannot be told from the best\n"
    )
    auto, why = choose_strategy(SearchSpace(names), True)
    terminal.say(f"auto takes {auto}: {why}")
    plans = [("exhaustive, no race", "exhaustive", False), ("exhaustive", "exhaustive", True)]
    plans += [(name, name, True) for name in STRATEGIES if name not in ("exhaustive", "gradient")]
    rows, figures = [], {}
    curves: dict[str, list[Curve]] = {}
    for label, strategy, race in plans:
        found, shares, wins = [], [], 0
        curves[label] = []
        for seed in range(given.seeds if label != "exhaustive, no race" else 1):
            again = Replay(objective.table, seed)
            chosen, spent, curve = replay(again, names, strategy, race, seed, Budget())
            mine = scores[chosen.mixture]
            found.append(mine.value)
            shares.append(spent / full)
            wins += not tells_apart(scores[best], mine)
            curves[label].append(curve)
        runs = len(found)
        figures[label] = {"share": shares, "score": found, "as_good": wins, "runs": runs}
        rows.append([
            label + (" (auto)" if strategy == auto and race else ""),
            f"{wins} of {runs}",
            f"{statistics.mean(shares):.1%}",
            f"{max(shares):.1%}",
            f"{statistics.mean(found):.4f}",
            f"{min(found):.4f}",
        ])  # fmt: skip
        terminal.say(f"  {label}: {rows[-1][1]}, {rows[-1][2]}", style="dim")
    columns = ["", "as good as the best", "evaluations", "at most", "score", "at least"]
    terminal.table("replays of the recorded scores", columns, rows)
    return figures, curves, objective


def simulated(given: argparse.Namespace, table: Mapping[Mixture, Score], terminal: Terminal) -> dict[str, Any]:
    """Part 2."""
    names = tuple(sorted({name for mixture in table for name in mixture.names}))
    figures: dict[str, Any] = {}
    for count, budget in ((24, 300), (100, 1500)):
        gaps: dict[str, list[float]] = {}
        seconds: dict[str, list[float]] = {}
        for seed in range(given.landscapes):
            value = larger_landscape(table, SearchSpace(names), count, seed)
            many = tuple(f"c{number:03}" for number in range(count))
            found = {}
            for strategy in STRATEGIES:
                if strategy not in ("exhaustive", "gradient") and not (strategy == "bayes" and count > 24):
                    start = time.monotonic()
                    chosen = replay(Landscape(value), many, strategy, False, seed, Budget(max_trials=budget))[0]
                    seconds.setdefault(strategy, []).append(time.monotonic() - start)
                    found[strategy] = value(chosen.mixture)
            # The best value known: steepest ascent with a hundred times the budget, or whatever did better.
            known = max(
                value(replay(Landscape(value), many, "greedy", False, seed, Budget())[0].mixture), *found.values()
            )
            for strategy, reached in found.items():
                gaps.setdefault(strategy, []).append((known - reached) / (known - value(BASE)))
        rows = [
            [name, f"{statistics.median(gap):.2%}", f"{max(gap):.2%}", f"{statistics.mean(seconds[name]):.1f} s"]
            for name, gap in gaps.items()
        ]
        terminal.table(
            f"{count} made-up candidates, {budget} mixtures, {given.landscapes} landscapes: below the best known by",
            ["", "median", "at most", "time"],
            rows,
        )
        figures[str(count)] = gaps
    return figures


def loop_cost(terminal: Terminal) -> dict[str, float]:
    """Part 3."""

    class Moments(SearchCallback):
        def on_standing(self, standing: Standing, best: Standing | None, control: SearchControl) -> None:
            moments.append(time.monotonic())

    names = tuple(f"c{number:02}" for number in range(15))
    objective = Landscape(lambda mixture: -float(len(mixture)))
    moments: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trials.jsonl"
        start = time.monotonic()
        search(SearchState(SearchSpace(names), [objective], Journal(path), [Moments()]), exhaustive, names)
        total = time.monotonic() - start
        start = time.monotonic()
        Journal(path)
        reload = time.monotonic() - start
    count = len(moments)
    first, last = moments[1000] - moments[0], moments[-1] - moments[-1001]
    terminal.say(
        f"the loop: {total / count * 1e3:.2f} ms a trial over {count:,} trials, the first thousand {first:.2f} ms each, the last "
        f"{last:.2f} ms; reading the journal again {reload:.1f} s"
    )
    return {"ms_per_trial": total / count * 1e3, "first": first, "last": last, "reload_seconds": reload}


def draw(curves: Mapping[str, list[Curve]], full: int, floor: float, path: Path) -> None:
    """Best score so far against the share of example evaluations spent, the mean over all seeds."""
    import matplotlib

    matplotlib.use("agg")
    import numpy as np
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    grid = np.geomspace(0.01, 1, 200)
    for label, several in curves.items():
        lines = []
        for curve in several:
            spent = np.array([place for place, _ in curve]) / full
            best = np.array([value for _, value in curve])
            place = np.searchsorted(spent, grid, side="right") - 1
            lines.append(np.where(place < 0, floor, best[np.maximum(place, 0)]))
        mean = np.mean(lines, axis=0)
        end = np.mean([curve[-1][0] for curve in several]) / full
        axes.plot(grid[grid <= end * 1.02], mean[grid <= end * 1.02], label=label, linewidth=1.5)
    axes.set(xscale="log", xlabel="share of exhaustive's example evaluations", ylabel="best score so far")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="the folder of an exhaustive run")
    parser.add_argument("--likelihood", action="store_true", help="score by the log-probability of the right answers")
    parser.add_argument("--seeds", type=int, default=20, help="of the replays (default: 20)")
    parser.add_argument("--landscapes", type=int, default=3, help="made-up ones of each size (default: 3)")
    parser.add_argument("--output", type=Path, help="a folder for figures.json and the plot (needs matplotlib)")
    given = parser.parse_args()
    terminal = Terminal()
    figures, curves, objective = recorded(given, terminal)
    landscapes = simulated(given, objective.table, terminal)
    loop = loop_cost(terminal)
    if given.output:
        given.output.mkdir(parents=True, exist_ok=True)
        everything = {"recorded": figures, "simulated": landscapes, "loop": loop}
        (given.output / "figures.json").write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")
        full = len(objective.table) * objective.target.examples
        draw(curves, full, objective.table[BASE].value, given.output / "search.png")


if __name__ == "__main__":
    main()
