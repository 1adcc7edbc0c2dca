"""Rows that leave, join and share a beginning are answered as `generate` answers each of them alone."""

import copy
from types import SimpleNamespace

import pytest
import torch
from families import prompts
from pico import DEVICE, build_model, build_stack, scorer_on, small_memory
from pico_families import CAUSAL
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from m2m_hf import InputError
from m2m_hf.data.rows import TargetRow
from m2m_hf.merging.gated_stack import GatedStack
from m2m_hf.scoring import generation
from m2m_hf.scoring.decoding import is_plain
from m2m_hf.scoring.forward import ALIKE, TOGETHER, UNSHARED
from m2m_hf.scoring.probing import difference, settle

SHOTS = "question: red blue one? answer: two " * 4
LIMITS = [8, 2, 5, 8, 1, 4, 6]
WIDE = {"sliding_window": 220, "attention_chunk_size": 220}  # than any row here
# Whose rows cannot wait in places: recurrent states, ALiBi, frequencies that follow the longest row, local attention.
OTHERS = {
    "Qwen3-Next", "Qwen3.5", "RecurrentGemma", "Bloom", "MPT", "Falcon-H1", "Granite 4", "Granite 4, MoE", "LFM2", "Jamba",
    "Bamba", "Zamba2", "Mamba", "Mamba 2", "Nemotron-H", "MiniMax", "RWKV", "Llama, dynamic NTK", "Phi-3, longrope", "GPT-Neo",
}  # fmt: skip
MIXTURES = [{}, {"a": 1.0}, {"a": 0.2, "b": 0.3, "c": 0.5}]


def of_family(family) -> torch.nn.Module:
    torch.manual_seed(0)
    shape = {name: WIDE.get(name, value) for name, value in copy.deepcopy(family.config).items()}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family.kind, **shape))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return model.to(DEVICE).eval()


def scorer_of(tokenizer, monkeypatch, **options):
    """A scorer of seven rows, three of which share a beginning; few of them fit into a batch."""
    monkeypatch.setattr(generation, "PLACES", 1)
    rows = [TargetRow((SHOTS if row % 2 else "") + one, ("x",), 0) for row, one in enumerate(prompts(7))]
    scorer = scorer_on(
        rows, tokenizer, "generation", "exact_match", positions=256, generation={"max_new_tokens": 8} | options
    )
    assert len(scorer.beginnings) == 1
    scorer.limits = LIMITS
    return scorer


def generated(model, scorer, row: int, **options) -> list[int]:
    ids = torch.tensor([scorer.prompts[row]], device=DEVICE)
    settings = {
        "max_new_tokens": scorer.limits[row],
        "do_sample": False,
        "eos_token_id": 0,
        "pad_token_id": 0,
    } | options
    found = model.generate(ids, attention_mask=torch.ones_like(ids), tokenizer=scorer.tokenizer, **settings)
    return found[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("family", [one for one in CAUSAL if one.name not in OTHERS], ids=lambda family: family.name)
def test_answers_and_logits_are_those_of_one_row_at_a_time(tokenizer, monkeypatch, family):
    model, scorer = of_family(family), scorer_of(tokenizer, monkeypatch)
    assert scorer.refills(model)
    with torch.inference_mode():
        gaps = [difference(one, scorer.alone(model, row)) for row, one in enumerate(scorer.numbers(model, range(7)))]
        assert max(gaps) < 1e-5
        (found,) = scorer.decoded(GatedStack(model, {}), [{}], 300, range(7))
        expected = [generated(model, scorer, row) for row in range(7)]
    assert [one.ids for one in found] == expected
    assert [one.ended for one in found] == [ids[-1] == 0 for ids in expected]


@pytest.mark.parametrize("name", sorted(OTHERS & {"Bloom", "GPT-Neo", "Phi-3, longrope"}))
def test_other_families_are_answered_by_generate(tokenizer, monkeypatch, name):
    (family,) = [one for one in CAUSAL if one.name == name]
    model, scorer = of_family(family), scorer_of(tokenizer, monkeypatch)
    said = settle(GatedStack(model, {}), [{}], scorer)
    assert not scorer.refills(model)
    assert (scorer.apart, said is None) == {
        "Bloom": (TOGETHER, True), "GPT-Neo": (UNSHARED, False), "Phi-3, longrope": (ALIKE, False)
    }[name]  # fmt: skip
    assert name != "GPT-Neo" or said.endswith("rows are answered in batches that last as long as their longest answer")
    scorer.limits = [8] * 7
    (found,) = scorer.decoded(GatedStack(model, {}), [{}], 300, range(7))
    assert [one.ids for one in found] == [generated(model, scorer, row) for row in range(7)]


def test_mixtures_share_batches_and_processes_share_rows(tmp_path, tokenizer, monkeypatch):
    stack, scorer = build_stack(tmp_path, "llama"), scorer_of(tokenizer, monkeypatch)
    expected = []
    for weights in MIXTURES:
        stack.set(weights)
        expected.append([generated(stack.model, scorer, row) for row in range(7)])
    assert expected[0] != expected[1] != expected[2]
    for budget in (1, 400, 100_000):
        found = scorer.decoded(stack, MIXTURES, budget, range(7))
        assert [[one.ids for one in of] for of in found] == expected
        found = scorer.decoded(stack, MIXTURES[2:], budget, [5, 1])
        assert [one.ids for one in found[0]] == [expected[2][5], expected[2][1]]
    jobs, shares = [(mixture, row) for mixture in range(3) for row in range(7)], []
    for number in range(2):
        monkeypatch.setattr(
            generation, "PartialState", lambda n=number: SimpleNamespace(num_processes=2, process_index=n)
        )
        with torch.inference_mode():
            shares.append(dict(scorer._refilled(stack, MIXTURES, 400, jobs)))
    assert [len(one) for one in shares] == [11, 10]
    assert {job: one.ids for share in shares for job, one in share.items()} == {
        (mixture, row): expected[mixture][row] for mixture, row in jobs
    }


def test_stop_strings_are_those_that_generate_sees(tokenizer, monkeypatch):
    model, scorer = of_family(CAUSAL[0]), scorer_of(tokenizer, monkeypatch)
    scorer.limits = [8] * 7
    words = [[tokenizer.decode([one]) for one in generated(model, scorer, row)] for row in range(7)]
    # Texts of one token and of two, what stands in a prompt already, and what begins there.
    one = next(word for word in words[0][2:] if word.isprintable() and "\ufffd" not in word)
    pair = next(x + y for x, y in zip(words[3][1:], words[3][2:], strict=False) if "\ufffd" not in x + y)
    start = next(row[0] for row in words if "\ufffd" not in row[0])
    stops = [one, pair, "answer:", ":" + start]
    scorer, fixed = (scorer_of(tokenizer, monkeypatch, stop_strings=stops) for _ in range(2))
    scorer.limits = [8] * 7
    expected = [generated(model, scorer, row, stop_strings=stops) for row in range(7)]
    assert len(set(map(len, expected))) > 2
    found = scorer.decoded(GatedStack(model, {}), [{}], 300, range(7))[0]
    assert [one.ids for one in found] == expected
    fixed.keep_apart(UNSHARED)
    again = fixed.decoded(GatedStack(model, {}), [{}], 300, range(7))[0]  # which end tokens may fill up
    texts = (
        [one.text(row, of) for row, of in enumerate(answers)] for one, answers in ((fixed, again), (scorer, found))
    )
    assert next(texts) == next(texts)
    assert [one.ended for one in again] == [one.ended for one in found]
    assert {one.ended for one in found} == {True, False}


def test_what_was_answered_stays_when_memory_runs_out(tokenizer, monkeypatch):
    scorer = scorer_of(tokenizer, monkeypatch)
    expected = scorer.decoded(GatedStack(build_model("llama"), {}), [{}], 100_000, range(7))
    stack = GatedStack(build_model("llama"), {})
    longest = max(map(len, scorer.prompts))
    tried = small_memory(stack.model, longest)
    assert scorer.decoded(stack, [{}], 100_000, range(7)) == expected
    assert stack.shrink > 1
    assert sum(size > longest for size in tried) < 5
    small_memory(stack.model, 3)
    with pytest.raises(InputError, match="not even one row fits into memory"):
        scorer.decoded(stack, [{}], 100_000, range(7))


def test_a_row_without_numbers_leaves_nothing_behind(tokenizer, monkeypatch):
    model, scorer = build_model("llama"), scorer_of(tokenizer, monkeypatch)
    scorer.beginnings, scorer._numbers, scorer.limits = [], [-1] * 7, [8] * 7
    expected = scorer.decoded(GatedStack(model, {}), [{}], 250, range(7))[0]
    second = sorted(range(7), key=lambda row: -len(scorer.prompts[row]))[
        1
    ]  # a shorter row takes its place beside the first
    unknown = max(set(range(300)) - {token for ids in scorer.prompts for token in ids})
    scorer.prompts[second] = [unknown] * len(scorer.prompts[second])
    with torch.no_grad():
        model.get_input_embeddings().weight[unknown] = float("nan")
    found = scorer.decoded(GatedStack(model, {}), [{}], 250, range(7))[0]
    assert len(found[second].ids) == 1  # the first token, which ends an answer
    assert [one for row, one in enumerate(found) if row != second] == [
        one for row, one in enumerate(expected) if row != second
    ]


@pytest.mark.parametrize(
    ("own", "given", "plain"),
    [
        ({}, {}, True),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, {}, True),
        ({"cache_implementation": "hybrid", "max_length": 100}, {"stop_strings": ["x"]}, True),
        ({"repetition_penalty": 1.05}, {}, False),
        ({"repetition_penalty": 1.05}, {"repetition_penalty": 1.0}, True),
        ({"suppress_tokens": [3]}, {}, False),
        ({"forced_bos_token_id": 3}, {}, False),
        ({}, {"min_new_tokens": 2}, False),
        ({}, {"no_repeat_ngram_size": 2}, False),
        ({}, {"num_beams": 2}, False),
        ({}, {"do_sample": True}, False),
        ({}, {"cache_implementation": "static"}, False),
    ],
)
def test_what_generate_does_beyond_the_likeliest_token_is_left_to_it(own, given, plain):
    model = SimpleNamespace(generation_config=GenerationConfig(**own))
    assert is_plain(GenerationConfig(**{"max_new_tokens": 8, "do_sample": False} | given), model) is plain
