"""How a long run behaves: the search loop and the journal over very many made-up trials with very many values each.

    python recipes/long_run.py --trials 30000 --rows 20000

Nothing is trained or scored by a model; the journal is real, on the disk, in a folder that is deleted at the end.
"""

import sys

sys.path[0] += "/support"  # not this folder, whose select.py would hide the standard library's

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from replay import Landscape

from m2m_hf.analysis.shapley import shapley_values
from m2m_hf.core.arrays import LazyArray
from m2m_hf.core.mixture import Mixture
from m2m_hf.core.score import Score
from m2m_hf.core.space import SearchSpace
from m2m_hf.core.trial import Standing
from m2m_hf.reporting.conclude import joining
from m2m_hf.search.loop import search
from m2m_hf.search.strategies import exhaustive
from m2m_hf.storage.journal import Journal


class LongValidation(Landscape):
    """A made-up target with very many rows: whether each is right, and the log-probability of its right answer."""

    order: tuple[int, ...] = ()

    def __init__(self, names: list[str], rows: int) -> None:
        super().__init__(lambda mixture: 0.0)
        draw = np.random.default_rng(0)
        self.examples = rows
        self._hard = draw.normal(size=rows)
        self._effects = {name: draw.normal(scale=0.2) for name in names}

    def __call__(self, mixtures, rows=None):  # type: ignore[no-untyped-def]
        found = []
        for mixture in mixtures:
            draw = np.random.default_rng(abs(hash(mixture.items)) % 2**32)
            level = sum(weight * self._effects[name] for name, weight in mixture.items) - self._hard
            logprobs = -np.logaddexp(0, -(level + 0.3 * draw.normal(size=self.examples)))
            found.append(Score.of(LazyArray.of(logprobs > np.log(0.5)), LazyArray.of(logprobs)))
        return found


def memory() -> float:
    """GB that this process has had in memory at most and that were not the page cache's."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["RssAnon"].split()[0]) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=30_000)
    parser.add_argument("--rows", type=int, default=20_000)
    given = parser.parse_args()
    names = [f"c{number:02}" for number in range(int(np.ceil(np.log2(given.trials))))]
    times: list[float] = []

    def tick(standing: Standing, best: Standing | None) -> None:
        times.append(time.monotonic())
        if len(times) % 2000 == 0:
            pace = (times[-1] - times[-1001]) / 1000
            print(f"{len(times):,} trials, {1000 * pace:.1f} ms each, {memory():.2f} GB", flush=True)

    with tempfile.TemporaryDirectory(prefix="m2m-long-") as folder:
        path = Path(folder) / "trials.jsonl"
        objective = LongValidation(names, given.rows)
        start = time.monotonic()
        result = search(
            exhaustive, SearchSpace(tuple(names)), [objective], Journal(path), names=names, costs=dict.fromkeys(names, 1.0),
            on_standing=tick,
        )  # fmt: skip
        paces = np.diff(times)
        part = len(paces) // 10
        size = sum(file.stat().st_size for file in Path(folder).iterdir()) / 1e9
        print(
            f"{len(times):,} trials of {given.rows:,} rows: {time.monotonic() - start:.0f} s, {1000 * paces[:part].mean():.1f} "
            f"ms each over the first tenth, {1000 * paces[-part:].mean():.1f} ms over the last; {size:.1f} GB on the disk, "
            f"{memory():.2f} GB in memory"
        )
        start = time.monotonic()
        journal = Journal(path)
        print(
            f"journal read again: {time.monotonic() - start:.1f} s, {len(journal.trials):,} trials, {memory():.2f} GB"
        )
        start = time.monotonic()
        again = search(
            exhaustive, SearchSpace(tuple(names)), [objective], journal, names=names, costs=dict.fromkeys(names, 1.0)
        )
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
