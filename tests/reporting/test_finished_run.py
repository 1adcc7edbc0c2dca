"""`FinishedRun`: what the files of a run say, from a folder or from the Hub."""

import dataclasses
import json
import re
import textwrap

import pytest

from m2m_hf import FinishedRun
from m2m_hf.core.mixture import BASE, Mixture
from m2m_hf.errors import InputError
from m2m_hf.reporting.conclude import about_rows


def test_the_summary_is_its_serialisation(finished):
    run = FinishedRun.from_pretrained(finished / "out")
    written = (finished / "out" / "summary.json").read_text()
    assert json.dumps(run.summary(), indent=2, ensure_ascii=False) + "\n" == written
    assert run.final.scores["colours"]["final"]["test"].over_base is not None
    assert len(run.standings) == 8
    assert run.standings[BASE].score.value == run.base.score
    assert run.ranked[0].mixture == run.best.mixture
    assert set(run.usable) == {"alpha", "beta", "gamma"}


def test_rows_are_counted_also_where_the_scorer_brings_its_own(finished):
    run = FinishedRun.from_pretrained(finished / "out")
    rows = len(next(iter(run.standings[run.best.mixture].trials.values())).score.values)
    bias = dataclasses.replace(run.selection_bias, tied=2, rows_needed=3.0)
    target = dataclasses.replace(run.targets["colours"], validation_rows=0)  # as of a command
    ((_, text),) = about_rows(dataclasses.replace(run, selection_bias=bias, targets={"colours": target}))
    assert text.endswith(f"rows, not {rows}")


def test_the_example_of_its_docstring_runs(finished, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", FinishedRun.__doc__, re.S)
    exec(textwrap.dedent(example).replace("runs/science", str(finished / "out")), {})
    best, *_, warnings = capsys.readouterr().out.splitlines()
    summary = json.loads((finished / "out" / "summary.json").read_text())
    assert best == f"{' + '.join(summary['best']['mixture'])} {summary['best']['score']}"
    assert warnings == str([one["text"] for one in summary["warnings"]])


def test_a_pushed_run_is_read_from_the_hub(hub, forks, finished):
    code = (
        "import sys; from pathlib import Path; from m2m_hf import FinishedRun; from m2m_hf.console import Terminal\n"
        "from m2m_hf.publish.hub import push; from m2m_hf.storage.run_folder import RunFolder\n"
        "push(RunFolder(sys.argv[1]), 'org/quiz', Terminal(quiet=True))\n"
        "there, here = FinishedRun.from_pretrained('org/quiz'), FinishedRun.from_pretrained(Path(sys.argv[1]))\n"
        "assert there.summary() == here.summary() and there.training.keys() == here.training.keys()\n"
        "print(len(there.standings), there.expert, there.task)"
    )
    done = forks.run("-c", code, finished / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "adapter", "causal_lm"]


@pytest.mark.parametrize(
    "change",
    [
        {"best": None},
        {"candidates": "alpha"},
        {"best": {"mixture": {"alpha": 0.5}, "score": 1.0, "stderr": None}},
    ],
)
def test_a_summary_of_another_version_is_refused(finished, change):
    path = finished / "out" / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=r"summary.json: written by an incompatible version|training.json is missing"):
        FinishedRun.from_pretrained(finished / "out")


def test_what_is_neither_a_folder_nor_on_the_hub_is_refused(tmp_path):
    with pytest.raises(InputError, match="neither a run folder nor a repository"):
        FinishedRun.from_pretrained("org/nothing")
    with pytest.raises(InputError, match="holds no finished search"):
        FinishedRun.from_pretrained(tmp_path)


def test_failed_trials_are_standings_without_a_score(finished):
    path = finished / "out" / "trials.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    failed = {"state": "failed", "score": None, "stderr": None, "reason": "no number", "values": None, "logprobs": None}
    line = lines[-1] | failed
    del line["crc32"]
    path.write_text("".join(json.dumps(one) + "\n" for one in (*lines[:-1], line)))
    run = FinishedRun.from_pretrained(finished / "out")
    assert run.standings[Mixture.subset(line["names"])].score is None
    assert len(run.scored) == 6
