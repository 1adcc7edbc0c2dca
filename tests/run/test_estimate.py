"""`m2m select --dry_run`: everything is checked, something is measured, nothing is written."""

import json
import re

from pico import language_searcher, m2m

from m2m_hf.run.estimate import estimate
from m2m_hf.storage.files import checkpoints, staging_path
from m2m_hf.storage.records import COMPLETE
from m2m_hf.training.fine_tune import as_launched


def test_what_a_run_would_do_is_told_and_nothing_written(project, capsys):
    before = sorted(project.rglob("*"))
    assert m2m("select", "--config", project / "run.yaml", "--dry_run") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "candidates (text format)" in printed
    assert re.search(r"adapters: 3 to train, 9 steps, about \d", printed)
    assert "search: up to 8 mixtures, about " in printed
    assert "final fine-tune: up to 3 steps" in printed
    assert "peak memory while measuring" in printed
    assert "colours: with 10 rows, mixtures that differ by less than about 0.277 in the share" in printed
    assert "nothing was written" in printed
    assert sorted(project.rglob("*")) == before
    # The base that was measured with is as it was: the run that follows is the same.
    assert m2m("select", "--config", project / "run.yaml") == 0
    capsys.readouterr()
    assert m2m("select", "--config", project / "run.yaml", "--dry_run") == 0
    assert "adapters: all trained" in capsys.readouterr().out


def test_what_is_wrong_is_said_as_by_the_run(project, capsys):
    assert m2m("select", "--config", project / "run.yaml", "--dry_run", "--strategy", "magic") == 2
    assert "strategy: expected" in capsys.readouterr().err


def test_figures_are_of_what_was_measured(project, monkeypatch):
    monkeypatch.setattr("m2m_hf.run.estimate.Clock.per_step", 2.0)
    monkeypatch.setattr("m2m_hf.run.estimate.scoring_seconds", lambda scorer, run: 3.0)
    lines = estimate(language_searcher(project).run)
    assert lines[0] == "adapters: 3 to train, 9 steps, about 18 s (2.00 s a step)"
    assert lines[1].startswith("search: up to 8 mixtures, about 24 s (3.00 s each")
    assert lines[2] == "final fine-tune: up to 3 steps, about 6 s (2.00 s a step)"
    assert lines[-1] == "together about 48 s"
    lines = estimate(language_searcher(project, "--parallel_adapters", "2").run)
    assert lines[0] == "adapters: 3 to train, 9 steps, about 18 s (2.00 s a step of one; several together take less)"
    assert lines[2] == "final fine-tune: up to 3 steps, about 6 s (2.00 s a step)"
    lines = estimate(language_searcher(project, "--fine_tunes", "2").run)
    assert lines[2:4] == [
        "fine-tuning: up to 2 mixtures, 6 steps, about 12 s (2.00 s a step)",
        "the final model is one of them",
    ]
    # What a checkpoint holds costs nothing more; of a group those count that all have.
    run = language_searcher(project).run
    checkpoint = checkpoints(staging_path(run.folder.adapters / "beta")) / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    identities = {run.bank.identity(name): name for name in ("alpha", "beta")}
    known = {"of": as_launched(run.bank.identity("beta")), "steps": 2, "mates": identities, "files": {}}
    (checkpoint / COMPLETE).write_text(json.dumps(known))
    for parallel, steps in (("1", 7), ("2", 9)):
        lines = estimate(language_searcher(project, "--parallel_adapters", parallel).run)
        assert lines[0].startswith(f"adapters: 3 to train, {steps} steps, about {2 * steps} s")
