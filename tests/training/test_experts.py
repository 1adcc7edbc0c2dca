"""What the two kinds of experts have in common, and what each refuses; full fine-tunes equal TRL's own."""

import json
import shutil
import sys

import pytest
import torch
import yaml
from datasets import load_dataset
from pico import RGB, changed, images, m2m, searcher, trials
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LevitConfig,
    LevitForImageClassification,
    ViTImageProcessorPil,
)
from trl import SFTConfig, SFTTrainer

from m2m_hf.merging.adapter import Adapter
from m2m_hf.merging.full_experts import FullExpert

FLAGS = {"lora": (), "full": ("--expert", "full", "--learning_rate", "1e-3")}


@pytest.fixture
def levit(tmp_path):
    """A pico LeViT: linear layers, each followed by normalisation that keeps statistics."""
    torch.manual_seed(0)
    labels = {"id2label": dict(enumerate(RGB)), "label2id": {name: number for number, name in enumerate(RGB)}}
    shape = {"image_size": 16, "hidden_sizes": [16, 16, 16], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1]}
    more = {"key_dim": [4, 4, 4], "attention_ratio": [2, 2, 2], "mlp_ratio": [2, 2, 2]}
    LevitForImageClassification(LevitConfig(**shape, **more, **labels)).save_pretrained(tmp_path / "levit")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "levit")
    return tmp_path / "levit"


@pytest.mark.parametrize("kind", FLAGS)
def test_a_training_gives_the_base_back_with_its_statistics(pictures_of, levit, kind):
    """Also one whose Trainer could not be made."""
    run = images(pictures_of(levit, "all-linear"), *FLAGS[kind])
    before = {name: tensor.clone() for name, tensor in run.run.base.model.state_dict().items()}
    assert {tensor.dtype for tensor in before.values()} >= {torch.int64, torch.float32}

    def is_untouched() -> bool:
        after = run.run.base.model.state_dict()
        return after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)

    def fails(self, head, **kwargs):
        raise ValueError("not today")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("m2m_hf.training.trainers.LabelTrainer.__init__", fails)
        with pytest.raises(ValueError, match="not today"):
            run.train_adapters()
    assert is_untouched()
    run.train_adapters()
    assert is_untouched()
    assert isinstance(run.run.bank.load()["warm"], {"lora": Adapter, "full": FullExpert}[kind])


def test_changed_statistics_alone_are_nothing_learned(pictures_of, resnet, capsys):
    folder = pictures_of(resnet, "all-linear")
    flags = ("--per_device_train_batch_size", "3", "--expert", "full", "--learning_rate", "1e-60")
    assert m2m("adapters", "--config", folder / "images.yaml", *flags) == 2
    assert "it learned nothing" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [("--trained_parameters", "layer"), ("--delta_dtype", "bfloat16")])
def test_what_an_expert_depends_on_is_among_its_facts(intents, flags):
    facts = searcher(intents, *FLAGS["full"]).run.facts
    assert facts["expert"] == "full"
    assert facts != searcher(intents, *FLAGS["full"], *flags).run.facts


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"final": {"lora_r": 64}}, "final.lora_r: belongs to expert: lora"),
        ({"training": {"lora_r": 64}}, "training.lora_r: belongs to expert: lora"),
        ({"load_in_4bit": True}, "expert: full trains the base's own weights"),
    ],
)
def test_full_experts_refuse_what_belongs_to_adapters(project, capsys, change, words):
    config = changed(project, "run", expert="full")
    if "training" in change:
        config["candidates"]["gamma"] |= change
        change = {"candidates": config["candidates"], "allow_mixed_training": True}
    changed(project, "run", **change)
    assert m2m("adapters", "--config", project / "run.yaml") == 2
    assert words in capsys.readouterr().err


def test_a_full_fine_tune_of_a_language_model_is_that_of_trl(project, capsys):
    assert m2m("select", "--config", project / "run.yaml", *FLAGS["full"]) == 0
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
        assert torch.allclose(tensor, theirs[name].cpu(), rtol=0, atol=1e-8), name
    assert m2m("select", "--config", project / "run.yaml", *FLAGS["full"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert m2m("status", out) == 0
    assert "experts: 3 of 3" in capsys.readouterr().out


def test_the_final_model_keeps_a_tokenizer_with_a_folder_of_its_own(project, pico, tmp_path):
    shutil.copytree(pico, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(pico)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ messages }}"}
    tokenizer.save_pretrained(tmp_path / "model")
    changed(project, "run", model_name_or_path=str(tmp_path / "model"), save_steps=1)
    assert m2m("select", "--config", project / "run.yaml", *FLAGS["full"]) == 0
    inside = "additional_chat_templates/tool_use.jinja"
    final = json.loads((project / "out" / "final" / "training.json").read_text())
    assert final["files"][inside]["bytes"] == (project / "out" / "final" / inside).stat().st_size
    assert m2m("status", project / "out") == 0
    (project / "out" / "final" / inside).write_text("{{ other }}")
    assert m2m("status", project / "out") != 0


def test_a_command_gets_the_model_that_any_method_has_merged(intents, tmp_path):
    script = tmp_path / "score.py"
    script.write_text(
        "import json, sys\nfrom safetensors.numpy import load_file\n"
        "weights = load_file(sys.argv[1] + '/model.safetensors')\n"
        "print(json.dumps({'score': float(weights['encoder.layer.0.attention.self.query.weight'].astype(float).sum())}))\n"
    )
    target = {"scorer": "command", "command": [sys.executable, str(script), "{model}"]}
    changed(intents, expert="full", learning_rate=1e-3, merge_method="ties", targets={"t": target})
    assert m2m("search", "--config", intents / "intents.yaml") == 0
    assert len({one["score"] for one in trials(intents / "out")}) > 2
    changed(intents, expert="lora", targets={"t": target | {"command": [sys.executable, str(script), "{adapter}"]}})
    assert m2m("search", "--config", intents / "intents.yaml", "--output_dir", intents / "other") == 2
