"""The correlation study and verification through the command line, on a pico model."""

import json
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from pico import choice_rows, language_searcher, m2m, project_folder, write_rows
from study_truth import fine_tuned_truth, surrogate_standings

from m2m_hf import InputError
from m2m_hf.analysis.study_report import compare
from m2m_hf.core.mixture import Mixture
from m2m_hf.merging.methods import MergeMethod
from m2m_hf.objectives import trained
from m2m_hf.reporting.finished_run import FinishedRun
from m2m_hf.scoring.causal_lm import ChoiceScorer
from m2m_hf.training import bank
from m2m_hf.training.fine_tune import TrainingFailedError

ROOT = Path(__file__).parents[2]


def configure(project, **changes) -> object:
    """The project's YAML with these fields changed."""
    path = project / "run.yaml"
    given = yaml.safe_load(path.read_text())
    given |= changes
    path.write_text(yaml.safe_dump({key: value for key, value in given.items() if value is not None}))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pico):
    """The run folder of a study of the `project` fixture's configuration, made once."""
    folder = project_folder(tmp_path_factory.mktemp("study"), pico)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("m2m_hf.reporting.plots.PICTURES", {})
        assert m2m("fidelity", "--config", folder / "run.yaml") == 0
    return folder / "out"


@pytest.fixture
def studied(project, finished):
    """A project whose study is done."""
    shutil.copytree(finished, project / "out", ignore=shutil.ignore_patterns(".lock"))
    config = project / "out" / "config.yaml"
    config.write_text(config.read_text().replace(str(finished.parent), str(project)))
    return project


def test_the_study_fine_tunes_compares_and_tells(project, capsys, monkeypatch):
    write_rows(project / "validation.jsonl", choice_rows(40))
    target = yaml.safe_load((project / "run.yaml").read_text())["targets"]["colours"] | {"metric": "logprob"}
    path = configure(project, targets={"colours": target})
    assert m2m("fidelity", "--config", path) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    for word in (
        "Pearson",
        "95 % CI over rows",
        "95 % CI over candidates",
        "sealed test",
        "equally many rows",
        "merged: ",
        "ensemble: ",
    ):
        assert word in printed.out
    found = json.loads((project / "out" / "fidelity.json").read_text())
    assert found["all_mixtures"]
    assert found["uniform"] == "each for the same 3 steps"
    assert len(found["mixtures"]) == 7
    assert set(found["agreement"]) == {"merged", "ensemble"}
    assert set(found["baselines"]) >= {
        "chosen",
        "all",
        "best_single",
        "similarity",
        "stratified",
        "random_1",
        "oracle",
        "base",
    }
    best = max(found["mixtures"], key=lambda one: one["trained"]["score"])
    assert found["baselines"]["oracle"]["validation"]["score"] == pytest.approx(best["trained"]["score"])
    assert found["baselines"]["chosen"]["validation"]["over_chosen"] == {"value": 0.0, "stderr": 0.0}
    assert (project / "out" / "report.html").exists()

    # Once more: nothing is trained, scored or looked at again, and the answer is the same to the letter.
    before = (project / "out" / "fidelity.json").read_bytes(), (project / "out" / "trials.jsonl").read_bytes()

    def fail(*args, **kwargs):
        raise AssertionError("this was done before")

    monkeypatch.setattr(trained, "train_expert", fail)
    monkeypatch.setattr(bank, "train_expert", fail)
    monkeypatch.setattr(ChoiceScorer, "score", fail)
    assert m2m("fidelity", "--config", path) == 0
    assert ((project / "out" / "fidelity.json").read_bytes(), (project / "out" / "trials.jsonl").read_bytes()) == before


def test_a_study_that_was_interrupted_ends_the_same(studied, capsys, monkeypatch):
    project, path = studied, studied / "run.yaml"
    whole = json.loads((project / "out" / "fidelity.json").read_text())
    again = project / "again"
    done = 0
    real = trained.train_expert

    def stops(*args, **kwargs):
        nonlocal done
        done += 1
        if done == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(trained, "train_expert", stops)
    assert m2m("fidelity", "--config", path, "--output_dir", again) == 130
    assert m2m("fidelity", "--config", path, "--output_dir", again) == 0
    found = json.loads((again / "fidelity.json").read_text())
    assert done == 7 + 1  # seven mixtures, one of them twice; the stratified one is all together here
    assert [one["trained"] for one in found["mixtures"]] == [one["trained"] for one in whole["mixtures"]]
    assert found["agreement"] == whole["agreement"]
    assert "interrupted" in capsys.readouterr().out


def test_what_is_fine_tuned_to_compare_is_the_final_model(project):
    """Bit for bit; and the one is not trained again where the other is there."""
    one = language_searcher(project)
    one.search()
    best = one.search().best.mixture
    counts = one.run.fine_tuned.counts(best)
    folder = one.run.fine_tuned.train(counts)
    other = language_searcher(project, "--output_dir", str(project / "other"))
    other.train_final()
    ours, theirs = ((place / "adapter_model.safetensors").read_bytes() for place in (folder, other.run.folder.final))
    assert ours == theirs
    objective = one.run.study.trained[0]
    validation = json.loads((other.run.folder.final / "training.json").read_text())["scores"]["colours"]["final"][
        "validation"
    ]
    assert objective([best])[0].value == validation["score"]
    one.train_final()
    assert (one.run.folder.final / "adapter_model.safetensors").read_bytes() == theirs
    assert "counts" in json.loads((one.run.folder.final / "training.json").read_text())  # it is a copy


def test_a_fine_tuned_single_is_its_adapter_but_for_the_order_of_its_rows(project):
    one = language_searcher(project)
    one.search()
    counts = one.run.fine_tuned.counts(Mixture.subset(["alpha"]))
    record = json.loads((one.run.fine_tuned.train(counts) / "training.json").read_text())
    adapter = json.loads((one.run.folder.adapters / "alpha" / "training.json").read_text())
    assert (record["steps"], record["counts"]) == (adapter["steps"], {"alpha": 12})


def test_verification_chooses_by_what_was_fine_tuned(project, capsys):
    write_rows(project / "validation.jsonl", choice_rows(40))
    target = yaml.safe_load((project / "run.yaml").read_text())["targets"]["colours"] | {"metric": "logprob"}
    path = configure(project, targets={"colours": target})
    assert m2m("select", "--config", path, "--verify_top_k", 7) == 0
    printed = capsys.readouterr().out
    assert "fine-tuned before choosing" in printed
    assert "ways of choosing" in printed
    summary = json.loads((project / "out" / "summary.json").read_text())
    tried = summary["verified"]["mixtures"]
    assert len(tried) == 7
    best = max(tried, key=lambda one: one["trained"]["score"])
    assert summary["best"]["mixture"] == best["mixture"]
    assert summary["final"]["validation"] == pytest.approx(best["trained"]["score"])
    recipe = (project / "out" / "recipe.yaml").read_text()
    assert " + ".join(best["mixture"]) in recipe
    if summary["verified"]["by_search"] != best["mixture"]:
        assert any(one["code"] == "overruled" for one in summary["warnings"])
    assert summary["verified"]["baselines"]["chosen"]["test"]["score"] == pytest.approx(summary["final"]["test"])
    assert m2m("select", "--config", path, "--verify_top_k", 7) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert json.loads((project / "out" / "summary.json").read_text()) == summary


def test_test_rows_are_sealed_until_all_is_chosen_and_every_model_sees_them_once(project, monkeypatch):
    one = language_searcher(project, "--verify_top_k", "2")
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
    again = language_searcher(project, "--verify_top_k", "2")
    monkeypatch.setattr(ChoiceScorer, "score", lambda *args: pytest.fail("scored again"))
    again.select()


def test_a_study_leaves_the_test_set_sealed_until_there_is_a_final_model(studied, capsys):
    project, path = studied, studied / "run.yaml"
    assert not list((project / "out").rglob("test.json"))
    found = json.loads((project / "out" / "fidelity.json").read_text())
    assert all(one["test"] is None for one in found["baselines"].values())
    assert m2m("select", "--config", path) == 0
    assert m2m("fidelity", "--config", path) == 0
    found = json.loads((project / "out" / "fidelity.json").read_text())
    assert all(one["test"]["score"] is not None for one in found["baselines"].values())
    assert "test set not scored" not in capsys.readouterr().out


def test_a_verified_choice_stays(project, capsys):
    """Whatever command comes next: the choice is made by the same rule."""
    write_rows(project / "validation.jsonl", choice_rows(40))
    target = yaml.safe_load((project / "run.yaml").read_text())["targets"]["colours"] | {"metric": "logprob"}
    path = configure(project, targets={"colours": target}, verify_top_k=7)
    assert m2m("select", "--config", path) == 0
    out = project / "out"
    before = json.loads((out / "summary.json").read_text()), (out / "recipe.yaml").read_bytes()
    for command in ("search", "fidelity"):
        assert m2m(command, "--config", path) == 0
        summary = json.loads((out / "summary.json").read_text())
        assert summary["best"] == before[0]["best"]
        assert summary["final"] == before[0]["final"]
        assert (out / "recipe.yaml").read_bytes() == before[1]


def test_an_old_study_is_not_shown_as_this_runs(studied, capsys):
    project, path = studied, studied / "run.yaml"
    assert m2m("report", project / "out") == 0
    assert "Can the scores be trusted here?" in (project / "out" / "report.html").read_text()
    assert m2m("search", "--config", path, "--merge_method", "ties") == 0
    summary = json.loads((project / "out" / "summary.json").read_text())
    assert not any(one["code"] == "fidelity" for one in summary["warnings"])
    assert "Can the scores be trusted here?" not in (project / "out" / "report.html").read_text()
    candidates = yaml.safe_load(path.read_text())["candidates"]
    del candidates["gamma"]
    configure(project, candidates=candidates)
    one = language_searcher(project)
    mixtures, _, complete = fine_tuned_truth(one.run, one.search())  # is made again, for two candidates
    assert len(mixtures) == 3
    assert complete


def test_verification_obeys_min_delta(studied, capsys):
    project = studied
    target = yaml.safe_load((project / "run.yaml").read_text())["targets"]["colours"]
    target |= {"metric": "logprob", "min_delta": 0.0}
    path = configure(project, targets={"others": target})
    one = language_searcher(project, "--verify_top_k", "7")
    found = one.search()
    true = one.run.study.trained_standings([*one.run.space.subsets()], found.base)
    base = found.base.score.value
    allowed = [standing for standing in true if standing.score.value >= base]
    assert [standing for standing in true if not standing.short] == allowed
    if allowed:
        best = max(allowed, key=lambda standing: standing.score.value)
        assert one.search().best.mixture == best.mixture
    else:
        with pytest.raises(InputError, match="min_delta"):
            one.search()
        assert m2m("select", "--config", path, "--verify_top_k", 7) == 2


def test_a_training_that_diverges_is_left_out_and_named(project, monkeypatch, capsys):
    path = project / "run.yaml"
    real = trained.train_expert

    def diverges(base, rows, *rest):
        if (
            len(rows) == 24
            and any("beta" in row["prompt"] for row in rows)
            and any("alpha" in row["prompt"] for row in rows)
        ):
            raise TrainingFailedError("training for x diverged: loss nan, weights not finite")
        return real(base, rows, *rest)

    monkeypatch.setattr(trained, "train_expert", diverges)
    assert m2m("fidelity", "--config", path) == 0
    assert "left out: alpha + beta could not be fine-tuned" in capsys.readouterr().out
    found = json.loads((project / "out" / "fidelity.json").read_text())
    assert len(found["mixtures"]) == 6
    assert found["failed"][0]["mixture"] == {"alpha": 0.5, "beta": 0.5}
    monkeypatch.setattr(trained, "train_expert", lambda *args: pytest.fail("trained again"))
    assert m2m("fidelity", "--config", path) == 0


def test_what_diverges_is_called_by_its_mixture(studied):
    one = language_searcher(studied)
    one.run.fine_tuned.args.learning_rate = 1e30
    with pytest.raises(TrainingFailedError, match=r"training on alpha \+ beta: it diverged"):
        one.run.fine_tuned.train({"alpha": 11, "beta": 11})


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
    target = {"scorer": "command", "command": command, "test_command": command}
    path = configure(project, targets={"size": target})
    assert m2m("select", "--config", path, "--verify_top_k", 1) == 0
    summary = json.loads((project / "out" / "summary.json").read_text())
    assert summary["verified"]["baselines"]["base"]["test"]["score"] == 0
    one = language_searcher(project)
    found = one.fidelity()
    assert found["verdict"]["merged"]["verdict"] == "unknown"
    assert found["agreement"]["merged"]["score"]["pearson"]["row_ci"] is None
    with pytest.raises(InputError, match="no adapter to hand"):
        surrogate_standings(one.run, [Mixture.subset(["alpha"])], method=MergeMethod("ties"))


def test_constraints_hold_in_the_report_and_the_study(studied):
    project = studied
    configure(project, min_datasets=2)
    one = language_searcher(project)
    one.select()
    one.fidelity()
    run = FinishedRun.from_pretrained(project / "out")
    assert {len(standing.mixture) for standing in run.ranked} == {2, 3}
    found = json.loads((project / "out" / "fidelity.json").read_text())
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
    assert set(json.loads((studied / "out" / name).read_text())) == expected
    for word in expected:
        assert word in printed
    assert run(*wrong) == 2
    assert message in capsys.readouterr().err


def test_mixed_training_must_be_allowed_and_is_then_done(project, capsys):
    path = project / "run.yaml"
    candidates = yaml.safe_load(path.read_text())["candidates"]
    candidates["beta"]["training"] = {"learning_rate": 5e-3, "lora_r": 2}
    configure(project, candidates=candidates)
    assert m2m("search", "--config", path) == 2
    assert "candidates.beta.training" in capsys.readouterr().err
    configure(project, allow_mixed_training=True)
    assert m2m("search", "--config", path) == 0
    records = {
        name: json.loads((project / "out/adapters" / name / "training.json").read_text()) for name in ("alpha", "beta")
    }
    assert records["alpha"]["uniform"]["learning_rate"] == 1e-2
    assert records["beta"]["uniform"]["learning_rate"] == 5e-3
    assert json.loads((project / "out/adapters/beta/adapter_config.json").read_text())["r"] == 2
    assert m2m("search", "--config", path) == 0  # and goes on from there
    candidates["beta"]["training"] = {"learning_rates": 5e-3}
    configure(project, candidates=candidates)
    capsys.readouterr()
    assert m2m("search", "--config", path) == 2
    assert "learning_rate" in capsys.readouterr().err


def test_comparisons_leave_out_what_the_surrogate_could_not_score(studied):
    one = language_searcher(studied)
    mixtures, true, complete = fine_tuned_truth(one.run, one.search())
    ours = surrogate_standings(one.run, mixtures)
    assert complete
    whole = compare(ours, true, complete)
    assert whole["score"].mixtures == 7
    assert whole["score, two or more"].mixtures == 4
    failed = replace(
        ours[0], trials={name: replace(trial, score=None, state="failed") for name, trial in ours[0].trials.items()}
    )
    assert compare([failed, *ours[1:]], true, complete)["score"].mixtures == 6
