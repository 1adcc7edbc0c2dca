"""What each candidate teaches about every other, near copies and over-trained adapters, in a run."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from pico import candidate_rows, images, language_searcher, m2m, searcher, write_rows
from transformers import AutoModelForCausalLM

from m2m_hf import FinishedRun
from m2m_hf.analysis.relations import HalfStrength, Pair, Relations
from m2m_hf.config.targets import TargetConfig
from m2m_hf.core.jsonable import Measurement, to_json
from m2m_hf.data.classification import questions
from m2m_hf.data.tokens import encode
from m2m_hf.merging.dense_stack import open_stack
from m2m_hf.merging.methods import AVERAGE
from m2m_hf.reporting.conclude import about_relations
from m2m_hf.run import relations
from m2m_hf.run.relations import find_relations
from m2m_hf.scoring.make import make_scorer


def test_the_table_is_what_each_adapter_alone_makes_of_each_candidates_rows(project):
    one = language_searcher(project)
    found = find_relations(one.run, one.search())
    tokenizer, folder = one.run.task.tokenizer, one.run.folder.adapters

    @torch.inference_mode()
    def mean(model, name: str) -> float:
        total = count = 0
        for row in candidate_rows(name):
            ids, start = encode(tokenizer, row["prompt"], row["completion"])
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            total += sum(logprobs[place - 1, ids[place]].item() for place in range(start, len(ids)))
            count += len(ids) - start
        return total / count

    def base():
        return AutoModelForCausalLM.from_pretrained(one.run.model_args.model_name_or_path, dtype=torch.float32).eval()

    names = ["alpha", "beta", "gamma"]
    assert found.rows == dict.fromkeys(names, 12)
    assert found.base == pytest.approx({name: mean(base(), name) for name in names}, abs=1e-4)
    for adapter in names:
        model = PeftModel.from_pretrained(base(), folder / adapter).eval()
        for name in names:
            assert found.gains[name][adapter] == pytest.approx(mean(model, name) - found.base[name], abs=1e-4)


@pytest.mark.parametrize("kind", ["texts", "full experts", "images", "label space"])
def test_a_classifiers_rows_are_choices_among_the_labels_that_they_were_trained_on(kind, intents, vit, pictures_of):
    labels = ["hello_there", "good_bye", "red", "green", "blue", "one", "two", "cold", "hot"]
    if kind == "images":
        one = images(pictures_of(vit, "all-linear"))
    else:
        given = {"full experts": {"expert": "full", "learning_rate": 1e-3}, "label space": {"labels": labels}}
        one = searcher(intents, **given.get(kind, {}))
    run, result = one.run, one.search()
    found = find_relations(run, result)
    experts = run.bank.load()
    for name, candidate in run.candidates.items():
        rows, contents = candidate.rows, candidate.rows["text"] if kind != "images" else [""] * len(candidate.rows)
        space = {"label space": labels, "images": ["red", "green", "blue"]}  # the latter: the model's own classifier
        choices = space.get(kind) or sorted(set(rows["label"]))
        scorer = make_scorer(
            TargetConfig("classification", "logprob"), questions(rows, contents, choices, name), run.scoring_setup
        )
        for expert in experts:
            stack = open_stack(run.base.plain(), {expert: experts[expert]}, AVERAGE)
            base, whole = (scorer.score(stack, [gates], 1024)[0].value for gates in ({}, {expert: 1.0}))
            stack.detach()
            assert found.gains[name][expert] == pytest.approx(whole - base, abs=1e-4)


@pytest.mark.parametrize("change", ["", "objective: trained\n"])
def test_half_an_expert_is_compared_on_the_same_rows(change, project, monkeypatch):
    monkeypatch.setattr(relations, "ROWS", 7)
    monkeypatch.setattr(relations, "MORE", 7)
    path = project / "run.yaml"
    path.write_text(path.read_text() + change)
    one = language_searcher(project)
    result = one.search()
    found = find_relations(one.run, result).half_strength
    (scorer,) = one.run.validation_scorers.values()
    stack, rows = one.run.open_stack(AVERAGE), relations.race_order(scorer.fingerprint, 10)[:7]
    for name, half in found.items():
        base, whole, some = (scorer.score(stack, [gates], 512, rows)[0] for gates in ({}, {name: 1.0}, {name: 0.5}))
        assert half.over_whole.value == pytest.approx(some.mean_logprob - whole.mean_logprob, abs=1e-5)
        assert half.over_base.value == pytest.approx(some.mean_logprob - base.mean_logprob, abs=1e-5)
        assert half.score == pytest.approx(some.value - whole.value, abs=1e-5)
        assert half.over_whole.stderr > 0
    assert set(found) == {"alpha", "beta", "gamma"}


def test_they_are_measured_once_and_again_when_a_candidate_joins(project, monkeypatch):
    path = project / "run.yaml"
    assert m2m("select", path) == 0
    before = FinishedRun.from_pretrained(project / "out").relations
    kept = json.loads((project / "out" / "trained" / "relations.json").read_text())
    assert kept.items() >= to_json(before).items()
    with monkeypatch.context() as patch:
        patch.setattr(relations, "taught", None)
        assert m2m("select", path, "--logging_steps", "2") == 0
    write_rows(project / "delta.jsonl", candidate_rows("delta"))
    path.write_text(path.read_text().replace("targets:", "  delta: {path: json, data_files: delta.jsonl}\ntargets:"))
    assert m2m("search", path) == 0
    after = FinishedRun.from_pretrained(project / "out").relations
    assert set(after.gains) == {"alpha", "beta", "gamma", "delta"}
    assert len(after.pairs) == 6


def test_rows_that_do_not_fit_whole_are_not_asked(project):
    rows = [{"prompt": "red " * 40, "completion": " green"}] * 3
    write_rows(project / "alpha.jsonl", [*rows, *candidate_rows("alpha", 5)])
    write_rows(project / "beta.jsonl", [{"prompt": "red", "completion": " green " * 40}] * 3)
    one = language_searcher(project, "--max_length", "30")
    found = find_relations(one.run, one.search())
    assert found.rows == {"alpha": 5, "gamma": 12}
    assert set(found.gains) == {"alpha", "gamma"}
    assert set(found.gains["alpha"]) == {"alpha", "beta", "gamma"}


@pytest.mark.parametrize("flags", [(), ("--assistant_only_loss", "true")])
def test_of_a_conversation_the_last_turn_is_asked(flags, project):
    turns = [("user", "red?"), ("assistant", "green"), ("user", "two?"), ("assistant", "one blue")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    for name in ("alpha", "beta", "gamma"):
        write_rows(project / f"{name}.jsonl", [row] * 3)
    run = language_searcher(project, *flags).run
    scorer = run.task.own_scorer("alpha", 2, run.scoring_setup)
    whole, before = (
        run.task.tokenizer.apply_chat_template(row["messages"][:end], add_generation_prompt=end == 3)["input_ids"]
        for end in (4, 3)
    )
    assert scorer.counts == [len(whole) - len(before)] * 2


def test_near_copies_are_named_and_others_are_not(project, capsys):
    write_rows(project / "beta.jsonl", [*candidate_rows("alpha")[3:], *candidate_rows("beta")])
    assert m2m("search", project / "run.yaml") == 0
    run = FinishedRun.from_pretrained(project / "out")
    shared = {one.pair: one.shared_rows for one in run.relations.pairs}
    assert shared == {("alpha", "beta"): 9, ("alpha", "gamma"): 0, ("beta", "gamma"): 0}
    (warning,) = [one.text for one in run.warnings if one.code == "near_copies"]
    assert warning.startswith("near copies: alpha and beta (9 of 12 rows shared, cosine of the adapters ")
    assert "gamma" not in warning


def test_only_most_rows_or_nearly_the_same_adapter_make_a_copy():
    pairs = [Pair(("a", "b"), 6, 0.5), Pair(("a", "c"), 5, 0.89), Pair(("b", "c"), 0, 0.9), Pair(("c", "d"), 5)]
    copies = Relations(pairs=tuple(pairs)).near_copies({"a": 10, "b": 90, "c": 90, "d": 10})
    assert [one.pair for one in copies] == [("a", "b"), ("b", "c")]


def half(over_whole: float, over_base: float, score: float = math.nan) -> HalfStrength:
    return HalfStrength(Measurement(over_whole, 0.1), Measurement(over_base, 0.1), score)


def test_over_trained_adapters_are_named_and_others_are_not(finished):
    experts = {
        "alpha": half(0.3, 0.4),
        "worse_than_base": half(0.9, -0.2),
        "by_chance": half(0.15, 0.4),
        "too_sure": half(0.3, 0.4, score=-0.1),
        "better": half(0.5, 0.4, score=0.0),
    }
    run = FinishedRun.from_pretrained(finished / "out")
    run = replace(run, relations=Relations(half_strength=experts))
    ((code, text),) = about_relations(run)
    assert code == "over_trained"
    assert "better (by 0.500), alpha (by 0.300); train fewer epochs" in text
    assert [*about_relations(replace(run, relations=Relations(half_strength={"alpha": half(0.2, 0.4)})))]
    many = {str(number): half(0.2, 0.4) for number in range(9)}
    assert not [*about_relations(replace(run, relations=Relations(half_strength=many)))]


def test_more_rows_are_asked_where_half_may_be_better(monkeypatch):
    asked = []

    def halved(run, result, stack, names, count):
        asked.append((list(names), count))
        first = {"alpha": half(0.15, 0.2), "beta": half(-0.05, 0.2), "gamma": half(0.2, -0.05)}
        return first if len(asked) == 1 else {"alpha": half(0.3, 0.3)}

    monkeypatch.setattr(relations, "halved", halved)
    stack = SimpleNamespace(names=("alpha", "beta", "gamma"))
    found = relations.half_strength(None, None, stack)
    assert asked == [(["alpha", "beta", "gamma"], relations.ROWS), (["alpha"], relations.MORE)]
    assert [one.over_whole.value for one in found.values()] == [0.3, -0.05, 0.2]
