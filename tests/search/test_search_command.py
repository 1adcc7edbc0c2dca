"""Strategies, objectives, weights and constraints through the command line, on a pico model."""

import json
import shutil

import pytest
from pico import candidate_rows, changed, choice_rows, language_searcher, m2m, several_targets, trials, write_rows

from m2m_hf import MergeToMixSearcher, SearchCallback
from m2m_hf.config.run_config import MERGE_PARAMETERS
from m2m_hf.search.model_based import STRATEGIES
from m2m_hf.storage.journal import Journal


def summary(project) -> dict:
    return json.loads((project / "out" / "summary.json").read_text())


@pytest.mark.parametrize("strategy", ["auto", *STRATEGIES])
def test_every_strategy_in_one_folder(finished, capsys, strategy):
    told = summary(finished)
    shapley = [one["value"] for one in told["worth"]["shapley"].values()]
    assert sum(shapley) == pytest.approx(told["all"]["score"] - told["base"]["score"])
    assert len(told["worth"]["interactions"]) == 3
    before = trials(finished / "out")
    assert m2m("search", "--config", finished / "run.yaml", "--strategy", strategy, "--max_trials", "20") == 0
    after = trials(finished / "out")
    assert after[: len(before)] == before
    assert {line["objective"] for line in after[len(before) :]} <= {"gradient"}  # all mixtures are known already
    assert summary(finished)["best"]["score"] <= told["best"]["score"]
    printed = capsys.readouterr().out
    assert ("strategy: exhaustive, since" in printed) == (strategy == "auto")


def test_a_race_prunes_and_says_so(project, capsys):
    write_rows(project / "validation.jsonl", choice_rows(150))
    changed(project, "run", race=True, learning_rate=0.05, max_steps=6)
    assert m2m("select", "--config", project / "run.yaml") == 0
    printed = capsys.readouterr().out
    assert "pruned" in {line["state"] for line in trials(project / "out")}
    whole = {tuple(line["names"]) for line in trials(project / "out") if line["state"] == "complete"}
    assert ("not scored on all examples, since they could not win" in printed) == (len(whole) < 8)
    assert summary(project)["costs"]["example_evaluations"] <= 8 * 150
    assert m2m("select", "--config", project / "run.yaml") == 0
    assert "nothing to do" in capsys.readouterr().out


def test_a_race_over_targets_of_every_kind_goes_on_after_a_stop_as_if_there_had_been_none(project, reward_model):
    several_targets(project, reward_model, 110)
    changed(project, "run", race=True, learning_rate=0.05, max_steps=6)
    whole, parts = project / "out", project / "parts"
    assert m2m("search", "--config", project / "run.yaml") == 0
    shutil.copytree(whole / "adapters", parts / "adapters")

    class Stop(SearchCallback):
        def on_trial(self, trial, recalled, control):
            control.should_stop |= trial.target == "words"

    language_searcher(project, "--output_dir", str(parts)).search(callbacks=[Stop()])
    assert 0 < len(trials(parts)) < len(trials(whole))
    assert m2m("search", "--config", project / "run.yaml", "--output_dir", parts) == 0
    one, two = ([line | {"seconds": 0} for line in trials(out)] for out in (whole, parts))
    assert "pruned" in {line["state"] for line in one}
    assert one == two


def test_a_corpus_metric_switches_racing_off_and_says_so(project, tmp_path, capsys):
    module = tmp_path / "longest" / "longest.py"
    module.parent.mkdir()
    module.write_text(
        "import datasets\nimport evaluate\n"
        "class Longest(evaluate.Metric):\n"
        "    def _info(self):\n"
        "        value = datasets.Value('string')\n"
        "        return evaluate.MetricInfo(description='', citation='', inputs_description='',\n"
        "            features=datasets.Features({'predictions': value, 'references': value}))\n"
        "    def _compute(self, predictions, references):\n"
        "        return {'longest': float(max(map(len, predictions)))}\n"
    )
    rows = [{"prompt": row["prompt"], "completion": row["choices"][0]} for row in choice_rows(100)]
    write_rows(project / "generation.jsonl", rows)
    target = {
        "data": {"path": "json", "data_files": "generation.jsonl"},
        "scorer": "generation",
        "metric": str(module.parent),
        "generation": {"max_new_tokens": 2},
    }
    changed(project, "run", targets={"t": target}, race=True, allow_metric_code=True)
    assert m2m("search", "--config", project / "run.yaml") == 0
    assert "no racing: a target has no value for every row" in capsys.readouterr().out
    assert {line["state"] for line in trials(project / "out")} == {"complete"}


def test_the_ensemble_objective(project, capsys):
    assert m2m("select", "--config", project / "run.yaml", "--objective", "ensemble") == 0
    assert {line["objective"] for line in trials(project / "out")} == {"ensemble"}
    assert summary(project)["costs"]["example_evaluations"] == 4 * 10  # three adapters and the base
    assert len(list((project / "out" / "ensemble").iterdir())) == 4
    singles = {line["names"][0]: line for line in trials(project / "out") if len(line["names"]) == 1}
    assert m2m("search", "--config", project / "run.yaml") == 0  # merged, in the same folder
    for line in trials(project / "out"):
        if line["objective"] == "merged" and len(line["names"]) == 1:
            assert line["logprobs"] == pytest.approx(singles[line["names"][0]]["logprobs"], abs=1e-4)


@pytest.mark.parametrize("objective", ["merged", "ensemble"])
def test_continuous_weights_become_shares_of_the_data(project, objective):
    changed(project, "run", weights="continuous", strategy="auto", objective=objective, learning_rate=0.05)
    assert m2m("select", "--config", project / "run.yaml") == 0
    best = summary(project)["best"]["mixture"]
    manifest = json.loads((project / "out" / "mixture" / "manifest.json").read_text())
    rows = {name: source["rows"] for name, source in manifest["sources"].items()}
    assert manifest["rows"] == sum(rows.values())
    assert max(rows.values()) <= 12
    total = sum(rows.values())
    for name, weight in best.items():
        assert rows[name] / total == pytest.approx(weight, abs=0.08)
    written = (project / "out" / "mixture" / "train.jsonl").read_text()
    assert len(written.splitlines()) == total
    assert len(set(written.splitlines())) == total  # no row twice
    assert m2m("search", "--config", project / "run.yaml") == 0
    assert (project / "out" / "mixture" / "train.jsonl").read_text() == written


def test_a_pool_grows_and_shrinks(project, capsys, monkeypatch):
    candidates = changed(project, "run", strategy="greedy", race=False)["candidates"]
    assert m2m("search", "--config", project / "run.yaml") == 0
    write_rows(project / "delta.jsonl", candidate_rows("delta"))
    changed(project, "run", candidates=candidates | {"delta": {"path": "json", "data_files": "delta.jsonl"}})
    known = {tuple(line["names"]) for line in trials(project / "out")}
    assert m2m("search", "--config", project / "run.yaml") == 0
    assert "trained 1 adapter:" in capsys.readouterr().out
    assert all("delta" in line["names"] for line in trials(project / "out") if tuple(line["names"]) not in known)
    del candidates["beta"]
    changed(project, "run", candidates=candidates)
    monkeypatch.setattr("m2m_hf.training.jobs.train_expert", lambda *args: pytest.fail("an adapter was trained"))
    assert m2m("search", "--config", project / "run.yaml") == 0
    assert "beta" not in summary(project)["singles"]


LICENSED = {"alpha": {"license": "mit"}, "beta": {"license": "mit", "required": True}, "gamma": {"license": "gpl"}}


def licensed(**more) -> dict:
    """Candidates with licenses, one of them required, and the constraint."""
    files = {name: {"path": "json", "data_files": f"{name}.jsonl", **facts} for name, facts in LICENSED.items()}
    return {"candidates": files, "licenses": ["mit"], "max_datasets": 2, **more}


def test_constraints_hold_and_what_may_not_be_chosen_is_shown(project):
    changed(project, "run", **licensed())
    assert m2m("search", "--config", project / "run.yaml") == 0
    assert all("beta" in one["mixture"] and "gamma" not in one["mixture"] for one in summary(project)["top"])
    assert "gamma" in summary(project)["singles"]
    assert summary(project)["worth"] is None or set(summary(project)["worth"]["shapley"]) == {"alpha", "beta", "gamma"}


def test_callbacks_of_a_search_that_is_done_are_told_of_its_trials(finished):
    class Seen(SearchCallback):
        def __init__(self):
            self.mixtures, self.recalled, self.ended = set(), set(), 0

        def on_trial(self, trial, recalled, control):
            self.mixtures.add(trial.mixture)
            self.recalled.add(recalled)

        def on_search_end(self, result, control):
            self.ended += 1

    searcher = MergeToMixSearcher.from_yaml(finished / "run.yaml")
    before, seen = trials(finished / "out"), Seen()
    best = searcher.search().best
    assert searcher.search(callbacks=[seen]).best.mixture == best.mixture
    assert (len(seen.mixtures), seen.recalled, seen.ended) == (len(before), {True}, 1)
    assert trials(finished / "out") == before


@pytest.mark.parametrize("method", [*MERGE_PARAMETERS][1:])
def test_other_merge_methods_search_too(method, project):
    one = language_searcher(project, "--merge_method", method)
    result = one.search()
    assert len(result.ranking) == 7
    assert {trial.objective for trial in result.trials} == {one.run.merge_method.label}
    average = language_searcher(project).search()  # in the same folder: a journal holds both apart
    assert {trial.objective for trial in average.trials} == {"merged"}
    keys = {trial.key for trial in (*result.trials, *average.trials)}
    assert len(keys) == len(Journal(one.run.folder.trials).trials) == 16


GENERATION = {"g": {"data": {"path": "json", "data_files": "generation.jsonl"}, "scorer": "generation"}}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"merge_parameters": {"density": 0.5}}, "takes none"),
        ({"merge_method": "ties", "merge_parameters": {"density": 1.5}}, "at most 1"),
        ({"merge_method": "ties", "merge_parameters": {"scaling": 0}}, "a number above 0"),
        ({"merge_method": "ties", "merge_parameters": {"densiti": 0.5}}, "scaling, density"),
        ({"merge_method": "tise"}, "expected one of average, "),
        ({"merge_method": "ties", "weights": "continuous", "strategy": "random"}, "needs merge_method: average"),
        ({"merge_method": "ties", "strategy": "gradient"}, "merge_method: average"),
        ({"targets": GENERATION, "strategy": "gradient"}, "objective: merged, merge_method: average and targets"),
        ({"targets": GENERATION, "objective": "ensemble"}, "ensemble averages the probabilities of right answers"),
        ({"strategy": "bayes"}, "pip install 'm2m_hf[bayes]'"),
        ({"fine_tunes": -1}, "at least 0"),
        ({"fidelity_mixtures": 2}, "at least 4"),
        (licensed(min_datasets=3), "no mixture is possible: min_datasets or required asks for at least 3"),
        (licensed(max_cost=1.0), "the cheapest mixture costs"),
        (
            licensed(licenses=["apache-2.0"]),
            "candidates.beta: it is required, but its license 'mit' is not among licenses",
        ),
        ({"max_trials": 3, "min_datasets": 2}, "max_trials: expected at least 5"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_trained(given, message, project, capsys, monkeypatch):
    monkeypatch.setattr("m2m_hf.run.checks.find_spec", lambda name: None)  # as without Optuna
    write_rows(project / "generation.jsonl", [{"prompt": "question:", "completion": " red"}])
    changed(project, "run", **given)
    assert m2m("search", "--config", project / "run.yaml") == 2
    assert message in capsys.readouterr().err
    assert not (project / "out").exists()
