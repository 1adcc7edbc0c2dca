"""Classification with a frozen head: of texts by the embedding of labels' names, and with experts of both kinds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Value
from peft import PeftModel
from pico import COLOURS, INTENTS, intent_rows, m2m, searcher, trial_of, write_rows
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer, BertConfig, BertForSequenceClassification

from m2m_hf import InputError, MergeToMixConfig, MergeToMixSearcher
from m2m_hf.config.parsing import parse
from m2m_hf.console import Terminal
from m2m_hf.merging.full_experts import floats
from m2m_hf.training.trainers import BankProgress

ROOT = Path(__file__).parents[2]
KINDS = [(), ("--expert", "full", "--learning_rate", "1e-3")]


def expected(base, merged, tokenizer, rows: list[dict], labels: list[str]) -> list[float]:
    """The log-probability of each row's label: cosines of mean-pooled texts and names, times 20, one row at a time."""
    with torch.no_grad():

        def embedded(model, text: str) -> torch.Tensor:
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            return torch.nn.functional.normalize(hidden.mean(0), dim=0)

        names = torch.stack([embedded(base, label.replace("_", " ")) for label in labels])
        scores = torch.stack([20 * names @ embedded(merged, row["text"]) for row in rows])
        return [float(one[labels.index(row["label"])]) for one, row in zip(scores.log_softmax(1), rows, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_from_rows_to_a_final_model(intents, encoder, kind, capsys):
    assert m2m("select", "--config", intents / "intents.yaml", *kind) == 0
    told = capsys.readouterr().out
    out = intents / "out"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["counts"]["trials"] == 8
    assert summary["final"]["test"] is not None
    assert "m2m recipe classify --config" in told

    # The merged score is that of weights averaged by code that shares nothing with this.
    rows = intent_rows(["red", "cold", "hot", "hello_there"], 10, 100)
    labels = sorted({row["label"] for row in rows})
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    base, merged = AutoModel.from_pretrained(encoder).eval(), AutoModel.from_pretrained(encoder).eval()
    state = merged.state_dict()
    for name in ("colours", "noise"):
        folder = out / "adapters" / name
        if kind:
            change = load_file(folder / "delta.safetensors")
        else:
            tuned = (
                PeftModel.from_pretrained(AutoModel.from_pretrained(encoder), folder).merge_and_unload().state_dict()
            )
            change = {key: value - base.state_dict()[key] for key, value in tuned.items()}
        for key, value in change.items():
            state[key] += value / 2
    found = trial_of(out, {"colours", "noise"})
    assert found["logprobs"] == pytest.approx(expected(base, merged, tokenizer, rows, labels), abs=2e-5)
    base_line = trial_of(out, set())
    assert base_line["logprobs"] == pytest.approx(expected(base, base, tokenizer, rows, labels), abs=2e-5)

    # The final model, as others load it, scores what was said.
    if kind:
        final = AutoModel.from_pretrained(out / "final").eval()
    else:
        final = PeftModel.from_pretrained(AutoModel.from_pretrained(encoder), out / "final").eval()
    again = expected(base, final, tokenizer, rows, labels)
    assert summary["final"]["validation"] == pytest.approx(sum(again) / len(again), abs=2e-5)
    with safe_open(out / "final" / "head.safetensors", "pt") as head:
        about = json.loads(head.metadata()["head"])
    assert about["labels"] == sorted({label for labels in INTENTS.values() for label in labels} | {"cold", "hot"})

    # Once more: nothing is trained, scored or loaded.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("m2m_hf.run.ingredients.load_base", lambda *args, **kwargs: pytest.fail("loaded"))
        assert m2m("select", "--config", out / "config.yaml") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert m2m("status", out) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_recipe_gives_the_final_weights_without_this_package(intents, kind, classify):
    assert m2m("select", "--config", intents / "intents.yaml", *kind) == 0
    out = intents / "out"
    assert "import m2m_hf" not in (ROOT / "recipes" / "classify.py").read_text()
    assert "from m2m_hf" not in (ROOT / "recipes" / "classify.py").read_text()
    classify.main(out / "recipe.yaml")
    made = out / "trained-by-recipe"
    file = "model.safetensors" if kind else "adapter_model.safetensors"
    ours, theirs = load_file(out / "final" / file), load_file(made / file)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        # Full: to what fp32 keeps of a weight and its change together.
        assert torch.allclose(tensor, theirs[name], rtol=0, atol=1e-8 if kind else 0), name


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_it_goes_on_to_the_same_bytes(intents, kind):
    flags = ("--max_steps", "6", "--save_steps", "2", "--lora_dropout", "0.1", *kind)
    assert m2m("adapters", "--config", intents / "intents.yaml", *flags, "--output_dir", intents / "whole") == 0

    def killed(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BankProgress, "on_step_begin", killed)
        assert m2m("adapters", "--config", intents / "intents.yaml", *flags) == 130
    assert m2m("adapters", "--config", intents / "intents.yaml", *flags) == 0
    file = "delta.safetensors" if kind else "adapter_model.safetensors"
    for name in INTENTS:
        ours, whole = ((intents / place / "adapters" / name / file).read_bytes() for place in ("out", "whole"))
        assert ours == whole, name


def test_the_base_is_given_back_whole(intents):
    one = searcher(intents, "--expert", "full", "--learning_rate", "1e-3")
    before = {name: tensor.clone() for name, tensor in floats(one.base).items()}
    one.train_adapters()
    assert all(torch.equal(tensor, before[name]) for name, tensor in floats(one.base).items())
    assert not any(parameter.requires_grad for parameter in one.base.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_trains_the_pooler_that_nothing_reads(intents, kind):
    assert m2m("adapters", "--config", intents / "intents.yaml", *kind) == 0
    file = "delta.safetensors" if kind else "adapter_model.safetensors"
    names = load_file(intents / "out" / "adapters" / "colours" / file)
    assert names
    assert not [name for name in names if "pooler" in name]


def test_only_the_parameters_that_are_named_are_trained(intents):
    flags = ("--expert", "full", "--trained_parameters", "attention")
    assert m2m("adapters", "--config", intents / "intents.yaml", *flags) == 0
    names = load_file(intents / "out" / "adapters" / "colours" / "delta.safetensors")
    assert names
    assert all("attention" in name for name in names)
    assert (
        m2m("adapters", "--config", intents / "intents.yaml", "--expert", "full", "--trained_parameters", "nowhere")
        == 2
    )


@pytest.mark.parametrize("method", ["ties", "dare", "task_arithmetic"])
def test_every_merge_method_scores_full_experts(intents, method, capsys):
    one = searcher(intents, "--expert", "full", "--merge_method", method)
    result = one.search()
    assert result.best.mixture.names
    with pytest.raises(InputError, match="factors"):
        searcher(intents, "--expert", "full", "--merge_method", "linear")


def test_a_candidate_that_joins_changes_nothing_for_the_others(intents):
    """Labels of their own make a space that needs not know of the others."""
    path = intents / "intents.yaml"
    whole = path.read_text()
    path.write_text(whole.replace("  noise: {path: json, data_files: noise.jsonl}\n", ""))
    assert m2m("search", "--config", path) == 0
    before = {
        one: (intents / "out" / "adapters" / one / "training.json").read_bytes() for one in ("greetings", "colours")
    }
    lines = (intents / "out" / "trials.jsonl").read_text().splitlines()
    path.write_text(whole)
    assert m2m("search", "--config", path) == 0
    assert all(
        (intents / "out" / "adapters" / one / "training.json").read_bytes() == text for one, text in before.items()
    )
    assert (intents / "out" / "trials.jsonl").read_text().splitlines()[: len(lines)] == lines


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
        line = trial_of(out, {"colours", "noise"})
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


def test_the_gradient_is_that_of_the_likelihood(intents):
    """Of the mean log-probability by each weight, against differences."""
    one = searcher(intents, "--strategy", "gradient", "--weights", "continuous")
    one.train_adapters()
    (objective,) = one._objectives("merged")
    stack, weights, budget = objective.model(one.search().best.mixture)
    scorer = one.scorers["intents"]["validation"]
    _, slope = scorer.gradient(stack, weights, budget)
    for name in stack.names:
        by = [
            scorer.score(stack, [weights | {name: weights.get(name, 0.0) + step}], budget)[0].mean_logprob
            for step in (1e-2, -1e-2)
        ]
        assert slope[name] == pytest.approx((by[0] - by[1]) / 2e-2, rel=0.02, abs=2e-3), name


def test_scores_do_not_depend_on_the_batch_or_the_company(intents):
    one = searcher(intents)
    one.train_adapters()
    stack = one._open_stack(one.merge_method)
    scorer = one.scorers["intents"]["validation"]
    mixtures = [{"colours": 1.0}, {}, {"noise": 0.5, "greetings": 0.5}]
    alone = [scorer.score(stack, [mixture], 16)[0] for mixture in mixtures]
    together = scorer.score(stack, mixtures, 4096)
    for first, second in zip(alone, together, strict=True):
        assert first.logprobs == pytest.approx(second.logprobs, abs=2e-5)
    some = scorer.score(stack, mixtures[:1], 64, rows=[7, 2])[0]
    assert some.logprobs == pytest.approx([alone[0].logprobs[7], alone[0].logprobs[2]], abs=2e-5)


def test_a_label_space_that_is_given_is_what_every_row_is_a_choice_in(intents, capsys):
    space = sorted({*COLOURS, "hello_there", "good_bye", "cold", "hot"})
    one = searcher(intents, labels={label: label.replace("_", " ") for label in space})
    one.train_adapters()
    assert one.head.labels == tuple(space)
    assert one.head.closed
    with pytest.raises(
        InputError, match=r"candidates.colours, row 3.label: 'blue': expected one of the 2 labels of this run"
    ):
        searcher(intents, labels=["red", "green"]).check()
    # Mapped onto it, they are in it.
    path = intents / "intents.yaml"
    given = yaml.safe_load(path.read_text())
    given["labels"] = ["red", "blue"]
    given["candidates"] = {
        "greetings": {**given["candidates"]["greetings"], "labels": {"hello_there": "red", "good_bye": "blue"}}
    }
    given["targets"]["intents"]["labels"] = {"red": "red", "cold": "blue", "hot": "red", "hello_there": "red"}
    path.write_text(yaml.safe_dump(given))
    one = searcher(intents, "--output_dir", str(intents / "mapped"))
    assert set(one.candidates["greetings"].rows["label"]) == {"red", "blue"}
    assert {row.choices for row in one.targets["intents"].rows} == {("blue", "red")}


def test_label_columns_of_other_kinds(intents):
    rows = intent_rows(["red", "green"], 6)
    of_classes = Dataset.from_list(
        [{"text": row["text"], "label": ["red", "green"].index(row["label"])} for row in rows],
        features=Features({"text": Value("string"), "label": ClassLabel(names=["red", "green"])}),
    )
    numbers = Dataset.from_list([{"text": row["text"], "label": i % 2} for i, row in enumerate(rows)])
    ours, args, model_args = parse(intents / "intents.yaml")
    candidates = {
        "classes": of_classes,
        "numbers": {
            "path": "json",
            "data_files": str(write_rows(intents / "n.jsonl", numbers.to_list())),
            "labels": {"0": "red", "1": "green"},
        },
    }

    config = MergeToMixConfig(task=ours.task, candidates=candidates, targets=ours.to_yaml()["targets"])
    one = MergeToMixSearcher(config, args, model_args, Terminal(quiet=True))
    assert one.candidates["classes"].rows["label"] == one.candidates["numbers"].rows["label"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task": "causal_lm"}, "belong to task: sequence_classification"),
        ({"task": "image_classification"}, "no classifier"),
        ({"packing": True}, "packing: belongs to task: causal_lm"),
        ({"load_in_4bit": True}, "only for LoRA adapters of causal LMs"),
        ({"trained_parameters": "x"}, "belongs to expert: full"),
        ({"experts": "org/x"}, "belongs to expert: full"),
        ({"expert": "full", "adapters": "org/x"}, "experts:"),
        ({"expert": "full", "trained_parameters": "("}, "no regular expression"),
        ({"labels": ["one"]}, "two at least"),
        ({"label_template": "a photo"}, "{label}"),
        ({"expert": "half"}, "lora or full"),
        ({"lora_target_modules": "pooler.dense"}, "do not fit this model"),
    ],
)
def test_what_cannot_be_is_said(intents, capsys, change, words):
    path = intents / "intents.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | change))
    assert m2m("adapters", "--config", path) == 2
    assert words in capsys.readouterr().err
    assert not (intents / "out").exists()


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"text": "a"}], "no column 'label'"),
        ([{"body": "a", "label": "b"}], "columns: {body: text}"),
        ([{"text": "a", "label": None}, {"text": "b", "label": "x"}], "row 1.label: expected a label, got None"),
        ([{"text": " ", "label": "x"}], "row 1.text: expected text"),
        ([{"text": "a", "label": 0.5}], "names or whole numbers"),
    ],
)
def test_rows_that_are_none_are_named(intents, capsys, rows, words):
    write_rows(intents / "colours.jsonl", rows)
    assert m2m("adapters", "--config", intents / "intents.yaml") == 2
    assert words in capsys.readouterr().err


def test_target_rows_in_a_candidate_are_found(intents, capsys):
    write_rows(intents / "noise.jsonl", [{"text": "RED  108 big small", "label": "x"}, {"text": "other", "label": "y"}])
    assert m2m("adapters", "--config", intents / "intents.yaml") == 2
    assert "also stand in noise (1)" in capsys.readouterr().err


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
    assert "their average to none" in capsys.readouterr().err


def test_fine_tunes_of_others_are_searched_without_training(intents, encoder, tmp_path, capsys, monkeypatch):
    for number, name in enumerate(INTENTS):
        torch.manual_seed(number)
        model = AutoModel.from_pretrained(encoder)
        with torch.no_grad():
            for parameter in model.encoder.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter) * parameter.abs().mean())
        model.save_pretrained(tmp_path / "theirs" / name)
    path = intents / "intents.yaml"
    given = yaml.safe_load(path.read_text()) | {"expert": "full"}
    given["experts"] = {name: f"theirs/{name}" for name in INTENTS}
    path.write_text(yaml.safe_dump(given))
    monkeypatch.setattr("m2m_hf.training.bank.train_expert", lambda *args: pytest.fail("an expert was trained"))
    assert m2m("search", "--config", path) == 0
    told = capsys.readouterr().out
    assert "taken on trust" in told
    record = json.loads((intents / "out" / "adapters" / "noise" / "training.json").read_text())
    assert record["source"].endswith("theirs/noise")
    assert "learning_rate" in record["unknown"]
    change = load_file(intents / "out" / "adapters" / "noise" / "delta.safetensors")
    base, theirs = (load_file(one / "model.safetensors") for one in (encoder, tmp_path / "theirs" / "noise"))
    assert all(torch.equal(base[name] + delta, theirs[name]) for name, delta in change.items())


@pytest.mark.parametrize(
    ("spoil", "words"), [("same", "it is the base itself"), ("far", "expected a fine-tune"), ("shape", "other weights")]
)
def test_what_is_no_fine_tune_of_the_base_is_refused(intents, encoder, tmp_path, capsys, spoil, words):
    model = AutoModel.from_pretrained(encoder)
    if spoil == "far":
        model.encoder.apply(
            lambda layer: torch.nn.init.normal_(layer.weight, std=1.0) if isinstance(layer, torch.nn.Linear) else None
        )
    if spoil == "shape":
        model = type(model)(
            BertConfig(vocab_size=320, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
        )
    model.save_pretrained(tmp_path / "theirs")
    path = intents / "intents.yaml"
    path.write_text(
        yaml.safe_dump(yaml.safe_load(path.read_text()) | {"expert": "full", "experts": {"noise": "theirs"}})
    )
    assert m2m("adapters", "--config", path) == 2
    assert words in capsys.readouterr().err


def test_a_study_of_full_experts(intents):
    assert m2m("fidelity", "--config", intents / "intents.yaml", "--expert", "full", "--learning_rate", "1e-3") == 0
    found = json.loads((intents / "out" / "fidelity.json").read_text())
    assert len(found["mixtures"]) == 7
    assert all(one["trained"]["score"] is not None for one in found["mixtures"])
    assert (intents / "out" / "report.html").exists()


def test_the_plan_writes_nothing(intents):
    for kind in KINDS:
        assert m2m("select", "--config", intents / "intents.yaml", *kind, "--dry_run") == 0
        assert not (intents / "out").exists()


def test_help_tells_of_tasks_and_experts():
    done = subprocess.run(
        [sys.executable, "-m", "m2m_hf.cli.main", "select", "--help"], capture_output=True, text=True, check=True
    )
    for word in ("sequence_classification", "image_classification", "expert", "trained_parameters", "label_template"):
        assert word in done.stdout
