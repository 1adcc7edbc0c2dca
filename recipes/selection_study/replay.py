"""Replays ways of choosing on the tables of the selection study, and prints how much each loses.

```bash
python recipes/selection_study/replay.py                       # all tables, 0 to 5 fine-tunes
python recipes/selection_study/replay.py --fine_tunes 3 --cases
```

Regret is by how much the best mixture is better than the model that comes of a choice, on the sealed rows: the best as the
mean over seeds, the model as it was trained with the seed at hand, since a mixture that was fine-tuned to choose it is the final
model. It is given as a share of what the best is better than the median mixture, and in standard deviations of a training: the
same rows, another seed.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1] / "support")

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from beliefs import Beliefs, Floats
from choosing import (
    Problem,
    Way,
    all_together,
    believed,
    best_single,
    by,
    by_both,
    grid,
    most_similar,
    sequential,
    verified,
)

from m2m_hf.console import Terminal

HERE = Path(__file__).parent
LEVELS = (0.0, 0.35, 0.65, 0.85)  # where a table of probabilities is cut
SURROGATES = "merged", "ensemble", "by_rows", "summed_0.5", "summed_0"


@dataclass(frozen=True)
class Study:
    """One case, schedule and way of training, with all its seeds.

    Args:
        truth: (seeds, mixtures), of fine-tuned mixtures on sealed rows.
        problems: what a way of choosing sees, by seed.
    """

    name: str
    way: str
    aside: bool
    truth: Floats
    problems: Sequence[Mapping[str, Any]]

    @property
    def mean(self) -> Floats:
        found: Floats = self.truth.mean(0)
        return found

    @property
    def noise(self) -> float:
        """Standard deviation of a training with another seed; NaN with one seed."""
        return float(np.sqrt(self.truth.var(0, ddof=1).mean())) if len(self.truth) > 1 else float("nan")

    @property
    def reliability(self) -> float:
        """Mean correlation of the truth of two seeds."""
        if len(self.truth) < 2:
            return float("nan")
        pairs = combinations(self.truth, 2)
        return float(np.mean([np.corrcoef(one, other)[0, 1] for one, other in pairs]))

    @property
    def spread(self) -> float:
        """The best less the median; NaN where these are the same."""
        return float(self.mean.max() - np.median(self.mean)) or float("nan")

    def correlation(self, surrogate: str) -> float:
        """Pearson's, of a surrogate with the truth of its own seed, over the mixtures of two or more; mean over seeds."""
        larger = self.problems[0]["members"].sum(1) > 1
        if surrogate not in self.problems[0]["surrogates"] or larger.sum() < 3:
            return float("nan")
        pairs = [
            (one["surrogates"][surrogate].mean(1), truth) for one, truth in zip(self.problems, self.truth, strict=True)
        ]
        return float(np.mean([np.corrcoef(said[larger], truth[larger])[0, 1] for said, truth in pairs]))

    def regret(self, choice: int, seed: int) -> float:
        """As a share of the spread."""
        return float(self.mean.max() - self.truth[seed, choice]) / self.spread


def read(folder: Path) -> list[Study]:
    """All studies in the tables of a folder."""
    groups: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        facts = json.loads(str(arrays.pop("facts")))
        for way in ("union", "shares"):
            if way in facts:
                groups[facts["case"], f"{way}, {facts['schedule']}"].append((facts, arrays, way))
    return [study(name, way, tables) for (name, way), tables in groups.items()]


def study(name: str, way: str, tables: Sequence[Any]) -> Study:
    truth, problems = [], []
    for facts, arrays, kind in tables:
        names = facts["candidates"]
        surrogates = {
            one.removesuffix(".values"): values.astype(np.float64)
            for one, values in arrays.items()
            if one.endswith(".values") and not one.startswith(("union", "shares", "base", "singles"))
        }
        truth.append(arrays[f"{kind}.test.values"].astype(np.float64).mean(1))
        similarity = facts.get("similarity") or {}
        problems.append(
            {
                "members": arrays["members"],
                "surrogates": surrogates,
                "trained": arrays[f"{kind}.validation.values"].astype(np.float64),
                "sizes": np.array([facts["rows"][one] for one in names], dtype=float),
                "similarity": np.array([similarity.get(one, 0.0) for one in names]),
            }
        )
    return Study(name, way, bool(tables[0][0]["aside"]), np.array(truth), problems)


def lost(studies: Sequence[Study], way: Way) -> tuple[list[float], float]:
    """(regret by study, mean over its seeds; fine-tunes asked for, on average)."""
    regrets, asked = [], []
    for one in studies:
        mine = []
        for seed, fields in enumerate(one.problems):
            problem = Problem(**fields)
            mine.append(one.regret(way(problem), seed))
            asked.append(len(problem.asked))
        regrets.append(float(np.mean(mine)))
    return regrets, float(np.mean(asked))


def left_out(studies: Sequence[Study], fine_tunes: int, **options: Any) -> tuple[list[float], float]:
    """As `lost`, of sequential fine-tunes with the beliefs that lose least on all other cases."""
    tried = [lost(studies, sequential(fine_tunes, beliefs, **options)) for beliefs in grid()]
    table = np.array([regrets for regrets, _ in tried])
    regrets = []
    for number, one in enumerate(studies):
        others = [place for place, other in enumerate(studies) if other.name != one.name]
        regrets.append(float(table[table[:, others].mean(1).argmin() if others else 0, number]))
    return regrets, tried[0][1]


def ways(fine_tunes: int) -> dict[str, Way]:
    """Ways of choosing with so many fine-tunes."""
    if fine_tunes == 0:
        found = {"all": all_together, "best single": best_single, "most similar": most_similar, "both": by_both}
        return found | {name: by(name) for name in ("merged", "ensemble", "by_rows", "summed_0.5", "summed_0")}
    return {
        "merged, all": verified(["merged"], fine_tunes),
        "ensemble, all": verified(["ensemble"], fine_tunes),
        "both, all": verified(["merged", "ensemble"], fine_tunes),
        "both": verified(["merged", "ensemble"], fine_tunes, with_all=False),
    }


def show_cases(studies: Sequence[Study], terminal: Terminal) -> None:
    """What there was to choose from, and how well each surrogate orders it."""
    names = list(dict.fromkeys(name for one in studies for name in one.problems[0]["surrogates"]))
    rows = []
    for one in studies:
        figures = [f"{value:.3f}" for value in (one.mean.max(), np.median(one.mean), one.noise, one.reliability)]
        known = [one.correlation(name) for name in names]
        rows.append([one.name, one.way, str(len(one.truth)), str(one.truth.shape[1]), *figures, *map(share, known)])
    columns = ["", "way", "seeds", "mixtures", "best", "median", "noise", "reliability"]
    terminal.table("cases", [*columns, *(f"r {name}" for name in names)], rows)


def share(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.2f}"


def show(studies: Sequence[Study], fine_tunes: int, cases: bool, terminal: Terminal) -> None:
    """Prints what every way of choosing loses."""
    noise = np.array([one.noise / one.spread for one in studies])
    found: dict[str, tuple[list[float], float]] = {}
    for name, way in ways(fine_tunes).items():
        needed = name.split(",")[0]
        if needed not in SURROGATES or all(needed in one.problems[0]["surrogates"] for one in studies):
            found[name] = lost(studies, way)
    if fine_tunes == 0:
        found["random"] = [float(one.mean.max() - one.mean.mean()) / one.spread for one in studies], 0.0
    found["beliefs"] = left_out(studies, fine_tunes)
    if fine_tunes:
        found["beliefs, without all"] = left_out(studies, fine_tunes, with_all=False)
        found["beliefs, unseen too"] = left_out(studies, fine_tunes, only_seen=False)
    rows = []
    for name, (regrets, asked) in found.items():
        figures = f"{asked:.1f}", f"{np.mean(regrets):.3f}", f"{np.max(regrets):.3f}"
        sigmas = np.array(regrets) / noise
        known = sigmas[np.isfinite(sigmas)]
        in_noise = [share(float(one(known))) if len(known) else "–" for one in (np.mean, np.max)]
        rows.append([name, *figures, *in_noise, *(share(one) for one in regrets if cases)])
    columns = ["", "asked for", "mean regret", "worst", "in noise", "worst"]
    terminal.table(f"{fine_tunes} fine-tunes", [*columns, *(one.name[:12] for one in studies if cases)], rows)


def show_sureness(studies: Sequence[Study], fine_tunes: int, terminal: Terminal) -> None:
    """How often a choice is within one training's noise of the best, beside how often that was said; of several seeds only."""
    said, true = [], []
    for one in studies:
        for fields in one.problems if np.isfinite(one.noise) else ():
            posterior = believed(Problem(**fields), fine_tunes, Beliefs())
            said.append(posterior.sure(one.noise))
            true.append(one.mean[posterior.best] >= one.mean.max() - one.noise)
    rows = []
    for low, high in zip(LEVELS, [*LEVELS[1:], 1.01], strict=True):
        inside = [number for number, value in enumerate(said) if low <= value < high]
        figures = [
            share(float(np.mean([part[number] for number in inside]))) if inside else "–" for part in (said, true)
        ]
        rows.append([f"{low:g} to {min(high, 1):g}", str(len(inside)), *figures])
    terminal.table(f"sure after {fine_tunes} fine-tunes", ["said", "choices", "mean", "true"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, default=HERE / "tables")
    parser.add_argument("--fine_tunes", type=int, nargs="*", default=[0, 1, 2, 3, 5])
    parser.add_argument("--way", default="", help="only this way of training, such as 'union, epochs'")
    parser.add_argument("--aside", action="store_true", help="the cases that were set aside, instead of the others")
    parser.add_argument("--cases", action="store_true", help="regret of each case")
    given = parser.parse_args()
    studies = [one for one in read(given.tables) if one.aside == given.aside and one.way.startswith(given.way)]
    if not studies:
        raise SystemExit(f"{given.tables}: no such tables; measure.py makes them")
    terminal = Terminal()
    show_cases(studies, terminal)
    for fine_tunes in given.fine_tunes:
        show(studies, fine_tunes, given.cases, terminal)
    show_sureness(studies, max(given.fine_tunes), terminal)


if __name__ == "__main__":
    main()
