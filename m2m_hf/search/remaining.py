"""How many mixtures a search still has to score, from its configuration and its journal."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from m2m_hf.config.run_config import MergeToMixConfig
from m2m_hf.core.mixture import BASE, Mixture
from m2m_hf.core.space import SearchSpace
from m2m_hf.core.trial import Trial
from m2m_hf.search.model_based import FEW, choose_strategy
from m2m_hf.search.result import default_budget

MAX_KEPT = 1000  # subsets that an ensemble search keeps


@dataclass(frozen=True)
class Remaining:
    """What is left of a search: at most `mixtures` of `total`. `exact` where the strategy scores all mixtures."""

    mixtures: int
    total: int
    exact: bool


def remaining(
    config: MergeToMixConfig, space: SearchSpace, failed: Collection[str], trials: Sequence[Trial]
) -> Remaining:
    """Counts as the search would: constraints, costs, licences and budgets included.

    Args:
        failed: the candidates that have no expert.
        trials: the lines of the journal that belong to the run as it is now.
    """
    candidates = list(config.parsed_candidates)
    together = Mixture.subset([name for name in candidates if name not in failed])
    first = list(dict.fromkeys([BASE, *(Mixture.subset([name]) for name in candidates), together]))
    known = last_trials(trials, config.parsed_targets)
    exact = scores_all(config, space)
    missing: float
    total: float
    if exact:
        wanted = list(islice(dict.fromkeys([*first, *space.subsets()]), config.max_trials))
        missing = sum(mixture not in known for mixture in wanted)
        total = len(wanted)
    else:
        total = min(config.max_trials or math.inf, len(first) + proposals(config, space))
        if not space.continuous:
            total = min(total, len({*first, *islice(space.subsets(), int(total))}))
        missing = max(0, total - len(known))
    fixed = sum(mixture not in known for mixture in first)
    return Remaining(int(min(missing, fixed + affordable(config, known))), int(total), exact)


def scores_all(config: MergeToMixConfig, space: SearchSpace) -> bool:
    """True if the strategy scores every mixture that may be chosen."""
    few = config.objective != "ensemble" or space.at_most(FEW)
    if config.strategy == "auto" and few:
        return choose_strategy(space, False, config.max_trials or 0)[0] == "exhaustive"
    return config.strategy == "exhaustive" and few


def proposals(config: MergeToMixConfig, space: SearchSpace) -> int:
    """How many mixtures a strategy proposes at most that does not score all."""
    if config.objective == "ensemble" and config.strategy in ("auto", "exhaustive"):
        return MAX_KEPT
    return default_budget(len(space.names))


def last_trials(trials: Sequence[Trial], targets: Collection[str]) -> dict[Mixture, dict[str, Trial]]:
    """Mixture -> target -> the trial that saw most rows, of mixtures that were scored on all targets."""
    found: dict[Mixture, dict[str, Trial]] = {}
    for trial in trials:
        known = found.setdefault(trial.mixture, {})
        if trial.target in targets and (trial.target not in known or known[trial.target].rung <= trial.rung):
            known[trial.target] = trial
    return {mixture: known for mixture, known in found.items() if len(known) == len(targets)}


def affordable(config: MergeToMixConfig, known: Mapping[Mixture, Mapping[str, Trial]]) -> float:
    """How many more mixtures the budgets of rows and seconds allow."""
    spent = [trial for of in known.values() for trial in of.values()]
    if config.max_seconds is not None and sum(trial.seconds for trial in spent) >= config.max_seconds:
        return 0
    rows = sum(trial.rung for trial in known[BASE].values()) if BASE in known else 0
    if config.max_example_evaluations is None or not rows:
        return math.inf
    return math.ceil(max(0, config.max_example_evaluations - sum(trial.rung for trial in spent)) / rows)
