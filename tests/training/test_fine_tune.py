"""One training: it goes on from its last whole checkpoint to the same bytes, and what is of no use is told."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import get_peft_model_state_dict
from pico import language_searcher, m2m, trained_by_trl, trials
from safetensors.torch import load_file
from transformers import TrainerCallback

from m2m_hf import InputError
from m2m_hf.errors import StoppedError
from m2m_hf.searcher import MergeToMixSearcher
from m2m_hf.storage.files import staging_path
from m2m_hf.storage.records import COMPLETE, find_incomplete, find_modified
from m2m_hf.training.fine_tune import finished, last_checkpoint, publish, train_expert, verdict

TIMES = {"seconds", "peak_memory_bytes"}
END = 7  # steps of a training here


class Killed(BaseException):
    """Nothing that any code expects."""


class RaiseAt(TrainerCallback):
    def __init__(self, step: int, error: BaseException | type[BaseException] = Killed) -> None:
        self.step, self.error = step, error

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            raise self.error

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if self.step == END:
            raise self.error


def train(one: MergeToMixSearcher, folder: Path, *callbacks: TrainerCallback):
    rows, settings = one.run.candidates["alpha"].rows, one.run.training_settings()
    return train_expert(one.run.base.model, rows, settings, folder, callbacks, "x")


@pytest.fixture
def checkpointed(project):
    """A searcher whose trainings take 7 steps, with dropout, and write a checkpoint every 2."""
    flags = ("--max_steps", "7", "--save_steps", "2", "--lora_dropout", "0.1", "--lr_scheduler_type", "cosine")
    return language_searcher(project, *flags)


def timeless(record: dict) -> dict:
    return {key: value for key, value in record.items() if key not in TIMES}


@pytest.mark.parametrize(
    ("step", "save", "log"), [*((step, 2, 1) for step in (1, 3, 5, 6, END)), (3, 2, 3), (END, 2, 3), (5, 7, 1)]
)
def test_a_killed_training_goes_on_to_the_same_bytes(checkpointed, tmp_path, step, save, log):
    checkpointed.run.args.save_steps = save
    checkpointed.run.args.logging_steps = log
    whole = train(checkpointed, tmp_path / "whole")
    with pytest.raises(Killed):
        train(checkpointed, tmp_path / "killed", RaiseAt(step))
    seen = []

    class Steps(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            seen.append(state.global_step)

    record = train(checkpointed, tmp_path / "killed", Steps())
    assert seen == list(range((step if step < END else END - 1) // save * save + 1, END + 1))
    assert timeless(record) == timeless(whole)
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "killed").iterdir())
    assert "adapter_model.safetensors" in files
    assert not any(name.startswith("checkpoint") for name in files)
    for name in files:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("flags", "shown"),
    [((), True), ((), False), (("--loss_type", "dft"), True), (("--expert", "full", "--learning_rate", "1e-3"), False)],
)
def test_a_training_takes_the_steps_that_trl_takes(project, tmp_path, flags, shown):
    """The same figures at every logged step, and the same weights to the last bit, though killed and begun again."""
    batches = ("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--max_grad_norm", "0.1")
    steps = ("--max_steps", str(END), "--save_steps", "2", "--logging_steps", "3", "--lr_scheduler_type", "cosine")
    report = ("--report_to", "tensorboard") if shown else ()
    flags = ("--lora_dropout", "0.1", "--weight_decay", "0.1", *batches, *steps, *report, *flags)
    ours = language_searcher(project, *flags).run
    logged: list[dict] = []

    class Logs(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs) -> None:
            logged.append(dict(logs))

    def train_ours(folder: str, *callbacks: TrainerCallback) -> dict:
        rows = ours.candidates["alpha"].rows
        return train_expert(ours.base.to_train(), rows, ours.training_settings(), tmp_path / folder, callbacks, "x")

    record = train_ours("whole", Logs())
    with pytest.raises(Killed):
        train_ours("killed", RaiseAt(5))
    assert timeless(train_ours("killed")) == timeless(record)

    theirs = trained_by_trl(language_searcher(project, *flags).run, "alpha", tmp_path / "trl")
    figures = ["grad_norm", "learning_rate", "num_input_tokens_seen", "total_flos", "epoch"]
    figures += ["entropy", "mean_token_accuracy", "num_tokens"] if shown else []
    expected = theirs.state.log_history
    assert [line["step"] for line in expected] == [1, 3, 6, 7]
    assert [{key: line[key] for key in figures if key in line} for line in logged] == [
        {key: line[key] for key in figures if key in line} for line in expected
    ]
    assert [line.get("loss") for line in logged] == pytest.approx([line.get("loss") for line in expected], abs=1e-6)
    assert record["tokens"] == theirs.state.num_input_tokens_seen
    if ours.expert().lora is None:
        return
    for folder in ("whole", "killed"):
        weights = load_file(tmp_path / folder / "adapter_model.safetensors")
        learned = get_peft_model_state_dict(theirs.model)
        assert weights.keys() == learned.keys()
        assert all(torch.equal(weights[name], learned[name].cpu()) for name in weights)


@pytest.mark.parametrize(
    "damage", ["optimizer.pt", "adapter_model.safetensors", "rng_state.pth", COMPLETE, "trainer_state.json"]
)
def test_a_torn_checkpoint_is_passed_over_for_the_one_before(checkpointed, tmp_path, damage):
    with pytest.raises(Killed):
        train(checkpointed, tmp_path / "killed", RaiseAt(5))
    last = tmp_path / "killed.checkpoints" / "checkpoint-4"
    of = json.loads((last / COMPLETE).read_text())["of"]
    assert last_checkpoint(last.parent, of) == last
    assert last_checkpoint(last.parent, "other") is None
    content = (last / damage).read_bytes()
    for spoilt in (content[: len(content) // 2], bytes([content[0] ^ 1]) + content[1:]):
        (last / damage).write_bytes(spoilt)
        assert last_checkpoint(last.parent, of) == last.with_name("checkpoint-2")


def test_what_is_published_is_whole(tmp_path):
    folder = tmp_path / "model"
    staging_path(folder).mkdir()
    (staging_path(folder) / "weights").write_bytes(b"12345")
    publish(folder, {"fingerprint": "f"})
    assert find_incomplete(folder) is None
    assert find_modified(folder) is None
    assert finished(folder, "f")
    folder.rename(staging_path(folder))  # as a crash leaves what was finished just before
    assert not finished(folder, "another")
    assert finished(folder, "f")
    assert not staging_path(folder).exists()
    (folder / "weights").write_bytes(b"12346")
    assert find_incomplete(folder) is None
    assert find_modified(folder) == "weights"
    (folder / "weights").write_bytes(b"123")
    assert find_incomplete(folder) == "weights has 3 of 5 bytes"
    (folder / "training.json").write_text('{"fingerprint": "f"')
    assert find_incomplete(folder) == "training.json is missing or incomplete"
    assert not finished(folder, "f")


def test_a_training_that_does_not_fit_into_memory_says_what_to_change(checkpointed, tmp_path):
    full = RaiseAt(0, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."))
    with pytest.raises(InputError, match="does not fit into memory: lower per_device_train_batch_size \\(now 4"):
        train(checkpointed, tmp_path / "full", full)
    train(checkpointed, tmp_path / "full")  # the base was given back


def test_a_training_that_something_ends_early_is_not_taken_for_finished(checkpointed, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            control.should_training_stop = state.global_step == 3

    with pytest.raises(StoppedError, match="ended after 3 of 7 steps"):
        train(checkpointed, tmp_path / "stopped", Stop())
    assert not (tmp_path / "stopped").exists()
    record = train(checkpointed, tmp_path / "stopped")
    assert timeless(record) == timeless(train(checkpointed, tmp_path / "whole"))


def test_verdicts():
    lr = 1e-3
    assert verdict(True, True, 1.0, 3.0, 1.0, lr, 100) is None
    assert verdict(True, True, 1.0, 1.0, 5.0, lr, 100) is None  # worse, but not worse than guessing
    assert verdict(True, True, 1.0, 9.0, 9.5, lr, 100) is None  # as bad as it began
    assert "exploded" in verdict(True, True, 1.0, 1.0, 6.0, lr, 100)
    assert "exploded" in verdict(True, True, 1.0, 1.0, float("nan"), lr, 100)
    assert "learned nothing" in verdict(True, False, 1.0, 3.0, 3.0, lr, 100)
    assert "diverged" in verdict(True, True, float("nan"), 1.0, 1.0, lr, 100)
    assert "diverged" in verdict(False, True, 1.0, 1.0, 1.0, lr, 100)


def test_the_noise_of_small_batches_is_no_explosion(checkpointed, tmp_path):
    checkpointed.run.args.learning_rate = 1e-6
    with torch.no_grad():
        checkpointed.run.base.model.lm_head.weight.mul_(40)  # sure of itself and wrong, so that rows differ much
    record = train(checkpointed, tmp_path / "noisy")
    assert "failed" not in record
    assert record["loss_curve"][-1][1] > record["loss_curve"][0][1] + 1


@pytest.mark.parametrize(
    ("kind", "rate", "reason"),
    [
        ("full", "1", "it exploded: the loss went from 5.747 to"),  # 15, 33, 65 on the way
        ("full", "1e30", "it diverged: loss nan"),
        ("lora", "1e10", "it diverged: loss nan"),
    ],
)
def test_a_learning_rate_that_is_far_too_large_is_found_out(project, tmp_path, kind, rate, reason):
    flags = ("--max_steps", "7", "--expert", kind, "--learning_rate", rate, "--lr_scheduler_type", "constant")
    assert reason in train(language_searcher(project, *flags), tmp_path / "exploded")["failed"]


@pytest.fixture
def one_fails(project):
    """A configuration in which gamma's training diverges."""
    path = project / "run.yaml"
    diverging = "gamma.jsonl, training: {learning_rate: 1.0e+30, max_grad_norm: 0.0}}"
    path.write_text(path.read_text().replace("gamma.jsonl}", diverging) + "allow_mixed_training: true\n")
    return path


def test_a_candidate_whose_training_fails_is_in_no_mixture_and_the_run_goes_on(one_fails, project, capsys):
    assert m2m("select", "--config", one_fails) == 0
    printed = capsys.readouterr().out
    assert "gamma: failed: it diverged" in printed
    assert "gamma is in no mixture: the training of its adapter failed: it diverged" in printed
    assert "all 2, merged" in printed
    assert "1 trials failed" in printed
    summary = json.loads((project / "out" / "summary.json").read_text())
    assert summary["counts"] | {"candidates": 3, "failed": 1} == summary["counts"]
    assert set(summary["best"]["mixture"]) <= {"alpha", "beta"}
    assert summary["space"]["names"] == ["alpha", "beta"]
    assert set(summary["all"]["mixture"]) == {"alpha", "beta"}
    (failed,) = [line for line in trials(project / "out") if line["state"] == "failed"]
    assert failed["names"] == ["gamma"]
    assert "diverged" in failed["reason"]
    assert m2m("select", "--config", one_fails) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert m2m("report", project / "out") == 0


def test_a_required_candidate_must_not_fail(one_fails, capsys):
    one_fails.write_text(one_fails.read_text().replace("training: {", "required: true, training: {"))
    assert m2m("select", "--config", one_fails) == 2
    assert "candidates.gamma: it is required, but has no adapter: it diverged" in capsys.readouterr().err


def test_an_adapter_that_a_crash_cut_short_is_trained_again_and_one_that_was_changed_is_refused(finished, capsys):
    run, journal = finished / "run.yaml", finished / "out" / "trials.jsonl"
    scored = journal.read_bytes()
    weights = finished / "out" / "adapters" / "beta" / "adapter_model.safetensors"
    content = weights.read_bytes()
    for path in (weights, weights.with_name("training.json"), weights.with_name("adapter_config.json")):
        path.write_bytes(path.read_bytes()[:-2])
        capsys.readouterr()
        assert m2m("search", "--config", run) == 0
        assert "its adapter is trained again" in capsys.readouterr().out
        assert weights.read_bytes() == content
        assert journal.read_bytes() == scored
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match=r"adapter_model\.safetensors is not what was trained"):
        language_searcher(finished).run.bank.load()
    shutil.rmtree(weights.parent)
    assert m2m("search", "--config", run) == 0
    assert weights.read_bytes() == content
