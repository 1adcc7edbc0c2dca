"""What a search is asked to do, from its configuration: the mixtures it may propose, and the name of its objective."""

import math
from collections.abc import Mapping
from typing import Any

from m2m_hf.config.run_config import MERGE_PARAMETERS, MergeToMixConfig
from m2m_hf.core.space import SearchSpace
from m2m_hf.errors import InputError


def search_space(config: MergeToMixConfig, tokens: Mapping[str, float], failed: Mapping[str, str]) -> SearchSpace:
    """The mixtures of candidates that have, or will have, an expert; `failed` says why the training of one failed."""
    candidates = config.parsed_candidates
    allowed = config.licenses
    unlicensed = [name for name, one in candidates.items() if allowed and one.license not in allowed]
    for name in unlicensed:
        if candidates[name].required:
            raise InputError(
                f"candidates.{name}: it is required, but its license {candidates[name].license!r} is not among licenses"
            )
    names = [name for name, one in candidates.items() if not one.excluded and name not in unlicensed]
    if not names:
        raise InputError("every candidate is excluded, by itself or by licenses: no mixture is possible")
    for name, reason in failed.items():
        if candidates[name].required:
            raise InputError(f"candidates.{name}: it is required, but has no adapter: {reason}")
    names = [name for name in names if name not in failed]
    if not names:
        raise InputError(
            f"no eligible candidate has an adapter: {'; '.join(failed.values())}. Fix that and choose "
            "another --output_dir, or delete OUT/adapters to train all again"
        )
    costs = {name: tokens.get(name, 0.0) if one.cost is None else one.cost for name, one in candidates.items()}
    return SearchSpace(
        tuple(names),
        frozenset(name for name in names if candidates[name].required),
        config.min_datasets,
        config.max_datasets,
        costs,
        math.inf if config.max_cost is None else config.max_cost,
        config.weights == "continuous",
    )


def merge_label(method: str, parameters: Mapping[str, Any], seed: int) -> str:
    """The objective's name in the journal: `merged` for the average, else the method with all of its parameters."""
    if method == "average":
        return "merged"
    shown = {**MERGE_PARAMETERS[method], **parameters} | ({"seed": seed} if method == "dare" else {})
    return f"{method}({', '.join(f'{key}={value:g}' for key, value in shown.items())})"


def objective_name(config: MergeToMixConfig, seed: int) -> str:
    """The same for the objective of a run."""
    if config.objective != "merged":
        return config.objective
    return merge_label(config.merge_method, config.merge_parameters, seed)
