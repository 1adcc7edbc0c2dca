"""Data for classification: rows of a text, or an image, and its label.

Labels are names. A candidate or target may use other names and map them: `labels: {theirs: ours}`. Without a label space for the
whole run, a row is a choice among the labels of its own dataset, which its `source` column names. Such datasets need not know of
each other, and one that joins later changes nothing for the rest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
from datasets import ClassLabel, Dataset, Value

from m2m_hf.config.candidates import CandidateConfig, DataConfig
from m2m_hf.config.targets import TargetConfig
from m2m_hf.data.loading import load_rows, names_in, require_columns
from m2m_hf.data.rows import Candidate, ImageRow, LoadedData, Target, TargetRow, image_digest
from m2m_hf.errors import InputError


@dataclass(frozen=True)
class Length:
    """Counts the tokens of rows, which the model truncates to `limit`; of an image these are its patches."""

    limit: int
    tokenizer: Any = None  # of texts

    def __call__(self, texts: Sequence[Any]) -> list[int]:
        if self.tokenizer is None:
            return [self.limit] * len(texts)
        return [len(self.tokenizer(text)["input_ids"]) for text in texts]


@dataclass(frozen=True)
class ClassificationReader:
    """Loads everything that a classification run reads."""

    task: str
    space: Sequence[str] | None  # the run's labels; None where every dataset has its own
    length: Length
    seed: int  # draws `max_examples`
    mode: str  # of the images that the model takes

    @property
    def column(self) -> str:
        return "image" if self.task == "image_classification" else "text"

    def load(self, candidates: Mapping[str, CandidateConfig], targets: Mapping[str, TargetConfig]) -> LoadedData:
        loaded = {name: self.candidate(name, config) for name, config in candidates.items()}
        return LoadedData(self.column, loaded, {name: self.target(name, config) for name, config in targets.items()})

    def candidate(self, name: str, config: CandidateConfig) -> Candidate:
        """A loaded candidate with its sizes."""
        where, renamed = f"candidates.{name}", config.labels or {}
        raw = self._load(config.data, where)
        if set(renamed) - set(label_names(raw, where)):
            # A part of a dataset, or drawn rows, need not have all labels; the whole must.
            whole = self._load(replace(config.data, where={}, max_examples=None), where)
            theirs = {label for label in label_names(whole, where) if label}
            if unused := sorted(set(renamed) - theirs):
                raise InputError(
                    f"{where}.labels: no row is labelled {', '.join(unused)}; its labels are {', '.join(sorted(theirs))[:200]}"
                )
        rows, contents = self._read(raw, renamed, name, where)
        if self.space is None and len(rows.unique("label")) < 2:
            raise InputError(
                f"{where}: all its rows are labelled {rows[0]['label']!r}, and each is a choice among the labels of its own "
                "dataset; expected at least two, or a label space for all, labels: [...]"
            )
        content = [list(pair) for pair in zip(contents, rows["label"], strict=True)]
        lengths = [(0, total) for total in self.length(contents)]
        asked = [(text,) for text in contents]
        return Candidate.of(name, config, rows, content, asked, lengths, self.length.limit)

    def target(self, name: str, config: TargetConfig) -> Target:
        """A loaded target. Its labels, of the test set too, are those it lists, the label space, or the validation set's."""
        parts: dict[str, tuple[Any, ...]] = {}
        labels: list[str] = []
        for part, data in config.parts.items():
            where = f"targets.{name}.{part}"
            if config.kind == "callable":
                parts[part] = tuple(load_rows(data, where, self.seed, ()))
                continue
            rows, contents = self._read(self._load(data, where), config.labels or {}, name, where)
            labels = labels or sorted(set(config.labels.values() if config.labels else self.space or rows["label"]))
            if self.space is not None and (unknown := sorted(set(labels) - set(self.space))):
                raise InputError(f"targets.{name}.labels: {', '.join(unknown)}: {self._expected}")
            parts[part] = tuple(questions(rows, contents, labels, where))
        return Target(name, config, parts.get("data", ()), parts.get("test_data", ()))

    def _load(self, data: DataConfig, where: str) -> Dataset:
        """Rows that have the columns text or image, and label."""
        rows = load_rows(data, where, self.seed, (self.column,))
        require_columns(rows, (self.column, "label"), where)
        return rows

    def _read(self, rows: Dataset, renamed: Mapping[str, str], source: str, where: str) -> tuple[Dataset, list[str]]:
        """Rows with exactly the columns text or image, label and source; and the text, or the image's digest, of each."""
        labels = [
            self._label(label, renamed, f"{where}, row {number}.label")
            for number, label in enumerate(label_names(rows, where), start=1)
        ]
        contents = texts(rows, where) if self.column == "text" else digests(rows, self.mode, where)
        content = Value("string") if self.column == "text" else datasets.Image(mode=self.mode)
        features = datasets.Features({self.column: content, "label": Value("string"), "source": Value("string")})
        rows = rows.select_columns([self.column])
        return rows.add_column("label", labels).add_column("source", [source] * len(labels)).cast(features), contents

    def _label(self, label: str | None, renamed: Mapping[str, str], where: str) -> str:
        """Our name of a row's label."""
        if label is None or not label.strip():
            raise InputError(f"{where}: expected a label, got {label!r}")
        ours = renamed.get(label, label)
        if self.space is not None and ours not in self.space:
            raise InputError(
                f"{where}: {ours!r}: {self._expected}. Map it, with labels: {{{label}: {self.space[0]}, ...}} beside the "
                "data, or leave out the rows that have no counterpart; heads trained for other labels could not be averaged"
            )
        return ours

    @property
    def _expected(self) -> str:
        space = self.space or ()
        return f"expected one of the {len(space)} labels of this run: {', '.join(space)[:200]}"


def label_names(rows: Dataset, where: str) -> list[str | None]:
    """The label of every row as a name; None where a row has none."""
    kind, labels = rows.features["label"], rows["label"][:]
    if isinstance(kind, ClassLabel) or (isinstance(kind, Value) and not kind.dtype.startswith(("float", "bool"))):
        return names_in(rows, "label", labels)
    raise InputError(
        f"{where}.label: expected names or whole numbers, one of both in all rows, got {labels[0]!r:.100} in a column of "
        f"{kind!r:.100}"
    )


def texts(rows: Dataset, where: str) -> list[str]:
    for number, text in enumerate(rows["text"], start=1):
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{where}, row {number}.text: expected text, got {text!r:.100}")
    return list(rows["text"])


def digests(rows: Dataset, mode: str, where: str) -> list[str]:
    """The digest of every image, as the model takes it. Opens one at a time, as they may be many and large."""
    if not isinstance(rows.features["image"], datasets.Image):
        raise InputError(
            f"{where}.image: expected images, as imagefolder or parquet files of images hold them, got "
            f"{rows.features['image']}"
        )
    rows, found = rows.select_columns(["image"]), []
    for number in range(len(rows)):
        try:
            image = rows[number]["image"]
            if image is None:
                raise ValueError("there is none")
            image.load()
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"pixels of mode {image.mode}; expected colours or greys of 8 bits")
            found.append(image_digest(image.convert(mode)))
        except Exception as error:  # Pillow raises many kinds
            raise InputError(f"{where}, row {number + 1}.image: cannot be read ({error})") from error
    return found


def questions(rows: Dataset, contents: Sequence[str], labels: Sequence[str], where: str) -> list[TargetRow]:
    """A target's rows as questions whose choices are its labels."""
    if len(labels) < 2:
        raise InputError(f"{where}: has the single label {', '.join(labels)}; expected at least two, or give labels:")
    place = {label: number for number, label in enumerate(labels)}
    result: list[TargetRow] = []
    for number, (content, label) in enumerate(zip(contents, rows["label"], strict=True)):
        if label not in place:
            raise InputError(
                f"{where}, row {number + 1}.label: expected one of {', '.join(labels)[:300]}, got {label!r}; name all labels "
                "with labels: beside scorer:"
            )
        if "text" in rows.column_names:
            result.append(TargetRow(content, tuple(labels), place[label]))
        else:
            result.append(ImageRow(content, tuple(labels), place[label], rows=rows, number=number))
    return result


def label_words(label: str) -> str:
    """A label as words: names of labels often have underscores for spaces."""
    return label.replace("_", " ").strip() or label


def words_of(
    space: Mapping[str, str] | None, candidates: Mapping[str, Candidate], targets: Mapping[str, Target]
) -> dict[str, str]:
    """Label -> words, of the label space, or else of all labels in alphabetical order."""
    if space is not None:
        return dict(space)
    labels = {str(label) for candidate in candidates.values() for label in candidate.rows.unique("label")}
    labels |= {str(label) for target in targets.values() for row in target.questions for label in row.choices}
    return {label: label_words(label) for label in sorted(labels)}
