"""Full-parameter experts: kept without loss, averaged exactly in any order, merged by every method; the base is restored."""

import itertools
import random

import pytest
import torch
from pico import DEVICE, build_model, images, searcher
from safetensors.torch import load_file, save_file
from study_truth import surrogate_standings

from m2m_hf.core.mixture import Mixture
from m2m_hf.errors import InputError
from m2m_hf.merging.dense_stack import DenseStack, open_stack
from m2m_hf.merging.full_experts import DELTA_FILE, FullExpert, floats, save_delta
from m2m_hf.merging.methods import AVERAGE, MergeMethod

FAMILIES = ("llama", "gemma2", "gpt2")
DTYPES = (torch.float32, torch.bfloat16)
FULL = ("--expert", "full", "--learning_rate", "1e-3")


def fine_tuned(family: str, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    """The weights of a model that has moved a little from the base's."""
    draw = torch.Generator().manual_seed(seed)
    weights = floats(build_model(family).to(dtype))
    noise = {name: torch.randn(weight.shape, generator=draw).to(DEVICE) for name, weight in weights.items()}
    sizes = {name: 0.01 * (weight.float().abs().mean() + 0.01) for name, weight in weights.items()}
    return {name: (weight.float() + sizes[name] * noise[name]).to(dtype) for name, weight in weights.items()}


def same(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(weight, weights[name]) for name, weight in floats(model).items())


@pytest.fixture
def bank(tmp_path):
    """(family, dtype, how many) -> (checkpoints by name, experts by name)."""

    def make(family: str, dtype: torch.dtype, count: int) -> tuple[dict, dict]:
        before = floats(build_model(family).to(dtype))
        names = "abcdefgh"[:count]
        checkpoints = {name: fine_tuned(family, dtype, seed) for seed, name in enumerate(names)}
        for name, after in checkpoints.items():
            save_delta(tmp_path / name, before, after, "float32")
        return checkpoints, {name: FullExpert.load(tmp_path / name) for name in names}

    return make


@pytest.fixture
def expert(tmp_path):
    """(name, tensors) -> an expert with these differences."""

    def make(name: str, tensors: dict[str, torch.Tensor]) -> FullExpert:
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / DELTA_FILE)
        return FullExpert.load(tmp_path / name)

    return make


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_disk_loses_nothing(bank, dtype):
    checkpoints, experts = bank("llama", dtype, 1)
    model = build_model("llama").to(dtype)
    DenseStack(model, experts, AVERAGE).set({"a": 1.0})
    assert same(model, checkpoints["a"])


@pytest.fixture(params=[1 << 22, 2000], ids=["whole", "in blocks"])
def block(request, monkeypatch):
    """Merges whole weights, or blocks of rows."""
    monkeypatch.setattr("m2m_hf.merging.expert.BLOCK", request.param)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_model_is_the_average_of_the_checkpoints_in_any_order(bank, family, dtype):
    """Exact to the rounding of the weights' dtype, and the same bits whatever was merged before."""
    checkpoints, experts = bank(family, dtype, 4)
    model = build_model(family).to(dtype)
    before = {name: weight.clone() for name, weight in floats(model).items()}
    stack = DenseStack(model, experts, AVERAGE)
    subsets = [set(members) for size in range(1, 5) for members in itertools.combinations("abcd", size)] * 2
    random.Random(0).shuffle(subsets)
    seen: dict[frozenset, dict] = {}
    half = torch.finfo(dtype).eps / 2
    for members in subsets:
        stack.set(dict.fromkeys(members, 1 / len(members)))
        merged = {name: weight.detach().clone() for name, weight in floats(model).items()}
        first = seen.setdefault(frozenset(members), merged)
        for name, weight in merged.items():
            exact = torch.stack([checkpoints[member][name].double() for member in members]).mean(0)
            scale = torch.stack([checkpoints[member][name].double().abs() for member in members]).amax(0)
            # The dtype's rounding, and that of a mean whose summands are rounded to fp32.
            assert ((weight.double() - exact).abs() <= half * exact.abs() + 2e-7 * scale + 1e-10).all(), (name, members)
            assert torch.equal(weight, first[name]), (name, members)
    stack.detach()
    assert same(model, before)


def test_an_interrupted_mixture_leaves_no_trace_in_the_next(bank, monkeypatch):
    _, experts = bank("llama", torch.float32, 3)
    model, other = build_model("llama"), build_model("llama")
    stack = DenseStack(model, experts, AVERAGE)
    real, calls = FullExpert.delta, itertools.count()

    def stops(self, *args):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(FullExpert, "delta", stops)
        with pytest.raises(KeyboardInterrupt):
            stack.set({"a": 0.5, "b": 0.5})
    stack.detach()
    assert same(model, floats(other))
    stack.set({"b": 0.5, "c": 0.5})
    DenseStack(other, experts, AVERAGE).set({"b": 0.5, "c": 0.5})
    assert same(model, floats(other))


@pytest.mark.parametrize(
    ("method", "gates"),
    [(AVERAGE, {"a": 0.7, "c": 0.3}), (MergeMethod("task_arithmetic", 0.4), {"a": 0.4, "b": 0.4})],
)
def test_unequal_weights_and_task_arithmetic(bank, method, gates):
    checkpoints, experts = bank("llama", torch.float32, 3)
    model = build_model("llama")
    base = {name: weight.double() for name, weight in floats(model).items()}
    DenseStack(model, experts, method).set(gates)
    for name, weight in floats(model).items():
        deltas = [share * (checkpoints[key][name].double() - base[name]) for key, share in gates.items()]
        assert torch.allclose(weight.double(), base[name] + sum(deltas), rtol=1e-6, atol=1e-9), name


def vector(weights: dict) -> torch.Tensor:
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


@pytest.mark.parametrize("weights", [{"a": 0.5, "b": 0.5}, {"a": 0.6, "b": 0.1, "c": 0.3}])
def test_ties_is_that_of_the_paper_over_whole_task_vectors(bank, weights):
    checkpoints, experts = bank("gpt2", torch.float32, 3)
    model = build_model("gpt2")
    base = {name: weight.detach().clone() for name, weight in floats(model).items()}
    kept = {}
    for name in weights:
        delta = vector({key: checkpoints[name][key] - base[key] for key in base})
        threshold = delta.abs().topk(max(1, round(0.2 * len(delta)))).values[-1]
        kept[name] = torch.where(delta.abs() >= threshold, delta, 0.0)
    sign = sum(share * kept[name] for name, share in weights.items()).sign()
    agrees = {name: kept[name].sign() * sign > 0 for name in weights}
    mass = sum(share * agrees[name] for name, share in weights.items())
    total = sum(share * kept[name] * agrees[name] for name, share in weights.items())
    expected = torch.where(mass > 0, total / mass.clamp(min=1e-30), 0.0)
    DenseStack(model, experts, MergeMethod("ties", 1.0, 0.2)).set(weights)
    assert torch.allclose(vector({key: floats(model)[key].detach() - base[key] for key in base}), expected, atol=1e-6)


def test_each_expert_is_trimmed_and_dropped_on_its_own(expert):
    """Expert b changes two weights, a only one of them."""
    model = build_model("llama")
    before = floats(model)
    first, second = [name for name in before if "q_proj" in name][:2]
    draw = torch.Generator().manual_seed(0)
    change = {name: torch.randn(before[name].shape, generator=draw) for name in (first, second)}
    experts = {"a": expert("a", {first: change[first]}), "b": expert("b", change)}
    stack = DenseStack(model, experts, MergeMethod("ties", density=0.5))
    for name, changed_weights in (("a", (first,)), ("b", (first, second))):
        entries = torch.cat([change[key].abs().flatten() for key in changed_weights]).sort(descending=True).values
        assert stack._threshold(name) == float(entries[len(entries) // 2 - 1])
    stack.detach()
    stack = DenseStack(model, experts, MergeMethod("dare", density=0.5))
    start = {name: before[name].detach().clone() for name in change}
    masks = []
    for expert_name, name in (("a", first), ("b", first), ("b", second)):
        stack.set({expert_name: 1.0})
        masks.append((before[name].detach() - start[name]).abs() > 1e-6)
    assert not torch.equal(masks[0], masks[1])  # every expert drops others
    assert not torch.equal(masks[1], masks[2])  # and in every layer


def test_running_statistics_are_averaged_by_every_method_and_never_trimmed(pictures_of, resnet):
    run = images(pictures_of(resnet, "all-linear"), *FULL)
    run.train_adapters()
    experts = run.run.bank.load()
    before = {name: tensor.clone() for name, tensor in run.run.base.model.named_buffers()}
    assert any("running_var" in name for name in experts["warm"].shapes)
    for method in (
        MergeMethod("task_arithmetic", scaling=3.0), MergeMethod("dare", density=0.2), MergeMethod("ties", density=0.1),
        MergeMethod(),
    ):  # fmt: skip
        stack = DenseStack(run.run.base.model, experts, method)
        for weights in ({"warm": 0.5, "cold": 0.5}, {"warm": 0.25, "cold": 0.75}, {"warm": 1.0}):
            stack.set(method.gates(weights))
            now = dict(run.run.base.model.named_buffers())
            for name in (name for name in before if "running" in name):
                expected = before[name].cpu() + sum(
                    share * experts[part].delta(name) for part, share in weights.items()
                )
                assert torch.allclose(now[name].cpu(), expected, atol=1e-6), (method, weights, name)
        if method.name == "ties":
            warm = experts["warm"]
            learned = torch.cat([warm.delta(name).abs().flatten() for name in warm.shapes if "running" not in name])
            kept = max(1, round(0.1 * len(learned)))
            assert stack._threshold("warm") == float(learned.sort(descending=True).values[kept - 1])
        stack.detach()
        assert all(torch.equal(tensor, before[name]) for name, tensor in run.run.base.model.named_buffers())


def test_a_search_scores_by_several_methods_and_restores_the_base(intents):
    run = searcher(intents, *FULL)
    before = {name: tensor.clone() for name, tensor in floats(run.run.base.model).items()}
    run.search()
    mixtures = [Mixture.subset(["noise"]), Mixture.subset(["colours", "noise"])]
    for method in (MergeMethod("ties"), MergeMethod()):
        assert len(surrogate_standings(run.run, mixtures, method=method)) == 2
    with pytest.raises(InputError, match="full experts have none"):
        surrogate_standings(run.run, mixtures, method=MergeMethod("linear"))
    run.search()
    run.run.base.close_stack()
    assert same(run.run.base.model, before)


@pytest.mark.parametrize(
    ("dtype", "least", "most"), [("float32", 0, 0), ("bfloat16", 1e-4, 4e-3), ("float16", 0, 1e-3)]
)
def test_a_smaller_dtype_reports_what_it_loses(tmp_path, dtype, least, most):
    before = floats(build_model("llama"))
    kept = save_delta(tmp_path, before, fine_tuned("llama", torch.float32, 1), dtype)
    assert least <= kept["lost"] <= most
    assert kept["dtype"] == dtype
    assert kept["parameters"] == sum(one.numel() for one in before.values())
    assert {one.dtype for one in load_file(tmp_path / DELTA_FILE).values()} == {getattr(torch, dtype)}


@pytest.mark.parametrize(("change", "words"), [(1e6, "cannot hold what was learned of w"), (1e-9, "keeps nothing")])
def test_a_change_that_its_dtype_cannot_hold_is_refused(tmp_path, change, words):
    with pytest.raises(InputError, match=f"delta_dtype: float16 {words}"):
        save_delta(tmp_path, {"w": torch.zeros(2)}, {"w": torch.tensor([0.0, change])}, "float16")


def test_unchanged_weights_are_left_out_and_shared_ones_written_once(bank, tmp_path):
    before = floats(build_model("llama"))
    after = dict(before) | {"model.norm.weight": before["model.norm.weight"] + 1}
    save_delta(tmp_path, before, after, "float32")
    assert list(load_file(tmp_path / DELTA_FILE)) == ["model.norm.weight"]
    _, experts = bank("gpt2", torch.float32, 1)  # which has one tensor for its embeddings and its head
    assert "lm_head.weight" not in experts["a"].shapes


def test_another_base_is_refused(bank, expert):
    _, experts = bank("llama", torch.float32, 1)
    with pytest.raises(InputError, match="another base model"):
        open_stack(build_model("gpt2"), experts, AVERAGE)
    model = build_model("llama")
    name = next(name for name, weight in floats(model).items() if weight.ndim == 2)
    with pytest.raises(InputError, match=r"of shape \(3, 3\), which LlamaForCausalLM does not have"):
        open_stack(model, {"other": expert("other", {name: torch.ones(3, 3)})}, AVERAGE)


def test_a_file_that_is_no_expert_is_refused(expert, tmp_path):
    (tmp_path / DELTA_FILE).write_bytes(b"not safetensors")
    with pytest.raises(InputError, match="full-parameter expert"):
        FullExpert.load(tmp_path)
    with pytest.raises(InputError, match="expected floating-point numbers, got I64"):
        expert("whole", {"w": torch.ones(2, dtype=torch.int64)})


@pytest.mark.parametrize("place", [(0, 0), (7, 3)])
def test_numbers_that_are_not_finite_are_found_in_every_block(expert, monkeypatch, place):
    monkeypatch.setattr("m2m_hf.merging.expert.BLOCK", 8)
    spoiled = torch.full((8, 4), 1e-3)
    spoiled[place] = torch.nan
    with pytest.raises(InputError, match=r"b/delta.safetensors: not all numbers of w are finite"):
        expert("b", {"w": spoiled})
