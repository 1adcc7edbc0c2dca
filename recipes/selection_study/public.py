"""Replays the choice of the next measurement on a public table: all subsets of five vision tasks, trained together.

```bash
python recipes/selection_study/public.py FOLDER
```

FOLDER holds tables of github.com/tstandley/taskgrouping (MIT; Standley et al., Which Tasks Should Be Learned Together in
Multi-task Learning?, 2020) as `*.csv` with the columns model,task1,…,task5: the subset, such as 135, and the loss of each of its
tasks; the test part of `x.csv` is `x_test.csv`. They are not part of this repository.

A task is the target, the others are candidates: which of them should be trained with it? There is no surrogate, so this is about
the search alone: expected improvement by `m2m_hf.analysis.beliefs`, beside measuring mixtures at random. Singles and all together
are measured first.
"""

import argparse
import csv
from pathlib import Path
from typing import Any

import numpy as np

from m2m_hf.analysis.beliefs import Beliefs
from m2m_hf.console import Terminal

MORE = (0, 1, 2, 3, 5)  # mixtures that are measured beside singles and all together
ORDERS = 200  # at random


def problems(path: Path) -> list[tuple[Any, Any, Any]]:
    """(members, scores on validation, on test) of every task as the target; its loss, the lower the better, with a minus."""
    parts = [read(path), read(path.with_name(f"{path.stem}_test.csv"))]
    found = []
    for target in range(5):
        helpers = [task for task in range(5) if task != target]
        models = [model for model in parts[0] if str(target + 1) in model and len(model) > 1]
        members = np.array([[str(task + 1) in model for task in helpers] for model in models], dtype=float)
        validation, test = (np.array([-part[model][target] for model in models]) for part in parts)
        found.append((members, validation, test))
    return found


def read(path: Path) -> dict[str, list[float]]:
    """Model -> loss of each task, NaN where it is not trained."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["model"].isdigit()]
    return {row["model"]: [float(row[f"task{task}"] or "nan") for task in range(1, 6)] for row in rows}


def begun(members: Any, scores: Any) -> Beliefs:
    """What is believed once singles and all together are measured."""
    size = members.sum(1)
    beliefs = Beliefs(members, [np.full(len(scores), scores[size == 1].mean())])
    for place in np.flatnonzero((size == 1) | (size == size.max())):
        beliefs.learn(int(place), float(scores[place]))
    return beliefs


def lost(members: Any, scores: Any, test: Any, more: int, order: Any = None) -> float:
    """Regret on test as a share of best - median; mixtures are measured as believed, or in this order."""
    unit = scores.std()
    beliefs = begun(members, scores / unit)
    for _ in range(more):
        left = [place for place in (order if order is not None else beliefs.next()) if place not in beliefs.known]
        if left:
            beliefs.learn(int(left[0]), float(scores[left[0]] / unit))
    return float(test.max() - test[beliefs.best]) / float(test.max() - np.median(test))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    tables = [path for path in sorted(given.folder.glob("*.csv")) if path.with_name(f"{path.stem}_test.csv").exists()]
    known = [problem for path in tables for problem in problems(path)]
    if not known:
        raise SystemExit(f"{given.folder}: expected x.csv beside x_test.csv")
    random, rows = np.random.default_rng(0), []
    for more in MORE:
        believed = [lost(*problem, more) for problem in known]
        drawn = [
            float(np.mean([lost(*problem, more, random.permutation(len(problem[0]))) for _ in range(ORDERS)]))
            for problem in known
        ]
        rows.append([str(more), *(f"{of(part):.2f}" for part in (believed, drawn) for of in (np.mean, max))])
    columns = ["measured beside singles and all", "believed", "worst", "at random", "worst"]
    Terminal().table(f"regret, {len(known)} targets of 15 mixtures", columns, rows)


if __name__ == "__main__":
    main()
