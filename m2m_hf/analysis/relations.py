"""How candidates and their experts relate: what each teaches about every other, what they share, who was trained too long."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import NormalDist

from m2m_hf.core.jsonable import Measurement

MOST = 0.5  # of the smaller candidate's rows: two that share more are near copies
ALIKE = 0.9  # cosine; adapters of the same rows in another order came to 0.56 and 0.66, of opposite answers to 0.70
LEVEL = 0.05  # of a one-sided test over all experts together


@dataclass(frozen=True)
class Pair:
    """Two candidates: how many rows they share, and how alike their experts' changes are; see `merging/likeness.py`.

    Cosine and sign conflict are NaN where one has no expert, or they change no weight in common.
    """

    pair: tuple[str, str]
    shared_rows: int
    cosine: float = math.nan
    sign_conflict: float = math.nan


@dataclass(frozen=True)
class HalfStrength:
    """The targets' log-probability with half of an expert's change: less that with all of it, and less the base model's.

    `score` is what the targets' own scores gain over those of the whole expert; NaN where these have no values by row.
    """

    over_whole: Measurement
    over_base: Measurement
    score: float = math.nan


@dataclass(frozen=True)
class Relations:
    """How candidates and their experts relate.

    Args:
        rows: candidate -> how many of its rows were asked; none that fit into the model where it is not there.
        base: candidate -> mean log-probability under the base model, of a token or, of a classifier, of the right label.
        gains: candidate -> expert -> what this expert alone adds to that.
        pairs: of all candidates.
        half_strength: expert -> what half of it does; empty where a target is not scored by log-probabilities.
    """

    rows: Mapping[str, int] = field(default_factory=dict)
    base: Mapping[str, float] = field(default_factory=dict)
    gains: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    pairs: tuple[Pair, ...] = ()
    half_strength: Mapping[str, HalfStrength] = field(default_factory=dict)

    def near_copies(self, sizes: Mapping[str, int]) -> Iterator[Pair]:
        """Pairs that share most rows of the smaller one, or whose experts are nearly the same; `sizes` in rows."""
        for one in self.pairs:
            if one.shared_rows > MOST * min(sizes[name] for name in one.pair) or one.cosine >= ALIKE:
                yield one

    def over_trained(self) -> dict[str, HalfStrength]:
        """Experts that do better at half strength than whole, and than the base model, by more than chance on these rows.

        One-sided tests of paired differences; of so many experts each has its share of `LEVEL` (Bonferroni). An expert that is
        only too sure of its answers, so that half of it scores lower, is not among them.
        """
        if not self.half_strength:
            return {}
        critical = NormalDist().inv_cdf(1 - LEVEL / len(self.half_strength))

        def sure(gain: Measurement) -> bool:
            return gain.value > critical * (gain.stderr or 0.0)

        found = {
            name: one
            for name, one in self.half_strength.items()
            if sure(one.over_whole) and sure(one.over_base) and not one.score < 0
        }
        return dict(sorted(found.items(), key=lambda item: -item[1].over_whole.value))
