"""Loaded candidates and targets."""

import hashlib
import json
from collections.abc import Iterable, Set
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Features, Value
from PIL import Image

from m2m_hf.config.candidates import CandidateConfig
from m2m_hf.config.targets import TargetConfig
from m2m_hf.errors import InputError

MESSAGE = {"role": Value("string"), "content": Value("string")}


FEATURES = {
    "text": Features({"prompt": Value("string"), "completion": Value("string")}),
    "chat": Features({"prompt": [MESSAGE], "completion": [MESSAGE]}),
    "messages": Features({"messages": [MESSAGE]}),
}


Prompt = str | list[dict[str, str]]


@dataclass(frozen=True)
class Candidate:
    """A loaded candidate: normalised rows and what is known of them.

    `tokens` counts what one epoch trains on after truncation; `truncated` rows were longer than `max_length`, and of
    those `dropped` lost their whole completion and are left out by TRL.
    """

    name: str
    config: CandidateConfig
    rows: Dataset
    fingerprint: str
    tokens: int
    longest: int
    truncated: int
    dropped: int
    digests: frozenset[str] = frozenset()  # of its images

    @property
    def trained_rows(self) -> int:
        return len(self.rows) - self.dropped


@dataclass(frozen=True)
class TargetRow:
    """One question: a prompt, its possible completions, and the index of the right one (a single one without choices)."""

    prompt: Prompt
    choices: tuple[Prompt, ...]
    answer: int


@dataclass(frozen=True)
class Target:
    """A loaded target. `test_rows` are sealed: nothing but the final report looks at them.

    Rows are questions; for a scorer that is a Python function they are as they were loaded, and scorers that bring their own
    data have none.
    """

    name: str
    config: TargetConfig
    rows: tuple[Any, ...]
    test_rows: tuple[Any, ...]

    @property
    def questions(self) -> tuple[TargetRow, ...]:
        """All rows that can be compared with a candidate's."""
        return tuple(row for row in (*self.rows, *self.test_rows) if isinstance(row, TargetRow))


def content_fingerprint(rows: Iterable[Any], default: Any = None) -> str:
    """16 hex digits of the SHA-256 over the rows as JSON lines."""
    digest = hashlib.sha256()
    for row in rows:
        text = json.dumps(row, sort_keys=True, ensure_ascii=False, default=default)
        digest.update(text.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()[:16]


def check_messages(given: Any, where: str) -> list[dict[str, str]]:
    """Messages with their role and content, and nothing else."""
    if not isinstance(given, list) or not given:
        raise InputError(f"{where}: expected a list of messages, got {given!r}")
    for message in given:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in MESSAGE):
            raise InputError(f"{where}: expected messages of {{role, content}}, both text, got {message!r}")
    return [{key: message[key] for key in MESSAGE} for message in given]


def as_turns(given: Any, role: str, where: str) -> list[dict[str, str]]:
    """A string as one turn of `role`; messages as they are."""
    return [{"role": role, "content": given.strip()}] if isinstance(given, str) else check_messages(given, where)


def text_of(given: Prompt) -> str:
    """The text of a completion; of messages, the last one's content."""
    return given if isinstance(given, str) else given[-1]["content"]


def image_digest(image: Image.Image) -> str:
    """Recognises an image by its pixels, whatever file they came from."""
    image = image if image.mode in ("L", "RGB") else image.convert("RGB")  # a palette's pixels are indices
    about = f"{image.mode} {image.size} ".encode()
    return hashlib.sha256(about + image.tobytes()).hexdigest()[:16]


def overlap(candidate: Candidate, rows: Iterable[TargetRow]) -> int:
    """How many target rows ask what a row of the candidate asks: the same prompt, letter case and spacing aside.

    Where the prompt is empty, the completion is compared. Images are compared by their pixels.
    """

    def key(*parts: Prompt) -> str:
        for part in parts:
            text = part if isinstance(part, str) else "\n".join(m["content"] for m in part if m["role"] != "system")
            if text := " ".join(text.split()).casefold():
                return text
        return ""

    if "image" in candidate.rows.column_names:
        asked: Set[str] = candidate.digests
    elif "text" in candidate.rows.column_names:
        asked = {key(text) for text in candidate.rows["text"]}
    elif "messages" in candidate.rows.column_names:
        asked = {key(messages[:-1], messages[-1:]) for messages in candidate.rows["messages"]}
    else:
        asked = {key(row["prompt"], row["completion"]) for row in candidate.rows}
    return sum(key(row.prompt, row.choices[row.answer]) in asked for row in rows)
