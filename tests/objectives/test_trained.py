"""The trained objective: a search whose scores are those of models fine-tuned on the mixtures, on a pico model."""

import json
import re
import shutil
from collections import Counter

import pytest
import torch
import yaml
from pico import changed, choice_rows, language_searcher, m2m, trials, write_rows
from safetensors.torch import load_file

from m2m_hf.core.mixture import BASE, Mixture
from m2m_hf.errors import InputError
from m2m_hf.merging.adapter import Adapter
from m2m_hf.merging.gated_stack import GatedStack
from m2m_hf.objectives import trained
from m2m_hf.run.estimate import estimate
from m2m_hf.search.model_based import STRATEGIES
from m2m_hf.training import jobs
from m2m_hf.training.fine_tune import failure
from m2m_hf.training.trackers import Tracker

TRAINED = ("--objective", "trained")


@pytest.fixture(autouse=True)
def graded(project, monkeypatch):
    """No two mixtures score the same, and no pictures are drawn."""
    monkeypatch.setattr("m2m_hf.reporting.plots.PICTURES", {})
    write_rows(project / "validation.jsonl", choice_rows(20))
    target = yaml.safe_load((project / "run.yaml").read_text())["targets"]["colours"]
    changed(project, "run", targets={"colours": target | {"metric": "logprob"}})


class Trainings(Counter):
    """What was fine-tuned. `calls` has the number of models of each call; after `stop` models the first one is interrupted."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []
        self.stop: int | None = None


@pytest.fixture
def fine_tuned(monkeypatch) -> Trainings:
    done = Trainings()
    real = trained.train_jobs

    def counting(base, jobs, *rest):
        done.calls.append(len(jobs))
        jobs = jobs[: done.stop]
        real(base, jobs, *rest)
        done.update(job.name for job in jobs)
        if done.stop is not None:
            raise KeyboardInterrupt

    monkeypatch.setattr(trained, "train_jobs", counting)
    return done


def lines(project) -> list[dict]:
    return [
        {key: value for key, value in line.items() if key not in ("seconds", "crc32")}
        for line in trials(project / "out")
    ]


def test_the_score_is_that_of_the_model_which_the_final_one_then_is(project, fine_tuned, capsys):
    assert m2m("select", "--config", project / "run.yaml", *TRAINED, "--parallel_adapters", "8") == 0
    printed = capsys.readouterr().out
    words = "up to 7 mixtures to fine-tune and score/all 3, trained/trained: a model/mixtures fine-tuned"
    assert [word for word in words.split("/") if word not in printed] == []
    assert "merged" not in printed
    rows = re.findall(r"^  (\w+(?: \+ \w+)*): 3 steps, [\d,]+ tokens, loss \d\.\d+ → \d\.\d+, \d+ s$", printed, re.M)
    assert sorted(rows) == sorted([*fine_tuned, "alpha", "beta", "gamma"])  # mixtures, and the adapters before them
    assert [*fine_tuned.values()] == [1] * 7
    assert fine_tuned.calls == [4, 3]  # the singles and all together, then the pairs
    summary, final = (
        json.loads((project / "out" / name).read_text()) for name in ("summary.json", "final/training.json")
    )
    assert summary["objective"] == "trained"
    best = max((line for line in lines(project) if line["names"]), key=lambda line: line["score"])
    assert summary["best"]["mixture"] == dict(zip(best["names"], best["weights"], strict=True))
    assert final["scores"]["colours"]["final"]["validation"]["score"] == best["score"]

    one = language_searcher(project, *TRAINED)
    mixture = Mixture.subset(["alpha", "gamma"])
    adapter = Adapter.load(one.run.fine_tuned.folder(one.run.fine_tuned.counts(mixture)))
    scorer = one.run.validation_scorers["colours"]
    (score,) = scorer.score(GatedStack(one.run.base.model, {"x": adapter}), [{"x": 1.0}], 1024)
    (line,) = (line for line in lines(project) if line["names"] == ["alpha", "gamma"])
    assert score.value == pytest.approx(line["score"])
    assert {"adapters: all trained", "fine-tuning: all mixtures are fine-tuned"} <= {
        *estimate(language_searcher(project, *TRAINED).run)
    }
    shutil.copytree(project / "out", project / "less")
    shutil.rmtree(project / "less" / "trained" / one.run.fine_tuned.folder(one.run.fine_tuned.counts(mixture)).name)
    told = estimate(language_searcher(project, *TRAINED, "--output_dir", str(project / "less")).run)
    assert any(text.startswith("fine-tuning: up to 1 mixture, 3 steps") for text in told)
    # What the run has fine-tuned answers m2m fidelity, and m2m status knows that nothing is left.
    assert m2m("fidelity", "--config", project / "run.yaml", *TRAINED) == 0
    assert fine_tuned.total() == 7
    assert Counter(line["objective"] for line in lines(project)) == {"trained": 8, "merged": 7, "ensemble": 7}
    capsys.readouterr()
    assert m2m("status", project / "out") == 0
    assert "left: nothing" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_every_strategy_finds_what_was_fine_tuned_and_a_budget_goes_on(project, fine_tuned, monkeypatch):
    """A budget of 6 is five fine-tunes: base, singles, all together and one more."""
    told = []  # how many were trained when a tracker is told of the search: some have one run at a time, as each training is
    monkeypatch.setattr(Tracker, "log", lambda *args: told.append(fine_tuned.total()))
    first = language_searcher(project, *TRAINED, "--strategy", "greedy", "--max_trials", "6").search()
    assert (fine_tuned.total(), first.ended, len(first.standings)) == (5, "budget", 6)
    assert told == [5] * 5
    whole = language_searcher(project, *TRAINED).search()
    assert (fine_tuned.total(), max(fine_tuned.values()), len(whole.standings)) == (7, 1, 8)
    known = lines(project)
    for strategy in STRATEGIES.keys() - {"gradient"}:
        result = language_searcher(project, *TRAINED, "--strategy", strategy, "--max_trials", "20").search()
        assert {one: whole.standings[one] for one in result.standings} == result.standings
    assert (fine_tuned.total(), lines(project)) == (7, known)


def test_a_killed_search_goes_on_to_the_same_and_trains_nothing_twice(project, tmp_path, fine_tuned):
    best = language_searcher(project, *TRAINED).search().best.mixture
    reference = lines(project)
    (project / "out" / "trained").rename(tmp_path / "trained")
    (project / "out" / "trials.jsonl").unlink()
    fine_tuned.clear()
    fine_tuned.calls.clear()
    fine_tuned.stop = 2
    with pytest.raises(KeyboardInterrupt):
        language_searcher(project, *TRAINED).search()
    fine_tuned.stop = None
    assert language_searcher(project, *TRAINED).search().best.mixture == best
    assert ([*fine_tuned.values()], fine_tuned.calls) == ([1] * 7, [4, 2, 3])
    assert lines(project) == reference


def test_a_training_that_diverges_is_a_failed_trial(project, monkeypatch):
    real = jobs.train_expert

    def diverges(base, rows, *rest):
        words = {row["prompt"].split()[1] for row in rows}
        return failure("loss nan") if words == {"alpha", "beta"} else real(base, rows, *rest)

    monkeypatch.setattr(jobs, "train_expert", diverges)
    result = language_searcher(project, *TRAINED).search()
    failed = result.standings[Mixture.subset(["alpha", "beta"])]
    assert failed.trials["colours"].reason == "training on alpha + beta: loss nan"
    assert failed not in result.ranking
    assert len(result.ranking) == 6
    monkeypatch.setattr(trained, "train_jobs", lambda *args: pytest.fail("trained again"))
    assert language_searcher(project, *TRAINED).search().standings == result.standings


def test_the_estimate_counts_fine_tunes(project, monkeypatch):
    changed(project, "run", max_steps=-1, num_train_epochs=1)  # 3 steps for each candidate
    monkeypatch.setattr("m2m_hf.run.estimate.Clock.per_step", 2.0)
    monkeypatch.setattr("m2m_hf.run.estimate.scoring_seconds", lambda scorer, run: 3.0)
    told = estimate(language_searcher(project, *TRAINED).run)
    steps = 3 * 3 + 3 * 6 + 9
    assert f"fine-tuning: up to 7 mixtures, {steps} steps, about 1 min 12 s (2.00 s a step)" in told
    assert "the final model is one of them" in told
    assert told[-1] == "together about 1 min 54 s"  # adapters 18 s, fine-tuning 72 s, scoring 24 s
    few = estimate(language_searcher(project, *TRAINED, "--max_trials", "6").run)  # of those the largest
    assert f"fine-tuning: up to 5 mixtures, {9 + 3 * 6 + 3} steps, about 1 min 00 s (2.00 s a step)" in few


def test_many_mixtures_need_a_budget(project, monkeypatch):
    monkeypatch.setattr("m2m_hf.run.checks.FEW", 6)
    with pytest.raises(InputError, match="there are more than 6; expected max_trials: how many mixtures to score"):
        language_searcher(project, *TRAINED).check()
    language_searcher(project, *TRAINED, "--max_trials", "6").check()
    assert BASE not in language_searcher(project, *TRAINED).run.space


def test_two_mixtures_of_the_same_candidates_in_other_shares_train_side_by_side(project):
    wanted = [{"alpha": 12, "beta": 12}, {"alpha": 12, "beta": 6}]
    weights = []
    for parallel in ("1", "2"):
        models = language_searcher(project, "--parallel_adapters", parallel, "--output_dir", str(project / parallel))
        models.train_adapters()
        models.run.fine_tuned.train_all(wanted)
        folders = [models.run.fine_tuned.folder(counts) for counts in wanted]
        weights.append([load_file(folder / "adapter_model.safetensors") for folder in folders])
    for alone, beside in zip(*weights, strict=True):
        for name, tensor in alone.items():
            torch.testing.assert_close(beside[name], tensor, rtol=1e-4, atol=1e-5)
    assert any((weights[1][0][name] != weights[1][1][name]).any() for name in weights[1][0])
