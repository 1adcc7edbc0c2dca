"""A run folder that was moved: its recipe names its files where they are now."""

import shutil
from glob import escape

import pytest
import yaml
from datasets import load_dataset
from pico import m2m

from m2m_hf.storage.run_folder import RunFolder


def texts(value) -> list[str]:
    """All texts of a recipe, in order."""
    if isinstance(value, dict):
        return [text for inner in value.values() for text in texts(inner)]
    if isinstance(value, list):
        return [text for inner in value for text in texts(inner)]
    return [value] if isinstance(value, str) else []


@pytest.fixture
def moved(finished_project, tmp_path):
    """A run folder at another place, whose name needs quotes in YAML."""
    shutil.copytree(finished_project / "out", tmp_path / "any [where] #2" / "run")
    return tmp_path / "any [where] #2" / "run"


def test_a_moved_recipe_names_the_files_where_they_are(finished_project, moved, capsys):
    before = yaml.safe_load((finished_project / "out" / "recipe.yaml").read_text())
    assert m2m("recipe", "--relocate", moved) == 0
    assert "not on this machine" not in capsys.readouterr().out
    text = (moved / "recipe.yaml").read_text()
    after = yaml.safe_load(text)
    assert str(finished_project) + "/out" not in text
    assert f"trl sft --config {moved / 'recipe.yaml'}" in text
    assert after["datasets"][0]["data_files"] == escape(str(RunFolder(moved).rows))
    assert load_dataset("json", data_files=after["datasets"][0]["data_files"], split="train").num_rows
    back = [
        one.replace("[[]where]", "[where]").replace(str(moved), str(finished_project / "out")) for one in texts(after)
    ]
    assert back == texts(before)
    assert {key: value for key, value in after.items() if not texts(value)} == {
        key: value for key, value in before.items() if not texts(value)
    }


def test_a_moved_recipe_of_a_classifier(moved):
    recipe = {
        "task": "image_classification",
        "model_name_or_path": "any/model",
        "train_file": "/old/out/mixture/train.parquet",
        "head": {"file": "/old/out/head.safetensors"},
        "training": {"output_dir": "/old/out/trained-by-recipe", "max_steps": 3},
    }
    (moved / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert m2m("recipe", "--relocate", moved) == 0
    after = yaml.safe_load((moved / "recipe.yaml").read_text())
    assert after == recipe | {
        "train_file": f"{moved}/mixture/train.parquet",
        "head": {"file": f"{moved}/head.safetensors"},
        "training": {"output_dir": f"{moved}/trained-by-recipe", "max_steps": 3},
    }


def test_a_base_model_that_is_not_here_is_said(moved, capsys):
    recipe = yaml.safe_load((moved / "recipe.yaml").read_text())
    (moved / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"model_name_or_path": "/nowhere/model"}))
    assert m2m("recipe", "--relocate", moved) == 0
    assert "not on this machine: model_name_or_path: /nowhere/model" in capsys.readouterr().out
    assert yaml.safe_load((moved / "recipe.yaml").read_text())["model_name_or_path"] == "/nowhere/model"


def test_a_moved_run_is_exported_with_its_own_template(moved):
    recipe = yaml.safe_load((moved / "recipe.yaml").read_text())
    (moved / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"chat_template_path": "/old/out/chat_template.jinja"}))
    (moved / "chat_template.jinja").write_text("{{ messages }}")
    assert m2m("export", moved, "--to", "trl") == 0
    assert (moved / "export" / "trl" / "chat_template.jinja").read_text() == "{{ messages }}"


@pytest.mark.parametrize("text", ["a: [", "word", "training: {}", ""])
def test_what_is_no_recipe_is_refused(moved, capsys, text):
    (moved / "recipe.yaml").write_text(text)
    assert m2m("recipe", "--relocate", moved) == 2
    assert "not a recipe as m2m search writes it" in capsys.readouterr().err
    assert (moved / "recipe.yaml").read_text() == text
    assert m2m("recipe", "--relocate", moved / "nowhere") == 2
    assert "expected the folder of a finished run" in capsys.readouterr().err
