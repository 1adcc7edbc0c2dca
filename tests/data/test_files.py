"""Files of JSON, CSV and parquet: read as they stand there, or refused by name."""

import gzip
import json
import lzma

import pyarrow
import pytest
from datasets import Dataset
from pico import candidate_rows, write_rows
from pyarrow import parquet

from m2m_hf import InputError
from m2m_hf.config.candidates import DataConfig
from m2m_hf.data.loading import load_rows


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("prompt,completion\na,b,c\n", "line 2: expected 2 cells, as in the header, got 3"),
        ("\nprompt,completion\na,b\n\nc\n", "line 5: expected 2 cells, as in the header, got 1"),
        ("prompt,prompt\na,b\n", "line 1: a column stands twice"),
        ('prompt,completion\na,"b\n', "line 2: unexpected end of data"),
        ("prompt,completion\na,\xff\n", "line .: 'utf-8' codec"),
    ],
)
def test_csv_files_that_cannot_be_read_as_they_stand(tmp_path, content, words):
    (tmp_path / "bad.csv").write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=rf"candidates\.a: .*bad\.csv, {words}"):
        load_rows(DataConfig(path="csv", data_files=(str(tmp_path / "bad.csv"),)), "candidates.a", 0)


def table(**columns) -> pyarrow.Table:
    return pyarrow.table({name: pyarrow.array(values) for name, values in columns.items()})


NOT_UTF8 = pyarrow.Array.from_buffers(
    pyarrow.string(), 1, [None, pyarrow.array([0, 1], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"\xff")]
)


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        (
            [table(prompt=[7]), table(prompt=["007"])],
            r"1\.parquet, column 'prompt': holds text, and in .*0\.parquet integer",
        ),
        ([table(prompt=[7]), table(prompt=[7.0])], r"1\.parquet, column 'prompt': holds floating point"),
        (
            [table(a=["x"]), table(a=["x"], b=["y"])],
            r"1\.parquet: has the column 'b', which .*0\.parquet does not have",
        ),
        (
            [table(a=[{"k": 1}]).cast(pyarrow.schema({"a": pyarrow.struct({"k": pyarrow.int64()})})), b"word"],
            r"1\.parquet: ",
        ),
        (
            [pyarrow.table({"m": pyarrow.array([[("k", 1)]], pyarrow.map_("string", "int64"))})],
            r"0\.parquet, column 'm': ",
        ),
        ([pyarrow.table({"prompt": NOT_UTF8})], r"candidates\.a, column 'prompt': .*Invalid UTF8"),
        ([gzip.compress(b"x")], r"0\.parquet\.gz: expected a parquet file as it is, not compressed again"),
    ],
)
def test_parquet_files_that_would_be_read_otherwise_are_refused_by_name(tmp_path, tables, words):
    files = []
    for number, content in enumerate(tables):
        ending = "parquet.gz" if isinstance(content, bytes) and content[:2] == b"\x1f\x8b" else "parquet"
        files.append(str(tmp_path / f"{number}.{ending}"))
        if isinstance(content, bytes):
            (tmp_path / f"{number}.{ending}").write_bytes(content)
        else:
            parquet.write_table(content, files[-1])
    with pytest.raises(InputError, match=words):
        load_rows(DataConfig(path="parquet", data_files=tuple(files)), "candidates.a", 0)


@pytest.mark.parametrize(
    "name", ["~/a.jsonl", "[0] b*?.jsonl", "c [x]/d[1].jsonl.gz", "c [x]/*.jsonl", "bom.json", "*.jsonl"]
)
def test_files_of_any_name(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = tmp_path / (name.replace("~", "home").replace("*.", "x."))
    path.parent.mkdir(exist_ok=True)
    content = b'{"prompt": "x"}\n' if ".jsonl" in name else b'\xef\xbb\xbf[\n{"prompt": "x"}]'
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    name = name if name != "[0] b*?.jsonl" else path.name
    data = DataConfig.parse({"path": "json", "data_files": name}, "c", tmp_path)
    assert load_rows(data, "c", 0).to_list() == [{"prompt": "x"}]


def test_a_folder_whose_name_is_a_pattern_is_refused_unless_it_was_saved(tmp_path):
    (tmp_path / "a [x]").mkdir()
    write_rows(tmp_path / "a [x]" / "b[1].jsonl", candidate_rows("alpha"))
    for entry in ({"path": "a [x]"}, {"path": "json", "data_dir": "a [x]"}):
        with pytest.raises(InputError, match=r"c: .*a \[x\]: a folder with \[, \* or \? in its path"):
            load_rows(DataConfig.parse(entry, "c", tmp_path), "c", 0)
    (tmp_path / "a [x]").rename(tmp_path / "a")
    assert len(load_rows(DataConfig.parse({"path": "a", "data_files": "b[1].jsonl"}, "c", tmp_path), "c", 0)) == 12
    Dataset.from_list(candidate_rows("alpha")).save_to_disk(tmp_path / "s [x]")
    assert len(load_rows(DataConfig.parse({"path": "s [x]"}, "c", tmp_path), "c", 0)) == 12


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("a.jsonl.gz", lambda content: gzip.compress(content)[:-9], "cannot be read to its end"),
        ("a.jsonl.gz", lambda content: gzip.compress(content)[:20] + b"x" * 40, "cannot be read to its end"),
        ("a.csv.xz", lambda content: lzma.compress(content)[:-9], "cannot be read to its end"),
        ("a.jsonl.bz2", lambda content: content, "cannot be read to its end"),
        ("a.zip", lambda content: b"PK\x03\x04" + content, "not a zip file"),
    ],
)
def test_damaged_archives_are_told(tmp_path, name, damage, words):
    (tmp_path / name).write_bytes(damage(b'{"prompt": "x"}\n' * 50))
    kind = "csv" if ".csv" in name else "json"
    with pytest.raises(InputError, match=rf"candidates\.a: .*{name}.*{words}"):
        load_rows(DataConfig(path=kind, data_files=(str(tmp_path / name),)), "candidates.a", 0)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"path": "json", "data_files": ["a.jsonl", "b*.jsonl"]}, r"c\.data_files: there is no file .*b\*\.jsonl"),
        ({"path": ".", "data_files": ["a.jsonl", "b[1].jsonl"]}, r"c\.data_files: there is no file b\[1\]\.jsonl"),
        ({"path": "a.jsonl"}, r"a\.jsonl is a file; expected .* path: json, data_files: .*a\.jsonl"),
    ],
)
def test_names_without_a_file_are_told(tmp_path, entry, words):
    write_rows(tmp_path / "a.jsonl", candidate_rows("alpha"))
    with pytest.raises(InputError, match=words):
        load_rows(DataConfig.parse(entry, "c", tmp_path), "c", 0)


def test_rows_in_a_field_of_a_json_file(tmp_path):
    (tmp_path / "a.json").write_text('{"version": 1,\n"data": [{"prompt": "x"}, {"prompt": "y"}]}')
    entry = {"path": "json", "data_files": "a.json"}
    assert load_rows(DataConfig.parse(entry | {"field": "data"}, "c", tmp_path), "c", 0)["prompt"][:] == ["x", "y"]
    with pytest.raises(InputError, match=r"a\.json: expected an object with a list 'rows', got \{'version'"):
        load_rows(DataConfig.parse(entry | {"field": "rows"}, "c", tmp_path), "c", 0)
    with pytest.raises(InputError, match=r"c\.field: belongs to path: json"):
        DataConfig.parse(entry | {"field": "data", "path": "csv"}, "c", tmp_path)


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


@pytest.mark.parametrize("kind", [pyarrow.float16(), pyarrow.float32(), pyarrow.float64()])
def test_numbers_of_parquet_are_written_with_their_own_digits(tmp_path, kind):
    numbers = pyarrow.array([0.1, 2.5, 1e-3, None], pyarrow.float64()).cast(kind)
    parquet.write_table(pyarrow.table({"prompt": ["a"] * 4, "completion": numbers}), tmp_path / "a.parquet")
    rows = load_rows(DataConfig(path="parquet", data_files=(str(tmp_path / "a.parquet"),)), "here", 0)
    assert rows["completion"][:] == ["0.1", "2.5", "0.001", None]
