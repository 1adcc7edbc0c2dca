"""Families of models that ask something of the settings of their own."""

import pytest
import torch
import yaml
from pico import BERT, changed, m2m
from transformers import AutoModel, MPNetConfig


def saved(config, folder, auto=AutoModel, tokenizer=None):
    """A pico model of this configuration, in a folder that is given back."""
    torch.manual_seed(0)
    auto.from_config(config).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("asked", [True, False])
def test_a_model_that_cannot_checkpoint_activations_trains_without_and_says_so(
    intents, tokenizer, tmp_path, capsys, asked
):
    model = saved(MPNetConfig(**BERT, pad_token_id=1), tmp_path / "mpnet", tokenizer=tokenizer)
    changed(intents, model_name_or_path=str(model), activation_checkpointing=asked)
    assert m2m("adapters", "--config", intents / "intents.yaml") == 0
    assert ("MPNetModel does not support it" in capsys.readouterr().out) == asked
    assert yaml.safe_load((intents / "out" / "config.yaml").read_text())["activation_checkpointing"] is False
