"""What a correlation study found, as `fidelity.json` holds it; and what was fine-tuned to verify a choice."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from m2m_hf.analysis.fidelity import Agreement
from m2m_hf.core.jsonable import OPTIONAL, Measurement
from m2m_hf.core.mixture import Mixture


@dataclass(frozen=True)
class Figures:
    """What a mixture scored, the mean over the targets; None where it failed."""

    score: float | None
    stderr: float | None
    logprob: float | None = None
    targets: Mapping[str, float | None] | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True)
class StudiedMixture:
    """A mixture that was fine-tuned (`trained`), and what the surrogates said of it."""

    mixture: Mixture
    rows: int
    steps: int
    seconds: float
    trained: Figures
    merged: Figures
    ensemble: Figures | None = field(default=None, metadata=OPTIONAL)

    def predicted(self, surrogate: str) -> Figures:
        figures: Figures = getattr(self, surrogate)
        return figures


@dataclass(frozen=True)
class FailedMixture:
    """A mixture that could not be fine-tuned and scored."""

    mixture: Mixture
    reason: str


@dataclass(frozen=True)
class Verdict:
    """A key of `fidelity.VERDICTS`, and why."""

    verdict: str
    why: str


@dataclass(frozen=True)
class Resilience:
    """How the surrogate sees mixtures that hurt; see `study_statistics.resilience`."""

    mixtures: int
    hurt: int
    noticed: int
    surrogate: float | None
    trained: float | None
    shielded: Measurement | None


@dataclass(frozen=True)
class BaselineScore:
    """A score, and how much higher it is than the chosen mixture's on the same rows."""

    score: float
    stderr: float | None
    over_chosen: Measurement | None


@dataclass(frozen=True)
class Baseline:
    """What one way of choosing comes to, fine-tuned."""

    mixture: Mixture
    rows: int
    steps: int
    validation: BaselineScore | None
    test: BaselineScore | None


@dataclass(frozen=True)
class StudyReport:
    """A correlation study.

    Args:
        fingerprint: of the run that it belongs to.
        uniform: by what rule mixtures of different size were trained alike.
        all_mixtures: whether these are all mixtures that may be chosen.
        agreement: surrogate -> measure -> how well it predicts.
        verdict: surrogate -> whether it can be trusted here.
        training_noise: by how much two trainings on the same rows differ.
        similarity: candidate -> cosine with the targets.
        baselines: by the name of the way of choosing.
    """

    fingerprint: str
    uniform: str
    all_mixtures: bool
    mixtures: tuple[StudiedMixture, ...]
    failed: tuple[FailedMixture, ...]
    agreement: Mapping[str, Mapping[str, Agreement]]
    verdict: Mapping[str, Verdict]
    training_noise: float | None
    resilience: Mapping[str, Mapping[str, Resilience]]
    similarity: Mapping[str, float]
    baselines: Mapping[str, Baseline]


@dataclass(frozen=True)
class Verification:
    """The mixtures that were fine-tuned before choosing (`verify_top_k`); `by_search` is what the search alone would choose."""

    by_search: Mixture
    uniform: str
    mixtures: tuple[StudiedMixture, ...]
    failed: tuple[FailedMixture, ...]
    agreement: Mapping[str, Mapping[str, Agreement]]
    training_noise: float | None
    baselines: Mapping[str, Baseline] | None
