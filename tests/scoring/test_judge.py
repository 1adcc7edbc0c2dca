"""Answers that a judge compares with the base model's, against the models' own `generate`; and a server in bad moods."""

import json
import threading
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
import torch
from judge_server import DRIP, DROP, HANG, Judge, compared, longer
from pico import DEVICE, build_stack, changed, config, m2m, trials, write_rows

from m2m_hf import FinishedRun
from m2m_hf.config.judge import JudgeConfig
from m2m_hf.config.targets import TargetConfig
from m2m_hf.data.rows import TargetRow
from m2m_hf.errors import InputError, StoppedError
from m2m_hf.publish.repositories import published
from m2m_hf.scoring.judge_server import JudgeServer, verdict_in
from m2m_hf.scoring.make import make_scorer
from m2m_hf.scoring.scorers import Setup
from m2m_hf.storage.judgements import Judged

MIXTURES = [{}, {"a": 1.0}, {"a": 0.5, "c": 0.5}, {"b": 1.0}]
ROWS = [
    TargetRow(prompt, ("",), 0)
    for prompt in [
        "question: red?",
        "two three four five six seven question: blue one?",
        "one",
        "answer: green red two",
    ]
]
TOKEN = "token-that-nobody-may-see"


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Nothing is waited for."""
    monkeypatch.setattr("m2m_hf.scoring.judge_server.BACKOFF", 1e-3)
    monkeypatch.setenv("OPENAI_API_KEY", TOKEN)


@pytest.fixture
def judge():
    with Judge() as server:
        yield server


def client(judge: Judge, folder: Path, **options) -> JudgeServer:
    return JudgeServer(JudgeConfig(judge.address, "m", **options), folder / "t.jsonl", "targets.t")


def scorer_by(judge: Judge, folder: Path, tokenizer):
    server = client(judge, folder)
    target = config("judge", "win_rate", judge=server.config, generation={"max_new_tokens": 6})
    return make_scorer(target, ROWS, Setup(tokenizer, 128, answers=folder, judge=server))


def prompts(count: int, start: int = 0) -> list[str]:
    """Questions to a judge, whose second answer is the longer one where the number is odd."""
    shown = "<request>\n{0}\n</request>\n<answer_A>\n{1}\n</answer_A>\n<answer_B>\n{2}\n</answer_B>"
    return [shown.format(n, "two words", "and three words" if n % 2 else "one") for n in range(start, start + count)]


def answered(stack, row: TargetRow, tokenizer) -> str:
    """One greedy answer, by nothing but the model."""
    ids = torch.tensor([tokenizer(row.prompt)["input_ids"]], device=DEVICE)
    with torch.no_grad():
        output = stack.model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=0)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("budget", [60, 10_000])
def test_a_row_is_worth_what_both_orders_say_and_is_judged_once(tmp_path, tokenizer, judge, budget):
    stack = build_stack(tmp_path, "llama")
    answers = []
    for weights in MIXTURES:
        stack.set(weights)
        answers.append([answered(stack, row, tokenizer) for row in ROWS])
    worth = [
        [{"A": 1.0, "B": 0.0, "tie": 0.5}[longer(*pair)] for pair in zip(of, answers[0], strict=True)] for of in answers
    ]
    assert {value for of in worth for value in of} == {0.0, 0.5, 1.0}
    scorer = scorer_by(judge, tmp_path, tokenizer)
    (some,) = scorer.score(stack, MIXTURES[1:2], budget, rows=[2, 0])
    assert list(some.values) == [worth[1][2], worth[1][0]]
    scores = scorer.score(stack, MIXTURES[::-1], budget)[::-1]
    assert [list(score.values) for score in scores] == worth
    different = {(row, one) for of in answers for row, one in enumerate(of) if one != answers[0][row]}
    shown = [compared(one["messages"][0]["content"]) for one in judge.asked]
    assert len(shown) == len(set(shown)) == 2 * len(different)
    assert {(first, second) for _, first, second in shown} == {(second, first) for _, first, second in shown}
    again = scorer_by(judge, tmp_path, tokenizer)
    assert again.score(stack, MIXTURES, budget) == scores
    assert len(judge.asked) == len(shown)
    pairs = again.answer_pairs(scores[0], scores[1])
    assert all(one.base == answers[0][one.row - 1] and one.final == answers[1][one.row - 1] for one in pairs)
    assert judge.tokens == {f"Bearer {TOKEN}"}


def test_a_judge_needs_a_run(tokenizer):
    target = config("judge", "win_rate", judge=JudgeConfig("http://host/v1", "m"))
    with pytest.raises(InputError, match="keeps verdicts in the folder of a run; expected another scorer here"):
        make_scorer(target, ROWS, Setup(tokenizer, 128))


def test_a_judge_that_likes_the_first_answer_makes_ties(tmp_path, tokenizer, judge):
    judge.decide = lambda first, second: "A"
    scores = scorer_by(judge, tmp_path, tokenizer).score(build_stack(tmp_path, "llama"), MIXTURES, 10_000)
    assert {value for score in scores for value in score.values} == {0.5}
    said = Judged.read(tmp_path / "t.jsonl")
    assert said.first == said.verdicts == len(judge.asked) > 0


@pytest.mark.parametrize(
    "moods",
    [
        [503, DROP, 408],
        ["<html>", '{"choices": []}', '{"choices": [{"message": null}]}'],
        [(429, {"Retry-After": "0"}, "")],
        [HANG, DRIP],
    ],
)
def test_a_server_in_a_mood_is_asked_again(tmp_path, judge, moods):
    judge.moods = list(moods)
    server = client(judge, tmp_path, timeout=0.2 if HANG in moods else 60, concurrency=2)
    assert server.verdicts(prompts(4)) == ["first", "second", "first", "second"]
    assert len(judge.asked) == 4 + len(moods) == server.log.requests
    assert not judge.waited_for


def test_a_server_says_how_long_to_wait(tmp_path, judge, monkeypatch):
    waits = []
    monkeypatch.setattr(JudgeServer, "_wait", lambda self, stop, seconds: waits.append(seconds))
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=100))
    judge.moods = [(429, {"Retry-After": "20"}, ""), (503, {"Retry-After": date}, "")]
    client(judge, tmp_path).verdicts(prompts(1))
    assert 19 < waits[2] <= 20
    assert 90 < waits[4] <= 100
    judge.moods = [(429, {"Retry-After": "3600"}, "quota")]
    with pytest.raises(StoppedError, match=r"asked 1 times \(status 429: quota, and it asks to wait 3,600 s\)"):
        client(judge, tmp_path).verdicts(prompts(1, 7))


@pytest.mark.parametrize(
    ("mood", "message"),
    [
        (
            (401, {}, f"no such key: {TOKEN}"),
            r"the token in the environment variable OPENAI_API_KEY is not accepted; .*\*\*\*",
        ),
        ((404, {}, '{"detail": "no model m"}'), 'is the model\'s name right.*status 404: {"detail": "no model m"}'),
        ((400, {}, "x" * 999), "status 400: x{300}$"),
        ((307, {"Location": "{other}/chat/completions"}, ""), "leads to http://127.0.0.1.*, where no token is sent"),
    ],
)
def test_a_refusal_is_told_and_not_repeated(tmp_path, judge, mood, message):
    with Judge() as other:
        status, headers, text = mood
        judge.moods = [(status, {name: value.format(other=other.address) for name, value in headers.items()}, text)]
        with pytest.raises(InputError, match=message) as error:
            client(judge, tmp_path).verdicts(prompts(1))
        assert TOKEN not in str(error.value)
        assert (len(judge.asked), len(other.asked)) == (1, 0)


def test_no_more_is_sent_than_allowed_and_nothing_twice(tmp_path, judge):
    judge.moods = [500]
    with pytest.raises(StoppedError, match=r"max_requests: all 4 requests are spent.* raise max_requests"):
        client(judge, tmp_path, max_requests=4, concurrency=1).verdicts(prompts(9))
    assert len(judge.asked) == 4
    path = tmp_path / "t.jsonl"
    last = path.read_bytes().splitlines(keepends=True)[-1]
    path.write_bytes(path.read_bytes()[: -len(last) // 2])  # as a crash leaves it
    assert client(judge, tmp_path, max_requests=11).verdicts(prompts(9))[:3] == ["first", "second", "first"]
    assert len(judge.asked) == 11
    assert client(judge, tmp_path, max_requests=1).verdicts(prompts(9))[8] == "first"
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(InputError, match="line 1 is damaged"):
        client(judge, tmp_path).verdicts(prompts(1))


def test_a_server_that_is_not_there_costs_nothing(tmp_path):
    with Judge() as gone:
        server = client(gone, tmp_path)
    with pytest.raises(StoppedError, match=r"gave no answer, asked 6 times .it cannot be reached"):
        server.verdicts(prompts(1))
    assert server.log.requests == Judged.read(tmp_path / "t.jsonl").requests == 0


def test_answers_without_a_verdict_are_ties_where_they_are_few(tmp_path, judge):
    judge.decide = lambda first, second: "Both are fine." if "three" in second else longer(first, second)
    asked = [*prompts(12, 2)[::2], *prompts(40, 30)[::2], prompts(1, 1)[0]]
    assert client(judge, tmp_path).verdicts(asked)[-1] == "none"
    assert len(judge.asked) == len(asked) + 1
    assert sum("Write the last line alone" in one["messages"][0]["content"] for one in judge.asked) == 1
    with pytest.raises(
        InputError, match=r"2 of 4 answers of m hold no verdict, though asked twice; expected at most 10%"
    ):
        client(judge, tmp_path / "other").verdicts(prompts(4))
    judge.asked.clear()
    with pytest.raises(InputError, match="20 of 20 answers"):
        client(judge, tmp_path / "third", concurrency=1).verdicts(prompts(99, 1)[::2])
    assert len(judge.asked) == 40  # and no more, where there are many


def test_requests_are_under_way_together(tmp_path, judge):
    together = threading.Barrier(3)
    judge.decide = lambda first, second: "A" if together.wait(5) >= 0 else ""
    assert client(judge, tmp_path, concurrency=3).verdicts(prompts(6)) == ["first"] * 6
    assert judge.busiest == 3


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("A is better.\nVerdict: A", "first"),
        ("**Verdict: B**\n", "second"),
        ("verdict: Tie.", "tie"),
        ("Verdict: A\nNo, I was wrong.\n> Verdict: B", "second"),
        ("<think>Verdict: A</think>I cannot say", None),
        ("Verdict: A or B", None),
        ("Verdict: A, Verdict: B or Verdict: tie", None),
        ("", None),
    ],
)
def test_a_verdict_is_the_last_line_of_its_form(reply, verdict):
    assert verdict_in(reply) == verdict


URL = "http://localhost:8000/v1"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, r"t\.judge is missing: give {base_url: http://localhost:8000/v1, model: NAME}"),
        (URL, r"t\.judge: expected {base_url"),
        ({"base_url": URL}, r"t\.judge\.model is missing"),
        (
            {"base_url": URL, "model": "m", "api_key": "abc"},
            r"t\.judge\.api_key: .* set the environment variable OPENAI_API_KEY",
        ),
        ({"base_url": "http://me:secret@host/v1", "model": "m"}, "expected an address without user"),
        ({"base_url": "http://host/v1?key=secret", "model": "m"}, "expected an address without user"),
        ({"base_url": "host:8000/v1", "model": "m"}, "expected an address such as .*, got 'host:8000/v1'"),
        ({"base_url": URL, "model": "m", "max_request": 3}, "did you mean 'max_requests'"),
        ({"base_url": URL, "model": "m", "concurrency": 0}, "concurrency: expected an integer of at least 1"),
    ],
)
def test_what_is_no_judge_is_refused(tmp_path, given, message):
    with pytest.raises(InputError, match=message) as error:
        TargetConfig.parse(
            {"data": {"path": "json", "data_files": "x"}, "scorer": "judge", "judge": given}, "t", tmp_path
        )
    assert "secret" not in str(error.value)


def test_a_run_by_a_judge_stops_at_its_limit_and_goes_on(project, judge, capsys):
    rows = [{"prompt": f"<b>question</b>: {n} red?"} for n in range(6)]
    write_rows(project / "validation.jsonl", rows)
    write_rows(project / "test.jsonl", [{"prompt": f"and {n} blue?"} for n in range(5)])
    target = {
        part: {"path": "json", "data_files": f"{part.replace('_data', '').replace('data', 'validation')}.jsonl"}
        for part in ("data", "test_data")
    }
    entry = {"base_url": judge.address, "model": "m", "max_requests": 5, "rubric": "Longer is better."}
    target |= {"scorer": "judge", "judge": entry, "generation": {"max_new_tokens": 5}}
    changed(project, "run", targets={"chat": target}, fine_tunes=1)
    assert m2m("select", "--config", project / "run.yaml", "--dry_run") == 0
    told = " ".join(capsys.readouterr().out.split())
    # 7 mixtures and two fine-tuned models on 6 rows, both of these on 5 sealed ones, in two orders
    assert "judge of chat: up to about 128 requests" in told
    assert "at most 5 may be sent (max_requests), 0 were; at that limit the run stops" in told
    assert not judge.asked
    assert m2m("select", "--config", project / "run.yaml") == 1
    stopped = capsys.readouterr()
    assert "targets.chat.judge.max_requests: all 5 requests are spent" in stopped.err
    assert "the same command continues from there" in stopped.err
    assert len(judge.asked) == 5
    entry["max_requests"] = 500
    changed(project, "run", targets={"chat": target})
    assert m2m("select", "--config", project / "run.yaml") == 0
    done = capsys.readouterr()
    assert len(judge.asked) == len({json.dumps(one) for one in judge.asked}) > 5
    assert f"{len(judge.asked)} requests to judges" in done.out
    assert not [one for one in trials(project / "out") if one["state"] == "failed"]
    run = FinishedRun.from_pretrained(project / "out")
    assert run.base.score == 0.5
    assert judge.address not in str(published(run.config))
    assert run.targets["chat"].judged == Judged.read(project / "out" / "judgements" / "chat.jsonl")
    assert run.targets["chat"].judged.requests == len(judge.asked)
    assert m2m("status", project / "out") == 0
    assert f"judge of chat: {len(judge.asked)} of 500 requests" in " ".join(capsys.readouterr().out.split())
    assert all("Longer is better." in one["messages"][0]["content"] for one in judge.asked)
    assert TOKEN not in stopped.err + stopped.out + done.out + done.err + told
    files = [path for path in (project / "out").rglob("*") if path.is_file()]
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
