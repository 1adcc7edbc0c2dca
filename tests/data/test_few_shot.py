"""Few-shot examples: drawn with the seed, never from rows that are scored, ahead of every question."""

import pytest
from datasets import Dataset
from pico import choice_rows, scorer_on

from m2m_hf import InputError
from m2m_hf.config.candidates import CandidateConfig, DataConfig
from m2m_hf.config.targets import TargetConfig
from m2m_hf.data.causal_lm import load_causal_lm_data
from m2m_hf.data.rows import Target, TargetRow, overlap

TRAINED = [{"prompt": "question: 3 red?", "completion": " one"}]


def target(tokenizer, seed: int = 0, scorer: str = "choice", candidates=TRAINED, **options) -> Target:
    parts = {part: DataConfig(rows=Dataset.from_list(rows)) for part, rows in options.items() if isinstance(rows, list)}
    config = TargetConfig(scorer, "accuracy", **options | parts)
    data = load_causal_lm_data(
        {"c": CandidateConfig(DataConfig(rows=Dataset.from_list(candidates)))},
        {"t": config},
        tokenizer,
        seed=seed,
        max_length=None,
        assistant_only_loss=False,
    )
    loaded = data.targets["t"]
    assert overlap(data.candidates["c"], loaded.rows) == sum(row.prompt == TRAINED[0]["prompt"] for row in loaded.rows)
    return loaded


def shown(row: TargetRow) -> list[str]:
    return row.examples.split("\n\n")[:-1]


def written(row: dict) -> str:
    return row["prompt"] + row["choices"][row["answer"]]


def test_examples_are_drawn_with_the_seed_from_rows_that_are_not_scored(tokenizer):
    tested, others = choice_rows(6), choice_rows(12)  # of which six are asked, too
    kinds = {"data": tested[:3], "test_data": tested[3:], "fewshot_data": others}
    found = target(tokenizer, num_fewshot=4, **kinds)
    assert len({row.examples for row in (*found.rows, *found.test_rows)}) == 1
    assert len({*shown(found.rows[0])}) == 4
    assert {*shown(found.rows[0])} <= {written(row) for row in others[6:]}
    assert found.rows[0].asked == found.rows[0].examples + tested[0]["prompt"]
    assert target(tokenizer, num_fewshot=4, **kinds).rows == found.rows
    assert len({target(tokenizer, seed, num_fewshot=4, **kinds).rows[0].examples for seed in range(5)}) > 2
    plain = target(tokenizer, num_fewshot=0, **kinds)
    assert [row.asked for row in plain.rows] == [row["prompt"] for row in tested[:3]]
    for kind, metric in (("choice", "accuracy"), ("generation", "exact_match")):
        ours, others = (scorer_on(one.rows, tokenizer, kind, metric, 2000) for one in (found, plain))
        assert ours.fingerprint != others.fingerprint
        read = ours.inputs.questions[0].ids if kind == "choice" else ours.prompts[0]
        assert tokenizer.decode(read).startswith(found.rows[0].asked.strip())
    with pytest.raises(InputError, match=r"targets.t.num_fewshot: expected 7 rows of fewshot_data that .* got 6"):
        target(tokenizer, num_fewshot=7, **kinds)


def test_without_data_of_their_own_they_are_taken_out_of_the_validation_rows(tokenizer):
    rows = choice_rows(9)
    found = target(tokenizer, num_fewshot=2, data=rows, test_data=rows[6:] + choice_rows(2, start=50))
    assert len(found.rows) == 7
    assert {written(row) for row in rows} == {row.prompt + row.choices[row.answer] for row in found.rows} | {
        *shown(found.rows[0])
    }
    assert {*shown(found.test_rows[0])} <= {written(row) for row in rows[:6]}
    assert len(found.test_rows) == 5
    with pytest.raises(InputError, match="no row of data is left to be scored; give fewshot_data"):
        target(tokenizer, num_fewshot=9, data=rows)


def test_examples_by_a_column_are_of_the_questions_kind(tokenizer):
    rows = [row | {"subject": "abc"[n % 3]} for n, row in enumerate(choice_rows(30))]
    kinds = {"data": rows[:6], "fewshot_data": rows[6:]}
    found = target(tokenizer, num_fewshot=3, fewshot_by="subject", **kinds)
    for row, given in zip(found.rows, rows, strict=False):
        assert {*shown(row)} <= {written(one) for one in rows[6:] if one["subject"] == given["subject"]}
    with pytest.raises(InputError, match="with 'a' in 'subject' that no row which is scored asks, got 8"):
        target(tokenizer, num_fewshot=9, fewshot_by="subject", **kinds)
    with pytest.raises(InputError, match=r"targets.t.fewshot_data: column 'subject' missing"):
        target(tokenizer, num_fewshot=1, fewshot_by="subject", data=rows[:6], fewshot_data=choice_rows(3))


def test_conversations_have_examples_behind_their_system_turn(tokenizer):
    def row(number: int) -> dict:
        turns = [("system", "one two"), ("user", f"question {number}"), ("assistant", f"red {number}")]
        return {"messages": [{"role": role, "content": text} for role, text in turns]}

    found = target(
        tokenizer,
        scorer="loss",
        num_fewshot=2,
        data=[row(0), row(1)],
        fewshot_data=[row(5), row(6)],
        candidates=[row(9)],
    )
    turns = [(turn["role"], turn["content"]) for turn in found.rows[0].asked]
    assert turns[0] == ("system", "one two")
    assert turns[-1] == ("user", "question 0")
    first, second = turns[1:3], turns[3:5]
    assert sorted([first, second]) == [[("user", f"question {n}"), ("assistant", f"red {n}")] for n in (5, 6)]
    assert len(turns) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("fewshot_data: {path: json, data_files: alpha.jsonl}", "num_fewshot is missing: fewshot_data is given"),
        ("num_fewshot: -1", "num_fewshot: expected an integer of at least 0"),
        ("num_fewshot: 40", "expected 40 rows of data that no row which is scored asks"),
    ],
)
def test_what_cannot_be_drawn_is_refused(project, refused, change, message):
    config = project / "run.yaml"
    config.write_text(config.read_text().replace("scorer: choice", f"scorer: choice\n    {change}"))
    assert message in refused(config)
