"""What a run has chosen, and mixtures really fine-tuned: to choose by (`fine_tunes`), to test surrogates (`m2m fidelity`)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import yaml

from m2m_hf.analysis.beliefs import Beliefs
from m2m_hf.analysis.fidelity import sample
from m2m_hf.analysis.relations import Relations
from m2m_hf.analysis.similarity import candidate_content, similarity, target_content
from m2m_hf.analysis.study import RANDOM, Choice
from m2m_hf.analysis.study_report import Baseline, Expectation, ExpectedMixture, NextFineTune, StudyReport, Verification
from m2m_hf.core.jsonable import from_json, to_json
from m2m_hf.core.mixture import Mixture
from m2m_hf.core.score import paired
from m2m_hf.core.trial import Standing
from m2m_hf.errors import InputError
from m2m_hf.modeling.devices import broadcast
from m2m_hf.reporting.conclude import Analysis, analyse, find_warnings
from m2m_hf.reporting.finished_run import (
    Costs,
    Counts,
    FinalModel,
    FinishedRun,
    FinishedTarget,
    RunWarning,
    Training,
    mixture_score,
    mixture_scores,
)
from m2m_hf.run.context import RunContext
from m2m_hf.run.cut_off import cut_off
from m2m_hf.run.final import read_final
from m2m_hf.run.relations import find_relations
from m2m_hf.search.result import SearchResult, score_of
from m2m_hf.storage.files import fingerprint, read_json_or_empty, write_json
from m2m_hf.storage.judgements import Judged
from m2m_hf.training.fine_tune import finished

BELIEVED = 512  # mixtures, the best by the search, among which the next fine-tunes are chosen
SHOWN = 40  # of these, the best, that the report tells of
LEVELS = (0.5, 0.9)


@dataclass
class Selection:
    """What a run has chosen: by the search alone, or among its best mixtures once they were fine-tuned.

    Args:
        result: the search, with the chosen mixture as its best.
        fine_tuned: the fine-tuned mixtures that may be chosen, best first.
        verified: what fine-tuning them has shown, for `summary.json`.
    """

    run: RunContext
    result: SearchResult
    fine_tuned: Sequence[Standing] = ()
    verified: Verification | None = None

    @cached_property
    def analysis(self) -> Analysis:
        """Shapley values and selection bias, which take long with very many trials."""
        failed = self.run.failed
        usable = [name for name in self.run.candidates if name not in failed]
        return analyse(self.result, self.run.space, usable, self.fine_tuned)

    @cached_property
    def relations(self) -> Relations:
        """How candidates and experts relate, which is measured once (collective)."""
        return find_relations(self.run, self.result)

    def finished(self) -> FinishedRun:
        """The run as it stands now, from which `summary.json` is written."""
        run, result, analysis = self.run, self.result, self.analysis
        final, study = read_final(run, result.best.mixture), read_study(run)
        training = {name: from_json(Training, record) for name, record in run.bank.training().items()}
        usable = [name for name, one in training.items() if one.failed is None]
        alone = [result.standings[Mixture.subset([name])] for name in training]
        states = [trial.state for trial in result.trials]
        (best,) = mixture_scores([result.best])
        finished = FinishedRun(
            objective=result.trials[0].objective,
            candidates=tuple(training),
            space=run.space,
            study=run.study_fingerprint,
            best=best,
            base=mixture_score(result.base),
            all=mixture_score(result.standings[Mixture.subset(usable)]),
            best_single=mixture_score(analysis.best_single),
            singles={one.mixture.names[0]: one for one in mixture_scores(alone)},
            top=mixture_scores(result.ranking[:10]),
            selection_bias=analysis.selection_bias,
            shapley=analysis.shapley,
            warnings=(),
            verified=self.verified,
            pareto_front=mixture_scores(result.pareto_front),
            targets={name: self._target(name) for name in run.targets},
            final=from_json(FinalModel, {"validation": None, "test": None, **final}) if final else None,
            counts=Counts(len(training), len(states), states.count("pruned"), states.count("failed")),
            costs=Costs(
                train_seconds=round(sum(one.seconds for one in training.values()), 3),
                search_seconds=round(result.seconds, 3),
                final_seconds=final["total_seconds"] if final else None,
                compare_seconds=round(run.fine_tuned.seconds(without=final), 3),
                example_evaluations=result.evaluations,
                adapter_steps=sum(one.steps for one in training.values()),
            ),
            relations=self.relations,
            config=yaml.safe_load(run.config_yaml()),
            training=training,
            fidelity=from_json(StudyReport, study) if study else None,
            standings=result.standings,
        )
        if finished.final:
            means = [finished.final_score("final", part) for part in ("validation", "test")]
            values = [one.value if one else None for one in means]
            finished = replace(finished, final=replace(finished.final, validation=values[0], test=values[1]))
        warnings = [*find_warnings(finished, analysis, run.overlap, result.ended)]
        warnings += [("cut_off", text) for text in cut_off(run).values()]
        return replace(finished, warnings=tuple(RunWarning(code, text) for code, text in warnings))

    def _target(self, name: str) -> FinishedTarget:
        config, keys, scorers = self.run.targets[name].config, self.run.keys[name], self.run.scorers[name]
        rows = {part: scorer.examples for part, scorer in scorers.items()}
        return FinishedTarget(
            metric=config.metric,
            scorer=config.kind,
            weight=config.weight,
            min_delta=config.min_delta,
            short=sum(name in standing.short for standing in self.result.standings.values()),
            validation_rows=rows.get("validation", 0),
            test_rows=rows.get("test", 0),
            fingerprints={"base": keys.base, "scorer": keys.scorer},
            judged=Judged.read(self.run.folder.judged(name)) if config.judge else None,
        )


def verify(run: RunContext, result: SearchResult) -> Selection:
    """Fine-tunes as many mixtures as `fine_tunes` says, and chooses by what these score.

    The best of two or more by the search and all candidates together, then those from which the choice is expected to gain most,
    in the light of what was fine-tuned so far. A single candidate's adapter is its fine-tune, unless it is stale, and tells its
    score; it is fine-tuned beyond that number only where it is the best. A mixture that makes a target worse than the base model
    by more than its `min_delta` cannot be chosen.

    Raises:
        InputError: no mixture could be fine-tuned, or may be chosen.
    """
    study, count = run.study, run.fine_tunes
    listed = believable(run, result)
    mixtures = [one.mixture for one in listed]
    beliefs = Beliefs(*evidence(run, listed))
    for place, mixture in enumerate(mixtures):
        if len(mixture) == 1 and study.uniform and mixture.names[0] not in study.stale:
            beliefs.learn(place, score_of(listed[place]).value, is_surrogate=True)
    larger = [place for place, mixture in enumerate(mixtures) if len(mixture) > 1] or [0]
    everything = [place for place in larger if mixtures[place] == Mixture.subset(run.space.names)]
    wanted = [*dict.fromkeys([larger[0], *everything])][:count]
    run.terminal.say(f"fine-tuning up to {count} mixture{'s' * (count > 1)} before choosing, {run.describe_steps()}")
    trained: list[Standing] = []
    while wanted:
        found = study.trained_standings([mixtures[place] for place in wanted], result.base)
        for place, standing in zip(wanted, found, strict=True):
            if standing.score:
                beliefs.learn(place, standing.score.value, may_be_chosen=standing.may_be_chosen)
            else:
                beliefs.leave_out(place)
        trained += found
        wanted = beliefs.next(min(count - len(trained), run.fine_tunes_at_once))
    # A single that is known by its adapter alone; all others that are known were fine-tuned.
    while beliefs.known and (best := mixtures[beliefs.best]) not in [one.mixture for one in trained]:
        (standing,) = study.trained_standings([best], result.base)
        beliefs.forget(place := beliefs.best)
        if standing.score:
            beliefs.learn(place, standing.score.value, is_surrogate=True, may_be_chosen=standing.may_be_chosen)
        else:
            beliefs.leave_out(place)
        trained.append(standing)
    report = study.report(trained, result.base, run.study_fingerprint, run.describe_steps())
    allowed = [one for one in trained if one.may_be_chosen]
    if not allowed:
        raise InputError(
            "fine-tuned, every mixture makes a target worse than the base model by more than its min_delta; raise min_delta or "
            "fine_tunes. What was trained and scored is kept"
        )
    allowed.sort(key=lambda one: -score_of(one).value)  # stable: among equals the first
    chosen = allowed[0].mixture
    (merged,) = study.standings(run.objectives(run.config.objective), [chosen], "scoring mixtures")
    result.standings[chosen] = replace(merged, short=())
    verified = Verification(
        result.best.mixture, report.uniform, report.mixtures, report.failed, report.agreement, report.training_noise,
        expectation(beliefs, listed, trained), None,
    )  # fmt: skip
    return Selection(run, replace(result, best=result.standings[chosen]), allowed, verified)


def believable(run: RunContext, result: SearchResult) -> list[Standing]:
    """The mixtures among which the next fine-tunes are chosen: the best by the search, its choice first, singles, and all."""
    ranking = [result.best, *(one for one in result.ranking if one is not result.best)]
    kept = [*ranking[:BELIEVED], *(one for one in ranking[BELIEVED:] if len(one.mixture) == 1)]
    everything = result.standings.get(Mixture.subset(run.space.names))
    if everything and everything.complete and everything.mixture in run.space:
        kept.append(everything)
    return list({one.mixture: one for one in kept}.values())


def evidence(run: RunContext, listed: Sequence[Standing]) -> tuple[Any, list[Any]]:
    """(weights of shape (mixtures, candidates), what each surrogate says of these): the search's own, and the ensemble."""
    names = run.space.names
    weights = np.array([[one.mixture.weights.get(name, 0.0) for name in names] for one in listed])
    scores = [np.array([score_of(one).value for one in listed])]
    ensemble = run.study.surrogates.get("ensemble") if run.config.objective != "ensemble" else None
    if ensemble:
        found = run.study.standings(ensemble, [one.mixture for one in listed], "scoring mixtures (ensemble)")
        values = np.array([one.score.value if one.score else math.nan for one in found])
        if not np.isnan(values).all():
            scores.append(np.where(np.isnan(values), np.nanmin(values), values))
    return weights, scores


def expectation(beliefs: Beliefs, listed: Sequence[Standing], trained: Sequence[Standing]) -> Expectation:
    """What is believed once a mixture is chosen."""
    known = {one.mixture: score_of(one).value for one in trained if one.score}
    chosen = listed[beliefs.best]
    errors = [paired(one.scores, chosen.scores, one.weights)[1] or 0.0 for one in listed]
    behind, noise = beliefs.behind(np.array(errors))
    spread = beliefs.spread
    order = sorted(range(len(listed)), key=lambda place: -beliefs.mean[place])[:SHOWN]
    rows = [
        ExpectedMixture(
            listed[place].mixture,
            float(beliefs.surrogate[place]),
            float(beliefs.mean[place]),
            float(spread[place]),
            known.get(listed[place].mixture),
        )
        for place in order
    ]
    return Expectation(
        {f"{level:g}": float(np.quantile(behind, level)) for level in LEVELS},
        float(np.median(noise)),
        float((behind <= noise).mean()),
        next((NextFineTune(listed[place].mixture, beliefs.beaten_by(place)) for place in beliefs.next()), None),
        tuple(rows),
    )


def baseline_scores(run: RunContext, result: SearchResult) -> dict[str, Baseline]:
    """The models that are there of all ways of choosing, on validation and sealed test rows; once all is chosen."""
    choices, models = baseline_choices(run, result), run.fine_tuned
    there = {name: one for name, one in choices.items() if finished(folder := models.folder(one.counts), folder.name)}
    return run.study.baselines(there, result.base, run.test_scorers)


def study_fidelity(run: RunContext, result: SearchResult, unseal: bool) -> dict[str, Any]:
    """The correlation study: fine-tunes mixtures, and compares their scores with what the surrogates predicted.

    Beside them stand the baselines (all, best single, similarity, stratified, random, and the best of all where all were
    fine-tuned), trained and scored alike. Models that were fine-tuned before are not trained again.

    Args:
        unseal: whether the sealed test set may be scored: only once the final model is there, so that nothing is chosen
            after it was seen.

    Returns:
        The content of `OUT/fidelity.json`, which it writes.
    """
    ranking = [one.mixture for one in result.ranking]
    mixtures = sample(run.space, ranking, run.config.fidelity_mixtures, run.args.seed)
    study = run.study
    run.terminal.say(f"fidelity: {len(mixtures)} mixtures to fine-tune and score, {run.describe_steps()}")
    choices = baseline_choices(run, result, random=RANDOM)
    study.models.train_all([*map(study.models.counts, mixtures), *(one.counts for one in choices.values())])
    trained = study.trained_standings(mixtures, result.base)
    report = study.report(trained, result.base, run.study_fingerprint, run.describe_steps())
    allowed = [one for one in trained if one.may_be_chosen and one.mixture in run.space]
    if report.all_mixtures and allowed:
        choices["oracle"] = study.choice(max(allowed, key=lambda one: score_of(one).value).mixture)
    if run.test_scorers and not unseal:
        run.terminal.say("test set not scored: first train the final model (m2m select or m2m sft)", "dim")
    baselines = study.baselines(choices, result.base, run.test_scorers if unseal else {})
    found: dict[str, Any] = to_json(replace(report, similarity=target_similarity(run), baselines=baselines))
    if run.is_main:
        write_json(run.folder.fidelity, found)
    run.state.wait_for_everyone()
    return found


def read_study(run: RunContext) -> dict[str, Any] | None:
    """`OUT/fidelity.json`, where it belongs to this very run."""
    found = read_json_or_empty(run.folder.fidelity)
    return found if found.get("fingerprint") == run.study_fingerprint else None


def baseline_choices(run: RunContext, result: SearchResult, random: int = 0) -> dict[str, Choice]:
    """Name -> the mixture that this way of choosing comes to; `random` of them at random."""
    objectives = run.objectives(run.config.objective)
    return run.study.choices(result, objectives, list(target_similarity(run)), random, run.args.seed)


def target_similarity(run: RunContext) -> dict[str, float]:
    """Candidate -> cosine with the targets in the base model's hidden states, most similar first; kept in the run folder."""
    processing, seed, classifies = run.task.processing, run.args.seed, run.base.plan is not None
    content = {name: target_content(one.rows, processing, seed, classifies) for name, one in run.targets.items()}
    targets = {name: rows for name, rows in content.items() if rows}
    weights = {name: run.targets[name].config.weight for name in targets}
    if not targets:
        return {}
    names = run.space.names
    path = run.folder.trained / "similarity.json"
    key = fingerprint([weights, {name: keys.facts() for name, keys in run.keys.items()}, list(names)])
    known = broadcast(read_json_or_empty(path))
    if known.get("fingerprint") == key:
        return dict(known["cosine"])
    candidates = {name: candidate_content(run.candidates[name], processing, seed) for name in names}
    limits = run.tokens_per_batch, min(512, run.task.limit or 512)
    found = similarity(run.base.plain(), candidates, targets, weights, processing, *limits)
    if run.is_main:
        write_json(path, {"fingerprint": key, "cosine": found})
    run.state.wait_for_everyone()
    return found
