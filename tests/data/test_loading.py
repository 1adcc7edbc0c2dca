"""Reading rows: every kind of source, columns, JSON, and candidates split by a column."""

import csv
import gzip
import io
import json
import re
from dataclasses import replace

import pyarrow
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pico import build_adapter, candidate_rows, changed, choice_rows, intent_rows, m2m, searcher, write_rows
from pyarrow import parquet

from m2m_hf import InputError
from m2m_hf.config.candidates import CandidateConfig, DataConfig
from m2m_hf.config.targets import TargetConfig
from m2m_hf.data.causal_lm import load_causal_lm_data
from m2m_hf.data.files import parse_json
from m2m_hf.data.loading import column_values, load_rows


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


TABLES = st.lists(st.tuples(st.text(max_size=8), st.text(min_size=1, max_size=8)), min_size=1, max_size=4)
ODD_TEXTS = [
    ("1", "0001"),
    ("NA", "null"),
    ("", "2021-03-04"),
    ("1.50", "true"),
    ("a\u2028b\x85c", "\r\n"),
    ('"', " x\t"),
    ("\x00", "[1]"),
]


@given(table=TABLES)
@example(table=ODD_TEXTS)
@example(table=ODD_TEXTS[1:3])
@example(table=[("2021-03-04", "2021-03-04T05:06:07Z"), ("2021-03-05", "2021-03-04T05:06:07Z")])
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_strings_are_the_same_from_every_kind_of_file(tmp_path, tokenizer, table):
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in table]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    contents = {"a.json": json.dumps(rows), "b.jsonl": "\n".join(lines)}
    for name, separator in (("c.csv", ","), ("d.tsv", "\t")):
        text = io.StringIO(newline="")
        csv.writer(text, delimiter=separator).writerows([("prompt", "completion"), *table])
        contents[name] = text.getvalue()
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content.encode())
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
    for name, compression in (("e.parquet", "none"), ("f.parquet", "gzip")):
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name, compression=compression)
    kinds = {"tsv": "csv", "jsonl": "json"}
    for path in tmp_path.iterdir():
        kind = path.name.split(".")[1]
        data = DataConfig(path=kinds.get(kind, kind), data_files=(str(path),))
        sources = {"c": CandidateConfig(data)}, {"t": TargetConfig("loss", "logprob", data)}
        loaded = load_causal_lm_data(*sources, tokenizer, seed=0, max_length=None, assistant_only_loss=False)
        assert loaded.candidates["c"].rows.to_list() == rows, path
        assert [(row.prompt, row.choices[0]) for row in loaded.targets["t"].rows] == table, path


@pytest.mark.parametrize(
    ("lines", "texts"),
    [
        (
            ["1.50", "1", "12345678901234567890123", "1e5", "true"],
            ["1.50", "1", "12345678901234567890123", "1e5", "true"],
        ),
        (['"2021-03-04"', '"0007"'], ["2021-03-04", "0007"]),
        (['["é", 1]', '{"a": null}'], ['["é", 1]', '{"a": null}']),
    ],
)
def test_templates_take_values_as_json_writes_them(tmp_path, lines, texts):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"x": {line}}}\n' for line in lines))
    data = DataConfig(
        path="json", data_files=(str(tmp_path / "a.jsonl"),), template={"prompt": "{x}", "completion": "a {x}"}
    )
    assert load_rows(data, "c", 0)["prompt"][:] == texts
    assert load_rows(data, "c", 0)["completion"][:] == [f"a {text}" for text in texts]


def test_templates_take_what_lists_and_mappings_hold_and_where_leaves_rows_out(tmp_path):
    rows = [{"q": "a", "o": {"k": [1, "b"]}, "tags": ["x"]}, {"q": "c", "o": {"k": [2, "d"]}, "tags": ["x", "y"]}]
    write_rows(tmp_path / "a.jsonl", rows)
    entry = {"path": "json", "data_files": "a.jsonl", "template": {"prompt": "{q}{o[k][0]}", "answer": "{o[k][1]}"}}
    entry["template"]["choices"] = ["{o[k][1]}", "{q}"]
    data = DataConfig.parse(entry, "c", tmp_path)
    assert DataConfig.parse(data.to_json(), "c", tmp_path) == data
    read = load_rows(data, "c", 0)
    assert (read["prompt"][:], read["answer"][:], read["choices"][:]) == (
        ["a1", "c2"],
        ["b", "d"],
        [["b", "a"], ["d", "c"]],
    )
    labelled = replace(data, template={"choices": {"7": "{q}", "8": "x"}})
    assert load_rows(labelled, "c", 0)["choices"][0] == {"text": ["a", "x"], "label": ["7", "8"]}
    for value, left in (({"tags": {"without": ["y", "z"]}}, ["a"]), ({"q": {"without": "a"}}, ["c"])):
        assert load_rows(DataConfig.parse(entry | {"where": value}, "c", tmp_path), "c", 0)["q"][:] == left
    for text in ("{o[k][2]}", "{o[z]}", "{q[0]}", "{o.k}"):
        with pytest.raises(InputError, match="cannot be filled"):
            load_rows(replace(data, template={"prompt": text}), "c", 0)
    for wrong in ({"template": {"choices": "{q}"}}, {"template": {"label": "x"}}, {"where": {"q": {"with": "a"}}}):
        with pytest.raises(InputError, match=r"c.(template|where): expected"):
            DataConfig.parse(entry | wrong, "c", tmp_path)


def test_columns_of_mixed_types_and_of_objects_are_kept_as_they_are(tmp_path):
    rows = [{"x": 1, "big": 10**30, "o": {"a": 1}}, {"x": "1", "big": 1, "o": {"b": [None, "2021-03-04"]}}, {"x": None}]
    write_rows(tmp_path / "a.jsonl", rows)
    read = load_rows(DataConfig(path="json", data_files=(str(tmp_path / "a.jsonl"),)), "c", 0)
    assert read["x"][:] == [1, "1", None]
    assert read["o"][:] == [{"a": 1}, {"b": [None, "2021-03-04"]}, None]
    assert read["big"][:] == [str(10**30), "1", None]  # no type of datasets holds it


@pytest.mark.parametrize("key", [None, "null"])
@pytest.mark.parametrize("option", ["template", "columns"])
def test_a_null_is_refused_unless_a_text_stands_for_it(tmp_path, option, key):
    write_rows(tmp_path / "a.jsonl", [{"input": None, "output": "x"}, {"input": "i", "output": "y"}])
    entry = {"path": "json", "data_files": "a.jsonl"}
    entry[option] = {
        "template": {"prompt": "{input}", "completion": "{output}"},
        "columns": {"input": "prompt", "output": "completion"},
    }[option]
    if option == "template":
        with pytest.raises(InputError, match=r"row 1\.template: 'input' is null"):
            load_rows(DataConfig.parse(entry, "c", tmp_path), "c", 0)
    entry[option] |= {key: ""}
    data = DataConfig.parse(entry, "c", tmp_path)
    assert DataConfig.parse(data.to_json(), "c", tmp_path) == data
    assert CandidateConfig.parse(entry, "c", tmp_path).data == data
    assert load_rows(data, "c", 0)["prompt"][:] == ["", "i"]
    write_rows(tmp_path / "a.jsonl", [{"input": "i", "output": None}])
    if option == "template":  # a row's completion is checked with its others where it is no template
        with pytest.raises(InputError, match=r"row 1\.template: 'output' is null"):
            load_rows(data, "c", 0)
    else:
        assert load_rows(data, "c", 0)["completion"][:] == [None]


def test_text_columns_stay_as_they_stand_whatever_a_dataset_card_declares(tmp_path):
    names = "{class_label: {names: {'0': '1', '1': '0'}}}"
    features = f"[{{name: prompt, dtype: int64}}, {{name: n, dtype: int64}}, {{name: label, dtype: {names}}}]"
    (tmp_path / "README.md").write_text(f"---\ndataset_info:\n  features: {features}\n---\n")
    (tmp_path / "train.csv").write_text("prompt,n,label\n007,007,1\n")
    template = {"completion": "{label}"}
    assert load_rows(DataConfig(path=str(tmp_path), template=template), "c", 0).to_list() == [
        {"prompt": "007", "n": 7, "label": 0, "completion": "1"}
    ]
    (tmp_path / "train.csv").unlink()
    parquet.write_table(pyarrow.table({"prompt": ["007"], "n": [7], "label": ["1"]}), tmp_path / "train.parquet")
    with pytest.raises(InputError, match=r"column 'prompt': holds text, and in the dataset card integer"):
        load_rows(DataConfig(path=str(tmp_path)), "c", 0)


def test_classes_give_their_names_also_within_lists_and_mappings(tmp_path):
    label = ClassLabel(names=["1", "0", "b"])
    features = Features({"prompt": Value("string"), "label": label, "tags": [label], "o": {"k": label}})
    rows = [{"prompt": "x", "label": n, "tags": [n, 1], "o": {"k": n}} for n in range(3)]
    Dataset.from_list(rows, features=features).save_to_disk(tmp_path)
    data = DataConfig(path=str(tmp_path), template={"completion": "{label} {tags} {o}"})
    filled = load_rows(data, "c", 0)["completion"][:]
    assert filled == [f'{name} ["{name}", "0"] {{"k": "{name}"}}' for name in label.names]
    assert (
        load_rows(replace(data, template={}, columns={"label": "completion"}), "c", 0)["completion"][:] == label.names
    )
    for value, chosen in (("1", 0), ("0", 1), ("b", 2), (2, 2)):
        assert load_rows(replace(data, where={"label": value}), "c", 0)["completion"][:] == [filled[chosen]]
    with pytest.raises(InputError, match="1 is the number of class '0' and the name of another; quote the name"):
        load_rows(replace(data, where={"label": 1}), "c", 0)
    with pytest.raises(InputError, match=r"no row has 'c' in 'label'; its classes are 1, 0, b"):
        load_rows(replace(data, where={"label": "c"}), "c", 0)


@pytest.mark.parametrize(
    ("value", "prompts"), [(1, ["int"]), (True, ["bool"]), ("true", ["word"]), (1.1, None), ("1.10", ["1.10"])]
)
def test_a_value_selects_rows_of_its_own_type(tmp_path, value, prompts):
    given = {"int": 1, "bool": True, "word": "true", "1.10": "1.10", "1.1": "1.1"}
    write_rows(tmp_path / "a.jsonl", [{"kind": kind, "prompt": prompt} for prompt, kind in given.items()])
    data = DataConfig(path="json", data_files=(str(tmp_path / "a.jsonl"),), where={"kind": value})
    if prompts is None:
        with pytest.raises(
            InputError, match=r"where: 1\.1 is written 1\.1 and 1\.10 in 'kind'; quote the one that is meant"
        ):
            load_rows(data, "c", 0)
    else:
        assert load_rows(data, "c", 0)["prompt"][:] == prompts


@pytest.mark.parametrize("value", [7, "007", None, 0.5])
def test_rows_of_a_csv_file_are_found_by_numbers_and_texts(tmp_path, value):
    (tmp_path / "a.csv").write_text("kind,prompt\n7,7\n007,007\n,None\n0.5,0.5\n")
    data = DataConfig(path="csv", data_files=(str(tmp_path / "a.csv"),), where={"kind": value})
    assert load_rows(data, "c", 0)["prompt"][:] == [str(value)]


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


def test_a_folder_with_files_of_several_kinds_is_refused_unless_it_is_described(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    write_rows(folder / "a.jsonl", candidate_rows("alpha", 4))
    for name in ("dataset_infos.json", "LICENSE.txt"):
        (folder / name).write_text("{}")
    assert len(load_rows(DataConfig(path=str(folder)), "here", 0)) == 4
    (folder / "b.csv.gz").write_bytes(gzip.compress(b"prompt,completion\n1,2\n"))
    with pytest.raises(
        InputError, match=r"here: .*rows holds a\.jsonl and b\.csv\.gz, and load_dataset reads files of one kind"
    ):
        load_rows(DataConfig(path=str(folder)), "here", 0)
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: a.jsonl\n---\n")
    assert len(load_rows(DataConfig(path=str(folder)), "here", 0)) == 4


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
    monkeypatch.setattr("m2m_hf.data.files.parse_json", lambda line: lines.append(line) or parse_json(line))
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
        ("where: {source: no}", "no row has False in 'source'; YAML reads yes, no, .* quote it"),
        ("where: {source: 7}", "no row has 7 in 'source'; .* quote it"),
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
