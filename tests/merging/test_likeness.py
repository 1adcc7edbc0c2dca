"""How alike two experts' changes are: as their dense changes are, which LoRA adapters never make."""

import math
from itertools import combinations

import pytest
import torch
from pico import build_adapter, build_model
from safetensors.torch import save_file

from m2m_hf.merging import expert, likeness
from m2m_hf.merging.adapter import Adapter
from m2m_hf.merging.full_experts import DELTA_FILE, FullExpert
from m2m_hf.merging.likeness import likeness as measured


def dense(first: torch.Tensor, second: torch.Tensor) -> tuple[float, float]:
    """(cosine, sign conflict) of two vectors."""
    smaller = torch.minimum(first.abs(), second.abs())
    against = smaller[first * second < 0].sum() / smaller.sum()
    return float(torch.cosine_similarity(first, second, dim=0)), float(against)


@pytest.fixture
def full(tmp_path):
    """name -> an expert with these changes."""

    def make(name: str, **changes: torch.Tensor) -> FullExpert:
        (tmp_path / name).mkdir()
        save_file(changes, tmp_path / name / DELTA_FILE)
        return FullExpert.load(tmp_path / name)

    return make


def test_small_changes_by_hand(full):
    experts = {
        "a": full("a", w=torch.tensor([[1.0, -2.0], [3.0, 0.0]]), mean=torch.ones(9)),
        "b": full("b", w=torch.tensor([[-1.0, -1.0], [6.0, 5.0]]), mean=-torch.ones(9)),
        "c": full("c", v=torch.tensor([4.0])),
    }
    found = measured(experts, ["w", "v"])  # `mean` is a running statistic
    assert found["a", "b"] == pytest.approx((19 / math.sqrt(14 * 63), 1 / 5))
    assert found["a", "c"][0] == 0
    assert math.isnan(found["a", "c"][1])
    assert list(found) == [("a", "b"), ("a", "c"), ("b", "c")]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters_are_as_alike_as_their_dense_changes(family, tmp_path, monkeypatch):
    monkeypatch.setattr(likeness, "ROWS", 1 << 20)
    shapes = {
        "a": {},
        "b": {"r": 3, "use_rslora": True},
        "c": {"r": 2, "lora_alpha": 7, **({} if family == "gpt2" else {"target_modules": ["q_proj", "o_proj"]})},
    }
    adapters = {
        name: Adapter.load(build_adapter(family, tmp_path / name, seed, **lora))
        for seed, (name, lora) in enumerate(shapes.items())
    }
    changes = {name: one.changes(build_model(family)) for name, one in adapters.items()}
    weights = sorted({weight for of in changes.values() for weight in of})
    whole = {weight: change.delta() for of in changes.values() for weight, change in of.items()}
    vectors = {
        name: torch.cat([(of[one].delta() if one in of else torch.zeros_like(whole[one])).flatten() for one in weights])
        for name, of in changes.items()
    }
    for pair, found in measured(adapters, []).items():
        assert found == pytest.approx(dense(*(vectors[name].double().cpu() for name in pair)), abs=1e-6)


def test_full_experts_are_read_in_blocks_and_their_signs_sampled(full, monkeypatch):
    monkeypatch.setattr(expert, "BLOCK", 40)
    draw = torch.Generator().manual_seed(0)
    changes = {name: {"w": torch.randn(50, 8, generator=draw), "v": torch.randn(3, generator=draw)} for name in "abc"}
    found = measured({name: full(name, **tensors) for name, tensors in changes.items()}, ["w", "v"])
    rows = torch.linspace(0, 49, likeness.ROWS).long()
    for first, second in combinations("abc", 2):
        whole = [torch.cat([changes[name]["v"], changes[name]["w"].flatten()]) for name in (first, second)]
        some = [torch.cat([changes[name]["v"], changes[name]["w"][rows].flatten()]) for name in (first, second)]
        assert found[first, second] == pytest.approx((dense(*whole)[0], dense(*some)[1]), abs=1e-6)
