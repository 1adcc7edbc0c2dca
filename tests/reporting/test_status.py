"""`m2m status`, and what it takes for whole."""

import json

import pytest
import yaml
from pico import m2m

from m2m_hf.config.run_config import MergeToMixConfig
from m2m_hf.core.mixture import BASE, Mixture
from m2m_hf.core.space import SearchSpace
from m2m_hf.core.trial import Trial
from m2m_hf.reporting.status import remaining, status
from m2m_hf.storage.files import checkpoints, staging_path
from m2m_hf.storage.run_folder import END, RunFolder


@pytest.fixture
def complete(finished):
    return finished / "out"


def told(capsys, out, code: int = 0) -> str:
    capsys.readouterr()
    assert m2m("status", out) == code
    printed = capsys.readouterr()
    assert not printed.err
    return printed.out


def test_status_of_every_stage(project, capsys):
    run, out = project / "run.yaml", project / "out"
    assert m2m("status", out) == 2
    assert "is no run folder" in capsys.readouterr().err
    assert m2m("adapters", "--config", run) == 0
    shown = told(capsys, out)
    assert "3 candidates, target colours" in shown
    assert "adapters: 3 of 3, 9 steps" in shown
    assert "trials: 0 (none)" in shown
    assert "left: up to 8 of 8 mixtures to score; the final fine-tune" in shown
    assert "continue with: m2m select --config" in shown
    assert m2m("search", "--config", run) == 0
    shown = told(capsys, out)
    assert "trials: 8 (8 complete)" in shown
    assert "search: finished; chosen " in shown
    assert "left: the final fine-tune" in shown


def rewrite_config(out, change, **candidates) -> None:
    given = yaml.safe_load((out / "config.yaml").read_text()) | change
    for name, fields in candidates.items():
        given["candidates"][name] |= fields
    (out / "config.yaml").write_text(yaml.safe_dump(given) + END)


def left_of(out) -> str:
    return next(line for line in status(RunFolder(out)).lines if line.startswith("left: "))


def cut(out, trials: int, kind: str = "") -> None:
    """Leaves so many lines of a kind in the journal, and no summary."""
    lines = [line for line in (out / "trials.jsonl").read_text().splitlines(True) if kind in line]
    (out / "trials.jsonl").write_text("".join(lines[:trials]))
    (out / "summary.json").unlink()


@pytest.mark.parametrize(
    ("change", "candidates", "left"),
    [
        ({}, {}, "up to 3 of 8"),
        ({"max_trials": 6}, {}, "up to 1 of 6"),
        ({"max_example_evaluations": 60}, {}, "up to 1 of 8"),
        ({"objective": "ensemble", "strategy": "auto", "weights": "continuous"}, {}, "up to 9 of 9"),
        ({"max_seconds": 0}, {}, "up to 0 of 8"),
        ({"max_datasets": 1}, {}, "up to 0 of 5"),
        ({"min_datasets": 3}, {}, "up to 0 of 5"),
        ({"max_cost": 2}, {"alpha": {"cost": 5}, "beta": {"cost": 1}, "gamma": {"cost": 1}}, "up to 1 of 6"),
        ({"max_cost": 450}, {}, "up to 1 of 6"),  # tokens
        ({"licenses": ["mit"]}, {"alpha": {"license": "mit"}, "beta": {"license": "mit"}}, "up to 1 of 6"),
        ({}, {"alpha": {"excluded": True}}, "up to 1 of 6"),
        ({}, {"beta": {"required": True}}, "up to 2 of 7"),
        ({"strategy": "random"}, {}, "up to 3 of 8"),
        ({"merge_method": "ties"}, {}, "up to 8 of 8"),
        # with the base model and one single scored; the mixtures that every search begins with are charged before they are
        ({"max_example_evaluations": 60, "lines": 2}, {}, "up to 4 of 8"),
    ],
)
def test_status_counts_what_is_left_as_the_search_would(finished, change, candidates, left):
    out = finished / "out"
    change = dict(change)
    cut(out, change.pop("lines", 5))  # the base model, three singles, all together
    rewrite_config(out, change, **candidates)
    assert left_of(out) == f"left: {left} mixtures to score; the final fine-tune"


def test_lines_of_an_older_adapter_and_a_failed_candidate_do_not_count(finished):
    out = finished / "out"
    record = out / "adapters" / "beta" / "training.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"fingerprint": "f" * 16}))
    (out / "summary.json").unlink()
    assert left_of(out) == "left: up to 4 of 8 mixtures to score; the final fine-tune"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"failed": "diverged"}))
    assert "  beta: failed: diverged" in status(RunFolder(out)).lines
    assert left_of(out) == "left: up to 1 of 5 mixtures to score; the final fine-tune"


def test_a_finished_search_is_not_finished_for_other_constraints(finished):
    out = finished / "out"
    rewrite_config(out, {"max_datasets": 2})
    assert left_of(out) == "left: up to 0 of 8 mixtures to score; the final fine-tune"
    rewrite_config(out, {"max_datasets": None, "fine_tunes": 2})
    assert left_of(out) == "left: up to 2 mixtures to fine-tune (fine_tunes)"


def test_a_finished_run_that_was_copied_is_whole_and_has_nothing_left_to_do(
    finished, finished_project, capsys, monkeypatch
):
    """As most tests here have it, see `copy_project`."""
    for path in finished.rglob("*"):
        assert path.is_dir() or str(finished_project).encode() not in path.read_bytes(), path
    shown = told(capsys, finished / "out")
    assert "intact: adapters, models, journal and mixture are as they were written" in shown
    assert "left: nothing" in shown
    assert "final model: " in shown
    assert "continue with" not in shown
    monkeypatch.setattr("m2m_hf.run.base_model.load_base", lambda *args: pytest.fail("the model was loaded"))
    assert m2m("select", "--config", finished / "run.yaml") == 0
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("path", "change", "words"),
    [
        ("adapters/beta/adapter_model.safetensors", lambda b: b[:-1], "adapters/beta: adapter_model.safetensors has"),
        ("adapters/beta/adapter_model.safetensors", lambda b: b[:-1] + b"x", "safetensors is not what was trained"),
        ("adapters/beta/training.json", lambda b: b[:50], "adapters/beta: training.json is missing or incomplete"),
        ("final/adapter_config.json", lambda b: b[:-2], "final: adapter_config.json has"),
        ("trials.jsonl", lambda b: b[:-2], "1 lines were cut short"),
        ("trials.jsonl", lambda b: b + b"{}\n", "line 9 is damaged"),
        ("trials.jsonl", lambda b: b.replace(b'"stderr": 0', b'"stderr": 1', 1), "it is not what was written"),
        ("targets.json", lambda b: b[:-3], "targets.json: it is not JSON"),
        ("mixture/train.jsonl", lambda b: b[:-9], "train.jsonl: not what its manifest says"),
        ("summary.json", lambda b: b.replace(b'"mixture"', b'"other"'), "summary.json: not as it was written"),
        ("summary.json", lambda b: b.replace(b'"alpha",', b'["alpha"],'), "summary.json: not as it was written"),
    ],
)
def test_damage_is_named_and_gives_exit_code_1(complete, capsys, path, change, words):
    file = complete / path
    file.write_bytes(change(file.read_bytes()))
    shown = told(capsys, complete, 1)
    assert f"{words}" in shown
    assert "damaged: " in shown
    assert "intact: " not in shown


@pytest.mark.parametrize(
    "odd", [{"steps": "many"}, {"mixture": {"alpha": 2.0}}, {"total_seconds": None}, {"seconds": [1]}, {"steps": 1e400}]
)
def test_odd_records_are_no_traceback(complete, capsys, odd):
    for path in (complete / "final" / "training.json", complete / "adapters" / "beta" / "training.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | odd))
    assert "final model: " in told(capsys, complete)


def test_values_beside_the_journal_are_checked(project, capsys, monkeypatch):
    monkeypatch.setattr("m2m_hf.storage.journal.INLINE", 5)
    assert m2m("search", "--config", project / "run.yaml") == 0
    values = project / "out" / "trials.values"
    assert "intact: " in told(capsys, project / "out")
    content = bytearray(values.read_bytes())
    content[100] ^= 1
    values.write_bytes(bytes(content))
    assert "are not what was measured" in told(capsys, project / "out", 1)


def test_interrupted_trainings_and_a_process_at_work_are_told(project, capsys, monkeypatch):
    out = project / "out"
    assert m2m("search", "--config", project / "run.yaml", "--objective", "ensemble") == 0
    part = next((out / "ensemble").iterdir())
    part.write_bytes(part.read_bytes()[:-1])
    assert f"{part.name}: it was cut short" in told(capsys, out, 1)
    part.unlink()
    (out / "adapters" / "beta").rename(staging_path(out / "adapters" / "beta"))
    mark(out, "beta", 2)
    assert "beta: interrupted; continues from step 2" in told(capsys, out)
    monkeypatch.setattr(RunFolder, "held", None)  # or it would be this very process
    assert "a process is at work in it now" in told(capsys, out)


def mark(out, name: str, step: int, **mates) -> None:
    checkpoint = checkpoints(staging_path(out / "adapters" / name)) / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "checkpoint_complete.json").write_text(json.dumps({"steps": step, "mates": mates}))


def test_a_group_goes_on_from_the_last_checkpoint_that_all_have(complete, capsys):
    for name in ("alpha", "beta"):
        (complete / "adapters" / name).rename(staging_path(complete / "adapters" / name))
    rewrite_config(complete, {"parallel_adapters": "auto"})
    group = {"a": "alpha", "b": "beta", "c": "gamma", "d": "a candidate that has left"}  # gamma is done
    mark(complete, "alpha", 20, **group)
    assert "alpha: interrupted; begins again: its group has no checkpoint in common" in told(capsys, complete)
    for name, step in (("alpha", 30), ("beta", 20)):
        mark(complete, name, step, **group)
    shown = told(capsys, complete)
    assert "alpha: interrupted; continues from step 20" in shown
    assert "beta: interrupted; continues from step 20" in shown
    rewrite_config(complete, {"parallel_adapters": "1"})
    assert "alpha: interrupted; continues from step 30" in told(capsys, complete)


def test_a_config_that_was_cut_short_is_written_again(complete, finished, capsys):
    config = complete / "config.yaml"
    whole = config.read_bytes()
    for size in (0, 30, len(whole) // 2, len(whole) - 2):
        config.write_bytes(whole[:size])
        assert m2m("sft", complete) == 2
        assert "m2m select --config writes it again" in capsys.readouterr().err
        assert m2m("status", complete) == 2
        assert m2m("select", "--config", finished / "run.yaml") == 0
        assert "nothing to do" in capsys.readouterr().out
        assert config.read_bytes() == whole


@pytest.mark.parametrize(("file", "part"), [("validation.jsonl", "validation"), ("test.jsonl", "test")])
def test_changed_target_rows_are_noticed_by_content(complete, finished, capsys, file, part):
    path = finished / file
    path.write_text(path.read_text().replace("red", "pink"))
    assert m2m("select", "--config", finished / "run.yaml") == 2
    assert (
        f"targets.colours has changed since it was scored (its {part} rows, or what scores them: "
        in capsys.readouterr().err
    )


def test_mixtures_of_an_ensemble_cost_no_example_evaluations(finished):
    """The base model and three singles have cost 10 each; all together, nothing."""
    out = finished / "out"
    assert m2m("search", "--config", finished / "run.yaml", "--objective", "ensemble") == 0
    cut(out, 5, '"ensemble"')
    for limit, left in ((None, 3), (41, 3), (40, 0)):
        rewrite_config(out, {"objective": "ensemble", "strategy": "exhaustive", "max_example_evaluations": limit})
        assert left_of(out) == f"left: up to {left} of 8 mixtures to score; the final fine-tune"


def test_the_seconds_of_every_rung_of_a_race_are_spent():
    source = {"path": "of/rows"}
    config = MergeToMixConfig(
        candidates=dict.fromkeys("abc", source), targets={"t": {"data": source, "scorer": "choice"}}, max_seconds=10
    )
    space, pair = SearchSpace(("a", "b", "c")), Mixture.subset(["a", "b"])
    first = [BASE, *(Mixture.subset([name]) for name in "abc"), Mixture.subset("abc")]

    def trial(mixture, rung, seconds):
        return Trial(f"{mixture}{rung}", mixture, "merged", "t", rung, "pruned", None, seconds)

    trials = [trial(mixture, 100, 1) for mixture in first]
    assert remaining(config, space, [], [*trials, trial(pair, 64, 2), trial(pair, 96, 2)]).mixtures == 2
    assert remaining(config, space, [], [*trials, trial(pair, 64, 3), trial(pair, 96, 2)]).mixtures == 0


def test_passes_for_gradients_count_in_the_budget(finished):
    out = finished / "out"
    way = ("--strategy", "gradient", "--weights", "continuous")
    assert m2m("search", "--config", finished / "run.yaml", *way) == 0
    trials = (out / "trials.jsonl").read_text().splitlines(True)
    passes = [line for line in trials if '"gradient", "target"' in line]
    (out / "trials.jsonl").write_text("".join([*trials[:5], passes[0]]))
    (out / "summary.json").unlink()
    budget = {"weights": "continuous", "max_example_evaluations": 61}
    rewrite_config(out, {"strategy": "gradient"} | budget)
    assert left_of(out).startswith("left: up to 1 of ")
    rewrite_config(out, {"strategy": "bayes"} | budget)  # asks for no gradient
    assert left_of(out).startswith("left: up to 2 of ")


@pytest.mark.parametrize("entry", [3, None, "f", []])
def test_a_target_that_is_no_mapping_is_no_traceback(complete, capsys, entry):
    (complete / "targets.json").write_text(json.dumps({"colours": entry}))
    shown = told(capsys, complete, 1)
    assert "targets.json: it does not say what the targets are" in shown
    assert "left: up to 8 of 8 mixtures to score; the final fine-tune" in shown


def test_a_search_writes_a_damaged_record_of_the_targets_again(finished, capsys):
    targets = finished / "out" / "targets.json"
    whole = targets.read_text()
    targets.write_text(json.dumps({"colours": 3}))
    assert m2m("search", "--config", finished / "run.yaml", "--max_trials", 6) == 0
    assert "targets.json was damaged" in capsys.readouterr().out
    assert json.loads(targets.read_text())["colours"]["validation"] == json.loads(whole)["colours"]["validation"]


def test_with_a_damaged_journal_the_final_fine_tune_is_left_too(complete):
    (complete / "trials.jsonl").write_text("{}\n")
    assert left_of(complete) == "left: the search; the final fine-tune"


def test_a_missing_file_without_bytes_is_damage(complete, capsys):
    path = complete / "adapters" / "beta" / "training.json"
    record = json.loads(path.read_text())
    record["files"]["empty.txt"] = {"bytes": 0, "sha256_16": "e3b0c44298fc1c14"}
    path.write_text(json.dumps(record))
    assert "adapters/beta: empty.txt is not what was trained" in told(capsys, complete, 1)


def test_one_adapter_that_is_missing_is_one(complete):
    (complete / "adapters" / "beta").rename(complete / "elsewhere")
    assert left_of(complete).startswith("left: 1 adapter (beta); ")
    (complete / "adapters" / "alpha").rename(complete / "elsewhere too")
    assert left_of(complete).startswith("left: 2 adapters (alpha, beta); ")
