"""Configuration: what is accepted, what is refused and how it is said, and that it survives being written."""

from pathlib import Path

import pytest
import yaml
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser

from m2m_hf.config.parsing import dump_yaml, field_names, parse, trl_fields, with_overrides
from m2m_hf.config.run_config import MergeToMixConfig, field_help
from m2m_hf.errors import InputError

MISSING = object()
CANDIDATES = {"a": {"path": "json", "data_files": "a.jsonl"}}
TARGETS = {"t": {"data": {"path": "json", "data_files": "v.jsonl"}, "scorer": "choice"}}


def config(**fields) -> MergeToMixConfig:
    return MergeToMixConfig(**{"candidates": CANDIDATES, "targets": TARGETS, **fields})


def write(folder: Path, **fields) -> Path:
    """A YAML with a model and one candidate, and `fields` over it."""
    values = {"model_name_or_path": "org/model", "candidates": CANDIDATES, "targets": TARGETS, **fields}
    path = folder / "x.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not MISSING}))
    return path


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"candidates": {}}, "candidates: expected at least one"),
        ({"targets": {}}, "targets: expected at least one"),
        ({"candidates": ["a"]}, "candidates: expected at least one"),
        ({"candidates": {"a/b": {}}}, "candidate name 'a/b' is not allowed"),
        ({"candidates": {"..": {}}}, "candidate name '..' is not allowed"),
        ({"candidates": {"a..b": {}}}, "candidate name 'a..b' is not allowed"),
        ({"candidates": {".hidden": {}}}, "candidate name '.hidden' is not allowed"),
        ({"candidates": {"x" * 65: {}}}, "is not allowed"),
        ({"candidates": {7: {}}}, "candidate name 7 is not allowed"),
        ({"candidates": {"a": CANDIDATES["a"], "A": CANDIDATES["a"]}}, "differ only in case"),
        (
            {"candidates": {"a": {"path": "json", "data_file": "x"}}},
            "unknown key 'data_file'; did you mean 'data_files'",
        ),
        ({"candidates": {"a": {"path": "json", "max_examples": 0}}}, "expected at least 1, got 0"),
        ({"candidates": {"a": {"path": "json", "max_examples": "5"}}}, "expected int, got '5'"),
        ({"candidates": {"a": {"data_files": "x"}}}, r"candidates\.a\.path is missing"),
        ({"candidates": {"a": "file.jsonl"}}, "expected what load_dataset takes"),
        ({"candidates": {"a": {**CANDIDATES["a"], "required": "yes"}}}, "required: true"),
        ({"candidates": {str(i): CANDIDATES["a"] for i in range(17)}}, "17 given"),
        ({"targets": {"t": {"scorer": "choice"}}}, r"targets\.t\.data is missing"),
        (
            {"targets": {"t": {**TARGETS["t"], "scorer": "choise"}}},
            "expected one of choice, classification, loss, .*, got 'choise'",
        ),
        (
            {"targets": {"t": {**TARGETS["t"], "metric": "exact_match"}}},
            "expected accuracy, logprob, or a module of your own",
        ),
        (
            {"targets": {"t": {**TARGETS["t"], "scorer": "loss", "metric": "accuracy"}}},
            "expected loglikelihood for scorer loss",
        ),
        ({"targets": {"t": {**TARGETS["t"], "weight": 0}}}, "weight: expected a number above 0, got 0"),
        ({"targets": {"t": {**TARGETS["t"], "min_delta": -0.1}}}, "min_delta: expected a number, 0 or above, got -0.1"),
        ({"targets": {"t": {**TARGETS["t"], "normalize": "words"}}}, "normalize: expected one of none, tokens, bytes"),
        (
            {"targets": {"t": {**TARGETS["t"], "generation": {}}}},
            "generation: belongs to scorer generation, not to choice",
        ),
        (
            {"targets": {"t": {**TARGETS["t"], "scorer": "classification", "labels": ["a"]}}},
            "labels: expected at least two",
        ),
        ({"targets": {"t": {"scorer": "command"}}}, r"targets\.t\.command is missing: give the program"),
        ({"targets": {"t": {"scorer": "lm_eval"}}}, r"targets\.t\.task is missing: give the name of a task"),
        (
            {"targets": {"t": {"scorer": "lm_eval", "task": "x", "limit": 0}}},
            "limit: expected an integer above 0, got 0",
        ),
        (
            {"candidates": {"a": {**CANDIDATES["a"], "template": {"text": "x"}}}},
            "expected texts for prompt and completion",
        ),
        ({"strategy": "greed"}, "strategy: expected exhaustive or auto or .* or gradient, got 'greed'"),
        (
            {"strategy": "greedy", "weights": "continuous"},
            "greedy proposes subsets only; for weights: continuous expected",
        ),
        ({"max_trials": 0}, "max_trials: expected an integer of at least 1, got 0"),
        ({"max_trials": 10.5}, "max_trials: expected an integer of at least 1, got 10.5"),
        ({"max_cost": float("inf")}, "max_cost: expected a number of at least 0, got inf"),
        ({"max_seconds": "soon"}, "max_seconds: expected a number of at least 0, got 'soon'"),
        ({"licenses": "mit"}, "licenses: expected a list of names, got 'mit'"),
        ({"race": "yes"}, "race: expected true or false, got 'yes'"),
        ({"candidates": {"a": {**CANDIDATES["a"], "cost": -1}}}, r"candidates\.a\.cost: expected a number, 0 or above"),
        (
            {"candidates": {"a": {**CANDIDATES["a"], "required": True, "excluded": True}}},
            r"candidates\.a: it is both required and excluded",
        ),
        ({"verify_top_k": -1}, "verify_top_k: expected an integer of at least 0, got -1"),
        ({"candidates": {"a": {**CANDIDATES["a"], "columns": {"q": 5}}}}, "both text, got {'q': 5}"),
        ({"tokens_per_batch": 0}, "tokens_per_batch: expected an integer of at least 1"),
        ({"final": ["x"]}, "final: expected fields"),
    ],
)
def test_refused(fields, message):
    with pytest.raises(InputError, match=message):
        config(**fields)


def test_paths_are_relative_to_the_yaml(tmp_path):
    (tmp_path / "model").mkdir()
    ours, _, model_args = parse(write(tmp_path, model_name_or_path="model"))
    assert ours.parsed_candidates["a"].data.data_files == (str(tmp_path / "a.jsonl"),)
    assert model_args.model_name_or_path == str(tmp_path / "model")
    _, _, hub = parse(write(tmp_path))
    assert hub.model_name_or_path == "org/model"


def test_the_command_line_overrides_the_file(tmp_path):
    path = write(tmp_path, learning_rate=1e-3, seed=1, bf16=False)
    _, args, model_args = parse(path, ["--learning_rate", "5e-4", "--lora_r", "4", "--tokens_per_batch=99"])
    assert (args.learning_rate, args.seed, model_args.lora_r) == (5e-4, 1, 4)


def test_defaults_that_differ_from_trls(tmp_path):
    _, args, model_args = parse(write(tmp_path))
    assert args.learning_rate == 2e-4
    assert args.output_dir == str(Path.cwd() / "runs" / "x")
    assert args.bf16 == (model_args.dtype == "bfloat16")


@pytest.mark.parametrize(
    ("fields", "flags", "message"),
    [
        ({"learning_rat": 1}, [], "unknown key 'learning_rat'; did you mean 'learning_rate'"),
        ({"dataset_name": "x"}, [], "unknown key 'dataset_name'"),
        ({}, ["--learning_rat", "1"], "unknown key 'learning_rat'; did you mean 'learning_rate'"),
        ({"learning_rate": "fast"}, [], "learning_rate"),
        ({"max_steps": "many"}, [], "max_steps"),
        ({"lr_scheduler_type": "zigzag"}, [], "zigzag"),
        ({"model_name_or_path": MISSING}, [], "model_name_or_path is missing"),
        ({"learning_rate": None}, [], "learning_rate: nothing given"),
        ({"trust_remote_code": True}, [], "never loaded"),
        ({"load_in_4bit": True, "load_in_8bit": True}, [], "8 bit and 4 bit"),
        ({"push_to_hub": True}, [], "push_to_hub"),
        ({"env": {"A": "b"}}, [], "env: set environment variables"),
        ({"hub_token": "secret"}, [], "a token must not stand in a file"),
        ({"eval_strategy": "steps"}, [], "eval_strategy: expected 'no'"),
        (
            {"per_device_train_batch_size": 0},
            [],
            "per_device_train_batch_size: expected an integer of at least 1, got 0",
        ),
        ({"max_length": 0}, [], "max_length: expected an integer of at least 1"),
        ({}, ["stray"], "not understood: stray"),
    ],
)
def test_bad_files_and_flags(tmp_path, fields, flags, message):
    with pytest.raises(InputError, match=message):
        parse(write(tmp_path, **fields), flags)


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "just words", ""])
def test_not_a_mapping(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(InputError, match="expected"):
        parse(tmp_path / "x.yaml")
    with pytest.raises(InputError, match="no such file"):
        parse(tmp_path / "y.yaml")


def test_what_is_written_is_read_back_as_the_same(tmp_path):
    given = {
        "learning_rate": 3e-4, "lora_target_modules": ["all-linear"], "warmup_steps": 0.1, "lr_scheduler_type": "cosine",
        "bf16": False, "dtype": "float32", "lora_r": 3, "use_rslora": True, "max_length": 77, "optim": "adamw_torch",
        "candidates": {"a": {**CANDIDATES["a"], "required": True, "license": "mit", "columns": {"q": "prompt"}}},
    }  # fmt: skip
    ours, args, model_args = parse(write(tmp_path, **given))
    fields = trl_fields(args, model_args)
    (tmp_path / "again.yaml").write_text(dump_yaml({**fields, **ours.to_yaml()}))
    ours_again, args_again, model_args_again = parse(tmp_path / "again.yaml")
    assert args_again.to_dict() == args.to_dict()
    assert model_args_again == model_args
    assert ours_again.parsed_candidates == ours.parsed_candidates
    assert ours_again.parsed_targets == ours.parsed_targets
    trl = TrlParser((ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig))
    (tmp_path / "trl.yaml").write_text(dump_yaml(fields))
    _, theirs, their_model, _ = trl.parse_args_and_config(["--config", str(tmp_path / "trl.yaml")])
    assert theirs.to_dict() == args.to_dict()
    assert their_model == model_args


def test_deprecated_truncation_is_refused(tmp_path):
    with pytest.warns(FutureWarning), pytest.raises(InputError, match="truncation_mode: expected keep_start"):
        parse(write(tmp_path, truncation_mode="keep_end"))


def test_explicit_null_is_kept_where_it_means_something(tmp_path):
    _, args, model_args = parse(write(tmp_path, max_length=None))
    assert args.max_length is None
    assert trl_fields(args, model_args)["max_length"] is None
    assert parse(write(tmp_path, max_length=9), values={"max_length": None})[1].max_length is None


def test_values_override_the_file_as_they_are(tmp_path):
    _, _, model_args = parse(
        write(tmp_path, lora_r=9), values={"lora_target_modules": ["q_proj", "v_proj"], "lora_r": 2}
    )
    assert (model_args.lora_target_modules, model_args.lora_r) == (["q_proj", "v_proj"], 2)


@pytest.mark.parametrize(
    ("fields", "flags", "native", "expected"),
    [
        ({}, (), True, (True, "bfloat16", True)),
        ({}, (), False, (True, "float32", False)),
        ({"dtype": "float32"}, (), True, (True, "float32", False)),
        ({}, ("--dtype", "float32"), True, (True, "float32", False)),
        ({"dtype": "float32", "bf16": True}, (), True, (True, "float32", True)),
        ({}, ("--use_cpu", "true"), False, (True, "float32", False)),
    ],
)
def test_precision_follows_the_hardware_and_what_was_said(tmp_path, monkeypatch, fields, flags, native, expected):
    monkeypatch.setattr("m2m_hf.config.parsing.native_bfloat16", lambda use_cpu: native)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    _, args, model_args = parse(write(tmp_path, **fields), flags)
    assert (args.use_cpu, model_args.dtype, args.bf16) == expected


def test_data_files_of_a_hub_dataset_are_left_to_the_hub(tmp_path):
    ours, _, _ = parse(write(tmp_path, candidates={"a": {"path": "org/data", "data_files": "train.jsonl"}}))
    assert ours.parsed_candidates["a"].data.data_files == ("train.jsonl",)


def test_final_overrides(tmp_path):
    _, args, model_args = parse(write(tmp_path, learning_rate=1e-3, bf16=False))
    new_args, new_model_args = with_overrides(
        args, model_args, {"num_train_epochs": 5, "lora_r": 2, "learning_rate": "1e-5"}
    )
    assert (new_args.num_train_epochs, new_args.learning_rate, new_model_args.lora_r) == (5, 1e-5, 2)
    assert new_args.to_dict() | {"num_train_epochs": 3.0, "learning_rate": 1e-3} == args.to_dict()
    for wrong, message in (
        ({"epochs": 1}, "final: unknown key 'epochs'"),
        ({"learning_rate": "fast"}, "final: .*learning_rate"),
        ({"dtype": "float16"}, "final.dtype: the base model is loaded once"),
        ({"trust_remote_code": True}, "never loaded"),
    ):
        with pytest.raises(InputError, match=message):
            with_overrides(args, model_args, wrong)


def test_our_fields_do_not_collide_with_trls():
    names = field_names()
    assert len(names) == len(set(names))
    assert all(text for _, _, text in field_help())


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml")), ids=lambda p: p.name)
def test_every_recipe_parses(path):
    parse(path)
