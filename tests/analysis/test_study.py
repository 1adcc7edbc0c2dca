"""The correlation study and verification through the command line, on a pico model."""

import json
import runpy
import sys
from dataclasses import replace

import numpy as np
import pytest
import yaml
from pico import ROOT, changed, choice_rows, copy_project, language_searcher, m2m, project_folder, write_rows
from study_truth import fine_tuned_truth, surrogate_standings

from m2m_hf import InputError
from m2m_hf.analysis.beliefs import Beliefs
from m2m_hf.analysis.study_report import compare
from m2m_hf.core.mixture import Mixture
from m2m_hf.core.score import Failure, Score
from m2m_hf.merging.methods import MergeMethod
from m2m_hf.objectives import trained
from m2m_hf.objectives.merged import MergedObjective
from m2m_hf.reporting.finished_run import FinishedRun
from m2m_hf.scoring.causal_lm import ChoiceScorer
from m2m_hf.training import jobs
from m2m_hf.training.fine_tune import failure


def read(path) -> dict:
    return json.loads(path.read_text())


def forbidden(*args, **kwargs):
    pytest.fail("this was done before")


@pytest.fixture(scope="module")
def studied_project(tmp_path_factory, pico):
    """A project whose study is done. To be copied, not to be touched."""
    folder = project_folder(tmp_path_factory.mktemp("study"), pico)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("m2m_hf.reporting.plots.PICTURES", {})
        assert m2m("fidelity", "--config", folder / "run.yaml") == 0
    return folder


@pytest.fixture
def studied(tmp_path, studied_project):
    """A project whose study is done."""
    return copy_project(studied_project, tmp_path)


@pytest.fixture
def graded(project):
    """A project in which no two mixtures score the same."""
    write_rows(project / "validation.jsonl", choice_rows(40))
    target = yaml.safe_load((project / "run.yaml").read_text())["targets"]["colours"]
    changed(project, "run", targets={"colours": target | {"metric": "logprob"}})
    return project


def test_the_study_fine_tunes_compares_and_tells(graded, capsys, monkeypatch):
    path, out = graded / "run.yaml", graded / "out"
    assert m2m("fidelity", "--config", path) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    words = "Pearson/95 % CI over rows/95 % CI over candidates/sealed test/equally many rows/merged: /ensemble: "
    assert [word for word in words.split("/") if word not in printed.out] == []
    found = read(out / "fidelity.json")
    assert found["all_mixtures"]
    assert found["uniform"] == "each for the same 3 steps"
    assert len(found["mixtures"]) == 7
    assert set(found["agreement"]) == {"merged", "ensemble"}
    baselines = found["baselines"]
    ways = {"chosen", "all", "best_single", "similarity", "stratified", "random_1", "oracle", "base"}
    assert set(baselines) >= ways
    best = max(one["trained"]["score"] for one in found["mixtures"])
    assert baselines["oracle"]["validation"]["score"] == pytest.approx(best)
    assert baselines["chosen"]["validation"]["over_chosen"] == {"value": 0.0, "stderr": 0.0}
    assert (out / "report.html").exists()

    # Once more: nothing is trained, scored or looked at again, and the answer is the same to the letter.
    files = [out / "fidelity.json", out / "trials.jsonl"]
    before = [file.read_bytes() for file in files]
    monkeypatch.setattr(jobs, "train_expert", forbidden)
    monkeypatch.setattr(ChoiceScorer, "score", forbidden)
    assert m2m("fidelity", "--config", path) == 0
    assert [file.read_bytes() for file in files] == before


def test_a_study_that_was_interrupted_ends_the_same(studied, capsys, monkeypatch):
    whole, again = read(studied / "out" / "fidelity.json"), studied / "again"
    done = 0
    real = jobs.train_expert

    def stops(*args, **kwargs):
        nonlocal done
        done += 1
        if done == 3 + 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(jobs, "train_expert", stops)
    command = ("fidelity", "--config", studied / "run.yaml", "--output_dir", again)
    assert m2m(*command) == 130
    assert m2m(*command) == 0
    found = read(again / "fidelity.json")
    assert (
        done == 3 + 7 + 1
    )  # three adapters and seven mixtures, one of them twice; the stratified one is all together here
    assert [one["trained"] for one in found["mixtures"]] == [one["trained"] for one in whole["mixtures"]]
    assert found["agreement"] == whole["agreement"]
    assert "interrupted" in capsys.readouterr().out


def test_what_is_fine_tuned_to_compare_is_the_final_model(project):
    """Bit for bit; and the one is not trained again where the other is there."""
    one, other = language_searcher(project), language_searcher(project, "--output_dir", str(project / "other"))
    best = one.search().best.mixture
    models, final = one.run.fine_tuned, other.run.folder.final
    alone = models.counts(Mixture.subset(["alpha"]))
    models.train_all([models.counts(best), alone])
    other.train_final()
    weights = (models.folder(models.counts(best)) / "adapter_model.safetensors").read_bytes()
    assert weights == (final / "adapter_model.safetensors").read_bytes()
    validation = read(final / "training.json")["scores"]["colours"]["final"]["validation"]
    assert one.run.study.trained[0]([best])[0].value == validation["score"]
    one.train_final()
    assert (one.run.folder.final / "adapter_model.safetensors").read_bytes() == weights
    assert "counts" in read(one.run.folder.final / "training.json")  # it is a copy
    # A single is its adapter but for the order of its rows.
    single = models.record(alone)
    adapter = read(one.run.folder.adapters / "alpha" / "training.json")
    assert (single["steps"], single["counts"]) == (adapter["steps"], {"alpha": 12})


def test_verification_chooses_by_what_was_fine_tuned(graded, capsys):
    path, out = graded / "run.yaml", graded / "out"
    changed(graded, "run", fine_tunes=7)
    assert m2m("select", "--config", path) == 0
    printed = capsys.readouterr().out
    assert "fine-tuned before choosing" in printed
    assert "ways of choosing" in printed
    summary, recipe = read(out / "summary.json"), (out / "recipe.yaml").read_text()
    verified, final = summary["verified"], summary["final"]
    tried = [one["mixture"] for one in verified["mixtures"]]
    assert sum(len(mixture) > 1 for mixture in tried) == 4  # all that there are; a single is its adapter
    expected = verified["expectation"]
    assert expected["next"] is None
    assert {len(one["mixture"]) for one in expected["mixtures"] if one["trained"] is None} == {1}
    assert all(one["spread"] == 0 for one in expected["mixtures"])
    assert 0 <= expected["behind"]["0.5"] <= expected["behind"]["0.9"]
    best = max(verified["mixtures"], key=lambda one: one["trained"]["score"])
    assert summary["best"]["mixture"] == best["mixture"]
    assert final["validation"] == pytest.approx(best["trained"]["score"])
    assert " + ".join(best["mixture"]) in recipe
    if verified["by_search"] != best["mixture"]:
        assert any(one["code"] == "overruled" for one in summary["warnings"])
    assert verified["baselines"]["chosen"]["test"]["score"] == pytest.approx(final["test"])
    assert m2m("select", "--config", path) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert read(out / "summary.json") == summary
    # Whatever command comes next: the choice is made by the same rule.
    for command in ("search", "fidelity"):
        assert m2m(command, "--config", path) == 0
        again = read(out / "summary.json")
        assert (again["best"], again["final"]) == (summary["best"], final)
        assert (out / "recipe.yaml").read_text() == recipe


@pytest.mark.parametrize("count", [1, 3])
def test_so_many_mixtures_are_fine_tuned_the_best_first_and_others_never(graded, count):
    """A single is known by its adapter, and is fine-tuned beyond that number only where it is chosen."""
    one = language_searcher(graded, "--fine_tunes", str(count))
    ranking = [found.mixture.names for found in language_searcher(graded).search().ranking if len(found.mixture) > 1]
    summary = one.select()
    tried = [tuple(mixture["mixture"]) for mixture in summary["verified"]["mixtures"]]
    larger = [mixture for mixture in tried if len(mixture) > 1]
    everything = tuple(one.run.candidates)
    assert larger[0] == ranking[0]
    assert larger[1:2] == ([everything] if ranking[0] != everything else ranking[1:])[: count - 1]
    assert len(larger) == count
    assert tuple(summary["verified"]["expectation"]["next"]["mixture"]) in {*ranking} - {*larger}
    chosen = tuple(summary["best"]["mixture"])
    assert [mixture for mixture in tried if len(mixture) == 1] == ([chosen] if len(chosen) == 1 else [])
    assert len([*(graded / "out" / "trained").glob("*/training.json")]) == len(tried)  # none only to compare
    assert ({"base", "chosen"} if count == 1 else {"all", "base", "chosen"}) <= {*summary["verified"]["baselines"]}


def test_the_next_fine_tune_is_the_one_from_which_the_choice_is_expected_to_gain(graded):
    """It follows from what singles, the search's best and all together have scored, by merging and by the ensemble."""
    one = language_searcher(graded, "--fine_tunes", "3")
    summary = one.select()
    singles, scored = [Mixture.subset([name]) for name in one.run.candidates], one.run.study
    mixtures = [*one.run.space.subsets()]
    names = one.run.space.names
    said = [
        np.array([standing.score.value for standing in scored.standings(objectives, mixtures, "")])
        for objectives in scored.surrogates.values()
    ]
    beliefs = Beliefs(np.array([[name in mixture.names for name in names] for mixture in mixtures], dtype=float), said)
    for single in singles:
        place = mixtures.index(single)
        beliefs.learn(place, said[0][place], is_surrogate=True)
    tried = [
        (Mixture.subset(found["mixture"]), found["trained"]["score"]) for found in summary["verified"]["mixtures"][:3]
    ]
    for mixture, score in tried[:2]:
        beliefs.learn(mixtures.index(mixture), score)
    assert mixtures[beliefs.next()[0]] == tried[2][0]


def test_without_a_word_three_are_fine_tuned_and_by_the_papers_method_none(project):
    config = yaml.safe_load((project / "run.yaml").read_text())
    del config["fine_tunes"]
    (project / "run.yaml").write_text(yaml.safe_dump(config))
    for flags, count in (((), 3), (("--method", "merge_to_mix"), 0), (("--objective", "trained"), 0)):
        assert language_searcher(project, *flags).run.fine_tunes == count
    assert language_searcher(project, "--method", "merge_to_mix").select()["verified"] is None
    # Adapters take 3 steps each, all together 3 with max_steps, and 9 with as many epochs.
    assert language_searcher(project, "--fine_tunes", "auto").run.fine_tunes == 6
    epochs = "--fine_tunes", "auto", "--max_steps", "-1", "--num_train_epochs", "1"
    assert language_searcher(project, *epochs).run.fine_tunes == 2


def test_test_rows_are_sealed_until_all_is_chosen_and_every_model_sees_them_once(project, monkeypatch):
    one = language_searcher(project, "--fine_tunes", "2")
    events = []
    real = ChoiceScorer.score

    def score(self, stack, mixtures, *rest):
        if self is one.run.scorers["colours"]["test"]:
            parts = stack.adapters.items() if mixtures[0] else ()
            shown = [(name, sum(t.double().abs().sum().item() for t in of.tensors.values())) for name, of in parts]
            events.append((one._selection is not None, str(shown)))
        return real(self, stack, mixtures, *rest)

    monkeypatch.setattr(ChoiceScorer, "score", score)
    one.select()
    assert events
    assert all(verified for verified, _ in events)
    models = [model for _, model in events]
    assert len(models) == len(set(models))
    monkeypatch.setattr(ChoiceScorer, "score", forbidden)
    language_searcher(project, "--fine_tunes", "2").select()


def test_a_study_leaves_the_test_set_sealed_until_there_is_a_final_model(studied, capsys):
    path, out = studied / "run.yaml", studied / "out"
    assert not list(out.rglob("test.json"))
    assert all(one["test"] is None for one in read(out / "fidelity.json")["baselines"].values())
    assert m2m("select", "--config", path) == 0
    assert m2m("fidelity", "--config", path) == 0
    assert all(one["test"]["score"] is not None for one in read(out / "fidelity.json")["baselines"].values())
    assert "test set not scored" not in capsys.readouterr().out


def test_an_old_study_is_not_shown_as_this_runs(studied):
    path, out, words = studied / "run.yaml", studied / "out", "Can the scores be trusted here?"
    assert m2m("report", out) == 0
    assert words in (out / "report.html").read_text()
    assert m2m("search", "--config", path, "--merge_method", "ties") == 0
    assert not any(one["code"] == "fidelity" for one in read(out / "summary.json")["warnings"])
    assert words not in (out / "report.html").read_text()
    candidates = yaml.safe_load(path.read_text())["candidates"]
    del candidates["gamma"]
    changed(studied, "run", candidates=candidates)
    one = language_searcher(studied)
    mixtures, _, complete = fine_tuned_truth(one.run, one.search())  # is made again, for two candidates
    assert (len(mixtures), complete) == (3, True)


def test_verification_obeys_min_delta(studied):
    target = yaml.safe_load((studied / "run.yaml").read_text())["targets"]["colours"]
    changed(studied, "run", targets={"others": target | {"metric": "logprob", "min_delta": 0.0}})
    one = language_searcher(studied, "--fine_tunes", "7")
    found = one.search()
    true = one.run.study.trained_standings([*one.run.space.subsets()], found.base)
    allowed = [standing for standing in true if standing.score.value >= found.base.score.value]
    assert [standing for standing in true if not standing.short] == allowed
    if allowed:
        best = max(allowed, key=lambda standing: standing.score.value)
        assert one.search().best.mixture == best.mixture
    else:
        with pytest.raises(InputError, match="min_delta"):
            one.search()


def test_where_no_fine_tuned_mixture_may_be_chosen_that_is_said(studied, monkeypatch, capsys):
    target = yaml.safe_load((studied / "run.yaml").read_text())["targets"]["colours"]
    changed(studied, "run", targets={"others": target | {"metric": "logprob", "min_delta": 0.0}})

    def poor(objective, mixtures, rows):
        return [Score.of([-99.0] * objective.scorer.examples) for _ in mixtures]

    monkeypatch.setattr(trained.TrainedObjective, "_score", poor)
    assert m2m("search", "--config", studied / "run.yaml", "--fine_tunes", 7) == 2
    assert "fine-tuned, every mixture makes a target worse" in capsys.readouterr().err


def test_a_surrogate_that_scores_none_of_the_fine_tuned_is_named(studied, monkeypatch):
    one = language_searcher(studied)
    base, study = one.search().base, one.run.study
    (objective,) = study.surrogates["ensemble"]
    monkeypatch.setattr(objective, "key", lambda mixture, rung=None: f"failing {mixture}")
    monkeypatch.setattr(objective, "_score", lambda mixtures, rows: [Failure("it is broken")] * len(mixtures))
    true = study.trained_standings([*one.run.space.subsets()], base)
    with pytest.raises(InputError, match="could be scored by the ensemble objective: it is broken"):
        study.report(true, base, "", "")


def test_a_training_that_diverges_is_left_out_and_named(project, monkeypatch, capsys):
    path = project / "run.yaml"
    real = jobs.train_expert

    def diverges(base, rows, *rest):
        words = {row["prompt"].split()[1] for row in rows}
        if words == {"alpha", "beta"}:
            return failure("loss nan")
        return real(base, rows, *rest)

    monkeypatch.setattr(jobs, "train_expert", diverges)
    assert m2m("fidelity", "--config", path) == 0
    reason = "training on alpha + beta: loss nan"
    assert f"left out: alpha + beta could not be fine-tuned and scored: {reason}" in capsys.readouterr().out
    found = read(project / "out" / "fidelity.json")
    assert len(found["mixtures"]) == 6
    assert found["failed"] == [{"mixture": {"alpha": 0.5, "beta": 0.5}, "reason": reason}]
    monkeypatch.setattr(jobs, "train_expert", forbidden)
    assert m2m("fidelity", "--config", path) == 0


def test_commands_and_their_sealed_tests_are_studied_too(project):
    """A scorer that knows only a number: no intervals by row, no verdict, and the base model is a zero adapter."""
    script = project / "score.py"
    script.write_text(
        "import json, sys\nfrom safetensors.numpy import load_file\n"
        "tensors = load_file(sys.argv[1] + '/adapter_model.safetensors')\n"
        "value = sum(abs(t).sum().item() for n, t in tensors.items() if 'lora_B' in n)\n"
        "json.dump({'score': value}, open(sys.argv[2], 'w'))\n"
    )
    command = [sys.executable, str(script), "{adapter}", "{output}"]
    changed(project, "run", targets={"size": {"scorer": "command", "command": command, "test_command": command}})
    assert m2m("select", "--config", project / "run.yaml", "--fine_tunes", 1) == 0
    assert read(project / "out" / "summary.json")["verified"]["baselines"]["base"]["test"]["score"] == 0
    one = language_searcher(project)
    found = one.fidelity()
    assert found["verdict"]["merged"]["verdict"] == "unknown"
    assert found["agreement"]["merged"]["score"]["pearson"]["row_ci"] is None
    with pytest.raises(InputError, match="no adapter to hand"):
        surrogate_standings(one.run, [Mixture.subset(["alpha"])], method=MergeMethod("ties"))


def test_constraints_hold_in_the_report_and_the_study(studied):
    changed(studied, "run", min_datasets=2)
    one = language_searcher(studied)
    one.select()
    found = one.fidelity()
    assert {len(standing.mixture) for standing in FinishedRun.from_pretrained(studied / "out").ranked} == {2, 3}
    assert found["all_mixtures"]
    assert len(found["baselines"]["oracle"]["mixture"]) >= 2


RECIPES = {
    "compare_merge_methods": (
        ["--methods", "average", "ties:density=0.5"],
        "merge_methods.json",
        {"merged", "ties(scaling=1, density=0.5)", "ensemble"},
        ["--methods", "dare:density=0"],
        "density: expected a share",
    ),
    "ablate_uniformity": (
        ["--vary", "learning_rate=4", "seed"],
        "ablation/ablation.json",
        {"uniform", "learning_rate=4", "seed"},
        ["--vary", "num_train_epochs=4"],
        "this run goes by max_steps",
    ),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_run(recipe, studied, capsys, monkeypatch):
    right, name, expected, wrong, message = RECIPES[recipe]
    path = str(ROOT / "recipes" / f"{recipe}.py")

    def run(*flags):
        monkeypatch.setattr(sys, "argv", [path, "--config", str(studied / "run.yaml"), *flags])
        monkeypatch.setattr(sys, "path", [str(ROOT / "recipes"), *sys.path])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(path, run_name="__main__")
        return ended.value.code

    assert run(*right) == 0
    printed = capsys.readouterr().out
    assert set(read(studied / "out" / name)) == expected
    assert all(word in printed for word in expected)
    assert run(*wrong) == 2
    assert message in capsys.readouterr().err


def test_mixed_training_must_be_allowed_and_is_then_done(project, capsys):
    path, adapters = project / "run.yaml", project / "out" / "adapters"
    candidates = yaml.safe_load(path.read_text())["candidates"]
    candidates["beta"]["training"] = {"learning_rate": 5e-3, "lora_r": 2}
    changed(project, "run", candidates=candidates)
    assert m2m("search", "--config", path) == 2
    assert "candidates.beta.training" in capsys.readouterr().err
    changed(project, "run", allow_mixed_training=True)
    assert m2m("search", "--config", path) == 0
    rates = [read(adapters / name / "training.json")["uniform"]["learning_rate"] for name in ("alpha", "beta")]
    assert rates == [1e-2, 5e-3]
    assert read(adapters / "beta" / "adapter_config.json")["r"] == 2
    assert m2m("search", "--config", path) == 0  # and goes on from there
    candidates["beta"]["training"] = {"learning_rates": 5e-3}
    changed(project, "run", candidates=candidates)
    capsys.readouterr()
    assert m2m("search", "--config", path) == 2
    assert "learning_rate" in capsys.readouterr().err


def test_comparisons_leave_out_what_the_surrogate_could_not_score(studied):
    one = language_searcher(studied)
    mixtures, true, complete = fine_tuned_truth(one.run, one.search())
    ours = surrogate_standings(one.run, mixtures)
    assert complete
    whole = compare(ours, true, complete)
    assert [whole[name].mixtures for name in ("score", "score, two or more")] == [7, 4]
    trials = {name: replace(trial, score=None, state="failed") for name, trial in ours[0].trials.items()}
    assert compare([replace(ours[0], trials=trials), *ours[1:]], true, complete)["score"].mixtures == 6


def test_a_single_that_trains_worse_again_is_not_taken_for_the_choice(graded, monkeypatch):
    """Its adapter scored best; fine-tuned in another order of its rows it does not. The next best single is then tried, too."""
    real = trained.TrainedObjective._score

    def poor(objective, mixtures, rows):
        alone = all(len(mixture) == 1 for mixture in mixtures)
        return [Score.of([-99.0] * objective.scorer.examples)] if alone else real(objective, mixtures, rows)

    def sure(objective, mixtures, rows):
        return [Score.of([2.0 if len(mixture) == 1 else 0.5] * objective.scorer.examples) for mixture in mixtures]

    monkeypatch.setattr(trained.TrainedObjective, "_score", poor)
    monkeypatch.setattr(MergedObjective, "_score", sure)
    monkeypatch.setattr(MergedObjective, "batch_size", lambda objective, rows: 1)
    one = language_searcher(graded, "--fine_tunes", "2", "--objective", "merged")
    verified, chosen = one._select().verified, one.search().best.mixture
    assert len(chosen) > 1
    assert sum(len(found.mixture) == 1 for found in verified.mixtures) == 3  # all of them looked better
    expected = {found.mixture: found for found in verified.expectation.mixtures}
    assert expected[chosen].spread == 0
    assert all(found.expected == -99 for mixture, found in expected.items() if len(mixture) == 1)
