"""What all scorers of answers keep to: a score follows from the model and the row, whatever else is asked beside it."""

from dataclasses import replace

import pytest
import torch
from pico import build_model, build_stack, questions_of_many_shapes, scorer_on

from m2m_hf.core.score import Failure
from m2m_hf.data.rows import TargetRow
from m2m_hf.merging.gated_stack import GatedStack
from m2m_hf.scoring.scorers import Scorer

MIXTURES = [{}, {"a": 1.0}, {"a": 0.5, "c": 0.5}, {"b": 1.0}]
SHORT = {"generation": {"max_new_tokens": 5}}
KINDS = {
    "choice": ("accuracy", {}),
    "choice by logprob": ("logprob", {"normalize": "bytes"}),
    "loss": ("loglikelihood", {}),
    "preference": ("accuracy", {}),
    "preference by margin": ("margin", {"normalize": "tokens"}),
    "generation": ("token_f1", SHORT),
    "reward": ("reward", SHORT),
    "reward of samples": ("reward", {"generation": {**SHORT["generation"], "do_sample": True}, "samples": 2}),
}


@pytest.fixture(params=KINDS)
def make(request, tokenizer):
    """rows of choices -> the scorer of a kind on them."""
    kind = request.param.split(" ")[0]
    metric, options = KINDS[request.param]
    if kind == "reward":
        options = options | {"reward_model": str(request.getfixturevalue("reward_model"))}
    shapes = {"loss": slice(1), "generation": slice(1), "preference": slice(2)}

    def make(rows: list[TargetRow]) -> Scorer:
        if kind in shapes:
            rows = [replace(row, choices=row.choices[shapes[kind]], answer=0) for row in rows]
        return scorer_on(rows, tokenizer, kind, metric, **options)

    make.kind = request.param
    return make


def test_a_score_depends_on_neither_batches_nor_company_nor_order(tmp_path, tokenizer, make):
    stack, rows = build_stack(tmp_path, "llama"), questions_of_many_shapes(tokenizer)[:6]
    scorer = make(rows)
    alone = [scorer.score(stack, [weights], 10_000)[0] for weights in MIXTURES]
    if make.kind not in ("choice", "preference", "generation"):  # whose values are few
        assert len({score.values for score in alone}) == len(MIXTURES)
    backwards = make(rows[::-1])
    some = [5, 0, 3]
    for budget in (1, 90):
        together = scorer.score(stack, MIXTURES, budget)
        parts = scorer.score(stack, MIXTURES, budget, rows=some)
        turned = backwards.score(stack, MIXTURES, budget)
        for one, score, part, other in zip(alone, together, parts, turned, strict=True):
            assert score.values == pytest.approx(one.values, abs=2e-5)
            assert score.value == pytest.approx(one.value, abs=2e-5)
            assert part.values == pytest.approx([one.values[row] for row in some], abs=2e-5)
            if scorer.tokens:  # what is sampled is seeded by the row's number
                assert other.values[::-1] == pytest.approx(one.values, abs=2e-5)


def test_another_row_or_option_is_another_fingerprint(tokenizer, make):
    rows = questions_of_many_shapes(tokenizer)
    row = rows[1]
    others = [
        TargetRow(f"{row.prompt} one", row.choices, row.answer),
        TargetRow(row.prompt, row.choices, row.answer, examples="red\n\n"),
    ]
    prints = {make([rows[0], other, *rows[2:]]).fingerprint for other in (row, *others)} | {make(rows[1:]).fingerprint}
    assert len(prints) == 4
    assert make(rows).fingerprint == make(list(rows)).fingerprint


@pytest.mark.parametrize(
    "make", [kind for kind in KINDS if not {"generation", "reward"} & {*kind.split()}], indirect=True
)
def test_a_model_whose_numbers_are_not_finite_has_no_score(tokenizer, make):
    scorer = make(questions_of_many_shapes(tokenizer))
    model = build_model("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    (score,) = scorer.score(GatedStack(model, {}), [{}], 10_000)
    assert isinstance(score, Failure)


def test_a_reward_model_whose_numbers_are_not_finite_gives_no_score(tokenizer, reward_model, monkeypatch):
    rows = [TargetRow("question: red?", ("",), 0)]
    scorer = scorer_on(rows, tokenizer, "reward", "reward", reward_model=str(reward_model), **SHORT)
    monkeypatch.setattr(scorer.reward, "rate", lambda inputs, like: [float("nan")] * len(inputs))
    (score,) = scorer.score(GatedStack(build_model("llama"), {}), [{}], 10_000)
    assert score == Failure("the reward model gives numbers that are not finite")
