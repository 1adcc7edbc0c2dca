"""Classification of images: a ViT with a classifier of its own, and a CLIP whose head is its text tower's embedding of names."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, Features, Image, Value, load_dataset
from pico import RGB, SHAPE, lines, m2m, picture
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from m2m_hf.config.parsing import parse
from m2m_hf.console import Terminal
from m2m_hf.modeling.processing import inputs_of
from m2m_hf.searcher import MergeToMixSearcher

KINDS = [(), ("--expert", "full", "--learning_rate", "1e-3")]


def validation(folder: Path) -> list[dict]:
    return list(load_dataset("parquet", data_files=str(folder / "validation.parquet"), split="train"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_vit_with_a_classifier_of_its_own(pictures_of, vit, kind, capsys):
    folder = pictures_of(vit, "all-linear")
    assert m2m("select", "--config", folder / "images.yaml", *kind) == 0
    out = folder / "out"
    assert (out / "mixture" / "train.parquet").exists()
    assert not [
        name for name in load_file(next((out / "adapters" / "warm").glob("*.safetensors"))) if "classifier" in name
    ]
    rows = validation(folder)
    inputs = AutoImageProcessor.from_pretrained(vit)(images=[row["image"] for row in rows], return_tensors="pt")
    model = ViTForImageClassification.from_pretrained(vit).eval()

    def right() -> list[float]:
        with torch.no_grad():
            logits = model(**inputs).logits.log_softmax(1)
        return [float(one[model.config.label2id[row["label"]]]) for one, row in zip(logits, rows, strict=True)]

    found = lines(out)
    assert found[frozenset()]["logprobs"] == pytest.approx(right(), abs=2e-5)
    if kind:
        state = model.state_dict()
        for name in ("warm", "cold"):
            for key, change in load_file(out / "adapters" / name / "delta.safetensors").items():
                state[key] += change / 2
        assert found[frozenset({"warm", "cold"})]["logprobs"] == pytest.approx(right(), abs=2e-5)
        final = ViTForImageClassification.from_pretrained(out / "final")
        assert final.config.id2label == model.config.id2label
    before = (out / "mixture" / "train.parquet").read_bytes()
    assert m2m("select", "--config", folder / "images.yaml", *kind) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert (out / "mixture" / "train.parquet").read_bytes() == before
    assert m2m("status", out) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_recipe_trains_the_same(pictures_of, vit, kind, classify):
    folder = pictures_of(vit, "all-linear")
    assert m2m("select", "--config", folder / "images.yaml", *kind) == 0
    classify.main(folder / "out" / "recipe.yaml")
    file = "model.safetensors" if kind else "adapter_model.safetensors"
    ours, theirs = (load_file(folder / "out" / place / file) for place in ("final", "trained-by-recipe"))
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-8 if kind else 0) for name in ours)


@pytest.mark.parametrize("kind", KINDS)
def test_clip_classifies_by_its_text_tower(pictures_of, clip, kind):
    folder = pictures_of(clip, ".*(q_proj|v_proj)")
    assert m2m("search", "--config", folder / "images.yaml", "--label_template", "a photo of {label}", *kind) == 0
    model = CLIPModel.from_pretrained(clip).eval()
    tokenizer, processor = AutoTokenizer.from_pretrained(clip), AutoImageProcessor.from_pretrained(clip)
    rows, labels = validation(folder), sorted(RGB)
    with torch.no_grad():
        texts = tokenizer([f"a photo of {label}" for label in labels], padding=True, return_tensors="pt")
        pixels = processor(images=[row["image"] for row in rows], return_tensors="pt")["pixel_values"]
        logits = model(**texts, pixel_values=pixels).logits_per_image.log_softmax(1)
    expected = [float(one[labels.index(row["label"])]) for one, row in zip(logits, rows, strict=True)]
    assert lines(folder / "out")[frozenset()]["logprobs"] == pytest.approx(expected, abs=1e-4)
    names = load_file(next((folder / "out" / "adapters" / "warm").glob("*.safetensors")))
    assert names
    assert not [name for name in names if "text_model" in name]


def test_a_backbone_without_a_head_is_refused_with_the_reason(pictures_of, tmp_path, capsys):
    model = tmp_path / "bare"
    ViTModel(ViTConfig(image_size=8, patch_size=4, **SHAPE)).save_pretrained(model)
    folder = pictures_of(model, "all-linear")
    assert m2m("adapters", "--config", folder / "images.yaml") == 2
    assert "Heads trained for one candidate each could not be averaged" in capsys.readouterr().err


def test_labels_the_classifier_does_not_have_are_refused_or_mapped(pictures_of, vit, capsys):
    folder = pictures_of(vit, "all-linear")
    path = folder / "images.yaml"
    given = yaml.safe_load(path.read_text())
    rows = validation(folder)
    for row in rows:
        row["label"] = {"red": "rouge"}.get(row["label"], row["label"])
    Dataset.from_list(rows, features=Features({"image": Image(), "label": Value("string")})).to_parquet(
        folder / "all.parquet"
    )
    assert m2m("adapters", "--config", path, "--allow_overlap", "true") == 2
    assert (
        "expected one of the 3 labels of this run: red, green, blue. Map it, with labels: {rouge: red"
        in capsys.readouterr().err
    )
    given["candidates"]["all"]["labels"] = {"rouge": "red"}
    path.write_text(yaml.safe_dump(given))
    assert m2m("adapters", "--config", path) == 2
    assert "also stand in all (7)" in capsys.readouterr().err  # the same pixels, in another file
    assert m2m("adapters", "--config", path, "--allow_overlap", "true") == 0


def test_a_folder_of_images_is_read(pictures_of, vit, tmp_path):
    folder = pictures_of(vit, "all-linear")
    for label, colour in RGB.items():
        for number in range(3):
            place = tmp_path / "files" / label / f"{number}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            picture(colour, number).save(place)
    path = folder / "images.yaml"
    given = yaml.safe_load(path.read_text())
    given["candidates"]["all"] = {"path": "imagefolder", "data_dir": "files"}
    path.write_text(yaml.safe_dump(given))
    one = MergeToMixSearcher(*parse(path), Terminal(quiet=True))
    assert sorted(one.candidates["all"].rows["label"]) == sorted([*RGB] * 3)
    one.train_adapters()


def test_a_study_of_images(pictures_of, vit):
    folder = pictures_of(vit, "all-linear")
    assert m2m("fidelity", "--config", folder / "images.yaml") == 0
    found = json.loads((folder / "out" / "fidelity.json").read_text())
    assert len(found["mixtures"]) == 7
    assert len(found["similarity"]) == 3


def test_what_is_no_image_is_named(pictures_of, vit, capsys):
    folder = pictures_of(vit, "all-linear")
    Dataset.from_list([{"image": "here.png", "label": "red"}]).to_parquet(folder / "all.parquet")
    assert m2m("adapters", "--config", folder / "images.yaml") == 2
    assert "candidates.all.image: expected images" in capsys.readouterr().err


def test_pictures_are_prepared_once_as_far_as_there_is_room(pictures_of, vit, monkeypatch):
    folder = pictures_of(vit, "all-linear")
    found, prepared = [], []

    def counted(processing, content, limit):
        prepared[-1] += len(content)
        return inputs_of(processing, content, limit)

    monkeypatch.setattr("m2m_hf.scoring.classification.inputs_of", counted)
    for room in (1 << 30, 2 * 3 * 8 * 8 * 4, 0):
        monkeypatch.setattr("m2m_hf.scoring.classification.MAX_PIXEL_BYTES", room)
        one = MergeToMixSearcher(*parse(folder / "images.yaml"), Terminal(quiet=True))
        one.train_adapters()
        scorer, stack = one.scorers["colours"]["validation"], one._open_stack(one.merge_method)
        for mixture in ({"warm": 1.0}, {"warm": 0.5, "cold": 0.5}):
            prepared.append(0)
            found.append(scorer.score(stack, [mixture], 15)[0].logprobs)
    assert prepared == [7, 0, 7, 5, 7, 7]
    assert found[0] == found[2] == found[4]
    assert found[1] == found[3] == found[5]
