"""The chosen mixture for other trainers: the same rows, the same settings under their names.

That axolotl's and LLaMA-Factory's own parsers take what is written here was seen with both installed apart (BENCHMARKS.md).
"""

import json

import pytest
import yaml
from pico import candidate_rows, m2m, write_rows
from pyarrow.parquet import read_table
from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser
from trl.scripts.utils import DatasetMixtureConfig

from m2m_hf.publish.export import KINDS, warmup


def exported(out, kind: str) -> dict:
    """The configuration that is written for a trainer."""
    name = {"axolotl": "config.yml", "llamafactory": "config.yaml"}[kind]
    return yaml.safe_load((out / "export" / kind / name).read_text())


def trl_arguments(out) -> list:
    """What TRL reads from its recipe."""
    parser = TrlParser((SFTConfig, ModelConfig, ScriptArguments, DatasetMixtureConfig))
    recipe = str(out / "export" / "trl" / "recipe.yaml")
    return parser.parse_args_and_config(["--config", recipe], fail_with_unknown_args=True)


def rows_of(path) -> list[dict]:
    if path.suffix == ".parquet":
        return read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


@pytest.fixture(params=["text", "chat", "shares", "dates"])
def searched(request, project):
    rows = candidate_rows("alpha", 12)
    rows[0]["prompt"] += "\u2028"  # which ends a line for some, and not in JSON
    write_rows(project / "alpha.jsonl", rows)
    flags = ("--lora_alpha", 5, "--warmup_steps", 0.1, "--adam_beta2", 0.95, "--max_steps", 3)
    if request.param == "chat":
        for name in ("alpha", "beta", "gamma"):
            turns = [
                [
                    {"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": row["completion"].strip()},
                ]
                for row in candidate_rows(name, 12)
            ]
            write_rows(project / f"{name}.jsonl", [{"messages": one} for one in turns])
    if request.param == "dates":  # which `load_dataset("json")` would not read as texts
        for name in ("alpha", "beta", "gamma"):
            rows = [row | {"completion": f"2024-01-{n:02}"} for n, row in enumerate(candidate_rows(name, 12), start=1)]
            write_rows(project / f"{name}.jsonl", rows)
    if request.param == "shares":
        text = (project / "run.yaml").read_text()
        for name in ("alpha", "beta"):
            text = text.replace(f"{name}.jsonl", f"{name}.jsonl, required: true")
        (project / "run.yaml").write_text(text)
        flags += ("--strategy", "auto", "--weights", "continuous", "--max_trials", 12)
    assert m2m("search", "--config", project / "run.yaml", *flags) == 0
    if request.param == "shares":
        sources = json.loads((project / "out" / "mixture" / "manifest.json").read_text())["sources"]
        assert len({one["rows"] for one in sources.values()}) > 1
    return project / "out", "text" if request.param == "shares" else request.param


def test_every_trainer_is_given_the_same_rows_and_settings(searched, capsys):
    out, data_format = searched
    (rows,) = (out / "mixture").glob("train.*")
    assert (rows.suffix == ".parquet") == (data_format == "dates")
    for kind in KINDS:
        capsys.readouterr()
        assert m2m("export", out, "--to", kind) == 0
        printed = capsys.readouterr().out
        assert "exported: " in printed
        assert (f"no counterpart in {kind}: adam_beta2" in printed) == (kind in ("axolotl", "llamafactory"))
        written = out / "export" / kind / ("train.jsonl" if kind == "jsonl" else rows.name)
        if kind in ("trl", "jsonl") or (data_format != "chat" and kind == "axolotl"):
            assert rows_of(written) == rows_of(rows)
        elif data_format != "chat":  # nothing else would add the end of a text there
            ended = [row | {"completion": row["completion"] + "<|end|>"} for row in rows_of(rows)]
            assert rows_of(written) == ended
        else:
            for row, one in zip(rows_of(rows), rows_of(written), strict=True):
                said = [{key: message[key] for key in ("role", "content")} for message in one["messages"]]
                assert said == row["prompt"] + row["completion"]
                marks = [message.get("train") for message in one["messages"]]
                assert marks == ([False, True] if kind == "axolotl" else [None, None])
        assert (out / "export" / kind / "manifest.json").exists()
    args, model, _, data = trl_arguments(out)
    assert (args.max_steps, args.warmup_steps, args.adam_beta2, model.lora_alpha) == (3, 0.1, 0.95, 5)
    assert data.datasets[0].data_files == rows.name
    axolotl, factory = exported(out, "axolotl"), exported(out, "llamafactory")
    assert data.datasets[0].path == axolotl["datasets"][0]["path"] == {".jsonl": "json"}.get(rows.suffix, "parquet")
    assert axolotl["warmup_ratio"] == 0.1
    assert factory["warmup_steps"] == 1
    for given in (axolotl, factory):
        assert (given["max_steps"], given["lora_alpha"]) == (3, 5)
        assert "revision" not in " ".join(given)
    assert axolotl["lora_target_modules"] == factory["lora_target"].split(",")
    info = json.loads((out / "export" / "llamafactory" / "dataset_info.json").read_text())["mixture"]
    if data_format != "chat":
        assert info["columns"] == {"prompt": "prompt", "response": "completion"}
        assert axolotl["datasets"][0]["type"]["format"] == "{instruction}"  # nothing around the prompt
        assert factory["template"] == "empty"
    else:
        assert info["columns"] == {"messages": "messages"}
        assert axolotl["datasets"][0]["type"] == "chat_template"
        assert axolotl["datasets"][0]["message_field_training"] == "train"
        assert "template" not in factory
        assert factory["mask_history"] is True


def test_full_fine_tunes_are_asked_for_without_an_adapter(project, capsys):
    flags = ("--expert", "full", "--learning_rate", "2e-3", "--trained_parameters", "layers")
    assert m2m("search", "--config", project / "run.yaml", *flags) == 0
    out = project / "out"
    for kind in KINDS:
        capsys.readouterr()
        assert m2m("export", out, "--to", kind) == 0
        assert (f"no counterpart in {kind}: trained_parameters\n" in capsys.readouterr().out) == (kind != "jsonl")
        assert (out / "export" / kind / "train.jsonl").exists()
    args, model, _, _ = trl_arguments(out)
    assert (args.learning_rate, model.use_peft) == (2e-3, False)
    axolotl, factory = exported(out, "axolotl"), exported(out, "llamafactory")
    assert factory["finetuning_type"] == "full"
    for given in (axolotl, factory):
        assert (given["max_steps"], given["learning_rate"]) == (3, 2e-3)
        assert not [key for key in given if "lora" in key or "adapter" in key]


def test_a_classifier_is_not_exported_and_its_recipe_named(intents, capsys):
    assert m2m("search", "--config", intents / "intents.yaml") == 0
    for kind in KINDS:
        assert m2m("export", intents / "out", "--to", kind) == 2
        told = capsys.readouterr().err
        assert "is a run of task: sequence_classification" in told
        assert f"python recipes/classify.py --config {intents / 'out' / 'recipe.yaml'}" in told
    assert not (intents / "out" / "export").exists()


def test_what_cannot_be_exported(finished, capsys):
    assert m2m("export", finished / "nothing", "--to", "trl") == 2
    assert "has no recipe.yaml" in capsys.readouterr().err
    assert m2m("export", finished / "out", "--to", "word") == 2
    assert "--to: expected trl, axolotl, llamafactory, jsonl, got 'word'" in capsys.readouterr().err
    recipe = finished / "out" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("  - completion\n", "  - completion\n  - tools\n"))
    assert m2m("export", finished / "out", "--to", "axolotl") == 2
    assert "or tools, which trl and jsonl keep; got 'axolotl'" in capsys.readouterr().err
    rows = finished / "out" / "mixture" / "train.jsonl"
    rows.write_bytes(rows.read_bytes()[:-5])
    assert m2m("export", finished / "out", "--to", "jsonl") == 2
    assert "not what its manifest says" in capsys.readouterr().err


def test_a_share_of_warm_up_steps_is_a_ratio_elsewhere():
    assert warmup(0) == {"warmup_steps": 0}
    assert warmup(0.05) == {"warmup_ratio": 0.05}
    assert warmup(20) == {"warmup_steps": 20}
