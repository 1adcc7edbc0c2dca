"""Candidates and targets of classification: rows of a text, or an image, and its label.

Labels are names. A candidate or target may call them otherwise and say so (`labels: {theirs: ours}`). Without a label space that
is given, a row is a choice among the labels of its own dataset, which stands in its `source`: datasets with labels of their own
then need not know of each other, and those that join later change nothing for the others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import datasets
from datasets import ClassLabel, Dataset, Value
from PIL import Image

from m2m_hf.config.candidates import CandidateConfig, DataConfig
from m2m_hf.config.targets import TargetConfig
from m2m_hf.data.loading import load_rows
from m2m_hf.data.rows import Candidate, Target, TargetRow, content_fingerprint, image_digest
from m2m_hf.errors import InputError


def label_words(label: str) -> str:
    """A label as words: names of labels often have underscores for spaces."""
    return label.replace("_", " ").strip() or label


CONTENT = {"sequence_classification": "text", "image_classification": "image"}


@dataclass(frozen=True)
class ImageRow(TargetRow):
    """A question about an image, whose digest is the `prompt`; the image itself is read when it is needed."""

    rows: Dataset = field(repr=False, compare=False, kw_only=True)
    number: int = field(compare=False, kw_only=True)

    @property
    def image(self) -> Image.Image:
        found: Image.Image = self.rows[self.number]["image"]
        return found


def recognised(row: Any) -> dict[str, Any]:
    """What a row's fingerprint is made of."""
    return {name: getattr(row, name) for name in ("prompt", "choices", "answer")}


def load_classification(
    candidates: Mapping[str, CandidateConfig],
    targets: Mapping[str, TargetConfig],
    task: str,
    known: Sequence[str] | None,
    length: "Length",
    *,
    seed: int,
    mode: str = "RGB",
) -> tuple[str, dict[str, Candidate], dict[str, Target]]:
    """Loads everything that a classification run reads; see `data.load_all`.

    Args:
        known: the label space, where there is one: of the user's, or of the base model's classifier.
        length: counts tokens, of the model's input.
        seed: draws `max_examples`.
        mode: what images are converted to.

    Returns:
        The rows' format, the candidates and the targets by name.

    Raises:
        InputError: anything wrong with any of them, with its place.
    """
    column = CONTENT[task]
    loaded = {}
    for name, config in candidates.items():
        where = f"candidates.{name}"
        rows, content = labelled(config.data, config.labels, column, name, known, where, seed, mode)
        if known is None and len(rows.unique("label")) < 2:
            raise InputError(
                f"{where}: all its rows are labelled {rows[0]['label']!r}, and each is a choice among the labels of its own "
                "dataset; expected at least two, or a label space for all, labels: [...]"
            )
        sizes = length(content)
        loaded[name] = Candidate(
            name=name,
            config=config,
            rows=rows,
            fingerprint=content_fingerprint([list(pair) for pair in zip(content, rows["label"], strict=True)]),
            tokens=sum(min(size, length.limit) for size in sizes),
            longest=max(sizes),
            truncated=sum(size > length.limit for size in sizes),
            dropped=0,
            digests=frozenset(content) if column == "image" else frozenset(),
        )
    made = {}
    for name, target in targets.items():
        parts: dict[str, tuple[Any, ...]] = {}
        labels: tuple[str, ...] = ()
        for part in ("data", "test_data"):
            data: DataConfig | None = getattr(target, part)
            where = f"targets.{name}.{part}"
            if data is None:
                continue
            if target.kind == "callable":
                parts[part] = tuple(load_rows(data, where, seed))
                continue
            rows, content = labelled(data, target.labels, column, name, known, where, seed, mode)
            # Without a list of labels they are the label space, or those of the validation set, also for the test.
            given = set(target.labels.values()) if target.labels else set(known or rows["label"])
            labels = labels or tuple(sorted(given))
            if known is not None and (others := sorted(given - set(known))):
                raise InputError(
                    f"targets.{name}.labels: {', '.join(others)} are none of the {len(known)} labels of this run: "
                    f"{', '.join(known)[:200]}"
                )
            parts[part] = tuple(questions(rows, content, labels, where))
        made[name] = Target(name, target, parts.get("data", ()), parts.get("test_data", ()))
    return column, loaded, made


def labelled(
    data: DataConfig,
    renamed: Mapping[str, str] | None,
    column: str,
    name: str,
    known: Sequence[str] | None,
    where: str,
    seed: int,
    mode: str,
) -> tuple[Dataset, list[str]]:
    """Rows with exactly the columns text or image, label, source; labels are names. And what recognises the content of each.

    Raises:
        InputError: a column that is missing, content of another kind, or a label that is not known.
    """
    rows = load_rows(data, where, seed)
    if missing := [one for one in (column, "label") if one not in rows.column_names]:
        others = [one for one in rows.column_names if one not in (column, "label")]
        raise InputError(
            f"{where}: no column {' and '.join(map(repr, missing))}; it has {', '.join(rows.column_names)}. To rename, "
            f"add to it, for instance, columns: {{{others[0] if others else 'theirs'}: {missing[0]}}}"
        )
    labels = names_in(rows, where)
    if where.startswith("candidates.") and set(renamed or ()) - set(labels):
        # Of a part, or of some rows that are drawn, the map may be that of the whole.
        whole = load_rows(replace(data, where={}, max_examples=None), where, seed)
        theirs = {label for label in names_in(whole, where) if label}
        if unused := sorted(set(renamed or ()) - theirs):
            raise InputError(
                f"{where}.labels: no row is labelled {', '.join(unused)}; its labels are {', '.join(sorted(theirs))[:200]}"
            )
    for number, label in enumerate(labels, start=1):
        if label is None or not label.strip():
            raise InputError(f"{where}, row {number}.label: expected a label, got {rows[number - 1]['label']!r}")
        ours = (renamed or {}).get(label, label)
        if known is not None and ours not in known:
            raise InputError(
                f"{where}, row {number}.label: {ours!r} is none of the {len(known)} labels of this run: "
                f"{', '.join(known)[:200]}. Heads that are trained for a candidate's own labels could not be averaged: map "
                f"them, with labels: {{{label}: {known[0]}, ...}} beside its data, or leave out the rows that have no counterpart"
            )
        labels[number - 1] = ours
    if column == "text":
        found = rows["text"][:]
        for number, text in enumerate(found, start=1):
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"{where}, row {number}.text: expected text, got {text!r:.100}")
        content: Any = Value("string")
    else:
        content = datasets.Image(mode=mode)
        if not isinstance(rows.features["image"], datasets.Image):
            raise InputError(
                f"{where}.image: expected images, as imagefolder or parquet files of images hold them, got "
                f"{rows.features['image']}"
            )
        found = digests(rows.select_columns(["image"]), mode, where)
    features = datasets.Features({column: content, "label": Value("string"), "source": Value("string")})
    rows = rows.select_columns([column])
    rows = rows.add_column("label", labels).add_column("source", [name] * len(labels))
    return rows.cast(features), found


def names_in(rows: Dataset, where: str) -> list[str | None]:
    """The label of every row, as a name; None where it has none.

    Raises:
        InputError: labels of another kind.
    """
    kind, given = rows.features["label"], rows["label"][:]
    if isinstance(kind, ClassLabel):
        return [None if one in (None, -1) else kind.int2str(one) for one in given]
    if isinstance(kind, Value) and not kind.dtype.startswith(("float", "bool")):
        return [None if one is None else str(one) for one in given]
    raise InputError(f"{where}.label: expected names or whole numbers, got {given[0]!r:.100}")


def digests(rows: Dataset, mode: str, where: str) -> list[str]:
    """Opens every image, once, as they may be many and large, and says what recognises it when it is converted to `mode`.

    Raises:
        InputError: one that cannot be read, or whose numbers are no colours.
    """
    found = []
    for number in range(len(rows)):
        try:
            image = rows[number]["image"]
            if image is None:
                raise ValueError("there is none")
            image.load()
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"its pixels are numbers of kind {image.mode}; expected colours or greys of 8 bits")
            found.append(image_digest(image.convert(mode)))
        except Exception as error:  # whatever Pillow makes of it
            raise InputError(f"{where}, row {number + 1}.image: cannot be read ({error})") from error
    return found


def questions(rows: Dataset, contents: Sequence[str], labels: Sequence[str], where: str) -> list[TargetRow]:
    """A target's rows as questions whose choices are its labels."""
    found: list[TargetRow] = []
    place = {label: number for number, label in enumerate(labels)}
    for number, (content, label) in enumerate(zip(contents, rows["label"], strict=True)):
        if label not in place:
            raise InputError(
                f"{where}, row {number + 1}.label: expected one of {', '.join(labels)[:300]}, got {label!r}; labels: beside "
                "scorer: names all of them"
            )
        if "text" in rows.column_names:
            found.append(TargetRow(content, tuple(labels), place[label]))
        else:
            found.append(ImageRow(content, tuple(labels), place[label], rows=rows, number=number))
    if len(labels) < 2:
        raise InputError(f"{where}: has one label alone, {', '.join(labels)}; expected at least two, or give labels:")
    return found


class Length:
    """How many tokens rows have.

    Args:
        limit: tokens that a text is cut to, or patches of an image, as the model cuts it.
        tokenizer: of texts; None for images.
    """

    def __init__(self, limit: int, tokenizer: Any = None) -> None:
        self.limit, self._tokenizer = limit, tokenizer

    def __call__(self, texts: Sequence[Any]) -> list[int]:
        if self._tokenizer is None:
            return [self.limit] * len(texts)
        return [len(self._tokenizer(text)["input_ids"]) for text in texts]


def words_of(
    space: Mapping[str, str] | None, candidates: Mapping[str, Candidate], targets: Mapping[str, Target]
) -> dict[str, str]:
    """Label -> words, of every label that occurs, in alphabetical order; or of the space that was given."""
    if space is not None:
        return dict(space)
    labels = {label for one in candidates.values() for label in one.rows.unique("label")}
    labels |= {label for one in targets.values() for row in one.questions for label in row.choices}
    return {str(label): label_words(str(label)) for label in sorted(labels)}
