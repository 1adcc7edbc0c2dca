"""Classification and full experts where something is odd: each was wrong once."""

import json
import shutil
import sys

import pytest
import torch
from pico import COLOURS, INTENTS, build_tokenizer, changed, intent_rows, m2m, write_rows
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from m2m_hf.config.parsing import parse
from m2m_hf.console import Terminal
from m2m_hf.data.mixture_rows import mixture_dataset
from m2m_hf.data.rows import image_digest
from m2m_hf.searcher import MergeToMixSearcher
from m2m_hf.training.trainers import Collate


def lines(out) -> list[dict]:
    return [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]


@pytest.fixture
def copied(intents, encoder, tmp_path):
    """The encoder in a folder of its own, on which the run is."""
    shutil.copytree(encoder, tmp_path / "model")
    changed(intents, model_name_or_path=str(tmp_path / "model"))
    return tmp_path / "model"


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
    assert [one["logprobs"] for one in lines(intents / "out")] == [one["logprobs"] for one in lines(intents / "apart")]


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


def test_texts_that_are_cut_elsewhere_are_other_experts(intents, copied, capsys):
    path = intents / "intents.yaml"
    assert m2m("adapters", "--config", path) == 0
    shutil.rmtree(intents / "out" / "adapters" / "noise")
    settings = json.loads((copied / "tokenizer_config.json").read_text())
    (copied / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 3}))
    assert m2m("adapters", "--config", path) == 2
    assert "limit (" in capsys.readouterr().err


def test_a_closed_space_is_what_targets_choose_from_too(intents):
    space = sorted({label for labels in INTENTS.values() for label in labels} | {"cold", "hot"})
    changed(intents, labels=space)
    one = MergeToMixSearcher(*parse(intents / "intents.yaml"), Terminal(quiet=True))
    assert one.targets["intents"].rows[0].choices == tuple(space)


@pytest.mark.parametrize("name", ["encoder.layer.1.output.dense.weight", "pooler.dense.weight"])
def test_weights_that_are_missing_are_refused_unless_nothing_reads_them(intents, copied, capsys, name):
    weights = load_file(copied / "model.safetensors")
    del weights[name]
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    code = m2m("adapters", "--config", intents / "intents.yaml")
    assert code == (0 if "pooler" in name else 2)
    assert ("would be random numbers" in capsys.readouterr().err) == (code == 2)


def test_what_a_dtype_cannot_hold_is_no_expert(intents, capsys):
    flags = ("--expert", "full", "--delta_dtype", "float16", "--learning_rate", "1e-9")
    assert m2m("adapters", "--config", intents / "intents.yaml", *flags) == 2
    assert "delta_dtype: float16 keeps nothing of what was learned" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("label_smoothing_factor", 0.1, "not for classification"),
        ("use_liger_kernel", True, "not for classification"),
        ("completion_only_loss", True, "belongs to task: causal_lm"),
        ("loss_type", "dft", "belongs to task: causal_lm"),
        ("train_sampling_strategy", "group_by_length", "expected random"),
    ],
)
def test_settings_without_effect_are_refused(intents, capsys, field, value, words):
    changed(intents, **{field: value})
    assert m2m("adapters", "--config", intents / "intents.yaml") == 2
    assert words in capsys.readouterr().err
    assert not (intents / "out").exists()


BOTH = '{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": true}'


@pytest.mark.parametrize("content", ['{"pooling_mode_lasttoken": true}', "[1]", "{", BOTH])
def test_a_pooling_that_is_not_ours_is_refused(intents, copied, capsys, content):
    (copied / "1_Pooling").mkdir()
    (copied / "1_Pooling" / "config.json").write_text(content)
    assert m2m("adapters", "--config", intents / "intents.yaml") == 2
    assert "1_Pooling/config.json: expected" in capsys.readouterr().err


def test_a_candidate_with_one_label_is_refused(intents, capsys):
    write_rows(intents / "noise.jsonl", intent_rows(["one"], 6))
    assert m2m("adapters", "--config", intents / "intents.yaml") == 2
    assert "all its rows are labelled 'one'" in capsys.readouterr().err


def test_rows_drawn_from_a_candidate_keep_its_labels(intents):
    one = MergeToMixSearcher(*parse(intents / "intents.yaml"), Terminal(quiet=True))
    settings = one._training(one.args, one.model_args)
    rows = mixture_dataset({"greetings": 1, "colours": 2}, one.candidates, 0)
    collate = Collate(settings.processing, settings.head, settings.among, settings.limit)
    allowed = collate(list(rows))["allowed"]
    assert sorted(allowed.sum(1).tolist()) == [2, 3, 3]


def test_labels_of_the_same_words_are_refused_where_they_are_alternatives(intents, capsys):
    write_rows(intents / "greetings.jsonl", intent_rows(["hello_there", "hello there"], 6))
    assert m2m("adapters", "--config", intents / "intents.yaml") == 2
    assert "are the same words to the model" in capsys.readouterr().err
    assert not (intents / "out").exists()
    write_rows(intents / "greetings.jsonl", intent_rows(["hello there", "good bye"], 6))
    write_rows(intents / "noise.jsonl", intent_rows(["hello_there", "one"], 6))
    assert m2m("adapters", "--config", intents / "intents.yaml") == 0


def test_names_that_no_row_has_are_said(intents, capsys):
    given = changed(intents)
    given["candidates"]["colours"]["labels"] = {"rouge": "red"}
    changed(intents, **given)
    assert m2m("adapters", "--config", intents / "intents.yaml") == 2
    assert "candidates.colours.labels: no row is labelled rouge" in capsys.readouterr().err


@pytest.mark.parametrize(("expert", "wrong"), [("lora", "{model}"), ("full", "{adapter}")])
def test_a_command_is_given_what_there_is(intents, capsys, expert, wrong):
    target = {"scorer": "command", "command": ["score", wrong]}
    changed(intents, expert=expert, targets={"t": target})
    assert m2m("adapters", "--config", intents / "intents.yaml") == 2
    assert f"with expert: {expert} it is given" in capsys.readouterr().err


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
    found = {frozenset(one["names"]): one["score"] for one in lines(intents / "out")}
    pair = (found[frozenset({"noise"})] + found[frozenset({"colours"})]) / 2
    assert found[frozenset({"noise", "colours"})] == pytest.approx(pair, abs=1e-4)


def test_palettes_are_told_apart_by_their_colours():
    pictures = []
    for colour in ((255, 0, 0), (0, 0, 255)):
        one = Image.new("P", (4, 4))
        one.putpalette([*colour] * 256)
        pictures.append(one)
    assert image_digest(pictures[0]) != image_digest(pictures[1])
    assert image_digest(pictures[0]) == image_digest(Image.new("RGB", (4, 4), (255, 0, 0)))


def test_a_tokenizer_without_a_token_to_pad_with(intents, copied, capsys):
    tokenizer = AutoTokenizer.from_pretrained(copied)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(copied)
    assert m2m("adapters", "--config", intents / "intents.yaml") == 2
    assert "pad_token: None is not a token" in capsys.readouterr().err
