"""The bank: uniform, never trained twice, and the base given back as it was."""

import json
import re
import shutil

import pytest
import torch
import yaml
from pico import changed, choice_rows, language_searcher, trained_by_trl
from safetensors.torch import load_file
from transformers import MambaConfig, MambaForCausalLM
from trl import SFTTrainer

from m2m_hf.errors import InputError
from m2m_hf.modeling.loading import load_base
from m2m_hf.training.fine_tune import planned_steps, train_expert
from m2m_hf.training.uniformity import differing

FILE = "adapter_model.safetensors"


def same(ours, theirs) -> bool:
    """Whether two adapter folders hold the same weights."""
    ours, theirs = load_file(ours / FILE), load_file(theirs / FILE)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_adapters_differ_in_their_data_only(finished):
    run = language_searcher(finished).run
    records = run.bank.training()
    assert records["alpha"]["uniform"] == records["beta"]["uniform"] == records["gamma"]["uniform"] == run.facts
    assert len({record["data"] for record in records.values()}) == 3
    assert len({record["fingerprint"] for record in records.values()}) == 3
    for record in records.values():
        assert record["steps"] == 3
        assert [step for step, _ in record["loss_curve"]] == [1, 2, 3]
        assert min(record[key] for key in ("tokens", "seconds", "peak_memory_bytes")) > 0
        assert record["rows"] == 12


def test_a_bank_is_what_fresh_models_would_give(finished, tmp_path):
    """Training in sequence on one base equals TRL on a freshly loaded model, bit for bit."""
    fresh = trained_by_trl(language_searcher(finished).run, "gamma", tmp_path / "trl")
    fresh.model.save_pretrained(tmp_path / "fresh")
    assert same(finished / "out" / "adapters" / "gamma", tmp_path / "fresh")


def test_adapters_on_a_model_whose_loading_draws_start_as_those_of_trl_sft(project, tokenizer, tmp_path):
    shape = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 8, "time_step_rank": 4}
    MambaForCausalLM(MambaConfig(**shape)).save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    changed(project, "run", model_name_or_path=str(tmp_path / "mamba"), lora_target_modules=["in_proj", "x_proj"])
    run = language_searcher(project, "--activation_checkpointing", "false").run
    rows, lora = run.candidates["gamma"].rows, run.expert().lora
    train_expert(run.base.to_train(), rows, run.training_settings(), tmp_path / "ours")
    run.args.output_dir, run.args.save_strategy = str(tmp_path / "trl"), "no"
    theirs = SFTTrainer(model=str(tmp_path / "mamba"), args=run.args, train_dataset=rows, peft_config=lora)
    theirs.train()
    theirs.model.save_pretrained(tmp_path / "theirs")
    assert same(tmp_path / "ours", tmp_path / "theirs")


def test_training_gives_the_base_back_untouched(project):
    run = language_searcher(project, "--activation_checkpointing", "true").run
    base = load_base(run.model_args, run.args)
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    attributes = set(vars(base))
    train_expert(base, run.candidates["alpha"].rows, run.training_settings(), project / "a")
    assert list(base.state_dict()) == list(state)
    assert all(torch.equal(base.state_dict()[name], tensor) for name, tensor in state.items())
    assert set(vars(base)) == attributes
    assert not base.training
    assert not base.is_activation_checkpointing
    assert not base.get_input_embeddings()._forward_hooks


def test_a_complete_adapter_is_never_trained_twice(finished):
    adapters = finished / "out" / "adapters"
    shutil.rmtree(adapters / "beta")
    before = {path: path.stat().st_mtime_ns for path in adapters.rglob("*") if path.is_file()}
    again = language_searcher(finished)
    assert again.run.bank.check() == ["beta"]
    again.train_adapters()
    assert (adapters / "beta" / FILE).exists()
    assert all(path.stat().st_mtime_ns == modified for path, modified in before.items())


@pytest.mark.parametrize(
    ("field", "value", "difference"),
    [
        ("learning_rate", "0.02", "learning_rate (0.01 there, 0.02 now)"),
        ("lora_r", "8", "lora_config.r (4 there, 8 now)"),
        ("seed", "7", "seed (42 there, 7 now)"),
        ("max_steps", "4", "max_steps (3 there, 4 now)"),
    ],
)
def test_a_bank_of_other_settings_is_refused_by_name(finished, field, value, difference):
    words = rf"{re.escape(difference)}.*delete {finished / 'out' / 'adapters'} to train all again"
    with pytest.raises(InputError, match=words):
        language_searcher(finished, f"--{field}", value).run.bank.check()


def test_a_bank_of_other_data_or_versions_is_refused_by_name(finished):
    bank = language_searcher(finished, "--logging_steps", "3", "--tokens_per_batch", "7").run.bank
    assert bank.check() == []  # these change nothing that is learned
    data = finished / "beta.jsonl"
    rows = data.read_text()
    data.write_text(rows.replace("red", "ped"))
    with pytest.raises(InputError, match="candidate 'beta' has changed"):
        language_searcher(finished).run.bank.check()
    data.write_text(rows)
    path = finished / "out" / "adapters" / "beta" / "training.json"
    record = json.loads(path.read_text())
    record["uniform"] |= {"version.peft": "0.1.0", "base_model": "another"}
    path.write_text(json.dumps(record))
    words = rf"base_model \('another' there.*version\.peft \('0\.1\.0' there.*delete {path.parent} to train it again"
    with pytest.raises(InputError, match=words):
        bank.check()


def test_differing():
    assert differing({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}) == ["b (3 there, 2 now)", "c (4 there, None now)"]


@pytest.mark.parametrize(("size", "drops", "steps"), [("4", "false", 4), ("5", "false", 4), ("5", "true", 2)])
def test_planned_steps_are_what_the_trainer_makes(project, size, drops, steps):
    flags = ("--max_steps", "-1", "--num_train_epochs", "2", "--gradient_accumulation_steps", "2")
    batches = ("--per_device_train_batch_size", size, "--dataloader_drop_last", drops)
    one = language_searcher(project, *flags, *batches)
    one.train_adapters()
    assert planned_steps(one.run.args, 12, 0) == one.run.bank.training()["alpha"]["steps"] == steps


def test_a_training_that_diverges_is_refused_and_leaves_nothing(project):
    one = language_searcher(project, "--learning_rate", "1e38", "--max_grad_norm", "0")
    with pytest.raises(InputError, match=r"not one adapter could be trained: it diverged.*try a lower learning_rate"):
        one.train_adapters()
    assert not (project / "out" / "adapters" / "alpha").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--use_dora", "true"), "cannot be averaged"),
        (("--lora_modules_to_save", "lm_head"), "cannot be averaged"),
        (("--lora_target_modules", "nope", "neither"), "lora_target_modules"),
        (("--lora_r", "0"), "lora_r: expected an integer of at least 1, got 0"),
        (("--attn_implementation", "flash_attention_9"), "flash_attention_9"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused_before_anything_is_written(project, flags, message):
    with pytest.raises(InputError, match=message):
        language_searcher(project, *flags).check()
    assert not (project / "out").exists()


def test_python_checks_what_the_command_line_checks(project):
    with (project / "beta.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": choice_rows(1)[0]["prompt"], "completion": " red"}) + "\n")
    with pytest.raises(InputError, match="are also in beta"):
        language_searcher(project).search()
    assert not (project / "out").exists()


def test_a_model_from_the_hub_is_pinned_to_its_commit(finished, monkeypatch, tmp_path):
    """Through the real client, offline, from a cache as the client leaves it."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "hub" / "models--org--pico"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    config = yaml.safe_load((finished / "run.yaml").read_text())
    shutil.copytree(config["model_name_or_path"], cache / "snapshots" / commit)
    for module in ("huggingface_hub.constants.HF_HUB_CACHE", "transformers.utils.hub.constants.HF_HUB_CACHE"):
        monkeypatch.setattr(module, str(tmp_path / "hub"))
    hub = language_searcher(finished, "--model_name_or_path", "org/pico", "--output_dir", str(tmp_path / "pinned"))
    assert hub.run.model_args.model_revision == commit
    hub.train_adapters()
    assert hub.run.facts["base_model"] == commit
    assert same(finished / "out" / "adapters" / "beta", tmp_path / "pinned" / "adapters" / "beta")
    with pytest.raises(InputError, match="neither a local model folder nor a model"):
        language_searcher(finished, "--model_name_or_path", "org/none")
