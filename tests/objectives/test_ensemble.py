"""The ensemble objective against direct computation; gradients by the weights against differences."""

import itertools
import math

import numpy as np
import pytest
import torch
from pico import build_model, build_stack, choice_rows, questions_of_many_shapes, scorer_on

from m2m_hf.core.mixture import BASE, Mixture
from m2m_hf.core.objective import TargetInfo
from m2m_hf.core.score import Score
from m2m_hf.core.space import SearchSpace
from m2m_hf.data.causal_lm import target_row
from m2m_hf.data.rows import TargetRow
from m2m_hf.merging.gated_stack import GatedStack
from m2m_hf.objectives.ensemble import Ensemble, EnsembleObjective, subset_blocks
from m2m_hf.objectives.merged import MergedObjective
from m2m_hf.scoring.forward import QuestionInputs, measure
from m2m_hf.search.loop import ensemble_likelihood
from m2m_hf.storage.keys import Keys

NAMES = ("a", "b", "c")
MIXTURES = [Mixture.subset(s) for size in (1, 2, 3) for s in itertools.combinations(NAMES, size)]
MIXTURES.append(Mixture.of({"a": 0.7, "c": 0.3}))


METRICS = ["accuracy", "logprob", "loglikelihood"]


def scorer_for(metric: str, tokenizer):
    rows = questions_of_many_shapes(tokenizer)
    if metric == "loglikelihood":
        return scorer_on([TargetRow(row.prompt, row.choices[-1:], 0) for row in rows], tokenizer, "loss", metric)
    if metric == "margin":
        rows = [TargetRow(row.prompt, row.choices[:2], 1) for row in rows]
        return scorer_on(rows, tokenizer, "preference", metric, normalize="tokens")
    return scorer_on(rows, tokenizer, "choice", metric, normalize="none" if metric == "accuracy" else "tokens")


def objective_of(stack: GatedStack, scorer, folder) -> EnsembleObjective:
    keys = Keys("b", scorer.fingerprint, scorer.examples, dict.fromkeys(NAMES, "x"), dict.fromkeys(NAMES, 12))
    target = TargetInfo("t", scorer.examples)
    merged = MergedObjective(lambda: stack, scorer, keys, target, tokens_per_batch=lambda: 500)
    return EnsembleObjective(merged, folder)


def direct(stack: GatedStack, scorer, metric: str, mixture: Mixture) -> list[float]:
    """Values of the rows, from one adapter after another."""
    parts = [({name: 1.0}, weight) for name, weight in mixture.items] or [({}, 1.0)]

    def probabilities(number: int, part: dict) -> torch.Tensor:
        inputs = QuestionInputs(scorer.inputs.questions, by_token=metric == "loglikelihood")
        ((answers,),) = measure(stack, [part], inputs, [number], 500)
        if metric == "loglikelihood":
            return torch.tensor(answers).exp()
        return (torch.tensor(answers) / torch.tensor(scorer.lengths[number])).softmax(0)

    rows = []
    for number, row in enumerate(scorer.rows):
        mixed = sum(weight * probabilities(number, part) for part, weight in parts)
        if metric == "accuracy":
            rows.append(float(mixed.argmax() == row.answer))
        else:
            rows.append(float(mixed.log().sum() if metric == "loglikelihood" else mixed.log()[row.answer]))
    mean = sum(scorer.counts) / len(scorer.counts) if metric == "loglikelihood" else 1
    return [row / mean for row in rows]


@pytest.mark.parametrize("metric", METRICS)
def test_scores_are_those_of_averaged_probabilities(tmp_path, tokenizer, metric):
    stack = build_stack(tmp_path, "llama")
    scorer = scorer_for(metric, tokenizer)
    objective = objective_of(stack, scorer, tmp_path / "kept")
    for mixture in (BASE, *MIXTURES):
        (score,) = objective([mixture])
        assert list(score.values) == pytest.approx(direct(stack, scorer, metric, mixture), abs=1e-4)
        assert score.value == pytest.approx(sum(score.values) / len(score.values))
    # A mixture of one is that adapter, as the merged objective scores it.
    merged = scorer.score(stack, [{"b": 1.0}], 500)[0]
    (alone,) = objective([Mixture.subset(["b"])])
    assert alone.values == pytest.approx(merged.values, abs=1e-4)
    assert alone.stderr == pytest.approx(merged.stderr, abs=1e-4)


def test_every_adapter_costs_one_pass_and_that_is_kept(tmp_path, tokenizer, monkeypatch):
    stack = build_stack(tmp_path, "llama")
    scorer = scorer_for("logprob", tokenizer)
    first = objective_of(stack, scorer, tmp_path / "kept")(MIXTURES)
    assert len(list((tmp_path / "kept").iterdir())) == 3
    monkeypatch.setattr(scorer, "probabilities", None)  # not asked again
    objective = objective_of(stack, scorer, tmp_path / "kept")
    assert objective(MIXTURES) == first
    assert [objective.evaluations(mixture, 7) for mixture in MIXTURES[2:4]] == [7, 0]


def made_up(count: int, rows: int, accuracy: bool) -> Ensemble:
    draw = torch.Generator().manual_seed(0)
    p = torch.rand((count, rows, 4), generator=draw) ** 3 + 1e-3
    p = p / p.sum(2, keepdim=True)
    return Ensemble([f"n{i}" for i in range(count)], p, [i % 4 for i in range(rows)], accuracy)


@pytest.mark.parametrize("accuracy", [True, False])
def test_the_best_subsets_are_the_best_of_all(accuracy, monkeypatch):
    ensemble = made_up(7, 30, accuracy)
    costs = {name: float(number) for number, name in enumerate(ensemble.names)}
    spaces = [SearchSpace(ensemble.names), SearchSpace(ensemble.names[1:], frozenset({"n3"}), 2, 4, costs, 12.0)]
    monkeypatch.setattr("m2m_hf.objectives.ensemble.BLOCK", 3000)  # several blocks
    for space in spaces:
        every = {mixture: ensemble.score(mixture).value for mixture in space.subsets()}
        best = ensemble.best_subsets(space, 12)
        assert len(best) == len(set(best)) == 12
        assert all(mixture in space for mixture in best)
        values = [every[mixture] for mixture in best]
        assert values == pytest.approx(sorted(every.values(), reverse=True)[:12], abs=1e-5)
        assert sum(len(block) for block in subset_blocks(space, 17)) == len(every)


def test_the_best_weights_are_better_than_any_others():
    ensemble = made_up(5, 60, accuracy=False)
    space = SearchSpace(ensemble.names, continuous=True)
    found = ensemble.score(ensemble.best_weights(space)[0]).value
    rng = np.random.default_rng(0)
    for _ in range(200):
        weights = rng.dirichlet(np.ones(5) * rng.choice([0.2, 1, 5])) + 1e-9
        other = Mixture.of(dict(zip(ensemble.names, (weights / weights.sum()).tolist(), strict=True)))
        assert ensemble.score(other).value <= found + 1e-4
    assert found >= max(ensemble.score(mixture).value for mixture in SearchSpace(ensemble.names).subsets()) - 1e-6


@pytest.mark.parametrize(
    "limits", [{"max_datasets": 2}, {"required": frozenset({"n5"}), "min_datasets": 3, "max_datasets": 4}]
)
def test_the_best_weights_keep_the_constraints(limits):
    ensemble = made_up(6, 60, accuracy=False)
    space = SearchSpace(ensemble.names, continuous=True, **limits)
    found = ensemble.best_weights(space)
    assert all(mixture in space for mixture in found)
    subsets = [ensemble.score(mixture).value for mixture in space.subsets() if mixture.names == found[0].names]
    assert ensemble.score(found[0]).value >= max(subsets) - 1e-4


def test_long_completions_are_screened_too():
    rows = {"a": np.array([-900.0, -800.0]), "b": np.array([-905.0, -790.0]), "c": np.array([-1000.0, -1000.0])}
    values = [ensemble_likelihood(rows, Mixture.subset(names)) for names in ("a", "b", "c", "ab", "abc")]
    assert len(set(values)) == 5
    assert values[3] == pytest.approx((-900 - 790) / 2 - math.log(2), abs=0.01)


def test_the_screen_is_the_ensemble_of_what_the_singles_scored():
    ensemble = made_up(4, 25, accuracy=False)
    singles = {name: np.array(ensemble.score(Mixture.subset([name])).logprobs) for name in ensemble.names}
    for mixture in SearchSpace(ensemble.names).subsets():
        assert ensemble_likelihood(singles, mixture) == pytest.approx(ensemble.score(mixture).value, abs=1e-4)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("metric", [*METRICS, "margin"])
def test_gradients_are_differences(tmp_path, tokenizer, metric, apart, monkeypatch):
    if apart:
        monkeypatch.setattr("m2m_hf.scoring.forward.shared_span", lambda model: 0)
    stack = build_stack(tmp_path, "llama")
    scorer = scorer_for(metric, tokenizer)
    weights = {"a": 0.5, "b": 0.2, "c": 0.3}
    score, slope = scorer.gradient(stack, weights, 60)
    plain = scorer.score(stack, [weights], 60)[0]
    assert score.values == pytest.approx(plain.values, abs=2e-5)
    assert score.logprobs == pytest.approx(plain.logprobs, abs=2e-5)

    def likelihood(changed: dict) -> float:
        return scorer.likelihood(scorer.score(stack, [changed], 60)[0])

    for name in NAMES:
        step = 2e-2
        up, down = ({**weights, name: weights[name] + way * step} for way in (1, -1))
        assert slope[name] == pytest.approx((likelihood(up) - likelihood(down)) / (2 * step), abs=2e-3, rel=2e-2)
    # A candidate of weight 0 has a derivative too; and scoring goes on as before.
    assert scorer.gradient(stack, {"a": 1.0}, 60)[1]["b"] != 0
    assert scorer.score(stack, [weights], 60)[0] == plain


@pytest.mark.parametrize(
    ("kind", "metric"),
    [("choice", "accuracy"), ("loss", "loglikelihood"), ("generation", "token_f1"), ("preference", "margin")],
)
def test_some_rows_score_as_they_do_among_all(tmp_path, tokenizer, kind, metric):
    stack = build_stack(tmp_path, "llama")
    rows = questions_of_many_shapes(tokenizer)
    if kind == "preference":
        rows = [TargetRow(row.prompt, row.choices[:2], 1) for row in rows]
    elif kind != "choice":
        rows = [TargetRow(row.prompt, row.choices[:1], 0) for row in rows]
    options = {"generation": {"max_new_tokens": 3}} if kind == "generation" else {}
    scorer = scorer_on(rows, tokenizer, kind, metric, **options)
    assert scorer.by_row
    mixtures = [{"a": 1.0}, {"a": 0.5, "c": 0.5}]
    order = [5, 0, 3, 1, 2, 4, 6]
    parts = [scorer.score(stack, mixtures, 60, rows) for rows in (None, order[:3], order[3:])]
    for whole, first, second in zip(*parts, strict=True):
        assert first.values == pytest.approx([whole.values[row] for row in order[:3]], abs=2e-5)
        place = dict(zip(order, first.values + second.values, strict=True))
        logprobs = dict(zip(order, first.logprobs + second.logprobs, strict=False))
        joined = Score.of([place[n] for n in range(7)], [logprobs[n] for n in range(7)] if logprobs else [])
        again = scorer.whole(joined)
        assert (again.value, again.stderr) == pytest.approx((whole.value, whole.stderr), abs=2e-5)


def test_a_model_in_bfloat16_has_gradients_too(tokenizer, tmp_path):
    stack = build_stack(tmp_path, "llama")
    half = GatedStack(build_model("llama").to(torch.bfloat16), stack.adapters)
    rows = [target_row(row, "text", "choice", "row") for row in choice_rows(9)]
    scorer = scorer_on(rows, tokenizer, "choice", "logprob")
    weights = dict.fromkeys(NAMES, 1 / 3)
    exact, rough = (scorer.gradient(one, weights, 100)[1] for one in (stack, half))
    for name in NAMES:
        assert rough[name] == pytest.approx(exact[name], abs=0.15)
