"""What a run reads, loaded: candidates, targets and their rows."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from datasets import Dataset, Features, Json, Value
from PIL import Image

from m2m_hf.config.candidates import CandidateConfig
from m2m_hf.config.targets import TargetConfig

MESSAGE = {"role": Value("string"), "content": Value("string")}
FEATURES = {
    "text": Features({"prompt": Value("string"), "completion": Value("string")}),
    "chat": Features({"prompt": [MESSAGE], "completion": [MESSAGE]}),
    "messages": Features({"messages": [MESSAGE]}),
}

Prompt = str | list[dict[str, Any]]
Tools = list[dict[str, Any]] | None


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
    asked: frozenset[int]  # what its rows ask: see `comparable`
    tokens: int
    longest: int
    truncated: int
    dropped: int
    digests: bytes = field(default=b"", repr=False)  # of every row, see `row_digests`

    @classmethod
    def of(
        cls,
        name: str,
        config: CandidateConfig,
        rows: Dataset,
        content: Sequence[Any],
        questions: Iterable[tuple[Prompt, ...]],
        lengths: Sequence[tuple[int, int]],
        limit: int | None,
    ) -> "Candidate":
        """A candidate with its sizes.

        `content` is what identifies its rows, and `questions` what they ask. `lengths` are of every row where its completion
        starts and how many tokens it has; it is truncated after `limit` tokens, if that is not None.
        """
        longest = max(total for _, total in lengths)
        limit = limit or longest
        fingerprint, digests = row_digests(content)
        return cls(
            name=name,
            config=config,
            rows=rows,
            fingerprint=fingerprint,
            asked=frozenset(comparable(*parts) for parts in questions),
            tokens=sum(min(total, limit) for start, total in lengths if start < limit),
            longest=longest,
            truncated=sum(total > limit for _, total in lengths),
            dropped=sum(start >= limit for start, _ in lengths),
            digests=digests,
        )

    @property
    def trained_rows(self) -> int:
        return len(self.rows) - self.dropped


@dataclass(frozen=True)
class TargetRow:
    """One question: a prompt, the possible completions, and the index of the right one (0 where there is only one)."""

    prompt: Prompt
    choices: tuple[Prompt, ...]
    answer: int
    tools: Tools = None  # that the prompt offers
    examples: Prompt = ""  # of questions with their answers, see `few_shot.py`

    @property
    def asked(self) -> Prompt:
        """What the model reads: the prompt behind its examples, but system turns come first."""
        if isinstance(self.prompt, str):
            return f"{self.examples}{self.prompt}"
        turns = sum(1 for _ in takewhile(lambda turn: turn["role"] == "system", self.prompt))
        examples = [] if isinstance(self.examples, str) else self.examples
        return [*self.prompt[:turns], *examples, *self.prompt[turns:]]


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
    unread: Mapping[str, Sequence[str]] = field(default_factory=dict)  # columns that nothing reads


def features_of(data_format: str, rows: Iterable[Mapping[str, Any]]) -> Features:
    """The columns of training rows of one run, alike for all, so that any union is safe.

    Messages of more than role and content, and tools, are JSON: a struct of Arrow would give every message all fields.
    """
    plain = FEATURES[data_format]
    if data_format == "text" or all(
        row.keys() == plain.keys()
        and all(message.keys() == MESSAGE.keys() for part in row.values() for message in part)
        for row in rows
    ):
        return plain
    return Features({name: [Json()] for name in (*plain, "tools")})


def content_fingerprint(rows: Iterable[Any]) -> str:
    """16 hex digits of the SHA-256 over the rows as JSON lines; of images, over their pixels."""
    return row_digests(rows)[0]


def row_digests(rows: Iterable[Any]) -> tuple[str, bytes]:
    """(the fingerprint of all rows, 8 bytes of the SHA-256 of each)."""
    digest, each = hashlib.sha256(), bytearray()
    for row in rows:
        text = json.dumps(row, sort_keys=True, ensure_ascii=False, default=as_json)
        line = text.encode("utf-8", "surrogatepass") + b"\n"
        digest.update(line)
        each += hashlib.sha256(line).digest()[:8]
    return digest.hexdigest()[:16], bytes(each)


def as_json(value: Any) -> Any:
    """A stand-in for a value that JSON lacks: the fields of a question, the digest of an image, else its text."""
    if isinstance(value, TargetRow):
        names = ("prompt", "choices", "answer", *(name for name in ("tools", "examples") if getattr(value, name)))
        return {name: getattr(value, name) for name in names}
    return image_digest(value) if isinstance(value, Image.Image) else str(value)


def image_digest(image: Image.Image) -> str:
    """A fingerprint of an image's pixels, whatever file they came from."""
    image = image if image.mode in ("L", "RGB") else image.convert("RGB")  # a palette's pixels are indices
    header = f"{image.mode} {image.size} ".encode()
    return hashlib.sha256(header + image.tobytes()).hexdigest()[:16]


def text_of(completion: Prompt) -> str:
    """The text of a completion; of messages, the last one's content."""
    return completion if isinstance(completion, str) else completion[-1].get("content", "")


def overlap(candidate: Candidate, rows: Iterable[TargetRow]) -> int:
    """How many target rows ask what a row of the candidate asks."""
    return sum(comparable(row.prompt, row.choices[row.answer]) in candidate.asked for row in rows)


def comparable(*parts: Prompt) -> int:
    """What a row asks, as a number: the hash of its prompt, apart from letter case and spacing, or of an image's digest.

    It is that of the first part that holds text: where the prompt is empty, completions are compared. System turns do not count.
    """
    for part in parts:
        text = part if isinstance(part, str) else "\n".join(m.get("content", "") for m in part if m["role"] != "system")
        if text := " ".join(text.split()).casefold():
            return hash(text)
    return hash("")
