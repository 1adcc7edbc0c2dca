"""Scores of completions against direct computations."""

import math

import pytest
import torch
from pico import (
    build_adapter,
    build_model,
    build_stack,
    config,
    questions_of_many_shapes,
)

from m2m_hf import InputError
from m2m_hf.core.score import Failure, Score
from m2m_hf.data.rows import TargetRow
from m2m_hf.data.tokens import encode
from m2m_hf.merging.adapter import Adapter
from m2m_hf.merging.gated_stack import GatedStack
from m2m_hf.scoring.causal_lm import make_causal_lm_scorer
from m2m_hf.scoring.forward import ScoredPositions, completion_logprobs
from m2m_hf.scoring.packing import Question, Request, batches
from m2m_hf.scoring.scorers import Scorer


def score_of(scorer: Scorer, model, budget: int = 100) -> Score | Failure:
    return scorer.score(GatedStack(model, {}), [{}], budget)[0]


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
    score = score_of(make_causal_lm_scorer(config("choice", "accuracy"), questions, tokenizer, 128), model)
    expected = [direct(model, tokenizer, row) for row in questions]
    hits = [float(max(range(3), key=lambda i: e[i]) == row.answer) for e, row in zip(expected, questions, strict=True)]
    right = [torch.tensor(e).log_softmax(0)[row.answer].item() for e, row in zip(expected, questions, strict=True)]
    assert list(score.values) == hits
    assert score.value == pytest.approx(sum(hits) / 9)
    assert list(score.logprobs) == pytest.approx(right, abs=1e-5)
    assert score.stderr == pytest.approx(torch.tensor(hits).std().item() / 3)
    by_logprob = score_of(make_causal_lm_scorer(config("choice", "logprob"), questions, tokenizer, 128), model)
    assert by_logprob.values == score.logprobs
    assert by_logprob.value == pytest.approx(sum(right) / 9, abs=1e-5)


def test_loss_is_token_weighted_and_equals_the_models_own(tokenizer):
    model = build_model("llama")
    rows = [TargetRow(f"question: {n}", (" red" + " blue one" * n,), 0) for n in range(1, 5)]
    scorer = make_causal_lm_scorer(config("loss", "loglikelihood"), rows, tokenizer, 128)
    score = score_of(scorer, model, 50)
    total, tokens = 0.0, 0
    for row in rows:
        ids, start = encode(tokenizer, row.prompt, row.choices[0])
        labels = torch.tensor([[-100] * start + ids[start:]])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([ids]), labels=labels).loss.item()
        total += loss * (len(ids) - start)
        tokens += len(ids) - start
    assert score.value == pytest.approx(-total / tokens, abs=1e-5)
    counts = [question.requests[0].scored for question in scorer.questions]
    expected = [total * 4 / sum(counts) for total in score.logprobs]
    assert list(score.values) == pytest.approx(expected, abs=1e-5)
    assert sum(score.logprobs) == pytest.approx(-total, abs=1e-4)


def test_the_head_sees_scored_positions_only(tokenizer):
    model = build_model("llama")
    requests = [Request(tuple(range(10, 30)), 17), Request(tuple(range(40, 52)), 11)]
    seen = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    completion_logprobs(GatedStack(model, {}), [{}], [Question((request,)) for request in requests], 1000)
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
    scorer = make_causal_lm_scorer(config("choice", "accuracy"), questions, tokenizer, 128)
    assert score_of(scorer, model) == Failure("the model gives log-probabilities that are not finite")


def test_batches_cover_everything_within_the_budget():
    sizes = (3, 50, 7, 7, 20, 4, 90)
    made = list(batches(sizes, 40))
    assert sorted(index for batch in made for index in batch) == list(range(7))
    for batch in made:
        assert len(batch) == 1 or len(batch) * max(sizes[index] for index in batch) <= 40
    assert len(made) < 7
    assert all(len(batch) <= 2 for batch in batches([1] * 9, 40, [5] * 9))  # logits are dearer than tokens


def test_too_long_a_prompt_loses_its_beginning(tokenizer):
    row = TargetRow("red " * 200, (" one", " two"), 0)
    scorer = make_causal_lm_scorer(config("choice", "accuracy"), [row], tokenizer, 64)
    assert scorer.truncated == 1
    requests = scorer.questions[0].requests
    assert max(len(request.ids) for request in requests) == 64
    assert tokenizer.decode(requests[0].ids[requests[0].start :]) == " one"
    assert scorer.questions[0].shared == requests[0].start


def test_a_completion_longer_than_the_model_is_refused(tokenizer):
    row = TargetRow("red", (" one" * 70, " two"), 0)
    with pytest.raises(InputError, match="row 1 of the target: a completion of 70 tokens does not fit"):
        make_causal_lm_scorer(config("choice", "accuracy"), [row], tokenizer, 64)


FAMILIES = ("llama", "qwen3", "gemma2", "gpt2")


@pytest.mark.parametrize("budget", [1, 40, 10_000])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_shared_by_all_choices_without_changing_a_score(tokenizer, family, budget):
    model = build_model(family)
    rows = questions_of_many_shapes(tokenizer)
    score = score_of(make_causal_lm_scorer(config("choice", "logprob"), rows, tokenizer, 128), model, budget)
    expected = [torch.tensor(direct(model, tokenizer, row)).log_softmax(0)[row.answer].item() for row in rows]
    assert list(score.values) == pytest.approx(expected, abs=2e-5)


def test_every_prompt_is_computed_once(tokenizer, questions):
    model = build_model("llama")
    seen = 0

    def count(module, args, kwargs):
        nonlocal seen
        seen += kwargs["input_ids"].numel()

    model.register_forward_pre_hook(count, with_kwargs=True)
    scorer = make_causal_lm_scorer(config("choice", "accuracy"), questions, tokenizer, 128)
    score_of(scorer, model, 10_000)
    rows = [
        question.shared + sum(len(request.ids) - question.shared - 1 for request in question.requests)
        for question in scorer.questions
    ]
    assert seen == len(questions) * max(rows)
    assert seen < sum(len(request.ids) for question in scorer.questions for request in question.requests) / 2


def test_a_model_without_position_ids_scores_each_choice_alone(tokenizer, questions, monkeypatch):
    model = build_model("llama")
    expected = score_of(make_causal_lm_scorer(config("choice", "logprob"), questions, tokenizer, 128), model)
    monkeypatch.setattr("m2m_hf.scoring.forward.shared_span", lambda model: 0)
    alone = score_of(make_causal_lm_scorer(config("choice", "logprob"), questions, tokenizer, 128), model)
    assert alone.values == pytest.approx(expected.values, abs=1e-5)


@pytest.mark.parametrize("normalize", ["none", "tokens", "bytes"])
def test_length_normalisation(tokenizer, normalize):
    model = build_model("llama")
    rows = questions_of_many_shapes(tokenizer)
    score = score_of(
        make_causal_lm_scorer(config("choice", "accuracy", normalize=normalize), rows, tokenizer, 128), model
    )
    for row, hit, logprob in zip(rows, score.values, score.logprobs, strict=True):
        sums = torch.tensor(direct(model, tokenizer, row))
        count = {
            "none": lambda choice: 1,
            "tokens": lambda choice, row=row: (
                len(tokenizer(row.prompt + choice)["input_ids"]) - len(tokenizer(row.prompt)["input_ids"])
            ),
            "bytes": lambda choice: len(choice.encode()),
        }[normalize]
        values = sums / torch.tensor([count(choice) for choice in row.choices])
        assert hit == float(values.argmax() == row.answer)
        assert logprob == pytest.approx(values.log_softmax(0)[row.answer].item(), abs=1e-4)


MIXTURES = [{}, {"a": 1.0}, {"a": 0.5, "c": 0.5}, {"a": 0.2, "b": 0.3, "c": 0.5}]


@pytest.mark.parametrize("budget", [30, 300, 10_000])
@pytest.mark.parametrize("family", FAMILIES)
def test_several_mixtures_in_one_pass_score_as_one_by_one(tmp_path, tokenizer, family, budget):
    stack = build_stack(tmp_path, family)
    assert stack.takes_rows
    rows = questions_of_many_shapes(tokenizer)
    for scorer in (
        make_causal_lm_scorer(config("choice", "logprob"), rows, tokenizer, 128),
        make_causal_lm_scorer(
            config("loss", "loglikelihood"), [TargetRow(r.prompt, r.choices[:1], 0) for r in rows], tokenizer, 128
        ),
    ):
        together = scorer.score(stack, MIXTURES, budget)
        for weights, score in zip(MIXTURES, together, strict=True):
            alone = scorer.score(stack, [weights], budget)[0]
            assert score.values == pytest.approx(alone.values, abs=2e-5)
        assert len({round(score.value, 3) for score in together}) == len(MIXTURES)


def test_how_many_mixtures_share_a_pass_follows_from_the_token_budget(tmp_path, tokenizer, questions):
    stack = build_stack(tmp_path, "llama")
    scorer = make_causal_lm_scorer(config("choice", "accuracy"), questions, tokenizer, 128)
    assert scorer.at_once(stack, scorer.tokens - 1, 9) == 1
    assert scorer.at_once(stack, 3 * scorer.tokens, 9) == 3
    assert scorer.at_once(stack, scorer.tokens, 3) == 3  # on a third of the rows three mixtures fill what one did
    with_head = build_stack(tmp_path / "head", "llama", target_modules=["q_proj", "lm_head"])
    assert not with_head.takes_rows  # the head sees scored positions, not rows
    assert scorer.at_once(with_head, 3 * scorer.tokens, 9) == 1
    assert scorer.score(with_head, [MIXTURES[2]], 100)[0].value != scorer.score(with_head, [{}], 100)[0].value


class SmallMemory:
    """A model that has memory for so many tokens at a time."""

    def __init__(self, model, tokens: int) -> None:
        self.tried: list[int] = []

        def look(module, args, kwargs):
            ids = kwargs.get("input_ids", args[0] if args else None)
            self.tried.append(ids.numel())
            if ids.numel() > tokens:
                raise RuntimeError(
                    "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
                )

        model.register_forward_pre_hook(look, with_kwargs=True)


@pytest.mark.parametrize("tokens", [40, 100, 170])
def test_where_memory_does_not_suffice_batches_are_halved_and_scores_are_the_same(
    tmp_path, tokenizer, questions, tokens
):
    adapters = {name: Adapter.load(build_adapter("llama", tmp_path / name, seed)) for seed, name in enumerate("ab")}
    scorer = make_causal_lm_scorer(config("choice", "accuracy"), questions, tokenizer, 128)
    mixtures = [{"a": 1.0}, {"a": 0.5, "b": 0.5}, {}]
    expected = scorer.score(GatedStack(build_model("llama"), adapters), mixtures, 1000)
    stack = GatedStack(build_model("llama"), adapters)
    small = SmallMemory(stack.model, tokens)
    for _ in range(2):
        found = scorer.score(stack, mixtures, 1000)
        for one, other in zip(found, expected, strict=True):
            assert one.values == other.values
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    assert stack.shrink > 1
    failed = sum(size > tokens for size in small.tried)
    assert failed <= math.log2(stack.shrink)  # it learns from every failure, and does not try again
    assert len(small.tried) > failed


def test_generation_and_gradients_halve_too(tmp_path, tokenizer):
    rows = [TargetRow(f"question: {n}", (" red",), 0) for n in range(1, 9)]
    adapters = {"a": Adapter.load(build_adapter("llama", tmp_path / "a", 1))}
    for scorer, ask in (
        (make_causal_lm_scorer(config("generation", "exact_match"), rows, tokenizer, 128), "score"),
        (make_causal_lm_scorer(config("loss", "loglikelihood"), rows, tokenizer, 128), "gradient"),
    ):
        stacks = [GatedStack(build_model("llama"), adapters) for _ in range(2)]
        SmallMemory(stacks[1].model, 20)
        if ask == "score":
            whole, halved = (scorer.score(stack, [{"a": 1.0}], 10_000)[0] for stack in stacks)
        else:
            (whole, slope), (halved, other) = (scorer.gradient(stack, {"a": 1.0}, 10_000) for stack in stacks)
            assert slope["a"] == pytest.approx(other["a"], rel=1e-4)
        assert whole.values == pytest.approx(halved.values, abs=1e-5)
        assert stacks[1].shrink > 1


def test_a_row_that_alone_does_not_fit_is_said_and_other_errors_are_not_caught(tokenizer, questions):
    scorer = make_causal_lm_scorer(config("choice", "accuracy"), questions, tokenizer, 128)
    model = build_model("llama")
    SmallMemory(model, 3)
    stack = GatedStack(model, {})
    with pytest.raises(InputError, match="not even one row fits into memory"):
        scorer.score(stack, [{}], 1000)
    model.register_forward_pre_hook(lambda module, args: [][0], prepend=True)
    with pytest.raises(IndexError):
        scorer.score(GatedStack(model, {}), [{}], 1000)
