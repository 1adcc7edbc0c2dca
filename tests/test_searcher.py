"""A search from what a script of TRL's has."""

import json
import re

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from pico import USE_CPU, m2m
from trl import SFTConfig

from m2m_hf import InputError, MergeToMixSearcher

NAMES = ("alpha", "beta", "gamma")


def from_script(project, pico, lora=None, **options):
    """What a script of TRL's has, as a search."""
    given = {name: {"path": "json", "data_files": str(project / f"{name}.jsonl")} for name in NAMES}
    data = {"path": "json", "data_files": str(project / "validation.jsonl")}
    args = {
        "output_dir": str(project / "mine"), "max_steps": 3, "learning_rate": 1e-2, "per_device_train_batch_size": 4,
        "use_cpu": USE_CPU, "bf16": False, "report_to": "none", "gradient_checkpointing": False, "logging_steps": 1,
    }  # fmt: skip
    lora = lora or LoraConfig(r=4, lora_dropout=0.05, lora_alpha=32, target_modules=["q_proj", "v_proj"])
    target = {"colours": {"data": data, "scorer": "choice"}}
    return MergeToMixSearcher.from_trl(pico, SFTConfig(**args | options), lora, given, target, parallel_adapters=1)


def test_a_script_of_trl_becomes_a_search(project, pico, monkeypatch):
    assert m2m("search", "--config", project / "run.yaml") == 0
    options = {
        "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "load_best_model_at_end": True, "save_steps": 1,
        "push_to_hub": True, "hub_model_id": "org/x",
    }  # fmt: skip
    searcher = from_script(project, pico, **options)
    rows = searcher.chosen_rows()
    assert not (project / "mine").exists()  # which a push of the script's would publish
    for name in NAMES:
        files = [project / out / "adapters" / name / "adapter_model.safetensors" for out in ("out", "mine-m2m")]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    lines = (project / "mine-m2m" / "mixture" / "train.jsonl").read_text().splitlines()
    assert rows.to_list() == [json.loads(line) for line in lines]
    assert searcher.run.base._model is None  # or the script would have it in memory twice
    monkeypatch.setattr("m2m_hf.run.base_model.load_base", lambda *_: pytest.fail("a model is loaded for nothing"))
    assert from_script(project, pico, **options).chosen_rows().to_list() == rows.to_list()


def test_one_layer_and_the_base_as_the_script_loads_it(project, pico):
    lora = LoraConfig(r=4, target_modules=["q_proj"])
    searcher = from_script(
        project, pico, lora, model_init_kwargs={"dtype": torch.bfloat16, "attn_implementation": "eager"}
    )
    searcher.train_adapters()
    config = json.loads((project / "mine-m2m" / "adapters" / "alpha" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj"]
    assert searcher.run.model_args.dtype == "bfloat16"
    assert searcher.run.model_args.attn_implementation == "eager"
    assert from_script(project, pico).run.model_args.dtype == "float32"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"lora": LoraConfig(r=4, rank_pattern={"q_proj": 2})},
            "rank_pattern={'q_proj': 2} has no key in a run's configuration",
        ),
        ({"lora": LoraConfig(r=4, use_dora=True)}, "use_dora=True cannot be averaged"),
        ({"lora": "q_proj"}, "peft_config: expected a LoraConfig, got str"),
        ({"model_init_kwargs": {"device_map": "auto"}}, "model_init_kwargs: expected only dtype, "),
    ],
)
def test_what_a_script_has_and_a_search_cannot_use(project, pico, given, words):
    with pytest.raises(InputError, match=re.escape(words)):
        from_script(project, pico, **given)
    with pytest.raises(InputError, match="model: expected a Hub id or a folder, got Dataset"):
        from_script(project, Dataset.from_list([{"a": 1}]))
