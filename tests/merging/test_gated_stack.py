"""The gated stack is the parameter average: compared with weights that are set by code that shares nothing with it."""

import json
import re

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from pico import DEVICE, QUESTIONS, build_adapter, build_model
from safetensors.torch import load_file

from m2m_hf.errors import InputError
from m2m_hf.merging.adapter import Adapter
from m2m_hf.merging.gated_stack import GatedStack
from m2m_hf.scoring.forward import QuestionInputs, completion_logprobs, measure_gradient
from m2m_hf.scoring.packing import Question, Request

FAMILIES = ("llama", "qwen3", "gemma2", "gpt2")
VARIANTS = {
    "plain": {},
    "alpha": {"lora_alpha": 3},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "patterns": {"rank_pattern": {"v_proj|c_attn": 2}, "alpha_pattern": {"v_proj|c_attn": 7}},
}
MIXED = (  # adapters of different ranks and layers; with embeddings
    {"a": {"r": 2}, "b": {"r": 8, "target_modules": ["q_proj", "o_proj"]}, "c": {"layers_to_transform": [1]}},
    {name: {"target_modules": ["embed_tokens", "q_proj"]} for name in "abc"},
)
WEIGHTS = ({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}, {"a": 0.5, "c": 0.5}, {"a": 0.7, "b": 0.2, "c": 0.1}, {"b": 1.0}, {})
REQUESTS = [question.requests[0] for question in QUESTIONS]


def dense(family: str, folders: dict, weights: dict) -> torch.nn.Module:
    """W0 + Σ w ΔW, written into the weights of a fresh model; ΔW from the files, by the LoRA papers' formulas."""
    model = build_model(family)
    state = model.state_dict()
    for name, weight in weights.items():
        config = json.loads((folders[name] / "adapter_config.json").read_text())
        tensors = load_file(folders[name] / "adapter_model.safetensors")
        for key, a in tensors.items():
            found = re.fullmatch(r"base_model\.model\.(.+)\.lora_(embedding_)?A(\.weight)?", key)
            if not found:
                continue
            b = tensors[key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
            rank = a.shape[0]
            alpha = config["lora_alpha"]
            for pattern, value in config["alpha_pattern"].items():
                alpha = value if found[1].split(".")[-1] in pattern.split("|") else alpha
            scale = alpha / (rank**0.5 if config["use_rslora"] else rank)
            delta = scale * (b.double() @ a.double()).to(DEVICE)
            state[found[1] + ".weight"] += weight * (delta.T if family == "gpt2" or found[2] else delta)
    return model


def stacked(family: str, folders: dict, writes: bool | None = None) -> GatedStack:
    adapters = {name: Adapter.load(path) for name, path in folders.items()}
    return GatedStack(build_model(family), adapters, writes=writes)


def gated_logprobs(stack: GatedStack, weights: dict, requests: list[Request], budget: int = 64) -> list[float]:
    questions = [Question((request,)) for request in requests]
    return [values[0] for values in completion_logprobs(stack, [weights], questions, budget)[0]]


def plain_logprobs(model: torch.nn.Module, requests: list[Request]) -> list[float]:
    """One request at a time, full logits, no batching."""
    sums = []
    with torch.no_grad():
        for request in requests:
            ids = torch.tensor([request.ids], device=DEVICE)
            logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
            sums.append(sum(logprobs[i - 1, request.ids[i]].item() for i in range(request.start, len(request.ids))))
    return sums


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(family, variant) -> name -> adapter folder, made when first asked for."""
    made = {}

    def get(family: str, variant: str, **lora) -> dict:
        if (family, variant) not in made:
            root = tmp_path_factory.mktemp(f"{family}-{variant}")
            made[family, variant] = {
                name: build_adapter(family, root / name, seed, **lora) for seed, name in enumerate("abc")
            }
        return made[family, variant]

    return get


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gated_scores_equal_those_of_the_averaged_weights(folders, family, variant):
    paths = folders(family, variant, **VARIANTS[variant])
    stack = stacked(family, paths)
    seen = []
    for weights in WEIGHTS:
        gated = gated_logprobs(stack, weights, REQUESTS)
        expected = plain_logprobs(dense(family, paths, weights), REQUESTS)
        assert gated == pytest.approx(expected, abs=1e-5, rel=1e-5)
        seen.append(gated)
    assert max(abs(x - y) for x, y in zip(seen[0], seen[-1], strict=True)) > 0.1  # the adapters do something


@pytest.mark.parametrize("lora", MIXED, ids=["ranks and layers", "embeddings"])
def test_adapters_of_different_layers(tmp_path, lora):
    paths = {name: build_adapter("llama", tmp_path / name, seed, **lora[name]) for seed, name in enumerate("abc")}
    stack = stacked("llama", paths)
    for weights in WEIGHTS:
        expected = plain_logprobs(dense("llama", paths, weights), REQUESTS)
        assert gated_logprobs(stack, weights, REQUESTS) == pytest.approx(expected, abs=1e-5, rel=1e-5)


def products(model: torch.nn.Module) -> list[str]:
    """The linear layers whose product is not their own."""
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize("lora", [None, *MIXED], ids=["plain", "ranks and layers", "embeddings"])
def test_weights_that_are_written_layer_by_layer_are_the_average_too(tmp_path, folders, lora):
    paths = folders("llama", "plain")
    if lora:
        paths = {name: build_adapter("llama", tmp_path / name, seed, **lora[name]) for seed, name in enumerate("abc")}
    stack, gate = stacked("llama", paths, writes=True), stacked("llama", paths, writes=False)
    assert stack.writes
    assert not products(gate.model)
    assert products(stack.model)
    same = []
    for weights in WEIGHTS:
        found = gated_logprobs(stack, weights, REQUESTS)
        assert found == pytest.approx(plain_logprobs(dense("llama", paths, weights), REQUESTS), abs=1e-5, rel=1e-5)
        same.append(found == gated_logprobs(gate, weights, REQUESTS))
    assert same[-1]
    assert not all(same)  # by another product, but for the base model
    stack.detach()
    assert not products(stack.model)


def test_what_cannot_be_written_keeps_the_gate_and_so_do_all_on_a_cpu(folders):
    assert stacked("llama", folders("llama", "plain")).writes == (DEVICE == "cuda")
    paths = folders("gpt2", "plain")  # whose layers are no linear ones
    stack = stacked("gpt2", paths, writes=True)
    assert not stack.writes
    assert gated_logprobs(stack, WEIGHTS[0], REQUESTS) == gated_logprobs(stacked("gpt2", paths), WEIGHTS[0], REQUESTS)


@pytest.mark.parametrize("budget", [20, 60, 200, 10_000])
def test_whether_weights_are_written_follows_from_the_rows_and_not_from_the_company(folders, budget):
    paths = folders("llama", "plain")
    stack, gate = stacked("llama", paths, writes=True), stacked("llama", paths, writes=False)
    questions = [Question((request,)) for request in REQUESTS]
    tokens = sum(len(request.ids) for request in REQUESTS)

    def scores(of: GatedStack, mixtures: list[dict]) -> list:
        return completion_logprobs(of, mixtures, questions, budget)

    alone = [scores(stack, [weights])[0] for weights in WEIGHTS]
    if budget < 2 * tokens:  # one mixture fills a pass: asked with others it has the same score, bit for bit
        assert scores(stack, list(WEIGHTS)) == alone
        assert alone != [scores(gate, [weights])[0] for weights in WEIGHTS]
    else:  # rows of several mixtures are gated, and so is a mixture that is left over
        assert alone == [scores(gate, [weights])[0] for weights in WEIGHTS]
        assert scores(stack, list(WEIGHTS)) == scores(gate, list(WEIGHTS))


def test_gradients_pass_the_gate_after_weights_were_written(folders):
    paths = folders("llama", "plain")
    stack, gate = stacked("llama", paths, writes=True), stacked("llama", paths, writes=False)
    inputs = QuestionInputs([Question((request,)) for request in REQUESTS])
    gated_logprobs(stack, WEIGHTS[0], REQUESTS)
    slopes = [
        measure_gradient(one, WEIGHTS[2], inputs, range(5), 64, lambda row, values: [1.0]) for one in (stack, gate)
    ]
    assert slopes[0] == slopes[1]
    assert all(slopes[0][1].values())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_of_one_is_its_adapter(folders, family):
    paths = folders(family, "plain")
    stack = stacked(family, paths)
    loaded = PeftModel.from_pretrained(build_model(family), paths["b"]).eval()
    expected = plain_logprobs(loaded, REQUESTS)
    assert gated_logprobs(stack, {"b": 1.0}, REQUESTS) == pytest.approx(expected, abs=1e-5, rel=1e-5)


def test_order_history_and_batch_size_change_nothing(folders):
    paths = folders("llama", "plain")
    forward, backward = stacked("llama", paths), stacked("llama", dict(reversed(paths.items())))
    weights = WEIGHTS[2]
    gated_logprobs(backward, {"b": 1.0}, REQUESTS)
    reference = gated_logprobs(forward, weights, REQUESTS)
    assert gated_logprobs(backward, dict(reversed(weights.items())), REQUESTS) == reference
    for budget in (1, 30, 10_000):
        assert gated_logprobs(forward, weights, REQUESTS, budget) == pytest.approx(reference, abs=1e-5)
    again = gated_logprobs(forward, weights, [REQUESTS[i] for i in (3, 0, 4, 1, 2)])
    assert [again[i] for i in (1, 3, 4, 0, 2)] == pytest.approx(reference, abs=1e-5)


def test_detach_gives_the_base_back_untouched(folders):
    model = build_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = set(vars(model))
    stack = GatedStack(model, {name: Adapter.load(path) for name, path in folders("llama", "plain").items()})
    gated_logprobs(stack, WEIGHTS[0], REQUESTS)
    stack.detach()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert set(vars(model)) == attributes


def test_bf16_scores_are_as_near_to_exact_ones_as_bf16_allows(folders):
    """The stack in the base's own bf16 is no further from the exact average than the stack in fp32 on the same base would be."""
    paths = folders("llama", "plain")
    adapters = {name: Adapter.load(path) for name, path in paths.items()}
    exact = plain_logprobs(dense("llama", paths, WEIGHTS[0]), REQUESTS)
    rounded = plain_logprobs(dense("llama", paths, WEIGHTS[0]).to(torch.bfloat16), REQUESTS)
    gated, written = (
        gated_logprobs(
            GatedStack(build_model("llama").to(torch.bfloat16), adapters, writes=writes), WEIGHTS[0], REQUESTS
        )
        for writes in (False, True)
    )

    def distance(values: list[float]) -> float:
        return sum(abs(x - y) for x, y in zip(values, exact, strict=True)) / sum(map(abs, exact))

    assert distance(gated) < max(2 * distance(rounded), 3e-3)
    assert distance(written) < max(2 * distance(rounded), 3e-3)


@pytest.mark.parametrize(
    "lora",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"bias": "lora_only"},
        {"trainable_token_indices": [1, 2]},
    ],
)
def test_what_cannot_be_averaged_is_refused(tmp_path, lora):
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **lora)
    get_peft_model(build_model("llama"), config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"{next(iter(lora))}=.* cannot be averaged"):
        Adapter.load(tmp_path)


@pytest.mark.parametrize(("name", "value"), [("init_lora_weights", "pissa"), ("lora_bias", True), ("kasa_config", {})])
def test_what_a_configuration_file_says_is_refused(tmp_path, name, value):
    build_adapter("llama", tmp_path, 0)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {name: value}))
    with pytest.raises(InputError, match=f"{name}=.* cannot be averaged"):
        Adapter.load(tmp_path)


def test_other_kinds_of_adapters_are_refused(tmp_path):
    get_peft_model(build_model("llama"), LoHaConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="expected a LoRA adapter, got LOHA"):
        Adapter.load(tmp_path)


def test_adapters_of_another_base_and_names_of_no_adapter_are_refused(folders, tmp_path):
    with pytest.raises(InputError, match="another base model"):
        stacked("llama", {"a": build_adapter("gpt2", tmp_path, 0)})
    with pytest.raises(KeyError, match="nobody"):
        stacked("llama", folders("llama", "plain")).set({"nobody": 1.0})
