"""Other ways of choosing a mixture, to hold the method against."""

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import torch
from transformers import PreTrainedModel

from m2m_hf.data.classification import ImageRow
from m2m_hf.data.rows import Candidate, TargetRow
from m2m_hf.data.tokens import encode, render
from m2m_hf.scoring.packing import batches, padded

ROWS = 200  # of each dataset that are looked at
IMAGES = 32  # in one forward pass


def candidate_content(candidate: Candidate, processing: Any, seed: int) -> list[Any]:
    """Some rows of a candidate: token ids, of prompt and completion together, or images.

    Args:
        processing: the tokenizer, or the image processor.
    """
    rows = candidate.rows.shuffle(seed=seed).select(range(min(ROWS, len(candidate.rows))))
    where = f"candidates.{candidate.name}"
    if "image" in rows.column_names:
        return list(rows["image"])
    if "text" in rows.column_names:
        return [processing(text)["input_ids"] for text in rows["text"]]
    if "messages" in rows.column_names:
        return [render(processing, row["messages"], where) for row in rows]
    return [encode(processing, row["prompt"], row["completion"], where)[0] for row in rows]


def target_content(rows: Sequence[Any], processing: Any, seed: int, labelled: bool) -> list[Any]:
    """Some validation rows: token ids, of a causal LM's with the right answers, or images; none where rows are no questions.

    Args:
        labelled: whether the target is one of classification.
    """
    asked = [row for row in rows if isinstance(row, TargetRow)]
    chosen = Random(seed).sample(asked, min(ROWS, len(asked)))
    if not labelled:
        return [encode(processing, row.prompt, row.choices[row.answer], "target")[0] for row in chosen]
    return [row.image if isinstance(row, ImageRow) else processing(row.prompt)["input_ids"] for row in chosen]


@torch.inference_mode()
def centroid(
    model: PreTrainedModel, content: Sequence[Any], tokens_per_batch: int, longest: int, processing: Any = None
) -> Any:
    """The mean over rows of the mean over tokens of the last hidden state; of shape (hidden,), float64.

    Args:
        content: token ids, or images.
        longest: tokens of a text that are looked at.
        processing: makes the model's input of images.
    """
    model.eval()
    total: Any = 0.0
    if not isinstance(content[0], list):
        for start in range(0, len(content), IMAGES):
            pixels = processing(images=list(content[start : start + IMAGES]), return_tensors="pt")["pixel_values"]
            hidden = model.base_model(pixel_values=pixels.to(model.device, model.dtype))[0]
            if hidden.ndim == 4:  # patches as a picture: (rows, features, height, width)
                hidden = hidden.flatten(2).transpose(1, 2)
            mean = hidden.float().mean(1) if hidden.ndim == 3 else hidden.float()
            total += mean.double().sum(0).cpu()
        return total / len(content)
    kept = [list(text)[:longest] for text in content]
    for batch in batches([len(text) for text in kept], tokens_per_batch):
        rows = [kept[index] for index in batch]
        width = max(map(len, rows))
        mask = padded([[1] * len(row) for row in rows], width).to(model.device)
        hidden = model.base_model(input_ids=padded(rows, width).to(model.device), attention_mask=mask)[0]
        mean = (hidden.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        total += mean.double().sum(0).cpu()
    return total / len(kept)


def similarity(
    model: PreTrainedModel,
    candidates: Mapping[str, Sequence[Any]],
    target: Sequence[Any],
    tokens_per_batch: int,
    longest: int = 512,
    processing: Any = None,
) -> dict[str, float]:
    """Cosine of each candidate's centroid in the base model's hidden states with the target's, the most similar first.

    Args:
        model: the base model.
        candidates: name -> token ids of its rows, or images.
        target: the same of the validation rows.
        tokens_per_batch: budget of one forward pass.
        longest: tokens of a row that are looked at.
        processing: of images.
    """
    centre = centroid(model, target, tokens_per_batch, longest, processing)
    found = {}
    for name, content in candidates.items():
        theirs = centroid(model, content, tokens_per_batch, longest, processing)
        found[name] = float(torch.cosine_similarity(theirs, centre, dim=0))
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))
