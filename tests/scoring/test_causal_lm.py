"""Scores of completions against direct computations, and free answers against greedy decoding, token by token."""

import math
from types import SimpleNamespace

import pytest
import torch
from pico import (
    DEVICE,
    build_adapter,
    build_model,
    build_stack,
    config,
    observed,
    questions_of_many_shapes,
    scorer_on,
    small_memory,
)

from m2m_hf import InputError
from m2m_hf.core.score import Failure, Score
from m2m_hf.data.rows import TargetRow
from m2m_hf.data.tokens import encode
from m2m_hf.merging.adapter import Adapter
from m2m_hf.merging.gated_stack import GatedStack
from m2m_hf.scoring import forward, prefixes
from m2m_hf.scoring.forward import UNSHARED, by_answer, completion_logprobs
from m2m_hf.scoring.generation import GenerationScorer
from m2m_hf.scoring.packing import Question, Request, batches
from m2m_hf.scoring.prefixes import scored_positions, shared_beginnings
from m2m_hf.scoring.probing import settle
from m2m_hf.scoring.scorers import Scorer, Setup

FAMILIES = ("llama", "qwen3", "gemma2", "gpt2")
MIXTURES = [{}, {"a": 1.0}, {"a": 0.5, "c": 0.5}, {"a": 0.2, "b": 0.3, "c": 0.5}]


def score_of(scorer: Scorer, model, budget: int = 100) -> Score | Failure:
    return scorer.score(GatedStack(model, {}), [{}], budget)[0]


def direct(model, tokenizer, row: TargetRow) -> list[float]:
    """Log-probability of every choice, one forward pass each."""
    found = []
    for choice in row.choices:
        ids, start = encode(tokenizer, row.prompt, choice)
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([ids], device=DEVICE)).logits[0].log_softmax(-1)
        found.append(sum(logprobs[i - 1, ids[i]].item() for i in range(start, len(ids))))
    return found


@pytest.mark.parametrize("normalize", ["none", "tokens", "bytes"])
def test_choice(tokenizer, normalize):
    model = build_model("llama")
    rows = questions_of_many_shapes(tokenizer)
    score = score_of(scorer_on(rows, tokenizer, "choice", "accuracy", normalize=normalize), model)

    def length(row: TargetRow, choice: str) -> int:
        tokens = len(tokenizer(row.prompt + choice)["input_ids"]) - len(tokenizer(row.prompt)["input_ids"])
        return {"none": 1, "tokens": tokens, "bytes": len(choice.encode())}[normalize]

    for row, hit, logprob in zip(rows, score.values, score.logprobs, strict=True):
        lengths = torch.tensor([length(row, choice) for choice in row.choices])
        values = torch.tensor(direct(model, tokenizer, row)) / lengths
        assert hit == float(values.argmax() == row.answer)
        assert logprob == pytest.approx(values.log_softmax(0)[row.answer].item(), abs=1e-4)
    hits = torch.tensor(score.values)
    assert score.value == pytest.approx(hits.mean().item())
    assert score.stderr == pytest.approx(hits.std().item() / math.sqrt(len(rows)))


@pytest.mark.parametrize("normalize", ["none", "tokens", "bytes"])
def test_preference(tokenizer, normalize):
    model = build_model("llama")
    rows = [TargetRow(row.prompt, row.choices[:2], 1) for row in questions_of_many_shapes(tokenizer)]
    scorers = [
        scorer_on(rows, tokenizer, "preference", metric, normalize=normalize) for metric in ("accuracy", "margin")
    ]
    accuracy, margin = (score_of(scorer, model) for scorer in scorers)
    for row, hit, value, logprob in zip(rows, accuracy.values, margin.values, margin.logprobs, strict=True):
        start = len(tokenizer(row.prompt)["input_ids"])
        tokens = [len(tokenizer(row.prompt + choice)["input_ids"]) - start for choice in row.choices]
        lengths = torch.tensor({"none": [1, 1], "tokens": tokens, "bytes": [4, 15]}[normalize])
        rejected, chosen = (torch.tensor(direct(model, tokenizer, row), dtype=torch.float64) / lengths).tolist()
        assert value == pytest.approx(chosen - rejected, abs=1e-4)
        assert hit == float(chosen > rejected)
        assert logprob == pytest.approx(-math.log1p(math.exp(rejected - chosen)), abs=1e-4)
    assert margin.logprobs == accuracy.logprobs
    assert margin.value == pytest.approx(sum(margin.values) / len(rows))
    assert [scorer.has_ensemble for scorer in scorers] == [True, False]
    assert scorers[0].fingerprint != scorers[1].fingerprint


def test_a_tie_is_no_win_and_bytes_are_those_of_one_text(tokenizer):
    scorer = scorer_on([TargetRow("red?", (" one", " two"), 1)] * 3, tokenizer, "preference", "accuracy")
    assert scorer.reduce([(-2.0, -2.0), (-2.0, -1.9), (-1.9, -2.0)], range(3)).values == (0.0, 1.0, 0.0)
    turns = [{"role": role, "content": "red"} for role in ("assistant", "user", "assistant")]
    rows = [TargetRow(turns[1:2], (turns, turns[:1]), 1)]
    with pytest.raises(InputError, match="row 1 of the target: normalize: bytes counts one text"):
        scorer_on(rows, tokenizer, "preference", "margin", normalize="bytes")
    assert scorer_on(rows, tokenizer, "preference", "margin", normalize="tokens").examples == 1


def test_loss_is_token_weighted_and_equals_the_models_own(tokenizer):
    model = build_model("llama")
    rows = [TargetRow(f"question: {n}", (" red" + " blue one" * n,), 0) for n in range(1, 5)]
    scorer = scorer_on(rows, tokenizer, "loss", "loglikelihood")
    score = score_of(scorer, model, 50)
    total, counts = 0.0, []
    for row in rows:
        ids, start = encode(tokenizer, row.prompt, row.choices[0])
        labels = torch.tensor([[-100] * start + ids[start:]], device=DEVICE)
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([ids], device=DEVICE), labels=labels).loss.item()
        counts.append(len(ids) - start)
        total += loss * counts[-1]
    assert score.value == pytest.approx(-total / sum(counts), abs=1e-5)
    expected = [logprob * 4 / sum(counts) for logprob in score.logprobs]
    assert list(score.values) == pytest.approx(expected, abs=1e-5)
    assert sum(score.logprobs) == pytest.approx(-total, abs=1e-4)


def test_the_head_sees_scored_positions_only_while_it_is_asked():
    model = build_model("llama")
    requests = [Request(tuple(range(10, 30)), 17), Request(tuple(range(40, 52)), 11)]
    seen = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    completion_logprobs(GatedStack(model, {}), [{}], [Question([request]) for request in requests], 1000)
    handle.remove()
    assert seen == [3 + 1]
    with pytest.raises(RuntimeError, match="boom"), scored_positions(model, torch.zeros(1, dtype=torch.long)):
        raise RuntimeError("boom")
    assert not model.lm_head._forward_pre_hooks


def test_a_model_that_gives_nan_has_no_score(tokenizer, questions):
    model = build_model("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    scorer = scorer_on(questions, tokenizer, "choice", "accuracy")
    assert score_of(scorer, model) == Failure("the model gives log-probabilities that are not finite")


def test_batches_cover_everything_within_the_budget():
    sizes = (3, 50, 7, 7, 20, 4, 90)
    made = list(batches(sizes, 40))
    assert sorted(index for batch in made for index in batch) == list(range(7))
    for batch in made:
        assert len(batch) == 1 or len(batch) * max(sizes[index] for index in batch) <= 40
    assert len(made) < 7
    assert all(len(batch) <= 2 for batch in batches([1] * 9, 40, [5] * 9))  # logits are dearer than tokens


def test_too_long_a_prompt_loses_its_beginning_and_too_long_a_completion_is_refused(tokenizer):
    scorer = scorer_on([TargetRow("red " * 200, (" one", " two"), 0)], tokenizer, "choice", "accuracy", 64)
    assert scorer.truncated == 1
    (question,) = scorer.inputs.questions
    assert max(len(request.ids) for request in question.requests) == 64
    first = question.requests[0]
    assert tokenizer.decode(first.ids[first.start :]) == " one"
    assert question.shared == first.start
    with pytest.raises(InputError, match="row 1 of the target: a completion of 70 tokens does not fit"):
        scorer_on([TargetRow("red", (" one" * 70, " two"), 0)], tokenizer, "choice", "accuracy", 64)


@pytest.mark.parametrize("budget", [1, 40, 10_000])
@pytest.mark.parametrize("family", [*FAMILIES, "llama, whose rows cannot branch"])
def test_prompts_are_shared_by_all_choices_without_changing_a_score(tokenizer, family, budget, monkeypatch):
    if family not in FAMILIES:
        monkeypatch.setattr("m2m_hf.scoring.forward.shared_span", lambda model: 0)
    model = build_model(family.split(",")[0])
    rows = questions_of_many_shapes(tokenizer)
    score = score_of(scorer_on(rows, tokenizer, "choice", "logprob"), model, budget)
    expected = [torch.tensor(direct(model, tokenizer, row)).log_softmax(0)[row.answer].item() for row in rows]
    assert list(score.values) == pytest.approx(expected, abs=2e-5)


def test_every_prompt_is_computed_once(tokenizer, questions):
    model = build_model("llama")
    seen = []
    observed(model, seen.append)
    scorer = scorer_on(questions, tokenizer, "choice", "accuracy")
    score_of(scorer, model, 10_000)
    asked = scorer.inputs.questions
    rows = [one.shared + sum(len(request.ids) - one.shared - 1 for request in one.requests) for one in asked]
    assert sum(seen) == len(questions) * max(rows)
    assert sum(seen) < sum(len(request.ids) for one in asked for request in one.requests) / 2


@pytest.mark.parametrize("budget", [30, 300, 10_000])
@pytest.mark.parametrize("family", [*FAMILIES, "llama, preferences"])
def test_several_mixtures_in_one_pass_score_as_one_by_one(tmp_path, tokenizer, family, budget):
    stack = build_stack(tmp_path, family.split(",")[0])
    assert stack.takes_rows
    rows = questions_of_many_shapes(tokenizer)
    scorer = scorer_on(rows, tokenizer, "choice", "logprob")
    if family not in FAMILIES:
        pairs = [TargetRow(row.prompt, row.choices[:2], 1) for row in rows]
        scorer = scorer_on(pairs, tokenizer, "preference", "margin")
    together = scorer.score(stack, MIXTURES, budget)
    for weights, score in zip(MIXTURES, together, strict=True):
        assert score.values == pytest.approx(scorer.score(stack, [weights], budget)[0].values, abs=2e-5)
    assert len({round(score.value, 3) for score in together}) == len(MIXTURES)


def with_shots(tokenizer) -> list[TargetRow]:
    """Rows that begin with one of two runs of examples, and one that begins like no other."""
    rows = questions_of_many_shapes(tokenizer)
    shots = ("question: one two big? answer: red " * 5, "question: big? answer: green blue " * 4)
    rows = [TargetRow(shots[n % 2] + row.prompt, row.choices, row.answer) for n, row in enumerate(rows)]
    return [*rows, TargetRow("question: red? answer:", (" one", " two"), 0)]


@pytest.mark.parametrize("budget", [1, 150, 10_000])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_rows_begin_with_is_computed_once_for_a_mixture_without_changing_a_score(
    tmp_path, tokenizer, family, budget
):
    stack = build_stack(tmp_path, family)
    scorer = scorer_on(with_shots(tokenizer), tokenizer, "choice", "logprob")
    ahead, seen = scorer.inputs.beginnings, []
    assert [len(one) >= 32 for one in ahead] == [True, True]
    observed(stack.model, seen.append)
    together = scorer.score(stack, MIXTURES, budget)
    own = len(MIXTURES) * sum(len(one.ids) for one in scorer.inputs.questions)
    assert (sum(seen) < own) == (family != "gemma2")  # whose window is narrower than that
    for weights, score in list(zip(MIXTURES, together, strict=True))[::3]:
        some = scorer.score(stack, [weights], 70, rows=[6, 1])[0].values
        assert some == pytest.approx([score.values[6], score.values[1]], abs=1e-5)
        stack.set(weights)
        for row, value in zip(scorer.rows, score.values, strict=True):
            expected = torch.tensor(direct(stack.model, tokenizer, row)).log_softmax(0)[row.answer].item()
            assert value == pytest.approx(expected, abs=1e-5)
    scorer.keep_apart(UNSHARED)
    seen.clear()
    assert scorer.score(stack, MIXTURES[3:], budget)[0].values == pytest.approx(together[3].values, abs=1e-5)
    assert sum(seen) > own / len(MIXTURES)


def test_beginnings_are_shared_where_that_saves_much_and_each_row_keeps_what_predicts_its_first_token():
    shots, other = tuple(range(100, 140)), tuple(range(200, 270))

    def asked(*texts: tuple[int, ...]) -> tuple[list[int], list[int]]:
        numbers, ahead = shared_beginnings([Question([Request((*text, 1), len(text))]) for text in texts])
        assert all(
            text[: len(ahead[n])] == ahead[n] and len(text) > len(ahead[n])
            for n, text in zip(numbers, texts, strict=True)
            if n >= 0
        )
        return numbers, [len(one) for one in ahead]

    assert asked((*shots, 7), (*shots, 8), (*shots, 9, 9)) == ([0, 0, 0], [40])
    assert asked(shots, shots, (*shots, 8)) == ([0, 0, 0], [39])
    assert asked((*shots, 7)) == ([-1], [])
    assert asked((*shots, 7), (9,) * 40, (*shots, 8)) == ([0, -1, 0], [40])
    assert asked((*shots[:30], 7), (*shots[:30], 8)) == ([-1, -1], [])
    assert asked((*shots, *[7] * 400), (*shots, *[8] * 400)) == ([-1, -1], [])  # a mask would cost more than that saves
    system = [(*shots, *other, 7), (*shots, *other, 8), (*shots, *other[::-1], 7), (*shots, *other[::-1], 8)]
    assert asked(*system) == ([0, 0, 1, 1], [110, 110])
    assert asked(*[(*shots, number) for number in range(9)], (*shots, *other, 7))[1] == [40]


def test_a_model_that_reads_rows_behind_a_beginning_otherwise_has_them_kept_apart(tokenizer, monkeypatch):
    scorer = scorer_on(with_shots(tokenizer), tokenizer, "choice", "logprob")
    before, stack = scorer.fingerprint, GatedStack(build_model("llama"), {})
    assert scorer.inputs.reading == ["beginnings"]  # in the fingerprint, since a journal of before has not tried this
    assert settle(stack, [{}], scorer) is None
    assert scorer.fingerprint == before
    monkeypatch.setattr(
        prefixes.Ahead,
        "_before",
        staticmethod(lambda parts, own: own.repeat(1, 1, 9, 1)[:, :, -len(parts[0][0, 0]) - own.shape[2] :]),
    )
    assert "every choice is scored in a row of its own" in settle(stack, [{}], scorer)
    values = scorer.score(stack, [{}], 1000)[0].values
    expected = [
        torch.tensor(direct(stack.model, tokenizer, row)).log_softmax(0)[row.answer].item() for row in scorer.rows
    ]
    assert list(values) == pytest.approx(expected, abs=1e-5)


@pytest.mark.cpu_only("on a card groups of mixtures are those of several passes")
def test_how_many_mixtures_share_a_pass_follows_from_the_token_budget(tmp_path, tokenizer, questions):
    stack = build_stack(tmp_path, "llama")
    scorer = scorer_on(questions, tokenizer, "choice", "accuracy")
    assert scorer.at_once(stack, scorer.tokens - 1, 9) == 1
    assert scorer.at_once(stack, 3 * scorer.tokens, 9) == 3
    assert scorer.at_once(stack, scorer.tokens, 3) == 3  # on a third of the rows three mixtures fill what one did
    gpu = SimpleNamespace(takes_rows=True, model=SimpleNamespace(device=torch.device("cuda")))
    assert (
        scorer.at_once(gpu, 3 * scorer.tokens, 9) == 12
    )  # in four passes, none of which waits for what the others found
    assert scorer.at_once(gpu, scorer.tokens, 9) == 1
    with_head = build_stack(tmp_path / "head", "llama", target_modules=["q_proj", "lm_head"])
    assert not with_head.takes_rows  # the head sees scored positions, not rows
    assert scorer.at_once(with_head, 3 * scorer.tokens, 9) == 1
    assert scorer.score(with_head, [MIXTURES[2]], 100)[0].value != scorer.score(with_head, [{}], 100)[0].value


def test_what_passes_find_is_read_when_all_are_under_way(tmp_path, tokenizer, questions, monkeypatch):
    stack = build_stack(tmp_path, "llama")
    scorer = scorer_on(questions, tokenizer, "choice", "logprob")
    order = []
    observed(stack.model, lambda count: order.append("pass"))
    monkeypatch.setattr(forward, "by_answer", lambda *found: order.append("read") or by_answer(*found))
    scorer.score(stack, MIXTURES, 100)
    assert order == ["pass"] * (len(order) // 2) + ["read"] * (len(order) // 2)
    assert len(order) > 4


def test_logits_are_looked_at_a_few_positions_at_a_time(tmp_path, tokenizer, monkeypatch):
    stack = build_stack(tmp_path, "llama")
    scorer = scorer_on(questions_of_many_shapes(tokenizer), tokenizer, "choice", "logprob")
    expected = scorer.score(stack, MIXTURES, 10_000)
    for positions in (1, 3, 50):
        monkeypatch.setattr(forward, "POSITIONS", positions)
        assert scorer.score(stack, MIXTURES, 10_000) == expected


@pytest.mark.parametrize("tokens", [40, 100, 170])
def test_where_memory_does_not_suffice_batches_are_halved_and_scores_are_the_same(
    tmp_path, tokenizer, questions, tokens
):
    adapters = build_stack(tmp_path, "llama").adapters
    scorer = scorer_on(questions, tokenizer, "choice", "accuracy")
    mixtures = MIXTURES[:3]
    expected = scorer.score(GatedStack(build_model("llama"), adapters), mixtures, 1000)
    stack = GatedStack(build_model("llama"), adapters)
    tried = small_memory(stack.model, tokens)
    for _ in range(2):
        found = scorer.score(stack, mixtures, 1000)
        for one, other in zip(found, expected, strict=True):
            assert one.values == other.values
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    assert stack.shrink > 1
    failed = sum(size > tokens for size in tried)
    assert failed <= math.log2(stack.shrink)  # it learns from every failure, and does not try again
    assert len(tried) > failed


def test_generation_and_gradients_halve_too(tmp_path, tokenizer):
    rows = [TargetRow(f"question: {n}", (" red",), 0) for n in range(1, 9)]
    adapters = {"a": Adapter.load(build_adapter("llama", tmp_path / "a", 1))}

    def stacks() -> tuple[GatedStack, GatedStack]:
        whole, small = (GatedStack(build_model("llama"), adapters) for _ in range(2))
        small_memory(small.model, 20)
        return whole, small

    scorer = scorer_on(rows, tokenizer, "generation", "exact_match")
    whole, small = stacks()
    assert scorer.score(small, [{"a": 1.0}], 10_000)[0] == scorer.score(whole, [{"a": 1.0}], 10_000)[0]
    assert small.shrink > 1
    scorer = scorer_on(rows, tokenizer, "loss", "loglikelihood")
    whole, small = stacks()
    (score, slope), (halved, other) = (scorer.gradient(stack, {"a": 1.0}, 10_000) for stack in (whole, small))
    assert slope["a"] == pytest.approx(other["a"], rel=1e-4)
    assert score.values == pytest.approx(halved.values, abs=1e-5)
    assert small.shrink > 1


def test_a_row_that_alone_does_not_fit_is_said_and_other_errors_are_not_caught(tokenizer, questions):
    scorer = scorer_on(questions, tokenizer, "choice", "accuracy")
    model = build_model("llama")
    small_memory(model, 3)
    with pytest.raises(InputError, match="not even one row fits into memory"):
        score_of(scorer, model, 1000)
    model.register_forward_pre_hook(lambda module, args: [][0], prepend=True)
    with pytest.raises(IndexError):
        score_of(scorer, model, 1000)


def generated(model, tokenizer, row: TargetRow, new: int) -> str:
    """One prompt, greedily, token by token, without a cache."""
    ids = tokenizer(row.prompt)["input_ids"]
    start = len(ids)
    for _ in range(new):
        with torch.no_grad():
            ids = [*ids, int(model(input_ids=torch.tensor([ids], device=DEVICE)).logits[0, -1].argmax())]
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
    scorer = scorer_on(rows, tokenizer, "generation", "exact_match", generation={"max_new_tokens": 6})
    for index, score in enumerate(scorer.score(stack, MIXTURES, budget)):
        hits = [truth[index][n].split() == truth[n % 4][n].split() for n in range(len(rows))]
        assert list(score.values) == [float(hit) for hit in hits]
        assert scorer.score(stack, [MIXTURES[index]], budget)[0] == score


def test_another_kind_of_scorer_on_the_same_rows_has_another_fingerprint(tokenizer):
    rows = [TargetRow("question: red? answer:", (" one",), 0)]
    kinds = [config(kind, "exact_match") for kind in ("generation", "loss")]  # both compare texts
    assert len({GenerationScorer(kind, rows, Setup(tokenizer, 128)).fingerprint for kind in kinds}) == 2


def test_generation_stops_at_a_string(tokenizer):
    model = build_model("llama")
    row = TargetRow("question: red? answer:", ("x",), 0)
    whole = generated(model, tokenizer, row, 12)
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    row = TargetRow(row.prompt, (whole.split(stop)[0],), 0)
    options = {"max_new_tokens": 12, "stop_strings": [stop]}
    assert score_of(scorer_on([row], tokenizer, "generation", "exact_match", generation=options), model).value == 1.0


def test_sampling_does_not_depend_on_the_batches(tokenizer):
    model = build_model("llama")
    rows = [TargetRow(f"question: {n}", ("x",), 0) for n in range(4)]
    options = {"max_new_tokens": 5, "do_sample": True}
    scorer = scorer_on(rows, tokenizer, "generation", "token_f1", generation=options)
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
        scorer_on([TargetRow("a", ("b",), 0)], tokenizer, "generation", "exact_match", generation=options)
