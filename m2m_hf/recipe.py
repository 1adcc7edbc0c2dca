"""The outcome as files: the chosen mixture as data, and a recipe that TRL runs as it is."""

from collections.abc import Mapping
from pathlib import Path

from trl import ModelConfig, SFTConfig

from .data import FEATURES, Candidate, write_mixture
from .journal import RunFolder, write_atomic
from .mixture import Mixture
from .parsing import dump_yaml, hub_field, trl_fields

COMMENT = """The chosen mixture: {mixture}
Run it with: trl sft --config {path}
Its data are in {data}; manifest.json beside them says where every row comes from."""


def write_recipe(
    run: RunFolder,
    mixture: Mixture,
    candidates: Mapping[str, Candidate],
    data_format: str,
    args: SFTConfig,
    model_args: ModelConfig,
) -> Path:
    """Writes `OUT/mixture/` and `OUT/recipe.yaml`.

    The recipe holds what differs from TRL's defaults and nothing that TRL does not know, so that `trl sft --config` runs it
    where m2m_hf is not installed. It writes to `OUT/trl`, since `OUT/final` belongs to the scores beside it. The rows are in one
    shuffled file, since TRL's own `fraction` would take the first rows of every dataset.

    Args:
        args: the final fine-tune's arguments (`final:` applied).

    Returns:
        The path of the training data.
    """
    train = write_mixture(run.mixture, mixture, candidates, args.seed)
    fields = trl_fields(args, model_args)
    apart = ("output_dir", "save_strategy", "use_peft")
    recipe = {
        "model_name_or_path": fields.pop("model_name_or_path"),
        "datasets": [
            {"path": "json", "data_files": str(train), "split": "train", "columns": list(FEATURES[data_format])}
        ],
        "use_peft": True,
        "output_dir": str(run.root / "trl"),
        "save_strategy": "no",
        **{key: value for key, value in fields.items() if key not in apart and not hub_field(key)},
    }
    comment = COMMENT.format(mixture=mixture, path=run.recipe, data=run.mixture)
    write_atomic(run.recipe, dump_yaml(recipe, comment))
    return train
