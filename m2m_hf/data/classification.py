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
from m2m_hf.data.loading import load_rows
from m2m_hf.data.rows import Candidate, ImageRow, LoadedData, Target, TargetRow, content_fingerprint, image_digest
from m2m_hf.errors import InputError

CONTENT = {"sequence_classification": "text", "image_classification": "image"}  # task -> column


class Length:
    """Counts the tokens of rows.

    Args:
        limit: tokens to which the model truncates a text, or the patches of an image.
        tokenizer: of texts; None for images.
    """

    def __init__(self, limit: int, tokenizer: Any = None) -> None:
        self.limit, self._tokenizer = limit, tokenizer

    def __call__(self, texts: Sequence[Any]) -> list[int]:
        if self._tokenizer is None:
            return [self.limit] * len(texts)
        return [len(self._tokenizer(text)["input_ids"]) for text in texts]


@dataclass(frozen=True)
class Reader:
    """Reads all datasets of a classification run alike.

    Args:
        column: `text` or `image`.
        space: the run's labels; None where every dataset has its own.
        length: counts the tokens of the model's input.
        seed: draws `max_examples`.
        mode: of the images that the model takes.
    """

    column: str
    space: Sequence[str] | None
    length: Length
    seed: int
    mode: str

    def candidate(self, name: str, config: CandidateConfig) -> Candidate:
        """A loaded candidate with its sizes."""
        where = f"candidates.{name}"
        rows, contents = self._read(config.data, config.labels, name, where)
        if self.space is None and len(rows.unique("label")) < 2:
            raise InputError(
                f"{where}: all its rows are labelled {rows[0]['label']!r}, and each is a choice among the labels of its own "
                "dataset; expected at least two, or a label space for all, labels: [...]"
            )
        sizes, limit = self.length(contents), self.length.limit
        return Candidate(
            name=name,
            config=config,
            rows=rows,
            fingerprint=content_fingerprint([list(pair) for pair in zip(contents, rows["label"], strict=True)]),
            tokens=sum(min(size, limit) for size in sizes),
            longest=max(sizes),
            truncated=sum(size > limit for size in sizes),
            dropped=0,
            digests=frozenset(contents) if self.column == "image" else frozenset(),
        )

    def target(self, name: str, config: TargetConfig) -> Target:
        """A loaded target. Its labels, of the test set too, are those it lists, the label space, or the validation set's."""
        parts: dict[str, tuple[Any, ...]] = {"data": (), "test_data": ()}
        labels: tuple[str, ...] = ()
        for part, data in (("data", config.data), ("test_data", config.test_data)):
            where = f"targets.{name}.{part}"
            if data is None:
                continue
            if config.kind == "callable":
                parts[part] = tuple(load_rows(data, where, self.seed))
                continue
            rows, contents = self._read(data, config.labels, name, where)
            listed = set(config.labels.values()) if config.labels else set(self.space or rows["label"])
            if self.space is not None and (unknown := sorted(listed - set(self.space))):
                raise InputError(f"targets.{name}.labels: {', '.join(unknown)}: {self._not_in_space()}")
            labels = labels or tuple(sorted(listed))
            parts[part] = tuple(questions(rows, contents, labels, where))
        return Target(name, config, parts["data"], parts["test_data"])

    def _read(
        self, data: DataConfig, renamed: Mapping[str, str] | None, source: str, where: str
    ) -> tuple[Dataset, list[str]]:
        """Rows with exactly the columns text or image, label and source; and the text, or the image's digest, of each.

        Raises:
            InputError: a missing column, content of another kind, or an unknown label.
        """
        rows = load_rows(data, where, self.seed)
        if missing := [name for name in (self.column, "label") if name not in rows.column_names]:
            others = [name for name in rows.column_names if name not in (self.column, "label")]
            raise InputError(
                f"{where}: no column {' and '.join(map(repr, missing))}; it has {', '.join(rows.column_names)}. To rename, "
                f"add to it, for instance, columns: {{{others[0] if others else 'theirs'}: {missing[0]}}}"
            )
        labels = label_names(rows, where)
        if where.startswith("candidates.") and set(renamed or ()) - set(labels):
            self._check_map(renamed or {}, data, where)
        labels = [
            self._label(label, renamed or {}, f"{where}, row {n}.label") for n, label in enumerate(labels, start=1)
        ]
        contents = self._texts(rows, where) if self.column == "text" else self._digests(rows, where)
        content = Value("string") if self.column == "text" else datasets.Image(mode=self.mode)
        features = datasets.Features({self.column: content, "label": Value("string"), "source": Value("string")})
        rows = rows.select_columns([self.column])
        return rows.add_column("label", labels).add_column("source", [source] * len(labels)).cast(features), contents

    def _check_map(self, renamed: Mapping[str, str], data: DataConfig, where: str) -> None:
        """Refuses names that no row of the whole dataset has; a part of it, or drawn rows, need not have all."""
        whole = load_rows(replace(data, where={}, max_examples=None), where, self.seed)
        theirs = {label for label in label_names(whole, where) if label}
        if unused := sorted(set(renamed) - theirs):
            raise InputError(
                f"{where}.labels: no row is labelled {', '.join(unused)}; its labels are {', '.join(sorted(theirs))[:200]}"
            )

    def _label(self, label: str | None, renamed: Mapping[str, str], where: str) -> str:
        """Our name of a row's label."""
        if label is None or not label.strip():
            raise InputError(f"{where}: expected a label, got {label!r}")
        ours = renamed.get(label, label)
        if self.space is not None and ours not in self.space:
            raise InputError(
                f"{where}: {ours!r}: {self._not_in_space()}. Map it, with labels: {{{label}: {self.space[0]}, ...}} beside the "
                "data, or leave out the rows that have no counterpart; heads trained for other labels could not be averaged"
            )
        return ours

    def _not_in_space(self) -> str:
        assert self.space is not None
        return f"expected one of the {len(self.space)} labels of this run: {', '.join(self.space)[:200]}"

    def _texts(self, rows: Dataset, where: str) -> list[str]:
        for number, text in enumerate(rows["text"], start=1):
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"{where}, row {number}.text: expected text, got {text!r:.100}")
        return list(rows["text"])

    def _digests(self, rows: Dataset, where: str) -> list[str]:
        """The digest of every image, as the model takes it. Opens one at a time, as they may be many and large."""
        if not isinstance(rows.features["image"], datasets.Image):
            raise InputError(
                f"{where}.image: expected images, as imagefolder or parquet files of images hold them, got "
                f"{rows.features['image']}"
            )
        rows, digests = rows.select_columns(["image"]), []
        for number in range(len(rows)):
            try:
                image = rows[number]["image"]
                if image is None:
                    raise ValueError("there is none")
                image.load()
                if image.mode.startswith(("I", "F")):
                    raise ValueError(f"pixels of mode {image.mode}; expected colours or greys of 8 bits")
                digests.append(image_digest(image.convert(self.mode)))
            except Exception as error:  # Pillow raises many kinds
                raise InputError(f"{where}, row {number + 1}.image: cannot be read ({error})") from error
        return digests


def load_classification_data(
    candidates: Mapping[str, CandidateConfig],
    targets: Mapping[str, TargetConfig],
    task: str,
    space: Sequence[str] | None,
    length: Length,
    *,
    seed: int,
    mode: str = "RGB",
) -> LoadedData:
    """Loads everything that a classification run reads; for the arguments see `Reader`.

    Raises:
        InputError: anything wrong with a candidate or a target, with its place.
    """
    reader = Reader(CONTENT[task], space, length, seed, mode)
    return LoadedData(
        reader.column,
        {name: reader.candidate(name, config) for name, config in candidates.items()},
        {name: reader.target(name, config) for name, config in targets.items()},
    )


def label_names(rows: Dataset, where: str) -> list[Any]:
    """The label of every row as a name; None where a row has none.

    Raises:
        InputError: labels of another kind.
    """
    kind, labels = rows.features["label"], rows["label"][:]
    if isinstance(kind, ClassLabel):
        return [None if label in (None, -1) else kind.int2str(label) for label in labels]
    if isinstance(kind, Value) and not kind.dtype.startswith(("float", "bool")):
        return [None if label is None else str(label) for label in labels]
    raise InputError(f"{where}.label: expected names or whole numbers, got {labels[0]!r:.100}")


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
