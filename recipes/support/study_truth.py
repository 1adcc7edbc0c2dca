"""The correlation study of a run as the truth that recipes compare surrogates with."""

from collections.abc import Sequence

from m2m_hf.core.mixture import Mixture
from m2m_hf.core.trial import Standing
from m2m_hf.merging.methods import MergeMethod
from m2m_hf.run.comparison import read_study, study_fidelity
from m2m_hf.run.context import RunContext
from m2m_hf.search.result import SearchResult


def fine_tuned_truth(run: RunContext, result: SearchResult) -> tuple[list[Mixture], list[Standing], bool]:
    """(mixtures, how they stand fine-tuned, whether these are all) of the correlation study, made where it is missing."""
    found = read_study(run) or study_fidelity(run, result, unseal=False)
    mixtures = [Mixture.of(one["mixture"]) for one in found["mixtures"]]
    return mixtures, run.study.trained_standings(mixtures, result.base), found["all_mixtures"]


def surrogate_standings(
    run: RunContext, mixtures: Sequence[Mixture], kind: str = "merged", method: MergeMethod | None = None
) -> list[Standing]:
    """How mixtures stand by a surrogate, `merged` (by another merge method if given) or `ensemble`, on all rows."""
    label = (method or run.merge_method).label if kind == "merged" else kind
    return run.study.standings(run.objectives(kind, method), mixtures, f"scoring mixtures, {label}")
