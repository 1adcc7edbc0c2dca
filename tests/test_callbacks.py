"""Callbacks in training scripts of one's own: scores while it trains, and a training that is not changed by it."""

import pytest
import torch
from datasets import Dataset, Features, Image, Value, load_dataset
from peft import LoraConfig, get_peft_model
from pico import COLOURS, build_model, build_tokenizer, candidate_rows, picture, write_rows
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    EarlyStoppingCallback,
    Trainer,
    TrainingArguments,
    ViTConfig,
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
    options = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 6, **options}
    rows = Dataset.from_list(candidate_rows(word, 16))
    return SFTTrainer(
        build_model("llama"),
        SFTConfig(
            output_dir=str(folder), use_cpu=True, bf16=False, learning_rate=0.01, per_device_train_batch_size=4,
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
    return {
        "colours": {
            "data": {"path": "json", "data_files": "validation.jsonl"},
            "scorer": "choice",
            "metric": "logprob",
        },
        "said": {"data": {"path": "json", "data_files": "alpha.jsonl"}, "scorer": "loss", "weight": 3},
    }


def test_scores_are_logged_and_the_training_is_not_changed(tokenizer, tmp_path, targets):
    plain = trainer(tokenizer, tmp_path / "plain")
    plain.train()
    scored = trainer(tokenizer, tmp_path / "scored")
    callback = TargetScoreCallback(scored, targets)
    scored.add_callback(callback)
    before = callback.scores()
    scored.train()
    logged = [entry for entry in scored.state.log_history if "eval_colours" in entry]
    assert [entry["step"] for entry in logged] == [2, 4, 6]
    last = logged[-1]
    assert callback.scores() == {key: last[key] for key in before}
    assert last["eval_said"] > before["eval_said"]  # it learns what it is trained on
    assert last["eval_targets"] == pytest.approx((last["eval_colours"] + 3 * last["eval_said"]) / 4)
    for (name, one), other in zip(plain.model.named_parameters(), scored.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert scored.model.training == plain.model.training
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
    first = next(entry["eval_said"] for entry in one.state.log_history if "eval_said" in entry)
    assert one.state.best_metric == first


def test_a_run_without_evaluation_is_scored_after_every_epoch(tokenizer, tmp_path, targets):
    one = trainer(tokenizer, tmp_path, eval_strategy="no", max_steps=-1, num_train_epochs=2)
    one.add_callback(TargetScoreCallback(one, targets))
    one.train()
    assert [entry["epoch"] for entry in one.state.log_history if "eval_said" in entry] == [1.0, 2.0]


def test_what_cannot_be_scored_so_is_refused(tokenizer, tmp_path, targets):
    one = trainer(tokenizer, tmp_path)
    with pytest.raises(InputError, match=r"targets\.x\.scorer: command needs an adapter"):
        TargetScoreCallback(one, {"x": {"scorer": "command", "command": ["true"]}})
    with pytest.raises(InputError, match="nothing found"):
        TargetScoreCallback(one, {"x": {"scorer": "loss", "data": {"path": "json", "data_files": "none.jsonl"}}})


SAVED = {"eval_strategy": "no", "save_strategy": "steps", "save_steps": 2}


@pytest.fixture
def bank(tokenizer, tmp_path):
    """Two adapters of somebody's own script, with the checkpoints that TRL leaves."""
    for word in ("beta", "gamma"):
        trainer(tokenizer, tmp_path / word, word, **SAVED).train()
    return {word: tmp_path / word for word in ("beta", "gamma")}


def test_mixtures_are_ranked_while_an_adapter_is_trained_which_is_not_changed(
    tokenizer, tmp_path, targets, bank, capsys
):
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
    for (name, one), other in zip(plain.model.named_parameters(), probed.model.named_parameters(), strict=True):
        assert torch.equal(one, other[1]), name
        assert one.requires_grad == other[1].requires_grad
    # What was said of the mixtures is what the checkpoints of all three at that step score, averaged.
    assert [share for share, _ in rankings] == [2 / 6, 4 / 6, 1]
    for share, ranking in rankings:
        folders = {"alpha": tmp_path / "alpha", **bank}
        stack = GatedStack(
            build_model("llama"),
            {name: Adapter.load(folder / f"checkpoint-{round(share * 6)}") for name, folder in folders.items()},
        )
        assert len(ranking) == 7
        assert [score for _, score in ranking] == sorted((score for _, score in ranking), reverse=True)
        for mixture, score in ranking:
            weighed = {
                name: scorer.score(stack, [mixture.weights], 100)[0].value
                for name, scorer in probe._targets.scorers.items()
            }
            assert score == pytest.approx((weighed["colours"] + 3 * weighed["said"]) / 4, abs=1e-5), mixture
    logged = [entry for entry in probed.state.log_history if "probe_best" in entry]
    assert [entry["step"] for entry in logged] == [2, 4, 6]
    assert ["probe_kendall" in entry for entry in logged] == [False, True, True]
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


def test_what_cannot_be_probed_is_refused(tokenizer, tmp_path, targets, bank):
    one = trainer(tokenizer, tmp_path / "one")
    with pytest.raises(InputError, match="'beta' is what this trainer trains"):
        MergeProbeCallback(one, "beta", bank, targets, every=2)
    with pytest.raises(InputError, match="every and patience of at least 1"):
        MergeProbeCallback(one, "alpha", bank, targets, every=0)
    full = SFTTrainer(
        build_model("llama"),
        SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
        train_dataset=Dataset.from_list(candidate_rows("alpha", 4)),
        processing_class=tokenizer,
    )
    with pytest.raises(InputError, match="trains a LoRA adapter"):
        MergeProbeCallback(full, "alpha", bank, targets, every=2)


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


@pytest.mark.parametrize("logging", [{"logging_strategy": "epoch"}, {"logging_steps": 2}])
def test_losses_are_logged_as_they_would_be_without(tokenizer, tmp_path, targets, bank, logging):
    def losses(*kinds):
        one = trainer(tokenizer, tmp_path / "alpha", **SAVED | {"max_steps": 8} | logging)
        for kind in kinds:
            one.add_callback(
                MergeProbeCallback(one, "alpha", bank, targets, every=2)
                if kind == "probe"
                else TargetScoreCallback(one, targets)
            )
        one.train()
        return [
            (entry["step"], entry["loss"], entry["grad_norm"]) for entry in one.state.log_history if "loss" in entry
        ]

    plain = losses()
    assert plain
    assert losses("target") == plain
    assert losses("probe", "target") == plain


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
    for (name, one), other in zip(plain.model.named_parameters(), probed.model.parameters(), strict=True):
        assert torch.equal(one, other), name
        assert one.requires_grad == other.requires_grad, name
    assert probe.ranking[0][1] == pytest.approx(score.scores()["eval_targets"], abs=1e-5)


def test_embeddings_are_refused_before_the_training(tokenizer, tmp_path, targets, bank):
    one = trainer(tokenizer, tmp_path / "one")
    one.model = get_peft_model(build_model("llama"), LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    with pytest.raises(InputError, match="an adapter on embeddings cannot be probed"):
        MergeProbeCallback(one, "alpha", bank, targets, every=2)


NAMES = {"id2label": dict(enumerate(COLOURS[:3])), "label2id": {name: place for place, name in enumerate(COLOURS[:3])}}
PICO = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def classifier(folder, images: bool, lora: LoraConfig | None = None, dropout: float = 0.3) -> Trainer:
    """The script of somebody else: transformers' own Trainer, on a classifier with a head that it trains too."""
    torch.manual_seed(0)
    options = {**PICO, **NAMES, "hidden_dropout_prob": dropout}
    if images:
        model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **options))
        processing = ViTImageProcessorPil(size={"height": 8, "width": 8})
        shown = [picture((200, 30, 30), 1), picture((30, 200, 30), 2), picture((30, 30, 200), 3)]
        rows = [dict(processing(shown[one % 3]), labels=one % 3) for one in range(12)]
        rows = [{"pixel_values": row["pixel_values"][0], "labels": row["labels"]} for row in rows]
    else:
        model = BertForSequenceClassification(BertConfig(vocab_size=320, max_position_embeddings=64, **options))
        processing = build_tokenizer()
        rows = [dict(processing(f"{COLOURS[one % 3]} {one}"), labels=one % 3) for one in range(12)]
    if lora is not None:
        model = get_peft_model(model, lora)
    args = TrainingArguments(
        output_dir=str(folder), use_cpu=True, learning_rate=0.01, per_device_train_batch_size=4, eval_strategy="steps",
        eval_steps=2, max_steps=4, disable_tqdm=True, report_to="none", save_strategy="steps", save_steps=2,
    )  # fmt: skip
    shown = Dataset.from_list(rows)
    return Trainer(model, args, train_dataset=shown, eval_dataset=shown.select(range(4)), processing_class=processing)


def asked(tmp_path, images: bool, **more) -> dict:
    """A target of rows that a classifier may be asked, whose labels are the numbers that stand for them."""
    numbers = [one % 3 for one in range(7)]
    if images:
        rows = {"image": [picture((200, 30, 30), 10 + one) for one in numbers], "label": numbers}
        features = Features({"image": Image(), "label": Value("int64")})
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "asked.parquet")
        data = {"path": "parquet", "data_files": str(tmp_path / "asked.parquet")}
    else:
        rows = [{"text": f"it is {'very ' * one}{COLOURS[one % 3]}", "label": one % 3} for one in range(7)]
        data = {"path": "json", "data_files": str(write_rows(tmp_path / "asked.jsonl", rows))}
    return {"data": data, "scorer": "classification", "labels": {str(n): COLOURS[n] for n in range(3)}, **more}


@pytest.mark.parametrize("images", [False, True])
def test_a_classifier_is_scored_as_it_is_and_its_training_is_not_changed(tmp_path, images):
    plain = classifier(tmp_path / "plain", images)
    plain.train()
    one = classifier(tmp_path / "scored", images)
    target = asked(tmp_path, images, metric="logprob")
    callback = TargetScoreCallback(one, {"colours": target, "right": target | {"metric": "accuracy"}})
    one.add_callback(callback)
    before = callback.scores()
    one.train()
    for (name, mine), other in zip(plain.model.named_parameters(), one.model.parameters(), strict=True):
        assert torch.equal(mine, other), name
    logged = [entry for entry in one.state.log_history if "eval_colours" in entry]
    assert [entry["step"] for entry in logged] == [2, 4]
    one.model.eval()
    rows = load_dataset(target["data"]["path"], data_files=target["data"]["data_files"], split="train")
    logits = []
    for row in rows:  # one by one, as nothing is padded then
        given = one.processing_class(row["image" if images else "text"], return_tensors="pt")
        with torch.no_grad():
            logits.append(one.model(**given).logits[0])
    of = torch.stack(logits).log_softmax(-1)
    truth = torch.tensor(rows["label"])
    expected = float(of[range(len(rows)), truth].mean())
    assert logged[-1]["eval_colours"] == pytest.approx(expected, abs=1e-5)
    assert logged[-1]["eval_right"] == pytest.approx(float((of.argmax(-1) == truth).double().mean()))
    assert before["eval_colours"] != pytest.approx(
        expected, abs=1e-3
    )  # the head that is trained is the one that is asked


def test_mixtures_of_a_classifier_with_a_frozen_head_are_probed(tmp_path):
    lora = {"r": 2, "target_modules": ["query", "value"]}
    classifier(tmp_path / "beta", False, LoraConfig(**lora)).train()
    one = classifier(tmp_path / "alpha", False, LoraConfig(**lora))
    probe = MergeProbeCallback(
        one, "alpha", {"beta": tmp_path / "beta"}, {"colours": asked(tmp_path, False, metric="logprob")}, every=2
    )
    one.add_callback(probe)
    one.train()
    stack = GatedStack(
        classifier(tmp_path / "new", False).model,
        {name: Adapter.load(tmp_path / name / "checkpoint-4") for name in ("alpha", "beta")},
    )
    (scorer,) = probe._targets.scorers.values()
    assert len(probe.ranking) == 3
    for mixture, score in probe.ranking:
        assert score == pytest.approx(scorer.score(stack, [mixture.weights], 100)[0].value, abs=1e-5)
    heads = classifier(
        tmp_path / "heads", False, LoraConfig(**lora, task_type="SEQ_CLS")
    )  # PEFT trains the head beside it
    with pytest.raises(InputError, match="modules_to_save"):
        MergeProbeCallback(heads, "alpha", {}, {"colours": asked(tmp_path, False)}, every=2)


def test_what_a_classifier_cannot_be_asked_is_refused(tokenizer, tmp_path, targets):
    one = classifier(tmp_path, False)
    with pytest.raises(InputError, match=r"targets\.colours\.scorer: .*expected classification, got choice"):
        TargetScoreCallback(one, targets)
    target = asked(tmp_path, False)
    del target["labels"]
    with pytest.raises(InputError, match=r"'0': expected one of the 3 labels of this run: red, green, blue"):
        TargetScoreCallback(one, {"colours": target})
    one.processing_class.pad_token = None
    with pytest.raises(InputError, match="its tokenizer has no pad_token"):
        TargetScoreCallback(one, {"colours": asked(tmp_path, False)})
    one = classifier(tmp_path, False)
    one.model.config.problem_type = "multi_label_classification"
    with pytest.raises(InputError, match="BertForSequenceClassification, gives multi_label_classification"):
        TargetScoreCallback(one, {"colours": asked(tmp_path, False)})
    one = classifier(tmp_path, True)
    one.processing_class = tokenizer
    with pytest.raises(InputError, match="expected one with an image processor"):
        TargetScoreCallback(one, {"colours": asked(tmp_path, True)})
