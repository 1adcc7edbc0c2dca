"""Side by side each training comes out as alone: whatever the model, optimizer or batches, killed or not, in any order."""

import copy
import json
import math
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from groups import FILE, SAME, apart, flat, make_jobs, model_of, timeless, train
from pico import DEVICE, build_model, build_tokenizer, m2m
from pico_families import FAMILIES
from safetensors.torch import load_file
from transformers import TrainerCallback

from m2m_hf.console import Terminal
from m2m_hf.storage.files import checkpoints, staging_path
from m2m_hf.storage.records import COMPLETE
from m2m_hf.training import jobs as module
from m2m_hf.training import side_by_side
from m2m_hf.training.fine_tune import TOGETHER, finished
from m2m_hf.training.flat import Flat
from m2m_hf.training.jobs import Job, beyond_rows, train_jobs
from m2m_hf.training.trackers import Tracker

ATTENTION = {"lora_target_modules": ["q_proj", "v_proj"]}


SHAPES = {
    "llama": ("llama", {}, {}),
    "dropout": ("llama", {"lora_dropout": 0.1}, {}),
    "dropout, computed again": (
        "llama",
        {"lora_dropout": 0.1},
        {"activation_checkpointing_kwargs": {"use_reentrant": True}},
    ),
    "dropout everywhere, accumulated": ("gpt2", {"lora_dropout": 0.1}, {"gradient_accumulation_steps": 2}),
    "not computed again": ("qwen3", {"lora_dropout": 0.1}, {"activation_checkpointing": False}),
    "sliding window": ("gemma2", {"lora_dropout": 0.05}, {}),
    "rank-stabilised": ("qwen3", {"use_rslora": True}, {"lr_scheduler_type": "cosine", "warmup_steps": 2}),
    "embeddings": ("llama", {"lora_target_modules": ["embed_tokens", "v_proj"]}, {}),
    "loss dft": ("qwen3", {}, {"loss_type": "dft"}),
    "short epochs": ("llama", {}, {"max_steps": 7, "max_grad_norm": 0.05, "dataloader_drop_last": True}),
    **{
        optim: ("llama", {}, {"optim": optim, "max_steps": 4})
        for optim in ("adafactor", "sgd", "adagrad", "rmsprop", "adamw_8bit", "lion_32bit")
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_group_equals_one_after_another(tmp_path, shape):
    family, lora, fields = SHAPES[shape]
    alone, group = (make_jobs(tmp_path / way, family, lora, **fields) for way in ("alone", "group"))
    records = train(alone, 1, family=family)
    together = train(group, 4, family=family)
    assert apart(group, alone) < SAME
    for name, record in timeless(together).items():
        expected = timeless(records)[name]
        assert flat(record.pop("loss_curve")) == pytest.approx(flat(expected.pop("loss_curve")), abs=1e-5)
        assert record.pop("loss") == pytest.approx(expected.pop("loss"), abs=1e-5)
        assert record == expected


def test_a_group_finds_parameters_that_were_moved(tmp_path, monkeypatch):
    """As accelerate moves those of a model that it prepares for several processes. A step clips each adapter as one tensor."""
    real, clip, clipped = Accelerator.prepare_model, Flat.clip, set()
    monkeypatch.setattr(Flat, "clip", lambda self, largest: clipped.add(self) or clip(self, largest))

    def moving(self, model, *args, **options):
        prepared = real(self, model, *args, **options)
        for parameter in prepared.parameters():
            parameter.data = parameter.data.clone() if parameter.requires_grad else parameter.data
        return prepared

    monkeypatch.setattr(Accelerator, "prepare_model", moving)
    alone, group = (make_jobs(tmp_path / way) for way in ("alone", "group"))
    train(alone, 1)
    train(group, 4)
    assert (apart(group, alone) < SAME, len(clipped)) == (True, 4)


def test_first_losses_are_computed_in_mixed_precision_and_nothing_after_a_group_is(tmp_path):
    base, seen, is_mixed = build_model("llama"), [], torch.is_autocast_enabled
    base.model.norm.register_forward_pre_hook(lambda layer, args: seen.append((layer.training, is_mixed(DEVICE))))
    alone, group = (make_jobs(tmp_path / way, bf16=True, max_steps=1) for way in ("alone", "group"))
    train(alone, 1, base)
    train(group, 4, base)
    assert {mixed for training, mixed in seen if not training} == {True}
    assert not is_mixed(DEVICE)
    assert apart(group, alone) < 1e-3


def checkpointed_jobs(folder: Path) -> list[Job]:
    """Jobs of different lengths, with dropout, which write checkpoints."""
    return make_jobs(folder, lora={"lora_dropout": 0.1}, save_steps=2)


@pytest.fixture
def checkpointed(tmp_path) -> list[Job]:
    return checkpointed_jobs(tmp_path / "jobs")


class Killed(BaseException):
    """Nothing that any code expects."""


class KillAt(TrainerCallback):
    """Kills at a turn: a step of some Trainer, or a checkpoint of it."""

    def __init__(self, turn: int) -> None:
        self.left = turn

    def on_step_end(self, *args, **kwargs) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed

    on_save = on_step_end


def contents(jobs: list[Job]) -> list[bytes]:
    return [(job.folder / FILE).read_bytes() for job in jobs]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> list[Job]:
    """`checkpointed`, trained one after another."""
    jobs = checkpointed_jobs(tmp_path_factory.mktemp("alone"))
    train(jobs, 1)
    return jobs


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[list[Job], dict]:
    """`checkpointed`, trained side by side, with their records."""
    jobs = checkpointed_jobs(tmp_path_factory.mktemp("whole"))
    return jobs, timeless(train(jobs, 4))


@pytest.mark.parametrize("turn", [3, 9, 22, 38])
def test_a_killed_group_goes_on_to_the_same_bytes(checkpointed, whole, monkeypatch, turn):
    jobs, kill, real = checkpointed, KillAt(turn), module.begin

    def begin(base, job, start, callbacks):
        return real(base, job, start, [*callbacks, kill])

    monkeypatch.setattr(module, "begin", begin)
    with pytest.raises(Killed):
        train(jobs, 4)
    left, read, found = [job for job in jobs if not (job.folder / FILE).exists()], [], module.complete_checkpoints
    monkeypatch.setattr(module, "complete_checkpoints", lambda *given: read.append(given) or found(*given))
    records = timeless(train(left, 4))
    assert len(read) == len(left)  # digests are computed once
    assert contents(jobs) == contents(whole[0])
    assert records == {job.name: whole[1][job.name] for job in left}


def test_checkpoints_are_written_where_one_alone_would_write_and_where_it_ends():
    found = {}
    for strategy in ("epoch", "steps", "no"):
        args = SimpleNamespace(save_strategy=strategy, gradient_accumulation_steps=2)
        handler = SimpleNamespace(train_dataloader=range(5))
        state = SimpleNamespace(max_steps=9, save_steps=4)
        trainer = SimpleNamespace(args=args, callback_handler=handler, state=state)
        found[strategy] = [step for step in range(1, 12) if module.saves_at(trainer, step)]
    assert found == {"epoch": [3, 6, 9], "steps": [4, 8, 9], "no": [9]}


def test_a_training_that_goes_on_leaves_no_later_checkpoints(checkpointed):
    job = checkpointed[0]
    saved = [checkpoints(staging_path(job.folder)) / f"checkpoint-{step}" for step in (4, 6, 10)]
    for start, left in ((saved[1], saved[:2]), (None, [])):
        for path in saved:
            path.mkdir(parents=True, exist_ok=True)
            (path / COMPLETE).write_text("{}")
        module.begin(build_model("llama"), job, start, [])
        assert [path for path in saved if path.exists()] == left


def test_order_and_size_of_a_group_change_nothing(checkpointed, whole, alone):
    train(checkpointed[::-1], 3)
    assert apart(checkpointed, whole[0]) < SAME
    assert apart(alone, whole[0]) < SAME


@pytest.mark.parametrize(("first", "then"), [(4, 1), (1, 4)])
def test_what_one_way_has_begun_the_other_ends(checkpointed, alone, monkeypatch, first, then):
    jobs, kill = checkpointed, KillAt(20)
    monkeypatch.setattr(module, "BankProgress", lambda *given: kill)
    with pytest.raises(Killed):
        train(jobs, first)
    monkeypatch.undo()
    train([job for job in jobs if not (job.folder / FILE).exists()], then)
    assert apart(jobs, alone) < SAME


def test_a_training_that_diverges_touches_no_other(checkpointed, alone, monkeypatch):
    real = module.begin

    def begin(base, job, start, callbacks):
        trainer = real(base, job, start, callbacks)
        if job.name == "a":
            trainer.args.learning_rate = 1e30
        return trainer

    monkeypatch.setattr(module, "begin", begin)
    jobs = [replace(job, settings=replace(job.settings, args=copy.deepcopy(job.settings.args))) for job in checkpointed]
    assert "diverged" in train(jobs, 4)["a"]["failed"]
    assert apart(jobs[1:], alone[1:]) < SAME


@pytest.mark.parametrize(("at", "loss"), [("outputs", "nll"), ("gradients", "nll"), ("gradients", "dft")])
def test_where_memory_does_not_suffice_a_pass_is_halved_and_nothing_counted_twice(tmp_path, monkeypatch, at, loss):
    where, name = {"outputs": (side_by_side, "together"), "gradients": (torch.autograd, "backward")}[at]
    real, shared, sizes, budgets, told = getattr(where, name), side_by_side.cheapest, [], [], {}
    evaluated = [4, 4, 3] if at == "outputs" else []  # trainings in a pass before the first step; the fourth is alone

    def needs_memory(given, *rest, **more):
        if isinstance(given, list) and not more:
            sizes.append(len(given))
            if len(given) > 2 and len(sizes) > len(evaluated) + 2:
                if at == "gradients":
                    real(given)  # as far as it came
                raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(given, *rest, **more)

    def cheapest(batches, beside, budget, limit):
        budgets.append((sum(map(math.prod, batches)), budget))
        return shared(batches, beside, budget, limit)

    def hear(self, args, state, control, logs, **more):
        shown = {key: logs[key] for key in ("num_tokens", "entropy", "mean_token_accuracy") if key in logs}
        told.setdefault(way, {})[Path(self._args.run_name).name, state.global_step] = shown

    monkeypatch.setattr(Tracker, "on_log", hear)
    lora = {"lora_dropout": 0.1, "lora_target_modules": ["embed_tokens", "v_proj"]}
    fields = {"lora": lora, "loss_type": loss, "report_to": "tensorboard", "logging_steps": 3}
    jobs, expected = (make_jobs(tmp_path / way, **fields) for way in ("halved", "alone"))
    way = "alone"
    train(expected, 1)
    way = "halved"
    monkeypatch.setattr(where, name, needs_memory)
    monkeypatch.setattr(side_by_side, "cheapest", cheapest)
    train(jobs, 4)
    first = [*evaluated, 4, 4, 4, 2, 2]
    assert (sizes[: len(first)], {*sizes[len(first) :]}) == (first, {2})
    assert {budget for _, budget in budgets[7:]} == {budgets[6][0] // 2}
    assert apart(jobs, expected) < SAME
    assert sum("entropy" in shown for shown in told["alone"].values()) > 4
    for key, shown in told["alone"].items():
        assert told["halved"][key] == pytest.approx(shown, rel=1e-6)


def test_where_rows_cannot_share_a_pass_that_is_said_and_they_do_not(checkpointed):
    base, said = build_model("llama"), []
    base.model.layers[0].mlp.register_forward_hook(lambda layer, args, output: output - output.mean(0, keepdim=True))
    with Terminal(quiet=True).progress("", 9) as bar:
        train_jobs(lambda: base, checkpointed, 4, bar, lambda text, style="": said.append(text))
    assert len(said) == 1
    assert "trained one after another: this model computes rows of several adapters otherwise than alone" in said[0]
    assert all((job.folder / FILE).exists() for job in checkpointed)


@pytest.mark.parametrize(("weight", "reason"), [(0.001, "router_aux_loss_coef"), (0.0, None)])
def test_a_loss_of_all_rows_is_not_shared_and_nothing_of_a_group_stays(tmp_path, monkeypatch, weight, reason):
    alone, group = (
        make_jobs(tmp_path / way, names=("a", "x y"), router_aux_loss_coef=weight, max_steps=2, lora=ATTENTION)
        for way in ("alone", "group")
    )
    said, twins, real = [], [], module.twin

    def twin(base):
        twins.append(weakref.ref(made := real(base)))
        return made

    monkeypatch.setattr(module, "twin", twin)
    for jobs, parallel in ((alone, 1), (group, 2)):
        base = model_of("Mixtral")
        with Terminal(quiet=True).progress("", 9) as bar:
            train_jobs(lambda base=base: base, jobs, parallel, bar, lambda text, style="": said.append(text))
    assert [reason in text for text in said] == [True] * (reason is not None)
    assert apart(group, alone) < SAME
    assert [one() for one in twins] == [None, None]


def test_rows_as_long_as_a_model_has_positions(tmp_path):
    alone, group = (make_jobs(tmp_path / way, "gpt2", max_steps=5) for way in ("alone", "group"))
    tokenizer, rows = build_tokenizer(), [row for job in alone for row in job.rows]
    longest = max(len(tokenizer(row["prompt"] + row["completion"]).input_ids) + 1 for row in rows)
    for jobs, parallel in ((alone, 1), (group, 4)):
        train(jobs, parallel, model_of("GPT-2", n_positions=longest))
    assert apart(group, alone) < SAME


def test_what_models_compute_of_all_rows_is_known_before_a_try(tmp_path):
    (job,) = make_jobs(tmp_path, names=("a",), max_length=48)
    rope, original = FAMILIES["Phi-3, longrope"].config["rope_parameters"], {"original_max_position_embeddings": 128}
    normalised = build_model("llama")
    normalised.model.norm = torch.nn.BatchNorm1d(32)
    found = [
        beyond_rows(base, job.settings).partition(" are ")[0].partition(" follow ")[0]
        for base in (
            model_of("Llama, YaRN"),
            model_of("Llama, dynamic NTK"),
            model_of("Llama, dynamic NTK", max_position_embeddings=256),
            model_of("Phi-3, longrope"),
            model_of("Phi-3, longrope", rope_parameters=rope | original, **original),
            normalised,
        )
    ]
    assert found == ["", "its rotary frequencies", "", "its rotary frequencies", "", "its statistics"]


def test_a_model_with_batch_statistics_is_trained_one_after_another_and_that_is_said(tmp_path):
    jobs, said = make_jobs(tmp_path, names=("a", "x y"), max_steps=1), []
    base = build_model("llama")
    base.spare = torch.nn.BatchNorm1d(32)
    with Terminal(quiet=True).progress("", 9) as bar:
        train_jobs(lambda: base, jobs, 2, bar, lambda text, style="": said.append(text))
    assert ["its statistics are of all rows" in text for text in said] == [True]


def test_a_group_has_one_way_of_training(tmp_path):
    base, first, *others = build_model("llama"), *make_jobs(tmp_path, names=("a", "x y"))
    others += make_jobs(tmp_path, names=("three is in between",), per_device_train_batch_size=2)
    others += make_jobs(tmp_path, lora={"lora_r": 2}, names=("a long word with more",))
    jobs, new = [*others, first], {job.of: {} for job in (*others, first)}
    found = [[job.name for job in group] for group in module.groups(lambda: base, jobs, 4, new)]
    assert found == [["x y", "a"], ["three is in between"], ["a long word with more"]]


ON_DISK = {
    "conversations": ("project", "run", ()),
    "texts": ("intents", "intents", ()),
    "texts, the model's own head": ("own", "intents", ()),
    "4-bit": ("project", "run", ("--load_in_4bit", "true", "--lora_dropout", "0.1")),
    "8-bit": ("project", "run", ("--load_in_8bit", "true")),
}


def ways_apart(folder: Path, name: str, flags: tuple[str, ...]) -> float:
    """By how much the adapters of a run differ when it is told to train them one after another and side by side."""
    found = []
    for way in ("1", "3"):
        out = folder / f"out{way}"
        command = ["adapters", "--config", folder / f"{name}.yaml", "--output_dir", out, "--max_steps", "6"]
        assert m2m(*command, "--parallel_adapters", way, *flags) == 0
        found.append({path.parent.name: load_file(path) for path in sorted((out / "adapters").glob(f"*/{FILE}"))})
    assert len(found[0]) == 3
    return max(
        (found[0][one][key] - found[1][one][key]).abs().max().item() for one in found[0] for key in found[0][one]
    )


@pytest.mark.parametrize("task", ON_DISK)
def test_every_task_trains_side_by_side(request, task, capsys):
    fixture, name, flags = ON_DISK[task]
    assert ways_apart(request.getfixturevalue(fixture), name, ("--learning_rate", "1e-3", *flags)) < SAME
    assert "one after another" not in capsys.readouterr().out


def test_images_train_side_by_side(vit, pictures_of, capsys):
    assert ways_apart(pictures_of(vit, "all-linear"), "images", ("--learning_rate", "1e-3")) < SAME
    assert "one after another" not in capsys.readouterr().out


def test_auto_trains_small_models_side_by_side_and_prints_a_line_for_each(project, monkeypatch, capsys):
    monkeypatch.setattr(module, "train_expert", lambda *given: pytest.fail("an adapter was trained alone"))
    assert m2m("adapters", "--config", project / "run.yaml", "--parallel_adapters", "auto") == 0
    told = capsys.readouterr().out
    assert [word in told for word in ("alpha: 3 steps", "beta: 3 steps", "gamma: 3 steps")] == [True] * 3
    records = [json.loads(path.read_text()) for path in sorted((project / "out" / "adapters").glob("*/training.json"))]
    assert all(0 < record["seconds"] < 60 for record in records)


@pytest.mark.parametrize(
    ("step", "call"), [("seal", 2), ("seal", 3), ("write_json", 1), ("write_json", 2), ("publish", 2), ("publish", 3)]
)
def test_killed_while_it_publishes_a_group_goes_on_to_the_same_bytes(checkpointed, whole, monkeypatch, step, call):
    jobs, real, calls = checkpointed, getattr(module, step), 0

    def killed(*given):
        nonlocal calls
        calls += 1
        if calls == call:
            raise Killed
        return real(*given)

    monkeypatch.setattr(module, step, killed)
    with pytest.raises(Killed):
        train(jobs, 4)
    monkeypatch.undo()
    left = [job for job in jobs if not finished(job.folder, job.of)]
    if step == "publish":  # what ended at one step, here one and then two, is published or not as a whole
        assert len(left) == {1: 3, 2: 1, 3: 1}[call]
    train(left, 4)
    assert contents(jobs) == contents(whole[0])


def test_a_record_of_a_group_that_ended_is_of_no_other_training(checkpointed):
    job = checkpointed[0]
    staged = staging_path(job.folder)
    staged.mkdir(parents=True)
    (staged / FILE).write_bytes(b"other")
    facts = {FILE: {"bytes": 5, "sha256_16": "0" * 16}}
    (job.folder.parent / TOGETHER).write_text(json.dumps({job.folder.name: {"fingerprint": job.of, "files": facts}}))
    assert not finished(job.folder, job.of)
