"""Other ways of choosing a mixture, to hold the method against."""

from collections.abc import Iterable, Mapping, Sequence
from random import Random
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .data import Candidate, TargetRow, encode, render
from .forward import batches, padded

ROWS = 200  # of each dataset that are looked at


def candidate_texts(candidate: Candidate, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[list[int]]:
    """Token ids of some rows of a candidate, prompt and completion together."""
    rows = candidate.rows.shuffle(seed=seed).select(range(min(ROWS, len(candidate.rows))))
    where = f"candidates.{candidate.name}"
    if "messages" in rows.column_names:
        return [render(tokenizer, row["messages"], where) for row in rows]
    return [encode(tokenizer, row["prompt"], row["completion"], where)[0] for row in rows]


def target_texts(rows: Sequence[Any], tokenizer: PreTrainedTokenizerBase, seed: int) -> list[list[int]]:
    """Token ids of some validation rows with their right answers; none of a target whose rows are not questions."""
    asked = [row for row in rows if isinstance(row, TargetRow)]
    chosen = Random(seed).sample(asked, min(ROWS, len(asked)))
    return [encode(tokenizer, row.prompt, row.choices[row.answer], "target")[0] for row in chosen]


@torch.inference_mode()
def centroid(model: PreTrainedModel, texts: Iterable[Sequence[int]], tokens_per_batch: int, longest: int) -> Any:
    """The mean over texts of the mean over tokens of the last hidden state; of shape (hidden,), float64.

    Args:
        longest: tokens of a text that are looked at.
    """
    model.eval()
    kept = [list(text)[:longest] for text in texts]
    total = torch.zeros(model.config.get_text_config().hidden_size, dtype=torch.float64)
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
    candidates: Mapping[str, Sequence[Sequence[int]]],
    target: Sequence[Sequence[int]],
    tokens_per_batch: int,
    longest: int = 512,
) -> dict[str, float]:
    """Cosine of each candidate's centroid in the base model's hidden states with the target's, the most similar first.

    Args:
        model: the base model.
        candidates: name -> token ids of its rows.
        target: token ids of the validation rows.
        tokens_per_batch: budget of one forward pass.
        longest: tokens of a row that are looked at.
    """
    centre = centroid(model, target, tokens_per_batch, longest)
    found = {
        name: float(torch.cosine_similarity(centroid(model, texts, tokens_per_batch, longest), centre, dim=0))
        for name, texts in candidates.items()
    }
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))
