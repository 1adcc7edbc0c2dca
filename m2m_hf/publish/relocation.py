"""The recipe of a run folder that was moved."""

import os
from glob import escape
from pathlib import Path
from typing import Any

import yaml

from m2m_hf.config.yaml_files import dump_yaml
from m2m_hf.errors import InputError
from m2m_hf.storage.files import write_atomic
from m2m_hf.storage.run_folder import RunFolder


def relocate_recipe(run: RunFolder) -> list[str]:
    """Writes the paths of the run folder's files anew in `OUT/recipe.yaml`: `trl sft` takes none relative to its configuration.

    Returns what it names outside of the folder and is not on this machine, such as a base model, as `key: path`.

    Raises:
        InputError: there is no recipe, or it is not one that this package wrote.
    """
    try:
        text = run.recipe.read_text(encoding="utf-8")
        recipe = yaml.safe_load(text)
        before = str(Path(recipe.get("training", recipe)["output_dir"]).parent)
    except OSError as error:
        raise InputError(
            f"--relocate {run.root}: expected the folder of a finished run, with recipe.yaml ({error})"
        ) from error
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{run.recipe}: not a recipe as m2m search writes it; m2m search writes it again") from error
    missing: list[str] = []

    def moved(value: Any, key: str) -> Any:
        if isinstance(value, dict):
            return {name: moved(inner, name) for name, inner in value.items()}
        if isinstance(value, list):
            return [moved(inner, key) for inner in value]
        if not isinstance(value, str) or not os.path.isabs(value):
            return value
        spelled = escape if key == "data_files" else str  # a pattern
        if Path(value).is_relative_to(spelled(before)):
            return str(Path(spelled(str(run.root))) / Path(value).relative_to(spelled(before)))
        if not os.path.exists(value):
            missing.append(f"{key}: {value}")
        return value

    comment = [line.removeprefix("#").removeprefix(" ") for line in text.split("\n") if line.startswith("#")]
    below = moved(recipe, "")
    write_atomic(run.recipe, dump_yaml(below, "\n".join(comment).replace(before, str(run.root))))
    return missing
