"""Refusals before anything is trained: what the libraries' own checks say, and rows that the model has no room for."""

import ast
import inspect
import os
import shutil
import textwrap
from collections.abc import Callable, Iterator
from unittest.mock import patch

import pytest
import torch
from peft import LoraConfig
from pico import TEMPLATE, build_model, build_tokenizer, candidate_rows, changed, m2m, write_rows
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertLMHeadModel,
    BertModel,
    LlamaConfig,
    LlamaModel,
    OPTConfig,
    OPTForCausalLM,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)
from trl import ModelConfig, SFTConfig, SFTTrainer

from m2m_hf.run import checks

BEST = {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps"}
TRIED = {  # what a check of TRL or transformers says -> settings that it refuses, what we say where we are asked first
    "Applying a PEFT adapter to `lm_head`": ({"lora_target_modules": ["q_proj", "lm_head"]}, ""),
    "When `padding_free=True` without packing": ({"padding_free": True}, ""),
    "Invalid `loss_type`": ({"loss_type": "other"}, "loss_type: expected one of nll, dft"),
    "`router_aux_loss_coef` is set to": ({"router_aux_loss_coef": 0.1}, ""),
    "`gradient_checkpointing_kwargs={'selective': True}` requires `gradient_checkpointing": (
        {"activation_checkpointing": False, "activation_checkpointing_kwargs": {"selective": True}},
        "",
    ),
    "`gradient_checkpointing_kwargs={'selective': True}` requires non-reentrant": (
        {
            "activation_checkpointing": True,
            "activation_checkpointing_kwargs": {"selective": True, "use_reentrant": True},
        },
        "",
    ),
    "`liger_kernel_config={": (
        {"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": True}},
        "candidates.alpha: use_liger_kernel needs Liger. Type: pip install liger-kernel",
    ),
    "When packing is enabled, `max_length`": ({"packing": True, "max_length": None}, ""),
    "`args.metric_for_best_model` must be provided": ({"save_strategy": "best"}, ""),
    "Using fsdp only works in distributed": ({"fsdp": "full_shard"}, ""),
    "You have set `args.eval_strategy`": ({"eval_strategy": "steps"}, "eval_strategy: expected 'no'"),
    "The specified `eos_token`": ({"eos_token": "<none>"}, "eos_token: '<none>' is not a token"),
    "You set `assistant_only_loss=True`, but the dataset": ({"assistant_only_loss": True}, "needs a messages column"),
    "The train_dataset does not implement __len__": (
        {"dataloader_drop_last": True, "per_device_train_batch_size": 13},
        "candidates.alpha: its 12 rows fill no batch of 13",
    ),
    "logging strategy": ({"logging_steps": 0}, ""),
    "--logging_steps must be an integer": ({"logging_steps": 1.5}, ""),
    "--save_steps must be an integer": ({"save_steps": 1.5}, ""),
    "--eval_steps must be an integer": ({"eval_strategy": "steps", "eval_steps": 1.5}, ""),
    "evaluation strategy": ({"eval_strategy": "steps", "eval_steps": 0, "logging_steps": 0}, ""),
    "At most one of fp16 and bf16 can be True, but": ({"fp16": True, "bf16": True}, ""),
    "At most one of fp16 and bf16 can be True for full": ({"fp16_full_eval": True, "bf16_full_eval": True}, ""),
    "Got warmup_steps": ({"warmup_steps": -1}, ""),
    "--dataloader_prefetch_factor can only": ({"dataloader_prefetch_factor": 2}, ""),
    "`torch_empty_cache_steps` must be": ({"torch_empty_cache_steps": 0}, ""),
    "--load_best_model_at_end requires the save and": ({"load_best_model_at_end": True, "save_strategy": "steps"}, ""),
    "--load_best_model_at_end requires the saving steps to be a round": (BEST | {"save_steps": 3, "eval_steps": 2}, ""),
    "which cannot get guaranteed when mixing": (BEST | {"save_steps": 0.5, "eval_steps": 2}, ""),
    "which is not a multiple of": (BEST | {"save_steps": 0.3, "eval_steps": 0.2}, ""),
    "lr_scheduler_type reduce_lr_on_plateau requires an": ({"lr_scheduler_type": "reduce_lr_on_plateau"}, ""),
    "lr_scheduler_type greedy requires an": ({"lr_scheduler_type": "greedy"}, ""),
    "--tf32 requires": ({"tf32": True}, ""),
    "You can't use 8 bit and 4 bit": ({"load_in_8bit": True, "load_in_4bit": True}, ""),
    "`target_parameters` must be a list": ({"lora_target_parameters": "a.b"}, ""),
}


CANNOT_ARISE = (  # parts of what checks say of arguments that we never pass, data that we never have, or how a run is launched
    "vision", "`train_dataset`", "`processing_class` must be", "`peft` library", "`peft.PeftConfig`", "`PeftModel` instance",
    "Prefix tuning", "custom data collator", "formatting function", "`compute_loss_func`", "`quantization_config` both",
    "`Dataset.with_transform()`", "mask columns but no 'labels'", "nn.DataParallel", "context parallelism", "DeepSpeed",
    "deepspeed", "torch_xla", "`DistributedConfig`", "requires either a `model`", "`optimizers`", "simple callable", "SageMaker",
    "`batch_eval_metrics`", "cannot be used as is for training", "the optimizer parameters are not on the same device",
    "at least one example has no assistant tokens", "Unsupported truncation mode", "The specified `pad_token`",
    "callable to `accelerator_config`", "torch>=0.2.0", "requires `accelerate>=", "`auto_wrap_policy`", "'use_configured_state'",
    "`layers_to_transform`", "`layers_pattern`", "megatron_core", "'scipy'", "`loftq_config`", "lora_bias",
)  # fmt: skip


def messages(function: Callable) -> Iterator[str]:
    """What a function's `raise` statements say."""
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        if isinstance(node, ast.Raise) and node.exc is not None:
            parts = [
                part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)
            ]
            yield " ".join("".join(parts).split())


def test_every_check_of_the_trainers_is_tried_or_cannot_arise():
    checked = (
        SFTTrainer.__init__, SFTTrainer._prepare_dataset, Trainer.__init__, Trainer._validate_args,
        TrainingArguments.__post_init__, TrainingArguments._validate_args, TrainingArguments._process_fsdp_args,
        TrainingArguments.__dict__["_setup_devices"].func, SFTConfig.__post_init__, ModelConfig.__post_init__,
        LoraConfig.__post_init__,
    )  # fmt: skip
    known = (*TRIED, *CANNOT_ARISE)
    said = [text for function in checked for text in messages(function) if text]
    assert [text for text in said if not any(part in text for part in known)] == []
    assert [part for part in TRIED if not any(part in text for text in said)] == []


@pytest.mark.parametrize("said", TRIED)
def test_what_the_trainers_refuse_is_one_message_before_anything_is_trained(project, refused, said):
    change, ours = TRIED[said]
    changed(project, "run", **change)
    with patch.dict(os.environ):  # which fsdp writes to
        message = refused(project / "run.yaml")
    assert message.startswith("m2m: ")
    assert (ours or said) in message
    assert not (project / "out").exists()


def test_a_dry_run_and_the_final_settings_are_checked_alike(project, capsys):
    for change in (
        {"router_aux_loss_coef": 0.1},
        {"router_aux_loss_coef": None, "final": {"router_aux_loss_coef": 0.1}},
    ):
        changed(project, "run", **change)
        assert m2m("select", "--config", project / "run.yaml", "--dry_run") == 2
        assert "cannot be trained with these settings: `router_aux_loss_coef` is set" in capsys.readouterr().err


def chats(project) -> None:
    """Makes conversations of two of the project's candidates."""
    for name in ("alpha", "beta"):
        turns = [[("user", row["prompt"]), ("assistant", row["completion"].strip())] for row in candidate_rows(name)]
        rows = [{"messages": [{"role": role, "content": text} for role, text in pair]} for pair in turns]
        write_rows(project / f"{name}.jsonl", rows)
    candidates = {name: {"path": "json", "data_files": f"{name}.jsonl"} for name in ("alpha", "beta")}
    changed(project, "run", candidates=candidates)


def save(folder, model=None, tokenizer=None) -> str:
    (model or build_model("llama")).save_pretrained(folder)
    (tokenizer or build_tokenizer()).save_pretrained(folder)
    return str(folder)


def test_assistant_only_loss_needs_a_template_that_marks_what_the_assistant_says(project, tmp_path, refused):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    chats(project)
    changed(
        project, "run", model_name_or_path=save(tmp_path / "unmarked", tokenizer=tokenizer), assistant_only_loss=True
    )
    assert "missing prefix-preservation or `{% generation %}` markers" in refused(project / "run.yaml")


@pytest.mark.parametrize("where", ["candidates.alpha", "targets.colours", "pad_token"])
def test_tokens_without_an_embedding_are_refused_where_they_are_used(project, tmp_path, refused, where):
    tokenizer = build_tokenizer()
    size = build_model("llama").config.vocab_size
    tokenizer.add_tokens([f"<{number}>" for number in range(size - len(tokenizer) + 1)], special_tokens=True)
    model = save(tmp_path / "grown", tokenizer=tokenizer)
    changed(project, "run", model_name_or_path=model)
    assert m2m("select", "--config", project / "run.yaml", "--dry_run") == 0  # no row needs them
    last = tokenizer.convert_ids_to_tokens(size)
    if where == "candidates.alpha":
        write_rows(project / "alpha.jsonl", [*candidate_rows("alpha"), {"prompt": "a", "completion": f" b{last}"}])
    elif where == "targets.colours":
        write_rows(project / "validation.jsonl", [{"prompt": f"a{last}", "choices": ["b", "c"], "answer": 0}])
    else:
        tokenizer.pad_token = last
        tokenizer.save_pretrained(model)
    assert f"m2m: {where}: token {size} ({last!r}) has no embedding, since the tokenizer has" in refused(
        project / "run.yaml"
    )


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
ROTARY = ", or raise max_position_embeddings in its config.json, as its positions are rotary"


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        (
            "opt",
            {},
            "up to 802 tokens long (the longest 802, max_length 1024, pad_to_multiple_of None); set max_length: 128\n",
        ),
        ("llama", {"max_length": None}, f"set max_length: 128{ROTARY}\n"),
        ("opt", {"max_length": 129}, "up to 129 tokens long"),
        ("opt", {"max_length": 128, "pad_to_multiple_of": 50}, "up to 150 tokens long"),
        ("opt", {"max_length": 100, "pad_to_multiple_of": 50}, None),
        ("opt", {"max_length": 128}, None),
        (
            "opt",
            {"max_length": 256, "packing": True, "packing_strategy": "wrapped", "long": 1},
            "up to 234 tokens long",
        ),
        ("opt", {"max_length": 256, "packing": True, "long": 1}, None),  # every row begins at position 0
        ("opt", {"long": 1}, None),
        (
            "opt",
            {"max_length": 100, "final": {"max_length": 200}},
            "final, on alpha alone: the model has 128 positions",
        ),
    ],
)
def test_rows_longer_than_the_models_positions_are_refused_and_short_ones_are_trained(
    project, tmp_path, capsys, family, change, message
):
    long = {"prompt": "a", "completion": " red" * change.get("long", 400)}
    write_rows(project / "alpha.jsonl", [*candidate_rows("alpha"), long])
    learned = OPTConfig(**SMALL, vocab_size=320, ffn_dim=48, max_position_embeddings=128, word_embed_proj_dim=32)
    model = OPTForCausalLM(learned) if family == "opt" else build_model(family)
    changed(project, "run", model_name_or_path=save(tmp_path / "other", model), max_steps=1)
    changed(project, "run", **{key: value for key, value in change.items() if key != "long"})
    assert m2m("adapters", "--config", project / "run.yaml") == (2 if message else 0)
    assert (message or "") in capsys.readouterr().err


def test_settings_of_the_final_model_hold_for_every_candidate_alone(project, refused):
    """The search may choose any."""
    for final, message in (
        (
            {"dataloader_drop_last": True, "per_device_train_batch_size": 13},
            "final, on alpha alone: its 12 rows fill no batch",
        ),
        ({"max_length": 4}, "final, on alpha alone: no completion fits into max_length 4; raise it"),
        ({"lora_target_modules": ["q_proj", "lm_head"]}, "Applying a PEFT adapter to `lm_head` is not supported"),
    ):
        changed(project, "run", final=final)
        assert message in refused(project / "run.yaml")


def test_rows_of_which_the_first_are_left_out_are_trained(project):
    rows = [{"prompt": "a" * 40, "completion": " b"} for _ in range(20)] + candidate_rows("alpha")
    write_rows(project / "alpha.jsonl", rows)
    changed(project, "run", max_length=30, max_steps=1)
    assert m2m("adapters", "--config", project / "run.yaml") == 0


def test_a_trainer_is_made_ready_once_for_equal_settings(project, monkeypatch):
    made = []
    monkeypatch.setattr(checks, "check_training", lambda model, rows, *rest: made.append((rest[1], len(rows))))
    assert m2m("select", "--config", project / "run.yaml", "--dry_run") == 0
    assert made == [("candidates.alpha", 8)]
    made.clear()
    for packed in (False, True):  # how many packed rows there are, only TRL knows
        changed(project, "run", dataloader_drop_last=True, packing=packed, per_device_train_batch_size=1)
        assert m2m("select", "--config", project / "run.yaml", "--dry_run") == 0
    names = ("alpha", "beta", "gamma")
    assert made == [("candidates.alpha", 8), *((f"candidates.{name}", 12) for name in names)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"lora_target_modules": ["q_proj", "nix"]},
            "lora_target_modules: nix names no layer of this model that gets an adapter",
        ),
        ({"lora_target_modules": ["q_proj", "proj"]}, "lora_target_modules: proj names no layer"),
        ({"lora_task_type": "SEQ_CLS"}, "lora_task_type: expected CAUSAL_LM, got SEQ_CLS"),
        ({"learning_rate": 0.0}, "learning_rate: expected a number above 0, got 0.0"),
        ({"torch_compile_mode": "fast"}, "torch_compile_mode: expected one of default, reduce-overhead"),
        ({"lora_alpha": 0}, "lora_alpha: expected an integer of at least 1, got 0"),
        ({"lora_dropout": 1.0}, "lora_dropout: expected a number from 0 to below 1, got 1.0"),
        ({"label_smoothing_factor": 2.0}, "label_smoothing_factor: expected a number from 0 to below 1"),
        ({"weight_decay": -1.0}, "weight_decay: expected a number of at least 0"),
        (
            {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 0},
            "dataloader_prefetch_factor: expected an integer of",
        ),
        (
            {"train_sampling_strategy": "nope"},
            "train_sampling_strategy: expected one of random, sequential, group_by_length",
        ),
        ({"candidates": {"alpha": {"training": {"packing_strategy": "x"}}}}, "packing_strategy: expected one of bfd"),
        ({"activation_offloading": True}, "activation_offloading: moves activations from a GPU to the CPU"),
    ],
)
def test_values_that_the_libraries_take_and_nobody_means_are_refused(project, refused, change, message):
    if "candidates" in change:
        alpha = {"path": "json", "data_files": "alpha.jsonl", **change["candidates"]["alpha"]}
        change = {"candidates": {"alpha": alpha, "beta": {"path": "json", "data_files": "beta.jsonl"}}}
        change["allow_mixed_training"] = True
    changed(project, "run", **change)
    assert message in refused(project / "run.yaml")


def test_a_classifiers_label_names_need_embeddings_too(intents, encoder, tmp_path, refused):
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([f"<{number}>" for number in range(30)])
    shutil.copytree(encoder, tmp_path / "grown")
    tokenizer.save_pretrained(tmp_path / "grown")
    size = build_model("llama").config.vocab_size
    last = tokenizer.convert_ids_to_tokens(size)
    changed(intents, model_name_or_path=str(tmp_path / "grown"))
    assert m2m("select", "--config", intents / "intents.yaml", "--dry_run") == 0
    changed(intents, label_template=f"{{label}}{last}")
    assert f"m2m: labels: token {size} ({last!r}) has no embedding" in refused(intents / "intents.yaml")


@pytest.mark.parametrize(
    ("make", "task"),
    [
        (lambda: BertModel(BertConfig(**SMALL, vocab_size=320)), "sequence_classification"),
        (lambda: BertForSequenceClassification(BertConfig(**SMALL, vocab_size=320)), "sequence_classification"),
        (lambda: BertLMHeadModel(BertConfig(**SMALL, vocab_size=320)), "sequence_classification"),
        (lambda: LlamaModel(LlamaConfig(**SMALL, vocab_size=320)), "sequence_classification"),
        (lambda: ViTForImageClassification(ViTConfig(**SMALL)), "image_classification"),
    ],
)
def test_a_base_that_predicts_no_next_token_is_refused_with_its_task(project, tmp_path, refused, make, task):
    torch.manual_seed(0)
    model = make()
    changed(project, "run", model_name_or_path=save(tmp_path / "other", model))
    expected = f"is a {type(model).__name__}, which predicts no next token; give a causal LM, or classify with it: task: {task}"
    assert expected in refused(project / "run.yaml")
