"""What the tests of searches share: spaces, made-up scores of every mixture, and searches over them."""

import json
from pathlib import Path

import numpy as np

from m2m_hf.core.mixture import BASE, Mixture
from m2m_hf.core.score import Score
from m2m_hf.core.space import SearchSpace
from m2m_hf.search.loop import search
from m2m_hf.search.measure import SearchState
from m2m_hf.search.result import SearchResult
from m2m_hf.search.strategies import exhaustive
from m2m_hf.storage.journal import Journal

NAMES = tuple("abcdefg")
COSTS = {name: float(number + 1) for number, name in enumerate(NAMES)}
SPACES = {
    "all": SearchSpace(NAMES),
    "required": SearchSpace(NAMES, required=frozenset({"e", "g"})),
    "sizes": SearchSpace(NAMES, min_datasets=2, max_datasets=3),
    "cost": SearchSpace(NAMES, costs=COSTS, max_cost=8.0),
    "everything": SearchSpace(NAMES[1:], frozenset({"d"}), 2, 4, COSTS, 14.0),
}
FIVE = SearchSpace(NAMES[:5])


def table(seed: int, rows: int = 300, binary: bool = True, spread: float = 0.3) -> dict[Mixture, Score]:
    """Scores of all mixtures of five: each row is harder or easier for all, and candidates differ by what is drawn for them."""
    draw = np.random.default_rng(seed)
    ease, gifts = draw.normal(size=rows), draw.normal(scale=spread, size=len(FIVE.names))
    scores = {BASE: Score.of([0.0] * rows, [-9.0] * rows)}
    for mixture in FIVE.subsets():
        ability = sum(gifts[FIVE.names.index(name)] for name in mixture.names) / len(mixture)
        values = ease + ability + draw.normal(scale=0.5, size=rows)
        values = (values > 0).astype(float) if binary else values
        scores[mixture] = Score.of(values.tolist(), (values - 10).tolist())
    return scores


def without_time(value):
    """Broadcasts no time: two runs differ in nothing else."""
    return 0.0 if isinstance(value, float) else value


def run(objective, path: Path, strategy=exhaustive, space=FIVE, names=None, **options) -> SearchResult:
    """A search over one objective or several, with the options of `SearchState` and `search`."""
    objectives = objective if isinstance(objective, list) else [objective]
    given = {name: options.pop(name) for name in ("callbacks", "budget", "failed") if name in options}
    state = SearchState(space, objectives, Journal(path), broadcast=without_time, **given)
    return search(state, strategy, names or space.names, **options)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
