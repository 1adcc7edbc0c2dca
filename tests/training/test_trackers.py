"""What `report_to` names is told of every training, the search and the scores, as one group."""

import json
import sqlite3

import pytest
import wandb
from pico import candidate_rows, m2m, trials, write_rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from m2m_hf.config.parsing import parse
from m2m_hf.errors import InputError
from m2m_hf.searcher import MergeToMixSearcher
from m2m_hf.training.trackers import Tracker, tracker_group

RUNS = ["adapters/alpha", "adapters/beta", "adapters/gamma", "final", "scores", "search"]


def curve(folder, tag: str) -> list[tuple[int, float]]:
    """(step, value) of all that TensorBoard knows of."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(one.step, one.value) for one in events.Scalars(tag)] if tag in events.Tags()["scalars"] else []


@pytest.fixture
def kept_here(tmp_path, monkeypatch):
    """Trackers keep what they are told below the test's folder, and nothing leaves the machine."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    wandb.teardown()  # it keeps the folder that its process was given first, which is another test's
    return tmp_path


def test_all_is_one_group(project, kept_here, capsys):
    out = project / "out"
    with (project / "run.yaml").open("a") as file:
        file.write("report_to: [trackio, tensorboard, wandb]\nproject: quizzes\nrun_name: science\n")
    assert m2m("select", "--config", project / "run.yaml") == 0
    printed = capsys.readouterr()
    assert "trackio" not in printed.out.lower()
    assert "wandb" not in printed.out + printed.err
    # TensorBoard: the losses of every adapter as its record has them, and the search's curve as the journal has it.
    for name in ("alpha", "beta", "gamma"):
        losses = json.loads((out / "adapters" / name / "training.json").read_text())["loss_curve"]
        told = curve(out / "tensorboard" / "adapters" / name, "train/loss")
        assert [step for step, _ in told] == [step for step, _ in losses]
        assert [loss for _, loss in told] == pytest.approx([loss for _, loss in losses], abs=1e-5)
    assert len(curve(out / "tensorboard" / "final", "train/loss")) == 3
    scores = [one["score"] for one in trials(out)]
    told = [value for _, value in curve(out / "tensorboard" / "search", "eval/score")]
    assert sorted(told) == pytest.approx(sorted(scores[1:]))  # all but the base model's
    best = [value for _, value in curve(out / "tensorboard" / "search", "eval/best_score")]
    assert best == sorted(best)
    assert best[-1] == pytest.approx(json.loads((out / "summary.json").read_text())["best"]["score"])
    final = json.loads((out / "final" / "training.json").read_text())["scores"]["colours"]["final"]
    for tag, part in (("eval/colours", "validation"), ("test/colours", "test")):
        assert curve(out / "tensorboard" / "scores", tag)[1] == (1, pytest.approx(final[part]["score"]))
    # trackio
    with sqlite3.connect(kept_here / "trackio" / "quizzes.db") as database:
        found = {name: json.loads(told) for name, told in database.execute("select run_name, config from configs")}
    assert sorted(found) == [f"science/{run}" for run in RUNS]
    assert {one["_Group"] for one in found.values()} == {"science"}
    # Weights & Biases
    files = sorted(kept_here.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == len(RUNS)
    for run in RUNS:
        assert any(f"science/{run}".encode() in file.read_bytes() for file in files), run
    # Nothing new, nothing told; and what trackers keep is not in the way of anything.
    assert m2m("status", out) == 0
    assert m2m("select", "--config", project / "run.yaml") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert [value for _, value in curve(out / "tensorboard" / "search", "eval/score")] == told
    assert sorted(kept_here.glob("wandb/offline-run-*/*.wandb")) == files


@pytest.mark.parametrize(("given", "words"), [("tensorbord", "tensorbord"), ("comet_ml", "comet")])
def test_a_tracker_that_is_none_or_not_installed_is_refused_before_anything_is_done(project, given, words):
    with pytest.raises(InputError, match=f"report_to: .*{words}"):
        MergeToMixSearcher.from_yaml(project / "run.yaml", report_to=given)
    assert not (project / "out").exists()


def test_runs_of_one_name_in_two_folders_are_two_groups(project):
    folders = [str(project / one / "out") for one in "ab"]
    one, other = (tracker_group(parse(project / "run.yaml", values={"output_dir": out})[1]) for out in folders)
    assert one != other
    assert one.startswith("out-")


def test_a_tracker_that_fails_is_told_no_more_and_the_run_goes_on(project, monkeypatch, capsys):
    def broken(self, *args, **kwargs):
        raise ConnectionError("the network is gone")

    monkeypatch.setattr("transformers.integrations.TensorBoardCallback.on_log", broken)
    flags = ("select", "--config", project / "run.yaml", "--report_to", "tensorboard")
    assert m2m(*flags) == 0
    printed = capsys.readouterr().out
    assert "TensorBoard failed, and is told nothing more of out-" in printed
    assert "the network is gone" in printed
    assert (project / "out" / "final" / "training.json").exists()


def test_a_search_that_goes_on_tells_its_curve_in_a_run_of_its_own(project):
    run, out = project / "run.yaml", project / "out"
    flags = ("search", "--config", run, "--report_to", "tensorboard")
    assert m2m(*flags) == 0
    write_rows(project / "delta.jsonl", candidate_rows("delta"))
    run.write_text(run.read_text().replace("  gamma:", "  delta: {path: json, data_files: delta.jsonl}\n  gamma:"))
    assert m2m(*flags) == 0
    for name, mixtures in (("search", 7), ("search-from-8", 15)):
        steps = [step for step, _ in curve(out / "tensorboard" / name, "eval/best_score")]
        assert steps == list(range(1, mixtures + 1)), name


def test_ones_own_run_is_left_open(project, kept_here, capsys):
    own = wandb.init(project="mine", settings={"silent": True})
    try:
        assert m2m("adapters", "--config", project / "run.yaml", "--report_to", "wandb") == 0
        assert wandb.run is own
        assert "Wandb failed" in capsys.readouterr().out
    finally:
        own.finish()


@pytest.mark.parametrize(("given", "told"), [(None, False), ("org/one", "org/one")])
def test_no_space_is_made_of_every_run(project, given, told):
    """Trackio would make a static Space of every run that ends, where the setting is None."""
    values = {"trackio_static_space_id": given} if given else {}
    args = parse(project / "run.yaml", values=values)[1]
    assert Tracker(args, "search")._args.trackio_static_space_id == told
    assert args.trackio_static_space_id == given


def test_a_folder_for_all_boards_keeps_run_folders_apart(project, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "boards"))
    assert m2m("adapters", "--config", project / "run.yaml", "--report_to", "tensorboard", "--run_name", "one") == 0
    assert curve(tmp_path / "boards" / "one" / "adapters" / "alpha", "train/loss")
