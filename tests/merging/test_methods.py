"""Merge methods on dense deltas, against formulas written down again over whole flattened task vectors, and against PEFT."""

import pytest
import torch
from peft import PeftModel
from pico import DEVICE, QUESTIONS, build_adapter, build_model

from m2m_hf.config.run_config import MERGE_PARAMETERS
from m2m_hf.errors import InputError
from m2m_hf.merging.adapter import Adapter
from m2m_hf.merging.dense_stack import DenseStack
from m2m_hf.merging.gated_stack import GatedStack
from m2m_hf.merging.methods import MergeMethod, dare, kth_largest
from m2m_hf.scoring.forward import completion_logprobs

FAMILIES = ("llama", "gemma2", "gpt2")
HALF = {"a": 0.5, "b": 0.5}
THIRDS = dict.fromkeys("abc", 1 / 3)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """family -> name -> adapter; made once."""
    made: dict = {}

    def get(family: str, **lora) -> dict:
        key = family, *sorted(lora.items())
        if key not in made:
            root = tmp_path_factory.mktemp(family)
            made[key] = {
                name: Adapter.load(build_adapter(family, root / name, seed, **lora)) for seed, name in enumerate("abc")
            }
        return made[key]

    return get


def task_vectors(of: dict) -> dict[str, torch.Tensor]:
    """Name -> the whole delta of that adapter as one vector, from the factors."""
    vectors = {}
    for name, adapter in of.items():
        deltas = [scale * (b @ a) for _, (a, b, scale) in sorted(adapter.parts().items())]
        vectors[name] = torch.cat([delta.flatten() for delta in deltas])
    return vectors


def merged_vector(family: str, of: dict, method: MergeMethod, weights: dict) -> torch.Tensor:
    """What a stack writes, as one vector in the order of the modules."""
    model = build_model(family)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    stack = DenseStack(model, of, method)
    stack.set(weights)
    state = dict(model.named_parameters())
    modules = sorted(next(iter(of.values())).parts())
    parts = [state[f"{module}.weight"].detach() - before[f"{module}.weight"] for module in modules]
    return torch.cat([(part.T if family == "gpt2" else part).flatten() for part in parts]).cpu()


def test_the_kth_largest_magnitude_is_exact():
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(40, 30, generator=generator) * 10.0**power for power in (-6, 0, 3)]
    tensors.append(torch.tensor([[0.5, -0.5, 0.0, 0.5]]))
    everything = torch.cat([tensor.abs().flatten() for tensor in tensors]).sort(descending=True).values
    for k in (1, 2, 100, 1200, 1201, len(everything) - 1, len(everything)):
        assert kth_largest(lambda: iter(tensors), k) == everything[k - 1].item()


@pytest.mark.parametrize("family", FAMILIES)
def test_ties_is_that_of_the_paper(family, adapters):
    of = adapters(family)
    vectors = task_vectors(of)
    kept = {}
    for name, vector in vectors.items():
        count = max(1, round(0.3 * len(vector)))
        threshold = vector.abs().sort(descending=True).values[count - 1]
        kept[name] = torch.where(vector.abs() >= threshold, vector, 0.0)
    for weights in (THIRDS, HALF, {"b": 1.0}):
        stacked = torch.stack([kept[name] for name in weights])
        elected = stacked.sum(0).sign()
        agree = (stacked.sign() == elected) & (stacked != 0)
        expected = 1.5 * torch.where(agree, stacked, 0.0).sum(0) / agree.sum(0).clamp(min=1)
        found = merged_vector(family, of, MergeMethod("ties", scaling=1.5, density=0.3), weights)
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


def test_dare_keeps_the_expectation_and_an_adapters_mask(adapters):
    of = adapters("llama")
    delta = torch.ones(300, 300)
    assert dare(delta, 0.2, "0f").mean().item() == pytest.approx(1.0, abs=0.03)
    assert set(dare(delta, 0.2, "0f").unique().tolist()) == {0.0, 5.0}
    alone, other = (merged_vector("llama", of, MergeMethod("dare", density=0.5, seed=1), {n: 1.0}) for n in "ab")
    both = merged_vector("llama", of, MergeMethod("dare", density=0.5, seed=1), HALF)
    torch.testing.assert_close(both, (alone + other) / 2, atol=1e-6, rtol=1e-5)  # the same masks in any company
    assert not torch.equal(alone, merged_vector("llama", of, MergeMethod("dare", density=0.5, seed=2), {"a": 1.0}))
    vectors = task_vectors(of)
    everything = merged_vector("llama", of, MergeMethod("dare", density=1.0), THIRDS)
    torch.testing.assert_close(everything, torch.stack(list(vectors.values())).mean(0), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("lora", [{}, {"lora_alpha": 3}])
def test_linear_is_what_peft_does(lora, adapters, tmp_path):
    folders = {name: build_adapter("llama", tmp_path / name, seed, **lora) for seed, name in enumerate("ab")}
    model = PeftModel.from_pretrained(build_model("llama"), folders["a"], adapter_name="a")
    model.load_adapter(folders["b"], adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "merged", combination_type="linear")
    model.set_adapter("merged")
    theirs = model.merge_and_unload()
    ours = build_model("llama")
    DenseStack(ours, {name: Adapter.load(folder) for name, folder in folders.items()}, MergeMethod("linear")).set(HALF)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, atol=1e-6, rtol=1e-5)


def test_task_arithmetic_adds_scaled_deltas(adapters):
    of = adapters("llama")
    method = MergeMethod("task_arithmetic", scaling=0.4)
    assert method.gated
    assert method.gates({"a": 1.0}) == pytest.approx({"a": 0.4})
    assert MergeMethod().gates(THIRDS) == THIRDS
    gated = GatedStack(build_model("llama"), of)
    ours = completion_logprobs(gated, [method.gates(THIRDS)], QUESTIONS, 64)[0]
    dense = build_model("llama")
    with torch.no_grad():
        for module in of["a"].parts():
            for adapter in of.values():
                a, b, scale = adapter.parts()[module]
                dense.get_submodule(module).weight += 0.4 * scale * (b @ a).to(DEVICE)
    exact = completion_logprobs(GatedStack(dense, of), [{}], QUESTIONS, 64)[0]
    assert [one for (one,) in ours] == pytest.approx([one for (one,) in exact], abs=2e-4)


def test_labels_tell_methods_apart():
    assert MergeMethod().label == "merged"
    assert MergeMethod.of("task_arithmetic", {}, seed=7).label == "task_arithmetic(scaling=0.4)"
    assert MergeMethod.of("ties", {"density": 0.5}, seed=7).label == "ties(scaling=1, density=0.5)"
    assert MergeMethod.of("dare", {}, seed=7).label == "dare(density=0.5, seed=7)"


@pytest.mark.parametrize("name", [name for name in MERGE_PARAMETERS if not MergeMethod(name).gated])
def test_the_base_model_is_given_back_bit_for_bit(name, adapters):
    model = build_model("llama").to(torch.bfloat16)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    stack = DenseStack(model, adapters("llama"), MergeMethod(name, density=0.5))
    for weights in (THIRDS, {"b": 1.0}, HALF):
        stack.set(weights)
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())
    first = {key: value.clone() for key, value in model.state_dict().items()}
    stack.set({"c": 1.0})
    stack.set(HALF)
    assert all(torch.equal(value, first[key]) for key, value in model.state_dict().items())  # nothing of before is left
    stack.set({})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    stack.set(HALF)
    stack.detach()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_embeddings_are_merged_too_unless_they_are_the_output_head(tmp_path):
    of = {
        name: Adapter.load(build_adapter("llama", tmp_path / name, seed, target_modules=["embed_tokens", "q_proj"]))
        for seed, name in enumerate("ab")
    }
    model = build_model("llama")
    stack = DenseStack(model, of, MergeMethod("dare", density=1.0))
    ours = completion_logprobs(stack, [HALF], QUESTIONS, 64)[0]
    stack.detach()
    gated = GatedStack(model, of)
    exact = completion_logprobs(gated, [HALF], QUESTIONS, 64)[0]
    gated.detach()
    assert [one for (one,) in ours] == pytest.approx([one for (one,) in exact], abs=2e-4)
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(InputError, match="another layer shares"):
        DenseStack(model, of, MergeMethod("dare", density=1.0))


def test_linear_refuses_adapters_of_different_rank(adapters, tmp_path):
    of = {**adapters("llama"), "b": Adapter.load(build_adapter("llama", tmp_path / "b", 1, r=2))}
    with pytest.raises(InputError, match="one rank"):
        DenseStack(build_model("llama"), of, MergeMethod("linear")).set(HALF)
