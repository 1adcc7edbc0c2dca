"""The journal and the run folder: nothing lost, nothing doubled, damage found."""

import json
import multiprocessing
import os
import resource
import signal

import pytest
from datasets import load_dataset

from m2m_hf.core.mixture import BASE, Mixture
from m2m_hf.core.score import Score
from m2m_hf.core.space import SearchSpace
from m2m_hf.core.trial import Trial
from m2m_hf.errors import InputError
from m2m_hf.storage.digests import Digests
from m2m_hf.storage.files import fingerprint, read_json, write_atomic
from m2m_hf.storage.journal import Journal
from m2m_hf.storage.run_folder import RunFolder


def trial(key: str, names: tuple = ("a",), value: float = 0.5, state: str = "complete") -> Trial:
    score = Score(value, 0.1, (0.0, 2 * value), (-1.0, -2.25)) if state == "complete" else None
    return Trial(key, Mixture.subset(names), "merged", "t", 2, state, score, 1.25, None if score else "nan")


def test_appended_trials_are_read_back(tmp_path):
    journal = Journal(tmp_path / "trials.jsonl")
    trials = [trial("1"), trial("2", ("a", "b", "c")), trial("3", ()), trial("4", state="failed")]
    for one in trials:
        journal.append(one)
    again = Journal(tmp_path / "trials.jsonl")
    assert list(again.trials.values()) == trials
    assert again.get("2") == trials[1]
    assert again.get("4").reason == "nan"  # what failed for its numbers fails again, and is not measured again
    rows = load_dataset("json", data_files=str(tmp_path / "trials.jsonl"), split="train")
    assert rows["names"][:] == [["a"], ["a", "b", "c"], [], ["a"]]


def test_a_torn_last_line_is_dropped_and_the_rest_kept(tmp_path):
    path = tmp_path / "trials.jsonl"
    journal = Journal(path)
    journal.append(trial("1"))
    whole = path.read_bytes()
    journal.append(trial("2"))
    second = path.read_bytes()
    for cut in range(len(whole), len(second)):
        path.write_bytes(second[:cut])
        torn = Journal(path)
        assert list(torn.trials) == ["1"]
        torn.append(trial("2"))
        assert path.read_bytes() == second


@pytest.mark.parametrize("line", ["nonsense", "{}", "[]", '{"key": "x"}', '{"key": 1, "state": "complete"}', "\xff"])
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "trials.jsonl"
    Journal(path).append(trial("1"))
    path.write_bytes(path.read_bytes() + line.encode("latin-1") + b"\n")
    with pytest.raises(InputError, match="line 2 is damaged"):
        Journal(path)


def long_trial(key: str, rows: int = 2000) -> Trial:
    values = [((int(key) * 7919 + row) % 1000) / 1000 for row in range(rows)]
    return Trial(key, Mixture.subset("a"), "merged", "t", rows, "complete", Score.of(values, [-v for v in values]), 1.0)


def test_long_lists_are_stored_beside_the_journal(tmp_path):
    path = tmp_path / "trials.jsonl"
    journal, reader = Journal(path), Journal(path, write=False)
    trials = [long_trial("1"), trial("2"), long_trial("3", 700)]
    for one in trials:
        assert journal.append(one) == one
        reader.append(one)
    assert max(map(len, path.read_text().splitlines())) < 1000
    assert path.with_suffix(".values").stat().st_size == 8 * 2 * 2700
    again = Journal(path)
    for found in (journal, reader, again):
        assert list(found.trials.values()) == trials
        assert found.get("3").score.mean_logprob == trials[2].score.mean_logprob
        assert found.get("3").score.values[5] == trials[2].score.values[5]
        assert found.get("3").score.values[5:8] == trials[2].score.values[5:8]
    rows = load_dataset("json", data_files=str(path), split="train")
    assert rows["values"][1] == [0.0, 1.0]


@pytest.mark.parametrize("left", [0, 8 * 2000, 8 * 4000 + 3, 8 * 5000 + 1])
def test_trials_without_their_values_are_measured_again(tmp_path, left):
    path = tmp_path / "trials.jsonl"
    journal = Journal(path)
    for key in ("1", "2"):
        journal.append(long_trial(key))
    with open(path.with_suffix(".values"), "r+b") as file:
        file.truncate(left)
    torn = Journal(path)
    assert list(torn.trials) == (["1"] if left >= 8 * 4000 else [])
    torn.append(long_trial("3"))  # where the others' values were
    assert set(Journal(path).trials) == {*torn.trials, "3"}
    for key in ("1", "2"):
        if torn.get(key) is None:
            torn.append(long_trial(key))
    again = Journal(path)
    assert {key: again.get(key) for key in "123"} == {key: long_trial(key) for key in "123"}


@pytest.mark.parametrize(
    "change",
    [
        {"score": "0.5"}, {"score": None}, {"score": float("nan")}, {"values": ["0.5"]}, {"values": [None]}, {"values": [[1]]},
        {"values": 3}, {"values": [float("inf")]}, {"names": "a"}, {"names": [1], "weights": [1.0]}, {"weights": [0.4]},
        {"state": "done"}, {"state": "failed"}, {"rung": "2"}, {"rung": -1}, {"seconds": None}, {"key": 7}, {"stderr": "x"},
        {"stored": [1]}, {"stored": {"values": {"place": 0, "count": 1}}}, {"stored": {"mean_logprob": "x"}},
        {"names": ["b", "a"]},
        {"stored": {"values": {"place": -1, "count": 1}, "logprobs": {"place": 0, "count": "y"}, "mean_logprob": 0}},
    ],
)  # fmt: skip
def test_a_line_with_an_invalid_value_is_named(tmp_path, change):
    path = tmp_path / "trials.jsonl"
    Journal(path).append(trial("1"))
    line = json.loads(path.read_text())
    del line["crc32"]
    path.write_text(path.read_text() + json.dumps(line) + "\n" + json.dumps(line | change) + "\n")
    with pytest.raises(InputError, match="line 3 is damaged"):
        Journal(path)


def test_an_altered_score_is_noticed(tmp_path):
    path = tmp_path / "trials.jsonl"
    journal = Journal(path)
    for key in "12":
        journal.append(trial(key))
    content = path.read_text()
    path.write_text(json.dumps(json.loads(content.splitlines()[0])) + "\n" + content.splitlines()[1] + "\n")
    assert list(Journal(path).trials) == ["1", "2"]  # written again with the same in it
    first, second = content.splitlines(True)
    path.write_text(first + second.replace('"score": 0.5', '"score": 0.9'))
    with pytest.raises(InputError, match=r"line 2 is damaged \(it is not what was written\)"):
        Journal(path)
    path.write_text(first + second.replace('"seconds": 1.25', '"seconds": 3.5'))  # two runs differ in their times
    assert Journal(path).get("2").seconds == 3.5


def test_trials_measured_together_are_written_together_or_not_at_all(tmp_path):
    """A disk that is full for a moment leaves no partial line, and the same process can go on."""
    path = tmp_path / "trials.jsonl"
    journal = Journal(path)
    journal.append(trial("1"))
    before = path.read_bytes()
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 400, limits[1]))  # one line and a part of the other
    try:
        with pytest.raises(OSError, match="too large"):
            journal.extend([trial("2"), trial("3")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert list(journal.trials) == ["1"]
    journal.extend([trial("2"), trial("3")])
    assert list(Journal(path).trials) == list(journal.trials) == ["1", "2", "3"]


def test_a_reader_does_not_write(tmp_path):
    journal = Journal(tmp_path / "trials.jsonl", write=False)
    journal.append(trial("1"))
    assert journal.get("1")
    assert not (tmp_path / "trials.jsonl").exists()


def test_a_fingerprint_depends_on_content_not_on_order():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1, "b": 3})


def test_a_failed_atomic_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    write_atomic(path, "{}")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "\ud800")
    assert read_json(path) == {}
    path.write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        read_json(path)


def try_lock(root: str, answer) -> None:
    try:
        RunFolder(root).lock()
        answer.put("locked")
    except InputError as error:
        answer.put(str(error))


def test_a_second_process_is_refused(tmp_path):
    run = RunFolder(tmp_path)
    run.lock()
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=try_lock, args=(str(tmp_path), answer))
    process.start()
    assert "another process is at work" in answer.get(timeout=60)
    process.join()
    RunFolder(tmp_path).lock()  # in the same process it is not another's


def test_digests_are_remembered_until_a_file_changes(tmp_path, monkeypatch):
    computed = []
    monkeypatch.setattr("m2m_hf.storage.digests.digest_of", lambda path: computed.append(path) or "digest")
    path = tmp_path / "weights"
    path.write_text("a")
    digests = Digests(tmp_path)
    assert digests.of(path) == "digest"
    digests.save()
    assert Digests(tmp_path).of(path) == "digest"
    assert len(computed) == 1
    Digests(tmp_path, full=True).of(path)
    before = path.stat()
    path.write_text("b")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    Digests(tmp_path).of(path)
    (tmp_path / ".digests.json").write_text('{"weights": [1, 2, 3, 4], "x": 5}')
    Digests(tmp_path).of(path)
    assert len(computed) == 4


def test_mixtures():
    assert Mixture.subset(["b", "a"]).items == (("a", 0.5), ("b", 0.5))
    assert str(Mixture.subset(["b", "a"])) == "a + b"
    assert str(Mixture.of({"b": 0.75, "a": 0.25})) == "0.25 a + 0.75 b"
    assert str(BASE) == "base model"
    for wrong in ({"a": 0.5}, {"a": 1.5, "b": -0.5}, {"a": float("nan")}, {"a": 1.0, "b": 0.0}):
        with pytest.raises(ValueError, match="weights must"):
            Mixture.of(wrong)
    with pytest.raises(ValueError, match="sorted"):
        Mixture((("b", 0.5), ("a", 0.5)))


def test_search_space():
    space = SearchSpace(("a", "b", "c"))
    found = list(space.subsets())
    assert len(found) == len(set(found)) == 7
    assert all(mixture in space for mixture in found)
    assert BASE not in space
    required = SearchSpace(("a", "b", "c"), frozenset({"b"}))
    assert [mixture.names for mixture in required.subsets()] == [("b",), ("a", "b"), ("b", "c"), ("a", "b", "c")]
    assert Mixture.subset(["a"]) not in required
