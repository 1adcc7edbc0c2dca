"""Callbacks in training scripts of one's own: scores while it trains, and a training that is not changed by it."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, get_peft_model
from pico import DEVICE, RGB, USE_CPU, build_model, build_tokenizer, candidate_rows, picture, write_images, write_rows
from transformers import (
    BertForSequenceClassification,
    EarlyStoppingCallback,
    Trainer,
    TrainingArguments,
    ViTForImageClassification,
    ViTImageProcessorPil,
)
from trl import SFTConfig, SFTTrainer

from m2m_hf import InputError, MergeProbeCallback, TargetScoreCallback
from m2m_hf.callbacks import live_adapter
from m2m_hf.core.mixture import Mixture
from m2m_hf.merging.adapter import Adapter
from m2m_hf.merging.gated_stack import GatedStack


def trainer(tokenizer, folder, word: str = "alpha", **options) -> SFTTrainer:
    """The script of somebody else: LoRA with dropout, evaluated every two steps."""
    options = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 6, "logging_steps": 2, **options}
    rows = Dataset.from_list(candidate_rows(word, 16))
    return SFTTrainer(
        build_model("llama"),
        SFTConfig(
            output_dir=str(folder), use_cpu=USE_CPU, bf16=False, learning_rate=0.01, per_device_train_batch_size=4,
            disable_tqdm=True, report_to="none", save_strategy=options.pop("save_strategy", "no"), **options,
        ),
        train_dataset=rows,
        eval_dataset=rows.select(range(4)) if options["eval_strategy"] != "no" else None,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, lora_dropout=0.3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )  # fmt: skip


@pytest.fixture
def targets(project, monkeypatch):
    monkeypatch.chdir(project)
    quiz, said = ({"path": "json", "data_files": f"{name}.jsonl"} for name in ("validation", "alpha"))
    return {
        "colours": {"data": quiz, "scorer": "choice", "metric": "logprob"},
        "said": {"data": said, "scorer": "loss", "weight": 3},
    }


def assert_same_training(plain: Trainer, other: Trainer) -> None:
    """They log the same losses and end with the same weights, modes, and parameters that are trained."""
    for (name, ours), theirs in zip(plain.model.named_parameters(), other.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        assert ours.requires_grad == theirs.requires_grad, name
    assert [one.training for one in plain.model.modules()] == [one.training for one in other.model.modules()]
    losses, theirs = (
        [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in logged(one, "loss")] for one in (plain, other)
    )
    assert losses == theirs
    assert losses


def logged(one: Trainer, key: str) -> list[dict]:
    """The lines of a training's log that have the key."""
    return [entry for entry in one.state.log_history if key in entry]


def test_scores_are_logged_and_the_training_is_not_changed(tokenizer, tmp_path, targets):
    plain = trainer(tokenizer, tmp_path / "plain")
    plain.train()
    scored = trainer(tokenizer, tmp_path / "scored")
    callback = TargetScoreCallback(scored, targets)
    scored.add_callback(callback)
    before = callback.scores()
    scored.train()
    told = logged(scored, "eval_colours")
    assert [entry["step"] for entry in told] == [2, 4, 6]
    last = told[-1]
    assert callback.scores() == {key: last[key] for key in before}
    assert last["eval_said"] > before["eval_said"]  # it learns what it is trained on
    assert last["eval_targets"] == pytest.approx((last["eval_colours"] + 3 * last["eval_said"]) / 4)
    assert_same_training(plain, scored)
    scored.model.save_pretrained(tmp_path / "adapter")
    stack = GatedStack(build_model("llama"), {"one": Adapter.load(tmp_path / "adapter")})
    for name, scorer in callback._targets.scorers.items():  # as a search would score what was trained
        assert scorer.score(stack, [{"one": 1.0}], 100)[0].value == pytest.approx(last[f"eval_{name}"], abs=1e-5)


def test_the_best_checkpoint_and_an_early_stop_go_by_the_score(tokenizer, tmp_path, targets):
    flags = {"save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}
    one = trainer(
        tokenizer, tmp_path, metric_for_best_model="eval_said", greater_is_better=False, max_steps=20, **flags
    )
    one.add_callback(TargetScoreCallback(one, targets))
    one.add_callback(EarlyStoppingCallback(2))
    one.train()  # the score rises, and lower was asked for: the first is the best
    assert one.state.global_step == 6
    assert one.state.best_model_checkpoint.endswith("checkpoint-2")
    assert one.state.best_metric == logged(one, "eval_said")[0]["eval_said"]


def test_a_run_without_evaluation_is_scored_after_every_epoch(tokenizer, tmp_path, targets):
    flags = {"eval_strategy": "no", "max_steps": -1, "num_train_epochs": 2, "logging_strategy": "epoch"}
    plain = trainer(tokenizer, tmp_path / "plain", **flags)
    plain.train()
    one = trainer(tokenizer, tmp_path / "scored", **flags)
    one.add_callback(TargetScoreCallback(one, targets))
    one.train()
    assert_same_training(plain, one)
    assert [entry["epoch"] for entry in logged(one, "eval_said")] == [1.0, 2.0]


def test_what_cannot_be_scored_so_is_refused(tokenizer, tmp_path, targets):
    one = trainer(tokenizer, tmp_path)
    with pytest.raises(InputError, match=r"targets\.x\.scorer: command needs an adapter"):
        TargetScoreCallback(one, {"x": {"scorer": "command", "command": ["true"]}})
    with pytest.raises(InputError, match="nothing found"):
        TargetScoreCallback(one, {"x": {"scorer": "loss", "data": {"path": "json", "data_files": "none.jsonl"}}})


def test_sealed_rows_are_not_made_ready(tokenizer, tmp_path, targets):
    write_rows(Path("sealed.jsonl"), [{"prompt": "a", "completion": "b" * 9999}])  # fits into no model
    said = targets["said"] | {"test_data": {"path": "json", "data_files": "sealed.jsonl"}}
    assert TargetScoreCallback(trainer(tokenizer, tmp_path), {"said": said}).scores().keys() == {"eval_said"}


SAVED = {"eval_strategy": "no", "save_strategy": "steps", "save_steps": 2}


@pytest.fixture
def bank(tokenizer, tmp_path):
    """Two adapters of somebody's own script, with the checkpoints that TRL leaves."""
    for word in ("beta", "gamma"):
        trainer(tokenizer, tmp_path / word, word, **SAVED).train()
    return {word: tmp_path / word for word in ("beta", "gamma")}


def test_mixtures_are_ranked_while_an_adapter_is_trained(tokenizer, tmp_path, targets, bank, capsys):
    plain = trainer(tokenizer, tmp_path / "plain", **SAVED)
    plain.train()
    probed = trainer(tokenizer, tmp_path / "alpha", **SAVED)
    rankings = []

    class Keep(MergeProbeCallback):
        def probe(self, share):
            rankings.append((share, super().probe(share)))
            return rankings[-1][1]

    probe = Keep(probed, "alpha", bank | {"later": tmp_path / "nothing"}, targets, every=2, patience=1, agreement=-1)
    probed.add_callback(probe)
    probed.train()
    assert_same_training(plain, probed)
    # What was said of the mixtures is what the checkpoints of all three at that step score, averaged.
    assert [share for share, _ in rankings] == [2 / 6, 4 / 6, 1]
    for share, ranking in rankings:
        folders, then = {"alpha": tmp_path / "alpha", **bank}, f"checkpoint-{round(share * 6)}"
        adapters = {name: Adapter.load(folder / then) for name, folder in folders.items()}
        stack = GatedStack(build_model("llama"), adapters)
        assert len(ranking) == 7
        assert [score for _, score in ranking] == sorted((score for _, score in ranking), reverse=True)
        for mixture, score in ranking:
            weighed = {
                name: scorer.score(stack, [mixture.weights], 100)[0].value
                for name, scorer in probe._targets.scorers.items()
            }
            assert score == pytest.approx((weighed["colours"] + 3 * weighed["said"]) / 4, abs=1e-5), mixture
    assert [entry["step"] for entry in logged(probed, "probe_best")] == [2, 4, 6]
    assert [entry["step"] for entry in logged(probed, "probe_kendall")] == [4, 6]
    assert "adapters trained that far already lead to the same choice" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("agreement", "orders", "settled", "stopped"),
    [
        (0.9, ["abc"], 2 / 20, 6),  # twice as before: known at the third
        (0.9, ["abc", "bac", "bac", "abc"], 8 / 20, 12),
        (0.9, ["abc", "acb"] * 5, None, 20),  # the best one is the same, the order is not
        (0.3, ["abc", "acb"] * 5, 2 / 20, 6),
        (-1, ["abc", "bac"] * 5, None, 20),  # the best one is not the same
    ],
)
def test_a_ranking_that_stands_still_ends_the_training(
    tokenizer, tmp_path, targets, agreement, orders, settled, stopped
):
    one = trainer(tokenizer, tmp_path, eval_strategy="no", max_steps=20)

    class Told(MergeProbeCallback):
        def probe(self, share):
            order = orders[min(round(share * 10), len(orders)) - 1]
            return [(Mixture.subset([name]), score) for name, score in zip(order, (3.0, 2.0, 1.0), strict=True)]

    probe = Told(one, "alpha", {}, targets, every=2, patience=2, agreement=agreement, stop=True)
    one.add_callback(probe)
    one.train()
    assert one.state.global_step == stopped
    assert probe.settled == settled


def test_what_cannot_be_probed_is_refused(tokenizer, tmp_path, targets):
    one = trainer(tokenizer, tmp_path)
    with pytest.raises(InputError, match="'alpha' is what this trainer trains"):
        MergeProbeCallback(one, "alpha", {"alpha": tmp_path}, targets, every=2)
    with pytest.raises(InputError, match="every and patience of at least 1"):
        MergeProbeCallback(one, "alpha", {}, targets, every=0)
    one.model = build_model("llama")
    with pytest.raises(InputError, match="trains a LoRA adapter"):
        MergeProbeCallback(one, "alpha", {}, targets, every=2)
    one.model = get_peft_model(one.model, LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    with pytest.raises(InputError, match="an adapter on embeddings cannot be probed"):
        MergeProbeCallback(one, "alpha", {}, targets, every=2)


def test_the_live_adapter_is_copied_to_the_cpu_where_loaded_ones_are(tokenizer, tmp_path, monkeypatch):
    class OnAccelerator:
        def detach(self):
            return self

        def to(self, device, copy):
            assert copy
            return torch.ones(1, device=device)

    state = {"weight": OnAccelerator()}
    monkeypatch.setattr("m2m_hf.callbacks.get_peft_model_state_dict", lambda *args, **kwargs: state)
    assert live_adapter(trainer(tokenizer, tmp_path).model).tensors["weight"].device.type == "cpu"


def test_the_adapter_that_is_trained_is_probed_and_frozen_parts_stay_so(tokenizer, tmp_path, targets, bank):
    def prepared(folder):
        one = trainer(tokenizer, folder, **SAVED)
        torch.manual_seed(0)
        one.model.add_adapter("mine", one.model.peft_config["default"])
        one.model.set_adapter("mine")
        for name, parameter in one.model.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(False)
        return one

    plain = prepared(tmp_path / "plain")
    plain.train()
    probed = prepared(tmp_path / "probed")
    probe = MergeProbeCallback(probed, "alpha", {}, targets, every=2)
    probed.add_callback(probe)
    score = TargetScoreCallback(probed, targets)
    probed.train()
    assert_same_training(plain, probed)
    assert probe.ranking[0][1] == pytest.approx(score.scores()["eval_targets"], abs=1e-5)


@pytest.fixture
def script(vit, classifier):
    """The script of somebody else: transformers' own Trainer, on a classifier with a head that it trains too."""

    def make(folder, images: bool = False, **lora) -> Trainer:
        torch.manual_seed(0)
        if images:
            model = ViTForImageClassification.from_pretrained(vit, hidden_dropout_prob=0.3)
            processing = ViTImageProcessorPil.from_pretrained(vit)
            inputs = [{"pixel_values": processing(picture(RGB[name], 1))["pixel_values"][0]} for name in RGB]
        else:
            model = BertForSequenceClassification.from_pretrained(classifier, hidden_dropout_prob=0.3)
            processing = build_tokenizer()
            inputs = [dict(processing(name)) for name in RGB]
        rows = Dataset.from_list([given | {"labels": label} for label, given in enumerate(inputs)] * 4)
        if lora:
            model = get_peft_model(model, LoraConfig(r=2, target_modules=["query", "value"], **lora))
        args = TrainingArguments(
            output_dir=str(folder), use_cpu=USE_CPU, learning_rate=0.01, per_device_train_batch_size=4, eval_strategy="steps",
            eval_steps=2, max_steps=4, disable_tqdm=True, report_to="none", save_strategy="steps", save_steps=2, logging_steps=2,
        )  # fmt: skip
        return Trainer(model, args, train_dataset=rows, eval_dataset=rows.select(range(3)), processing_class=processing)

    return make


def asked(tmp_path, images: bool = False, **more) -> dict:
    """A target of rows that a classifier may be asked; the labels of texts are the numbers that stand for them."""
    if images:
        path = write_images(tmp_path / "asked.parquet", [*RGB], 7, 10)
        return {"data": {"path": "parquet", "data_files": str(path)}, "scorer": "classification", **more}
    rows = [{"text": f"it is {'very ' * one}{[*RGB][one % 3]}", "label": one % 3} for one in range(7)]
    path = write_rows(tmp_path / "asked.jsonl", rows)
    labels = {str(number): name for number, name in enumerate(RGB)}
    return {"data": {"path": "json", "data_files": str(path)}, "scorer": "classification", "labels": labels, **more}


@pytest.mark.parametrize("images", [False, True])
def test_a_classifier_is_scored_as_it_is_and_its_training_is_not_changed(script, tmp_path, images):
    plain = script(tmp_path / "plain", images)
    plain.train()
    one = script(tmp_path / "scored", images)
    target = asked(tmp_path, images, metric="logprob")
    callback = TargetScoreCallback(one, {"colours": target, "right": target | {"metric": "accuracy"}})
    one.add_callback(callback)
    before = callback.scores()
    one.train()
    assert_same_training(plain, one)
    told = logged(one, "eval_colours")
    assert [entry["step"] for entry in told] == [2, 4]
    one.model.eval()
    logits = []
    for row in load_dataset(**target["data"], split="train"):  # one by one, as nothing is padded then
        given = one.processing_class(row["image" if images else "text"], return_tensors="pt")
        with torch.no_grad():
            logits.append(one.model(**given.to(DEVICE)).logits[0].cpu())
    of = torch.stack(logits).log_softmax(-1)
    truth = torch.arange(7) % 3
    expected = float(of[range(7), truth].mean())
    assert told[-1]["eval_colours"] == pytest.approx(expected, abs=1e-5)
    assert told[-1]["eval_right"] == pytest.approx(float((of.argmax(-1) == truth).double().mean()))
    assert before["eval_colours"] != pytest.approx(expected, abs=1e-3)  # the head that is trained is asked


def test_mixtures_of_a_classifier_with_a_frozen_head_are_probed(script, tmp_path):
    target = {"colours": asked(tmp_path, metric="logprob")}
    script(tmp_path / "beta", bias="none").train()
    one = script(tmp_path / "alpha", bias="none")
    probe = MergeProbeCallback(one, "alpha", {"beta": tmp_path / "beta"}, target, every=2)
    one.add_callback(probe)
    one.train()
    adapters = {name: Adapter.load(tmp_path / name / "checkpoint-4") for name in ("alpha", "beta")}
    stack = GatedStack(script(tmp_path / "new").model, adapters)
    (scorer,) = probe._targets.scorers.values()
    assert len(probe.ranking) == 3
    for mixture, score in probe.ranking:
        assert score == pytest.approx(scorer.score(stack, [mixture.weights], 100)[0].value, abs=1e-5)
    heads = script(tmp_path / "heads", task_type="SEQ_CLS")  # PEFT trains the head beside it
    with pytest.raises(InputError, match="modules_to_save"):
        MergeProbeCallback(heads, "alpha", {}, target, every=2)


def test_what_a_classifier_cannot_be_asked_is_refused(script, tokenizer, tmp_path, targets):
    one = script(tmp_path)
    target = asked(tmp_path)
    with pytest.raises(InputError, match=r"targets\.colours\.scorer: .*expected classification, got choice"):
        TargetScoreCallback(one, targets)
    with pytest.raises(InputError, match=r"'0': expected one of the 3 labels of this run: red, green, blue"):
        TargetScoreCallback(one, {"colours": {**target, "labels": None}})
    one.processing_class.pad_token = None
    with pytest.raises(InputError, match="its tokenizer has no pad_token"):
        TargetScoreCallback(one, {"colours": target})
    one.model.config.problem_type = "multi_label_classification"
    with pytest.raises(InputError, match="BertForSequenceClassification, gives multi_label_classification"):
        TargetScoreCallback(one, {"colours": target})
    one = script(tmp_path, images=True)
    one.processing_class = tokenizer
    with pytest.raises(InputError, match="expected one with an image processor"):
        TargetScoreCallback(one, {"colours": asked(tmp_path, images=True)})
