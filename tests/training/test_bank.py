"""The bank: uniform, never trained twice, and the base given back as it was."""

import json
import re
import shutil

import pytest
import torch
import yaml
from pico import choice_rows, language_searcher
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import SFTTrainer

from m2m_hf.errors import InputError
from m2m_hf.modeling.loading import load_base
from m2m_hf.training.bank import differing
from m2m_hf.training.fine_tune import planned_steps, train_expert


def test_adapters_differ_in_their_data_only(project):
    one = language_searcher(project)
    one.train_adapters()
    records = one.run.bank.training()
    assert records["alpha"]["uniform"] == records["beta"]["uniform"] == records["gamma"]["uniform"] == one.run.facts
    assert len({record["data"] for record in records.values()}) == 3
    assert len({record["fingerprint"] for record in records.values()}) == 3
    for record in records.values():
        assert record["steps"] == 3
        assert [step for step, _ in record["loss_curve"]] == [1, 2, 3]
        assert record["tokens"] > 0
        assert record["seconds"] > 0
        assert record["peak_memory_bytes"] > 0
        assert record["rows"] == 12


def test_every_adapter_starts_from_the_same_weights(project):
    one = language_searcher(
        project, "--learning_rate", "1e-12"
    )  # B moves a little away from 0, A by less than it can hold
    one.train_adapters()
    tensors = [
        load_file(project / "out" / "adapters" / name / "adapter_model.safetensors") for name in ("alpha", "beta")
    ]
    assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0] if "lora_A" in key)


def test_a_bank_is_what_fresh_models_would_give(project, tmp_path):
    """Training in sequence on one base equals TRL on a freshly loaded model, bit for bit."""
    one = language_searcher(project)
    one.train_adapters()
    args = one.run.args
    args.output_dir = str(tmp_path / "fresh")
    args.save_strategy = "no"
    fresh = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(one.run.model_args.model_name_or_path, dtype="float32"),
        args=args,
        train_dataset=one.run.candidates["gamma"].rows,
        processing_class=one.run.task.tokenizer,
        peft_config=one.run.expert().lora,
    )
    fresh.train()
    fresh.model.save_pretrained(tmp_path / "fresh")
    theirs = load_file(tmp_path / "fresh" / "adapter_model.safetensors")
    ours = load_file(project / "out" / "adapters" / "gamma" / "adapter_model.safetensors")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_training_gives_the_base_back_untouched(project, checkpointing):
    one = language_searcher(project, "--activation_checkpointing", checkpointing)
    base = load_base(one.run.model_args, one.run.args)
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    attributes = set(vars(base))
    train_expert(base, one.run.candidates["alpha"].rows, one.run.training_settings(), project / "a")
    assert list(base.state_dict()) == list(state)
    assert all(torch.equal(base.state_dict()[name], tensor) for name, tensor in state.items())
    assert set(vars(base)) == attributes
    assert not base.training
    assert not base.is_activation_checkpointing
    assert not base.get_input_embeddings()._forward_hooks


def test_a_complete_adapter_is_never_trained_twice(project, monkeypatch):
    one = language_searcher(project)
    one.train_adapters()
    before = {path: path.stat().st_mtime_ns for path in (project / "out" / "adapters").rglob("*") if path.is_file()}
    shutil.rmtree(project / "out" / "adapters" / "beta")
    trained = []
    real = train_expert

    def spy(base, rows, settings, folder, *rest):
        trained.append(folder.name)
        return real(base, rows, settings, folder, *rest)

    monkeypatch.setattr("m2m_hf.training.bank.train_expert", spy)
    again = language_searcher(project)
    assert again.run.bank.check() == ["beta"]
    again.train_adapters()
    assert trained == [".beta.partial"]
    for path, modified in before.items():
        assert path.exists()
        if "beta" not in path.parts:
            assert path.stat().st_mtime_ns == modified


def test_a_bank_that_is_not_uniform_is_refused_by_name(project):
    one = language_searcher(project)
    one.train_adapters()
    for flags, difference in (
        (("--learning_rate", "0.02"), "learning_rate (0.01 there, 0.02 now)"),
        (("--lora_r", "8"), "lora_config.r (4 there, 8 now)"),
        (("--seed", "7"), "seed (42 there, 7 now)"),
        (("--max_steps", "4"), "max_steps (3 there, 4 now)"),
    ):
        with pytest.raises(InputError, match=re.escape(difference)):
            language_searcher(project, *flags).run.bank.check()
    assert (
        language_searcher(project, "--logging_steps", "3", "--tokens_per_batch", "7").run.bank.check() == []
    )  # nothing learned
    data = project / "beta.jsonl"
    rows = data.read_text()
    data.write_text(rows.replace("red", "ped"))
    with pytest.raises(InputError, match="candidate 'beta' has changed"):
        language_searcher(project).run.bank.check()
    data.write_text(rows)
    path = project / "out" / "adapters" / "beta" / "training.json"
    record = json.loads(path.read_text())
    record["uniform"] |= {"version.peft": "0.1.0", "base_model": "another"}
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"base_model \('another' there.*version\.peft \('0\.1\.0' there"):
        one.run.bank.check()


def test_differing():
    assert differing({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}) == ["b (3 there, 2 now)", "c (4 there, None now)"]


def test_planned_steps_are_what_the_trainer_makes(project):
    one = language_searcher(
        project, "--max_steps", "-1", "--num_train_epochs", "2", "--gradient_accumulation_steps", "2"
    )
    one.train_adapters()
    assert planned_steps(one.run.args, 12, 0) == one.run.bank.training()["alpha"]["steps"] == 4


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
        (("--lora_r", "0"), "lora_r 0"),
        (("--attn_implementation", "flash_attention_9"), "flash_attention_9"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused_before_anything_is_written(project, flags, message):
    with pytest.raises(InputError, match=message):
        language_searcher(project, *flags).check()
    assert not (project / "out").exists()


def test_python_checks_what_the_command_line_checks(project):
    path = project / "beta.jsonl"
    path.write_text(path.read_text() + json.dumps({"prompt": choice_rows(1)[0]["prompt"], "completion": " red"}) + "\n")
    with pytest.raises(InputError, match="are also in beta"):
        language_searcher(project).search()
    assert not (project / "out").exists()


def test_a_model_from_the_hub_is_pinned_to_its_commit(project, monkeypatch, tmp_path):
    """Through the real client, offline, from a cache as the client leaves it."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "hub" / "models--org--pico"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    config = yaml.safe_load((project / "run.yaml").read_text())
    shutil.copytree(config["model_name_or_path"], cache / "snapshots" / commit)
    for module in ("huggingface_hub.constants.HF_HUB_CACHE", "transformers.utils.hub.constants.HF_HUB_CACHE"):
        monkeypatch.setattr(module, str(tmp_path / "hub"))
    local = language_searcher(project)
    local.train_adapters()
    hub = language_searcher(project, "--model_name_or_path", "org/pico", "--output_dir", str(project / "hub"))
    assert hub.run.model_args.model_revision == commit
    hub.train_adapters()
    assert hub.run.facts["base_model"] == commit
    tensors = [load_file(project / out / "adapters" / "beta" / "adapter_model.safetensors") for out in ("out", "hub")]
    assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])
    with pytest.raises(InputError, match="neither a local model folder nor a model"):
        language_searcher(project, "--model_name_or_path", "org/none")
