"""Candidates and targets: loading them, giving all of them one format, and writing a mixture as data.

A run has one format, so that the union of any candidates is one dataset:

- `text`: `prompt` and `completion` are strings;
- `chat`: they are lists of messages. One conversational candidate or target makes the whole run `chat`; plain rows then
  become a user turn and an assistant turn;
- `messages`: whole conversations, only with `assistant_only_loss: true`, where TRL trains on every assistant turn.

In the first two TRL computes the loss on the completion only.
"""

import hashlib
import json
import os
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from glob import glob
from itertools import chain, islice
from pathlib import Path
from string import Formatter
from typing import Any

import datasets
from datasets import ClassLabel, Dataset, Features, Value, concatenate_datasets
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.table import embed_table_storage
from huggingface_hub import HfApi
from huggingface_hub.errors import RevisionResolutionError
from jinja2 import TemplateError
from PIL import Image
from transformers import PreTrainedTokenizerBase

from m2m_hf.config.entries import BUILDERS, CandidateConfig, DataConfig, TargetConfig, check_name
from m2m_hf.config.run_config import MergeToMixConfig
from m2m_hf.core.mixture import Mixture, row_counts
from m2m_hf.errors import InputError
from m2m_hf.storage.journal import file_fingerprint, hidden, sync, write_atomic, write_json

MOST_FILES = 10_000  # in a folder that is given as a dataset
MOST_PARTS = 256  # that one dataset is split into
CHECKED: set[tuple[str, int, int]] = set()  # JSON files that were read well: every part of a split dataset asks again
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

    @property
    def cost(self) -> float:
        return self.tokens if self.config.cost is None else self.config.cost


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


def pin_data(config: MergeToMixConfig) -> None:
    """Puts the commit of every Hub dataset into `config`, so that manifest and recipe name what was really read.

    Raises:
        InputError: no such dataset or revision.
    """

    def pinned(data: DataConfig | None, where: str) -> Any:
        if data is None or data.path is None or data.path in BUILDERS or Path(data.path).exists():
            return data
        try:
            found = HfApi().resolve_revision(data.path, repo_type="dataset", revision=data.revision)
        except (OSError, ValueError, RevisionResolutionError) as error:
            raise InputError(
                f"{where}: {data.path!r} is neither a local folder nor a dataset that the Hub shows ({str(error)[:200]})"
            ) from error
        return replace(data, revision=found.resolved)

    for name, one in config.parsed_candidates.items():
        config.parsed_candidates[name] = replace(one, data=pinned(one.data, f"candidates.{name}"))
    for name, target in config.parsed_targets.items():
        parts = {part: pinned(getattr(target, part), f"targets.{name}.{part}") for part in ("data", "test_data")}
        config.parsed_targets[name] = replace(target, **parts)


def split_candidates(config: MergeToMixConfig) -> MergeToMixConfig:
    """`config` with a candidate for every value of a `split_by` column in place of the one that it splits.

    Raises:
        InputError: no such column, or values of which no different names can be made; and whatever the new candidates break.
    """
    if all(one.split_by is None for one in config.parsed_candidates.values()):
        return config
    made: dict[str, CandidateConfig] = {}
    for name, one in config.parsed_candidates.items():
        if one.split_by is None:
            made[name] = one
            continue
        where = f"candidates.{name}"
        rows = load_raw(one.data, where)
        if one.split_by not in rows.column_names:
            raise InputError(f"{where}.split_by: no column {one.split_by!r}; it has {', '.join(rows.column_names)}")
        kind = rows.features[one.split_by]
        if not isinstance(kind, (Value, ClassLabel)):
            found = rows[0][one.split_by]
            raise InputError(f"{where}.split_by: expected a column of texts or numbers, got {found!r:.100}")
        values = sorted(set(rows[one.split_by]), key=str)
        if len(values) > MOST_PARTS:
            raise InputError(
                f"{where}.split_by: {one.split_by!r} has {len(values):,} values, and each would be a candidate with an adapter "
                f"of its own; expected at most {MOST_PARTS}"
            )
        for value in values:
            labelled = isinstance(kind, ClassLabel) and value is not None
            called = (
                "none" if value is None or (labelled and value == -1) else kind.int2str(value) if labelled else value
            )
            part = re.sub(r"[^A-Za-z0-9_]+", "_", str(called)).strip("_")
            part = check_name(f"{name}-{part}"[:64].rstrip("_"), "candidate")
            if part in made or (part in config.parsed_candidates and part != name):
                raise InputError(
                    f"{where}.split_by: {called!r} and another value or candidate are both called {part}; rename one of them"
                )
            data = replace(one.data, where={**one.data.where, one.split_by: value})
            made[part] = replace(one, data=data, split_by=None)
    # A configuration made anew, so that whatever is checked of candidates is checked of these.
    given = {name: one.to_json() if one.data.rows is None else one.data.rows for name, one in made.items()}
    whole = replace(config, candidates=given)
    whole.parsed_targets = config.parsed_targets  # which are pinned
    return whole


def load_rows(config: DataConfig, where: str, seed: int) -> Dataset:
    """The rows that `config` names: loaded, columns renamed, `max_examples` of them drawn with `seed`.

    Raises:
        InputError: nothing there, not readable, no such split or column, or empty.
    """
    loaded = load_raw(config, where)
    for theirs, ours in config.columns.items():
        if theirs not in loaded.column_names:
            raise InputError(f"{where}.columns: no column {theirs!r}; it has {', '.join(loaded.column_names)}")
        if ours in loaded.column_names:
            raise InputError(f"{where}.columns: a column {ours!r} is there already; {theirs!r} cannot take its name")
        loaded = loaded.rename_column(theirs, ours)
    if len(loaded) == 0:
        raise InputError(f"{where}: has no rows; expected at least one")
    if config.max_examples is not None and len(loaded) > config.max_examples:
        loaded = loaded.shuffle(seed=seed).select(range(config.max_examples))
    if config.template:
        loaded = Dataset.from_list(
            [
                dict(row) | {key: fill(text, row, f"{where}.template") for key, text in config.template.items()}
                for row in loaded
            ]
        )
    return loaded


def load_raw(config: DataConfig, where: str) -> Dataset:
    """The rows as they are, of those that `where:` asks for."""
    check_json(config, where)
    if config.path and config.data_files is None and Path(config.path).is_dir():
        found = chain.from_iterable(files for _, _, files in os.walk(config.path))
        if sum(1 for _ in islice(found, MOST_FILES + 1)) > MOST_FILES:
            raise InputError(f"{where}: {config.path} holds more than {MOST_FILES:,} files; say which with data_files")
    try:
        if config.rows is not None:
            loaded = config.rows
        elif config.path and (Path(config.path) / "state.json").exists():
            loaded = datasets.load_from_disk(config.path)
        elif config.path and (Path(config.path) / "dataset_dict.json").exists():
            loaded = datasets.load_from_disk(config.path)[config.split]
        else:
            loaded = datasets.load_dataset(
                config.path,
                name=config.name,
                data_dir=config.data_dir,
                data_files=list(config.data_files) if config.data_files else None,
                split=config.split,
                revision=config.revision,
            )
    except FileNotFoundError as error:
        raise InputError(f"{where}: nothing found ({error}); relative paths are relative to the YAML file") from error
    except (DatasetNotFoundError, ConnectionError) as error:
        raise InputError(
            f"{where}: {config.path!r} is neither a local folder nor a dataset that the Hub shows ({error})"
        ) from error
    except StopIteration:  # what datasets raises where no file holds a row
        raise InputError(f"{where}: has no rows; expected at least one") from None
    except DatasetGenerationError as error:
        raise InputError(f"{where}: cannot be read as {config.path} ({error.__cause__ or error})") from error
    except KeyError as error:
        raise InputError(f"{where}: no split {config.split!r} in {config.path} ({error})") from error
    except (ValueError, RuntimeError, OSError) as error:
        raise InputError(f"{where}: {error}") from error
    for column, value in config.where.items():
        if column not in loaded.column_names:
            raise InputError(f"{where}.where: no column {column!r}; it has {', '.join(loaded.column_names)}")
        chosen = [number for number, found in enumerate(loaded[column]) if found == value]
        if not chosen:
            raise InputError(f"{where}.where: no row has {value!r} in {column!r}")
        loaded = loaded.select(chosen)
    return loaded


def check_json(config: DataConfig, where: str) -> None:
    """Reads local JSON files once to name the line that is none, of which Arrow says little, or over which it even crashes.

    Raises:
        InputError: with file and line.
    """
    files = [Path(found) for name in config.data_files or () if config.path == "json" for found in sorted(glob(name))]
    for path in files:
        if path.suffix not in (".json", ".jsonl", ".ndjson") or not path.is_file():
            continue  # compressed, which Arrow opens
        version = str(path.absolute()), path.stat().st_mtime_ns, path.stat().st_size
        if version in CHECKED:
            continue
        with open(path, "rb") as lines:
            first = lines.read(1 << 16).lstrip()[:1]
            lines.seek(0)
            if first == b"[":
                whole = read_line(lines.read(), f"{where}: {path}")
                wrong = next((row for row in whole if not isinstance(row, dict)), None)
                if wrong is not None:
                    raise InputError(f"{where}: {path}: expected a list of objects, got {wrong!r:.100} in it")
                CHECKED.add(version)
                continue
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    place = f"{where}: {path}, line {number}"
                    try:
                        row = read_line(line, place)
                    except InputError:
                        if number > 1 or not is_one_object(path):
                            raise
                        break
                    if not isinstance(row, dict):
                        raise InputError(f'{place}: expected an object such as {{"prompt": ...}}, got {row!r:.100}')
        CHECKED.add(version)


def is_one_object(path: Path) -> bool:
    """Whether a file is one JSON object over several lines."""
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except (ValueError, RecursionError):
        return False


def read_line(content: bytes, place: str) -> Any:
    """A line of JSON.

    Raises:
        InputError: it is none, or holds text that is no Unicode.
    """
    try:
        found = json.loads(content)
        json.dumps(found, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place} is not JSON ({error})") from error
    return found


def fill(template: str, row: Mapping[str, Any], where: str) -> str:
    """`template` with every `{column}` replaced by what the row has in it, and by nothing else.

    Raises:
        InputError: a column that is not there, or what is more than a column's name.
    """
    try:
        parts = list(Formatter().parse(template))
        for _, column, style, conversion in parts:
            if column is not None and (column not in row or style or conversion):
                raise KeyError(column + (f"!{conversion}" if conversion else "") + (f":{style}" if style else ""))
    except (KeyError, ValueError) as error:
        raise InputError(
            f"{where}: {template!r} cannot be filled ({error!r}); columns are {', '.join(row)}. Write {{{{ and }}}} for braces"
        ) from error
    return "".join(text + ("" if column is None else str(row[column])) for text, column, _, _ in parts)


def is_conversational(rows: Dataset, where: str, completion: str) -> bool:
    """Whether rows are messages rather than strings.

    Raises:
        InputError: neither `messages` nor `prompt` and `completion` (for a target with choices: `choices`) are there.
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
            f"it has {', '.join(rows.column_names)}. "
            f"Expected prompt and {completion}, or messages. To rename, add to it, for instance, "
            f"columns: {{{rows.column_names[0]}: {missing[0]}}}"
        )
    return not isinstance(rows[0]["prompt"], str)


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


def normalise(rows: Dataset, data_format: str, where: str) -> Dataset:
    """Candidate rows in the run's format, with exactly its columns and types, so that any union is safe."""
    converted = []
    for number, row in enumerate(rows, start=1):
        prompt, completion = split_row(row, data_format, f"{where}, row {number}")
        whole = {"prompt": prompt, "completion": completion}
        converted.append({"messages": [*prompt, *completion]} if data_format == "messages" else whole)
    return Dataset.from_list(converted, features=FEATURES[data_format])


def text_of(given: Prompt) -> str:
    """The text of a completion; of messages, the last one's content."""
    return given if isinstance(given, str) else given[-1]["content"]


def label_row(row: Mapping[str, Any], words: Mapping[str, str], template: str, where: str) -> dict[str, Any]:
    """A row with a label as one with choices: the words of all labels, each in the template of a completion.

    Raises:
        InputError: a label that is none of them.
    """
    label = str(row.get("label"))
    if label not in words:
        raise InputError(f"{where}.label: expected one of {', '.join(words)}, got {row.get('label')!r}")
    choices = [fill(template, {**row, "label": word}, f"{where}.template") for word in words.values()]
    return {"prompt": row.get("prompt"), "choices": choices, "answer": list(words).index(label)}


def target_row(row: Mapping[str, Any], data_format: str, scorer: str, where: str) -> TargetRow:
    """One question of a target, checked."""
    if scorer in ("loss", "generation"):
        prompt, completion = split_row(row, data_format, where)
        return TargetRow(prompt, (completion,), 0)
    asked, choices, answer = row.get("prompt"), row.get("choices"), row.get("answer")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(text, str) and text for text in choices):
        raise InputError(f"{where}.choices: expected at least two texts, none empty, got {choices!r}")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise InputError(
            f"{where}.answer: expected the index of the right choice, 0 to {len(choices) - 1}, or its text, got {answer!r}"
        )
    if choices.count(choices[answer]) > 1:
        raise InputError(f"{where}.choices: the right answer stands there twice: {choices!r}")
    if data_format == "chat":
        turns = tuple(as_turns(choice, "assistant", where) for choice in choices)
        return TargetRow(as_turns(asked, "user", f"{where}.prompt"), turns, answer)
    if not isinstance(asked, str):
        raise InputError(f"{where}.prompt: expected text, got {asked!r}")
    return TargetRow(asked, tuple(choices), answer)


def target_rows(
    config: TargetConfig, key: str, parts: Mapping[str, Dataset], data_format: str, where: str
) -> tuple[Any, ...]:
    """The rows of one part (`data` or `test_data`) of a target as its scorer takes them."""
    rows: list[Any] = list(parts[key])
    if config.kind == "callable":
        return tuple(rows)
    numbered = [(f"{where}, row {number}", row) for number, row in enumerate(rows, start=1)]
    if config.kind == "classification":
        # Without a list of labels they are those of the validation set, also for the test.
        words = config.labels or {str(label): str(label) for label in sorted(set(map(str, parts["data"]["label"])))}
        data = getattr(config, key)
        template = data.template.get("completion", "{label}")
        numbered = [(place, label_row(row, words, template, place)) for place, row in numbered]
    return tuple(target_row(row, data_format, config.kind, place) for place, row in numbered)


def load_all(
    candidates: Mapping[str, CandidateConfig],
    targets: Mapping[str, TargetConfig],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    max_length: int | None,
    assistant_only_loss: bool,
) -> tuple[str, dict[str, Candidate], dict[str, Target]]:
    """Loads and normalises everything that a run reads.

    Args:
        seed: draws `max_examples`.
        max_length: tokens after which TRL truncates a training row (None: never, as with packing).
        assistant_only_loss: TRL's setting; selects the `messages` format.

    Returns:
        The candidates' format, the candidates and the targets by name.

    Raises:
        InputError: anything wrong with any of them, with its place.
    """
    raw = {name: load_rows(config.data, f"candidates.{name}", seed) for name, config in candidates.items()}
    conversational = {name: is_conversational(rows, f"candidates.{name}", "completion") for name, rows in raw.items()}
    raw_targets: dict[str, dict[str, Dataset]] = {name: {} for name in targets}
    for name, config in targets.items():
        for key in ("data", "test_data"):
            if (data := getattr(config, key)) is not None:
                where = f"targets.{name}.{key}"
                rows = raw_targets[name][key] = load_rows(data, where, seed)
                column = {"choice": "choices", "classification": "label"}.get(config.kind, "completion")
                if config.kind != "callable":
                    conversational[where] = is_conversational(rows, where, column)
    data_format = "chat" if any(conversational.values()) else "text"
    if data_format == "chat" and tokenizer.chat_template is None:
        first = next(name for name, value in conversational.items() if value)
        raise InputError(
            f"{first} holds messages, but the tokenizer of this model has no chat template; choose an instruction-tuned "
            "model, give chat_template_path, or use prompt/completion strings"
        )
    if assistant_only_loss and not all("messages" in rows.column_names for rows in raw.values()):
        raise InputError("assistant_only_loss: true trains on conversations; every candidate needs a messages column")

    loaded = {}
    train_format = "messages" if assistant_only_loss else data_format
    for name, rows in raw.items():
        rows = normalise(rows, train_format, f"candidates.{name}")
        lengths = list(token_lengths(rows, tokenizer, f"candidates.{name}"))
        limit = max_length or max(total for _, total in lengths)
        loaded[name] = Candidate(
            name=name,
            config=candidates[name],
            rows=rows,
            fingerprint=content_fingerprint(rows),
            tokens=sum(min(total, limit) for start, total in lengths if start < limit),
            longest=max(total for _, total in lengths),
            truncated=sum(total > limit for _, total in lengths),
            dropped=sum(start >= limit for start, _ in lengths),
        )
        if loaded[name].dropped == len(rows):
            raise InputError(
                f"candidates.{name}: no completion fits into max_length {max_length}; the prompts alone are longer. "
                f"Its longest row has {loaded[name].longest} tokens: raise max_length"
            )
    loaded_targets = {}
    for name, parts in raw_targets.items():
        rows_of = {key: target_rows(targets[name], key, parts, data_format, f"targets.{name}.{key}") for key in parts}
        loaded_targets[name] = Target(name, targets[name], rows_of.get("data", ()), rows_of.get("test_data", ()))
    return train_format, loaded, loaded_targets


def render(tokenizer: PreTrainedTokenizerBase, text: Prompt, where: str, answering: bool = False) -> list[int]:
    """Token ids of a text, or of messages in the tokenizer's chat template.

    Args:
        answering: end with what the template puts before an answer.

    Raises:
        InputError: messages that the template does not take (a system turn, two user turns in a row, ...).
    """
    if isinstance(text, str):
        return list(tokenizer(text)["input_ids"])
    try:
        rendered = tokenizer.apply_chat_template(text, tokenize=True, return_dict=True, add_generation_prompt=answering)
    except TemplateError as error:
        raise InputError(
            f"{where}: the model's chat template does not take these messages ({error}): {text!r}"
        ) from error
    return list(rendered["input_ids"])


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: Prompt, where: str = "row"
) -> tuple[list[int], int]:
    """Token ids of prompt and completion together, and where the completion starts.

    The completion starts where the tokens of the prompt alone and of both together part, as in TRL's SFTTrainer, so
    that what is scored is what was trained. At least one token stands before it: with nothing there, the beginning-of-text
    token, or the end-of-text token of models that have none.

    Raises:
        InputError: a completion without a token of its own; see also `render`.
    """
    if isinstance(prompt, str) and isinstance(completion, str):
        whole: Prompt = prompt + completion
    else:
        whole = [*as_turns(prompt, "user", where), *as_turns(completion, "assistant", where)]
    before, ids = render(tokenizer, prompt, where, answering=True), render(tokenizer, whole, where)
    start = 0
    while start < min(len(before), len(ids)) and before[start] == ids[start]:
        start += 1
    if start == len(ids):
        raise InputError(f"{where}: the completion {completion!r} adds no token to its prompt")
    if start == 0:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        ids, start = [first, *ids], 1
    return ids, start


def token_lengths(rows: Dataset, tokenizer: PreTrainedTokenizerBase, where: str) -> Iterator[tuple[int, int]]:
    """(where the completion starts, number of tokens) of every training row, before truncation.

    A conversation trained on all assistant turns counts as starting at 0. Plain text gets the end-of-text token, as TRL
    appends it.
    """
    for number, row in enumerate(rows, start=1):
        if "messages" in row:
            yield 0, len(render(tokenizer, row["messages"], f"{where}, row {number}"))
        else:
            ids, start = encode(tokenizer, row["prompt"], row["completion"], f"{where}, row {number}")
            yield start, len(ids) + isinstance(row["completion"], str)


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


def mixture_dataset(counts: Mapping[str, int], candidates: Mapping[str, Candidate], seed: int) -> Dataset:
    """So many rows of each candidate, drawn and shuffled with `seed`, none twice; the same counts and seed give the same rows."""
    draw = random.Random(seed)
    parts = []
    for name, count in sorted(counts.items()):
        whole = candidates[name].rows
        numbers = range(count) if count == len(whole) else draw.sample(range(len(whole)), count)
        parts.append(whole.select(numbers))
    order = list(range(sum(map(len, parts))))
    draw.shuffle(order)
    return concatenate_datasets(parts).select(order)


def write_mixture(folder: Path, mixture: Mixture, candidates: Mapping[str, Candidate], seed: int) -> Path:
    """Writes the mixture's rows, shuffled with `seed`, as `train.jsonl` (of images `train.parquet`) with its `manifest.json`.

    Of equal weights it is the union of the candidates. Otherwise rows are drawn from each in proportion to its weight, none
    twice, as many as the candidates have. The same mixture and seed give the same bytes. What is there already with the same
    content is left as it is.
    """
    counts = row_counts(mixture, {name: len(candidates[name].rows) for name in mixture.names})
    rows = mixture_dataset(counts, candidates, seed)
    if "image" in rows.column_names:
        train = folder / "train.parquet"
        folder.mkdir(parents=True, exist_ok=True)
        partial = hidden(train)
        # With the images themselves: of files there would be their places on this machine alone.
        whole = rows.flatten_indices().with_format("arrow").map(embed_table_storage, batched=True, batch_size=256)
        whole.with_format(None).to_parquet(partial)
        partial.rename(train)
        sync(folder)
    else:
        train = folder / "train.jsonl"
        write_atomic(train, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    sources = {
        name: {
            "weight": weight,
            "rows": counts[name],
            "rows_of_the_candidate": len(candidates[name].rows),
            "tokens": candidates[name].tokens * counts[name] // len(candidates[name].rows),
            "fingerprint": candidates[name].fingerprint,
            "source": candidates[name].config.to_json(),
        }
        for name, weight in mixture.items
    }
    write_json(
        folder / "manifest.json",
        {
            "rows": len(rows),
            "seed": seed,
            "file": train.name,
            "sha256_16": file_fingerprint([train]),
            "sources": sources,
        },
    )
    return train
