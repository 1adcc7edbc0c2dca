"""The ensemble objective against direct computation; gradients by the weights against differences."""

import itertools
import math

import numpy as np
import pytest
import torch
from pico import build_model, build_stack, choice_rows, config, questions_of_many_shapes

from m2m_hf.core.mixture import BASE, Mixture
from m2m_hf.core.objective import TargetInfo
from m2m_hf.core.space import SearchSpace
from m2m_hf.data.causal_lm import target_row
from m2m_hf.data.rows import TargetRow
from m2m_hf.merging.gated_stack import GatedStack
from m2m_hf.objectives.ensemble import Ensemble, EnsembleObjective, subset_blocks
from m2m_hf.objectives.merged import MergedObjective
from m2m_hf.scoring.causal_lm import make_causal_lm_scorer
from m2m_hf.scoring.forward import completion_logprobs, token_logprobs
from m2m_hf.search.loop import ensemble_likelihood
from m2m_hf.storage.keys import Keys

NAMES = ("a", "b", "c")
MIXTURES = [Mixture.subset(s) for size in (1, 2, 3) for s in itertools.combinations(NAMES, size)]
MIXTURES.append(Mixture.of({"a": 0.7, "c": 0.3}))


def scorers(tokenizer) -> dict:
    rows = questions_of_many_shapes(tokenizer)
    single = [TargetRow(row.prompt, row.choices[-1:], 0) for row in rows]
    return {
        "accuracy": make_causal_lm_scorer(config("choice", "accuracy"), rows, tokenizer, 128),
        "logprob": make_causal_lm_scorer(config("choice", "logprob", normalize="tokens"), rows, tokenizer, 128),
        "loglikelihood": make_causal_lm_scorer(config("loss", "loglikelihood"), single, tokenizer, 128),
    }


def objective_of(stack: GatedStack, scorer, metric: str, folder) -> EnsembleObjective:
    keys = Keys("b", scorer.fingerprint, scorer.examples, dict.fromkeys(NAMES, "x"))
    target = TargetInfo("t", scorer.examples)
    merged = MergedObjective(lambda: stack, scorer, keys, target, tokens_per_batch=500)
    kind = "loss" if metric == "loglikelihood" else "choice"
    return EnsembleObjective(merged, scorer, config(kind, metric), folder)


def direct(stack: GatedStack, scorer, metric: str, mixture: Mixture) -> list[float]:
    """Values of the rows, from one adapter after another."""
    weights = mixture.weights or {None: 1.0}
    rows = []
    for number, question in enumerate(scorer.questions):
        if metric == "loglikelihood":
            each = [
                [math.exp(v) for v in token_logprobs(stack, [{n: 1.0} if n else {}], [question], 500)[0][0][0]]
                for n in weights
            ]
            mixed = [
                sum(w * p for w, p in zip(weights.values(), token, strict=True)) for token in zip(*each, strict=True)
            ]
            rows.append(sum(map(math.log, mixed)))
            continue
        lengths = torch.tensor(scorer.lengths[number])
        mixed = 0.0
        for name, weight in weights.items():
            sums = torch.tensor(completion_logprobs(stack, [{name: 1.0} if name else {}], [question], 500)[0][0])
            mixed = mixed + weight * (sums / lengths).softmax(0)
        answer = scorer.rows[number].answer
        rows.append(float(mixed.argmax() == answer) if metric == "accuracy" else math.log(mixed[answer]))
    if metric == "loglikelihood":
        mean = sum(scorer.counts) / len(scorer.counts)
        return [row / mean for row in rows]
    return rows


@pytest.mark.parametrize("metric", ["accuracy", "logprob", "loglikelihood"])
def test_scores_are_those_of_averaged_probabilities(tmp_path, tokenizer, metric):
    stack = build_stack(tmp_path, "llama")
    scorer = scorers(tokenizer)[metric]
    objective = objective_of(stack, scorer, metric, tmp_path / "kept")
    for mixture in (BASE, *MIXTURES):
        (score,) = objective([mixture])
        assert list(score.values) == pytest.approx(direct(stack, scorer, metric, mixture), abs=1e-4)
        assert score.value == pytest.approx(sum(score.values) / len(score.values))
    # A mixture of one is that adapter, as the merged objective scores it.
    merged = scorer.score(stack, [{"b": 1.0}], 500)[0]
    (alone,) = objective([Mixture.subset(["b"])])
    assert alone.values == pytest.approx(merged.values, abs=1e-4)
    assert alone.stderr == pytest.approx(merged.stderr, abs=1e-4)


def test_every_adapter_costs_one_pass_and_that_is_kept(tmp_path, tokenizer):
    stack = build_stack(tmp_path, "llama")
    scorer = scorers(tokenizer)["logprob"]
    passes = 0
    real = scorer.probabilities

    def counted(*args):
        nonlocal passes
        passes += 1
        return real(*args)

    scorer.probabilities = counted
    first = objective_of(stack, scorer, "logprob", tmp_path / "kept")(MIXTURES)
    assert passes == 3
    assert objective_of(stack, scorer, "logprob", tmp_path / "kept")(MIXTURES) == first
    assert passes == 3
    objective = objective_of(stack, scorer, "logprob", tmp_path / "kept")
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
    best = ensemble.best_weights(space)[0]
    found = ensemble.score(best).value
    rng = np.random.default_rng(0)
    for _ in range(200):
        weights = rng.dirichlet(np.ones(5) * rng.choice([0.2, 1, 5]))
        weights = (weights + 1e-9) / (weights + 1e-9).sum()
        assert (
            ensemble.score(Mixture.of(dict(zip(ensemble.names, weights.tolist(), strict=True)))).value <= found + 1e-4
        )
    assert found >= max(ensemble.score(mixture).value for mixture in SearchSpace(ensemble.names).subsets()) - 1e-6


def test_the_best_weights_keep_the_constraints():
    ensemble = made_up(6, 60, accuracy=False)
    for space in (
        SearchSpace(ensemble.names, max_datasets=2, continuous=True),
        SearchSpace(ensemble.names, frozenset({"n5"}), 3, 4, continuous=True),
    ):
        found = ensemble.best_weights(space)
        assert found
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
@pytest.mark.parametrize("metric", ["accuracy", "logprob", "loglikelihood"])
def test_gradients_are_differences(tmp_path, tokenizer, metric, apart, monkeypatch):
    if apart:
        monkeypatch.setattr("m2m_hf.scoring.forward.shared_span", lambda model: 0)
    stack = build_stack(tmp_path, "llama")
    scorer = scorers(tokenizer)[metric]
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


@pytest.mark.parametrize("kind", ["choice", "loss", "generation"])
def test_some_rows_score_as_they_do_among_all(tmp_path, tokenizer, kind):
    stack = build_stack(tmp_path, "llama")
    rows = questions_of_many_shapes(tokenizer)
    if kind == "choice":
        scorer = make_causal_lm_scorer(config("choice", "accuracy"), rows, tokenizer, 128)
    else:
        single = [TargetRow(row.prompt, row.choices[:1], 0) for row in rows]
        metric = {"loss": "loglikelihood", "generation": "token_f1"}[kind]
        options = {"generation": {"max_new_tokens": 3}} if kind == "generation" else {}
        scorer = make_causal_lm_scorer(config(kind, metric, **options), single, tokenizer, 128)
    assert scorer.by_row
    mixtures = [{"a": 1.0}, {"a": 0.5, "c": 0.5}]
    for whole, first, second in zip(
        scorer.score(stack, mixtures, 60),
        scorer.score(stack, mixtures, 60, [5, 0, 3]),
        scorer.score(stack, mixtures, 60, [1, 2, 4, 6]),
        strict=True,
    ):
        assert first.values == pytest.approx([whole.values[row] for row in (5, 0, 3)], abs=2e-5)
        place = dict(zip((5, 0, 3, 1, 2, 4, 6), first.values + second.values, strict=True))
        logprobs = dict(zip((5, 0, 3, 1, 2, 4, 6), first.logprobs + second.logprobs, strict=False))
        joined = type(whole).of([place[n] for n in range(7)], [logprobs[n] for n in range(7)] if logprobs else [])
        again = scorer.whole(joined)
        assert (again.value, again.stderr) == pytest.approx((whole.value, whole.stderr), abs=2e-5)


def test_a_model_in_bfloat16_has_gradients_too(tokenizer, tmp_path):
    stack = build_stack(tmp_path, "llama")
    half = GatedStack(build_model("llama").to(torch.bfloat16), stack.adapters)
    rows = [target_row(row, "text", "choice", "row") for row in choice_rows(9)]
    scorer = make_causal_lm_scorer(config("choice", "logprob"), rows, tokenizer, 128)
    weights = dict.fromkeys(NAMES, 1 / 3)
    exact, rough = (scorer.gradient(one, weights, 100)[1] for one in (stack, half))
    for name in NAMES:
        assert rough[name] == pytest.approx(exact[name], abs=0.15)
