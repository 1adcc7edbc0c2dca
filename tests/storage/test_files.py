"""Files, their digests and keys, and the lock of a run folder."""

import multiprocessing
import os

import pytest

from m2m_hf.errors import InputError
from m2m_hf.storage.files import Digests, fingerprint, read_json, write_atomic
from m2m_hf.storage.keys import LABELLED_FACTS, base_key
from m2m_hf.storage.records import is_inside
from m2m_hf.storage.run_folder import RunFolder


def test_a_fingerprint_depends_on_content_not_on_order():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1, "b": 3})


@pytest.mark.parametrize("fact", LABELLED_FACTS)
def test_keys_of_trials_hold_what_scores_depend_on(fact):
    facts = dict.fromkeys(LABELLED_FACTS, "this") | {"learning_rate": 0.1}
    assert base_key(facts | {fact: "another"}) != base_key(facts) == base_key(facts | {"learning_rate": 0.2})


def test_a_failed_atomic_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    write_atomic(path, "{}")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "\ud800")
    assert read_json(path) == {}
    path.write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        read_json(path)


@pytest.mark.parametrize("name", ["", ".", "..", "/etc/x", "../x", "a/../../x", "a//b", "./a", "a\\b", "C:x", "a/"])
def test_only_files_inside_the_folder_are_described(name):
    assert not is_inside(name)
    assert is_inside("a/b.json")


def try_lock(root: str, answer) -> None:
    try:
        RunFolder(root).lock()
        answer.put("locked")
    except InputError as error:
        answer.put(str(error))


def test_a_second_process_is_refused(tmp_path):
    RunFolder(tmp_path).lock()
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=try_lock, args=(str(tmp_path), answer))
    process.start()
    assert "another process is at work" in answer.get(timeout=60)
    process.join()
    RunFolder(tmp_path).lock()  # in the same process it is not another's


def test_digests_are_remembered_until_a_file_changes(tmp_path, monkeypatch):
    computed = []
    monkeypatch.setattr("m2m_hf.storage.files.digest_of", lambda path: computed.append(path) or "digest")
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
