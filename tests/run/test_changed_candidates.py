"""Candidates whose rows change between two runs: what is said, what is kept, and that nothing stale is taken for fresh."""

import json
from pathlib import Path

import pytest
import yaml
from pico import candidate_rows, changed, language_searcher, lines, m2m, write_rows

from m2m_hf.core.mixture import Mixture
from m2m_hf.errors import InputError
from m2m_hf.publish.repositories import expert_files
from m2m_hf.reporting.finished_run import FinishedRun
from m2m_hf.reporting.status import status
from m2m_hf.storage.run_folder import RunFolder
from m2m_hf.training import fine_tune

ROWS = candidate_rows("beta")
NEW = [*ROWS[1:], ROWS[1], *candidate_rows("delta", 2)]  # one gone, one twice, two new
COUNTS = "rows: 3 new, 1 gone, 11 the same"


@pytest.fixture
def drifted(finished) -> Path:
    """A finished run, whose candidate beta has since changed."""
    write_rows(finished / "beta.jsonl", NEW)
    return finished


def select(project: Path, how: str, *flags: str) -> int:
    return m2m("select", "--config", project / "run.yaml", "--changed_candidates", how, *flags)


def record(project: Path, name: str = "beta") -> dict:
    return json.loads((project / "out" / "adapters" / name / "training.json").read_text())


def warning(project: Path) -> str:
    """The warnings of the run that are about stale adapters."""
    summary = json.loads((project / "out" / "summary.json").read_text())
    return "\n".join(one["text"] for one in summary["warnings"] if one["code"] == "stale")


def stamps(project: Path, *names: str) -> dict[Path, int]:
    folders = [project / "out" / "adapters" / name for name in names]
    return {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (NEW, COUNTS),
        ([*ROWS, ROWS[0]], "rows: 1 new, 0 gone, 12 the same"),
        (ROWS[::-1], "the same 12 rows in another order"),
    ],
)
def test_a_changed_candidate_is_refused_with_what_changed(finished, capsys, rows, words):
    write_rows(finished / "beta.jsonl", rows)
    before = stamps(finished, "alpha", "beta", "gamma")
    assert m2m("select", "--config", finished / "run.yaml") == 2
    told = capsys.readouterr().err
    assert f"candidate 'beta' has changed since its adapter was trained ({words}). Restore the rows, give" in told
    assert "set changed_candidates: retrain (its adapter is trained again" in told
    assert stamps(finished, "alpha", "beta", "gamma") == before


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_without_digests_what_can_be_said_is_said_and_an_unchanged_run_makes_them_again(finished, damage):
    path = finished / "out" / "row_digests" / record(finished)["data"]
    whole = path.read_bytes()
    damage(path)
    write_rows(finished / "beta.jsonl", NEW)
    write_rows(finished / "gamma.jsonl", candidate_rows("gamma", 5))
    with pytest.raises(InputError) as refused:
        language_searcher(finished).run.bank.check()
    assert "'beta' has changed since its adapter was trained (12 rows then, 14 now; which of them" in str(refused.value)
    assert "'gamma' has changed since its adapter was trained (rows: 0 new, 7 gone, 5 the same)" in str(refused.value)
    for name in ("beta", "gamma"):
        write_rows(finished / f"{name}.jsonl", candidate_rows(name))
    language_searcher(finished).prepare()
    assert path.read_bytes() == whole


def test_a_foreign_record_cannot_name_a_file_to_read(finished):
    path = finished / "out" / "adapters" / "beta" / "training.json"
    path.write_text(json.dumps(record(finished) | {"data": "/dev/zero"}))
    with pytest.raises(InputError, match=r"which of them are new is not known"):
        language_searcher(finished).run.bank.check()


def test_retrain_makes_one_adapter_again_and_keeps_all_scores_without_it(drifted, capsys):
    before, known, old = stamps(drifted, "alpha", "gamma"), lines(drifted / "out"), record(drifted)
    assert select(drifted, "retrain", "--dry_run") == 0
    told = capsys.readouterr().out
    assert f"beta has changed since its adapter was trained ({COUNTS}): its adapter is trained again" in told
    assert "adapters: 1 to train, 3 steps" in told
    assert record(drifted) == old
    assert select(drifted, "retrain") == 0
    told = capsys.readouterr().out
    assert "trained 1 adapter:" in told
    assert "scored 4 mixtures" in told
    assert stamps(drifted, "alpha", "gamma") == before
    now, run = lines(drifted / "out"), language_searcher(drifted).run
    assert {names for names in known if known[names]["key"] != now[names]["key"]} == {n for n in known if "beta" in n}
    assert record(drifted)["fingerprint"] == run.bank.identity("beta")
    assert run.bank.changed() == {}
    assert not warning(drifted)
    assert select(drifted, "refuse") == 0
    assert "nothing to do" in capsys.readouterr().out


def test_a_retraining_that_was_killed_has_lost_nothing_and_goes_on(drifted, capsys, monkeypatch):
    old = record(drifted)

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("m2m_hf.training.jobs.train_expert", killed)
        assert select(drifted, "retrain") == 130
    known = record(drifted)
    assert known.pop("stale")["new"] == 3
    assert known == old
    told = "\n".join(status(RunFolder(drifted / "out")).lines)
    assert f"beta: to be trained again, since the candidate has changed ({COUNTS})" in told
    assert "left: 1 adapter (beta); up to 4 of 8 mixtures to score" in told
    with monkeypatch.context() as patch:  # what was trained is whole, and not yet in its place
        patch.setattr(fine_tune, "move", killed)
        assert select(drifted, "retrain") == 130
        assert record(drifted)["fingerprint"] == old["fingerprint"]
        patch.undo()
        patch.setattr("m2m_hf.training.jobs.train_expert", killed)
        write_rows(drifted / "beta.jsonl", ROWS)
        assert select(drifted, "refuse") == 0  # the old rows again: their adapter is there
        assert record(drifted) == old
        write_rows(drifted / "beta.jsonl", NEW)
        searcher = language_searcher(drifted, "--changed_candidates", "retrain")
        searcher.train_adapters()
    assert record(drifted)["fingerprint"] == searcher.run.bank.identity("beta")
    assert "stale" not in record(drifted)


def test_a_search_is_not_finished_after_one_of_its_adapters_was_trained_again(drifted):
    language_searcher(drifted, "--changed_candidates", "retrain").train_adapters()
    changed(drifted / "out", "config", strategy="greedy")
    (drifted / "out" / "config.yaml").write_text((drifted / "out" / "config.yaml").read_text() + "...\n")
    assert "mixtures to score" in next(line for line in status(RunFolder(drifted / "out")).lines if "left: " in line)


def test_keep_lets_the_adapter_stand_in_and_says_so_everywhere(drifted, capsys):
    before, old, known = stamps(drifted, "alpha", "gamma"), record(drifted), lines(drifted / "out")
    assert select(drifted, "keep", "--dry_run") == 0
    first = f"beta has changed since its adapter was trained ({COUNTS}): its adapter stands in, stale; whatever"
    assert first in capsys.readouterr().out
    assert select(drifted, "keep") == 0
    told = capsys.readouterr().out
    assert first in told
    assert "beta, stale" in told
    stale = f"stale: beta has changed since its adapter was trained ({COUNTS}): mixtures with it are scored by the rows"
    assert stale in told
    assert stale in warning(drifted)
    assert stale in (drifted / "out" / "report.html").read_text()
    assert lines(drifted / "out") == known
    assert stamps(drifted, "alpha", "gamma") == before
    now = record(drifted)
    mark = now.pop("stale")
    assert now == old
    assert (mark["rows"], mark["before"], mark["new"]) == (14, 12, 3)
    told = "\n".join(status(RunFolder(drifted / "out")).lines)
    assert f"beta: stale, since the candidate has changed ({COUNTS})" in told
    assert "left: nothing" in told
    assert FinishedRun.from_pretrained(drifted / "out").training["beta"].stale.gone == 1
    assert select(drifted, "keep") == 0
    told = capsys.readouterr().out
    assert stale in told
    assert "nothing to do" in told


def test_what_is_fine_tuned_is_of_the_rows_as_they_are_now(drifted, capsys):
    mixture = Mixture.subset(["alpha", "beta"])
    write_rows(drifted / "beta.jsonl", ROWS)
    before = language_searcher(drifted).run
    of_old = before.fine_tuned
    write_rows(drifted / "beta.jsonl", NEW)
    kept = language_searcher(drifted, "--changed_candidates", "keep")
    of_kept = kept.run.fine_tuned
    assert of_kept.counts(mixture) == {"alpha": 12, "beta": 14}
    alone, apart = Mixture.subset(["alpha"]), Mixture.subset(["beta"])
    assert of_kept.folder(of_kept.counts(alone)) == of_old.folder(of_old.counts(alone))
    assert of_kept.folder({"beta": 12}) != of_old.folder({"beta": 12})
    assert kept.run.study_fingerprint != before.study_fingerprint
    kept.train_adapters()
    now = [of_kept.folder(of_kept.counts(one)) for one in (mixture, apart)]
    language_searcher(drifted, "--changed_candidates", "retrain").train_adapters()
    of_new = language_searcher(drifted).run.fine_tuned
    assert [of_new.folder(of_new.counts(one)) for one in (mixture, apart)] == now


def test_the_old_rows_again_are_fresh_again(drifted, capsys):
    summary = (drifted / "out" / "summary.json").read_text()
    old = record(drifted)
    assert select(drifted, "keep") == 0
    write_rows(drifted / "beta.jsonl", ROWS)
    assert select(drifted, "refuse") == 0
    assert record(drifted) == old
    assert not warning(drifted)
    assert json.loads((drifted / "out" / "summary.json").read_text())["study"] == json.loads(summary)["study"]


def test_a_stale_single_is_not_known_by_its_adapter(finished):
    """Singles are fine-tuned last, since their adapters are their fine-tunes; not so that of a stale one, here the worst."""
    singles = json.loads((finished / "out" / "summary.json").read_text())["singles"]
    worst = min(singles, key=lambda name: singles[name]["score"])
    write_rows(finished / f"{worst}.jsonl", NEW)
    searcher = language_searcher(finished, "--changed_candidates", "keep", "--fine_tunes", "5")
    verified = searcher.search() and searcher._select().verified
    assert {Mixture.subset([worst])} == {one.mixture for one in verified.mixtures[:5] if len(one.mixture) == 1}


def test_a_study_says_which_of_its_mixtures_compare_different_rows(project, capsys):
    targets = yaml.safe_load((project / "run.yaml").read_text())["targets"]
    changed(project, "run", targets={"colours": targets["colours"] | {"metric": "logprob"}})
    language_searcher(project).train_adapters()
    write_rows(project / "beta.jsonl", NEW)
    found = language_searcher(project, "--changed_candidates", "keep").fidelity()
    assert found["stale"] == ["beta"]
    singles = {
        next(iter(one["mixture"])): one["merged"]["score"] - one["trained"]["score"]
        for one in found["mixtures"]
        if len(one["mixture"]) == 1
    }
    noise = [apart**2 for name, apart in singles.items() if name != "beta"]
    assert found["training_noise"] == pytest.approx((sum(noise) / len(noise)) ** 0.5)
    assert m2m("fidelity", "--config", project / "out" / "config.yaml") == 0
    assert "stale: beta; of 4 of the 7 mixtures different rows are compared" in capsys.readouterr().out


def test_the_trained_objective_scores_the_rows_as_they_are_now(drifted, capsys):
    assert select(drifted, "keep", "--objective", "trained", "--train_final", "false") == 0
    assert "the same): all mixtures are fine-tuned on the rows as they are now" in capsys.readouterr().out
    run = FinishedRun.from_pretrained(drifted / "out")
    assert len(run.standings) == 8
    assert "left: nothing" in "\n".join(status(RunFolder(drifted / "out")).lines)


@pytest.mark.parametrize(("how", "trained"), [("refuse", None), ("retrain", True), ("keep", False)])
def test_adapters_of_another_run_are_taken_as_far_as_their_rows_are_the_same(drifted, capsys, how, trained):
    source = drifted / "out"
    flags = ("--output_dir", str(drifted / "other"), "--adapters", str(source / "adapters"))
    code = m2m("adapters", "--config", drifted / "run.yaml", "--changed_candidates", how, *flags)
    if trained is None:
        assert code == 2
        assert f"leave out adapters: ({source / 'adapters'}), give the changed" in capsys.readouterr().err
        return
    assert code == 0
    told = json.loads((drifted / "other" / "adapters" / "beta" / "training.json").read_text())
    assert ("stale" in told) is not trained
    assert (told["fingerprint"] == record(drifted)["fingerprint"]) is not trained
    assert f"took {3 - trained} adapters" in capsys.readouterr().out


def test_no_digest_of_a_row_is_published(finished):
    digests = {path.read_bytes() for path in (finished / "out" / "row_digests").iterdir()}
    assert len(digests) == 3
    files = expert_files(finished / "out" / "adapters" / "beta", "")
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors", "training.json"}
