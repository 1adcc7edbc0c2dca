"""Callbacks in training scripts of one's own: scores while it trains, and a training that is not changed by it."""

import pytest
import torch
from conftest import build_model, candidate_rows
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import EarlyStoppingCallback
from trl import SFTConfig, SFTTrainer

from m2m_hf import InputError, MergeProbeCallback, TargetScoreCallback
from m2m_hf.merging import Adapter, GatedStack
from m2m_hf.mixture import Mixture


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
    assert "adapters that are all trained that far lead to the same choice" in capsys.readouterr().out


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
