"""What a run reads, loaded: candidates, targets and their rows."""

import hashlib
import json
from collections.abc import Iterable, Set
from dataclasses import dataclass, field
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
    """A loaded candidate: rows in the run's format, and their sizes.

    `tokens` counts what one epoch trains on after truncation. `truncated` rows are longer than `max_length`; of these,
    `dropped` rows lose their whole completion, and TRL leaves them out.
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
    """One question: a prompt, the possible completions, and the index of the right one (0 where there is only one)."""

    prompt: Prompt
    choices: tuple[Prompt, ...]
    answer: int


@dataclass(frozen=True)
class ImageRow(TargetRow):
    """A question about an image. Its `prompt` is the image's digest; the image itself is read when it is needed."""

    rows: Dataset = field(repr=False, compare=False, kw_only=True)
    number: int = field(compare=False, kw_only=True)

    @property
    def image(self) -> Image.Image:
        image: Image.Image = self.rows[self.number]["image"]
        return image


@dataclass(frozen=True)
class Target:
    """A loaded target. `test_rows` are sealed: only the final report looks at them.

    Rows are questions. A Python function as scorer gets them as they were loaded; a scorer that brings its own data has none.
    """

    name: str
    config: TargetConfig
    rows: tuple[Any, ...]
    test_rows: tuple[Any, ...]

    @property
    def questions(self) -> tuple[TargetRow, ...]:
        """All rows that can be compared with a candidate's."""
        return tuple(row for row in (*self.rows, *self.test_rows) if isinstance(row, TargetRow))


@dataclass(frozen=True)
class LoadedData:
    """Everything that a run reads: the format of the candidates' rows, the candidates and the targets by name."""

    format: str
    candidates: dict[str, Candidate]
    targets: dict[str, Target]


def content_fingerprint(rows: Iterable[Any]) -> str:
    """16 hex digits of the SHA-256 over the rows as JSON lines; of images, over their pixels."""
    digest = hashlib.sha256()
    for row in rows:
        text = json.dumps(row, sort_keys=True, ensure_ascii=False, default=as_json)
        digest.update(text.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()[:16]


def as_json(value: Any) -> Any:
    """A stand-in for a value that JSON lacks: the fields of a question, the digest of an image, else its text."""
    if isinstance(value, TargetRow):
        return {name: getattr(value, name) for name in ("prompt", "choices", "answer")}
    return image_digest(value) if isinstance(value, Image.Image) else str(value)


def image_digest(image: Image.Image) -> str:
    """A fingerprint of an image's pixels, whatever file they came from."""
    image = image if image.mode in ("L", "RGB") else image.convert("RGB")  # a palette's pixels are indices
    header = f"{image.mode} {image.size} ".encode()
    return hashlib.sha256(header + image.tobytes()).hexdigest()[:16]


def check_messages(messages: Any, where: str) -> list[dict[str, str]]:
    """Messages with their role and content, and no other fields.

    Raises:
        InputError: not a list of messages.
    """
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: expected a list of messages, got {messages!r}")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in MESSAGE):
            raise InputError(f"{where}: expected messages of {{role, content}}, both text, got {message!r}")
    return [{key: message[key] for key in MESSAGE} for message in messages]


def as_turns(text: Any, role: str, where: str) -> list[dict[str, str]]:
    """A string as one turn of `role`; messages stay as they are."""
    return [{"role": role, "content": text.strip()}] if isinstance(text, str) else check_messages(text, where)


def text_of(completion: Prompt) -> str:
    """The text of a completion; of messages, the last one's content."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def overlap(candidate: Candidate, rows: Iterable[TargetRow]) -> int:
    """How many target rows ask what a row of the candidate asks: the same prompt, apart from letter case and spacing.

    Where the prompt is empty, completions are compared. Images are compared by their pixels.
    """
    columns = candidate.rows.column_names
    if "image" in columns:
        prompts: Set[str] = candidate.digests
    elif "text" in columns:
        prompts = {comparable(text) for text in candidate.rows["text"]}
    elif "messages" in columns:
        prompts = {comparable(messages[:-1], messages[-1:]) for messages in candidate.rows["messages"]}
    else:
        prompts = {comparable(row["prompt"], row["completion"]) for row in candidate.rows}
    return sum(comparable(row.prompt, row.choices[row.answer]) in prompts for row in rows)


def comparable(*parts: Prompt) -> str:
    """The first part that holds text, in lower case and with single spaces; system turns do not count."""
    for part in parts:
        text = part if isinstance(part, str) else "\n".join(m["content"] for m in part if m["role"] != "system")
        if text := " ".join(text.split()).casefold():
            return text
    return ""
