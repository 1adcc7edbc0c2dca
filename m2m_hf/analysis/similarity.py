"""Similarity to the targets: a baseline that chooses candidates without scoring mixtures."""

from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import Any

import torch
from transformers import PreTrainedModel

from m2m_hf.data.rows import Candidate, ImageRow, TargetRow
from m2m_hf.data.tokens import encode, render
from m2m_hf.scoring.packing import batches, padded

ROWS = 200  # of each dataset that are looked at
IMAGES = 32  # in one forward pass


def candidate_content(candidate: Candidate, processing: Any, seed: int) -> list[Any]:
    """Some rows of a candidate: images, or token ids of prompt and completion together."""
    rows = candidate.rows.shuffle(seed=seed).select(range(min(ROWS, len(candidate.rows))))
    where = f"candidates.{candidate.name}"
    if "image" in rows.column_names:
        return list(rows["image"])
    if "text" in rows.column_names:
        return [processing(text)["input_ids"] for text in rows["text"]]
    if "messages" in rows.column_names:
        return [render(processing, row["messages"], where, tools=row.get("tools")) for row in rows]
    return [encode(processing, row["prompt"], row["completion"], where, row.get("tools"))[0] for row in rows]


def target_content(rows: Sequence[Any], processing: Any, seed: int, classifies: bool) -> list[Any]:
    """Some validation rows: images, or token ids, of a causal LM's with the right answers. None where rows are no questions."""
    questions = [row for row in rows if isinstance(row, TargetRow)]
    chosen = Random(seed).sample(questions, min(ROWS, len(questions)))
    if not classifies:
        return [
            encode(processing, row.prompt, row.choices[row.answer], "target", row.tools)[0]
            if row.choices[row.answer]
            else render(processing, row.prompt, "target", True, row.tools)  # a row that needs no answer
            for row in chosen
        ]
    return [row.image if isinstance(row, ImageRow) else processing(row.prompt)["input_ids"] for row in chosen]


@torch.inference_mode()
def similarity(
    model: PreTrainedModel,
    candidates: Mapping[str, Sequence[Any]],
    targets: Mapping[str, Sequence[Any]],
    weights: Mapping[str, float],
    processing: Any,
    tokens_per_batch: int,
    longest: int,
) -> dict[str, float]:
    """Cosine between each candidate's centroid and the targets', the weighted mean, the most similar first.

    A centroid is the mean over rows of the mean over tokens of the base model's last hidden state; of a row the first `longest`
    tokens are looked at. `weights` are the targets'.
    """
    model.eval()

    def centroid(content: Sequence[Any]) -> torch.Tensor:
        if isinstance(content[0], list):
            means = text_means(model, [text[:longest] for text in content], tokens_per_batch)
        else:
            means = image_means(model, content, processing)
        total: Any = sum(mean.double().sum(0).cpu() for mean in means)
        return torch.as_tensor(total / len(content))

    centres = {target: centroid(content) for target, content in targets.items()}
    cosines = dict.fromkeys(candidates, 0.0)
    for name, content in candidates.items():
        own = centroid(content)
        for target, centre in centres.items():
            share = weights[target] / sum(weights.values())
            cosines[name] += share * float(torch.cosine_similarity(own, centre, dim=0))
    return dict(sorted(cosines.items(), key=lambda item: (-item[1], item[0])))


def text_means(model: PreTrainedModel, texts: Sequence[list[int]], tokens_per_batch: int) -> Iterator[torch.Tensor]:
    """By batch: the mean over a text's tokens, of shape (rows, hidden)."""
    for batch in batches([len(text) for text in texts], tokens_per_batch):
        rows = [texts[index] for index in batch]
        width = max(map(len, rows))
        mask = padded([[1] * len(row) for row in rows], width).to(model.device)
        hidden = model.base_model(input_ids=padded(rows, width).to(model.device), attention_mask=mask)[0]
        yield (hidden.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def image_means(model: PreTrainedModel, images: Sequence[Any], processing: Any) -> Iterator[torch.Tensor]:
    """By batch: the mean over an image's patches, of shape (rows, hidden)."""
    for start in range(0, len(images), IMAGES):
        pixels = processing(images=list(images[start : start + IMAGES]), return_tensors="pt")["pixel_values"]
        hidden = model.base_model(pixel_values=pixels.to(model.device, model.dtype))[0]
        if hidden.ndim == 4:  # patches as a picture: (rows, features, height, width)
            hidden = hidden.flatten(2).transpose(1, 2)
        yield hidden.float().mean(1) if hidden.ndim == 3 else hidden.float()
