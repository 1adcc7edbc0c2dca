"""`m2m init`: what it writes runs."""

import gzip
import json
import re

import pytest
import yaml
from datasets import Dataset
from pico import candidate_rows, m2m, picture, write_rows
from transformers import AutoTokenizer

from m2m_hf.cli.init import guess_scorer
from m2m_hf.config.parsing import parse
from m2m_hf.data.causal_lm import load_causal_lm_data


@pytest.fixture
def model(project, monkeypatch):
    monkeypatch.chdir(project)
    return yaml.safe_load((project / "run.yaml").read_text())["model_name_or_path"]


def test_what_is_written_from_flags_runs(project, model, capsys):
    flags = ("--model", model, "--data", "alpha.jsonl", "second=beta.jsonl", "--target", "colours=validation.jsonl")
    assert m2m("init", *flags, "--output", "made/new.yaml") == 0
    assert "continue with: m2m select --config made/new.yaml" in capsys.readouterr().out
    text = (project / "made" / "new.yaml").read_text()
    given = yaml.safe_load(text)
    assert list(given["candidates"]) == ["alpha", "second"]
    assert given["candidates"]["alpha"] == {"path": "json", "data_files": "../alpha.jsonl"}
    assert given["targets"]["colours"]["scorer"] == "choice"  # as its rows suggest
    write_rows(project / "pairs.jsonl", [{"chosen": "red one", "rejected": "red two"}])
    assert guess_scorer({"path": "json", "data_files": "pairs.jsonl"}) == ("preference", None)
    assert "# test_data" in text
    assert m2m("search", "--config", "made/new.yaml", "--max_steps", 1, "--output_dir", "out") == 0
    assert m2m("init", *flags, "--output", "made/new.yaml") == 2
    assert "exists already" in capsys.readouterr().err


def test_four_questions(project, model, monkeypatch, capsys):
    for name in ("2024", "no"):  # YAML would read them as something else
        write_rows(project / f"{name}.jsonl", candidate_rows("alpha", 12))
    answers = iter([model, "2024.jsonl, no.jsonl", "validation.jsonl", ""])
    asked = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or next(answers))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    assert m2m("init") == 0
    assert len(asked) == 4
    assert asked[3].endswith("[choice]: ")
    config, *_ = parse(project / "m2m.yaml")
    assert list(config.parsed_candidates) == ["2024", "no"]


FLAGS = ("--data", "alpha.jsonl", "--target", "validation.jsonl")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--data and --target: nothing given"),
        (
            (*FLAGS, "--scorer", "magic"),
            "--scorer: expected choice, classification, loss, generation, preference, reward, judge, got 'magic'",
        ),
        ((*FLAGS, "--scorer", "reward"), "--reward_model: scorer reward needs a model that rates answers"),
        ((*FLAGS, "--scorer", "judge"), "--judge.model: expected the name of a model of the server, got ''"),
        ((*FLAGS, "--from", "none.yaml"), "--from none.yaml: cannot be read"),
        ((*FLAGS, "--from", "odd.yaml"), "expected a configuration of TRL (datasets:), axolotl (base_model:) or LLaMA"),
        ((*FLAGS, "--from", "info.yaml"), "dataset: 'missing' is not in"),
        (("--target", "v.jsonl", "--data", "a.jsonl", "sub/a.jsonl"), "called 'a'; name them: a_2=sub/a.jsonl"),
    ],
)
def test_missing_and_wrong_answers_are_refused(project, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(project)
    (project / "odd.yaml").write_text("a: 1")
    (project / "info.yaml").write_text("{model_name_or_path: x, dataset: missing, dataset_dir: .}")
    (project / "dataset_info.json").write_text("{}")
    assert m2m("init", "--model", "org/model", *flags) == 2
    assert message in capsys.readouterr().err
    assert not (project / "m2m.yaml").exists()


TRL = {
    "datasets": [{"path": "json", "data_files": "alpha.jsonl"}, {"path": "json", "data_files": "beta.jsonl"}],
    "lora_r": 2, "learning_rate": 0.01, "max_steps": 2, "use_peft": True, "output_dir": "elsewhere",
}  # fmt: skip
AXOLOTL = {
    "datasets": [{"path": "alpha.jsonl", "type": "alpaca"}, {"path": "json", "data_files": ["beta.jsonl"]}],
    "adapter": "lora", "lora_r": 2, "learning_rate": 0.01, "max_steps": 2, "flash_attention": True,
}  # fmt: skip
FACTORY = {
    "dataset": "alpha,beta", "dataset_dir": ".", "lora_rank": 2, "learning_rate": 0.01, "max_steps": 2, "stage": "sft",
}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "key", "lost"),
    [
        (TRL, "model_name_or_path", "output_dir"),
        (AXOLOTL, "base_model", "datasets.type, flash_attention"),
        (FACTORY, "model_name_or_path", None),
    ],
    ids=["trl", "axolotl", "llamafactory"],
)
def test_the_datasets_of_other_trainers_become_candidates(project, model, given, key, lost):
    columns = {"prompt": "q", "response": "a"}
    info = {name: {"file_name": f"{name}.jsonl", "columns": columns} for name in ("alpha", "beta")}
    if given is FACTORY:
        for name in info:
            rows = [{"q": row["prompt"], "a": row["completion"]} for row in candidate_rows(name, 12)]
            write_rows(project / f"{name}.jsonl", rows)
        (project / "dataset_info.json").write_text(json.dumps(info))
    (project / "theirs.yaml").write_text(yaml.safe_dump({**given, key: model}))
    assert m2m("init", "--from", "theirs.yaml", "--target", "validation.jsonl", "--output", "ours/new.yaml") == 0
    text = (project / "ours" / "new.yaml").read_text()
    assert (f"# Not taken over: {lost}" in text) == (lost is not None)
    assert m2m("search", "--config", "ours/new.yaml", "--output_dir", "out") == 0
    training = json.loads((project / "out" / "adapters" / "beta" / "training.json").read_text())
    assert training["uniform"]["lora_config.r"] == 2
    assert training["uniform"]["learning_rate"] == 0.01
    assert training["steps"] == 2


SAID = [{"from": "human", "value": "hot?"}, {"from": "gpt", "value": "cold"}]
ALPACA = {"instruction": "Name it.", "input": "red", "output": "rot", "system": "Be terse.", "text": "red is rot"}
MAPPED = {"field_messages": "turns", "message_property_mappings": {"role": "from", "content": "value"}}
CUSTOM = {"field_instruction": "instruction", "format": "[{instruction}] {input}", "field_output": "output"}
NAMES = {"prompt": "instruction", "query": "input", "response": "output"}


def axolotl(**entry) -> dict:
    return {"datasets": [{"path": "rows.jsonl", **entry}]}


@pytest.mark.parametrize(
    ("theirs", "row", "prompt"),
    [
        (axolotl(type="chat_template", **MAPPED), {"turns": SAID}, [{"role": "user", "content": "hot?"}]),
        (axolotl(type="sharegpt"), {"conversations": SAID}, [{"role": "user", "content": "hot?"}]),
        (axolotl(type="alpaca"), ALPACA, "Name it.\nred"),
        (axolotl(type="alpaca"), {"instruction": "Name it.", "output": "rot"}, "Name it."),
        (axolotl(type=CUSTOM), {key: ALPACA[key] for key in ("instruction", "input", "output")}, "[Name it.] red"),
        (axolotl(type="completion"), ALPACA, ""),
        ({}, ALPACA, "Name it.\nred"),
        ({"columns": {"prompt": "text"}, "stage": "pt"}, ALPACA, ""),
        ({"columns": NAMES | {"system": "system"}}, ALPACA, "Be terse.\nName it.\nred"),
        ({"columns": {"prompt": "instruction", "response": "output"}}, ALPACA, "Name it."),
        ({"formatting": "sharegpt"}, {"conversations": SAID}, [{"role": "user", "content": "hot?"}]),
    ],
)
def test_rows_of_other_trainers_are_read_whole(project, model, capsys, theirs, row, prompt):
    write_rows(project / "rows.jsonl", [row] * 4)
    if "datasets" in theirs:
        theirs = {"base_model": model, **theirs}
    else:
        (project / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.jsonl", **theirs}}))
        stage = theirs.get("stage", "sft")
        theirs = {"model_name_or_path": model, "dataset": "rows", "dataset_dir": ".", "stage": stage}
    (project / "theirs.yaml").write_text(yaml.safe_dump(theirs))
    assert m2m("init", "--from", "theirs.yaml", "--target", "validation.jsonl") == 0
    assert not {"system"} & row.keys() or re.search(r"\{system\}|unused_system", (project / "m2m.yaml").read_text())
    config, *_ = parse(project / "m2m.yaml")
    tokenizer = AutoTokenizer.from_pretrained(model)
    data = load_causal_lm_data(
        config.parsed_candidates, {}, tokenizer, seed=0, max_length=None, assistant_only_loss=False
    )
    assert data.candidates["rows"].rows[0]["prompt"] == prompt
    assert "they need prompt" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"columns": NAMES | {"history": "old"}}, "its history, the column 'old', belongs into a conversation"),
        ({"formatting": "sharegpt", "columns": {"messages": "turns", "system": "sys"}}, "its system, the column 'sys'"),
        ({"file_name": None, "ms_hub_url": "a/b"}, "expected file_name or hf_hub_url, got file_name, ms_hub_url"),
        ({"formatting": "sharegpt", "tags": {"role_tag": "who"}}, "expected messages of role and content, or of from"),
        ({"formatting": "sharegpt", "tags": {"user_tag": "asker"}}, "expected user_tag: user, got 'asker'"),
    ],
)
def test_rows_of_other_trainers_that_must_be_converted(project, model, capsys, entry, message):
    (project / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.jsonl", **entry}}))
    theirs = {"model_name_or_path": model, "dataset": "rows", "dataset_dir": "."}
    (project / "theirs.yaml").write_text(yaml.safe_dump(theirs))
    assert m2m("init", "--from", "theirs.yaml", "--target", "validation.jsonl") == 2
    assert message in capsys.readouterr().err
    assert not (project / "m2m.yaml").exists()


WRONG = [("trl", {"datasets": {"path": "a"}}), ("trl", {"datasets": [{"path": ["a"]}]}), ("llama", [1])]


@pytest.mark.parametrize(("kind", "content"), [*WRONG, ("llama", {"rows": {"columns": [1], "file_name": "a.jsonl"}})])
def test_configurations_of_another_shape_are_refused(project, model, capsys, kind, content):
    theirs = {"model_name_or_path": model, **(content if kind == "trl" else {"dataset": "rows", "dataset_dir": "."})}
    (project / "theirs.yaml").write_text(yaml.safe_dump(theirs))
    (project / "dataset_info.json").write_text(json.dumps(content))
    assert m2m("init", "--from", "theirs.yaml", "--target", "validation.jsonl") == 2
    assert re.search("entries with a path|not shaped as its trainer reads it", capsys.readouterr().err)


def test_old_and_unknown_fields_of_trl_are_mapped_or_named(project, model):
    old = {"max_seq_length": 99, "torch_dtype": "float32", "warmup_ratio": 0.5, "no_cuda": True, "max_steps": 2}
    gone = {
        "evaluation_strategy": "steps",
        "save_safetensors": True,
        "odd": 1,
        "push_to_hub_token": "x",
        "env": {"A": "1"},
    }
    entry = {"path": "json", "data_files": "alpha.jsonl", "fraction": 0.5}
    theirs = {"model_name_or_path": model, "datasets": [entry], **old, **gone, "bf16": False, "trust_remote_code": True}
    (project / "theirs.yaml").write_text(yaml.safe_dump(theirs | {"include_tokens_per_second": True}))
    assert m2m("init", "--from", "theirs.yaml", "--target", "validation.jsonl") == 0
    text = (project / "m2m.yaml").read_text()
    (lost,) = [line for line in text.splitlines() if line.startswith("# Not taken over: ")]
    assert all(name in lost for name in (*gone, "trust_remote_code", "datasets.fraction", "full fine-tuning"))
    given = yaml.safe_load(text)
    assert {key: given[key] for key in ("max_length", "dtype", "warmup_steps", "use_cpu")} == {
        "max_length": 99, "dtype": "float32", "warmup_steps": 0.5, "use_cpu": True,
    }  # fmt: skip
    assert m2m("select", "m2m.yaml", "--dry_run") == 0


@pytest.mark.parametrize("kind", ["axolotl", "llamafactory"])
def test_columns_of_a_conversation_that_are_not_read_are_left_out_whatever_the_file(project, model, kind):
    (project / "rows.json").write_text(json.dumps([ALPACA] * 4))
    (project / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    theirs = {"model_name_or_path": model, "dataset": "rows", "dataset_dir": "."}
    if kind == "axolotl":
        theirs = {"base_model": model, "datasets": [{"path": "rows.json", "type": "alpaca"}]}
    (project / "theirs.yaml").write_text(yaml.safe_dump(theirs))
    assert m2m("init", "--from", "theirs.yaml", "--target", "validation.jsonl") == 0
    assert m2m("select", "m2m.yaml", "--dry_run") == 0


def test_a_column_that_the_first_row_lacks_is_read(project, model):
    rows = [{"instruction": "Name it.", "output": "rot"}, {"instruction": "Name it.", "input": "red", "output": "rot"}]
    write_rows(project / "rows.jsonl", rows)
    (project / "theirs.yaml").write_text(yaml.safe_dump({"base_model": model, **axolotl(type="alpaca")}))
    assert m2m("init", "--from", "theirs.yaml", "--target", "validation.jsonl") == 0
    text = (project / "m2m.yaml").read_text()
    assert yaml.safe_load(text)["candidates"]["rows"]["template"] == {"prompt": "{instruction}\n{input}"}
    assert "in rows prompts without the line end before an empty column" in text


def test_rows_that_need_other_names_are_named(project, model, capsys):
    write_rows(project / "rows.jsonl", [{"q": "a", "a": "b"}])
    flags = ("--model", model, "--data", "rows.jsonl", "--target", "validation.jsonl")
    assert m2m("init", *flags) == 0
    assert "rows, whose rows have a, q: they need prompt and completion" in capsys.readouterr().out
    assert "# Not taken over: rows, whose rows have a, q" in (project / "m2m.yaml").read_text()


def test_compressed_files_and_tables_of_tabs(project, model):
    with gzip.open(project / "packed.jsonl.gz", "wt") as file:
        file.write((project / "alpha.jsonl").read_text())
    (project / "t.tsv").write_text("prompt\tcompletion\nhot?\tcold\n")
    flags = ("--model", model, "--data", "packed.jsonl.gz", "t.tsv", "--target", "validation.jsonl")
    assert m2m("init", *flags) == 0
    given = yaml.safe_load((project / "m2m.yaml").read_text())["candidates"]
    files = {"packed": ("json", "packed.jsonl.gz"), "t": ("csv", "t.tsv")}
    assert given == {name: {"path": path, "data_files": file} for name, (path, file) in files.items()}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "json", "parquet", "folder", "disk"])
def test_rows_of_every_kind_of_file_tell_their_task(intents, encoder, monkeypatch, kind):
    monkeypatch.chdir(intents)
    source = intents / f"asked.{kind}"
    rows = [json.loads(line) for line in (intents / "validation_intents.jsonl").read_text().splitlines()]
    made = Dataset.from_list(rows)
    if kind == "jsonl":
        write_rows(source, rows)
    elif kind == "json":
        source.write_text(json.dumps(rows))
    elif kind == "folder":
        for number, label in enumerate(("red", "blue")):
            (source / label).mkdir(parents=True)
            picture((200 * number, 0, 0), number).save(source / label / "0.png")
    else:
        {"disk": made.save_to_disk, "csv": made.to_csv, "parquet": made.to_parquet}[kind](source)
    flags = ("--model", encoder, "--data", "colours.jsonl", "--target", f"asked={source.name}")
    assert m2m("init", *flags) == 0
    given = yaml.safe_load((intents / "m2m.yaml").read_text())
    assert given["targets"]["asked"]["scorer"] == "classification"
    assert given["task"] == ("image_classification" if kind == "folder" else "sequence_classification")
    if kind != "folder":
        assert m2m("adapters", "--config", "m2m.yaml", "--max_steps", 1) == 0


def test_rows_that_belong_to_another_task_say_so(intents, pico, capsys):
    given = yaml.safe_load((intents / "intents.yaml").read_text())
    del given["task"]
    given |= {"model_name_or_path": str(pico), "lora_target_modules": ["q_proj", "v_proj"]}
    (intents / "intents.yaml").write_text(yaml.safe_dump(given))
    assert m2m("adapters", "--config", intents / "intents.yaml") == 2
    assert "rows of text and label belong to task: sequence_classification" in capsys.readouterr().err
