"""What fine-tuning on one candidate changed of the base model."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from transformers import PreTrainedModel

Part = slice | None  # rows of a tensor; None: all of it
BLOCK = 1 << 20  # numbers of a tensor that are worked on at once


def blocks(shape: Sequence[int]) -> Iterator[Part]:
    """Splits a tensor of this shape into parts of whole rows, so that a large one is never in memory twice."""
    numbers = math.prod(shape)
    if numbers <= BLOCK or not shape:
        yield None
        return
    rows = max(1, BLOCK * shape[0] // numbers)
    yield from (slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows))


def rows_of(tensor: torch.Tensor, part: Part) -> torch.Tensor:
    return tensor if part is None else tensor[part]


@dataclass(frozen=True, eq=False)
class Change(ABC):
    """What an expert adds to one weight of a model."""

    weight: torch.Tensor

    @abstractmethod
    def delta(self, part: Part = None) -> torch.Tensor:
        """What is added to the weight, or to rows of it, in fp32 and on the weight's device."""


class Expert(ABC):
    """What fine-tuning on one candidate changed of the base model."""

    @classmethod
    @abstractmethod
    def load(cls, folder: Path) -> Self:
        """Reads an expert from its folder; refuses one that cannot be read or averaged."""

    @abstractmethod
    def changes(self, model: PreTrainedModel) -> dict[str, Change]:
        """Weight name -> what the expert adds to it; refuses another model, or weights that cannot be written."""
