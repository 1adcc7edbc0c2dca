"""Benchmarks by name: every preset on rows as its dataset has them, and what stands beside a name in a configuration."""

import json

import pytest
import yaml
from datasets import ClassLabel, Dataset, Features, Value
from datasets import List as ListOf
from pico import build_model, candidate_rows, changed, m2m, write_rows

from m2m_hf import InputError
from m2m_hf.config import presets
from m2m_hf.config.run_config import MergeToMixConfig
from m2m_hf.config.targets import TargetConfig
from m2m_hf.data.causal_lm import load_causal_lm_data
from m2m_hf.merging.gated_stack import GatedStack
from m2m_hf.run.checks import same_rows
from m2m_hf.scoring.make import make_scorers
from m2m_hf.scoring.scorers import Setup

TEXT, TEXTS = Value("string"), ListOf(Value("string"))
LABELLED = {"text": TEXTS, "label": TEXTS}
NAMED = {"id": TEXT, "question": TEXT, "choices": LABELLED, "answerKey": TEXT}
ARC = (
    NAMED,
    ("a", "Which?", {"text": ["red", "hot"], "label": ["A", "B"]}, "B"),
    (
        "b",
        "How many?",
        {"text": ["2", "3", "1"], "label": ["1", "2", "3"]},
        "3",
    ),  # the first choice is no text of its label
)
ARC_ROWS = ["Question: Which?\nAnswer: ", "Question: How many?\nAnswer: "], [(("red", "hot"), 1), (("2", "3", "1"), 2)]
ASKED = {"instruction_id_list": ["startend:end_checker", "punctuation:no_comma"], "kwargs": [{"end_phrase": "ok"}, {}]}
# name: (columns, rows; the third one is an example), then the prompts and (choices, answer) or the reference of what they become
CASES = {
    "arc_challenge": (ARC, *ARC_ROWS),
    "arc_easy": (ARC, *ARC_ROWS),
    "commonsense_qa": (
        (
            NAMED | {"question_concept": TEXT},
            ("a", "Where?", {"text": ["in", "on", "by", "at", "up"], "label": [*"ABCDE"]}, "E", "place"),
            ("b", "Who?", {"text": ["me", "us", "it", "he", "we"], "label": [*"ABCDE"]}, "A", "person"),
        ),
        ["Question: Where?\nAnswer: ", "Question: Who?\nAnswer: "],
        [(("in", "on", "by", "at", "up"), 4), (("me", "us", "it", "he", "we"), 0)],
    ),
    "openbookqa": (
        (
            {"id": TEXT, "question_stem": TEXT, "choices": LABELLED, "answerKey": TEXT},
            ("a", "The sun", {"text": ["warms", "cools"], "label": ["A", "B"]}, "A"),
            ("b", "Ice", {"text": ["burns", "melts"], "label": ["A", "B"]}, "B"),
        ),
        ["Question: The sun\nAnswer: ", "Question: Ice\nAnswer: "],
        [(("warms", "cools"), 0), (("burns", "melts"), 1)],
    ),
    "hellaswag": (
        (
            {"ind": Value("int32"), "activity_label": TEXT, "ctx": TEXT, "endings": TEXTS, "label": TEXT},
            (1, "Skiing", "A man", ["falls.", "sings.", "reads.", "2"], "3"),
            (2, "Baking", "She", ["a.", "b.", "c.", "d."], "0"),
        ),
        ["Skiing: A man ", "Baking: She "],
        [(("falls.", "sings.", "reads.", "2"), 3), (("a.", "b.", "c.", "d."), 0)],
    ),
    "winogrande": (
        (
            {"sentence": TEXT, "option1": TEXT, "option2": TEXT, "answer": TEXT},
            ("_ is red.", "it", "he", "2"),
            ("See _ there.", "one", "two", "1"),
        ),
        ["_ is red.\nThe blank _ stands for: ", "See _ there.\nThe blank _ stands for: "],
        [(("it", "he"), 1), (("one", "two"), 0)],
    ),
    "sciq": (
        (
            dict.fromkeys(("question", "distractor3", "distractor1", "distractor2", "correct_answer", "support"), TEXT),
            ("What melts?", "fog", "sand", "air", "ice", "Ice melts."),
            ("What burns?", "iron", "salt", "rain", "wood", ""),
        ),
        ["Question: What melts?\nAnswer: ", "Question: What burns?\nAnswer: "],
        [(("sand", "air", "fog", "ice"), 3), (("salt", "rain", "iron", "wood"), 3)],
    ),
    "mmlu": (
        (
            {"question": TEXT, "subject": TEXT, "choices": TEXTS, "answer": ClassLabel(names=[*"ABCD"])},
            ("1+1?", "sums", ["1", "2", "3", "4"], 1),
            ("2+2?", "sums", ["1", "2", "3", "4"], 3),
            ("3+1?", "sums", ["1", "2", "3", "4"], 3),
            *((f"Who? {n}", "arts", ["a", "b", "c", "d"], 0) for n in range(5)),  # examples of another subject
        ),
        [f"{question}\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: " for question in ("1+1?", "2+2?")],
        [((*"ABCD",), 1), ((*"ABCD",), 3)],
    ),
    "boolq": (
        (
            {"question": TEXT, "answer": Value("bool"), "passage": TEXT},
            ("is it red", True, "It is red."),
            ("is it hot", False, "It is cold."),
        ),
        ["It is red.\nQuestion: is it red?\nAnswer: ", "It is cold.\nQuestion: is it hot?\nAnswer: "],
        [(("no", "yes"), 1), (("no", "yes"), 0)],
    ),
    "gsm8k": (
        (
            {"question": TEXT, "answer": TEXT},
            ("1+1?", "<<1+1=2>>2\n#### 2"),
            ("2+2?", "#### 1,000"),
            ("3+1?", "#### 4"),
        ),
        ["Question: 1+1?\nAnswer: ", "Question: 2+2?\nAnswer: "],
        ["<<1+1=2>>2\n#### 2", "#### 1,000"],
    ),
    "svamp": (
        (
            dict.fromkeys(("ID", "Body", "Question", "Equation", "Answer", "Type", "question_concat"), TEXT),
            ("a", "Two.", "How many?", "( 2.0 )", "2.0", "Sum", "Two. How many?"),
            ("b", "Three.", "How few?", "( 3.0 )", "3.0", "Sum", "Three. How few?"),
        ),
        ["Question: Two. How many?\nAnswer: ", "Question: Three. How few?\nAnswer: "],
        ["2.0", "3.0"],
    ),
    "squad": (
        (
            {"context": TEXT, "question": TEXT, "answers": {"text": TEXTS, "answer_start": ListOf(Value("int32"))}},
            ("It is red.", "What?", {"text": ["red", "is red"], "answer_start": [6, 3]}),
            ("It is hot.", "How?", {"text": ["hot"], "answer_start": [6]}),
        ),
        ["It is red.\nQuestion: What?\nAnswer: ", "It is hot.\nQuestion: How?\nAnswer: "],
        ["red", "hot"],
    ),
    "ifeval": (
        (
            None,
            {"key": 1, "prompt": "Say ok.", **ASKED},
            {
                "key": 2,
                "prompt": "In Thai.",
                "instruction_id_list": ["language:response_language"],
                "kwargs": [{"language": "th"}],
            },
            {"key": 3, "prompt": "Say one.", **ASKED},
            {"key": 4, "prompt": "Say two.", **ASKED},
        ),
        ["Say ok.", "Say one.", "Say two."],
        [ASKED] * 3,
    ),
}


@pytest.fixture(scope="module")
def stack() -> GatedStack:
    return GatedStack(build_model("llama"), {})


def written(name: str, folder, columns, rows) -> None:
    """The dataset of a preset as the Hub has it: a card that says which files are which split, and the files."""
    given = yaml.safe_load(presets.text_of(name, ""))["data"]
    there = folder / given["path"]
    there.mkdir(parents=True)
    if columns is None:
        write_rows(there / "train.jsonl", rows)
        return
    splits = {"train": rows, "validation": rows[:2], "test": rows[:2], "dev": rows[2:]}
    splits = {split: [dict(zip(columns, row, strict=True)) for row in part] for split, part in splits.items() if part}
    for split, part in splits.items():
        Dataset.from_list(part, features=Features(columns)).to_parquet(there / f"{split}.parquet")
    files = [{"split": split, "path": f"{split}.parquet"} for split in splits]
    card = {"configs": [{"config_name": given.get("name", "default"), "data_files": files}]}
    (there / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_reads_its_dataset_and_scores_it(name, tmp_path, tokenizer, stack):
    (columns, *rows), prompts, answers = CASES[name]
    written(name, tmp_path, columns, rows)
    changes = {"generation": {"max_new_tokens": 2}} if isinstance(answers[0], str | dict) else {}
    if example := {"mmlu": "D", "gsm8k": "#### 4"}.get(name):
        changes |= {"num_fewshot": 1} | ({"data": {"split": "train[:2]"}} if name == "gsm8k" else {})
    config = TargetConfig.parse({"benchmark": name, **changes}, "targets.t", tmp_path)
    target = load_causal_lm_data(
        {}, {"t": config}, tokenizer, seed=0, max_length=None, assistant_only_loss=False
    ).targets["t"]
    found = sorted((*target.rows, *target.test_rows) if name == "ifeval" else target.rows, key=lambda row: row.prompt)
    expected = sorted(zip(prompts, answers, strict=True), key=lambda pair: pair[0])
    assert [row.prompt for row in found] == [prompt for prompt, _ in expected]
    for row, (_, answer) in zip(found, expected, strict=True):
        assert row.examples == (prompts[0].replace("1+1?", "3+1?") + f"{example}\n\n" if example else "")
        if isinstance(answer, tuple):
            assert (row.choices, row.answer) == answer
        else:
            assert (json.loads(row.choices[0]) if isinstance(answer, dict) else row.choices[0]) == answer
    if name == "ifeval":
        assert {"Say ok."} == {row.prompt for row in target.rows}  # the first half, without the row in Thai
    for scorer in make_scorers(target, Setup(tokenizer, 4096)).values():
        (score,) = scorer.score(stack, [{}], 4096)
        assert len(score.values) == scorer.examples


def test_what_stands_beside_a_name_goes_over_it(tmp_path):
    def parsed(**entry) -> dict:
        return TargetConfig.parse({"benchmark": "gsm8k", **entry}, "targets.t", tmp_path).to_json()

    plain = parsed()
    assert TargetConfig.parse(plain, "targets.t", tmp_path).to_json() == plain  # nothing is left to be looked up
    assert "benchmark" not in plain
    assert (plain["data"]["split"], plain["data"]["max_examples"], plain["test_data"]["split"]) == (
        "train",
        400,
        "test",
    )
    assert "max_examples" not in plain["test_data"]
    more = parsed(data={"max_examples": 7}, metric="token_f1", generation={"max_new_tokens": 9})
    assert more["data"] == plain["data"] | {"max_examples": 7}
    assert more["generation"] == {"max_new_tokens": 9, "stop_strings": ["\nQuestion:"]}
    assert more["metric"] == "token_f1"
    own = parsed(data={"path": "json", "data_files": "mine.jsonl"}, test_data=None)
    assert own["data"] == {
        "path": "json",
        "data_files": [str(tmp_path / "mine.jsonl")],
        "split": "train",
        "template": plain["data"]["template"],
    }
    assert "test_data" not in own
    assert parsed(scorer="loss").keys() == {"scorer", "metric", "data", "test_data"}
    with pytest.raises(InputError, match=r"targets.t.benchmark: unknown benchmark 'gsm8'; did you mean gsm8k\?"):
        parsed(benchmark="gsm8")


def test_a_candidate_of_the_rows_that_choose_is_refused():
    def problems(**candidate) -> None:
        source = {"path": "openai/gsm8k", "name": "main", "columns": {"question": "prompt", "answer": "completion"}}
        targets = {"t": {"benchmark": "gsm8k", "data": {"split": "train[:10%]"}}}
        for problem in same_rows(MergeToMixConfig(candidates={"c": source | candidate}, targets=targets)):
            raise InputError(problem)

    problems(split="train[10%:]")
    problems(name="socratic")
    with pytest.raises(
        InputError, match=r"candidates.c: it contains rows of targets.t.data, .* both read train of openai"
    ):
        problems()
    with pytest.raises(InputError, match=r"it contains rows of targets.t.test_data"):
        problems(split="test")


def test_a_run_is_refused_whose_prompts_do_not_tell_that_a_candidate_has_the_rows(project, refused):
    (project / "rows").mkdir()
    write_rows(project / "rows" / "train.jsonl", candidate_rows("delta"))
    words = {"template": {"prompt": "Say: {prompt}", "choices": ["{completion}", " no"], "answer": "{completion}"}}
    target = {"scorer": "choice", "data": {"path": "rows", **words}}
    changed(project, "run", candidates={"d": {"path": "rows"}}, targets={"t": target})
    assert "candidates.d: it contains rows of targets.t.data" in refused(project / "run.yaml")


def test_targets_are_listed_and_printed(capsys):
    assert m2m("targets") == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in presets.names())
    assert "400 of validation" in listed
    assert m2m("targets", "ifeval") == 0
    assert capsys.readouterr().out == presets.text_of("ifeval", "")
    assert m2m("targets", "arc") == 2
    assert "did you mean arc_challenge or arc_easy?" in capsys.readouterr().err


def test_init_writes_a_benchmark(tmp_path, capsys):
    given = ("init", "--model", "a/b", "--data", "a=a.jsonl", "--output", tmp_path / "x.yaml", "--benchmark")
    assert m2m(*given, "gsm8k") == 0
    assert yaml.safe_load((tmp_path / "x.yaml").read_text())["targets"] == {"gsm8k": {"benchmark": "gsm8k"}}
    (tmp_path / "x.yaml").unlink()
    assert m2m(*given, "gsm8k", "--scorer", "loss") == 2
    assert "leave out --target and --scorer" in capsys.readouterr().err
