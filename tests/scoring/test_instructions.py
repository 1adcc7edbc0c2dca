"""Instructions that code can verify: an answer that follows each, and one that does not."""

import json
import re

import pytest
from pico import scorer_on

from m2m_hf import InputError
from m2m_hf.data.rows import TargetRow
from m2m_hf.scoring.metrics.instructions import CHECKS, count_sentences
from m2m_hf.scoring.metrics.metric import Metric

CASES = [  # id, arguments, answers that follow it, answers that do not
    ("keywords:existence", {"keywords": ["Sun", "a.b"]}, ["sunny a.b"], ["sun axb", "a.b"]),
    ("keywords:forbidden_words", {"forbidden_words": ["sun", "c++"]}, ["sunny c"], ["The SUN.", "in c++"]),
    ("keywords:frequency", {"keyword": "sun", "frequency": 2, "relation": "at least"}, ["Sun, sun"], ["sun"]),
    ("keywords:frequency", {"keyword": "sun", "frequency": 2, "relation": "less than"}, ["sun"], ["sun sun"]),
    ("keywords:letter_frequency", {"letter": "q", "let_frequency": 2, "let_relation": "at least"}, ["Q q"], ["q"]),
    ("keywords:letter_frequency", {"letter": "!", "let_frequency": 1, "let_relation": "less than"}, ["a"], ["a!"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, ["one two-three"], ["one, two!"]),
    ("length_constraints:number_words", {"num_words": 3.0, "relation": "less than"}, ["one two"], ["one two three"]),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, ["A b. C?"], ["Dr. A b."]),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"}, ["A 1.5"], ["A! B"]),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["a\n***\nb", "a *** b ***"],
        ["a", "a\n***\n***\nb"],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "once"},
        ['a\n\n"Once, b'],
        ["once\n\na", "a\n\nonce\n\nb", "a\nonce"],
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[name] at [the place]"], ["[name] []"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["a\nP.S. b", "p. s. b"], ["a ps", "P.P.S. b"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["a\nP.P.S b"], ["a\nP.S. b"]),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* a\n - b"],
        ["* a", "* a\n* b\n- c", "**a**\n**b**"],
    ),
    ("detectable_format:constrained_response", {}, ["My answer is no."], ["no", "My answer is clear."]),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*a* **b c**"],
        ["*a*", "* a\n* b", "****"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        ["SECTION 1\na\nSECTION 2"],
        ["SECTION 1", "section 1 section 2"],
    ),
    ("detectable_format:json_format", {}, ['{"a": 1}', '```json\n{"a": 1}\n```'], ["{a: 1}", 'so: {"a": 1}']),
    ("detectable_format:title", {}, ["<<On it>>\na"], ["<On it>", "<< >>", "<<a\nb>>"]),
    ("combination:two_responses", {}, ["a\n******\nb"], ["a", "a ****** a", "a ****** b ****** c", "a ******"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": " Say it. "}, ["say it. Well."], ["Well. Say it."]),
    ("startend:end_checker", {"end_phrase": "The end."}, ['"So. the END." '], ["The end. So"]),
    ("startend:quotation", {}, ['"a\nb"'], ['"a', "'a'", '"']),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "less than"},
        ["NASA is 12"],
        ["NASA and ESA"],
    ),
    ("change_case:english_capital", {}, ["A, 1."], ["Aa", "1."]),
    ("change_case:english_lowercase", {}, ["a, 1."], ["aA", "1."]),
    ("punctuation:no_comma", {}, ["a; b"], ["a, b"]),
]


@pytest.fixture(scope="module")
def metric() -> Metric:
    return Metric("instructions", None, False, "targets.t")


def test_every_instruction_tells_answers_that_follow_it_from_others(metric):
    assert {name for name, *_ in CASES} == {*CHECKS}
    for name, arguments, right, wrong in CASES:
        reference = json.dumps([{"id": name, **arguments}])
        value, _, each = metric([*right, *wrong, " "], [reference] * (len(right) + len(wrong) + 1))
        assert each == (1.0,) * len(right) + (0.0,) * (len(wrong) + 1), name
        assert value == pytest.approx(len(right) / len(each))


def test_a_row_counts_where_all_its_instructions_are_followed(metric):
    both = json.dumps([{"id": "punctuation:no_comma"}, {"id": "change_case:english_lowercase"}])
    columns = {"instruction_id_list": ["startend:end_checker"], "kwargs": [{"end_phrase": "ok", "num_words": None}]}
    assert metric(["a b", "a, b", "A b", "OK"], [both] * 3 + [json.dumps(columns)])[2] == (1, 0, 0, 1)
    assert metric.by_example


@pytest.mark.parametrize(
    ("text", "count"),
    [("", 0), ("So. B", 2), ("One... two!? Yes.", 3), ("e.g. this", 1), ('"A." She left.', 2), ("I. - ", 1)],
)
def test_sentences(text, count):
    assert count_sentences(text) == count


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("be brief", "targets.t, row 2.completion: expected JSON, such as"),
        ("[]", "expected JSON"),
        ('{"instruction_id_list": ["punctuation:no_comma"], "kwargs": []}', "with as many of both"),
        ('[{"id": "language:response_language"}]', "is none that code can verify; leave such rows out"),
        (
            '[{"id": "length_constraints:number_words", "num_words": 3}]',
            "relation: expected one of at least, less than",
        ),
        ('[{"id": "keywords:existence", "keywords": "a"}]', "keywords: expected a list of words, got 'a'"),
        ('[{"id": "startend:end_checker", "end_phrase": null}]', "end_phrase: expected a text, got None"),
        (
            '[{"id": "detectable_format:number_bullet_lists", "num_bullets": 1.5}]',
            "num_bullets: expected a whole number",
        ),
    ],
)
def test_what_cannot_be_verified_is_refused_before_anything_runs(tokenizer, reference, message):
    rows = [TargetRow("a", ('[{"id": "punctuation:no_comma"}]',), 0), TargetRow("b", (reference,), 0)]
    with pytest.raises(InputError, match=re.escape(message).replace("targets\\.t", "target")):
        scorer_on(rows, tokenizer, "generation", "instructions")
