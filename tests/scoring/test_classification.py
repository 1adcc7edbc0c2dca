"""Scores of classifiers against code that shares nothing with ours."""

import json
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
from m2m_hf.merging.adapter import write_adapter
from m2m_hf.modeling.processing import inputs_of
from m2m_hf.scoring.make import make_scorers

ADAPTER = "adapter_model.safetensors"
KINDS = [(), ("--expert", "full", "--learning_rate", "1e-3")]


def validation(folder: Path) -> list[dict]:
    return list(load_dataset("parquet", data_files=str(folder / "validation.parquet"), split="train"))


def named(labels: list[str]) -> dict:
    """What a model's configuration says of its labels."""
    return {"id2label": dict(enumerate(labels)), "label2id": {label: place for place, label in enumerate(labels)}}


def expert_of(out: Path) -> dict:
    return load_file(next((out / "adapters" / "warm").glob("*.safetensors")))


def ready(one: MergeToMixSearcher, target: str = "intents") -> tuple:
    """The scorer of a target, and the stack of the trained adapters."""
    one.train_adapters()
    return one.run.scorers[target]["validation"], one.run.open_stack(one.run.merge_method)


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

    # As code that shares nothing with this scores them, one by one.
    model = AutoModel.from_pretrained(copied).eval()

    def embedded(text: str, longest: int) -> torch.Tensor:
        with torch.no_grad():
            inputs = tokenizer(text, truncation=True, max_length=longest, return_tensors="pt")
            found = model(**inputs).last_hidden_state[0]
        return torch.nn.functional.normalize(found[0] if pooling == "cls_token" else found.mean(0), dim=0)

    rows = [json.loads(line) for line in (intents / "validation_intents.jsonl").read_text().splitlines()]
    assert max(len(tokenizer(row["text"])["input_ids"]) for row in rows) > 20
    labels = sorted({row["label"] for row in rows})
    names = torch.stack([embedded(label.replace("_", " "), 64) for label in labels])
    scores = [(20 * names @ embedded(row["text"], 20)).log_softmax(0) for row in rows]
    expected = [float(one[labels.index(row["label"])]) for one, row in zip(scores, rows, strict=True)]
    assert lines(out)[frozenset()]["logprobs"] == pytest.approx(expected, abs=2e-5)
    classify.main(out / "recipe.yaml")
    ours, theirs = (load_file(out / place / ADAPTER) for place in ("final", "trained-by-recipe"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_of_every_mode_are_what_the_model_takes(pictures_of, tmp_path, classify, channels):
    torch.manual_seed(0)
    labels = [*RGB]
    shape, image_mode = SHAPE | {"num_channels": channels}, "L" if channels == 1 else "RGB"
    ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **shape, **named(labels))).save_pretrained(
        tmp_path / "vit"
    )
    mean = {"image_mean": [0.5] * channels, "image_std": [0.5] * channels}
    ViTImageProcessorPil(size={"height": 8, "width": 8}, **mean).save_pretrained(tmp_path / "vit")
    folder = pictures_of(tmp_path / "vit", "all-linear")
    expected = []
    processor = AutoImageProcessor.from_pretrained(tmp_path / "vit")
    model = ViTForImageClassification.from_pretrained(tmp_path / "vit").eval()
    for number, mode in enumerate(("RGB", "L", "P", "RGBA", "CMYK", "LA")):
        label = labels[number % 3]
        one = picture(RGB[label], 5000 + number).convert(mode)
        for part in ("asked", "learned"):  # lossless, and every mode that the format has
            place = folder / part / label / f"{number}.{'tiff' if mode in ('CMYK', 'LA') else 'png'}"
            place.parent.mkdir(parents=True, exist_ok=True)
            (one if part == "asked" else one.rotate(90)).save(place)
        inputs = processor(one.convert(image_mode), return_tensors="pt")
        with torch.no_grad():
            expected.append(float(model(**inputs).logits[0].log_softmax(0)[number % 3]))
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
    ours, theirs = (load_file(folder / "out" / place / ADAPTER) for place in ("final", "trained-by-recipe"))
    assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-8) for name in ours)
    assert yaml.safe_load((folder / "out" / "recipe.yaml").read_text())["image_mode"] == image_mode


@pytest.mark.parametrize("kind", KINDS)
def test_a_vit_with_a_classifier_of_its_own(pictures_of, vit, kind, capsys):
    folder = pictures_of(vit, "all-linear")
    assert m2m("select", "--config", folder / "images.yaml", *kind) == 0
    out = folder / "out"
    assert not [name for name in expert_of(out) if "classifier" in name]
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
    assert expert_of(folder / "out")
    assert not [name for name in expert_of(folder / "out") if "text_model" in name]


def test_pictures_are_prepared_once_as_far_as_there_is_room(pictures_of, vit, monkeypatch):
    folder = pictures_of(vit, "all-linear")
    found, prepared = [], []

    def counted(processing, content, limit):
        prepared[-1] += len(content)
        return inputs_of(processing, content, limit)

    monkeypatch.setattr("m2m_hf.scoring.classification.inputs_of", counted)
    run = searcher(folder, name="images")
    _, stack = ready(run, "colours")
    for room in (1 << 30, 2 * 3 * 8 * 8 * 4, 0):
        monkeypatch.setattr("m2m_hf.scoring.classification.MAX_PIXEL_BYTES", room)
        scorer = make_scorers(run.run.targets["colours"], run.run.task.scoring_setup(0))["validation"]
        for mixture in ({"warm": 1.0}, {"warm": 0.5, "cold": 0.5}):
            prepared.append(0)
            found.append(scorer.score(stack, [mixture], 15)[0].logprobs)
    assert prepared == [7, 0, 7, 5, 7, 7]
    assert found[0] == found[2] == found[4]
    assert found[1] == found[3] == found[5]


def test_scores_depend_neither_on_the_batch_nor_on_the_company_and_the_gradient_is_theirs(intents):
    scorer, stack = ready(searcher(intents))
    mixtures = [{"colours": 1.0}, {}, {"noise": 0.5, "greetings": 0.5}]
    alone = [scorer.score(stack, [mixture], 16)[0] for mixture in mixtures]
    together = scorer.score(stack, mixtures, 4096)
    for first, second in zip(alone, together, strict=True):
        assert first.logprobs == pytest.approx(second.logprobs, abs=2e-5)
    some = scorer.score(stack, mixtures[:1], 64, rows=[7, 2])[0]
    assert some.logprobs == pytest.approx([alone[0].logprobs[7], alone[0].logprobs[2]], abs=2e-5)
    # Of the mean log-probability by each weight, against differences.
    weights = {"colours": 0.6, "noise": 0.4, "greetings": 0.0}
    _, slope = scorer.gradient(stack, weights, 100)
    for name, weight in weights.items():
        both = [weights | {name: weight + step} for step in (1e-2, -1e-2)]
        up, down = (score.mean_logprob for score in scorer.score(stack, both, 100))
        assert slope[name] == pytest.approx((up - down) / 2e-2, rel=0.02, abs=2e-3), name


def test_metrics_and_the_other_objectives(intents):
    for metric in ("accuracy", "macro_f1"):
        target = changed(intents)["targets"]["intents"] | {"metric": metric}
        changed(intents, targets={"intents": target})
        out = intents / metric
        assert m2m("search", "--config", intents / "intents.yaml", "--output_dir", out) == 0
        line = lines(out)[frozenset({"colours", "noise"})]
        assert len(line["logprobs"]) == 10
        assert len(line["values"]) == (10 if metric == "accuracy" else 0)
        assert line["stderr"] is not None
    changed(intents, targets={"intents": target | {"metric": "accuracy"}})
    for flags in (("--objective", "ensemble"), ("--strategy", "gradient", "--weights", "continuous")):
        assert searcher(intents, *flags, "--output_dir", str(intents / flags[1])).search().best.mixture.names
    with pytest.raises(InputError, match=r"gradient needs expert: lora"):
        searcher(intents, "--strategy", "gradient", "--expert", "full", "--output_dir", str(intents / "f")).search()


def test_a_search_scores_the_same_in_the_process_that_trained_and_in_another(intents, tmp_path):
    """The Trainer writes special tokens into the configuration, by which this model finds where a text ends."""
    shape = SHAPE | {"vocab_size": 320, "pad_token_id": 319}
    torch.manual_seed(0)
    LlamaForSequenceClassification(LlamaConfig(**shape, **named(COLOURS[:3]))).save_pretrained(tmp_path / "llama")
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
    ours, theirs = ([one["logprobs"] for one in trials(intents / out)] for out in ("out", "apart"))
    assert ours == theirs


def command(folder: Path, place: str, value: str) -> dict:
    """A target that a script scores by an expression over the tensors in the file that `place` names."""
    script = folder / "score.py"
    script.write_text(
        "import json, sys\nfrom safetensors.numpy import load_file\n"
        f"tensors = load_file({place})\nprint(json.dumps({{'score': float({value})}}))\n"
    )
    return {"scorer": "command", "command": [sys.executable, str(script)]}


def test_the_head_is_there_when_a_command_scores(intents):
    target = command(intents, repr(str(intents / "out" / "head.safetensors")), "tensors['vectors'].shape[0]")
    changed(intents, targets={"t": target})
    assert m2m("search", "--config", intents / "intents.yaml") == 0
    assert lines(intents / "out")[frozenset({"noise"})]["score"] == 7


@pytest.mark.parametrize(
    ("expert", "right", "wrong"), [("lora", "{adapter}", "{model}"), ("full", "{model}", "{adapter}")]
)
def test_a_command_is_given_what_there_is(intents, capsys, expert, right, wrong):
    changed(intents, expert=expert, targets={"t": {"scorer": "command", "command": ["score", wrong]}})
    assert m2m("adapters", "--config", intents / "intents.yaml") == 2
    assert f"with expert: {expert} give {right}, not {wrong}" in capsys.readouterr().err


def test_a_command_scores_merged_models(intents):
    """It is given the folder of a model with the averaged weights."""
    value = "tensors['encoder.layer.0.attention.self.query.weight'].astype(float).sum()"
    target = command(intents, "sys.argv[1] + '/model.safetensors'", value)
    target["command"].append("{model}")
    changed(intents, expert="full", learning_rate=1e-3, targets={"t": target})
    assert m2m("search", "--config", intents / "intents.yaml") == 0
    found = {names: line["score"] for names, line in lines(intents / "out").items()}
    pair = (found[frozenset({"noise"})] + found[frozenset({"colours"})]) / 2
    assert found[frozenset({"noise", "colours"})] == pytest.approx(pair, abs=1e-4)
    assert found[frozenset({"noise"})] != pytest.approx(found[frozenset({"colours"})], abs=1e-3)


def test_a_command_loads_its_adapter_on_the_encoder(intents, tmp_path):
    one = searcher(intents)
    one.train_adapters()
    base = one.run.model_args.model_name_or_path
    write_adapter(tmp_path / "adapter", one.run.bank.load(), {"noise": 0.5, "colours": 0.5}, base)
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(base), tmp_path / "adapter")
    written = [bool(weight.any()) for name, weight in model.named_parameters() if "lora_B" in name]
    assert written
    assert all(written)
