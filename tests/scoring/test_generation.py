"""Free answers against greedy decoding, token by token."""

import pytest
import torch
from pico import (
    build_model,
    build_stack,
    config,
    questions_of_many_shapes,
)

from m2m_hf import InputError
from m2m_hf.core.score import Failure, Score
from m2m_hf.data.rows import TargetRow
from m2m_hf.merging.gated_stack import GatedStack
from m2m_hf.scoring.causal_lm import make_causal_lm_scorer
from m2m_hf.scoring.scorers import Scorer

FAMILIES = ("llama", "qwen3", "gemma2", "gpt2")


MIXTURES = [{}, {"a": 1.0}, {"a": 0.5, "c": 0.5}, {"a": 0.2, "b": 0.3, "c": 0.5}]


def score_of(scorer: Scorer, model, budget: int = 100) -> Score | Failure:
    return scorer.score(GatedStack(model, {}), [{}], budget)[0]


def generated(model, tokenizer, row: TargetRow, new: int) -> str:
    """One prompt, greedily, token by token, without a cache."""
    ids = tokenizer(row.prompt)["input_ids"]
    start = len(ids)
    for _ in range(new):
        with torch.no_grad():
            ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("budget", [1, 60, 10_000])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_greedy_and_independent_of_batches_and_company(tmp_path, tokenizer, family, budget):
    stack = build_stack(tmp_path, family)
    rows = questions_of_many_shapes(tokenizer)
    truth = {}
    for index, weights in enumerate(MIXTURES):
        stack.set(weights)
        truth[index] = [generated(stack.model, tokenizer, row, 6) for row in rows]
    # The references are right for some rows of some mixtures and wrong for others.
    rows = [TargetRow(row.prompt, (truth[n % 4][n],), 0) for n, row in enumerate(rows)]
    options = {"generation": {"max_new_tokens": 6}}
    scorer = make_causal_lm_scorer(config("generation", "exact_match", **options), rows, tokenizer, 128)
    for index, score in enumerate(scorer.score(stack, MIXTURES, budget)):
        hits = [truth[index][n].split() == truth[n % 4][n].split() for n in range(len(rows))]
        assert list(score.values) == [float(hit) for hit in hits]
        assert scorer.score(stack, [MIXTURES[index]], budget)[0] == score


def test_generation_stops_at_a_string(tokenizer):
    model = build_model("llama")
    row = TargetRow("question: red? answer:", ("x",), 0)
    whole = generated(model, tokenizer, row, 12)
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    row = TargetRow(row.prompt, (whole.split(stop)[0],), 0)
    options = {"generation": {"max_new_tokens": 12, "stop_strings": [stop]}}
    scorer = make_causal_lm_scorer(config("generation", "exact_match", **options), [row], tokenizer, 128)
    assert score_of(scorer, model).value == 1.0


def test_sampling_does_not_depend_on_the_batches(tokenizer):
    model = build_model("llama")
    rows = [TargetRow(f"question: {n}", ("x",), 0) for n in range(4)]
    options = {"generation": {"max_new_tokens": 5, "do_sample": True}}
    scorer = make_causal_lm_scorer(config("generation", "token_f1", **options), rows, tokenizer, 128)
    assert scorer.at_once(GatedStack(model, {}), 100_000, 4) == 1
    seen = []
    scorer.metric = lambda predictions, references: seen.append(predictions) or (0.0, None, (0.0,) * 4)
    score_of(scorer, model, 1)
    score_of(scorer, model, 10_000)
    assert seen[0] == seen[1]
    assert len(set(seen[0])) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 5}, "no field 'max_tokens'"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected an integer of at least 1"),
        ({"max_new_tokens": 500}, "do not fit into the model's 128 positions"),
        ({"temperature": 0.5}, "generation: "),
    ],
)
def test_generation_settings_are_checked(tokenizer, options, message):
    with pytest.raises(InputError, match=message):
        make_causal_lm_scorer(
            config("generation", "exact_match", generation=options), [TargetRow("a", ("b",), 0)], tokenizer, 128
        )
