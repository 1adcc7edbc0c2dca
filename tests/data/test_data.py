"""Loading, one format for all, and what is said of bad data."""

import json
import re

import pytest
from datasets import Dataset, DatasetDict, concatenate_datasets
from pico import build_adapter, build_model, candidate_rows, choice_rows, m2m, write_rows
from trl import SFTConfig, SFTTrainer

from m2m_hf.config.candidates import CandidateConfig, DataConfig
from m2m_hf.config.targets import TargetConfig
from m2m_hf.core.mixture import Mixture
from m2m_hf.data.causal_lm import load_causal_lm_data, normalise, split_row, target_row
from m2m_hf.data.loading import load_rows, parse_json
from m2m_hf.data.mixture_rows import write_mixture
from m2m_hf.data.rows import overlap
from m2m_hf.data.tokens import encode
from m2m_hf.errors import InputError

MESSAGES = [{"role": "user", "content": "hot?"}, {"role": "assistant", "content": "cold"}]


def load(candidates: dict, tokenizer, target: list | None = None, **options):
    """`load_causal_lm_data` over rows in memory."""
    target_config = TargetConfig("choice", "accuracy", DataConfig(rows=Dataset.from_list(target or choice_rows())))
    return load_causal_lm_data(
        {name: CandidateConfig(DataConfig(rows=Dataset.from_list(rows))) for name, rows in candidates.items()},
        {"t": target_config},
        tokenizer,
        **{"seed": 0, "max_length": 64, "assistant_only_loss": False} | options,
    )


@pytest.mark.parametrize("kind", ["json", "csv", "parquet", "save_to_disk", "save_to_disk_dict"])
def test_every_kind_of_source_gives_the_same_rows(tmp_path, kind):
    rows = candidate_rows("alpha")
    dataset = Dataset.from_list(rows)
    if kind == "json":
        config = DataConfig(path="json", data_files=(str(write_rows(tmp_path / "a.jsonl", rows)),))
    elif kind == "csv":
        dataset.to_csv(tmp_path / "a.csv")
        config = DataConfig(path="csv", data_files=(str(tmp_path / "a.csv"),))
    elif kind == "parquet":
        dataset.to_parquet(tmp_path / "a.parquet")
        config = DataConfig(path="parquet", data_files=(str(tmp_path / "a.parquet"),))
    elif kind == "save_to_disk":
        dataset.save_to_disk(tmp_path / "a")
        config = DataConfig(path=str(tmp_path / "a"))
    else:
        DatasetDict({"train": dataset}).save_to_disk(tmp_path / "a")
        config = DataConfig(path=str(tmp_path / "a"))
    assert normalise(load_rows(config, "c", 0), "text", "c").to_list() == rows


def test_max_examples_is_drawn_with_the_seed():
    rows = Dataset.from_list(candidate_rows("alpha", 50))
    drawn = [load_rows(DataConfig(rows=rows, max_examples=10), "c", seed).to_list() for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 10
    assert drawn[0] != rows.to_list()[:10]


def test_columns_are_renamed():
    rows = Dataset.from_list([{"question": "q", "answer": "a"}])
    config = DataConfig(rows=rows, columns={"question": "prompt", "answer": "completion"})
    assert load_rows(config, "c", 0).to_list() == [{"prompt": "q", "completion": "a"}]
    with pytest.raises(InputError, match="no column 'nothing'"):
        load_rows(DataConfig(rows=rows, columns={"nothing": "prompt"}), "c", 0)


def test_unions_are_safe_whatever_columns_the_sources_have(tokenizer):
    plain = [row | {"id": i, "extra": None} for i, row in enumerate(candidate_rows("alpha"))]
    chat = [{"messages": [m | {"name": "x"} for m in MESSAGES], "source": "web"}]
    data = load({"plain": plain, "chat": chat}, tokenizer)
    assert data.format == "chat"
    union = concatenate_datasets([data.candidates["plain"].rows, data.candidates["chat"].rows])
    assert union[0] == {
        "prompt": [{"role": "user", "content": plain[0]["prompt"]}],
        "completion": [{"role": "assistant", "content": plain[0]["completion"].strip()}],
    }
    assert union[-1] == {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}
    assert data.targets["t"].rows[0].choices[0] == [{"role": "assistant", "content": "red"}]


def test_whole_conversations_with_assistant_only_loss(tokenizer):
    rows = [{"messages": MESSAGES + MESSAGES}]
    candidates = load({"a": rows}, tokenizer, assistant_only_loss=True).candidates
    assert candidates["a"].rows.to_list() == rows
    with pytest.raises(InputError, match="needs a messages column"):
        load({"a": rows, "b": candidate_rows("b")}, tokenizer, assistant_only_loss=True)


@pytest.mark.parametrize("row", [candidate_rows("alpha")[0], {"messages": MESSAGES + MESSAGES}], ids=["text", "chat"])
def test_what_is_scored_is_what_trl_trains_on(tokenizer, row, tmp_path):
    data_format = "chat" if "messages" in row else "text"
    prompt, completion = split_row(row, data_format, "row")
    rows = normalise(Dataset.from_list([row]), data_format, "c")
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    trainer = SFTTrainer(build_model("llama"), args, train_dataset=rows, processing_class=tokenizer)
    theirs = trainer.train_dataset[0]
    ids, start = encode(tokenizer, prompt, completion)
    eos = [tokenizer.eos_token_id] if data_format == "text" else []
    assert theirs["input_ids"] == ids + eos
    assert theirs["labels"] == [-100] * start + (ids + eos)[start:]


def test_sizes_tokens_and_truncation(tokenizer):
    rows = [
        {"prompt": "red", "completion": " one"},
        {"prompt": "red " * 30, "completion": " one"},
        {"prompt": "red", "completion": " one" * 40},
    ]
    candidates = load({"a": rows}, tokenizer, max_length=20).candidates
    lengths = [len(encode(tokenizer, row["prompt"], row["completion"])[0]) + 1 for row in rows]
    one = candidates["a"]
    assert (one.longest, one.truncated, one.dropped) == (max(lengths), 2, 1)
    assert one.tokens == lengths[0] + 20
    with pytest.raises(InputError, match="no completion fits into max_length 20"):
        load({"a": rows[1:2]}, tokenizer, max_length=20)


def test_overlap_counts_the_same_question(tokenizer):
    rows = [{"prompt": "Question:  RED 1?", "completion": " a"}, {"prompt": "other", "completion": " b"}]
    data = load({"a": rows}, tokenizer, [{"prompt": "question: red 1?", "choices": ["x", "y"], "answer": 0}])
    assert overlap(data.candidates["a"], data.targets["t"].rows) == 1


def test_empty_prompts_do_not_overlap_unless_their_completions_do(tokenizer):
    data = load(
        {"a": [{"prompt": "", "completion": "one"}]},
        tokenizer,
        [{"prompt": "", "choices": ["one", "y"], "answer": 0}, {"prompt": "", "choices": ["z", "y"], "answer": 0}],
    )
    assert overlap(data.candidates["a"], data.targets["t"].rows) == 1


def test_messages_that_the_template_does_not_take(tokenizer):
    from copy import deepcopy

    strict = deepcopy(tokenizer)
    strict.chat_template = "{{ raise_exception('no system turns, please') }}"
    with pytest.raises(InputError, match=r"candidates\.a, row 1: .*no system turns, please"):
        load({"a": [{"messages": MESSAGES}]}, strict)


def test_a_completion_that_adds_no_token(tokenizer):
    with pytest.raises(InputError, match="adds no token"):
        encode(tokenizer, "red", "")


def test_mixture_is_written_the_same_every_time(tokenizer, tmp_path):
    candidates = load({name: candidate_rows(name) for name in ("a", "b", "c")}, tokenizer).candidates
    mixture = Mixture.subset(["a", "c"])
    first = write_mixture(tmp_path / "1", mixture, candidates, seed=3)
    second = write_mixture(tmp_path / "2", mixture, dict(reversed(candidates.items())), seed=3)
    assert first.read_bytes() == second.read_bytes()
    rows = [json.loads(line) for line in first.read_text().splitlines()]
    union = candidate_rows("a") + candidate_rows("c")
    assert sorted(rows, key=str) == sorted(union, key=str)
    assert rows != union
    manifest = json.loads((tmp_path / "1" / "manifest.json").read_text())
    assert manifest["rows"] == 24
    assert manifest["sources"]["a"]["weight"] == 0.5


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "x"}], "columns 'prompt' and 'completion' missing; it has text"),
        ([{"prompt": "x"}], "columns: {prompt: completion}"),
        ([{"prompt": "x", "completion": ""}], r"row 1\.completion: expected text, got ''"),
        (
            [{"prompt": "x", "completion": "y"}, {"prompt": None, "completion": "y"}],
            r"row 2\.prompt: expected text, got None",
        ),
        ([{"messages": MESSAGES[:1]}], "expected the last turn to be the assistant's"),
        ([{"messages": [{"role": "user"}]}], "messages of {role, content}"),
        ([{"messages": MESSAGES[1:]}], "expected a turn before the assistant's"),
    ],
)
def test_bad_candidate_rows(tokenizer, rows, message):
    with pytest.raises(InputError, match=message):
        load({"a": rows}, tokenizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": [" red"]}, "at least two texts"),
        ({"choices": [" red", ""]}, "none empty"),
        ({"answer": 3}, "0 to 2"),
        ({"answer": "purple"}, "or its text, got 'purple'"),
        ({"answer": True}, "got True"),
        ({"choices": [" red", " red", " blue"], "answer": 0}, "occurs twice"),
        ({"prompt": 5}, "expected text, got 5"),
    ],
)
def test_bad_target_rows(change, message):
    with pytest.raises(InputError, match=message):
        target_row(choice_rows(1)[0] | change, "text", "choice", "row 1")


def test_an_answer_may_be_given_as_its_text():
    assert target_row(choice_rows(1)[0] | {"answer": " green"}, "text", "choice", "row").answer == 1


def test_nothing_there(tmp_path):
    for config in (
        DataConfig(path="json", data_files=(str(tmp_path / "none.jsonl"),)),
        DataConfig(path="nobody/nothing"),
        DataConfig(path="json", data_files=(str(write_rows(tmp_path / "a.jsonl", choice_rows())),), split="validation"),
    ):
        with pytest.raises(InputError, match=r"candidates\.a"):
            load_rows(config, "candidates.a", 0)


def test_not_json(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"\nnonsense\n')
    with pytest.raises(InputError, match=r"candidates\.a: .*bad\.jsonl, line 1 is not JSON"):
        load_rows(DataConfig(path="json", data_files=(str(tmp_path / "bad.jsonl"),)), "candidates.a", 0)


def test_empty():
    rows = Dataset.from_list(candidate_rows("alpha")).select([])
    with pytest.raises(InputError, match="has no rows"):
        load_rows(DataConfig(rows=rows), "candidates.a", 0)


def test_messages_need_a_chat_template(tokenizer):
    from copy import deepcopy

    bare = deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        load({"a": [{"messages": MESSAGES}]}, bare)


@pytest.mark.parametrize("path", ["json", "csv", "text", "parquet"])
def test_without_files_a_builder_would_read_the_working_directory(tmp_path, path):
    with pytest.raises(InputError, match=r"here\.data_files is missing: give the file or files"):
        DataConfig.parse({"path": path}, "here", tmp_path)


def test_folders_with_very_many_files_are_not_searched(tmp_path, monkeypatch):
    monkeypatch.setattr("m2m_hf.data.loading.MAX_FILES", 5)
    for number in range(6):
        (tmp_path / f"{number}.txt").touch()
    with pytest.raises(InputError, match="holds more than 5 files"):
        load_rows(DataConfig(path=str(tmp_path)), "here", 0)


@pytest.fixture
def public_set(project):
    """One dataset with a `source` column, as public instruction sets have them, in place of the three candidates."""
    rows = [
        {"source": source, "question": row["prompt"], "completion": row["completion"]}
        for source in ("flan/v2", "code alpaca", None)
        for row in candidate_rows(f"{source}", 8)
    ]
    write_rows(project / "public.jsonl", rows[::-1])
    text = (project / "run.yaml").read_text()
    start, end = text.index("  alpha:"), text.index("targets:")
    one = "  public: {path: json, data_files: public.jsonl, split_by: source, columns: {question: prompt}, license: mit}\n"
    (project / "run.yaml").write_text(text[:start] + one + text[end:])
    return project


def test_every_value_of_a_column_is_a_candidate(public_set, capsys):
    run = public_set / "run.yaml"
    assert m2m("search", "--config", run) == 0
    names = ["public-code_alpaca", "public-flan_v2", "public-none"]
    assert sorted(path.name for path in (public_set / "out" / "adapters").iterdir()) == names
    rows = [json.loads(line) for line in (public_set / "out" / "mixture" / "train.jsonl").read_text().splitlines()]
    manifest = json.loads((public_set / "out" / "mixture" / "manifest.json").read_text())["sources"]
    assert len(rows) == 8 * len(manifest)
    for name, one in manifest.items():
        value = {"public-code_alpaca": "code alpaca", "public-flan_v2": "flan/v2", "public-none": None}[name]
        assert one["source"]["where"] == {"source": value}
        assert one["source"]["license"] == "mit"
        assert sum(row["prompt"].startswith(f"question: {value} ") for row in rows) == 8
    capsys.readouterr()
    # The resolved configuration names the parts, and gives the same run; so does the first one.
    for config in (public_set / "out" / "config.yaml", run):
        assert m2m("search", "--config", config) == 0
        printed = capsys.readouterr().out
        assert "steps, " not in printed  # nothing is trained
        assert "scored " not in printed.split("cost:")[0]
    assert m2m("status", public_set / "out") == 0


def test_parts_may_have_adapters_of_others_and_are_read_once(public_set, monkeypatch):
    build_adapter(
        "llama", public_set / "theirs", 0, r=4, lora_alpha=32, lora_dropout=0.05, target_modules=["q_proj", "v_proj"]
    )
    with (public_set / "run.yaml").open("a") as file:
        file.write("adapters: {public-none: theirs}\n")
    lines = []
    monkeypatch.setattr(
        "m2m_hf.data.loading.parse_json", lambda content, place: lines.append(place) or parse_json(content, place)
    )
    assert m2m("search", "--config", public_set / "run.yaml") == 0
    assert sum("public.jsonl" in place for place in lines) == 24
    assert "unknown" in json.loads((public_set / "out" / "adapters" / "public-none" / "training.json").read_text())
    text = (public_set / "run.yaml").read_text()
    (public_set / "run.yaml").write_text(text.replace("{public-none:", "{public-nine:"))
    assert m2m("search", "--config", public_set / "run.yaml") == 2


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("split_by: source", "split_by: sauce", "no column 'sauce'; it has source, question, completion"),
        ("split_by: source", "where: {source: nothing}", "no row has 'nothing' in 'source'"),
        ("split_by: source", "split_by: parts", "expected a column of texts or numbers"),
        ("split_by: source", "split_by: question, max_examples: 1", "18 candidates|exhaustive search scores"),
        ("split_by: source", "split_by: close", "both called public-a_b"),
    ],
)
def test_what_cannot_be_split_is_said(public_set, capsys, old, new, words):
    rows = [json.loads(line) for line in (public_set / "public.jsonl").read_text().splitlines()]
    if "parts" in new or "close" in new:
        rows = [row | {"parts": [1], "close": "a b" if number % 2 else "a/b"} for number, row in enumerate(rows)]
    write_rows(public_set / "public.jsonl", rows)
    run = public_set / "run.yaml"
    run.write_text(run.read_text().replace(old, new))
    assert m2m("search", "--config", run) == 2
    assert re.search(words, capsys.readouterr().err)
    assert not (public_set / "out").exists()
