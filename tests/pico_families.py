"""Configurations of pico models, one of each family."""

from dataclasses import dataclass, field

from pico import BERT, RGB, SHAPE

IDS = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
DENSE = IDS | {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}  # fmt: skip
HEADS = DENSE | {"head_dim": 8}
GPT = IDS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
OLD = {name: value for name, value in DENSE.items() if name != "num_key_value_heads"}
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = ROUTED | {
    "num_key_value_heads": 4, "n_routed_experts": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 16}
LINEAR = {
    "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 2, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [1.5, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 32,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 8.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32}
PER_LAYER = {"vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}
NAMES = {"id2label": dict(enumerate(RGB)), "label2id": {name: place for place, name in enumerate(RGB)}}
VISION = SHAPE | {"image_size": 8, "patch_size": 4}
BERT = BERT | {"max_position_embeddings": 160}
TOWER = SHAPE | {
    "vocab_size": 320,
    "max_position_embeddings": 40,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "bos_token_id": 1,
}


@dataclass(frozen=True)
class Family:
    """A family, its configuration, and the class of transformers that makes its model."""

    name: str
    kind: str  # model_type
    config: dict = field(default_factory=dict)
    loads: str = "AutoModelForCausalLM"
    task: str = "causal_lm"


def causal(name: str, kind: str, config: dict, **more) -> Family:
    return Family(name, kind, config | more)


CAUSAL = [
    causal("Llama", "llama", HEADS),
    causal("Llama, dynamic NTK", "llama", HEADS, max_position_embeddings=32, rope_parameters=DYNAMIC),
    causal("Llama, YaRN", "llama", HEADS, rope_parameters=YARN),
    causal("Llama 4", "llama4_text", HEADS, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=64),
    causal("Mistral, sliding window", "mistral", HEADS, sliding_window=16),
    causal("Mixtral", "mixtral", HEADS, num_local_experts=4),
    causal("Qwen2, sliding window", "qwen2", DENSE, use_sliding_window=True, sliding_window=16, max_window_layers=1),
    causal("Qwen2-MoE", "qwen2_moe", DENSE | ROUTED, num_experts=4, shared_expert_intermediate_size=16),
    causal("Qwen3", "qwen3", HEADS),
    causal("Qwen3-MoE", "qwen3_moe", HEADS | ROUTED, num_experts=4),
    causal("Qwen3-Next", "qwen3_next", HEADS | ROUTED | LINEAR, num_experts=4, shared_expert_intermediate_size=16),
    causal("Qwen3.5", "qwen3_5_text", HEADS | LINEAR),
    causal("Gemma", "gemma", HEADS),
    causal("Gemma 2", "gemma2", HEADS, query_pre_attn_scalar=8, sliding_window=16),
    causal("Gemma 3", "gemma3_text", HEADS | SLIDING, query_pre_attn_scalar=8),
    causal(
        "Gemma 3n", "gemma3n_text", HEADS | SLIDING | PER_LAYER, altup_num_inputs=2, laurel_rank=4,
        intermediate_size=[48, 48], activation_sparsity_pattern=[0.0, 0.0],
    ),
    causal("Gemma 4", "gemma4_text", HEADS | SLIDING | PER_LAYER, global_head_dim=8),
    causal(
        "RecurrentGemma", "recurrent_gemma", DENSE, lru_width=32, attention_window_size=16,
        block_types=["recurrent", "attention"],
    ),
    causal("Phi", "phi", DENSE, partial_rotary_factor=0.5),
    causal("Phi-3", "phi3", DENSE),
    causal("Phi-3, longrope", "phi3", DENSE, original_max_position_embeddings=32, rope_parameters=LONGROPE),
    causal("PhiMoE", "phimoe", DENSE, num_local_experts=4),
    causal("GPT-2", "gpt2", GPT),
    causal(
        "GPT-Neo", "gpt_neo", IDS, hidden_size=32, num_layers=2, num_heads=4, window_size=8,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=256,
    ),
    causal("GPT-NeoX", "gpt_neox", OLD),
    causal("GPT-J", "gptj", GPT, rotary_dim=4),
    causal("GPT-BigCode", "gpt_bigcode", GPT),
    causal("gpt-oss", "gpt_oss", HEADS, num_local_experts=4, num_experts_per_tok=2, sliding_window=16),
    causal("CodeGen", "codegen", GPT, rotary_dim=4),
    causal("OPT", "opt", OLD, ffn_dim=48, word_embed_proj_dim=32, pad_token_id=1),
    causal("Bloom", "bloom", IDS, hidden_size=32, n_layer=2, n_head=4),
    causal("MPT", "mpt", IDS, d_model=32, n_layers=2, n_heads=4, max_seq_len=256),
    causal("Falcon", "falcon", OLD, alibi=False),
    causal("Falcon-H1", "falcon_h1", DENSE, mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8),
    causal("StableLM", "stablelm", DENSE),
    causal("OLMo 2", "olmo2", DENSE),
    causal("OLMo 3", "olmo3", DENSE | SLIDING),
    causal("OLMoE", "olmoe", DENSE, num_experts=4, num_experts_per_tok=2),
    causal("Cohere", "cohere", DENSE, logit_scale=1.0),
    causal("Cohere 2", "cohere2", DENSE | SLIDING, logit_scale=1.0),
    causal("Granite", "granite", DENSE),
    causal("Granite-MoE", "granitemoe", DENSE, num_local_experts=4),
    causal(
        "Granite 4", "granitemoehybrid", DENSE | MAMBA, shared_intermediate_size=48, num_local_experts=0,
        layer_types=["mamba", "attention"], num_experts_per_tok=0,
    ),
    causal(
        "Granite 4, MoE", "granitemoehybrid", DENSE | MAMBA, shared_intermediate_size=48, num_local_experts=4,
        layer_types=["mamba", "attention"],
    ),
    causal("SmolLM3", "smollm3", DENSE),
    causal("StarCoder2", "starcoder2", DENSE),
    causal("GLM-4", "glm4", HEADS),
    causal("GLM-4-MoE", "glm4_moe", HEADS | ROUTED, n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1),
    causal("LFM2", "lfm2", DENSE, layer_types=["conv", "full_attention"], block_ff_dim=48),
    causal(
        "Jamba", "jamba", DENSE, num_experts=4, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
        expert_layer_offset=1, mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False,
    ),
    causal("Bamba", "bamba", DENSE | MAMBA, attn_layer_indices=[1]),
    causal(
        "Zamba2", "zamba2", DENSE, mamba_d_state=8, mamba_headdim=8, n_mamba_heads=8, mamba_ngroups=1, num_mem_blocks=1,
        adapter_rank=4, layers_block_type=["mamba", "hybrid"], num_key_value_heads=4,
    ),
    causal("Mamba", "mamba", IDS, hidden_size=32, state_size=8, num_hidden_layers=2, time_step_rank=4),
    causal("Mamba 2", "mamba2", IDS, hidden_size=32, state_size=8, num_hidden_layers=2, num_heads=8, head_dim=8, n_groups=1),
    causal(
        "Nemotron-H", "nemotron_h", HEADS, hybrid_override_pattern="M*", mamba_num_heads=8, mamba_head_dim=8, n_groups=1,
        ssm_state_size=8,
    ),
    causal("DeepSeek V2", "deepseek_v2", DENSE | LATENT),
    causal("DeepSeek V3", "deepseek_v3", DENSE | LATENT),
    causal("MiniMax", "minimax", HEADS, num_local_experts=4, block_size=8),
    causal("JetMoE", "jetmoe", DENSE, kv_channels=8, num_local_experts=4, num_experts_per_tok=2),
    causal("RWKV", "rwkv", IDS, context_length=256, hidden_size=32, num_hidden_layers=2),
    causal("Seed-OSS", "seed_oss", HEADS),
    causal("ERNIE 4.5", "ernie4_5", HEADS),
    causal("EXAONE 4", "exaone4", DENSE, sliding_window=16, sliding_window_pattern=2),
    causal("Hunyuan", "hunyuan_v1_dense", HEADS),
    causal("Arcee", "arcee", HEADS),
    causal("Apertus", "apertus", DENSE),
    causal("BioGPT", "biogpt", OLD),
]  # fmt: skip
SENTENCES, PICTURES = "sequence_classification", "image_classification"
OWN = {SENTENCES: "AutoModelForSequenceClassification", PICTURES: "AutoModelForImageClassification"}


def classifier(name: str, kind: str, task: str, config: dict, **more) -> Family:
    """One with a head of its own where the configuration names labels, or whose head is made of the labels' names."""
    return Family(name, kind, config | more, OWN[task] if "id2label" in config else "AutoModel", task)


TEXTS = [
    classifier("BERT", "bert", SENTENCES, BERT),
    classifier("BERT, own classifier", "bert", SENTENCES, BERT | NAMES),
    classifier("RoBERTa", "roberta", SENTENCES, BERT, pad_token_id=1),
    classifier("MPNet", "mpnet", SENTENCES, BERT, pad_token_id=1),
    classifier("ALBERT", "albert", SENTENCES, BERT, embedding_size=16),
    classifier(
        "DistilBERT", "distilbert", SENTENCES, {"vocab_size": 320}, dim=32, hidden_dim=48, n_layers=2, n_heads=2
    ),
    classifier("ModernBERT", "modernbert", SENTENCES, BERT | IDS, local_attention=8),
    classifier("DeBERTa-v2", "deberta-v2", SENTENCES, BERT),
    classifier("ELECTRA", "electra", SENTENCES, BERT, embedding_size=16),
    classifier("Qwen3, own classifier", "qwen3", SENTENCES, HEADS | NAMES),
]
SWIN = {"image_size": 8, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}
CONVNEXT = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2, "layer_scale_init_value": 1.0}
SIGLIP = {"vision_config": VISION, "text_config": SHAPE | {"vocab_size": 320, "projection_size": 16}}
CLIP = {"vision_config": VISION | {"projection_dim": 12}, "text_config": TOWER | {"projection_dim": 12}}
IMAGES = [
    classifier("ViT", "vit", PICTURES, VISION | NAMES),
    classifier("DINOv2", "dinov2", PICTURES, VISION | NAMES),
    classifier("Swin", "swin", PICTURES, SWIN | NAMES),
    classifier("ConvNeXt", "convnext", PICTURES, CONVNEXT | NAMES),
    classifier("SigLIP, own classifier", "siglip", PICTURES, SIGLIP | NAMES),
    classifier("CLIP, own classifier", "clip", PICTURES, CLIP | NAMES),
    classifier("SigLIP", "siglip", PICTURES, SIGLIP),
    classifier("CLIP", "clip", PICTURES, CLIP, projection_dim=12),
]
SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
MARKS = {"image_token_id": 310, "video_token_id": 311, "vision_start_token_id": 312, "vision_end_token_id": 313}
QWEN = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 8, "out_hidden_size": 32}


def both(name: str, kind: str, text: dict, vision: dict, **more) -> Family:
    """One that reads texts and images, of which only texts are trained and scored."""
    return Family(name, kind, {"text_config": text, "vision_config": vision} | more, "AutoModelForImageTextToText")


VISION_LANGUAGE = [
    both("Qwen2.5-VL", "qwen2_5_vl", DENSE | {"rope_parameters": SECTIONS}, QWEN | {"fullatt_block_indexes": [0]}, **MARKS),
    both(
        "Qwen3-VL", "qwen3_vl", HEADS | {"rope_parameters": SECTIONS | {"mrope_interleaved": True}},
        QWEN | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}, **MARKS,
    ),
    both("Gemma 3, vision", "gemma3", HEADS, VISION),
    both(
        "Mistral 3", "mistral3", HEADS | {"model_type": "mistral"}, VISION | {"model_type": "pixtral", "head_dim": 8},
        image_token_index=310,
    ),
    both("LLaVA", "llava", DENSE | {"model_type": "llama"}, VISION | {"model_type": "clip_vision_model"}, image_token_index=310),
    both("SmolVLM", "smolvlm", DENSE | {"model_type": "llama"}, VISION, image_token_id=310),
]  # fmt: skip
FAMILIES = {one.name: one for one in [*CAUSAL, *VISION_LANGUAGE, *TEXTS, *IMAGES]}
