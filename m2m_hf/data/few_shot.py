"""Few-shot examples: rows with their right answers, ahead of every question of a target."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Any

from m2m_hf.config.targets import TargetConfig
from m2m_hf.data.rows import Prompt, TargetRow, comparable
from m2m_hf.errors import InputError

Rows = Mapping[str, Sequence[TargetRow]]  # by part of a target: data, test_data, fewshot_data


def with_examples(
    config: TargetConfig, rows: Rows, kinds: Mapping[str, Sequence[Any]], seed: int, where: str
) -> dict[str, Sequence[Any]]:
    """The rows of `data` and `test_data`, all with the same `num_fewshot` examples, or all of one kind with the same.

    They are drawn with the seed, from `fewshot_data` or out of `data`, and none asks what a row that is scored asks.

    Args:
        kinds: by part and row, its value of `fewshot_by`.

    Raises:
        InputError: fewer examples than are wanted, or such that offer other tools.
    """
    source = "data" if config.fewshot_data is None else "fewshot_data"
    asked = {part: [question(row) for row in rows[part]] for part in rows}
    scored = {one for part in asked.keys() - {source} for one in asked[part]}
    known: dict[Any, dict[int, TargetRow]] = defaultdict(dict)
    for row, one, kind in zip(rows[source], asked[source], kinds[source], strict=True):
        if one not in scored:
            known[kind].setdefault(one, row)
    drawn: dict[Any, list[TargetRow]] = {}
    for kind in dict.fromkeys(kind for part in rows if part != "fewshot_data" for kind in kinds[part]):
        count, have = config.num_fewshot or 0, [*known[kind].values()]
        if len(have) < count:
            among = f" with {kind!r} in {config.fewshot_by!r}" if config.fewshot_by else ""
            raise InputError(
                f"{where}.num_fewshot: expected {count} rows of {source}{among} that no row which is scored asks, got {len(have)}"
            )
        drawn[kind] = Random(f"{seed} {kind}").sample(have, count)
    taken = {question(row) for examples in drawn.values() for row in examples}
    found: dict[str, Sequence[Any]] = {}
    ahead = {kind: before(examples) for kind, examples in drawn.items()}
    for part in rows.keys() - {"fewshot_data"}:
        kept: list[TargetRow] = []
        for number, (row, one, kind) in enumerate(zip(rows[part], asked[part], kinds[part], strict=True), start=1):
            if one in taken:
                continue
            if any(example.tools != row.tools for example in drawn[kind]):
                raise InputError(f"{where}.num_fewshot: examples offer other tools than {part}, row {number}")
            kept.append(replace(row, examples=ahead[kind]))
        found[part] = kept
    if not found["data"]:
        raise InputError(f"{where}.num_fewshot: no row of data is left to be scored; give fewshot_data")
    return found


def question(row: TargetRow) -> int:
    return comparable(row.prompt, row.choices[row.answer])


def before(examples: Sequence[TargetRow]) -> Prompt:
    """Examples as they stand ahead of a question: texts with an empty line behind each, or turns without system turns."""
    if examples and not isinstance(examples[0].prompt, str):
        turns = [turn for row in examples for turn in (*row.prompt, *row.choices[row.answer])]
        return [turn for turn in turns if turn["role"] != "system"]
    return "".join(f"{row.prompt}{row.choices[row.answer]}\n\n" for row in examples)
