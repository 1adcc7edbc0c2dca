"""Measures how the candidates and experts of a run relate, once, after its search."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from m2m_hf.analysis.relations import HalfStrength, Pair, Relations
from m2m_hf.core.jsonable import Measurement, from_json, to_json
from m2m_hf.core.mixture import Mixture
from m2m_hf.core.objective import race_order
from m2m_hf.core.score import Score, mean_over_targets
from m2m_hf.merging.dense_stack import Stack
from m2m_hf.merging.likeness import likeness
from m2m_hf.merging.methods import AVERAGE
from m2m_hf.modeling.devices import broadcast
from m2m_hf.run.context import RunContext
from m2m_hf.scoring.causal_lm import LossScorer
from m2m_hf.scoring.probing import settle
from m2m_hf.scoring.scorers import LogprobScorer, Scorer
from m2m_hf.search.result import SearchResult
from m2m_hf.storage.files import fingerprint, read_json_or_empty, write_json

ASKED = 128  # rows of a candidate, those of all experts together: as much as training on 43 of them
MOST, LEAST = 64, 16  # rows of a candidate that an expert is asked
ROWS, MORE = 32, 256  # of a target, to see what half of an expert does; more where that may be better


def find_relations(run: RunContext, result: SearchResult) -> Relations:
    """How candidates and experts relate; kept in the run folder (collective)."""
    path, key = run.folder.trained / "relations.json", fingerprint([ASKED, ROWS, MORE, run.study_fingerprint])
    known = broadcast(read_json_or_empty(path))
    if known.get("fingerprint") == key:
        return from_json(Relations, known)
    stack = run.open_stack(AVERAGE)
    scorers, scores = taught(run, stack, min(MOST, max(LEAST, ASKED // (1 + len(stack.names)))))
    found = Relations(
        rows={name: scorer.examples for name, scorer in scorers.items()},
        base={name: base for name, (base, *_) in scores.items()},
        gains={
            name: {expert: round(score - base, 6) for expert, score in zip(stack.names, of, strict=True)}
            for name, (base, *of) in scores.items()
        },
        pairs=tuple(pairs(run, stack)),
        half_strength=half_strength(run, result, stack),
    )
    if run.is_main:
        write_json(path, {"fingerprint": key, **to_json(found)})
    run.state.wait_for_everyone()
    return found


def taught(run: RunContext, stack: Stack, rows: int = MOST) -> tuple[dict[str, Scorer], dict[str, list[float]]]:
    """Candidate -> the scorer of so many of its own rows; and what the base and every expert alone score on them."""
    setup, tokens = run.scoring_setup, run.tokens_per_batch
    asked = {name: run.task.own_scorer(name, rows, setup) for name in run.candidates}
    scorers = {name: scorer for name, scorer in asked.items() if scorer is not None}
    gates: list[dict[str, float]] = [{}, *({name: 1.0} for name in stack.names)]
    known = [one.apart for one in run.validation_scorers.values() if isinstance(one, LogprobScorer)]
    if not known and scorers:
        longest = max(scorers.values(), key=lambda scorer: scorer.tokens)
        settle(stack, gates[:2], longest)
        known = [longest.apart]
    for scorer in scorers.values():
        scorer.keep_apart(max(known))
    scores: dict[str, list[float]] = {name: [] for name in scorers}
    at_once = min([scorer.at_once(stack, tokens, scorer.examples) for scorer in scorers.values()], default=1)
    with run.terminal.progress("what each dataset teaches", len(gates)) as bar:
        for start in range(0, len(gates), at_once):
            part = gates[start : start + at_once]
            for name, scorer in scorers.items():  # all of one mixture before the next: a dense stack writes weights
                found = scorer.score(stack, part, tokens)
                scores[name] += [one.value if isinstance(one, Score) else math.nan for one in found]
            bar.update(start + len(part))
    return scorers, scores


def pairs(run: RunContext, stack: Stack) -> list[Pair]:
    """All pairs of candidates."""
    digests = {name: np.unique(np.frombuffer(one.digests, np.uint64)) for name, one in run.candidates.items()}
    alike = likeness(stack.adapters, [name for name, _ in stack.model.named_parameters()])
    found = []
    for first, second in combinations(sorted(digests), 2):
        shared = len(np.intersect1d(digests[first], digests[second], assume_unique=True))
        cosine, conflict = (round(one, 4) for one in alike.get((first, second), (math.nan,) * 2))
        found.append(Pair((first, second), shared, cosine, conflict))
    return found


def half_strength(run: RunContext, result: SearchResult, stack: Stack) -> dict[str, HalfStrength]:
    """What half of an expert's change does to the log-probability of right answers, on some rows of every target."""
    found = halved(run, result, stack, stack.names, ROWS)
    unsure = [name for name, one in found.items() if min(one.over_whole.value, one.over_base.value) > 0]
    return found | (halved(run, result, stack, unsure, MORE) if unsure else {})


def halved(
    run: RunContext, result: SearchResult, stack: Stack, names: Sequence[str], count: int
) -> dict[str, HalfStrength]:
    """The same of some experts, on so many rows of every target.

    What the journal knows of the base model and of whole experts is not scored again.
    """
    found: dict[str, dict[tuple[str, float], Score]] = {}
    wanted = [("", 0.0), *((name, strength) for strength in (1.0, 0.5) for name in names)]
    same = run.merge_method == AVERAGE and run.config.objective in ("merged", "ensemble")
    for target, scorer in run.validation_scorers.items():
        if not isinstance(scorer, LogprobScorer):
            return {}
        rows = race_order(scorer.fingerprint, scorer.examples)[:count]
        scores = found[target] = {}
        for name, strength in wanted:
            standing = result.standings.get(Mixture.subset([name] if name else []))
            if same and strength != 0.5 and standing and standing.complete:
                scores[name, strength] = some(standing.scores[target], rows)
        left = [one for one in wanted if one not in scores]
        gates: Sequence[Mapping[str, float]] = [{name: strength} if name else {} for name, strength in left]
        at_once = scorer.at_once(stack, run.tokens_per_batch, len(rows))
        for start in range(0, len(left), at_once):
            part = slice(start, start + at_once)
            measured = scorer.score(stack, gates[part], run.tokens_per_batch, rows)
            scores |= {of: one for of, one in zip(left[part], measured, strict=True) if isinstance(one, Score)}
    loss = {target for target, scorer in run.validation_scorers.items() if isinstance(scorer, LossScorer)}
    weights = {target: run.targets[target].config.weight for target in found}

    def gain(name: str, other: tuple[str, float], likelihood: bool = True) -> Measurement:
        differences = {}
        for target, scores in found.items():
            pair = scores[name, 0.5], scores[other]
            ours, theirs = ((one.logprobs if likelihood and target not in loss else one.values) for one in pair)
            differences[target] = Score.of(np.subtract(ours, theirs).tolist()) if ours else Score(math.nan)
        return Measurement(*mean_over_targets(differences, weights))

    return {
        name: HalfStrength(gain(name, whole), gain(name, ("", 0.0)), gain(name, whole, likelihood=False).value)
        for name in names
        if all({whole := (name, 1.0), (name, 0.5), ("", 0.0)} <= scores.keys() for scores in found.values())
    }


def some(score: Score, rows: Sequence[int]) -> Score:
    """The numbers of some rows, from those of all."""
    values, logprobs = (
        np.asarray(numbers)[list(rows)].tolist() if len(numbers) else () for numbers in (score.values, score.logprobs)
    )
    return Score(score.value, None, values, logprobs)
