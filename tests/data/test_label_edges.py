"""Classification where texts are cut and padded, pictures are of any mode, and a configuration asks for what has no effect."""

import json
import shutil
import sys

import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Value
from pico import (
    COLOURS,
    RGB,
    SHAPE,
    build_tokenizer,
    changed,
    intent_rows,
    lines,
    m2m,
    picture,
    searcher,
    trial_of,
    write_rows,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5Model,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from m2m_hf import InputError
from m2m_hf.publish.repositories import published

# TRL's field, until version 2 of it; a configuration has no other way to say it.
DEPRECATED = pytest.mark.filterwarnings("ignore:`pad_token` is deprecated:FutureWarning")


@pytest.fixture
def copied(intents, encoder, tmp_path):
    """The encoder in a folder of its own, on which the run is."""
    shutil.copytree(encoder, tmp_path / "model")
    changed(intents, model_name_or_path=str(tmp_path / "model"))
    return tmp_path / "model"


def pooled(folder, pooling: str) -> None:
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{pooling}": True}))


@DEPRECATED
@pytest.mark.parametrize("pooling", ["cls_token", "mean_tokens"])
def test_a_texts_score_is_its_own_in_every_batch_and_the_recipe_reads_it_alike(intents, copied, pooling, classify):
    """With a tokenizer that was saved to pad on the left, and has nothing to pad with; texts of all lengths, some cut."""
    tokenizer = AutoTokenizer.from_pretrained(copied)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(copied)
    settings = json.loads((copied / "tokenizer_config.json").read_text())
    (copied / "tokenizer_config.json").write_text(json.dumps(settings | {"padding_side": "left"}))
    assert AutoTokenizer.from_pretrained(copied).padding_side == "left"
    pooled(copied, pooling)
    for path in intents.glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        write_rows(path, [row | {"text": row["text"] + " and so on" * (i % 5)} for i, row in enumerate(rows)])
    # Kept small: an error in one row of the training must not drown in what it learns.
    changed(intents, pad_token="<|end|>", max_length=20, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    assert m2m("select", "--config", intents / "intents.yaml", "--tokens_per_batch", "4096") == 0
    out = intents / "out"
    apart = intents / "apart"
    shutil.copytree(out, apart)
    (apart / "trials.jsonl").unlink()
    shutil.rmtree(apart / "trials.values", ignore_errors=True)
    flags = ("--tokens_per_batch", "1", "--output_dir", apart)
    assert m2m("search", "--config", intents / "intents.yaml", *flags) == 0
    base, told = (trial_of(place, set())["logprobs"] for place in (out, apart))
    assert base == pytest.approx(told, abs=2e-5)

    # As code that shares nothing with this scores them, one by one.
    model = AutoModel.from_pretrained(copied).eval()

    def embedded(text: str, longest: int) -> torch.Tensor:
        with torch.no_grad():
            found = model(
                **tokenizer(text, truncation=True, max_length=longest, return_tensors="pt")
            ).last_hidden_state[0]
        return torch.nn.functional.normalize(found[0] if pooling == "cls_token" else found.mean(0), dim=0)

    rows = [json.loads(line) for line in (intents / "validation_intents.jsonl").read_text().splitlines()]
    assert max(len(tokenizer(row["text"])["input_ids"]) for row in rows) > 20
    labels = sorted({row["label"] for row in rows})
    names = torch.stack([embedded(label.replace("_", " "), 64) for label in labels])
    scores = [(20 * names @ embedded(row["text"], 20)).log_softmax(0) for row in rows]
    expected = [float(one[labels.index(row["label"])]) for one, row in zip(scores, rows, strict=True)]
    assert base == pytest.approx(expected, abs=2e-5)

    classify.main(out / "recipe.yaml")
    ours, theirs = (load_file(out / place / "adapter_model.safetensors") for place in ("final", "trained-by-recipe"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_gradients_that_are_accumulated_are_those_of_a_larger_batch(intents, copied):
    config = json.loads((copied / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (copied / "config.json").write_text(json.dumps(config))
    changed(intents, lora_dropout=0.0)

    def trained(rows: int, times: int) -> dict:
        out = intents / f"out-{rows}"
        flags = ("--per_device_train_batch_size", rows, "--gradient_accumulation_steps", times, "--output_dir", out)
        assert m2m("adapters", "--config", intents / "intents.yaml", *flags) == 0
        return load_file(out / "adapters" / "colours" / "adapter_model.safetensors")

    whole, parts = trained(4, 1), trained(2, 2)
    assert all(torch.allclose(whole[name], parts[name], rtol=0, atol=1e-5) for name in whole)


def test_what_scores_and_experts_depend_on_has_another_name(intents, copied, tmp_path):
    def names(**values) -> tuple:
        one = searcher(intents, **values)
        return (
            one._head_fingerprint,
            json.dumps(one.facts, sort_keys=True),
            one.scorers["intents"]["validation"].fingerprint,
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
    before = one.facts, one._head_fingerprint
    tokens = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    tokens["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(tokens))
    one = searcher(folder)
    assert one.facts != before[0]
    assert one._head_fingerprint != before[1]


def test_macro_f1_counts_every_label_alike(intents):
    write_rows(
        intents / "validation_intents.jsonl", intent_rows(["red", "red", "red", "cold", "hot", "hello_there"], 11, 100)
    )
    target = changed(intents)["targets"]["intents"]
    changed(intents, targets={"intents": target | {"metric": "macro_f1"}})
    one = searcher(intents)
    one.train_adapters()
    scorer = one.scorers["intents"]["validation"]
    stack = one._open_stack(one.merge_method)
    rows = one.targets["intents"].rows
    with torch.no_grad():
        guesses = [int(scorer._outputs(stack, [number])[0].argmax()) for number in range(len(rows))]
    score = []
    for label in {row.answer for row in rows} | set(guesses):
        hits = sum(guess == row.answer == label for guess, row in zip(guesses, rows, strict=True))
        all_of = guesses.count(label) + sum(row.answer == label for row in rows)
        score.append(2 * hits / all_of)
    assert scorer.score(stack, [{}], 500)[0].value == pytest.approx(sum(score) / len(score))


def test_a_test_is_a_choice_among_the_labels_of_the_validation_set(intents):
    write_rows(intents / "test_intents.jsonl", intent_rows(["red", "cold"], 6, 200))
    one = searcher(intents)
    assert {row.choices for row in one.targets["intents"].test_rows} == {("cold", "hello_there", "hot", "red")}
    write_rows(intents / "test_intents.jsonl", intent_rows(["red", "warm"], 6, 200))
    with pytest.raises(InputError, match=r"test_data, row 2.label: expected one of cold.*got 'warm'"):
        searcher(intents).check()


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_of_every_mode_are_what_the_model_takes(pictures_of, tmp_path, classify, channels):
    torch.manual_seed(0)
    labels = [*RGB]
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: place for place, name in enumerate(labels)}}
    shape = SHAPE | {"num_channels": channels}
    ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **shape, **names)).save_pretrained(tmp_path / "vit")
    mean = {"image_mean": [0.5] * channels, "image_std": [0.5] * channels}
    ViTImageProcessorPil(size={"height": 8, "width": 8}, **mean).save_pretrained(tmp_path / "vit")
    folder = pictures_of(tmp_path / "vit", "all-linear")
    expected, shown = [], []
    processor = AutoImageProcessor.from_pretrained(tmp_path / "vit")
    model = ViTForImageClassification.from_pretrained(tmp_path / "vit").eval()
    for number, mode in enumerate(("RGB", "L", "P", "RGBA", "CMYK", "LA")):
        label = labels[number % 3]
        one = picture(RGB[label], 5000 + number).convert(mode)
        for part in ("asked", "learned"):  # lossless, and every mode that the format has
            place = folder / part / label / f"{number}.{'tiff' if mode in ('CMYK', 'LA') else 'png'}"
            place.parent.mkdir(parents=True, exist_ok=True)
            (one if part == "asked" else one.rotate(90)).save(place)
        given = one.convert("L" if channels == 1 else "RGB")
        with torch.no_grad():
            expected.append(float(model(**processor(given, return_tensors="pt")).logits[0].log_softmax(0)[number % 3]))
        shown.append(given)
    given = yaml.safe_load((folder / "images.yaml").read_text())
    given["candidates"]["all"] = {"path": "imagefolder", "data_dir": "learned", "required": True}
    given["targets"] = {
        "asked": {"data": {"path": "imagefolder", "data_dir": "asked"}, "scorer": "classification", "metric": "logprob"}
    }
    changed(folder, "images", **given)
    assert m2m("select", "--config", folder / "images.yaml") == 0
    found = lines(folder / "out")[frozenset()]["logprobs"]
    assert sorted(found) == pytest.approx(sorted(expected), abs=2e-5)
    classify.main(folder / "out" / "recipe.yaml")
    file = "adapter_model.safetensors"
    ours, theirs = (load_file(folder / "out" / place / file) for place in ("final", "trained-by-recipe"))
    assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-8) for name in ours)
    assert yaml.safe_load((folder / "out" / "recipe.yaml").read_text())["image_mode"] == (
        "L" if channels == 1 else "RGB"
    )


def test_pixels_that_are_no_colours_are_refused(pictures_of, vit, capsys):
    folder = pictures_of(vit, "all-linear")
    for label in ("red", "blue"):
        (folder / "deep" / label).mkdir(parents=True)
        Image.new("I;16", (8, 8), 40_000).save(folder / "deep" / label / "0.png")
    given = yaml.safe_load((folder / "images.yaml").read_text())
    given["candidates"]["all"] = {"path": "imagefolder", "data_dir": "deep"}
    changed(folder, "images", **given)
    assert m2m("adapters", "--config", folder / "images.yaml") == 2
    assert "candidates.all, row 1.image: cannot be read (pixels of mode I;16" in capsys.readouterr().err


def test_labels_of_a_target_that_the_run_does_not_have_are_refused_before_the_training(own, capsys):
    target = changed(own)["targets"]["intents"]
    changed(own, targets={"intents": target | {"labels": ["green", "blue", "purple"]}})
    assert m2m("adapters", "--config", own / "intents.yaml") == 2
    assert (
        "targets.intents.labels: purple: expected one of the 3 labels of this run: red, green, blue"
        in capsys.readouterr().err
    )


def test_a_map_of_labels_is_that_of_the_whole_candidate(intents):
    rows = [
        row | {"shop": "s1" if row["label"] == "blau" or number > 8 else "s0"}
        for number, row in enumerate(intent_rows(["rot", "blau", "neu"], 12))
    ]
    write_rows(intents / "colours.jsonl", rows)
    given = changed(intents)
    mapped = {"path": "json", "data_files": "colours.jsonl", "labels": {"rot": "red", "blau": "blue"}}
    given["candidates"] = {
        "parts": mapped | {"where": {"shop": "s0"}},
        "few": mapped | {"max_examples": 5, "where": {"shop": "s1"}},
    }
    write_rows(intents / "colours.jsonl", [*rows, rows[2] | {"label": None, "shop": "s2"}])
    changed(intents, **given)
    one = searcher(intents)
    assert set(one.candidates["parts"].rows["label"]) == {"red", "neu"}
    given["candidates"]["few"]["labels"] = {"rouge": "red"}
    changed(intents, **given)
    with pytest.raises(
        InputError, match=r"candidates.few.labels: no row is labelled rouge; its labels are blau, neu, rot"
    ):
        searcher(intents).check()


def test_parts_are_called_by_the_names_of_a_class_column(intents):
    rows = [
        row | {"shop": number % 3 - 1} for number, row in enumerate(intent_rows(["red", "blue", "green", "one"], 12))
    ]
    kinds = {"text": Value("string"), "label": Value("string"), "shop": ClassLabel(names=["web", "books"])}
    Dataset.from_list(rows, features=Features(kinds)).to_parquet(intents / "colours.parquet")
    given = changed(intents)
    given["candidates"] = {"all": {"path": "parquet", "data_files": "colours.parquet", "split_by": "shop"}}
    changed(intents, **given)
    one = searcher(intents)
    assert list(one.candidates) == ["all-books", "all-none", "all-web"]
    assert len(one.candidates["all-web"].rows) == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"label_template": "a {label}"}, "label_template: without effect, as the model's own classifier"),
        ({"labels": {"red": "crimson", "blue": "blue"}}, "labels: words for red: without effect"),
    ],
)
def test_what_the_models_own_classifier_does_not_read_is_refused(own, capsys, change, words):
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
def test_what_images_have_no_use_for_is_refused(pictures_of, vit, capsys, change, words):
    folder = pictures_of(vit, "all-linear")
    changed(folder, "images", **change)
    assert m2m("adapters", "--config", folder / "images.yaml") == 2
    assert words in capsys.readouterr().err


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


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_what_is_no_encoder_of_texts_is_refused(intents, clip, tmp_path, capsys, kind):
    if kind == "t5":
        T5Model(T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=320)).save_pretrained(
            tmp_path / "t5"
        )
        build_tokenizer().save_pretrained(tmp_path / "t5")
    changed(intents, model_name_or_path=str(clip if kind == "clip" else tmp_path / "t5"))
    assert m2m("adapters", "--config", intents / "intents.yaml") == 2
    assert "reads more than a text; expected a text encoder" in capsys.readouterr().err


def test_names_that_are_alike_up_to_where_they_are_cut_are_the_same_words(intents, capsys):
    long = "so very long that it is cut " * 12
    write_rows(intents / "greetings.jsonl", intent_rows([f"{long} one", f"{long} two"], 6))
    assert m2m("adapters", "--config", intents / "intents.yaml") == 2
    assert "are the same words to the model" in capsys.readouterr().err


def test_names_of_labels_are_published_as_they_are():
    given = {"head": {"among": {"a": ["/m/0a", "/sports/ball/red"]}}, "id2label": {"0": "/m/0a"}, "labels": ["/m/0a"]}
    assert published(given) == given


def test_the_head_is_there_when_a_command_scores(intents, tmp_path):
    script = tmp_path / "score.py"
    script.write_text(
        "import json\nfrom safetensors.numpy import load_file\n"
        f"vectors = load_file({str(intents / 'out' / 'head.safetensors')!r})['vectors']\n"
        "print(json.dumps({'score': float(vectors.shape[0])}))\n"
    )
    changed(intents, targets={"t": {"scorer": "command", "command": [sys.executable, str(script), "{adapter}"]}})
    assert m2m("search", "--config", intents / "intents.yaml") == 0
    assert trial_of(intents / "out", {"noise"})["score"] == 7
