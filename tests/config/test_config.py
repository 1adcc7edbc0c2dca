"""Configuration: what is accepted, what is refused and how it is said, and that it survives being written."""

import re
from dataclasses import fields, replace
from datetime import date
from pathlib import Path

import pytest
import yaml
from datasets import DatasetDict
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser

from m2m_hf.config.checks import rules
from m2m_hf.config.parsing import KEYS, parse, trl_fields, with_overrides
from m2m_hf.config.run_config import MergeToMixConfig
from m2m_hf.config.yaml_files import dump_yaml, load_yaml
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


def candidate(**fields) -> dict:
    return {"candidates": {"a": {**CANDIDATES["a"], **fields}}}


def target(scorer="choice", **fields) -> dict:
    return {"targets": {"t": {**TARGETS["t"], "scorer": scorer, **fields}}}


def scored(scorer, **fields) -> dict:
    """A target without rows."""
    return {"targets": {"t": {"scorer": scorer, **fields}}}


FULL = {"expert": "full"}
CLASSIFICATION = {"task": "sequence_classification", **target("classification")}
CONTINUOUS = {"strategy": "random", "weights": "continuous"}
TIES = {"merge_method": "ties"}
TRAINED = {"objective": "trained"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *(
            ({"candidates": {name: {}}}, f"candidate name {name!r} is not allowed")
            for name in ("a/b", "..", "a..b", ".a", 7, "x" * 65)
        ),
        *(({"adapters": bank}, "adapters: expected org/name") for bank in ("", {}, {"a": ""}, {7: "org/name"})),
        ({"candidates": {}}, "candidates: expected at least one, such as"),
        ({"candidates": ["a"]}, "candidates: expected at least one"),
        ({"candidates": {"a": CANDIDATES["a"], "A": CANDIDATES["a"]}}, "differ only in case"),
        ({"candidates": {"a": {"data_files": "x"}}}, r"candidates\.a\.path is missing"),
        ({"candidates": {"a": {"path": "json"}}}, r"candidates\.a\.data_files is missing"),
        ({"candidates": {"a": "file.jsonl"}}, "expected what load_dataset takes"),
        ({"candidates": {str(i): CANDIDATES["a"] for i in range(17)}}, "17 given.* Use strategy: auto"),
        ({"candidates": {"a": DatasetDict()}}, r"candidates\.a\.path is missing"),
        (candidate(data_file="x"), "unknown key 'data_file'; did you mean 'data_files'"),
        (candidate(max_examples="5"), "max_examples: expected an integer of at least 1, got '5'"),
        (candidate(data_files=["a.jsonl", 5]), "data_files: expected a file or a list of files"),
        (candidate(where={"q": ["x"]}), r"where: expected \{column: value\}"),
        (candidate(required="yes"), r"candidates\.a\.required: expected true or false, got 'yes'"),
        (candidate(cost=-1), r"candidates\.a\.cost: expected a number of at least 0, got -1"),
        (candidate(required=True, excluded=True), r"candidates\.a: it is both required and excluded"),
        (candidate(columns={"q": 5}), "both text, got {'q': 5}"),
        (candidate(template={"text": "x"}), "expected texts for prompt, completion and answer"),
        (candidate(labels={"a": "b"}), r"candidates\.a\.labels: belongs to task: sequence_classification"),
        (candidate(training={"lora_r": 2}), r"candidates\.a\.training: .*set allow_mixed_training: true"),
        (scored("choice"), r"targets\.t\.data is missing"),
        (scored("command"), r"targets\.t\.command is missing: give the program"),
        (scored("lm_eval"), r"targets\.t\.task is missing: give the name of a task"),
        (scored("lm_eval", task="x", limit=0), "limit: expected an integer of at least 1"),
        (scored("command", command="'a"), "cannot be split into arguments"),
        (scored("command", command=["a", "{model}"]), "give {adapter}, not {model}"),
        (FULL | scored("command", command=["{adapter}"]), "give {model}, not {adapter}"),
        (target("choise"), "expected one of choice, classification, loss, .*, got 'choise'"),
        (target(metrics="x"), "unknown key 'metrics'; did you mean 'metric'"),
        (target(metric="exact_match"), "expected accuracy, logprob, or a module of your own"),
        (target("loss", metric="accuracy"), "expected loglikelihood for scorer loss"),
        (target(weight=0), "weight: expected a number above 0, got 0"),
        (target(min_delta=-0.1), "min_delta: expected a number of at least 0, got -0.1"),
        (target(normalize="words"), "normalize: expected one of none, tokens, bytes"),
        (target(generation={}), "generation: belongs to scorer generation or reward or judge, not to choice"),
        (target("classification", labels=["a"]), "labels: expected a list of at least two labels"),
        ({"task": "image_classification"}, "expected classification or command for image_classification, got choice"),
        (CLASSIFICATION | {"labels": ["a"]}, "labels: expected a list of at least two labels"),
        (target("classification", labels=[True, False]), r"labels: .*True: YAML reads yes, no, .* quote it"),
        (target("classification", labels={"a": "x", "b": None}), "labels: .*None: YAML reads .* quote it"),
        (CLASSIFICATION | {"labels": [1.1, 1.2]}, "labels: .* quote it"),
        (CLASSIFICATION | candidate(labels={False: "no", "y": "yes"}), r"candidates\.a\.labels: .* quote it"),
        ({"candidates": {False: CANDIDATES["a"]}}, r"candidate name False is not allowed: .* quote it\)$"),
        ({"targets": {True: TARGETS["t"]}}, "target name True is not allowed: .* quote it"),
        (candidate(columns={True: "prompt"}), r"candidates\.a\.columns: .* quote it"),
        (candidate(where={"day": date(2020, 1, 1)}), r"candidates\.a\.where: .* quote it"),
        (CLASSIFICATION | {"labels": ["a", "b", "a"]}, "labels: expected every label once"),
        (CLASSIFICATION | {"label_template": "a photo"}, "label_template: expected a text with {label} in it"),
        (CLASSIFICATION | candidate(template={"prompt": "x"}), r"candidates\.a\.template: belongs to task: causal_lm"),
        (CLASSIFICATION | target("classification", normalize="bytes"), "num_fewshot belong to task: causal"),
        ({"labels": ["a", "b"]}, "labels: .* belongs to task: sequence_classification or image_classification"),
        ({"label_template": "a {label}"}, "label_template: .* belongs to task: sequence_classification"),
        ({"experts": "org/x"}, "experts: 'org/x' belongs to expert: full"),
        ({"delta_dtype": "float16"}, "delta_dtype: 'float16' belongs to expert: full"),
        (FULL | {"adapters": "org/x"}, "adapters: 'org/x' belongs to expert: lora; with expert: full give experts:"),
        (FULL | {"merge_method": "linear"}, "merge_method: linear averages the factors of LoRA adapters"),
        (FULL | {"trained_parameters": "("}, r"trained_parameters: '\(' is no regular expression"),
        ({"adapters": {"b": "org/x"}}, "adapters: unknown key 'b'; expected one of: a"),
        ({"strategy": "greed"}, "strategy: expected one of exhaustive, auto, .*, gradient, got 'greed'"),
        (CONTINUOUS | {"strategy": "greedy"}, "greedy proposes subsets only; with weights: continuous expected"),
        *(
            ({"method": "merge_to_mix"} | other, f"{name}: {value!r} is not of method: merge_to_mix")
            for other in (TIES, CONTINUOUS, {"objective": "ensemble"}, {"fine_tunes": 3}, {"fine_tunes": "auto"})
            for name, value in [[*other.items()][-1]]
        ),
        ({"fine_tunes": "some"}, "fine_tunes: expected auto, or an integer of at least 0, got 'some'"),
        ({"fine_tunes": True}, "fine_tunes: expected auto, or an integer of at least 0, got True"),
        ({"fine_tunes": 1.5}, "fine_tunes: expected auto, or an integer of at least 0, got 1.5"),
        (CONTINUOUS | TIES, "weights: continuous needs merge_method: average, got ties"),
        (TIES | {"merge_parameters": {"densiti": 1}}, "densiti: merge_method ties takes scaling, density"),
        (TIES | {"merge_parameters": {"density": 1.5}}, "density: expected a share above 0, at most 1"),
        ({"merge_parameters": {"density": 0.5}}, "density: merge_method average takes none"),
        *(({"max_trials": wrong}, "max_trials: expected an integer of at least 1") for wrong in (0, 10.5, True)),
        ({"max_cost": float("inf")}, "max_cost: expected a number of at least 0, got inf"),
        ({"licenses": "mit"}, "licenses: expected a list of names, got 'mit'"),
        *(
            (TRAINED | wrong, f"{name}: {wrong[name]!r} does not go with objective: trained, which {why}")
            for name, why, wrong in (
                ("fine_tunes", "fine-tunes every mixture", {"fine_tunes": 1}),
                ("method", "merges nothing", {"method": "merge_to_mix"}),
                ("merge_method", "merges nothing", TIES),
                ("weights", "could not tell apart", CONTINUOUS),
                ("race", "spends its time on fine-tuning", {"race": True}),
                ("max_seconds", "is bounded by max_trials", {"max_seconds": 60}),
                ("max_example_evaluations", "is bounded by max_trials", {"max_example_evaluations": 60}),
                ("allow_mixed_training", "trains every mixture with", {"allow_mixed_training": True}),
            )
        ),
        ({"fidelity_mixtures": 3}, "fidelity_mixtures: expected an integer of at least 4, got 3"),
    ],
)
def test_a_wrong_setting_is_refused_with_what_was_expected(fields, message):
    with pytest.raises(InputError, match=message):
        config(**fields)


@pytest.mark.parametrize("field", fields(MergeToMixConfig), ids=lambda field: field.name)
def test_every_field_is_explained_and_says_what_it_expects(field):
    assert field.metadata["help"]
    message = f"{field.name}: expected {re.escape(rules(MergeToMixConfig)[field.name].expected)}, got "
    with pytest.raises(InputError, match=message):
        config(**{field.name: 0j})
    if field.default is not None:
        with pytest.raises(InputError, match=message):
            config(**{field.name: None})


def test_a_configuration_is_checked_again_when_it_is_replaced():
    given = config(adapters={"a": "org/x"}, max_seconds=600, labels=None)
    assert replace(given, max_trials=9).parsed_candidates == given.parsed_candidates
    with pytest.raises(InputError, match="max_trials"):
        replace(given, max_trials=0)


def test_mappings_and_lists_stay_what_they_are_on_their_way_through_trls_parser(tmp_path):
    bank = {"a": "org/adapter"}
    ours, *_ = parse(write(tmp_path, adapters=bank, licenses=["mit"], final={"lora_r": 2}))
    assert (ours.adapters, ours.licenses, ours.final) == (bank, ["mit"], {"lora_r": 2})
    ours, *_ = parse(write(tmp_path, adapters=bank), ["--adapters", "org/other", "--licenses", "mit", "bsd"])
    assert (ours.adapters, ours.licenses) == ("org/other", ["mit", "bsd"])
    ours, *_ = parse(write(tmp_path, **CLASSIFICATION, labels=["a", "b"]))
    assert (ours.labels, ours.parsed_labels) == (["a", "b"], {"a": "a", "b": "b"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: 'a' is there twice, first in line 1"),
        ("x: {a: 1, 'a': 2}", "line 1: 'a' is there twice"),
        ("x:\n- k: 1\n  k: 1", "line 3: 'k' is there twice, first in line 2"),
        ('{"max_steps": 3,\n"max_steps": 4}', "line 2: 'max_steps' is there twice"),
        ("true: a\nyes: b", "line 2: 'yes' is there twice"),
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path, text, message):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(InputError, match=re.escape(f"--config {tmp_path / 'x.yaml'}, {message}")):
        parse(tmp_path / "x.yaml")


def test_merged_keys_and_anchors_are_no_repetition():
    text = "a: &b {x: 1}\nc: &d {<<: *b, x: 2}\ne: {<<: [*d, *b], x: 3}\nf: {x: 4}"
    assert load_yaml(text) == yaml.safe_load(text) == {"a": {"x": 1}, "c": {"x": 2}, "e": {"x": 3}, "f": {"x": 4}}


def test_paths_are_relative_to_the_yaml_and_those_of_the_hub_stay(tmp_path):
    (tmp_path / "model").mkdir()
    ours, _, model_args = parse(write(tmp_path, model_name_or_path="model"))
    assert ours.parsed_candidates["a"].data.data_files == (str(tmp_path / "a.jsonl"),)
    assert model_args.model_name_or_path == str(tmp_path / "model")
    ours, _, hub = parse(write(tmp_path, candidates={"a": {"path": "org/data", "data_files": "train.jsonl"}}))
    assert ours.parsed_candidates["a"].data.data_files == ("train.jsonl",)
    assert hub.model_name_or_path == "org/model"


def test_the_command_line_overrides_values_which_override_the_file(tmp_path):
    path = write(tmp_path, learning_rate=1e-3, seed=1, bf16=False, lora_r=9, max_length=9)
    values = {"lora_target_modules": ["q_proj", "v_proj"], "lora_r": 2, "max_length": None}
    _, args, model_args = parse(path, ["--learning_rate", "5e-4", "--lora_r", "4"], values)
    assert (args.learning_rate, args.seed, args.max_length) == (5e-4, 1, None)
    assert (model_args.lora_r, model_args.lora_target_modules) == (4, ["q_proj", "v_proj"])
    assert trl_fields(args, model_args)["max_length"] is None  # null means something there


@pytest.mark.parametrize(
    ("fields", "flags", "message"),
    [
        ({"learning_rat": 1}, "", "unknown key 'learning_rat'; did you mean 'learning_rate'"),
        (
            {"dataset_name": "x"},
            "",
            "unknown key 'dataset_name'; rows stand under candidates: here, and m2m init --from",
        ),
        ({"torch_dtype": "float32"}, "", "unknown key 'torch_dtype'; it is now dtype"),
        ({"save_safetensors": True}, "", "unknown key 'save_safetensors'; transformers has it no longer; remove it"),
        ({}, "--max_seq_length 9", "unknown key 'max_seq_length'; it is now max_length"),
        ({}, "--learning_rat 1", "unknown key 'learning_rat'; did you mean 'learning_rate'"),
        ({"learning_rate": "fast"}, "", "learning-rate: invalid float value: 'fast'"),
        ({"max_steps": [1]}, "", "max_steps: expected int, got"),
        ({"lr_scheduler_type": "zigzag"}, "", "zigzag"),
        ({"model_name_or_path": MISSING}, "", "model_name_or_path is missing"),
        ({"learning_rate": None}, "", "learning_rate: expected float, got nothing; give a value or remove the key"),
        ({"strategy": None}, "", "strategy: expected one of exhaustive, .*, got nothing; give a value"),
        ({"trust_remote_code": True}, "", "never loaded"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "", "8 bit and 4 bit"),
        ({"push_to_hub": True}, "", "push_to_hub"),
        ({"env": {"A": "b"}}, "", "env: set environment variables"),
        ({"hub_token": "secret"}, "", "do not put tokens in files"),
        ({"eval_strategy": "steps"}, "", "eval_strategy: expected 'no'"),
        ({"per_device_train_batch_size": 0}, "", "batch_size: expected an integer of at least 1, got 0"),
        ({"max_length": 0}, "", "max_length: expected an integer of at least 1"),
        ({}, "stray", "unrecognised arguments: stray"),
        ({}, "--labels a", "--labels: expected in the YAML"),
        ({}, "--use_cpu maybe", "use_cpu"),
        ({"num_train_epochs": 0}, "", "num_train_epochs: expected a number above 0, got 0"),
        ({"max_steps": 0}, "", "max_steps: expected at least 1, or -1 for num_train_epochs, got 0"),
        ({"seed": 2**32}, "", "seed: expected an integer from 0 to"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "", "the training arguments cannot be used"),
        ({"truncation_mode": "keep_end"}, "", "truncation_mode: expected keep_start"),
        ({"use_peft": False}, "", "use_peft: False contradicts expert: lora"),
        ({"use_peft": True}, "--expert full", "use_peft: True contradicts expert: full"),
        (
            {"dataset_text_field": "body"},
            "",
            "dataset_text_field: rows have a prompt and a completion; .* {body: completion}",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*truncation_mode:FutureWarning")
def test_bad_files_and_flags(tmp_path, fields, flags, message):
    with pytest.raises(InputError, match=message):
        parse(write(tmp_path, **fields), flags.split())


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "just words", ""])
def test_not_a_mapping(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(InputError, match="expected"):
        parse(tmp_path / "x.yaml")
    with pytest.raises(InputError, match="no such file"):
        parse(tmp_path / "y.yaml")


@pytest.mark.parametrize(("word", "number"), [("010", 8), ("1:30", 90), ("1:30.5", 90.5), ("-07", -7)])
def test_numbers_that_yaml_reads_as_others_are_refused(tmp_path, word, number):
    path = write(tmp_path)
    path.write_text(path.read_text().replace("data_files: a.jsonl", f"data_files: a.jsonl\n    where: {{zip: {word}}}"))
    with pytest.raises(InputError, match=rf"line \d+: YAML reads {word} as {number}; quote it"):
        parse(path)
    path.write_text(path.read_text().replace(word, f"'{word}'"))
    assert parse(path)[0].parsed_candidates["a"].data.where == {"zip": word}


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
    assert args.learning_rate == 2e-4
    assert args.output_dir == str(Path.cwd() / "runs" / "x")


def test_final_overrides(tmp_path):
    _, args, model_args = parse(write(tmp_path, learning_rate=1e-3, bf16=False))
    overrides = {"num_train_epochs": 5, "lora_r": 2, "learning_rate": "1e-5"}
    new_args, new_model_args = with_overrides(args, model_args, overrides)
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
    assert len(KEYS) == len(set(KEYS))


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml")), ids=lambda p: p.name)
def test_every_recipe_parses(path):
    parse(path)
