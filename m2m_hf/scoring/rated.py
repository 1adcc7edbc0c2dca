"""Scorers that rate free answers, and what they keep of them for the report."""

import json
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState

from m2m_hf.config.targets import TargetConfig
from m2m_hf.core.score import AnswerPair, Score
from m2m_hf.data.rows import Prompt, TargetRow
from m2m_hf.scoring.generation import AnsweringScorer
from m2m_hf.scoring.scorers import Setup
from m2m_hf.storage.files import fingerprint, read_json_or_empty, write_json

SHOWN = 3  # rows that gained most, and that lost most


class RatedScorer(AnsweringScorer):
    """Base of the scorers that rate each answer by itself or beside another one; `samples` answers to a prompt.

    Answers of all rows are kept under the score that they got, so that a report can show them.
    """

    by_row = True

    def __init__(self, config: TargetConfig, rows: Sequence[TargetRow], setup: Setup) -> None:
        super().__init__(config, [row for row in rows for _ in range(config.samples)], setup)
        self.rows, self.samples, self.examples, self._folder = rows, config.samples, len(rows), setup.answers

    def answer_pairs(self, base: Score, final: Score) -> list[AnswerPair]:
        ours, theirs = self.kept(final), self.base_answers(base)
        if not ours or not theirs:
            return []
        order = sorted(range(self.examples), key=lambda row: (base.values[row] - final.values[row], row))
        gained = [row for row in order[:SHOWN] if final.values[row] > base.values[row]]
        lost = [row for row in order[: -SHOWN - 1 : -1] if final.values[row] < base.values[row]]
        return [
            AnswerPair(
                row=row + 1,
                prompt=spelled(self.rows[row].prompt),
                base=theirs[row][0],
                final=ours[row][0],
                base_value=base.values[row],
                final_value=final.values[row],
            )
            for row in gained + lost
        ]

    def base_answers(self, score: Score) -> list[list[str]]:
        """The base model's answers of all rows; none where they are not known any more."""
        return self.kept(score)

    def kept(self, score: Score) -> list[list[str]]:
        """The answers of all rows that got this score; none where they are not known, or others got the same."""
        return self.read([self.fingerprint, list(score.values)])

    def keep(self, score: Score, answers: Sequence[Sequence[str]]) -> None:
        """Keeps the answers of all rows under the score that they got."""
        key = [self.fingerprint, list(score.values)]
        if self._folder is not None and PartialState().is_main_process:
            known = read_json_or_empty(self._path(key)).get("answers", answers)
            self.write(key, answers if known == answers else [])

    def read(self, key: object) -> list[list[str]]:
        """The answers of all rows that are kept under a key; none where they are not."""
        known = [] if self._folder is None else read_json_or_empty(self._path(key)).get("answers", [])
        return known if len(known) == self.examples else []

    def write(self, key: object, answers: Sequence[Sequence[str]]) -> None:
        write_json(self._path(key), {"answers": answers})

    def _path(self, key: object) -> Path:
        assert self._folder is not None
        return self._folder / f"{fingerprint(key)}.json"


def spelled(prompt: Prompt) -> str:
    """A prompt for people: a text, or turns with their roles."""
    if isinstance(prompt, str):
        return prompt
    said = ((turn["role"], turn.get("content") or turn.get("tool_calls") or "") for turn in prompt)
    return "\n".join(f"{role}: {text if isinstance(text, str) else json.dumps(text)}" for role, text in said)
