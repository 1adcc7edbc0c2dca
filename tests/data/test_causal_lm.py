"""Data for causal LMs: one format for all rows, sizes, overlap, and messages about bad rows."""

import json
from copy import deepcopy

import pytest
from datasets import Dataset, concatenate_datasets, load_dataset
from pico import USE_CPU, build_model, candidate_rows, choice_rows, write_rows
from trl import SFTConfig, SFTTrainer

from m2m_hf import InputError
from m2m_hf.config.candidates import CandidateConfig, DataConfig
from m2m_hf.config.targets import TargetConfig
from m2m_hf.core.mixture import Mixture
from m2m_hf.data.causal_lm import load_causal_lm_data, split_row, target_row
from m2m_hf.data.mixture_rows import write_mixture
from m2m_hf.data.rows import TargetRow, overlap
from m2m_hf.data.tokens import encode

MESSAGES = [{"role": "user", "content": "hot?"}, {"role": "assistant", "content": "cold"}]


def load(candidates: dict, tokenizer, target: list | None = None, scorer: str = "choice", **options):
    """`load_causal_lm_data` over rows in memory."""
    target_config = TargetConfig(scorer, "accuracy", DataConfig(rows=Dataset.from_list(target or choice_rows())))
    return load_causal_lm_data(
        {name: CandidateConfig(DataConfig(rows=Dataset.from_list(rows))) for name, rows in candidates.items()},
        {"t": target_config},
        tokenizer,
        **{"seed": 0, "max_length": 64, "assistant_only_loss": False} | options,
    )


def test_unions_are_safe_whatever_columns_the_sources_have(tokenizer):
    plain = [row | {"id": i, "extra": None} for i, row in enumerate(candidate_rows("alpha"))]
    chat = [{"messages": [m | {"name": None} for m in MESSAGES], "source": "web"}]
    data = load({"plain": plain, "chat": chat}, tokenizer)
    assert data.format == "chat"
    union = concatenate_datasets([data.candidates["plain"].rows, data.candidates["chat"].rows])
    assert union[0] == {
        "prompt": [{"role": "user", "content": plain[0]["prompt"]}],
        "completion": [{"role": "assistant", "content": plain[0]["completion"].strip()}],
    }
    assert union[-1] == {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}
    assert data.targets["t"].rows[0].choices[0] == [{"role": "assistant", "content": "red"}]


def test_whole_conversations_with_assistant_only_loss(tokenizer):
    rows = [{"messages": MESSAGES + MESSAGES}]
    candidates = load({"a": rows}, tokenizer, assistant_only_loss=True).candidates
    assert candidates["a"].rows.to_list() == rows
    with pytest.raises(InputError, match="needs a messages column"):
        load({"a": rows, "b": candidate_rows("b")}, tokenizer, assistant_only_loss=True)


@pytest.mark.parametrize("row", [candidate_rows("alpha")[0], {"messages": MESSAGES + MESSAGES}], ids=["text", "chat"])
def test_what_is_scored_is_what_trl_trains_on(tokenizer, row, tmp_path):
    data = load({"a": [row]}, tokenizer, max_length=1024)
    prompt, completion, _ = split_row(row, data.format, "row")
    rows = data.candidates["a"].rows
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=USE_CPU, bf16=False, report_to="none")
    trainer = SFTTrainer(build_model("llama"), args, train_dataset=rows, processing_class=tokenizer)
    theirs = trainer.train_dataset[0]
    ids, start = encode(tokenizer, prompt, completion)
    eos = [tokenizer.eos_token_id] if data.format == "text" else []
    assert theirs["input_ids"] == ids + eos
    assert theirs["labels"] == [-100] * start + (ids + eos)[start:]


def as_trl_reads(train) -> Dataset:
    """The rows that a recipe names."""
    return load_dataset({".jsonl": "json"}.get(train.suffix, "parquet"), data_files=str(train), split="train")


def called(name: str, arguments: dict) -> dict:
    calls = [{"type": "function", "function": {"name": name, "arguments": arguments}}]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def offered(*names: str) -> list[dict]:
    return [
        {"type": "function", "function": {"name": name, "parameters": {"properties": {name: {}}}}} for name in names
    ]


ASKED = {"role": "user", "content": "hot?"}
TOOL_ROWS = [
    {"messages": [ASKED, called("w", {"town": "x", "day": None})], "tools": offered("w", "v")},
    {"messages": [ASKED, called("z", {"day": 3}), {"role": "tool", "name": "z", "content": "4"}, MESSAGES[1]]},
    {"messages": MESSAGES, "tools": json.dumps(offered("z"))},
    {"messages": MESSAGES},
]


@pytest.fixture
def tool_tokenizer(tokenizer):
    """A tokenizer whose template shows tools, and what is said beside the content of a message."""
    other = deepcopy(tokenizer)
    more = "{% for key in m if key not in ('role', 'content') %}{{ key }}{{ m[key] | tojson }}{% endfor %}"
    template = tokenizer.chat_template.replace("<|end|>", f"{more}<|end|>")
    other.chat_template = "{% if tools is not none %}{{ tools | tojson }}{% endif %}" + template
    return other


@pytest.mark.parametrize("whole", [False, True], ids=["chat", "messages"])
@pytest.mark.parametrize("stored", ["memory", "json"])
def test_tools_are_trained_and_scored_as_trl_passes_them(tool_tokenizer, tmp_path, whole, stored):
    write_rows(tmp_path / "a.jsonl", TOOL_ROWS)
    source = {"path": "json", "data_files": [str(tmp_path / "a.jsonl")]}
    made = [
        row | {"tools": json.loads(row["tools"])} if isinstance(row.get("tools"), str) else row for row in TOOL_ROWS
    ]
    source = {"rows": Dataset.from_list(made)} if stored == "memory" else source
    one = CandidateConfig(DataConfig(**source))
    target = {"loss": TargetConfig("loss", "mean", DataConfig(**source))}
    options = {"seed": 0, "max_length": 1024, "assistant_only_loss": whole}
    data = load_causal_lm_data({"a": one}, target, tool_tokenizer, **options)
    train = write_mixture(tmp_path / "mixture", Mixture.subset(["a"]), data.candidates, seed=0)
    columns = data.candidates["a"].rows.column_names
    again = as_trl_reads(train).select_columns(columns)
    expected = []
    for row in made:
        turns = [{key: value for key, value in turn.items() if value is not None} for turn in row["messages"]]
        if stored == "memory" and "tool_calls" in turns[1]:  # a struct of Arrow cannot tell null from absent
            arguments = turns[1]["tool_calls"][0]["function"]["arguments"]
            turns[1] = called(turns[1]["tool_calls"][0]["function"]["name"], {k: v for k, v in arguments.items() if v})
            del turns[1]["content"]
        expected.append(
            tool_tokenizer.apply_chat_template(turns, tools=row.get("tools"), return_dict=True)["input_ids"]
        )
    args = SFTConfig(output_dir=str(tmp_path / "out"), use_cpu=USE_CPU, bf16=False, report_to="none")
    args.assistant_only_loss = whole
    for rows in (data.candidates["a"].rows, again):
        trainer = SFTTrainer(build_model("llama"), args, train_dataset=rows, processing_class=tool_tokenizer)
        assert sorted(trainer.train_dataset["input_ids"]) == sorted(expected)
    scored = [
        encode(tool_tokenizer, row.prompt, row.choices[0], tools=row.tools)[0] for row in data.targets["loss"].rows
    ]
    assert scored == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (TOOL_ROWS[0], "does not show tools, tool_calls;"),
        (TOOL_ROWS[1], "does not show tool_calls; neither"),
        ({"messages": [ASKED | {"name": "bob"}, MESSAGES[1]]}, "does not show name;"),
        ({"messages": [ASKED, MESSAGES[1] | {"weight": 0}]}, "does not show weight;"),
        ({"messages": [ASKED, MESSAGES[1] | {"reasoning_content": "hm"}]}, "does not show reasoning_content"),
        ({"prompt": [ASKED], "completion": [MESSAGES[1] | {"train": False}]}, "does not show train;"),
        ({"messages": MESSAGES, "chat_template_kwargs": {"a": 1}}, "columns: {chat_template_kwargs: unused"),
        ({"messages": MESSAGES, "images": ["a.png"]}, "columns: {images: unused"),
        ({"messages": MESSAGES, "system": "Be terse."}, r"row 1\.system: .*columns: {system: unused_system}"),
        ({"messages": MESSAGES, "functions": offered("w")}, r"row 1\.functions: "),
        ({"messages": MESSAGES, "prompt": "red?", "completion": "no"}, r"row 1\.completion: .* would be lost"),
        ({"messages": MESSAGES, "conversations": MESSAGES}, r"row 1\.conversations: "),
        ({"prompt": "a", "completion": "b", "history": [["c", "d"]]}, r"row 1\.history: "),
        ({"messages": json.dumps(MESSAGES)}, r"row 1\.messages: expected a list of messages, got a text"),
        ({"prompt": [ASKED], "completion": [*MESSAGES[1:], ASKED]}, "of which the last is the assistant's"),
        ({"messages": MESSAGES, "tools": "[{"}, r"row 1\.tools: expected a list of tools"),
        ({"prompt": "a", "completion": "b", "tools": offered("w")}, "these rows are texts"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(tokenizer, row, message):
    with pytest.raises(InputError, match=message):
        load({"a": [row]}, tokenizer)
    target = TargetConfig("loss", "mean", DataConfig(rows=Dataset.from_list([row])))
    with pytest.raises(InputError, match=message):
        load_causal_lm_data({}, {"t": target}, tokenizer, seed=0, max_length=64, assistant_only_loss=False)


def test_roles_that_a_template_skips_are_refused(tokenizer):
    other = deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace("messages %}", "messages if m['role'] != 'note' %}")
    load({"a": [{"messages": MESSAGES}]}, other)
    with pytest.raises(InputError, match=r"row 1: .*does not show turns of the role 'note'"):
        load({"a": [{"messages": [{"role": "note", "content": "a"}, *MESSAGES]}]}, other)


THOUGHT = {"role": "assistant", "content": "<think>not hot</think>cold"}
SYSTEM = {"role": "system", "content": "terse"}
ONLY = "{{% for m in messages %}}{{% if {0} %}}<|{{{{ m['role'] }}}}|>{{{{ m['content']{1} }}}}<|end|>{{% endif %}}{{% endfor %}}"


@pytest.mark.parametrize(
    ("template", "turns", "message"),
    [
        (ONLY.format("m['role'] != 'system' or loop.first", ""), [*MESSAGES, SYSTEM, *MESSAGES], "role 'system'"),
        (ONLY.format("loop.last or loop.first", ""), [ASKED, {**ASKED, "content": "or"}, MESSAGES[1]], "role 'user'"),
        (
            ONLY.format("true", ".split('</think>')[-1]"),
            [ASKED, THOUGHT],
            "only some words of turns of the role 'assistant'",
        ),
        (
            ONLY.format("true", " if not m.tool_calls else m.tool_calls | tojson"),
            [ASKED, called("w", {}) | {"content": "let me see"}, {"role": "tool", "content": "4"}, MESSAGES[1]],
            "not show turns of the role 'assistant'",
        ),
        (
            ONLY.format("true", " if not m.tool_calls else m.tool_calls[0] | tojson"),
            [ASKED, {"role": "assistant", "tool_calls": called("w", {})["tool_calls"] + called("v", {})["tool_calls"]}],
            "only some words of tool_calls: 'v'",
        ),
    ],
    ids=["later system turn", "second of two", "thought", "text beside calls", "second call"],
)
def test_what_a_template_leaves_out_of_one_row_is_refused(tokenizer, template, turns, message):
    other = deepcopy(tokenizer)
    other.chat_template = template
    with pytest.raises(InputError, match=rf"row 2: .*{message}"):
        load({"a": [{"messages": [ASKED, MESSAGES[1]]}, {"messages": turns}]}, other)


def test_earlier_thoughts_may_be_left_out_unless_they_are_learned(tokenizer):
    other = deepcopy(tokenizer)
    shown = "m['content'] if loop.last else m['content'].split('</think>')[-1]"
    other.chat_template = tokenizer.chat_template.replace("{{ m['content'] }}", f"{{{{ {shown} }}}}")
    rows = [{"messages": [ASKED, THOUGHT, *MESSAGES]}]
    assert load({"a": rows}, other).candidates["a"].rows[0]["prompt"][1] == THOUGHT
    with pytest.raises(InputError, match="only some words of turns of the role 'assistant'"):
        load({"a": rows}, other, assistant_only_loss=True)


def test_columns_that_nothing_reads_are_named(tokenizer):
    rows = [{"q": "a", "completion": "b", "context": "c", "input": "d", "id": 1, "unused_e": "f"}]
    source = DataConfig(rows=Dataset.from_list(rows), template={"prompt": "{q} {input}"})
    options = {"seed": 0, "max_length": 64, "assistant_only_loss": False}
    data = load_causal_lm_data({"a": CandidateConfig(source)}, {}, tokenizer, **options)
    assert data.unread == {"candidates.a": ["context", "id"]}


def test_conversations_of_sharegpt(tool_tokenizer):
    said = [("human", "hot?"), ("function_call", '{"name": "z", "arguments": {"day": 3}}'), ("observation", "4")]
    turns = [{"from": role, "value": value} for role, value in [*said, ("gpt", "cold")]]
    (row,) = load({"a": [{"conversations": turns}]}, tool_tokenizer, max_length=1024).candidates["a"].rows
    call = called("z", {"day": 3}) | {"content": ""}
    assert row["prompt"] == [ASKED, call, {"role": "tool", "content": "4"}]
    assert row["completion"] == MESSAGES[1:]
    for bad in ({"from": "moss", "value": "a"}, {"from": "function_call", "value": "z(3)"}):
        with pytest.raises(InputError, match=r"expected from: system, human|expected a function_call of JSON"):
            load({"a": [{"conversations": [turns[0], bad, turns[3]]}]}, tool_tokenizer)


def test_an_answer_that_is_generated_is_one_text(tool_tokenizer):
    row = {"messages": TOOL_ROWS[0]["messages"]}
    with pytest.raises(InputError, match="expected scorer: loss"):
        target_row(row, "chat", "generation", "row 1")


def test_sizes_tokens_and_truncation(tokenizer):
    rows = [
        {"prompt": "red", "completion": " one"},
        {"prompt": "red " * 30, "completion": " one"},
        {"prompt": "red", "completion": " one" * 40},
    ]
    candidates = load({"a": rows}, tokenizer, max_length=20).candidates
    lengths = [len(encode(tokenizer, row["prompt"], row["completion"])[0]) + 1 for row in rows]
    one = candidates["a"]
    assert (one.longest, one.truncated, one.dropped) == (max(lengths), 2, 1)
    assert one.tokens == lengths[0] + 20
    with pytest.raises(InputError, match="no completion fits into max_length 20"):
        load({"a": rows[1:2]}, tokenizer, max_length=20)


def test_sizes_are_those_that_trl_trains_on(tokenizer, tmp_path):
    rows = [{"prompt": "", "completion": "red"}, {"prompt": "hot?", "completion": " cold<|end|>"}]
    one = load({"a": rows}, tokenizer).candidates["a"]
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=USE_CPU, bf16=False, report_to="none")
    trainer = SFTTrainer(build_model("llama"), args, train_dataset=one.rows, processing_class=tokenizer)
    assert one.tokens == sum(map(len, trainer.train_dataset["input_ids"]))


def test_conversations_whose_first_answer_is_cut_off_are_not_trained(tokenizer):
    long = {"messages": [{"role": "user", "content": "big small " * 40}, *MESSAGES[1:]]}
    options = {"max_length": 20, "assistant_only_loss": True}
    one = load({"a": [long, {"messages": MESSAGES}]}, tokenizer, **options).candidates["a"]
    assert (one.dropped, one.trained_rows) == (1, 1)
    with pytest.raises(InputError, match="no completion fits into max_length 20"):
        load({"a": [long]}, tokenizer, **options)


def test_overlap_counts_the_same_question_or_of_empty_prompts_the_same_completion(tokenizer):
    rows = [{"prompt": "Question:  RED 1?", "completion": " a"}, {"prompt": "", "completion": "one"}]
    asked = ("question: red 1?", ["x", "y"]), ("", ["one", "y"]), ("", ["z", "y"]), ("other", ["one", "a"])
    target = [{"prompt": prompt, "choices": choices, "answer": 0} for prompt, choices in asked]
    data = load({"a": rows}, tokenizer, target)
    assert [overlap(data.candidates["a"], [row]) for row in data.targets["t"].rows] == [1, 1, 0, 0]
    pairs = [{"prompt": prompt, "chosen": choices[0], "rejected": choices[1]} for prompt, choices in asked]
    data = load({"a": rows}, tokenizer, pairs, "preference")
    assert [overlap(data.candidates["a"], [row]) for row in data.targets["t"].rows] == [1, 1, 0, 0]


COLD, WARM = ({"role": "assistant", "content": word} for word in ("cold", "warm"))


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected"),
    [
        ({"prompt": "hot?", "chosen": " cold", "rejected": " warm"}, "hot?", " cold", " warm"),
        ({"chosen": "hot? a cold", "rejected": "hot? a warm"}, "hot? a", " cold", " warm"),
        ({"chosen": "hot", "rejected": "hotter"}, "ho", "t", "tter"),  # TRL's way: none may be empty
        ({"prompt": [ASKED], "chosen": [COLD], "rejected": [WARM]}, [ASKED], [COLD], [WARM]),
        ({"prompt": "hot?", "chosen": [COLD], "rejected": [WARM]}, [ASKED], [COLD], [WARM]),
        ({"prompt": "hot? ", "chosen": [ASKED, COLD], "rejected": [ASKED, WARM]}, [ASKED], [COLD], [WARM]),
        (
            {"chosen": [ASKED, COLD], "rejected": [ASKED, WARM, ASKED, COLD], "conversations": None},
            [ASKED],
            [COLD],
            [WARM, ASKED, COLD],
        ),
    ],
)
def test_preferences_in_the_formats_of_trl(tokenizer, row, prompt, chosen, rejected):
    (found,) = load({"a": candidate_rows("alpha")}, tokenizer, [row], "preference").targets["t"].rows
    assert found == TargetRow(prompt, (rejected, chosen), 1)


def test_preferences_of_text_beside_candidates_of_messages(tokenizer):
    row = {"prompt": "hot?", "chosen": "cold", "rejected": "warm", "messages": "x"}
    data = load({"a": [{"messages": MESSAGES}]}, tokenizer, [row], "preference")
    assert data.targets["t"].rows == (TargetRow([ASKED], ([WARM], [COLD]), 1),)
    assert overlap(data.candidates["a"], data.targets["t"].rows) == 1
    assert data.unread == {"targets.t.data": ["messages"]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "column 'rejected' missing"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "data, row 1: chosen and rejected are equal"),
        ({"prompt": None, "chosen": "b", "rejected": "c"}, "row 1.prompt: expected text, got None"),
        ({"prompt": "a", "chosen": "", "rejected": "c"}, "row 1.chosen: expected text, got ''"),
        ({"chosen": "b ", "rejected": "c "}, "they begin otherwise"),  # TRL takes "b" as the prompt
        ({"prompt": "a", "chosen": "ab", "rejected": "ac"}, "would be read twice"),
        ({"prompt": "other", "chosen": [ASKED, COLD], "rejected": [ASKED, WARM]}, "begin with another prompt"),
        ({"chosen": [ASKED, COLD], "rejected": [ASKED]}, "row 1.rejected: expected turns of which the last"),
    ],
)
def test_bad_preferences(tokenizer, row, message):
    with pytest.raises(InputError, match=message):
        load({"a": candidate_rows("alpha")}, tokenizer, [row], "preference")


def test_where_texts_of_a_preference_part_is_not_known_in_conversations():
    with pytest.raises(InputError, match="nothing says where its prompt ends"):
        target_row({"chosen": "a b", "rejected": "a c"}, "chat", "preference", "row 1")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('no system turns, please') }}", r"candidates\.a, row 1: .*no system turns, please"),
        (None, "no chat template"),
    ],
)
def test_messages_need_a_template_that_takes_them(tokenizer, template, words):
    other = deepcopy(tokenizer)
    other.chat_template = template
    with pytest.raises(InputError, match=words):
        load({"a": [{"messages": MESSAGES}]}, other)


def test_a_completion_that_adds_no_token(tokenizer):
    with pytest.raises(InputError, match="adds no token"):
        encode(tokenizer, "red", "")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "x"}], "columns 'prompt' and 'completion' missing; it has text"),
        ([{"prompt": "x"}], "column 'completion' missing; it has prompt. .*columns: {theirs: completion}"),
        ([{"prompt": "x", "completion": ""}], r"row 1\.completion: expected text, got ''"),
        (
            [{"prompt": "x", "completion": "y"}, {"prompt": None, "completion": "y"}],
            r"row 2\.prompt: .* got None; .*columns: {null: \"\"}",
        ),
        ([{"prompt": [ASKED], "completion": " "}], "an empty turn of the assistant"),
        (
            [{"messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": []}]}],
            "an empty turn of the assistant",
        ),
        ([{"messages": [ASKED, {"role": "assistant", "content": ""}, *MESSAGES]}], "an empty turn of the assistant"),
        ([{"messages": [ASKED, {"role": "assistant", "content": None}]}], "both text"),
        ([{"messages": MESSAGES + MESSAGES[:1]}], "of which the last is the assistant's"),
        ([{"messages": [{"role": "user"}]}], "messages of {role, content}"),
        ([{"messages": MESSAGES[1:]}], "expected at least two turns"),
    ],
)
def test_bad_candidate_rows(tokenizer, rows, message):
    with pytest.raises(InputError, match=message):
        load({"a": rows}, tokenizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": [" red"]}, "at least two texts"),
        ({"choices": [" red", ""]}, "none empty"),
        ({"answer": 3}, "0 to 2"),
        ({"answer": "purple"}, "or its text, got 'purple'"),
        ({"answer": True}, "got True"),
        ({"choices": [" red", " red", " blue"], "answer": 0}, "occurs twice"),
        ({"prompt": [ASKED], "choices": [" red", "red"], "answer": 0}, "occurs twice"),
        ({"prompt": 5}, "expected text, got 5"),
    ],
)
def test_bad_target_rows(change, message):
    data_format = "chat" if isinstance(change.get("prompt"), list) else "text"
    with pytest.raises(InputError, match=message):
        target_row(choice_rows(1)[0] | change, data_format, "choice", "row 1")


def test_labels_of_conversations_are_missed(tokenizer):
    config = TargetConfig("classification", "accuracy", DataConfig(rows=Dataset.from_list([{"messages": MESSAGES}])))
    with pytest.raises(InputError, match=r"targets\.t\.data: column 'label' missing; it has messages"):
        load_causal_lm_data({}, {"t": config}, tokenizer, seed=0, max_length=64, assistant_only_loss=False)
