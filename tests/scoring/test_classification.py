"""Scores of classifiers against code that shares nothing with ours."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import load_dataset
from peft import PeftModel
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
    pooled,
    searcher,
    trials,
    write_rows,
)
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    CLIPModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from m2m_hf import InputError, MergeToMixSearcher
from m2m_hf.config.parsing import parse
from m2m_hf.console import Terminal
from m2m_hf.merging.adapter import write_adapter
from m2m_hf.modeling.processing import inputs_of

KINDS = [(), ("--expert", "full", "--learning_rate", "1e-3")]


def validation(folder: Path) -> list[dict]:
    return list(load_dataset("parquet", data_files=str(folder / "validation.parquet"), split="train"))


# TRL's field, until version 2 of it; a configuration has no other way to say it.
DEPRECATED = pytest.mark.filterwarnings("ignore:`pad_token` is deprecated:FutureWarning")


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
    base, told = (lines(place)[frozenset()]["logprobs"] for place in (out, apart))
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
        scorer, stack = one.run.scorers["colours"]["validation"], one.run.open_stack(one.run.merge_method)
        for mixture in ({"warm": 1.0}, {"warm": 0.5, "cold": 0.5}):
            prepared.append(0)
            found.append(scorer.score(stack, [mixture], 15)[0].logprobs)
    assert prepared == [7, 0, 7, 5, 7, 7]
    assert found[0] == found[2] == found[4]
    assert found[1] == found[3] == found[5]


def test_scores_do_not_depend_on_the_batch_or_the_company(intents):
    one = searcher(intents)
    one.train_adapters()
    stack = one.run.open_stack(one.run.merge_method)
    scorer = one.run.scorers["intents"]["validation"]
    mixtures = [{"colours": 1.0}, {}, {"noise": 0.5, "greetings": 0.5}]
    alone = [scorer.score(stack, [mixture], 16)[0] for mixture in mixtures]
    together = scorer.score(stack, mixtures, 4096)
    for first, second in zip(alone, together, strict=True):
        assert first.logprobs == pytest.approx(second.logprobs, abs=2e-5)
    some = scorer.score(stack, mixtures[:1], 64, rows=[7, 2])[0]
    assert some.logprobs == pytest.approx([alone[0].logprobs[7], alone[0].logprobs[2]], abs=2e-5)


def test_the_gradient_is_that_of_the_likelihood(intents):
    """Of the mean log-probability by each weight, against differences."""
    one = searcher(intents, "--strategy", "gradient", "--weights", "continuous")
    one.train_adapters()
    (objective,) = one.run.objectives("merged")
    stack, weights, budget = objective.model(one.search().best.mixture)
    scorer = one.run.scorers["intents"]["validation"]
    _, slope = scorer.gradient(stack, weights, budget)
    for name in stack.names:
        by = [
            scorer.score(stack, [weights | {name: weights.get(name, 0.0) + step}], budget)[0].mean_logprob
            for step in (1e-2, -1e-2)
        ]
        assert slope[name] == pytest.approx((by[0] - by[1]) / 2e-2, rel=0.02, abs=2e-3), name


def test_macro_f1_counts_every_label_alike(intents):
    write_rows(
        intents / "validation_intents.jsonl", intent_rows(["red", "red", "red", "cold", "hot", "hello_there"], 11, 100)
    )
    target = changed(intents)["targets"]["intents"]
    changed(intents, targets={"intents": target | {"metric": "macro_f1"}})
    one = searcher(intents)
    one.train_adapters()
    scorer = one.run.scorers["intents"]["validation"]
    stack = one.run.open_stack(one.run.merge_method)
    rows = one.run.targets["intents"].rows
    with torch.no_grad():
        guesses = [int(scorer._outputs(stack, [number])[0].argmax()) for number in range(len(rows))]
    score = []
    for label in {row.answer for row in rows} | set(guesses):
        hits = sum(guess == row.answer == label for guess, row in zip(guesses, rows, strict=True))
        all_of = guesses.count(label) + sum(row.answer == label for row in rows)
        score.append(2 * hits / all_of)
    assert scorer.score(stack, [{}], 500)[0].value == pytest.approx(sum(score) / len(score))


def test_metrics_and_the_other_objectives(intents):
    for metric in ("accuracy", "macro_f1"):
        out = intents / metric
        path = intents / "intents.yaml"
        path.write_text(
            path.read_text()
            .replace("metric: logprob", f"metric: {metric}")
            .replace("metric: accuracy", f"metric: {metric}")
        )
        assert m2m("search", "--config", path, "--output_dir", out) == 0
        line = lines(out)[frozenset({"colours", "noise"})]
        assert len(line["logprobs"]) == 10
        assert len(line["values"]) == (10 if metric == "accuracy" else 0)
        assert line["stderr"] is not None
    one = searcher(
        intents,
        "--objective",
        "ensemble",
        "--output_dir",
        str(intents / "e"),
        targets={"t": {"data": {"path": "json", "data_files": "validation_intents.jsonl"}, "scorer": "classification"}},
    )
    assert one.search().best.mixture.names
    one = searcher(intents, "--strategy", "gradient", "--weights", "continuous", "--output_dir", str(intents / "g"))
    assert one.search().best.mixture.names
    with pytest.raises(InputError, match=r"gradient needs expert: lora"):
        searcher(intents, "--strategy", "gradient", "--expert", "full", "--output_dir", str(intents / "f")).search()


def test_a_search_scores_the_same_in_the_process_that_trained_and_in_another(intents, tmp_path):
    """The Trainer writes special tokens into the configuration, by which this model finds where a text ends."""
    shape = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 320,
    }
    names = {
        "id2label": dict(enumerate(COLOURS[:3])),
        "label2id": {name: number for number, name in enumerate(COLOURS[:3])},
    }
    torch.manual_seed(0)
    LlamaForSequenceClassification(LlamaConfig(**shape, pad_token_id=319, **names)).save_pretrained(tmp_path / "llama")
    build_tokenizer().save_pretrained(tmp_path / "llama")
    for name in ("greetings", "noise"):
        write_rows(intents / f"{name}.jsonl", intent_rows(COLOURS[:3], 9, len(name)))
    for part, start in (("validation", 100), ("test", 200)):
        write_rows(intents / f"{part}_intents.jsonl", intent_rows(COLOURS[:3], 9, start))
    changed(intents, model_name_or_path=str(tmp_path / "llama"), lora_target_modules=["q_proj", "v_proj"])
    path = intents / "intents.yaml"
    assert m2m("search", "--config", path) == 0
    assert m2m("adapters", "--config", path, "--output_dir", intents / "apart") == 0
    assert m2m("search", "--config", path, "--output_dir", intents / "apart") == 0
    assert [one["logprobs"] for one in trials(intents / "out")] == [
        one["logprobs"] for one in trials(intents / "apart")
    ]


def test_the_head_is_there_when_a_command_scores(intents, tmp_path):
    script = tmp_path / "score.py"
    script.write_text(
        "import json\nfrom safetensors.numpy import load_file\n"
        f"vectors = load_file({str(intents / 'out' / 'head.safetensors')!r})['vectors']\n"
        "print(json.dumps({'score': float(vectors.shape[0])}))\n"
    )
    changed(intents, targets={"t": {"scorer": "command", "command": [sys.executable, str(script), "{adapter}"]}})
    assert m2m("search", "--config", intents / "intents.yaml") == 0
    assert lines(intents / "out")[frozenset({"noise"})]["score"] == 7


@pytest.mark.parametrize(
    ("expert", "right", "wrong"), [("lora", "{adapter}", "{model}"), ("full", "{model}", "{adapter}")]
)
def test_a_command_is_given_what_there_is(intents, capsys, expert, right, wrong):
    target = {"scorer": "command", "command": ["score", wrong]}
    changed(intents, expert=expert, targets={"t": target})
    assert m2m("adapters", "--config", intents / "intents.yaml") == 2
    assert f"with expert: {expert} give {right}, not {wrong}" in capsys.readouterr().err


def test_a_command_scores_merged_models(intents, tmp_path):
    """It is given the folder of a model with the averaged weights."""
    script = tmp_path / "score.py"
    script.write_text(
        "import json, sys\nfrom safetensors.numpy import load_file\n"
        "weights = load_file(sys.argv[1] + '/model.safetensors')\n"
        "score = weights['encoder.layer.0.attention.self.query.weight'].astype(float).sum()\n"
        "print(json.dumps({'score': float(score)}))\n"
    )
    command = [sys.executable, str(script), "{model}"]
    changed(intents, expert="full", learning_rate=1e-3, targets={"t": {"scorer": "command", "command": command}})
    assert m2m("search", "--config", intents / "intents.yaml") == 0
    found = {frozenset(one["names"]): one["score"] for one in trials(intents / "out")}
    pair = (found[frozenset({"noise"})] + found[frozenset({"colours"})]) / 2
    assert found[frozenset({"noise", "colours"})] == pytest.approx(pair, abs=1e-4)
    assert found[frozenset({"noise"})] != pytest.approx(found[frozenset({"colours"})], abs=1e-3)


def test_a_command_loads_its_adapter_on_the_encoder(intents, tmp_path):
    one = searcher(intents)
    one.train_adapters()
    base = one.run.model_args.model_name_or_path
    write_adapter(tmp_path / "adapter", one.run.bank.load(), {"noise": 0.5, "colours": 0.5}, base)
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(base), tmp_path / "adapter")
    assert all(bool(weight.any()) for name, weight in model.named_parameters() if "lora_B" in name)
    assert "lora_B" in str(model)
