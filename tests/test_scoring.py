"""Scorers against direct computations."""

import math

import evaluate
import pytest
import torch
from conftest import build_model, choice_rows

from m2m_hf.config import DataConfig, TargetConfig
from m2m_hf.data import TargetRow, encode, target_row
from m2m_hf.errors import InputError
from m2m_hf.mixture import mean_and_stderr
from m2m_hf.scoring import Request, ScoredPositions, batches, completion_logprobs, make_scorer


def config(scorer: str, metric: str) -> TargetConfig:
    return TargetConfig(DataConfig(path="json"), scorer, metric)


@pytest.fixture
def questions() -> list[TargetRow]:
    return [target_row(row, "text", "choice", "row") for row in choice_rows(9)]


def direct(model, tokenizer, row: TargetRow) -> list[float]:
    """Log-probability of every choice, one forward pass each."""
    found = []
    for choice in row.choices:
        ids, start = encode(tokenizer, row.prompt, choice)
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        found.append(sum(logprobs[i - 1, ids[i]].item() for i in range(start, len(ids))))
    return found


def test_choice(tokenizer, questions):
    model = build_model("llama")
    score = make_scorer(config("choice", "accuracy"), questions, tokenizer, 128).score(model, 100)
    expected = [direct(model, tokenizer, row) for row in questions]
    hits = [float(max(range(3), key=lambda i: e[i]) == row.answer) for e, row in zip(expected, questions, strict=True)]
    right = [torch.tensor(e).log_softmax(0)[row.answer].item() for e, row in zip(expected, questions, strict=True)]
    assert list(score.values) == hits
    assert score.value == pytest.approx(sum(hits) / 9)
    assert list(score.logprobs) == pytest.approx(right, abs=1e-5)
    assert score.stderr == pytest.approx(torch.tensor(hits).std().item() / 3)
    by_logprob = make_scorer(config("choice", "logprob"), questions, tokenizer, 128).score(model, 100)
    assert by_logprob.values == score.logprobs
    assert by_logprob.value == pytest.approx(sum(right) / 9, abs=1e-5)


def test_loss_is_token_weighted_and_equals_the_models_own(tokenizer):
    model = build_model("llama")
    rows = [TargetRow(f"question: {n}", (" red" + " blue one" * n,), 0) for n in range(1, 5)]
    scorer = make_scorer(config("loss", "loglikelihood"), rows, tokenizer, 128)
    score = scorer.score(model, 50)
    total, tokens = 0.0, 0
    for row in rows:
        ids, start = encode(tokenizer, row.prompt, row.choices[0])
        labels = torch.tensor([[-100] * start + ids[start:]])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([ids]), labels=labels).loss.item()
        total += loss * (len(ids) - start)
        tokens += len(ids) - start
    assert score.value == pytest.approx(-total / tokens, abs=1e-5)
    counts = [len(request.ids) - request.start for request in scorer.requests]
    expected = [total * 4 / sum(counts) for total in score.logprobs]
    assert list(score.values) == pytest.approx(expected, abs=1e-5)
    assert sum(score.logprobs) == pytest.approx(-total, abs=1e-4)


def test_the_head_sees_scored_positions_only(tokenizer):
    model = build_model("llama")
    requests = [Request(tuple(range(10, 30)), 17), Request(tuple(range(40, 52)), 11)]
    seen = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    completion_logprobs(model, requests, 1000)
    handle.remove()
    assert seen == [3 + 1]
    assert not model.lm_head._forward_pre_hooks


def test_positions_hook_leaves_when_scoring_fails():
    model = build_model("llama")
    with pytest.raises(RuntimeError, match="boom"), ScoredPositions(model):
        raise RuntimeError("boom")
    assert not model.lm_head._forward_pre_hooks


def test_a_model_that_gives_nan_has_no_score(tokenizer, questions):
    model = build_model("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    scorer = make_scorer(config("choice", "accuracy"), questions, tokenizer, 128)
    with pytest.raises(FloatingPointError, match="not finite"):
        scorer.score(model, 100)


def test_batches_cover_everything_within_the_budget():
    requests = [Request(tuple(range(n)), 1) for n in (3, 50, 7, 7, 20, 4, 90)]
    made = list(batches(requests, 40))
    assert sorted(index for batch in made for index in batch) == list(range(7))
    for batch in made:
        width = max(len(requests[index].ids) for index in batch)
        assert len(batch) == 1 or len(batch) * width <= 40
    assert len(made) < 7


def test_too_long_a_prompt_loses_its_beginning(tokenizer):
    row = TargetRow("red " * 200, (" one", " two"), 0)
    scorer = make_scorer(config("choice", "accuracy"), [row], tokenizer, 64)
    assert scorer.cut == 2
    assert all(len(request.ids) == 64 for request in scorer.requests)
    assert tokenizer.decode(scorer.requests[0].ids[scorer.requests[0].start :]) == " one"


def test_a_completion_longer_than_the_model_is_refused(tokenizer):
    row = TargetRow("red", (" one" * 70, " two"), 0)
    with pytest.raises(InputError, match="row 1 of the target: a completion of 70 tokens does not fit"):
        make_scorer(config("choice", "accuracy"), [row], tokenizer, 64)


def test_shipped_accuracy_is_an_evaluate_module():
    from importlib.resources import files

    module = evaluate.load(str(files("m2m_hf") / "metrics" / "accuracy"))
    assert isinstance(module, evaluate.Metric)
    result = module.compute(predictions=[0, 1, 2], references=[0, 2, 2])
    assert result == {"accuracy": pytest.approx(2 / 3), "per_example": [1.0, 0.0, 1.0]}


def test_mean_and_stderr():
    assert mean_and_stderr((1.0,)) == (1.0, 0.0)
    mean, stderr = mean_and_stderr((0.0, 1.0, 1.0, 0.0))
    assert (mean, stderr) == (0.5, pytest.approx((1 / 3) ** 0.5 / 2))
