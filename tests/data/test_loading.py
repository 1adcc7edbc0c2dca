"""Reading rows: every kind of source, columns, JSON, and candidates split by a column."""

import json
import re

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from pico import build_adapter, candidate_rows, changed, choice_rows, intent_rows, m2m, searcher, write_rows

from m2m_hf import InputError
from m2m_hf.config.candidates import DataConfig
from m2m_hf.data.loading import column_values, load_rows, parse_json


@pytest.mark.parametrize("kind", ["json", "csv", "parquet", "save_to_disk", "save_to_disk_dict"])
def test_every_kind_of_source_gives_the_same_rows(tmp_path, kind):
    rows = candidate_rows("alpha")
    path = str(tmp_path / "a")
    dataset = Dataset.from_list(rows)
    if kind == "save_to_disk_dict":
        DatasetDict({"train": dataset}).save_to_disk(path)
    else:
        getattr(dataset, kind if kind == "save_to_disk" else f"to_{kind}")(path if "save" in kind else f"{path}.{kind}")
    builder = DataConfig(path=kind, data_files=(f"{path}.{kind}",))
    assert load_rows(DataConfig(path=path) if "save" in kind else builder, "c", 0).to_list() == rows


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


def test_nothing_there(tmp_path):
    there = (str(write_rows(tmp_path / "a.jsonl", choice_rows())),)
    for config in (
        DataConfig(path="json", data_files=(str(tmp_path / "none.jsonl"),)),
        DataConfig(path="nobody/nothing"),
        DataConfig(path="json", data_files=there, split="validation"),
        DataConfig(rows=Dataset.from_list(candidate_rows("alpha")).select([])),
    ):
        with pytest.raises(InputError, match=r"candidates\.a"):
            load_rows(config, "candidates.a", 0)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"prompt": "x"\nnonsense\n', "line 1 is not JSON"),
        ('{"prompt": "x"}\n\n{"prompt": "\\ud800"}\n', r"line 3 is not JSON \(.*surrogates"),
        ('{"prompt": "x"}\nnull\n', r"line 2: expected an object .* got None"),  # Arrow crashes here
        ("[" * 50_000 + "]" * 50_000, r"is not JSON \("),  # and here
        ('[{"prompt": "x"}, 5]', "expected an object .* got 5"),
    ],
)
def test_files_that_hold_no_objects_of_json(tmp_path, content, words):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(InputError, match=rf"candidates\.a: .*bad\.jsonl.* ?{words}"):
        load_rows(DataConfig(path="json", data_files=(str(tmp_path / "bad.jsonl"),)), "candidates.a", 0)


@pytest.mark.parametrize(("count", "content"), [(12, lambda rows: rows), (1, lambda rows: rows[0])])
def test_a_json_list_of_objects_is_read_and_so_is_one_object(tmp_path, count, content):
    rows = candidate_rows("alpha", count)
    (tmp_path / "a.json").write_text(json.dumps(content(rows), indent=1))
    read = load_rows(DataConfig(path="json", data_files=(str(tmp_path / "a.json"),)), "candidates.a", 0)
    assert read.to_list() == rows


def test_parts_are_called_as_their_values(tmp_path):
    rows = [{"kind": kind, "prompt": "x", "completion": "y"} for kind in ("", None, "a b")]
    write_rows(tmp_path / "a.jsonl", rows)
    data = DataConfig(path="json", data_files=(str(tmp_path / "a.jsonl"),))
    assert column_values(data, "kind", "here") == [("", ""), (None, "none"), ("a b", "a b")]


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
    shape = {"r": 4, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"]}
    build_adapter("llama", public_set / "theirs", 0, **shape)
    with (public_set / "run.yaml").open("a") as file:
        file.write("adapters: {public-none: theirs}\n")
    lines = []
    monkeypatch.setattr("m2m_hf.data.loading.parse_json", lambda line: lines.append(line) or parse_json(line))
    assert m2m("search", "--config", public_set / "run.yaml") == 0
    assert sum(b'"question"' in line for line in lines) == 24
    assert "unknown" in json.loads((public_set / "out" / "adapters" / "public-none" / "training.json").read_text())
    text = (public_set / "run.yaml").read_text()
    (public_set / "run.yaml").write_text(text.replace("{public-none:", "{public-nine:"))
    assert m2m("search", "--config", public_set / "run.yaml") == 2


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("split_by: sauce", "no column 'sauce'; it has source, question, completion"),
        ("where: {source: nothing}", "no row has 'nothing' in 'source'"),
        ("split_by: parts", "expected a column of texts or numbers"),
        ("split_by: question, max_examples: 1", "18 candidates|exhaustive search scores"),
        ("split_by: close", "both called public-a_b"),
    ],
)
def test_what_cannot_be_split_is_said(public_set, refused, entry, words):
    rows = [json.loads(line) for line in (public_set / "public.jsonl").read_text().splitlines()]
    odd = [row | {"parts": [1], "close": "a b" if number % 2 else "a/b"} for number, row in enumerate(rows)]
    write_rows(public_set / "public.jsonl", odd)
    run = public_set / "run.yaml"
    run.write_text(run.read_text().replace("split_by: source", entry))
    assert re.search(words, refused(run))
    assert not (public_set / "out").exists()


def test_parts_are_called_by_the_names_of_a_class_column(intents):
    rows = [
        row | {"shop": number % 3 - 1} for number, row in enumerate(intent_rows(["red", "blue", "green", "one"], 12))
    ]
    kinds = {"text": Value("string"), "label": Value("string"), "shop": ClassLabel(names=["web", "books"])}
    Dataset.from_list(rows, features=Features(kinds)).to_parquet(intents / "colours.parquet")
    changed(intents, candidates={"all": {"path": "parquet", "data_files": "colours.parquet", "split_by": "shop"}})
    one = searcher(intents)
    assert list(one.run.candidates) == ["all-books", "all-none", "all-web"]
    assert len(one.run.candidates["all-web"].rows) == 4
