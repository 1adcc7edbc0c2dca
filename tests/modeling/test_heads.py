"""Frozen heads: made of names or the model's own, what they depend on, and models that have none; positions of a model."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from pico import COLOURS, SHAPE, build_tokenizer, changed, intent_rows, m2m, pooled, searcher, write_rows
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, T5Config, T5Model, ViTConfig, ViTModel, XLNetConfig, XLNetModel

from m2m_hf.modeling.inspection import positions
from m2m_hf.publish.repositories import published

# TRL's field, until version 2 of it; a configuration has no other way to say it.
DEPRECATED = pytest.mark.filterwarnings("ignore:`pad_token` is deprecated:FutureWarning")


def test_fingerprints_change_with_what_scores_and_experts_depend_on(intents, copied):
    def names(**values) -> tuple:
        one = searcher(intents, **values)
        facts = json.dumps(one.run.facts, sort_keys=True)
        return one.run.task.head_fingerprint, facts, one.run.scorers["intents"]["validation"].fingerprint

    head, facts, scorer = names()
    assert names() == (head, facts, scorer)
    for change in (
        {"label_template": "it is {label}"},
        {"labels": [*COLOURS, "hello_there", "good_bye", "cold", "hot"]},
    ):
        other = names(**change)
        assert other[0] != head
        assert other[1] != facts
    assert names(dtype="bfloat16")[0] != head
    shorter = names(max_length=9)
    assert shorter[1] != facts
    assert shorter[2] != scorer
    rows = intent_rows(["red", "cold", "hot", "hello_there"], 10, 100)
    write_rows(intents / "validation_intents.jsonl", [rows[0] | {"label": "cold"}, *rows[1:]])
    assert names()[2] != scorer
    pooled(copied, "cls_token")
    other = names()
    assert other[0] != head
    assert other[1] != facts
    shutil.rmtree(copied / "1_Pooling")
    with changed_weights(copied) as weights:
        weights["encoder.layer.0.output.dense.weight"][0, 0] += 1
    assert names()[0] != head


@contextmanager
def changed_weights(model: Path):
    """The weights of a model folder, written again afterwards."""
    weights = load_file(model / "model.safetensors")
    yield weights
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def changed_tokenizer(model: Path, name: str, **values) -> None:
    given = json.loads((model / name).read_text())
    (model / name).write_text(json.dumps(given | values))


def test_another_tokenizer_of_a_text_tower_makes_other_experts(pictures_of, clip, tmp_path):
    shutil.copytree(clip, tmp_path / "model")
    folder = pictures_of(tmp_path / "model", ".*(q_proj|v_proj)")
    one = searcher(folder, name="images")
    before = one.run.facts, one.run.task.head_fingerprint
    changed_tokenizer(tmp_path / "model", "tokenizer.json", normalizer={"type": "Lowercase"})
    one = searcher(folder, name="images")
    assert one.run.facts != before[0]
    assert one.run.task.head_fingerprint != before[1]


def test_another_tokenizer_makes_another_head(intents, copied, refused):
    assert m2m("search", "--config", intents / "intents.yaml") == 0
    before = load_file(intents / "out" / "head.safetensors")["vectors"]
    replace = {"type": "Replace", "pattern": {"String": "e"}, "content": "o"}
    changed_tokenizer(copied, "tokenizer.json", normalizer=replace)
    assert "tokenizer" in refused(intents / "intents.yaml")
    for name in ("adapters", "trials.jsonl", "trials.values", "targets.json"):
        place = intents / "out" / name
        shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
    assert m2m("search", "--config", intents / "intents.yaml") == 0
    assert not torch.equal(load_file(intents / "out" / "head.safetensors")["vectors"], before)


def test_another_truncation_makes_other_experts(intents, copied, refused):
    path = intents / "intents.yaml"
    assert m2m("adapters", "--config", path) == 0
    shutil.rmtree(intents / "out" / "adapters" / "noise")
    changed_tokenizer(copied, "tokenizer_config.json", model_max_length=3)
    assert "limit (" in refused(path)


KINDS = [(), ("--expert", "full", "--learning_rate", "1e-3")]


def trained_names(folder: Path, kind: tuple) -> list[str]:
    """The names of the tensors of an expert."""
    file = "delta.safetensors" if kind else "adapter_model.safetensors"
    return list(load_file(folder / "out" / "adapters" / "colours" / file))


@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_of_the_models_own_is_the_head_and_stays_as_it_is(own, classifier, kind):
    assert m2m("select", "--config", own / "intents.yaml", *kind) == 0
    names = trained_names(own, kind)
    assert not [name for name in names if "classifier" in name]
    assert any("pooler" in name for name in names)  # which that classifier reads
    if kind:
        base, final = (load_file(place / "model.safetensors") for place in (classifier, own / "out" / "final"))
        assert torch.equal(base["classifier.weight"], final["classifier.weight"])
    recipe = yaml.safe_load((own / "out" / "recipe.yaml").read_text())
    assert recipe["head"] == {"labels": ["red", "green", "blue"], "columns": [0, 1, 2], "closed": True}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_trains_the_pooler_that_nothing_reads(intents, kind):
    assert m2m("adapters", "--config", intents / "intents.yaml", *kind) == 0
    names = trained_names(intents, kind)
    assert names
    assert not [name for name in names if "pooler" in name]


def test_heads_that_were_trained_apart_are_refused(own, classifier, refused, tmp_path):
    shutil.copytree(classifier, tmp_path / "theirs")
    with changed_weights(tmp_path / "theirs") as weights:
        weights["classifier.weight"] += 0.1
    changed(own, expert="full", experts={"colours": str(tmp_path / "theirs")})
    assert "heads that were trained on different labels has no meaning" in refused(own / "intents.yaml")


LONG = "so very long that it is cut " * 12


@pytest.mark.parametrize("labels", [["hello_there", "hello there"], [f"{LONG} one", f"{LONG} two"]])
def test_labels_of_the_same_words_are_refused_where_they_are_alternatives(intents, refused, labels):
    write_rows(intents / "greetings.jsonl", intent_rows(labels, 6))
    assert "are the same words to the model" in refused(intents / "intents.yaml")
    assert not (intents / "out").exists()
    write_rows(intents / "greetings.jsonl", intent_rows([labels[0], "good bye"], 6))
    write_rows(intents / "noise.jsonl", intent_rows([labels[1], "one"], 6))
    assert m2m("adapters", "--config", intents / "intents.yaml") == 0


def test_names_of_labels_are_published_as_they_are():
    given = {"head": {"among": {"a": ["/m/0a", "/sports/ball/red"]}}, "id2label": {"0": "/m/0a"}, "labels": ["/m/0a"]}
    assert published(given) == given


BOTH = '{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": true}'


@pytest.mark.parametrize("content", ['{"pooling_mode_lasttoken": true}', "[1]", "{", BOTH])
def test_an_unknown_pooling_is_refused(intents, copied, refused, content):
    (copied / "1_Pooling").mkdir()
    (copied / "1_Pooling" / "config.json").write_text(content)
    assert "1_Pooling/config.json: expected" in refused(intents / "intents.yaml")


def test_a_backbone_without_a_head_is_refused_with_the_reason(pictures_of, tmp_path, refused):
    ViTModel(ViTConfig(image_size=8, patch_size=4, **SHAPE)).save_pretrained(tmp_path / "bare")
    folder = pictures_of(tmp_path / "bare", "all-linear")
    assert "Heads trained for one candidate each could not be averaged" in refused(folder / "images.yaml")


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_a_model_that_reads_more_than_a_text_is_refused(intents, clip, tmp_path, refused, kind):
    if kind == "t5":
        shape = T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=320)
        T5Model(shape).save_pretrained(tmp_path / "t5")
        build_tokenizer().save_pretrained(tmp_path / "t5")
    changed(intents, model_name_or_path=str(clip if kind == "clip" else tmp_path / "t5"))
    assert "reads more than a text; expected a text encoder" in refused(intents / "intents.yaml")


def test_convolutions_are_refused_before_the_training(pictures_of, resnet, refused):
    folder = pictures_of(resnet, ".*convolution")
    assert "and others are convolutions" in refused(folder / "images.yaml")


def test_weights_that_are_missing_are_refused_unless_nothing_reads_them(intents, copied, refused):
    with changed_weights(copied) as weights:
        del weights["pooler.dense.weight"]
    assert m2m("adapters", "--config", intents / "intents.yaml") == 0
    shutil.rmtree(intents / "out")
    with changed_weights(copied) as weights:
        del weights["encoder.layer.1.output.dense.weight"]
    assert "would be random numbers" in refused(intents / "intents.yaml")


def test_a_tokenizer_without_a_token_to_pad_with(intents, copied, refused):
    tokenizer = AutoTokenizer.from_pretrained(copied)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(copied)
    assert "pad_token: None is not a token" in refused(intents / "intents.yaml")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"label_template": "a {label}"}, "label_template: without effect, as the model's own classifier"),
        ({"labels": {"red": "crimson", "blue": "blue"}}, "labels: words for red: without effect"),
    ],
)
def test_settings_without_effect_on_an_own_classifier_are_refused(own, refused, change, words):
    changed(own, **change)
    assert words in refused(own / "intents.yaml")


@DEPRECATED
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_length": 7}, "max_length: without effect, as images are not cut"),
        ({"pad_token": "<|end|>"}, "pad_token: without effect, as the model's own classifier"),
    ],
)
def test_settings_without_effect_on_images_are_refused(pictures_of, vit, refused, change, words):
    folder = pictures_of(vit, "all-linear")
    changed(folder, "images", **change)
    assert words in refused(folder / "images.yaml")


def test_a_model_without_a_longest_length_has_a_million_positions():
    assert positions(XLNetModel(XLNetConfig(vocab_size=9, d_model=8, n_layer=1, n_head=2, d_inner=8))) == 1_000_000
