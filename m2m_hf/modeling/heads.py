"""The head of a classifier, which makes a score for every label of a model's output. It is frozen, and all experts share it.

Only parameters that mean the same can be averaged. Heads that were trained for one candidate each do not: their rows belong to
different labels, and the weights below them have adapted to that. So the head is fixed before any training. It is either the
classifier that the base model already has, or it is made of the labels' names: the base encoder's own embedding of them, as CLIP
classifies by its text tower (arXiv 2103.00020). A label's row then depends on its name alone, so that datasets with different
labels share one space.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from m2m_hf.errors import InputError
from m2m_hf.storage.files import staging_path

SCALE = 20.0  # of a cosine in the softmax: the temperature of 0.05 with which sentence encoders are trained
LONGEST = 64  # tokens of a label's name
SUFFIX = {"sequence_classification": "ForSequenceClassification", "image_classification": "ForImageClassification"}
# Families with a text tower and an image tower -> (class of the image tower, field of its output that holds the embedding)
TOWERS = {
    "clip": ("CLIPVisionModelWithProjection", "image_embeds"),
    "siglip": ("SiglipVisionModel", "pooler_output"),
}
POOLING_MODES = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


@dataclass(frozen=True)
class HeadPlan:
    """Where the head of a run comes from, read from the base model's configuration before any weights are loaded."""

    task: str
    model_class: str  # of transformers, which loads the base model
    own: Mapping[str, int] | None  # label -> column of the model's own classifier; None where the head is made of names
    pooling: str  # how a row's features are taken from the output: `mean` or `cls` over tokens, or a field of it
    two_towers: bool = False  # whether a text tower beside the trained image tower embeds the names
    prefix: str | None = None  # name of the model's part below its own classifier

    @property
    def untrained(self) -> str | None:
        """A pattern of the modules that no expert may change: the head, and a pooler that nothing reads."""
        if self.own is not None:
            return rf"(?!{self.prefix}\.).*"
        return r"(.*\.)?pooler(\..*)?" if self.pooling in ("mean", "cls") else None


def plan_head(config: transformers.PretrainedConfig, model: str, revision: str | None, task: str) -> HeadPlan:
    """What the head of a base model with this configuration will be; refuses one that can neither classify nor embed names."""
    architecture = next(iter(config.architectures or ()), "")
    if architecture.endswith(SUFFIX[task]):
        loads: Any = getattr(transformers, architecture, None)
        if loads is None:
            raise InputError(f"model_name_or_path: {model!r} is a {architecture}, which transformers does not have")
        return plan_own(config, loads, f"model_name_or_path: {model!r}")
    if task == "sequence_classification":
        if config.is_encoder_decoder or hasattr(config, "vision_config"):
            raise InputError(
                f"model_name_or_path: {model!r} ({config.model_type}) reads more than a text; expected a text encoder, or a "
                f"model with a classifier of its own (...{SUFFIX[task]})"
            )
        return HeadPlan(task, "AutoModel", None, sentence_pooling(model, revision))
    if config.model_type in TOWERS:
        image, pooling = TOWERS[config.model_type]
        return HeadPlan(task, image, None, pooling, two_towers=True)
    raise InputError(
        f"model_name_or_path: {model!r} ({config.model_type}) has no classifier, and no text tower to make one of the labels' "
        "names. Heads trained for one candidate each could not be averaged. Give a model with a trained classifier "
        f"over your labels (...{SUFFIX[task]}), or one of {', '.join(TOWERS)}"
    )


def plan_own(config: transformers.PretrainedConfig, architecture: type[PreTrainedModel], what: str) -> HeadPlan:
    """The head that is a model's own classifier; `what` names the model in the refusal of one that is of no use."""
    task = next(task for task, suffix in SUFFIX.items() if architecture.__name__.endswith(suffix))
    if config.num_labels < 2 or config.problem_type not in (None, "single_label_classification"):
        raise InputError(
            f"{what} gives {config.problem_type or 'a single number'}; expected a classifier with exactly one right label"
        )
    own = {str(label): int(column) for column, label in config.id2label.items()}
    if len(own) < len(config.id2label):
        raise InputError(f"{what}: two of its labels have the same name: {', '.join(config.id2label.values())}")
    return HeadPlan(task, architecture.__name__, own, "logits", prefix=trunk(config, architecture))


def trunk(config: transformers.PretrainedConfig, architecture: type[PreTrainedModel]) -> str:
    """The name of a classifier's part below its head: as its family says, or, where it has none such, its only model."""
    with torch.device("meta"):
        model = cast(Any, architecture)(copy.deepcopy(config))
    models = [name for name, part in model.named_children() if isinstance(part, PreTrainedModel)]
    named = hasattr(model, architecture.base_model_prefix) or len(models) != 1
    return str(architecture.base_model_prefix) if named else models[0]


def sentence_pooling(model: str, revision: str | None) -> str:
    """How a sentence encoder pools its tokens, as sentence-transformers writes it beside the weights; the mean by default."""
    path = cached_file(
        model, "1_Pooling/config.json", revision=revision, _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False, _raise_exceptions_for_gated_repo=False,
    )  # fmt: skip
    if path is None:
        return "mean"
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
        modes = [name for name, on in config.items() if name.startswith("pooling_mode_") and on]
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path}: expected how sentence-transformers pools tokens, as JSON ({error})") from error
    if len(modes) != 1 or modes[0] not in POOLING_MODES:
        raise InputError(f"{path}: expected only {' or '.join(POOLING_MODES)}, got {', '.join(modes) or 'none'}")
    return POOLING_MODES[modes[0]]


@dataclass(frozen=True)
class Head:
    """A frozen head."""

    labels: tuple[str, ...]  # that it knows, in the order of its scores
    plan: HeadPlan
    vectors: torch.Tensor | None = (
        None  # of length 1, (labels, features), fp32; None: the scores are the model's own logits
    )
    scale: float = SCALE  # of the cosines
    closed: bool = True  # whether every row is a choice among all labels, and not only among those of its own dataset

    @property
    def columns(self) -> list[int]:
        """Where the labels' scores stand among the model's own logits."""
        return [] if self.plan.own is None else [self.plan.own[label] for label in self.labels]

    def scores(self, outputs: Any, mask: torch.Tensor | None) -> torch.Tensor:
        """The score of every label, (rows, labels), fp32; `mask` is the attention mask of texts, (rows, tokens).

        The answer is their softmax over a row's possible labels.
        """
        if self.vectors is None:
            return cast(torch.Tensor, outputs.logits.float()[:, self.columns])
        directions = nn.functional.normalize(features(outputs, mask, self.plan.pooling), dim=-1)
        return self.scale * directions @ self.vectors.to(directions.device).T

    def places(self, labels: Sequence[str]) -> list[int]:
        """Where labels stand among the scores."""
        place = {label: number for number, label in enumerate(self.labels)}
        return [place[label] for label in labels]

    def save(self, path: Path, of: str) -> None:
        """Writes what is needed to classify without this package, and the fingerprint `of` what the head was made from."""
        assert self.vectors is not None
        about = {"labels": list(self.labels), "scale": self.scale, "pooling": self.plan.pooling, "of": of}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"vectors": self.vectors}, staging_path(path), metadata={"format": "pt", "head": json.dumps(about)})
        staging_path(path).rename(path)

    @classmethod
    def read(cls, path: Path, plan: HeadPlan, closed: bool, of: str) -> "Head | None":
        """The head in a file; None if there is none, or if it was made from something else."""
        try:
            with safe_open(path, "pt") as file:
                about, vectors = json.loads(file.metadata()["head"]), file.get_tensor("vectors")
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None
        return cls(tuple(about["labels"]), plan, vectors, about["scale"], closed) if about.get("of") == of else None


@torch.no_grad()
def head_of_names(
    plan: HeadPlan,
    words: Mapping[str, str],
    template: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    closed: bool,
) -> Head:
    """The head made of names: of every label, the words that replace `{label}` in `template`.

    Each name is embedded by itself, so that a label's row does not depend on the other labels. `model` is the base model, of two
    towers both.
    """
    model.eval()
    rows = []
    for label in words:
        text = template.replace("{label}", words[label])
        padding: Any = "max_length" if plan.pooling == "pooler_output" else False  # SigLIP was trained so
        inputs = tokenizer(text, padding=padding, return_tensors="pt", **cut(tokenizer)).to(model.device)
        if plan.two_towers:
            row = model.get_text_features(**inputs).pooler_output.float()
        else:
            row = features(model(**inputs), inputs.get("attention_mask"), plan.pooling)
        rows.append(nn.functional.normalize(row[0], dim=0))
    scale = float(model.logit_scale.exp()) if plan.two_towers else SCALE
    return Head(tuple(words), plan, torch.stack(rows).cpu(), scale, closed)


def features(outputs: Any, mask: torch.Tensor | None, pooling: str) -> torch.Tensor:
    """A row's features, of shape (rows, features), fp32."""
    hidden: torch.Tensor = outputs["last_hidden_state" if pooling in ("mean", "cls") else pooling].float()
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "mean":
        weights = torch.ones(hidden.shape[:2], device=hidden.device) if mask is None else mask.to(hidden.dtype)
        return (hidden * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)
    return hidden


def cut(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The tokenizer's arguments that truncate a label's name."""
    return {"truncation": True, "max_length": min(LONGEST, tokenizer.model_max_length)}
