"""Families of models that ask something of the settings of their own."""

import json

import pytest
import torch
import yaml
from pico import BERT, RGB, SHAPE, USE_CPU, changed, m2m
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    DeepseekV3Config,
    FalconH1Config,
    Gemma3Config,
    GraniteMoeHybridConfig,
    Llama4TextConfig,
    LlamaConfig,
    LlavaConfig,
    MambaConfig,
    MixtralConfig,
    MPNetConfig,
    Olmo2Config,
    PhimoeConfig,
    Qwen2MoeConfig,
    SiglipConfig,
    SmolVLMConfig,
    ViTImageProcessorPil,
)
from trl import ModelConfig, SFTConfig

from m2m_hf.modeling.families import Family
from m2m_hf.modeling.loading import model_class

CAUSAL = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
HYBRID = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "shared_intermediate_size": 48,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "n_routed_experts": 4, "moe_intermediate_size": 16, "q_lora_rank": 8, "kv_lora_rank": 8,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 1, "topk_group": 1,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1,
}  # fmt: skip
ATTENTION = "k_proj o_proj q_proj v_proj"
DENSE = "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"
MIXTRAL = MixtralConfig(**CAUSAL, num_local_experts=4)
GRANITE = GraniteMoeHybridConfig(**CAUSAL, **HYBRID, num_local_experts=0, num_experts_per_tok=0)


def saved(config, folder, auto, processing):
    """A pico model of this configuration, in a folder that is given back."""
    torch.manual_seed(0)
    auto.from_config(config).save_pretrained(folder)
    processing.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("asked", [True, False])
def test_a_model_that_cannot_checkpoint_activations_trains_without_and_says_so(
    intents, tokenizer, tmp_path, capsys, asked
):
    model = saved(MPNetConfig(**BERT, pad_token_id=1), tmp_path / "mpnet", AutoModel, tokenizer)
    changed(intents, model_name_or_path=str(model), activation_checkpointing=asked)
    assert m2m("adapters", "--config", intents / "intents.yaml") == 0
    assert ("MPNetModel does not support it" in capsys.readouterr().out) == asked
    assert yaml.safe_load((intents / "out" / "config.yaml").read_text())["activation_checkpointing"] is False


def settled(config, **settings):
    """(training arguments, target modules, what is said) of a family."""
    with torch.device("meta"):
        model = model_class(None, config).from_config(config)
    args = SFTConfig(output_dir="out", use_cpu=USE_CPU, bf16=False, **settings)
    args, model_args, said = Family(model, None, True).settle(args, ModelConfig(model_name_or_path="model"))
    return args, model_args.lora_target_modules, "\n".join(said)


@pytest.mark.parametrize(
    ("config", "layers", "words"),
    [
        (Olmo2Config(**CAUSAL), DENSE, "Olmo2ForCausalLM means down_proj"),
        (MIXTRAL, ATTENTION, "the routed experts (MixtralExperts)"),
        (PhimoeConfig(**CAUSAL, num_local_experts=4), ATTENTION, "the routed experts (PhimoeExperts)"),
        (Qwen2MoeConfig(**CAUSAL, num_experts=4), DENSE, "the routed experts"),  # its shared expert
        (DeepseekV3Config(**CAUSAL | LATENT), "kv_a_proj_with_mqa kv_b_proj o_proj q_a_proj q_b_proj", "no adapters are on"),
        (MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=320), "dt_proj in_proj x_proj", ""),
        (FalconH1Config(**CAUSAL, mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8), DENSE + " in_proj", ""),
    ],
)  # fmt: skip
def test_unset_target_modules_are_all_linear_layers_that_adapters_can_be_averaged_on(config, layers, words):
    _, modules, said = settled(config)
    assert sorted(modules) == sorted(layers.split())
    assert words in said


def test_unset_target_modules_stay_unset_where_peft_has_a_default():
    assert settled(LlamaConfig(**CAUSAL))[1:] == (None, "")


@pytest.mark.parametrize(
    ("kind", "tower"),
    [(Gemma3Config, "language_model"), (LlavaConfig, "language_model"), (SmolVLMConfig, "text_model")],
)
def test_unset_target_modules_leave_the_image_tower_alone(kind, tower):
    vision = SHAPE | {"image_size": 16, "patch_size": 4}
    texts = CAUSAL | {"head_dim": 8} | ({} if kind is Gemma3Config else {"model_type": "llama"})
    config = kind(
        text_config=texts, vision_config=vision | {"model_type": "clip_vision_model"} if kind is LlavaConfig else vision
    )
    _, modules, _ = settled(config)
    assert modules == rf"model\.{tower}\..*\.({'|'.join(DENSE.split())})"


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_routed_experts_stay_as_they_are_or_are_refused(project, tokenizer, tmp_path, capsys, refused, dropout):
    model = saved(MIXTRAL, tmp_path / "mixtral", AutoModelForCausalLM, tokenizer)
    changed(project, "run", model_name_or_path=str(model), lora_target_modules="all-linear", lora_dropout=dropout)
    assert "would adapt routed experts or routers held as one parameter (down_proj" in refused(project / "run.yaml")
    assert not (project / "out" / "adapters").exists()
    changed(project, "run", lora_target_modules=None)
    assert m2m("select", "--config", project / "run.yaml") == 0
    assert "the routed experts (MixtralExperts) are held" in " ".join(capsys.readouterr().out.split())
    shape = json.loads((project / "out" / "final" / "adapter_config.json").read_text())
    assert shape["target_modules"] == ATTENTION.split()


def test_a_model_that_trl_cannot_train_is_refused(project, tokenizer, tmp_path, refused):
    model = saved(Llama4TextConfig(**CAUSAL, num_local_experts=2), tmp_path / "llama4", AutoModelForCausalLM, tokenizer)
    changed(project, "run", model_name_or_path=str(model))
    assert "TRL cannot train a Llama4ForCausalLM" in refused(project / "run.yaml")


def test_adapters_on_a_router_are_refused(project, tokenizer, tmp_path, refused):
    model = saved(PhimoeConfig(**CAUSAL, num_local_experts=4), tmp_path / "phimoe", AutoModelForCausalLM, tokenizer)
    changed(project, "run", model_name_or_path=str(model), lora_target_modules="all-linear")
    assert "would adapt routers (" in refused(project / "run.yaml")


def test_the_routers_loss_is_left_out_where_trl_cannot_compute_it(project, tokenizer, tmp_path, capsys, refused):
    model = saved(GRANITE, tmp_path / "granite", AutoModelForCausalLM, tokenizer)
    changed(project, "run", model_name_or_path=str(model), lora_target_modules=None, router_aux_loss_coef=0.01)
    assert "expected 0, got 0.01" in refused(project / "run.yaml")
    changed(project, "run", router_aux_loss_coef=None)
    assert m2m("adapters", "--config", project / "run.yaml") == 0
    assert "router_aux_loss_coef: 0, as TRL cannot" in capsys.readouterr().out


def test_a_classifier_whose_family_names_another_part_than_it_has(pictures_of, tokenizer, tmp_path):
    shape = SHAPE | {"image_size": 8, "patch_size": 4}
    names = {"id2label": dict(enumerate(RGB)), "label2id": {name: place for place, name in enumerate(RGB)}}
    config = SiglipConfig(vision_config=shape, text_config=SHAPE | {"vocab_size": 320}, **names)
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    config.architectures = ["SiglipForImageClassification"]
    model = saved(config, tmp_path / "siglip", AutoModelForImageClassification, processor)
    tokenizer.save_pretrained(model)
    processor.save_pretrained(model)
    project = pictures_of(model, "all-linear")
    assert m2m("select", "--config", project / "images.yaml") == 0
    shape = json.loads((project / "out" / "final" / "adapter_config.json").read_text())
    assert shape["exclude_modules"] == r"(?!vision_model\.).*"
