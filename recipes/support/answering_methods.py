"""What it costs to have a mixture answer freely, with answers of given lengths; behind `recipes/benchmark.py --answers`.

All methods see the same prompts, weights and lengths in one process, and take turns:

- **ours**: rows that are finished leave the batch, and others take their places;
- **unshared**: the same, with what many prompts begin with read for each of them;
- **fixed**: transformers' `generate` on batches as large, each of which lasts as long as its longest answer;
- **tokens**: the same with answers of equal length, as many tokens in all: what the tokens alone cost, since no row waits.
"""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from scoring_methods import Workload
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from m2m_hf.config.candidates import DataConfig
from m2m_hf.config.targets import TargetConfig
from m2m_hf.data.rows import TargetRow
from m2m_hf.merging.gated_stack import GatedStack
from m2m_hf.scoring.forward import Job, Weights, job_batches
from m2m_hf.scoring.generation import PLACES, GenerationScorer
from m2m_hf.scoring.packing import padded
from m2m_hf.scoring.scorers import Setup

ANSWERING = ("ours", "unshared", "fixed", "tokens")
Answers = list[list[int]]


class Lengths(StoppingCriteria):  # type: ignore[misc]
    """Ends every row of a batch at a length of its own."""

    def __init__(self, start: int, limits: Sequence[int]) -> None:
        self._start, self._limits = start, torch.tensor(limits)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return (input_ids.shape[1] - self._start >= self._limits).to(input_ids.device)


def spread_lengths(count: int, least: int, most: int) -> list[int]:
    """`count` lengths from least to most, evenly spread and in no order."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(2)).tolist()
    return [least + round((most - least) * place / max(1, count - 1)) for place in order]


def methods(load: Workload, lengths: Sequence[int], stack: GatedStack) -> dict[str, Callable[[Weights], Answers]]:
    """name -> a function that has a mixture answer all rows, each with its own number of tokens."""
    load.tokenizer.eos_token = load.model.generation_config.eos_token_id = None  # lengths are given
    assert load.rows is not None
    rows = [TargetRow(row.prompt, row.choices[:1], 0) for row in load.rows]
    settings: dict[str, Any] = {"max_new_tokens": max(lengths)}
    config = TargetConfig("generation", "exact_match", DataConfig(path="json"), generation=settings)
    scorer = GenerationScorer(config, rows, Setup(load.tokenizer, 1 << 20))
    scorer.limits = list(lengths)
    apart = GenerationScorer(config, [rows[0]], Setup(load.tokenizer, 1 << 20))  # one row shares nothing
    apart.__dict__ |= {**vars(scorer), "beginnings": [], "_numbers": [-1] * len(rows)}
    sizes = [len(ids) + max(lengths) for ids in scorer.prompts]

    def refilled(by: GenerationScorer, weights: Weights) -> Answers:
        (found,) = by.decoded(stack, [weights], load.tokens_per_batch, range(len(rows)))
        return [one.ids for one in found]

    @torch.inference_mode()
    def fixed(limits: Sequence[int], weights: Weights) -> Answers:
        stack.set(weights)
        jobs: list[Job] = [(0, row) for row in range(len(rows))]
        found: dict[int, list[int]] = {}
        for batch in job_batches(sizes, jobs, max(PLACES, load.tokens_per_batch)):
            asked = [scorer.prompts[row] for _, row in batch]
            width = max(map(len, asked))
            own = [limits[row] for _, row in batch]
            output = load.model.generate(
                padded(asked, width, left=True).to(load.model.device),
                attention_mask=padded([[1] * len(ids) for ids in asked], width, left=True).to(load.model.device),
                generation_config=GenerationConfig(max_new_tokens=max(own), do_sample=False, pad_token_id=0),
                stopping_criteria=StoppingCriteriaList([Lengths(width, own)]),
            )
            for (_, row), ids, length in zip(batch, output.tolist(), own, strict=True):
                found[row] = ids[width : width + length]
        return [found[row] for row in range(len(rows))]

    mean = math.ceil(sum(lengths) / len(lengths))
    return {
        "ours": partial(refilled, scorer),
        "unshared": partial(refilled, apart),
        "fixed": partial(fixed, lengths),
        "tokens": partial(fixed, [mean] * len(rows)),
    }


def compare_answering(
    load: Workload,
    mixtures: Sequence[Weights],
    lengths: Sequence[int],
    chosen: Sequence[str],
    tell: Callable[[str], None] = lambda line: None,
) -> tuple[list[str], list[list[str]], dict[str, list[float]]]:
    """(columns, rows, seconds by method) of every chosen method on every mixture, in turns."""
    stack = GatedStack(load.model, load.adapters)
    made = {name: run for name, run in methods(load, lengths, stack).items() if name in chosen}
    seconds: dict[str, list[float]] = {name: [] for name in made}
    answers: dict[str, list[Answers]] = {name: [] for name in made}
    for turn, weights in enumerate(mixtures, start=1):
        for name, run in made.items():
            tell(f"{name}, mixture {turn} of {len(mixtures)}")
            start = time.perf_counter()
            answers[name].append(run(weights))
            seconds[name].append(time.perf_counter() - start)
    stack.detach()
    lines = []
    for name, taken in seconds.items():
        total = sum(taken)
        tokens = sum(len(ids) for found in answers[name] for ids in found)
        base = sum(seconds.get("tokens", [math.nan]))
        alike = ""
        if name not in ("ours", "tokens") and "ours" in answers:
            pairs = [
                pair
                for mine, other in zip(answers["ours"], answers[name], strict=True)
                for pair in zip(mine, other, strict=True)
            ]
            alike = f"{sum(one != other for one, other in pairs)} of {len(pairs)}"
        lines.append([name, f"{total / len(taken):.1f} s", f"{tokens / total:.1f}", f"{total / base:.2f}", alike])
    return ["", "per mixture", "tokens/s", "to tokens", "answers that differ from ours"], lines, seconds
