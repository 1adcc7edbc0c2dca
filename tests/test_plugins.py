"""Callbacks in training scripts of one's own: scores while it trains, and a training that is not changed by it."""

import pytest
import torch
from conftest import build_model, candidate_rows
from datasets import Dataset
from peft import LoraConfig
from transformers import EarlyStoppingCallback
from trl import SFTConfig, SFTTrainer

from m2m_hf import InputError, TargetScoreCallback
from m2m_hf.merging import Adapter, GatedStack


def trainer(tokenizer, folder, **options) -> SFTTrainer:
    """The script of somebody else: LoRA with dropout, evaluated every two steps."""
    options = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 6, **options}
    rows = Dataset.from_list(candidate_rows("alpha", 16))
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
    for name, scorer in callback._scorers.items():  # as a search would score what was trained
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
