"""Frozen heads: made of names or the model's own, what they depend on, and models that have none."""

import json
import shutil

import pytest
import torch
import yaml
from pico import (
    COLOURS,
    RGB,
    SHAPE,
    build_tokenizer,
    changed,
    intent_rows,
    m2m,
    pooled,
    searcher,
    write_rows,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5Model,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from m2m_hf.publish.repositories import published

# TRL's field, until version 2 of it; a configuration has no other way to say it.
DEPRECATED = pytest.mark.filterwarnings("ignore:`pad_token` is deprecated:FutureWarning")


def test_fingerprints_change_with_what_scores_and_experts_depend_on(intents, copied, tmp_path):
    def names(**values) -> tuple:
        one = searcher(intents, **values)
        return (
            one.run.task.head_fingerprint,
            json.dumps(one.run.facts, sort_keys=True),
            one.run.scorers["intents"]["validation"].fingerprint,
        )

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
    weights = load_file(copied / "model.safetensors")
    weights["encoder.layer.0.output.dense.weight"][0, 0] += 1
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    assert names()[0] != head


def test_another_tokenizer_of_a_text_tower_makes_other_experts(pictures_of, clip, tmp_path):
    shutil.copytree(clip, tmp_path / "model")
    folder = pictures_of(tmp_path / "model", ".*(q_proj|v_proj)")
    (folder / "images.yaml").rename(folder / "intents.yaml")
    one = searcher(folder)
    before = one.run.facts, one.run.task.head_fingerprint
    tokens = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    tokens["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(tokens))
    one = searcher(folder)
    assert one.run.facts != before[0]
    assert one.run.task.head_fingerprint != before[1]


def test_another_tokenizer_makes_another_head(intents, copied, capsys):
    assert m2m("search", "--config", intents / "intents.yaml") == 0
    before = load_file(intents / "out" / "head.safetensors")["vectors"]
    tokens = json.loads((copied / "tokenizer.json").read_text())
    tokens["normalizer"] = {"type": "Replace", "pattern": {"String": "e"}, "content": "o"}
    (copied / "tokenizer.json").write_text(json.dumps(tokens))
    assert m2m("search", "--config", intents / "intents.yaml") == 2
    assert "tokenizer" in capsys.readouterr().err
    for name in ("adapters", "trials.jsonl", "trials.values", "targets.json"):
        place = intents / "out" / name
        shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
    assert m2m("search", "--config", intents / "intents.yaml") == 0
    assert not torch.equal(load_file(intents / "out" / "head.safetensors")["vectors"], before)


def test_another_truncation_makes_other_experts(intents, copied, capsys):
    path = intents / "intents.yaml"
    assert m2m("adapters", "--config", path) == 0
    shutil.rmtree(intents / "out" / "adapters" / "noise")
    settings = json.loads((copied / "tokenizer_config.json").read_text())
    (copied / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 3}))
    assert m2m("adapters", "--config", path) == 2
    assert "limit (" in capsys.readouterr().err


KINDS = [(), ("--expert", "full", "--learning_rate", "1e-3")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_of_the_models_own_is_the_head_and_stays_as_it_is(own, classifier, kind):
    assert m2m("select", "--config", own / "intents.yaml", *kind) == 0
    file = "delta.safetensors" if kind else "adapter_model.safetensors"
    names = load_file(own / "out" / "adapters" / "colours" / file)
    assert names
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
    file = "delta.safetensors" if kind else "adapter_model.safetensors"
    names = load_file(intents / "out" / "adapters" / "colours" / file)
    assert names
    assert not [name for name in names if "pooler" in name]


def test_heads_that_were_trained_apart_are_refused(own, classifier, capsys, tmp_path):
    torch.manual_seed(2)
    model = BertForSequenceClassification.from_pretrained(classifier)
    with torch.no_grad():
        model.classifier.weight.add_(0.1)
    model.save_pretrained(tmp_path / "theirs")
    path = own / "intents.yaml"
    given = yaml.safe_load(path.read_text()) | {"expert": "full", "experts": {"colours": str(tmp_path / "theirs")}}
    path.write_text(yaml.safe_dump(given))
    assert m2m("adapters", "--config", path) == 2
    assert "heads that were trained on different labels has no meaning" in capsys.readouterr().err


def test_labels_of_the_same_words_are_refused_where_they_are_alternatives(intents, capsys):
    write_rows(intents / "greetings.jsonl", intent_rows(["hello_there", "hello there"], 6))
    assert m2m("adapters", "--config", intents / "intents.yaml") == 2
    assert "are the same words to the model" in capsys.readouterr().err
    assert not (intents / "out").exists()
    write_rows(intents / "greetings.jsonl", intent_rows(["hello there", "good bye"], 6))
    write_rows(intents / "noise.jsonl", intent_rows(["hello_there", "one"], 6))
    assert m2m("adapters", "--config", intents / "intents.yaml") == 0


def test_names_that_are_alike_up_to_where_they_are_cut_are_the_same_words(intents, capsys):
    long = "so very long that it is cut " * 12
    write_rows(intents / "greetings.jsonl", intent_rows([f"{long} one", f"{long} two"], 6))
    assert m2m("adapters", "--config", intents / "intents.yaml") == 2
    assert "are the same words to the model" in capsys.readouterr().err


def test_names_of_labels_are_published_as_they_are():
    given = {"head": {"among": {"a": ["/m/0a", "/sports/ball/red"]}}, "id2label": {"0": "/m/0a"}, "labels": ["/m/0a"]}
    assert published(given) == given


BOTH = '{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": true}'


@pytest.mark.parametrize("content", ['{"pooling_mode_lasttoken": true}', "[1]", "{", BOTH])
def test_an_unknown_pooling_is_refused(intents, copied, capsys, content):
    (copied / "1_Pooling").mkdir()
    (copied / "1_Pooling" / "config.json").write_text(content)
    assert m2m("adapters", "--config", intents / "intents.yaml") == 2
    assert "1_Pooling/config.json: expected" in capsys.readouterr().err


def test_a_backbone_without_a_head_is_refused_with_the_reason(pictures_of, tmp_path, capsys):
    model = tmp_path / "bare"
    ViTModel(ViTConfig(image_size=8, patch_size=4, **SHAPE)).save_pretrained(model)
    folder = pictures_of(model, "all-linear")
    assert m2m("adapters", "--config", folder / "images.yaml") == 2
    assert "Heads trained for one candidate each could not be averaged" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_a_model_that_reads_more_than_a_text_is_refused(intents, clip, tmp_path, capsys, kind):
    if kind == "t5":
        T5Model(T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=320)).save_pretrained(
            tmp_path / "t5"
        )
        build_tokenizer().save_pretrained(tmp_path / "t5")
    changed(intents, model_name_or_path=str(clip if kind == "clip" else tmp_path / "t5"))
    assert m2m("adapters", "--config", intents / "intents.yaml") == 2
    assert "reads more than a text; expected a text encoder" in capsys.readouterr().err


def test_convolutions_are_refused_before_the_training(pictures_of, tmp_path, capsys):
    names = {
        "id2label": dict(enumerate(RGB)),
        "label2id": {n: i for i, n in enumerate(RGB)},
    }
    shape = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    ResNetForImageClassification(ResNetConfig(**shape, **names)).save_pretrained(tmp_path / "resnet")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "resnet")
    folder = pictures_of(tmp_path / "resnet", ".*convolution")
    assert m2m("adapters", "--config", folder / "images.yaml") == 2
    assert "and others are convolutions" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["encoder.layer.1.output.dense.weight", "pooler.dense.weight"])
def test_weights_that_are_missing_are_refused_unless_nothing_reads_them(intents, copied, capsys, name):
    weights = load_file(copied / "model.safetensors")
    del weights[name]
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    code = m2m("adapters", "--config", intents / "intents.yaml")
    assert code == (0 if "pooler" in name else 2)
    assert ("would be random numbers" in capsys.readouterr().err) == (code == 2)


def test_a_tokenizer_without_a_token_to_pad_with(intents, copied, capsys):
    tokenizer = AutoTokenizer.from_pretrained(copied)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(copied)
    assert m2m("adapters", "--config", intents / "intents.yaml") == 2
    assert "pad_token: None is not a token" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"label_template": "a {label}"}, "label_template: without effect, as the model's own classifier"),
        ({"labels": {"red": "crimson", "blue": "blue"}}, "labels: words for red: without effect"),
    ],
)
def test_settings_without_effect_on_an_own_classifier_are_refused(own, capsys, change, words):
    changed(own, **change)
    assert m2m("adapters", "--config", own / "intents.yaml") == 2
    assert words in capsys.readouterr().err


@DEPRECATED
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_length": 7}, "max_length: without effect, as images are not cut"),
        ({"pad_token": "<|end|>"}, "pad_token: without effect, as the model's own classifier"),
    ],
)
def test_settings_without_effect_on_images_are_refused(pictures_of, vit, capsys, change, words):
    folder = pictures_of(vit, "all-linear")
    changed(folder, "images", **change)
    assert m2m("adapters", "--config", folder / "images.yaml") == 2
    assert words in capsys.readouterr().err
