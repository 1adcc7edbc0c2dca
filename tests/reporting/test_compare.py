"""Two runs side by side."""

import json

from pico import m2m


def test_two_runs_are_compared(project, capsys):
    run = project / "run.yaml"
    run.write_text(run.read_text().replace("scorer: choice", "scorer: choice\n    metric: logprob"))
    assert m2m("select", "--config", run, "--output_dir", project / "one") == 0
    assert m2m("search", "--config", run, "--output_dir", project / "two", "--learning_rate", 0.02) == 0
    capsys.readouterr()
    assert m2m("compare", project / "one", project / "two") == 0
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.startswith("learning_rate")]
    assert line.split()[-1] == "0.02"
    assert "output_dir" not in printed
    assert "7 mixtures were scored on all rows in both; rank correlation" in printed
    best = json.loads((project / "one" / "summary.json").read_text())["best"]
    assert f"{best['score']:.3f} ± {best['stderr']:.3f}" in printed
    assert "final model, test" in printed
    assert m2m("compare", project / "one", project / "one") == 0
    printed = capsys.readouterr().out
    assert "different settings" not in printed
    assert "rank correlation 1.00" in printed
    assert "both chose the same mixture" in printed
    assert m2m("compare", project / "one", project / "three") == 2
    assert "holds no finished search" in capsys.readouterr().err


def test_scores_on_other_rows_are_not_compared(finished, capsys):
    run = finished / "run.yaml"
    rows = (finished / "validation.jsonl").read_text().splitlines(True)
    (finished / "validation.jsonl").write_text("".join(rows[:-1]))
    assert m2m("search", "--config", run, "--output_dir", finished / "two") == 0
    capsys.readouterr()
    assert m2m("compare", finished / "out", finished / "two") == 0
    assert "scores are not comparable: the rows or the metric of colours differ" in capsys.readouterr().out
