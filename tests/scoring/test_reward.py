"""Answers rated by a reward model, against the models' own `generate` and `forward`, row by row."""

import shutil

import pytest
import torch
from pico import DEVICE, build_stack, m2m, scorer_on, write_rows
from transformers import LlamaForSequenceClassification

from m2m_hf import FinishedRun
from m2m_hf.data.rows import TargetRow

MIXTURES = [{}, {"a": 1.0}, {"a": 0.5, "c": 0.5}]
PROMPTS = ["question: red?", "two three four five six seven question: blue one?", "one", "answer: green blue red two"]


def rewarded(scorer, stack, row: TargetRow, tokenizer, folder) -> float:
    """The reward of one greedy answer, by nothing but the two models."""
    ids = torch.tensor([tokenizer(row.prompt)["input_ids"]], device=DEVICE)
    with torch.no_grad():
        output = stack.model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=0)
        answer = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
        turns = [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": answer}]
        judge = LlamaForSequenceClassification.from_pretrained(folder).to(DEVICE).eval()
        read = tokenizer.apply_chat_template(turns, return_dict=True, return_tensors="pt").to(DEVICE)
        return judge(**read).logits.item()


@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_rewards_are_those_of_one_row_at_a_time(tmp_path, tokenizer, reward_model, budget):
    stack = build_stack(tmp_path, "llama")
    rows = [TargetRow(prompt, ("",), 0) for prompt in PROMPTS]
    scorer = scorer_on(
        rows, tokenizer, "reward", "reward", generation={"max_new_tokens": 6}, reward_model=str(reward_model)
    )
    scores = scorer.score(stack, MIXTURES, budget)
    for weights, score in zip(MIXTURES, scores, strict=True):
        stack.set(weights)
        expected = [rewarded(scorer, stack, row, tokenizer, reward_model) for row in rows]
        assert score.values == pytest.approx(expected, abs=1e-4)
        (some,) = scorer.score(stack, [weights], budget, rows=[2, 0])
        assert some.values == pytest.approx([expected[2], expected[0]], abs=1e-4)
    assert len({round(value, 3) for score in scores for value in score.values}) > 4


def test_sampled_answers_are_rated_one_by_one_whatever_their_company(tmp_path, tokenizer, reward_model):
    stack = build_stack(tmp_path, "llama")
    rows = [TargetRow(prompt, ("",), 0) for prompt in PROMPTS]
    sampled = {"max_new_tokens": 5, "do_sample": True, "temperature": 2.0}
    options = {"generation": sampled, "reward_model": str(reward_model)}
    many = scorer_on(rows, tokenizer, "reward", "reward", samples=3, **options)
    (score,) = many.score(stack, [{"a": 1.0}], 10_000)
    assert many.score(stack, MIXTURES, 1)[1] == score
    assert many.score(stack, [{"a": 1.0}], 60, rows=[3])[0].values == score.values[3:]
    once = scorer_on(rows, tokenizer, "reward", "reward", **options)
    assert once.fingerprint != many.fingerprint
    changed = shutil.copytree(reward_model, tmp_path / "changed")
    (changed / "chat_template.jinja").write_text("{{ messages[-1]['content'] }}")
    other = scorer_on(rows, tokenizer, "reward", "reward", **options | {"reward_model": str(changed)})
    assert other.fingerprint != once.fingerprint


def test_a_run_by_reward_shows_the_answers_that_gained_and_lost_most(project, reward_model, capsys):
    config = project / "run.yaml"
    text = config.read_text().replace(
        "scorer: choice", f"scorer: reward\n    reward_model: {reward_model}\n    generation: {{max_new_tokens: 5}}"
    )
    config.write_text(text.replace("fine_tunes: 0", "fine_tunes: 1"))
    write_rows(project / "test.jsonl", [{"prompt": f"<b>question</b>: {n} red?"} for n in range(9)])
    assert m2m("select", "--config", config) == 0
    run = FinishedRun.from_pretrained(project / "out")
    (warned,) = [one.text for one in run.warnings if one.code == "cut_off"]
    assert "answers (100 %) were cut off at generation.max_new_tokens" in warned
    assert " ".join(capsys.readouterr().out.split()).count("were cut off at") == 2  # when it is known, and at the end
    assert m2m("select", "--config", config, "--fine_tunes", "2") == 0
    (again,) = [one.text for one in FinishedRun.from_pretrained(project / "out").warnings if one.code == "cut_off"]
    counts = [int(text.split(" of ")[1].split()[0].replace(",", "")) for text in (warned, again)]
    assert counts[1] > counts[0] > 0  # those of a later fine-tuned mixture on top of those that were counted before
    (pairs,) = run.final.answers.values()
    gains = [one.final_value - one.base_value for one in pairs]
    assert gains == sorted((gain for gain in gains if gain > 0), reverse=True) + sorted(
        gain for gain in gains if gain < 0
    )
    page = (project / "out" / "report.html").read_text()
    assert "&lt;b&gt;question" in page
    assert "<b>question" not in page


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("", "reward_model is missing"),
        ("reward_model: nowhere/to-be-found", "is neither a local model folder nor"),
        ("reward_model: {pico}", "expected a model with one output"),
        ("reward_model: {reward}\n    samples: 2", "greedy answers to a prompt are all the same"),
    ],
)
def test_what_cannot_rate_is_refused(project, pico, reward_model, refused, change, message):
    config = project / "run.yaml"
    change = change.format(pico=pico, reward=reward_model)
    config.write_text(config.read_text().replace("scorer: choice", f"scorer: reward\n    {change}"))
    assert message in refused(config)
