"""Batches of several adapters in one pass."""

import random

import numpy as np
import torch
from pico import DEVICE

from m2m_hf.training.shared_pass import Randomness, together
from m2m_hf.training.side_by_side import cheapest


def test_what_batches_are_padded_with():
    """Tokens to a width that tells them from all else, and rows that a model can compute."""
    small, large = (
        {
            "input_ids": torch.arange(rows * tokens).view(rows, tokens) + 1,
            "attention_mask": torch.ones(rows, tokens, dtype=torch.long),
            "labels": torch.arange(rows * tokens).view(rows, tokens) + 1,
        }
        for rows, tokens in ((1, 3), (2, 4))
    )
    batch, layout = together([small, large], {4, 5})
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0, 0, 0]] * 2 + [[1, 2, 3, 4, 0, 0], [5, 6, 7, 8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0]] * 2 + [[1, 1, 1, 1, 0, 0]] * 2
    assert batch["labels"][:2].tolist() == [[1, 2, 3, -100, -100, -100], [-100] * 6]
    assert layout.part(batch["input_ids"], 0).tolist() == [[1, 2, 3]]
    heads = torch.zeros(4, 6, 2).transpose(1, 2)  # rows, heads, tokens, as attention views them
    assert layout.part(heads, 1).transpose(1, 2).is_contiguous()
    assert together([large, large], {4})[1].wide == 4
    images = [{"pixel_values": torch.full((rows, 1, 2, 2), float(rows))} for rows in (1, 2)]
    assert together(images, set())[0]["pixel_values"].flatten(1).tolist() == [[1.0] * 4] * 2 + [[2.0] * 4] * 2


def test_batches_share_a_pass_where_that_costs_least():
    assert cheapest([(4, 10), (4, 11), (4, 100)], beside=50, budget=1e9) == [[0, 1], [2]]
    assert cheapest([(4, 10), (4, 11), (4, 100)], beside=1e6, budget=1e9) == [[0, 1, 2]]
    assert cheapest([(4, 10), (4, 11), (4, 12)], beside=1e6, budget=90) == [[0, 1], [2]]
    assert cheapest([(4, 10), (4, 12), (4, 11)], beside=1e6, budget=1e9, limit=11) == [[0, 2], [1]]
    assert cheapest([(4, 10)], beside=0, budget=1) == [[0]]


def test_all_random_numbers_are_taken_and_given():
    def drawn() -> list[float]:
        return [random.random(), np.random.random(), torch.rand(()).item(), torch.rand((), device=DEVICE).item()]

    state = Randomness(torch.device(DEVICE))
    for _ in range(2):
        first = drawn()
        state.give()
        assert drawn() == first
        state.take()
