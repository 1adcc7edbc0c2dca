"""Data for causal LMs: all rows in the one format of a run, which is text, chat or messages."""

from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from m2m_hf.config.candidates import CandidateConfig
from m2m_hf.config.targets import SCORERS, TargetConfig
from m2m_hf.data.loading import fill, load_rows
from m2m_hf.data.rows import (
    FEATURES,
    Candidate,
    LoadedData,
    Prompt,
    Target,
    TargetRow,
    as_turns,
    check_messages,
    content_fingerprint,
)
from m2m_hf.data.tokens import token_lengths
from m2m_hf.errors import InputError


def load_causal_lm_data(
    candidates: Mapping[str, CandidateConfig],
    targets: Mapping[str, TargetConfig],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    max_length: int | None,
    assistant_only_loss: bool,
) -> LoadedData:
    """Loads everything that a run reads, and brings it into one format.

    Args:
        seed: draws `max_examples`.
        max_length: tokens after which TRL truncates a training row; None with packing, which truncates none.
        assistant_only_loss: TRL's setting; selects the `messages` format.

    Raises:
        InputError: anything wrong with a candidate or a target, with its place.
    """
    raw = {name: load_rows(config.data, f"candidates.{name}", seed) for name, config in candidates.items()}
    conversational = {name: is_conversational(rows, f"candidates.{name}", "completion") for name, rows in raw.items()}
    raw_targets: dict[str, dict[str, Dataset]] = {name: {} for name in targets}
    for name, config in targets.items():
        for part, data in (("data", config.data), ("test_data", config.test_data)):
            if data is not None:
                where = f"targets.{name}.{part}"
                rows = raw_targets[name][part] = load_rows(data, where, seed)
                if config.kind != "callable":
                    conversational[where] = is_conversational(rows, where, SCORERS[config.kind].column)
    data_format = "chat" if any(conversational.values()) else "text"
    if data_format == "chat" and tokenizer.chat_template is None:
        first = next(name for name, value in conversational.items() if value)
        raise InputError(
            f"{first} holds messages, but the tokenizer of this model has no chat template; choose an instruction-tuned "
            "model, give chat_template_path, or use prompt/completion strings"
        )
    if assistant_only_loss and not all("messages" in rows.column_names for rows in raw.values()):
        raise InputError("assistant_only_loss: true trains on conversations; every candidate needs a messages column")
    train_format = "messages" if assistant_only_loss else data_format
    return LoadedData(
        train_format,
        {name: make_candidate(name, candidates[name], raw[name], train_format, tokenizer, max_length) for name in raw},
        {name: make_target(name, targets[name], parts, data_format) for name, parts in raw_targets.items()},
    )


def is_conversational(rows: Dataset, where: str, completion: str) -> bool:
    """True if rows hold messages rather than strings.

    Raises:
        InputError: neither `messages` nor `prompt` and the column `completion` names.
    """
    if "messages" in rows.column_names:
        return True
    missing = [name for name in ("prompt", completion) if name not in rows.column_names]
    if missing and "label" in rows.column_names and (content := {"text", "image"} & set(rows.column_names)):
        task = "image_classification" if "image" in content else "sequence_classification"
        raise InputError(f"{where}: rows of {content.pop()} and label belong to task: {task}")
    if missing:
        raise InputError(
            f"{where}: column{'s' * (len(missing) - 1)} {' and '.join(map(repr, missing))} missing; "
            f"it has {', '.join(rows.column_names)}. Expected prompt and {completion}, or messages. "
            f"To rename, add to it, for instance, columns: {{{rows.column_names[0]}: {missing[0]}}}"
        )
    return not isinstance(rows[0]["prompt"], str)


def make_candidate(
    name: str,
    config: CandidateConfig,
    rows: Dataset,
    data_format: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
) -> Candidate:
    """A candidate with its sizes.

    Raises:
        InputError: a row that is not valid, or no row that fits into `max_length`.
    """
    where = f"candidates.{name}"
    rows = normalise(rows, data_format, where)
    lengths = list(token_lengths(rows, tokenizer, where))
    longest = max(total for _, total in lengths)
    limit = max_length or longest
    dropped = sum(start >= limit for start, _ in lengths)
    if dropped == len(rows):
        raise InputError(
            f"{where}: no completion fits into max_length {max_length}; the prompts alone are longer. "
            f"Its longest row has {longest} tokens: raise max_length"
        )
    return Candidate(
        name=name,
        config=config,
        rows=rows,
        fingerprint=content_fingerprint(rows),
        tokens=sum(min(total, limit) for start, total in lengths if start < limit),
        longest=longest,
        truncated=sum(total > limit for _, total in lengths),
        dropped=dropped,
    )


def normalise(rows: Dataset, data_format: str, where: str) -> Dataset:
    """Candidate rows in the run's format, with exactly its columns and types, so that any union is safe."""
    converted: list[dict[str, Any]] = []
    for number, row in enumerate(rows, start=1):
        prompt, completion = split_row(row, data_format, f"{where}, row {number}")
        whole = {"messages": [*prompt, *completion]}
        converted.append(whole if data_format == "messages" else {"prompt": prompt, "completion": completion})
    return Dataset.from_list(converted, features=FEATURES[data_format])


def split_row(row: Mapping[str, Any], data_format: str, where: str) -> tuple[Prompt, Prompt]:
    """(prompt, completion) of a candidate's or target's row in the run's format."""
    if row.get("messages") is not None:
        messages = check_messages(row["messages"], f"{where}.messages")
        if messages[-1]["role"] != "assistant":
            raise InputError(f"{where}.messages: expected the last turn to be the assistant's, got {messages[-1]!r}")
        if len(messages) == 1:
            raise InputError(f"{where}.messages: expected a turn before the assistant's, got {messages!r}")
        return messages[:-1], messages[-1:]
    prompt, completion = row.get("prompt"), row.get("completion")
    if data_format == "text":
        if not isinstance(prompt, str):
            raise InputError(f"{where}.prompt: expected text, got {prompt!r}")
        if not isinstance(completion, str) or not completion:
            raise InputError(f"{where}.completion: expected text, got {completion!r}")
        return prompt, completion
    return as_turns(prompt, "user", f"{where}.prompt"), as_turns(completion, "assistant", f"{where}.completion")


def make_target(name: str, config: TargetConfig, parts: Mapping[str, Dataset], data_format: str) -> Target:
    """A target with its rows as its scorer takes them."""
    rows: dict[str, tuple[Any, ...]] = {"data": (), "test_data": ()}
    for part, dataset in parts.items():
        where = f"targets.{name}.{part}"
        numbered = [(f"{where}, row {number}", row) for number, row in enumerate(dataset, start=1)]
        if config.kind == "callable":
            rows[part] = tuple(dataset)
            continue
        if config.kind == "classification":
            # Without a list of labels they are those of the validation set, also for the test.
            words = config.labels or {str(label): str(label) for label in sorted(set(map(str, parts["data"]["label"])))}
            template = getattr(config, part).template.get("completion", "{label}")
            numbered = [(place, label_row(row, words, template, place)) for place, row in numbered]
        rows[part] = tuple(target_row(row, data_format, config.kind, place) for place, row in numbered)
    return Target(name, config, rows["data"], rows["test_data"])


def label_row(row: Mapping[str, Any], words: Mapping[str, str], template: str, where: str) -> dict[str, Any]:
    """A row with a label as a row with choices: the words of every label, put into the template of a completion.

    Raises:
        InputError: an unknown label.
    """
    label = str(row.get("label"))
    if label not in words:
        raise InputError(f"{where}.label: expected one of {', '.join(words)}, got {row.get('label')!r}")
    choices = [fill(template, {**row, "label": word}, f"{where}.template") for word in words.values()]
    return {"prompt": row.get("prompt"), "choices": choices, "answer": list(words).index(label)}


def target_row(row: Mapping[str, Any], data_format: str, scorer: str, where: str) -> TargetRow:
    """One question of a target, checked."""
    if SCORERS[scorer].column == "completion":
        question, reference = split_row(row, data_format, where)
        return TargetRow(question, (reference,), 0)
    prompt, choices, answer = row.get("prompt"), row.get("choices"), row.get("answer")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(text, str) and text for text in choices):
        raise InputError(f"{where}.choices: expected at least two texts, none empty, got {choices!r}")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise InputError(
            f"{where}.answer: expected the index of the right choice, 0 to {len(choices) - 1}, or its text, got {answer!r}"
        )
    if choices.count(choices[answer]) > 1:
        raise InputError(f"{where}.choices: the right answer occurs twice: {choices!r}")
    if data_format == "chat":
        turns = tuple(as_turns(choice, "assistant", where) for choice in choices)
        return TargetRow(as_turns(prompt, "user", f"{where}.prompt"), turns, answer)
    if not isinstance(prompt, str):
        raise InputError(f"{where}.prompt: expected text, got {prompt!r}")
    return TargetRow(prompt, tuple(choices), answer)
