"""Scorers against direct computations."""

import math

import evaluate
import pytest
import torch
from pico import build_adapter, build_model, build_stack, choice_rows, config, questions_of_many_shapes

from m2m_hf.core.score import Failure, Score, mean_and_stderr
from m2m_hf.data.causal_lm import target_row
from m2m_hf.data.rows import TargetRow
from m2m_hf.data.tokens import encode
from m2m_hf.errors import InputError
from m2m_hf.merging.adapter import Adapter
from m2m_hf.merging.gated_stack import GatedStack
from m2m_hf.scoring.causal_lm import make_causal_lm_scorer
from m2m_hf.scoring.forward import ScoredPositions, completion_logprobs
from m2m_hf.scoring.metrics.metric import SHIPPED_FILE, Metric, bootstrap
from m2m_hf.scoring.packing import Question, Request, batches
from m2m_hf.scoring.scorers import Scorer


def score_of(scorer: Scorer, model, budget: int = 100) -> Score | Failure:
    return scorer.score(GatedStack(model, {}), [{}], budget)[0]


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


def test_shipped_accuracy_is_an_evaluate_module():
    module = evaluate.load(str(SHIPPED_FILE), config_name="accuracy")
    assert isinstance(module, evaluate.Metric)
    result = module.compute(predictions=[0, 1, 2], references=[0, 2, 2])
    assert result == {"accuracy": pytest.approx(2 / 3), "per_example": [1.0, 0.0, 1.0]}


def test_mean_and_stderr():
    assert mean_and_stderr((1.0,)) == (1.0, 0.0)
    mean, stderr = mean_and_stderr((0.0, 1.0, 1.0, 0.0))
    assert (mean, stderr) == (0.5, pytest.approx((1 / 3) ** 0.5 / 2))


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


def test_shipped_text_metrics():
    def values(name: str, *pairs: tuple[str, str]) -> tuple[float, ...]:
        value, _, each = Metric(name, None, False, "t")([a for a, _ in pairs], [b for _, b in pairs])
        assert value == pytest.approx(sum(each) / len(each))
        return each

    pairs = [(" a  b\n", "a b"), ("A b", "a b"), ("", ""), ("a", "")]
    assert values("exact_match", *pairs) == (1, 0, 1, 0)
    pairs = [
        ("so 1,234.0 it is", "#### 1234"),
        ("12", "the answer is -12"),
        ("none", "3"),
        ("3 then 4.", "4"),
        ("5", "none"),
    ]
    assert values("numeric_match", *pairs) == (1, 0, 0, 1, 0)
    pairs = [("The cat sat.", "a cat sat down"), ("", ""), ("dog", "cat"), ("x x y", "x y y")]
    assert values("token_f1", *pairs) == (pytest.approx(0.8), 1, 0, pytest.approx(2 / 3))


CORPUS = '''
import datasets
import evaluate
class Spread(evaluate.Metric):
    """How many different predictions there are, over how many there are."""
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)
    def _compute(self, predictions, references):
        return {"spread": len(set(predictions)) / len(predictions), "other": 1.0}
'''


def test_a_metric_of_ones_own_runs_only_when_allowed(tmp_path):
    module = tmp_path / "spread" / "spread.py"
    module.parent.mkdir()
    module.write_text(CORPUS)
    with pytest.raises(InputError, match="allow_metric_code: true"):
        Metric(str(module.parent), None, False, "targets.t")
    metric = Metric(str(module.parent), None, True, "targets.t")
    value, stderr, each = metric(["a", "b", "b", "c"], ["x"] * 4)
    assert (value, each) == (0.75, ())
    assert 0 < stderr < 0.5  # a bootstrap's, since a corpus metric has no values of its own for the examples
    assert metric(["a", "b", "b", "c"], ["x"] * 4)[1] == stderr
    assert Metric(str(module), "other", True, "t")(["a", "b"], ["x", "y"])[0] == 1.0
    with pytest.raises(InputError, match="say which of them is the score with metric_key"):
        Metric(str(module), "nothing", True, "t")(["a", "b"], ["x", "y"])
    with pytest.raises(InputError, match="cannot be loaded"):
        Metric(str(tmp_path / "nowhere"), None, True, "t")


def test_bootstrap_agrees_with_the_formula_for_a_mean():
    values = [float(n % 7 == 0) for n in range(200)]
    estimate = bootstrap(len(values), lambda chosen: sum(values[i] for i in chosen) / len(chosen))
    assert estimate == pytest.approx(mean_and_stderr(values)[1], rel=0.15)


def test_a_metric_that_does_not_fit_its_scorer_is_refused(tokenizer, questions):
    with pytest.raises(InputError, match="compares texts, and scorer choice gives indices"):
        make_causal_lm_scorer(config("choice", "exact_match"), questions, tokenizer, 128)


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
