"""The journal: nothing lost, nothing doubled, damage found."""

import json
import resource
import signal

import pytest
from datasets import load_dataset

from m2m_hf.core.mixture import Mixture
from m2m_hf.core.score import Score
from m2m_hf.core.trial import Trial
from m2m_hf.errors import InputError
from m2m_hf.storage.journal import Journal


@pytest.fixture
def path(tmp_path):
    return tmp_path / "trials.jsonl"


def trial(key: str, names: tuple = ("a",), state: str = "complete") -> Trial:
    score = Score(0.5, 0.1, (0.0, 1.0), (-1.0, -2.25)) if state == "complete" else None
    return Trial(key, Mixture.subset(names), "merged", "t", 2, state, score, 1.25, None if score else "nan")


def long_trial(key: str, rows: int = 2000) -> Trial:
    values = [((int(key) * 7919 + row) % 1000) / 1000 for row in range(rows)]
    return Trial(key, Mixture.subset("a"), "merged", "t", rows, "complete", Score.of(values, [-v for v in values]), 1.0)


def test_appended_trials_are_read_back(path):
    journal = Journal(path)
    trials = [trial("1"), trial("2", ("a", "b", "c")), trial("3", ()), trial("4", state="failed")]
    for one in trials:
        assert journal.append(one) == one
    again = Journal(path)
    assert list(again.trials.values()) == trials
    assert again.get("4").reason == "nan"  # what failed for its numbers fails again, and is not measured again
    rows = load_dataset("json", data_files=str(path), split="train")
    assert rows["names"][:] == [["a"], ["a", "b", "c"], [], ["a"]]


def test_a_torn_last_line_is_dropped_and_the_rest_kept(path):
    journal = Journal(path)
    journal.append(trial("1"))
    whole = path.read_bytes()
    journal.append(trial("2"))
    second = path.read_bytes()
    for cut in range(len(whole), len(second)):
        path.write_bytes(second[:cut])
        torn = Journal(path)
        assert list(torn.trials) == ["1"]
        assert torn.lost == (cut > len(whole))
        torn.append(trial("2"))
        assert path.read_bytes() == second


def test_long_lists_are_stored_beside_the_journal(path):
    journal, reader = Journal(path), Journal(path, write=False)
    trials = [long_trial("1"), trial("2"), long_trial("3", 700)]
    for one in trials:
        assert journal.append(one) == reader.append(one) == one
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


def test_values_are_read_when_they_are_used(path):
    Journal(path).append(long_trial("1"))
    journal = Journal(path)
    assert journal.damaged_values() == []
    path.with_suffix(".values").write_bytes(bytes(8 * 4000))
    assert set(journal.get("1").score.values) == {0.0}
    assert journal.get("1").score.mean_logprob == long_trial("1").score.mean_logprob  # for which nothing is read
    assert Journal(path).damaged_values() == ["1"]


@pytest.mark.parametrize("left", [0, 8 * 2000, 8 * 4000 + 3, 8 * 5000 + 1])
def test_trials_without_their_values_are_measured_again(path, left):
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


PLACE = {"place": 0, "count": 1, "crc32": 0}


@pytest.mark.parametrize(
    "damage",
    [
        b"nonsense", b"{}", b"[]", b'{"key": "x"}', b'{"key": 1, "state": "complete"}', b"\xff",
        {"score": "0.5"}, {"score": None}, {"score": float("nan")}, {"values": ["0.5"]}, {"values": [None]}, {"values": [[1]]},
        {"values": 3}, {"values": [float("inf")]}, {"names": "a"}, {"names": [1], "weights": [1.0]}, {"weights": [0.4]},
        {"state": "done"}, {"state": "failed"}, {"rung": "2"}, {"rung": -1}, {"seconds": None}, {"key": 7}, {"stderr": "x"},
        {"names": ["b", "a"]}, {"stored": [1]}, {"stored": {"values": PLACE}}, {"stored": {"mean_logprob": "x"}},
        {"stored": {"values": PLACE, "logprobs": PLACE | {"count": "y"}, "mean_logprob": 0}},
        {"stored": {"values": PLACE, "logprobs": PLACE, "mean_logprob": None}},
        {"stored": {"values": PLACE | {"place": -1}, "logprobs": PLACE, "mean_logprob": 0}},
    ],
)  # fmt: skip
def test_a_damaged_line_is_named(path, damage):
    Journal(path).append(trial("1"))
    line = json.loads(path.read_text())
    del line["crc32"]
    written = damage if isinstance(damage, bytes) else json.dumps(line | damage).encode()
    path.write_bytes(path.read_bytes() + json.dumps(line).encode() + b"\n" + written + b"\n")
    with pytest.raises(InputError, match="line 3 is damaged"):
        Journal(path)


def test_an_altered_score_is_noticed(path):
    journal = Journal(path)
    for key in "12":
        journal.append(trial(key))
    first, second = path.read_text().splitlines(True)
    path.write_text(json.dumps(json.loads(first)) + "\n" + second)
    assert list(Journal(path).trials) == ["1", "2"]  # written again with the same in it
    path.write_text(first + second.replace('"score": 0.5', '"score": 0.9'))
    with pytest.raises(InputError, match=r"line 2 is damaged \(it is not what was written\)"):
        Journal(path)
    path.write_text(first + second.replace('"seconds": 1.25', '"seconds": 3.5'))  # two runs differ in their times
    assert Journal(path).get("2").seconds == 3.5


def test_trials_measured_together_are_written_together_or_not_at_all(path):
    """A disk that is full for a moment leaves no partial line, and the same process can go on."""
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


def test_a_reader_does_not_write(path):
    journal = Journal(path, write=False)
    journal.append(trial("1"))
    assert journal.get("1")
    assert not path.exists()
