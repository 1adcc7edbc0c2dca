"""Thoughts are taken out of answers before these are rated, and a stop string does not end one."""

import pytest
import torch
from pico import DEVICE, build_model, build_tokenizer, scorer_on

from m2m_hf import InputError
from m2m_hf.config.targets import TargetConfig
from m2m_hf.data.rows import TargetRow
from m2m_hf.merging.gated_stack import GatedStack
from m2m_hf.scoring.decoding import Decoded
from m2m_hf.scoring.thoughts import Thoughts

CASES = [
    ("red", "<think>one two</think> blue", " blue"),
    ("red", "green <think>one</think>blue<think>two</think> red", "green blue red"),
    ("red", "green blue", "green blue"),
    ("red", "green <think>one two", "green "),  # cut off within a thought
    ("red<think>\n", "one two</think>blue", "blue"),  # the chat template opens it
    ("red<think>\n", "one two", ""),
    ("red", "one two</think>blue", "blue"),  # a model that was trained on thoughts without their first mark
    ("<think>red</think> one", "blue", "blue"),
    ("red", "<think>one\ntwo</think>", ""),
    ("red", "<think></think>one </think> two", "one </think> two"),
]


@pytest.mark.parametrize("are_special", [False, True])
@pytest.mark.parametrize(("prompt", "answer", "left"), CASES)
def test_what_is_left_of_an_answer(prompt, answer, left, are_special):
    tokenizer = build_tokenizer()
    if are_special:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    ids = [tokenizer(text)["input_ids"] for text in (prompt, answer + tokenizer.eos_token)]
    found = Thoughts(tokenizer, "<think>…</think>").text(*ids)
    assert found == (left.replace("</think>", "") if are_special else left)


def test_a_stop_string_ends_an_answer_and_no_thought(tokenizer):
    model, row = build_model("llama"), TargetRow("question: red? answer:", ("x",), 0)
    ids = torch.tensor([tokenizer(row.prompt)["input_ids"]], device=DEVICE)
    new = model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0, eos_token_id=0)[0, ids.shape[1] :]
    whole = tokenizer.decode(new, skip_special_tokens=True)
    place = next(
        n for n in range(2, len(whole) // 2) if whole[n] in whole[n + 2 : -2] and whole[:n].count(whole[n]) == 0
    )  # a letter that comes again
    stop, opened, closed = whole[place], whole[:place], whole[place : place + 2]
    options = {"max_new_tokens": 24, "stop_strings": [stop]}
    plain, stripped = (
        scorer_on([row], tokenizer, "generation", "exact_match", generation=options, strip=strip)
        for strip in (None, f"{opened}…{closed}")
    )
    stack = GatedStack(model, {})
    assert plain.answers(stack, [{}], 100, [0]) == [[opened.strip()]]
    rest = whole[place + 2 :]
    assert stripped.answers(stack, [{}], 100, [0]) == [[rest.split(stop)[0].strip()]]
    assert plain.cut_off == stripped.cut_off == 0
    assert plain.fingerprint != stripped.fingerprint


def test_answers_that_end_at_their_limit_are_counted(tokenizer):
    row = TargetRow("question: red? answer:", ("x",), 0)
    scorer = scorer_on([row] * 3, tokenizer, "generation", "exact_match", generation={"max_new_tokens": 4})
    scorer.answers(GatedStack(build_model("llama"), {}), [{}, {}], 100, [0, 2])
    assert (scorer.cut_off, scorer.answered) == (4, 4)
    assert scorer.text(0, Decoded([5, tokenizer.eos_token_id], True))[1] is False


def test_a_model_whose_thoughts_are_not_rated_may_think(tokenizer):
    """The template writes an empty thought before answers that it trains on, and none where it asks."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    row = TargetRow([{"role": "user", "content": "red?"}], ([{"role": "assistant", "content": "one"}],), 0)
    asked = [
        tokenizer.decode(scorer_on([row], tokenizer, "generation", "exact_match", strip=strip).prompts[0])
        for strip in (None, "<think>...</think>")
    ]
    assert asked == ["user:red?\nassistant:<think></think>", "user:red?\nassistant:"]


@pytest.mark.parametrize("strip", ["<think>", "…</think>", 3])
def test_marks_are_two(tmp_path, strip):
    entry = {"data": {"path": "json", "data_files": "a.jsonl"}, "scorer": "generation", "strip": strip}
    with pytest.raises(InputError, match=r"t.strip: expected two marks with … between them"):
        TargetConfig.parse(entry, "t", tmp_path)
