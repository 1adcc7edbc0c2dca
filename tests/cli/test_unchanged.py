"""A finished `m2m select` is recognised as long as nothing it depends on has changed, and no longer."""

import os
from functools import partial
from pathlib import Path

import pytest
from pico import m2m

from m2m_hf.cli import unchanged
from m2m_hf.config.parsing import parse
from m2m_hf.config.run_config import MergeToMixConfig
from m2m_hf.storage.run_folder import RunFolder

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CLOSING = [{"text": "chosen: beta", "style": None}]


def remember(project: Path, *flags: str) -> Path:
    """Writes down the run in `project/out` as a finished one; the configuration."""
    config = project / "run.yaml"
    ours, args, model_args = parse(config, flags)
    inputs = unchanged.watch(ours, vars(args) | vars(model_args), Path(args.output_dir))
    command = unchanged.command_fingerprint(config, flags)
    assert command
    assert inputs
    unchanged.remember(RunFolder(args.output_dir), command, inputs, CLOSING)
    return config


def change_content(path: Path) -> None:
    """Other content of the same length, with the old modification time."""
    before, content = path.stat(), path.read_bytes()
    path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_the_same_command_is_recognised(finished, monkeypatch):
    config = remember(finished)
    monkeypatch.setenv("HF_TOKEN", "hf_anotheranotheranother")  # secrets do not count
    assert unchanged.recall(config, []) == (finished / "out", CLOSING)
    (finished / "out" / "log.txt").write_text("more")
    (finished / "out" / "export").mkdir()
    assert unchanged.recall(config, [])
    flags = [f"--output_dir={finished / 'out'}"]
    remember(finished, *flags)
    assert unchanged.recall(config, flags)
    assert not unchanged.recall(config, [])
    assert not unchanged.recall(config, [*flags, "--seed", "1"])


FILES = (
    "run.yaml", "alpha.jsonl", "validation.jsonl", "test.jsonl", "out/adapters/beta/adapter_model.safetensors",
    "out/trials.jsonl", "out/summary.json", "out/report.html", "out/mixture/train.jsonl",
)  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        *(partial(lambda name, out, patch: change_content(out.parent / name), name) for name in FILES),
        lambda out, patch: (out / "recipe.yaml").unlink(),
        lambda out, patch: (out / "adapters" / "delta").mkdir() or (out / "adapters" / "delta" / "x").touch(),
        lambda out, patch: (out / ".unchanged.json").write_text('{"command": '),
        lambda out, patch: (out / ".unchanged.json").write_text("{}"),
        lambda out, patch: patch.chdir(out),
        lambda out, patch: patch.setenv("HF_ENDPOINT", "https://elsewhere"),
        lambda out, patch: patch.setenv("CUDA_VISIBLE_DEVICES", "1"),
        lambda out, patch: patch.setenv("WORLD_SIZE", "2"),
        lambda out, patch: patch.setenv("OMPI_COMM_WORLD_SIZE", "2"),
        lambda out, patch: patch.setattr(unchanged, "version", lambda name: "9"),
        lambda out, patch: patch.setattr("platform.node", lambda: "another"),
        lambda out, patch: patch.setattr("m2m_hf.__path__", [str(out)]),
        lambda out, patch: RunFolder(out).lock(),  # as every process does before it changes anything
    ],
)
def test_any_change_is_noticed(finished, monkeypatch, change):
    config = remember(finished)
    change(finished / "out", monkeypatch)
    assert not unchanged.recall(config, [])


def test_files_that_join_a_folder_or_a_pattern_are_noticed(finished):
    (finished / "more").mkdir()
    (finished / "more" / "a.jsonl").write_bytes((finished / "alpha.jsonl").read_bytes())
    text = (finished / "run.yaml").read_text()
    for entry in ("data_files: more/*.jsonl", "data_dir: more"):
        (finished / "run.yaml").write_text(text.replace("data_files: alpha.jsonl", entry))
        config = remember(finished)
        assert unchanged.recall(config, [])
        (finished / "more" / "b.jsonl").write_text("")
        assert not unchanged.recall(config, [])
        (finished / "more" / "b.jsonl").unlink()


DATA = {"path": "json", "data_files": "a.jsonl"}


@pytest.mark.parametrize(
    ("data", "target", "settings", "watched"),
    [
        ({}, {}, {}, True),
        ({"path": "org/rows", "data_files": None, "revision": COMMIT}, {}, {}, True),
        ({"path": "org/rows", "data_files": None, "revision": "main"}, {}, {}, False),
        ({"path": "org/rows", "data_files": None}, {}, {}, False),
        ({"data_files": "https://host/a.jsonl"}, {}, {}, False),
        ({"path": ".", "data_files": "../a.jsonl"}, {}, {}, False),
        ({"license": "~nobody of that name"}, {}, {}, True),
        ({}, {"metric": "org/metric"}, {}, False),
        ({}, {"scorer": "lm_eval", "task": "arc"}, {}, False),
        ({}, {}, {"model_name_or_path": "org/model", "model_revision": COMMIT}, True),
        ({}, {}, {"model_name_or_path": "org/model", "model_revision": "main"}, False),
        ({}, {}, {"chat_template_path": "org/template"}, False),
        ({}, {}, {"push_to_hub": True}, False),
    ],
)
def test_only_what_cannot_change_elsewhere_is_watched(tmp_path, data, target, settings, watched):
    target = {"scorer": "choice", **({} if "task" in target else {"data": DATA}), **target}
    config = MergeToMixConfig({"a": DATA | data, "b": DATA}, {"t": target}, folder=str(tmp_path))
    stamps = unchanged.watch(config, {"model_name_or_path": str(tmp_path), **settings}, tmp_path / "out")
    assert (stamps is not None) == watched


def test_what_cannot_be_watched_or_remembered_is_looked_at_in_full(finished, monkeypatch):
    (finished / "out" / "adapters" / "nowhere").symlink_to(finished / "not there")
    assert not unchanged.recall(remember(finished), [])
    ours, args, model_args = parse(finished / "run.yaml")
    monkeypatch.setattr(unchanged, "MAX_FILES", 2)
    assert unchanged.watch(ours, vars(args) | vars(model_args), finished / "out") is None


def test_a_run_that_is_interrupted_leaves_nothing_to_recognise(finished, monkeypatch):
    config = remember(finished)

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("m2m_hf.cli.unchanged.recall", lambda config, flags: None)
    monkeypatch.setattr("m2m_hf.searcher.MergeToMixSearcher.show", interrupt)
    assert m2m("select", "--config", config) == 130
    assert not (finished / "out" / ".unchanged.json").exists()
