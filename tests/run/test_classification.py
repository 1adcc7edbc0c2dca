"""Whole runs of classification, of texts and of images, with experts of both kinds."""

import json

import pytest
import torch
from peft import PeftModel
from pico import INTENTS, ROOT, changed, intent_rows, lines, m2m, searcher, trials
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer, BertConfig

from m2m_hf.merging.full_experts import floats
from m2m_hf.training.recording import BankProgress

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

    def model(adapter=None):
        base = AutoModel.from_pretrained(encoder)
        return base.eval() if adapter is None else PeftModel.from_pretrained(base, adapter).merge_and_unload().eval()

    base, merged = model(), model()
    state = merged.state_dict()
    for name in ("colours", "noise"):
        folder = out / "adapters" / name
        if kind:
            change = load_file(folder / "delta.safetensors")
        else:
            change = {key: value - base.state_dict()[key] for key, value in model(folder).state_dict().items()}
        for key, value in change.items():
            state[key] += value / 2
    for names, scored in (({"colours", "noise"}, merged), (set(), base)):
        logprobs = lines(out)[frozenset(names)]["logprobs"]
        assert logprobs == pytest.approx(expected(base, scored, tokenizer, rows, labels), abs=2e-5)

    # The final model, as others load it, scores what was said.
    final = AutoModel.from_pretrained(out / "final").eval() if kind else model(out / "final")
    again = expected(base, final, tokenizer, rows, labels)
    assert summary["final"]["validation"] == pytest.approx(sum(again) / len(again), abs=2e-5)
    with safe_open(out / "final" / "head.safetensors", "pt") as head:
        about = json.loads(head.metadata()["head"])
    assert about["labels"] == sorted({label for labels in INTENTS.values() for label in labels} | {"cold", "hot"})

    # Once more: nothing is trained, scored or loaded.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("m2m_hf.run.base_model.load_base", lambda *args, **kwargs: pytest.fail("loaded"))
        assert m2m("select", "--config", out / "config.yaml") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert m2m("status", out) == 0
    head = (out / "head.safetensors").stat()
    assert m2m("search", "--config", out / "config.yaml") == 0
    assert (out / "head.safetensors").stat() == head  # a command that is given the head is still the same scorer


@pytest.mark.parametrize("kind", KINDS)
def test_the_recipe_gives_the_final_weights_without_this_package(intents, kind, classify):
    assert m2m("select", "--config", intents / "intents.yaml", *kind) == 0
    recipe = (ROOT / "recipes" / "classify.py").read_text()
    assert "import m2m_hf" not in recipe
    assert "from m2m_hf" not in recipe
    compare_with_recipe(intents, classify, "model" if kind else "adapter_model")


def test_the_recipe_for_images_gives_the_weights_of_a_full_expert(pictures_of, vit, classify):
    folder = pictures_of(vit, "all-linear")
    assert m2m("select", "--config", folder / "images.yaml", *KINDS[1]) == 0
    compare_with_recipe(folder, classify, "model")


def compare_with_recipe(folder, classify, name: str) -> None:
    """To the last bit; of whole models to what fp32 keeps of a weight and its change together."""
    classify.main(folder / "out" / "recipe.yaml")
    files = [folder / "out" / place / f"{name}.safetensors" for place in ("final", "trained-by-recipe")]
    ours, theirs = map(load_file, files)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert torch.allclose(tensor, theirs[key], rtol=0, atol=1e-8 if name == "model" else 0), key


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


def test_a_candidate_that_joins_changes_nothing_for_the_others(intents):
    """Labels of their own make a space that needs not know of the others."""
    path, out = intents / "intents.yaml", intents / "out"
    whole = path.read_text()
    path.write_text(whole.replace("  noise: {path: json, data_files: noise.jsonl}\n", ""))
    assert m2m("search", "--config", path) == 0
    records = [out / "adapters" / name / "training.json" for name in ("greetings", "colours")]
    before, journal = [record.read_bytes() for record in records], trials(out)
    path.write_text(whole)
    assert m2m("search", "--config", path) == 0
    assert [record.read_bytes() for record in records] == before
    assert trials(out)[: len(journal)] == journal


def test_the_base_is_given_back_whole(intents):
    one = searcher(intents, "--expert", "full", "--learning_rate", "1e-3")
    before = {name: tensor.clone() for name, tensor in floats(one.run.base.model).items()}
    one.train_adapters()
    assert all(torch.equal(tensor, before[name]) for name, tensor in floats(one.run.base.model).items())
    assert not any(parameter.requires_grad for parameter in one.run.base.model.parameters())


def test_only_the_parameters_that_are_named_are_trained(intents):
    command = ("adapters", "--config", intents / "intents.yaml", "--expert", "full", "--trained_parameters")
    assert m2m(*command, "nowhere") == 2
    assert m2m(*command, "attention") == 0
    names = load_file(intents / "out" / "adapters" / "colours" / "delta.safetensors")
    assert names
    assert all("attention" in name for name in names)


@pytest.mark.parametrize("method", ["dare", "task_arithmetic"])
def test_a_search_of_full_experts_by_another_merge_method(intents, method):
    assert searcher(intents, "--expert", "full", "--merge_method", method).search().best.mixture.names


def test_fine_tunes_of_others_are_searched_without_training(intents, encoder, tmp_path, capsys, monkeypatch):
    for number, name in enumerate(INTENTS):
        torch.manual_seed(number)
        model = AutoModel.from_pretrained(encoder)
        with torch.no_grad():
            for parameter in model.encoder.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter) * parameter.abs().mean())
        model.save_pretrained(tmp_path / "theirs" / name)
    changed(intents, expert="full", experts={name: f"theirs/{name}" for name in INTENTS})
    monkeypatch.setattr("m2m_hf.training.jobs.train_expert", lambda *args: pytest.fail("an expert was trained"))
    assert m2m("search", "--config", intents / "intents.yaml") == 0
    assert "cannot be checked" in capsys.readouterr().out
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
    changed(intents, expert="full", experts={"noise": "theirs"})
    assert m2m("adapters", "--config", intents / "intents.yaml") == 2
    assert words in capsys.readouterr().err


@pytest.fixture
def studied(request, intents, pictures_of, vit):
    """A classification run and the flags of its study: full experts of texts, or adapters of images."""
    if request.param == "images":
        return pictures_of(vit, "all-linear"), ("images.yaml",)
    return intents, ("intents.yaml", *KINDS[1])


@pytest.mark.parametrize("studied", ["images", "full"], indirect=True)
def test_a_study(studied):
    folder, (config, *flags) = studied
    assert m2m("fidelity", "--config", folder / config, *flags) == 0
    found = json.loads((folder / "out" / "fidelity.json").read_text())
    assert len(found["mixtures"]) == 7
    assert all(one["trained"]["score"] is not None for one in found["mixtures"])
    assert len(found["similarity"]) == 3
    assert (folder / "out" / "report.html").exists()


def test_the_plan_writes_nothing(intents):
    for kind in KINDS:
        assert m2m("select", "--config", intents / "intents.yaml", *kind, "--dry_run") == 0
        assert not (intents / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"task": "causal_lm"},
            "is a BertModel, which predicts no next token; give a causal LM, or classify with it: task: seq",
        ),
        ({"task": "image_classification"}, "no classifier"),
        ({"packing": True}, "packing: belongs to task: causal_lm"),
        ({"load_in_4bit": True}, "only for LoRA adapters of causal LMs"),
        ({"expert": "half"}, "one of lora, full"),
        ({"lora_target_modules": "pooler.dense"}, "do not fit this model"),
        ({"label_smoothing_factor": 0.1}, "not for classification"),
        ({"use_liger_kernel": True}, "not for classification"),
        ({"completion_only_loss": True}, "belongs to task: causal_lm"),
        ({"loss_type": "dft"}, "belongs to task: causal_lm"),
        ({"train_sampling_strategy": "group_by_length"}, "expected random"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_written(intents, capsys, change, words):
    changed(intents, **change)
    assert m2m("adapters", "--config", intents / "intents.yaml") == 2
    assert words in capsys.readouterr().err
    assert not (intents / "out").exists()
