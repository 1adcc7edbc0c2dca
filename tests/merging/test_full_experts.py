"""Full-parameter experts: kept without loss, averaged exactly in any order, merged by every method, gone without a trace."""

import itertools
import random

import pytest
import torch
import yaml
from datasets import load_dataset
from pico import build_model, m2m
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from m2m_hf.core.mixture import Mixture, gray_code_order
from m2m_hf.errors import InputError
from m2m_hf.merging.dense_stack import DenseStack, open_stack
from m2m_hf.merging.full_experts import DELTA_FILE, Delta, floats, save_delta
from m2m_hf.merging.methods import MergeMethod, dare

AVERAGE = MergeMethod()
FAMILIES = ("llama", "gemma2", "gpt2")
DTYPES = (torch.float32, torch.bfloat16)


def fine_tuned(family: str, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    """The weights of a model that has moved a little from the base's."""
    draw = torch.Generator().manual_seed(seed)
    base = floats(build_model(family).to(dtype))
    return {
        name: (one.float() + 0.01 * torch.randn(one.shape, generator=draw) * (one.float().abs().mean() + 0.01)).to(
            dtype
        )
        for name, one in base.items()
    }


@pytest.fixture
def bank(tmp_path):
    """(family, dtype, how many) -> (checkpoints by name, experts by name)."""

    def make(family: str, dtype: torch.dtype, count: int) -> tuple[dict, dict]:
        before = floats(build_model(family).to(dtype))
        names = "abcdefgh"[:count]
        checkpoints = {name: fine_tuned(family, dtype, seed) for seed, name in enumerate(names)}
        for name, after in checkpoints.items():
            save_delta(tmp_path / name, before, after, torch.float32)
        return checkpoints, {name: Delta(tmp_path / name) for name in names}

    return make


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_lost_on_the_disk(bank, tmp_path, dtype):
    checkpoints, experts = bank("llama", dtype, 1)
    model = build_model("llama").to(dtype)
    stack = DenseStack(model, experts, AVERAGE, tmp_path)
    stack.set({"a": 1.0})
    for name, weight in floats(model).items():
        assert torch.equal(weight, checkpoints["a"][name]), name


@pytest.fixture(params=[1 << 22, 2000], ids=["whole", "in blocks"])
def block(request, monkeypatch):
    """Weights that are worked on as they are, and rows at a time."""
    monkeypatch.setattr("m2m_hf.merging.full_experts.BLOCK", request.param)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_model_is_the_average_of_the_checkpoints_in_any_order(bank, tmp_path, family, dtype):
    """To the rounding of the weights' own dtype, after any number of candidates; and to the bit the same whatever came before."""
    checkpoints, experts = bank(family, dtype, 5)
    model = build_model(family).to(dtype)
    stack = DenseStack(model, experts, AVERAGE, tmp_path)
    subsets = [set(one) for size in range(1, 6) for one in itertools.combinations("abcde", size)] * 2
    random.Random(0).shuffle(subsets)
    seen: dict[frozenset, dict] = {}
    half = torch.finfo(dtype).eps / 2
    for members in subsets:
        stack.set(dict.fromkeys(members, 1 / len(members)))
        found = {name: weight.detach().clone() for name, weight in floats(model).items()}
        again = seen.setdefault(frozenset(members), found)
        for name, weight in found.items():
            exact = torch.stack([checkpoints[one][name].double() for one in members]).mean(0)
            scale = torch.stack([checkpoints[one][name].double().abs() for one in members]).amax(0)
            # Rounding to the dtype, and of a mean whose summands are rounded to fp32.
            assert ((weight.double() - exact).abs() <= half * exact.abs() + 2e-7 * scale + 1e-10).all(), (name, members)
            assert torch.equal(weight, again[name]), (name, members)


@pytest.mark.usefixtures("block")
def test_detached_it_leaves_the_base_and_no_files(bank, tmp_path):
    _, experts = bank("llama", torch.float32, 2)
    model = build_model("llama")
    before = {name: one.clone() for name, one in floats(model).items()}
    scratch = tmp_path / "scratch"
    stack = DenseStack(model, experts, AVERAGE, scratch)
    stack.set({"a": 0.5, "b": 0.5})
    assert list(scratch.rglob("*.safetensors"))
    assert any(not torch.equal(one, before[name]) for name, one in floats(model).items())
    stack.detach()
    assert all(torch.equal(one, before[name]) for name, one in floats(model).items())
    assert not list(scratch.iterdir())


def test_sums_interrupted_halfway_are_made_anew(bank, tmp_path, monkeypatch):
    checkpoints, experts = bank("llama", torch.float32, 3)
    model = build_model("llama")
    stack = DenseStack(model, experts, AVERAGE, tmp_path)
    stack.set({"a": 1.0})
    real, calls = Delta.delta, itertools.count()

    def stops(self, *args, **more):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *args, **more)

    monkeypatch.setattr(Delta, "delta", stops)
    with pytest.raises(KeyboardInterrupt):
        stack.set({"a": 0.5, "b": 0.5})
    monkeypatch.setattr(Delta, "delta", real)
    stack.set({"b": 0.5, "c": 0.5})
    for name, weight in floats(model).items():
        exact = (checkpoints["b"][name].double() + checkpoints["c"][name].double()) / 2
        assert torch.allclose(weight.double(), exact, rtol=1e-6, atol=1e-9), name


def test_a_neighbour_costs_the_reading_of_one_expert(bank, tmp_path, monkeypatch):
    _, experts = bank("llama", torch.float32, 5)
    stack = DenseStack(build_model("llama"), experts, AVERAGE, tmp_path)
    read: list[str] = []
    real = Delta.delta

    def spy(self, *args, **more):
        read.append(self.path.parent.name)
        return real(self, *args, **more)

    monkeypatch.setattr(Delta, "delta", spy)
    every = gray_code_order(
        Mixture.subset(one) for size in range(1, 6) for one in itertools.combinations("abcde", size)
    )
    tensors = len(experts["a"].shapes)
    for mixture in every:
        stack.set(mixture.weights)
    # Singles are read by themselves, and what comes behind one differs from the sums by two: not 80, which is how many experts
    # all subsets have together.
    assert len(read) <= tensors * (len(every) + len(experts))


def test_all_subsets_are_walked_through_by_single_steps():
    every = [Mixture.subset(one) for size in range(1, 7) for one in itertools.combinations("abcdef", size)]
    walked = gray_code_order(random.Random(1).sample(every, len(every)))
    assert sorted(walked, key=str) == sorted(every, key=str)
    assert all(len(set(one.names) ^ set(two.names)) == 1 for one, two in itertools.pairwise(walked))


def test_unequal_weights_and_task_arithmetic(bank, tmp_path):
    checkpoints, experts = bank("llama", torch.float32, 3)
    base = {name: one.double() for name, one in floats(build_model("llama")).items()}
    for method, gates in ((AVERAGE, {"a": 0.7, "c": 0.3}), (MergeMethod("task_arithmetic", 0.4), {"a": 0.4, "b": 0.4})):
        model = build_model("llama")
        stack = DenseStack(model, experts, method, tmp_path)
        stack.set(gates)
        for name, weight in floats(model).items():
            exact = base[name] + sum(
                share * (checkpoints[one][name].double() - base[name]) for one, share in gates.items()
            )
            assert torch.allclose(weight.double(), exact, rtol=1e-6, atol=1e-9), (method, name)


def whole(weights: dict) -> torch.Tensor:
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


@pytest.mark.parametrize("weights", [{"a": 0.5, "b": 0.5}, {"a": 0.6, "b": 0.1, "c": 0.3}])
def test_ties_and_dare_and_svd_work_on_the_deltas_themselves(bank, tmp_path, weights):
    checkpoints, experts = bank("gpt2", torch.float32, 3)
    base = {name: one.detach().clone() for name, one in floats(build_model("gpt2")).items()}
    delta = {name: {key: after[key] - base[key] for key in base} for name, after in checkpoints.items()}

    def merged(method: MergeMethod) -> torch.Tensor:
        model = build_model("gpt2")
        stack = DenseStack(model, experts, method, tmp_path)
        stack.set(weights)
        found = whole({key: floats(model)[key].detach() - base[key] for key in base})
        stack.detach()
        assert all(torch.equal(one, base[key]) for key, one in floats(model).items())
        return found

    # TIES (Yadav et al., 2023), over whole task vectors.
    vectors = {name: whole(delta[name]) for name in weights}
    kept = {}
    for name, vector in vectors.items():
        threshold = vector.abs().topk(max(1, round(0.2 * len(vector)))).values[-1]
        kept[name] = torch.where(vector.abs() >= threshold, vector, 0.0)
    sign = sum(share * kept[name] for name, share in weights.items()).sign()
    agrees = {name: kept[name].sign() * sign > 0 for name in weights}
    mass = sum(share * agrees[name] for name, share in weights.items())
    total = sum(share * kept[name] * agrees[name] for name, share in weights.items())
    expected = torch.where(mass > 0, total / mass.clamp(min=1e-30), 0.0)
    assert torch.allclose(merged(MergeMethod("ties", 1.0, 0.2)), expected, atol=1e-6)

    # DARE keeps what its seed says, scaled up.
    found = merged(MergeMethod("dare", density=0.5, seed=3))
    assert torch.equal(found, merged(MergeMethod("dare", density=0.5, seed=3)))
    assert not torch.equal(found, merged(MergeMethod("dare", density=0.5, seed=4)))
    ones = torch.ones(4000)
    assert 0.9 < float(dare(ones, 0.5, "ab" * 8).mean()) < 1.1

    # SVD: of every matrix the best approximation of its average.
    model = build_model("gpt2")
    DenseStack(model, experts, MergeMethod("svd", rank=2), tmp_path).set(weights)
    for key, weight in floats(model).items():
        average = sum(share * delta[name][key] for name, share in weights.items())
        change = weight.detach() - base[key]
        if average.ndim == 1:
            assert torch.allclose(change, average, atol=1e-6), key
            continue
        u, s, v = torch.linalg.svd(average, full_matrices=False)
        assert torch.allclose(change, (u[:, :2] * s[:2]) @ v[:2], atol=1e-6), key


@pytest.mark.parametrize(
    ("dtype", "least", "most"), [("float32", 0, 0), ("bfloat16", 1e-4, 4e-3), ("float16", 0, 1e-3)]
)
def test_a_smaller_dtype_says_what_it_loses(tmp_path, dtype, least, most):
    before = floats(build_model("llama"))
    kept = save_delta(tmp_path, before, fine_tuned("llama", torch.float32, 1), getattr(torch, dtype))
    assert least <= kept["lost"] <= most
    assert kept["parameters"] == sum(one.numel() for one in before.values())
    assert {one.dtype for one in load_file(tmp_path / DELTA_FILE).values()} == {getattr(torch, dtype)}


def test_what_did_not_change_is_left_out(tmp_path):
    before = floats(build_model("llama"))
    after = dict(before) | {"model.norm.weight": before["model.norm.weight"] + 1}
    save_delta(tmp_path, before, after, torch.float32)
    assert list(load_file(tmp_path / DELTA_FILE)) == ["model.norm.weight"]


def test_shared_weights_are_written_once(bank, tmp_path):
    """Gemma and GPT-2 have one tensor for their embeddings and their head."""
    _, experts = bank("gpt2", torch.float32, 1)
    model = build_model("gpt2")
    DenseStack(model, experts, AVERAGE, tmp_path).set({"a": 1.0})
    assert model.lm_head.weight is model.transformer.wte.weight
    assert "lm_head.weight" not in experts["a"].shapes


def test_another_base_is_refused(bank, tmp_path):
    _, experts = bank("llama", torch.float32, 1)
    with pytest.raises(InputError, match="another base model"):
        open_stack(build_model("gpt2"), experts, AVERAGE, tmp_path)
    (tmp_path / "a" / DELTA_FILE).write_bytes(b"not safetensors")
    with pytest.raises(InputError, match="full-parameter expert"):
        Delta(tmp_path / "a")


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    before = floats(build_model("llama"))
    after = dict(before) | {"model.norm.weight": before["model.norm.weight"] * float("nan")}
    for name in "ab":
        save_delta(tmp_path / name, before, after, torch.float32)
    with pytest.raises(InputError, match="finite"):
        DenseStack(build_model("llama"), {name: Delta(tmp_path / name) for name in "ab"}, AVERAGE, tmp_path)


def test_a_full_fine_tune_of_a_language_model(project, capsys):
    """From rows to a model, and to the same one by TRL alone."""
    flags = ("--expert", "full", "--learning_rate", "1e-3")
    assert m2m("select", "--config", project / "run.yaml", *flags) == 0
    out = project / "out"
    assert "3 experts" in capsys.readouterr().out
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert recipe["use_peft"] is False
    assert not [key for key in recipe if key.startswith("lora_")]
    model = AutoModelForCausalLM.from_pretrained(out / "final")
    args = SFTConfig(**{key: value for key, value in recipe.items() if key in SFTConfig.__dataclass_fields__})
    rows = load_dataset("json", data_files=recipe["datasets"][0]["data_files"], split="train")
    trainer = SFTTrainer(recipe["model_name_or_path"], args=args, train_dataset=rows)
    trainer.train()
    theirs = trainer.model.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor, theirs[name], rtol=0, atol=1e-8), name
    assert m2m("select", "--config", project / "run.yaml", *flags) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert m2m("status", out) == 0
    assert "experts: 3 of 3" in capsys.readouterr().out
