"""How a long run behaves: the search loop and the journal over very many made-up trials with very many values each.

    python recipes/long_run.py --trials 30000 --rows 20000

Nothing is trained or scored by a model; the journal is real, on the disk, in a folder that is deleted at the end.
"""

import sys

del sys.path[0]  # this folder, whose select.py would hide the standard library's

import argparse
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from m2m_hf.analysis.shapley import shapley_values
from m2m_hf.core.arrays import LazyArray
from m2m_hf.core.mixture import Mixture
from m2m_hf.core.objective import Objective, TargetInfo
from m2m_hf.core.score import Failure, Score
from m2m_hf.core.space import SearchSpace
from m2m_hf.core.trial import Standing
from m2m_hf.reporting.conclude import joining
from m2m_hf.search.callbacks import SearchCallback, SearchControl
from m2m_hf.search.loop import search
from m2m_hf.search.measure import SearchState
from m2m_hf.search.strategies import exhaustive
from m2m_hf.storage.journal import Journal


class LongValidation(Objective):
    """A made-up target with very many rows: each is right or wrong, and has the log-probability of its right answer."""

    name = "made up"

    def __init__(self, names: list[str], rows: int) -> None:
        super().__init__(TargetInfo("long", rows))
        draw = np.random.default_rng(0)
        self._hard = draw.normal(size=rows)
        self._effects = {name: draw.normal(scale=0.2) for name in names}

    def key(self, mixture: Mixture, rung: int | None = None) -> str:
        return str(mixture.items)

    def _score(self, mixtures: Sequence[Mixture], rows: Sequence[int] | None) -> list[Score | Failure]:
        scores: list[Score | Failure] = []
        for mixture in mixtures:
            draw = np.random.default_rng(abs(hash(mixture.items)) % 2**32)
            level = sum(weight * self._effects[name] for name, weight in mixture.items) - self._hard
            logprobs = -np.logaddexp(0, -(level + 0.3 * draw.normal(size=self.target.examples)))
            scores.append(Score.of(LazyArray.of(logprobs > np.log(0.5)), LazyArray.of(logprobs)))
        return scores


class Pace(SearchCallback):
    """Notes when every mixture was settled, and prints the pace now and then."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_standing(self, standing: Standing, best: Standing | None, control: SearchControl) -> None:
        self.times.append(time.monotonic())
        if len(self.times) % 2000 == 0:
            pace = (self.times[-1] - self.times[-1001]) / 1000
            print(f"{len(self.times):,} trials, {1000 * pace:.1f} ms each, {memory():.2f} GB", flush=True)


def memory() -> float:
    """GB of memory that this process uses, without the page cache."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["RssAnon"].split()[0]) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=30_000)
    parser.add_argument("--rows", type=int, default=20_000)
    given = parser.parse_args()
    names = [f"c{number:02}" for number in range(int(np.ceil(np.log2(given.trials))))]
    pace = Pace()
    with tempfile.TemporaryDirectory(prefix="m2m-long-") as folder:
        path = Path(folder) / "trials.jsonl"
        objective = LongValidation(names, given.rows)
        start = time.monotonic()
        space = SearchSpace(tuple(names))
        result = search(SearchState(space, [objective], Journal(path), [pace]), exhaustive, names)
        paces = np.diff(pace.times)
        size = sum(file.stat().st_size for file in Path(folder).iterdir()) / 1e9
        first, last = (1000 * part.mean() for part in (paces[: len(paces) // 10], paces[-(len(paces) // 10) :]))
        print(
            f"{len(pace.times):,} trials of {given.rows:,} rows: {time.monotonic() - start:.0f} s, {first:.1f} ms each over the "
            f"first tenth, {last:.1f} ms over the last; {size:.1f} GB on the disk, {memory():.2f} GB in memory"
        )
        start = time.monotonic()
        journal = Journal(path)
        print(
            f"journal read again: {time.monotonic() - start:.1f} s, {len(journal.trials):,} trials, {memory():.2f} GB"
        )
        start = time.monotonic()
        again = search(SearchState(space, [objective], journal), exhaustive, names)
        same = [one.mixture for one in again.ranking] == [one.mixture for one in result.ranking]
        print(f"search resumed: {time.monotonic() - start:.1f} s, {again.measured} measured, the same ranking: {same}")
        start = time.monotonic()
        found = shapley_values(again.standings, names)
        harm = [np.mean(joining(again.standings, name)) for name in names]
        print(
            f"Shapley values and harm: {time.monotonic() - start:.1f} s, {memory():.2f} GB, best "
            f"{max(found.shapley, key=lambda name: found.shapley[name].value) if found else None}, "
            f"{names[int(np.argmax(harm))]}; "
            f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB with the page cache; chosen "
            f"{Mixture.subset(again.best.mixture.names)}"
        )


if __name__ == "__main__":
    main()
