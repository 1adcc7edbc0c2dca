"""Which choice is the right one: by its place, text, letter, label or class; what is ambiguous is refused."""

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from pico import candidate_rows

from m2m_hf import InputError
from m2m_hf.config.candidates import CandidateConfig, DataConfig
from m2m_hf.config.targets import TargetConfig
from m2m_hf.data.causal_lm import load_causal_lm_data, target_row

TEXTS = [" red", " green", " blue"]


@pytest.mark.parametrize(
    ("choices", "answer"),
    [
        (TEXTS, " green"),
        (TEXTS, "B"),
        (TEXTS, "(b)"),
        (TEXTS, ["B"]),
        ({"text": TEXTS, "label": ["A", "B", "C"]}, "B"),
        ({"text": TEXTS, "label": ["1", "2", "3"]}, "2"),
        ({"text": TEXTS, "label": [1, 2, 3]}, 2),
        ({"text": TEXTS, "label": ["A", "B", "C"]}, 1),
        ([{"text": text, "label": label} for text, label in zip(TEXTS, "CAB", strict=True)], "A"),
        ({"A": " red", "B": " green", "C": None, "D": " blue"}, "B"),
        ({"text": TEXTS}, "B"),
        (["B", "A", "C"], "A"),
        (["x", "Green", "b"], " green."),
        ([{"text": text} for text in TEXTS], "B"),
    ],
)
def test_an_answer_may_be_a_text_a_letter_or_a_label(choices, answer):
    row = target_row({"prompt": "which?", "choices": choices, "answer": answer}, "text", "choice", "row")
    assert row.answer == 1
    assert len(row.choices) == 3


@pytest.mark.parametrize(
    ("names", "right"),
    [("AB", "b"), ("BA", "a"), ("01", "b"), ("12", "b"), (["b", "a"], "a"), ("10", None), ("XY", None)],
)
def test_answers_and_choices_that_are_classes_are_their_names(tokenizer, names, right):
    """The answer is the class with the number 1."""
    features = {
        "prompt": Value("string"),
        "choices": [ClassLabel(names=["a", "b"])],
        "answer": ClassLabel(names=[*names]),
    }
    row = {"prompt": "?", "choices": [0, 1], "answer": 1}
    target = {
        "t": TargetConfig("choice", "accuracy", DataConfig(rows=Dataset.from_list([row], features=Features(features))))
    }
    candidates = {"a": CandidateConfig(DataConfig(rows=Dataset.from_list(candidate_rows("a"))))}
    options = {"seed": 0, "max_length": 64, "assistant_only_loss": False}
    if right is None:
        with pytest.raises(InputError, match=r"targets\.t\.data, row 1\.answer: expected the index"):
            load_causal_lm_data(candidates, target, tokenizer, **options)
    else:
        (question,) = load_causal_lm_data(candidates, target, tokenizer, **options).targets["t"].rows
        assert (question.choices, question.choices[question.answer]) == (("a", "b"), right)


@pytest.mark.parametrize(
    ("choices", "answer"),
    [
        ({"text": TEXTS, "label": ["1", "2", "3"]}, 1),
        ({"text": ["B", "A"], "label": ["A", "B"]}, "A"),
        (TEXTS, "1"),
        (TEXTS, "D"),
        ({"text": TEXTS, "label": ["A", "B", "C"]}, "D"),
        ({"text": TEXTS, "label": ["1", "2", "3"]}, "A"),
        (TEXTS, ["A", "B"]),
        (["b", "a"], "A "),
        ({"text": TEXTS, "label": [1, 2, 3]}, 0),
        ({"text": TEXTS, "label": ["A", "a", "b"]}, "A"),
    ],
)
def test_an_answer_that_may_mean_two_choices_or_none_is_refused(choices, answer):
    with pytest.raises(InputError, match=r"row\.answer: "):
        target_row({"prompt": "which?", "choices": choices, "answer": answer}, "text", "choice", "row")
