"""Scoring free answers by a reward model."""

from collections.abc import Sequence

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from m2m_hf.config.targets import TargetConfig
from m2m_hf.core.score import Failure, Score
from m2m_hf.data.rows import TargetRow, content_fingerprint
from m2m_hf.merging.dense_stack import Stack
from m2m_hf.scoring.forward import Weights, within_memory
from m2m_hf.scoring.packing import batches
from m2m_hf.scoring.rated import RatedScorer
from m2m_hf.scoring.reward_model import RewardModel
from m2m_hf.scoring.scorers import ROUND, Setup


class RewardScorer(RatedScorer):
    """The mean reward of the model's answers; a row's value is the mean over its samples.

    The reward model stays beside the model on its device.
    """

    def __init__(self, config: TargetConfig, rows: Sequence[TargetRow], setup: Setup) -> None:
        super().__init__(config, rows, setup)
        self.reward: RewardModel = setup.reward or RewardModel(str(config.reward_model), setup.where)
        facts = [config.kind, self.reward.fingerprint, config.samples, *self.facts]
        self.fingerprint = content_fingerprint(facts)

    def score(
        self, stack: Stack, mixtures: Sequence[Weights], tokens_per_batch: int, rows: Sequence[int] | None = None
    ) -> list[Score | Failure]:
        chosen = range(self.examples) if rows is None else rows
        asked = [row * self.samples + sample for row in chosen for sample in range(self.samples)]
        found: list[Score | Failure] = []
        for answers in self.answers(stack, mixtures, tokens_per_batch, asked):
            rewards = self.rewards(stack, chosen, answers, tokens_per_batch)
            starts = range(0, len(rewards), self.samples)
            values = [sum(rewards[start : start + self.samples]) / self.samples for start in starts]
            score = Score.of([round(value, ROUND) for value in values])
            if not score.finite:
                found.append(Failure("the reward model gives numbers that are not finite"))
                continue
            if rows is None:
                self.keep(score, [answers[start : start + self.samples] for start in starts])
            found.append(score)
        return found

    @torch.inference_mode()
    def rewards(self, stack: Stack, rows: Sequence[int], answers: Sequence[str], tokens_per_batch: int) -> list[float]:
        """The reward of every answer, `samples` for each of these rows; every process rates its share."""
        state = PartialState()
        asked = [self.rows[row] for row in rows for _ in range(self.samples)]
        read = [self.reward.encode(row.prompt, answer, row.tools) for row, answer in zip(asked, answers, strict=True)]
        rated: list[tuple[int, float]] = []
        sizes = [len(one["input_ids"]) for one in read]
        for number, batch in enumerate(batches(sizes, tokens_per_batch // stack.shrink)):
            if number % state.num_processes == state.process_index:
                jobs = [(0, place) for place in batch]
                for part, values in within_memory(
                    stack,
                    stack.shrink,
                    jobs,
                    lambda part: self.reward.rate([read[place] for _, place in part], stack.model),
                ):
                    rated += [(place, value) for (_, place), value in zip(part, values, strict=True)]
        by_place = dict(gather_object(rated) if state.num_processes > 1 else rated)
        return [by_place[place] for place in range(len(read))]
