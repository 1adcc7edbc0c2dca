"""Replays ways of choosing on the tables of the selection study, and prints how much each loses.

```bash
python recipes/selection_study/replay.py                       # all tables, 0 to 5 fine-tunes
python recipes/selection_study/replay.py --fine_tunes 3 --cases
python recipes/selection_study/replay.py --fit                 # the prior of `m2m_hf.analysis.beliefs`
```

Regret is by how much the best mixture is better than the model that comes of a choice, on the sealed rows: the best as the
mean over seeds, the model as it was trained with the seed at hand, since a mixture that was fine-tuned to choose it is the final
model. It is given as a share of what the best is better than the median mixture, and in standard deviations of a training: the
same rows, another seed; where a way of training has one seed only, of the other ways of the same case. What is fitted is fitted
on all other cases.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1] / "support")

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from choosing import (
    Problem,
    Way,
    all_together,
    believed,
    best_of,
    best_single,
    by,
    by_both,
    fitted,
    most_similar,
    sequential,
    verified,
)
from numpy.typing import NDArray

from m2m_hf.analysis.beliefs import Floats, Prior
from m2m_hf.console import Terminal

HERE = Path(__file__).parent
LEVELS = (0.5, 0.8, 0.9)
BINS = (0.0, 0.35, 0.65, 0.85)  # where a table of probabilities is cut
SURROGATES = "merged", "ensemble", "by_rows", "summed_0.5", "summed_0", "quadratic"

Lost = tuple[list[float], float]  # (regret by study, mean over its seeds; fine-tunes asked for, on average)


@dataclass(frozen=True)
class Study:
    """One case, schedule and way of training, with all its seeds.

    Args:
        truth: (seeds, mixtures), of fine-tuned mixtures on sealed rows.
        problems: what a way of choosing sees, by seed.
        shares: (seeds,), of the model trained on equal shares of all for as many steps; empty if there is none.
        lent: the noise of the same case otherwise trained.
    """

    name: str
    way: str
    aside: bool
    truth: Floats
    problems: Sequence[Mapping[str, Any]]
    shares: Floats
    lent: float = float("nan")

    @property
    def mean(self) -> Floats:
        found: Floats = self.truth.mean(0)
        return found

    @property
    def noise(self) -> float:
        """Standard deviation of a training with another seed."""
        return float(np.sqrt(self.truth.var(0, ddof=1).mean())) if len(self.truth) > 1 else self.lent

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
        pairs = [
            (one["surrogates"][surrogate].mean(1), truth)
            for one, truth in zip(self.problems, self.truth, strict=True)
            if surrogate in one["surrogates"]
        ]
        if not pairs or larger.sum() < 3:
            return float("nan")
        return float(np.mean([np.corrcoef(said[larger], truth[larger])[0, 1] for said, truth in pairs]))

    @property
    def lost_by_shares(self) -> float:
        """Regret of equal shares of all, which may be better than the best mixture; NaN where it was not trained."""
        return float(self.mean.max() - self.shares.mean()) / self.spread if len(self.shares) else float("nan")

    def regret(self, choice: int, seed: int) -> float:
        """As a share of the spread."""
        return float(self.mean.max() - self.truth[seed, choice]) / self.spread


def read(folder: Path) -> list[Study]:
    """All studies in the tables of a folder."""
    groups: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for path in sorted(folder.glob("*-?.npz")):
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        facts = json.loads(str(arrays.pop("facts")))
        for variant in sorted(folder.glob(f"{path.stem}-*.npz")):
            with np.load(variant) as file:
                arrays |= {name: file[name] for name in file.files if name.endswith(".values")}
        for way in ("union", "shares"):
            if way in facts:
                groups[facts["case"], f"{way}, {facts['schedule']}"].append((facts, arrays, way))
    studies = [study(name, way, tables) for (name, way), tables in groups.items()]
    noise = {one.name: one.noise for one in studies if len(one.truth) > 1}
    return [replace(one, lent=noise.get(one.name, float("nan"))) for one in studies]


def study(name: str, way: str, tables: Sequence[Any]) -> Study:
    truth, problems, shares = [], [], []
    for facts, arrays, kind in tables:
        names = facts["candidates"]
        surrogates = {
            one.removesuffix(".values"): values.astype(np.float64)
            for one, values in arrays.items()
            if one.endswith(".values") and not one.startswith(("union", "shares", "base", "singles"))
        }
        truth.append(arrays[f"{kind}.test.values"].astype(np.float64).mean(1))
        if "shares" in facts:
            shares.append(float(arrays["shares.test.values"][-1].astype(np.float64).mean()))
        if {"summed_0", "base"} <= {*surrogates, *(one.removesuffix(".values") for one in arrays)}:
            surrogates["quadratic"] = quadratic(arrays)[:, None]
        if slopes := facts.get("gradient"):
            surrogates["first order"] = first_order(arrays["members"], slopes)[:, None]
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
    return Study(name, way, bool(tables[0][0]["aside"]), np.array(truth), problems, np.array(shares))


def first_order(members: NDArray[np.bool_], slopes: Sequence[float]) -> Floats:
    """What the derivative of the likelihood by the adapters' weights, at the average of all, says of other averages (GradEx)."""
    weights = members / members.sum(1, keepdims=True)
    said: Floats = (weights - weights[-1]) @ np.array(slopes)
    return said


def quadratic(arrays: Mapping[str, Any]) -> Floats:
    """What a second-order model of the score in the adapters' weights says of averages, fitted to base, singles and pairs.

    Σ wᵢ gᵢ + ½ Σ wᵢ wⱼ hᵢⱼ, of the average and of the sum of every pair, so that N (N + 1) + 1 scores stand for 2^N - 1.
    """
    members = arrays["members"].astype(float)
    size = members.sum(1)
    few = size <= 2
    weights = np.concatenate([(members / size[:, None])[few], members[few]])
    scores = np.concatenate([arrays["merged.values"].mean(1, dtype=float)[few], arrays["summed_0.values"][few, 0]])
    base = float(arrays["base.values"].mean(dtype=float))
    place = np.triu_indices(members.shape[1])

    def terms(of: Floats) -> Floats:
        return np.concatenate([of, of[:, place[0]] * of[:, place[1]]], 1)

    known = np.isfinite(scores)
    found, *_ = np.linalg.lstsq(terms(weights[known]), scores[known] - base)
    said: Floats = base + terms(members / size[:, None]) @ found
    return said


def lost(studies: Sequence[Study], way: Way) -> Lost:
    """What a way of choosing loses."""
    regrets, asked = [], []
    for one in studies:
        mine = []
        for seed, fields in enumerate(one.problems):
            problem = Problem(**fields)
            mine.append(one.regret(way(problem), seed))
            asked.append(len(problem.asked))
        regrets.append(float(np.mean(mine)))
    return regrets, float(np.mean(asked))


def priors(studies: Sequence[Study]) -> dict[str, Prior]:
    """Case -> what is fitted on all others."""
    names = list(dict.fromkeys(one.name for one in studies))
    return {name: fitted(cases([one for one in studies if one.name != name])) for name in names}


def cases(studies: Sequence[Study]) -> list[list[Problem]]:
    names = dict.fromkeys(one.name for one in studies)
    return [[Problem(**fields) for one in studies if one.name == name for fields in one.problems] for name in names]


def left_out(studies: Sequence[Study], fine_tunes: int, fits: Mapping[str, Prior], **options: Any) -> Lost:
    """As `lost`, of sequential fine-tunes."""
    found = [lost([one], sequential(fine_tunes, fits[one.name], **options)) for one in studies]
    return [regrets[0] for regrets, _ in found], float(np.mean([asked for _, asked in found]))


def ways(fine_tunes: int) -> dict[str, Way]:
    """Ways of choosing with so many fine-tunes."""
    if fine_tunes == 0:
        found = {"all": all_together, "best single": best_single, "most similar": most_similar, "both": by_both}
        found["every mixture fine-tuned"] = lambda problem: best_of(problem, range(len(problem.members)))
        return found | {name: by(name) for name in SURROGATES}
    return {
        "merged, all": verified(["merged"], fine_tunes),
        "ensemble, all": verified(["ensemble"], fine_tunes),
        "both, all": verified(["merged", "ensemble"], fine_tunes),
        "both": verified(["merged", "ensemble"], fine_tunes, with_all=False),
    }


def show_cases(studies: Sequence[Study], terminal: Terminal) -> None:
    """What there was to choose from, and how well each surrogate orders it."""
    names = SURROGATES
    rows = []
    for one in studies:
        figures = [f"{value:.3f}" for value in (one.mean.max(), np.median(one.mean), one.noise, one.reliability)]
        known = [one.correlation(name) for name in names]
        rows.append([one.name, one.way, str(len(one.truth)), str(one.truth.shape[1]), *figures, *map(share, known)])
    columns = ["", "way", "seeds", "mixtures", "best", "median", "noise", "reliability"]
    terminal.table("cases", [*columns, *(f"r {name}" for name in names)], rows)


def mean(values: Sequence[float]) -> str:
    return share(float(np.mean(values))) if values else "–"


def show_variants(studies: Sequence[Study], terminal: Terminal) -> None:
    """The derivative, and merging of adapters that were trained in other ways: r and regret of its choice, of the same seeds."""
    rows = []
    for one in studies:
        for seed, fields in enumerate(one.problems):
            problem = Problem(**fields)
            larger, others = problem.counts > 1, [name for name in problem.surrogates if name not in SURROGATES]
            for name in ["merged", *others] if others else []:
                said = problem.score(name)
                r = np.corrcoef(said[larger], one.truth[seed][larger])[0, 1] if larger.sum() > 2 else np.nan
                rows.append([one.name, one.way, str(seed), name, share(r), share(one.regret(int(said.argmax()), seed))])
    if rows:
        terminal.table("beside merging", ["", "way", "seed", "surrogate", "r", "regret"], rows)


def share(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.2f}"


def show(
    studies: Sequence[Study], fine_tunes: int, by_case: bool, fits: Mapping[str, Prior], terminal: Terminal
) -> None:
    """Prints what every way of choosing loses."""
    noise = np.array([one.noise / one.spread for one in studies])
    found: dict[str, tuple[list[float], float]] = {}
    for name, way in ways(fine_tunes).items():
        needed = name.split(",")[0]
        if needed not in SURROGATES or all(needed in one.problems[0]["surrogates"] for one in studies):
            found[name] = lost(studies, way)
    if fine_tunes == 0:
        found["random"] = [float(one.mean.max() - one.mean.mean()) / one.spread for one in studies], 0.0
        found["equal shares of all"] = [one.lost_by_shares for one in studies], 0.0
    else:
        found["beliefs (m2m select)"] = left_out(studies, fine_tunes, fits)
        found["beliefs, without all"] = left_out(studies, fine_tunes, fits, with_all=False)
    rows = []
    for name, (regrets, asked) in found.items():
        figures = [
            share(float(of([value for value in values if np.isfinite(value)] or [np.nan])))
            for values in (regrets, np.array(regrets) / noise)
            for of in (np.mean, np.max)
        ]
        rows.append([name, f"{asked:.1f}", *figures, *(share(one) for one in regrets if by_case)])
    columns = ["", "asked for", "mean regret", "worst", "in noise", "worst"]
    terminal.table(f"{fine_tunes} fine-tunes", [*columns, *(one.name[:12] for one in studies if by_case)], rows)


def show_calibration(studies: Sequence[Study], fine_tunes: int, fits: Mapping[str, Prior], terminal: Terminal) -> None:
    """How often what is said of a choice is true: bounds of what the best is better by, and the noise of a training."""
    inside: dict[float, list[bool]] = defaultdict(list)
    said, true, worth, gained = [], [], [], []
    for one in studies:
        for seed, fields in enumerate(one.problems):
            problem = Problem(**fields)
            beliefs = believed(problem, fine_tunes, fits[one.name])
            behind, noise = beliefs.behind(row_errors(problem, beliefs.best))
            gap = one.regret(beliefs.best, seed) * one.spread
            for level in LEVELS:
                inside[level].append(bool(gap <= np.quantile(behind, level) + 1e-9))
            if np.isfinite(one.noise):
                said.append(float((behind <= noise).mean()))
                true.append(bool(gap <= one.noise))
            if following := beliefs.next():
                worth.append(beliefs.beaten_by(following[0]))
                gained.append(problem.fine_tune(following[0]) > beliefs.mean[beliefs.best])
    rows = [
        [f"at most behind, {level:.0%}", str(len(of)), f"{level:.2f}", share(float(np.mean(of)))]
        for level, of in inside.items()
    ]
    for low, high in zip(BINS, [*BINS[1:], 1.01], strict=True):
        kept = [number for number, value in enumerate(said) if low <= value < high]
        figures = [mean([part[number] for number in kept]) for part in (said, true)]
        rows.append([f"within noise, {low:g} to {min(high, 1):g}", str(len(kept)), *figures])
    rows.append(["within noise, all", str(len(said)), mean(said), mean(true)])
    rows.append(["one more is better", str(len(worth)), mean(worth), mean(gained)])
    terminal.table(f"said after {fine_tunes} fine-tunes", ["", "choices", "said", "true"], rows)


def row_errors(problem: Problem, chosen: int) -> Floats:
    """Standard errors over rows of the differences from the chosen mixture, as the merged models have them."""
    rows = problem.surrogates["merged"]
    errors: Floats = np.nan_to_num((rows - rows[chosen]).std(1, ddof=1)) / np.sqrt(rows.shape[1])
    return errors


def show_behind(studies: Sequence[Study], fine_tunes: int, fits: Mapping[str, Prior], terminal: Terminal) -> None:
    """By how many standard deviations of a training the choice is behind plain ways of training, at worst."""
    rows = []
    for one in studies:
        behind: dict[str, list[float]] = defaultdict(list)
        for seed, fields in enumerate(one.problems):
            problem, truth = Problem(**fields), one.truth[seed]
            score = truth[believed(problem, fine_tunes, fits[one.name]).best]
            behind["all"].append(truth[problem.everything] - score)
            behind["best single"].append(max(truth[problem.singles]) - score)
            behind["equal shares of all"].append(one.shares[seed] - score if len(one.shares) else float("nan"))
        rows.append([one.name, one.way, *(share(max(values) / one.noise) for values in behind.values())])
    terminal.table(f"behind, after {fine_tunes} fine-tunes, in noise", ["", "way", *behind], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, default=HERE / "tables")
    parser.add_argument("--fine_tunes", type=int, nargs="*", default=[0, 1, 2, 3, 5])
    parser.add_argument("--way", default="", help="only this way of training, such as 'union, epochs'")
    parser.add_argument("--aside", action="store_true", help="the cases that were set aside, instead of the others")
    parser.add_argument("--cases", action="store_true", help="regret of each case")
    parser.add_argument("--fit", action="store_true", help="only print the prior that is fitted on all these cases")
    given = parser.parse_args()
    studies = [one for one in read(given.tables) if one.aside == given.aside and one.way.startswith(given.way)]
    if not studies:
        raise SystemExit(f"{given.tables}: no such tables; measure.py makes them")
    terminal = Terminal()
    if given.fit:
        terminal.say(str(fitted(cases(studies))))
        return
    show_cases(studies, terminal)
    show_variants(studies, terminal)
    # Cases that were set aside are judged by what the others have taught.
    fits = dict.fromkeys({one.name for one in studies}, Prior()) if given.aside else priors(studies)
    for fine_tunes in given.fine_tunes:
        show(studies, fine_tunes, given.cases, fits, terminal)
    for fine_tunes in filter(None, given.fine_tunes):
        show_calibration(studies, fine_tunes, fits, terminal)
        show_behind(studies, fine_tunes, fits, terminal)


if __name__ == "__main__":
    main()
