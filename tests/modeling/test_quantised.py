"""4-bit and 8-bit base models on the CPU: training, exact averages on them, and training again after scoring."""

import ast
import json

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from pico import QUESTIONS, ROOT, USE_CPU, build_adapter, build_tokenizer, candidate_rows, m2m
from trl import ModelConfig, SFTConfig

from m2m_hf.console import Terminal
from m2m_hf.merging.adapter import Adapter, write_adapter
from m2m_hf.merging.gated_stack import GatedStack
from m2m_hf.modeling.loading import load_base
from m2m_hf.modeling.lora import lora_config
from m2m_hf.scoring.forward import completion_logprobs
from m2m_hf.training.experts import LoraKind
from m2m_hf.training.fine_tune import train_expert
from m2m_hf.training.recording import BankProgress
from m2m_hf.training.trainers import Settings

KINDS = {
    "nf4": {"load_in_4bit": True},
    "nf4-nested": {"load_in_4bit": True, "use_bnb_nested_quant": True, "dtype": "bfloat16"},
    "int8": {"load_in_8bit": True},
}
MIXTURES = [{}, {"a": 1.0}, {"a": 0.25, "b": 0.75}]


@pytest.fixture(scope="module")
def args(tmp_path_factory) -> SFTConfig:
    return SFTConfig(
        output_dir=str(tmp_path_factory.mktemp("args")),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        use_cpu=USE_CPU,
        bf16=False,
        activation_checkpointing=False,
    )


def load(pico, args, kind: str) -> torch.nn.Module:
    return load_base(ModelConfig(model_name_or_path=str(pico), **{"dtype": "float32", **KINDS[kind]}), args)


def train(base, args, folder):
    rows = Dataset.from_list(candidate_rows("alpha"))
    config = lora_config(ModelConfig(lora_r=4, lora_target_modules=["q_proj", "v_proj"], lora_dropout=0.0))
    with Terminal(quiet=True).progress("", 3) as bar:
        train_expert(
            base, rows, Settings(args, build_tokenizer(), LoraKind(config)), folder, [BankProgress(bar, {}, "", "")]
        )
    return Adapter.load(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_gated_scores_on_a_quantised_base(pico, args, tmp_path, kind):
    adapters = {name: Adapter.load(build_adapter("llama", tmp_path / name, seed)) for seed, name in enumerate("ab")}
    stack = GatedStack(load(pico, args, kind), adapters)
    assert stack.takes_rows
    tolerance = 5e-2 if "nested" in kind else 1e-4  # that one computes in bfloat16
    together = completion_logprobs(stack, MIXTURES, QUESTIONS, 10_000)
    for number, weights in enumerate(MIXTURES):
        alone = completion_logprobs(stack, [weights], QUESTIONS, 64)[0]
        if weights:
            folder = tmp_path / f"mixture{number}"
            write_adapter(folder, adapters, weights, str(pico))
            model = PeftModel.from_pretrained(load(pico, args, kind), folder).eval()
        else:
            model = load(pico, args, kind)
        expected = completion_logprobs(GatedStack(model, {}), [{}], QUESTIONS, 64)[0]
        for values in (alone, together[number]):
            flat = [value for (value,) in values]
            # 8-bit products round each row by its own largest activation, so company changes nothing there either
            assert flat == pytest.approx([value for (value,) in expected], rel=tolerance, abs=10 * tolerance)
    assert together[0] != together[1] != together[2]


@pytest.mark.parametrize("kind", KINDS)
def test_training_after_scoring_is_training_before_it(pico, args, tmp_path, kind):
    before = train(load(pico, args, kind), args, tmp_path / "before")
    base = load(pico, args, kind)
    stack = GatedStack(base, {"a": before})
    scores = completion_logprobs(stack, [{"a": 1.0}], QUESTIONS, 64)
    stack.detach()
    after = train(base, args, tmp_path / "after")
    for name, tensor in before.tensors.items():
        assert torch.equal(tensor, after.tensors[name]), name
    assert all(bool(tensor.any()) for name, tensor in after.tensors.items() if "lora_B" in name)  # it did learn
    assert completion_logprobs(GatedStack(base, {"a": before}), [{"a": 1.0}], QUESTIONS, 64) == scores


def test_4bit_weights_are_never_repacked(pico, args, monkeypatch):
    """bitsandbytes would, on processors with AVX512-BF16; then nothing could be trained on them any more."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    base = load(pico, args, "nf4")
    layers = [layer for layer in base.modules() if hasattr(layer, "support_avx512bf16_for_cpu")]
    assert len(layers) == 14
    before = [layer.weight.data.clone() for layer in layers]
    completion_logprobs(GatedStack(base, {}), [{}], QUESTIONS, 64)
    for layer, weight in zip(layers, before, strict=True):
        assert torch.equal(layer.weight.data, weight)
        assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_a_run_on_a_4bit_base_with_a_paged_optimiser(project, capsys):
    flags = ("--load_in_4bit", "true", "--optim", "paged_adamw_8bit")
    assert m2m("select", "--config", project / "run.yaml", *flags) == 0
    assert json.loads((project / "out" / "summary.json").read_text())["final"]["test"] is not None
    recipe = (project / "out" / "recipe.yaml").read_text()
    assert "load_in_4bit: true" in recipe
    assert "optim: paged_adamw_8bit" in recipe
    assert m2m("select", "--config", project / "run.yaml", *flags) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert m2m("select", "--config", project / "run.yaml") == 2  # adapters of another base
    assert "quantization" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_a_run_on_an_8bit_base(project):
    assert m2m("search", "--config", project / "run.yaml", "--load_in_8bit", "true", "--optim", "adamw_8bit") == 0


def test_nothing_but_quantising_needs_bitsandbytes():
    """Machines without it must still import every module."""
    for path in (ROOT / "m2m_hf").rglob("*.py"):
        imports = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert not [node for node in imports if "bitsandbytes" in ast.unparse(node)], path


def test_only_one_kind_of_quantisation(project, capsys):
    assert m2m("search", "--config", project / "run.yaml", "--load_in_8bit", "true", "--load_in_4bit", "true") == 2
    assert "8 bit and 4 bit precision at the same time" in capsys.readouterr().err
