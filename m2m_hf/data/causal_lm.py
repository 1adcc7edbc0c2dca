"""Data for causal LMs: all rows in the one format of a run, which is text, chat or messages."""

from collections.abc import Iterable, Mapping, Sequence
from string import ascii_lowercase
from typing import Any

from datasets import ClassLabel, Dataset, Features
from transformers import PreTrainedTokenizerBase
from trl.data_utils import extract_prompt

from m2m_hf.config.candidates import CandidateConfig, DataConfig
from m2m_hf.config.targets import SCORERS, TargetConfig
from m2m_hf.data.conversations import UNREAD, as_turns, check_shown, rows_of, says_something, tools_of, unused
from m2m_hf.data.few_shot import with_examples
from m2m_hf.data.files import as_text
from m2m_hf.data.loading import TEXTS, columns_in, fill, legible, load_rows, require_columns, texts_in
from m2m_hf.data.rows import Candidate, LoadedData, Prompt, Target, TargetRow, Tools, features_of, text_of
from m2m_hf.data.tokens import appended, encode, render
from m2m_hf.errors import InputError

READ = ("prompt", "completion", "messages", "tools", "choices", "answer", "label")
PAIR = ("chosen", "rejected")  # of a preference


def load_causal_lm_data(
    candidates: Mapping[str, CandidateConfig],
    targets: Mapping[str, TargetConfig],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    max_length: int | None,
    assistant_only_loss: bool,
) -> LoadedData:
    """Loads everything that a run reads, and brings it into one format: `messages` with TRL's `assistant_only_loss`.

    TRL truncates training rows after `max_length` tokens; None with packing, which truncates none. `seed` draws `max_examples`.
    """
    conversations: list[str] = []
    unread: dict[str, list[str]] = {}

    def load(data: DataConfig, where: str, column: str | None, read: str | None = None) -> Dataset:
        rows = load_rows(data, where, seed, (*TEXTS, *PAIR) if column in PAIR else TEXTS if column else ())
        if (
            column not in PAIR
            and "conversations" in rows.column_names
            and not {"messages", "prompt"} & set(rows.column_names)
        ):
            rows = rows.rename_column("conversations", "messages")  # as TRL does
        if column is None:
            return rows
        known = ("prompt", "tools", *PAIR) if column in PAIR else READ
        if rest := unread_columns(rows, data, where, (*known, *filter(None, [read]))):
            unread[where] = rest
        if is_conversational(rows, where, column):
            conversations.append(where)
        return rows

    raw = {name: load(config.data, f"candidates.{name}", "completion") for name, config in candidates.items()}
    raw_targets: dict[str, dict[str, Dataset]] = {name: {} for name in targets}
    for name, config in targets.items():
        column = None if config.kind == "callable" else SCORERS[config.kind].column
        for part, data in config.parts.items():
            raw_targets[name][part] = load(data, f"targets.{name}.{part}", column, config.fewshot_by)
    if conversations and tokenizer.chat_template is None:
        raise InputError(
            f"{conversations[0]} holds messages, but the tokenizer of this model has no chat template; choose an "
            "instruction-tuned model, give chat_template_path, or use prompt/completion strings"
        )
    if assistant_only_loss and not all("messages" in rows.column_names for rows in raw.values()):
        raise InputError("assistant_only_loss: true trains on conversations; every candidate needs a messages column")
    data_format = "chat" if conversations else "text"
    train_format = "messages" if assistant_only_loss else data_format
    samples = {name: read_samples(rows, train_format, f"candidates.{name}", tokenizer) for name, rows in raw.items()}
    features = features_of(train_format, (row for part in samples.values() for row in part))
    return LoadedData(
        train_format,
        {
            name: make_candidate(name, candidates[name], rows, features, train_format, tokenizer, max_length)
            for name, rows in samples.items()
        },
        {
            name: make_target(name, targets[name], parts, data_format, tokenizer, seed)
            for name, parts in raw_targets.items()
        },
        unread,
    )


def is_conversational(rows: Dataset, where: str, completion: str) -> bool:
    """True if rows hold messages rather than texts; refuses rows with neither `messages` nor `prompt` and `completion`."""
    if completion in PAIR:
        require_columns(rows, PAIR, where)
        return any(isinstance(rows[0].get(name), list) for name in ("prompt", *PAIR))
    if "messages" in rows.column_names:
        return True
    content = next((name for name in ("image", "text") if name in rows.column_names), None)
    if content and "label" in rows.column_names and not {"prompt", completion} <= set(rows.column_names):
        task = {"image": "image_classification", "text": "sequence_classification"}[content]
        raise InputError(f"{where}: rows of {content} and label belong to task: {task}")
    require_columns(rows, tuple(dict.fromkeys(("prompt", completion))), where, ", or messages")
    return isinstance(rows[0]["prompt"], list)


def unread_columns(rows: Dataset, data: DataConfig, where: str, known: Sequence[str]) -> list[str]:
    """The columns that neither the format nor a template reads; refuses those whose content belongs to a row."""
    rest = [name for name in rows.column_names if name not in columns_in(data.template, where) | data.where.keys()]
    suspects = [name for name in rest if name in UNREAD]
    read: Iterable[dict[str, Any]] = rows if suspects or {"messages", "completion"} <= {*rest} else ()
    for number, row in enumerate(read, start=1):
        twice = ["completion"] if says_something(row.get("messages")) else []
        for name in suspects + twice:
            if says_something(row.get(name)):
                raise InputError(
                    f"{where}, row {number}.{name}: rows are read from prompt and completion, or from messages and tools, and "
                    f"this would be lost. Put it there, or leave it out: {unused(name)}"
                )
    return [name for name in rest if name not in known and not name.startswith("unused_")]


def make_candidate(
    name: str,
    config: CandidateConfig,
    samples: list[dict[str, Any]],
    features: Features,
    data_format: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
) -> Candidate:
    """A candidate in the run's format, with exactly its columns and types, so that any union is safe."""
    questions: list[tuple[Prompt, ...]] = []
    lengths: list[tuple[int, int]] = []
    ends = appended(tokenizer)
    for number, row in enumerate(samples, start=1):
        where, tools = f"candidates.{name}, row {number}", row.get("tools")
        if data_format == "messages":  # trains on all turns of the assistant, from the first on
            whole = row["messages"]
            first = next(turn for turn, message in enumerate(whole) if message["role"] == "assistant")
            questions.append((whole[:-1], whole[-1:]))
            prompt, completion = whole[:first], whole[first:]
        else:
            prompt, completion = row["prompt"], row["completion"]
            questions.append((prompt, completion))
        if prompt:
            ids, start = encode(tokenizer, prompt, completion, where, tools)
        else:
            ids, start = render(tokenizer, completion, where, tools=tools), 0
        # TRL ends texts with the end-of-text token, whatever the tokenizer appends, unless it stands there.
        more = ends + (not completion.endswith(tokenizer.eos_token)) if data_format == "text" else 0
        lengths.append((start, len(ids) + more))
    rows = Dataset.from_list([dict.fromkeys(features) | row for row in samples], features=features)
    candidate = Candidate.of(name, config, rows, samples, questions, lengths, max_length)
    if candidate.trained_rows == 0:
        raise InputError(
            f"candidates.{name}: no completion fits into max_length {max_length}; the prompts alone are longer. "
            f"Its longest row has {candidate.longest} tokens: raise max_length"
        )
    return candidate


def read_samples(
    rows: Dataset, data_format: str, name: str, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """The rows of a candidate in the run's format; `tools` only where a row has some."""
    samples: list[dict[str, Any]] = []
    spoken: list[tuple[str, Any, Tools, int]] = []
    for number, row in enumerate(rows_of(rows), start=1):
        where, joint = f"{name}, row {number}", data_format == "messages"
        prompt, completion, tools = split_row(row, data_format, where)
        whole: Any = [*prompt, *completion]
        sample = {"messages": whole} if joint else {"prompt": prompt, "completion": completion}
        samples.append(sample | ({"tools": tools} if tools else {}))
        spoken.append((where, whole, tools, 0 if joint else len(prompt)))
    if data_format != "text":
        check_shown(spoken, tokenizer)
    return samples


def split_row(row: Mapping[str, Any], data_format: str, where: str) -> tuple[Prompt, Prompt, Tools]:
    """(prompt, completion, tools) of a candidate's or target's row in the run's format."""
    tools = tools_of(row, data_format, where)
    if row.get("messages") is not None:
        if isinstance(row["messages"], str):
            raise InputError(f"{where}.messages: expected a list of messages, got a text: {row['messages']!r:.200}")
        messages = as_turns(row["messages"], "user", f"{where}.messages")
        if len(messages) == 1 or messages[-1]["role"] != "assistant":
            raise InputError(
                f"{where}.messages: expected at least two turns, of which the last is the assistant's, got {row['messages']!r}"
            )
        return messages[:-1], messages[-1:], tools
    prompt = in_format(row.get("prompt"), "user", data_format, f"{where}.prompt")
    completion: Any = in_format(row.get("completion"), "assistant", data_format, f"{where}.completion")
    if data_format != "text" and completion[-1]["role"] != "assistant":
        raise InputError(f"{where}.completion: expected turns of which the last is the assistant's, got {completion!r}")
    return prompt, completion, tools


def in_format(text: Any, role: str, data_format: str, where: str) -> Prompt:
    """A prompt or a completion as the run's format has it: a text, or turns."""
    if data_format != "text":
        return as_turns(text, role, where)
    if not isinstance(text, str) or (role == "assistant" and not text):
        hint = '; where an empty prompt is meant, columns: {null: ""}' if text is None and role == "user" else ""
        raise InputError(f"{where}: expected text, got {text!r}{hint}")
    return text


def make_target(
    name: str,
    config: TargetConfig,
    parts: Mapping[str, Dataset],
    data_format: str,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> Target:
    """A target with its rows as its scorer takes them; `seed` draws their examples."""
    rows: dict[str, Sequence[Any]] = {}
    for part, dataset in parts.items():
        numbered = [
            (f"targets.{name}.{part}, row {number}", named_answer(row, dataset.features))
            for number, row in enumerate(rows_of(dataset), start=1)
        ]
        if config.kind == "callable":
            rows[part] = tuple(dataset)
            continue
        if config.kind == "classification":
            require_columns(dataset, ("label",), f"targets.{name}.{part}")
            if not isinstance(dataset[0]["label"], str | int | float | None):
                raise InputError(
                    f"targets.{name}.{part}, row 1.label: expected a name, got {dataset[0]['label']!r:.200}"
                )
            # Without a list of labels they are those of the validation set, also for the test.
            known = set(label_names(parts["data"], config.labels or {})) - {None}
            words = config.labels or {label: label for label in sorted(filter(None, known))}
            template = config.parts[part].template.get("completion", "{label}")
            labels = label_names(dataset, words)
            numbered = [
                (place, label_row({**row, "label": label}, words, template, place))
                for (place, row), label in zip(numbered, labels, strict=True)
            ]
        rows[part] = tuple(target_row(row, data_format, config.kind, place) for place, row in numbered)
        if data_format != "text":
            pairs = zip(numbered, rows[part], strict=True)
            spoken: list[tuple[str, Any, Tools, int]] = [
                (at, [*row.prompt, *choice], row.tools, len(row.prompt))
                for (at, _), row in pairs
                for choice in (row.choices if config.kind == "preference" else [row.choices[row.answer]])
            ]
            check_shown(spoken, tokenizer)
        if config.kind == "preference" and all(
            row.prompt and choice[: len(row.prompt)] == row.prompt for row in rows[part] for choice in row.choices
        ):
            raise InputError(
                f"targets.{name}.{part}: chosen and rejected begin with the prompt, which would be read twice; leave it out: "
                "columns: {prompt: unused_prompt}"
            )
    if config.num_fewshot and rows:
        where = f"targets.{name}"
        kinds: dict[str, Sequence[Any]] = {part: [None] * len(dataset) for part, dataset in parts.items()}
        if column := config.fewshot_by:
            for part, dataset in parts.items():
                require_columns(dataset, (column,), f"{where}.{part}")
                kinds[part] = texts_in(dataset, column, f"{where}.{part}")
        rows = with_examples(config, rows, kinds, seed, where)
        if data_format != "text":
            first: Any = rows["data"][0]
            check_shown([(f"{where}.num_fewshot", first.asked, first.tools, len(first.asked))], tokenizer)
    return Target(name, config, tuple(rows.get("data", ())), tuple(rows.get("test_data", ())))


def label_names(rows: Dataset, words: Mapping[str, str]) -> list[str | None]:
    """The labels of rows: classes by their names, or by their numbers where only these have words."""
    kind, labels = rows.features["label"], rows["label"][:]
    if (
        isinstance(kind, ClassLabel)
        and not set(kind.names) <= {*words}
        and set(map(str, range(len(kind.names)))) <= {*words}
    ):
        return [None if label in (None, -1) else str(label) for label in labels]
    return [as_text(legible(label, kind)) for label in labels]


def named_answer(row: dict[str, Any], features: Features) -> dict[str, Any]:
    """A row with its choices and answer as the names of their classes, unless answers' names count their places."""
    kind, named = features.get("answer"), {"choices", "answer"} & row.keys()
    if isinstance(kind, ClassLabel) and any(kind.names == [str(n + k) for n in range(len(kind.names))] for k in (0, 1)):
        named.discard("answer")
    return row | {name: legible(row[name], features[name]) for name in named}


def label_row(row: Mapping[str, Any], words: Mapping[str, str], template: str, where: str) -> dict[str, Any]:
    """A row with a label as a row with choices: the words of every label, put into the template of a completion."""
    label = row["label"]
    if label not in words:
        raise InputError(f"{where}.label: expected one of {', '.join(words)}, got {label!r}")
    choices = [fill(template, {**row, "label": word}, f"{where}.template") for word in words.values()]
    return {**row, "choices": choices, "answer": list(words).index(label)}


def target_row(row: Mapping[str, Any], data_format: str, scorer: str, where: str) -> TargetRow:
    """One question of a target, checked."""
    if SCORERS[scorer].column == "prompt":
        question, tools = asked(row, data_format, where)
        return TargetRow(question, ("" if data_format == "text" else [],), 0, tools)
    if SCORERS[scorer].column == "completion":
        question, reference, tools = split_row(row, data_format, where)
        if scorer == "generation" and data_format != "text" and (len(reference) > 1 or "tool_calls" in reference[0]):
            raise InputError(
                f"{where}: an answer is compared as one text, and this one is more; expected scorer: loss for it"
            )
        return TargetRow(question, (reference,), 0, tools)
    if scorer == "preference":
        return preference_row(row, data_format, where)
    choices, labels = texts_and_labels(row.get("choices"))
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(text, str) and text for text in choices):
        raise InputError(f"{where}.choices: expected at least two texts, none empty, got {row.get('choices')!r}")
    if labels and len(labels) != len(choices):
        raise InputError(f"{where}.choices: expected a label for each of {len(choices)} texts, got {labels!r}")
    answer = right_choice(row.get("answer"), choices, labels, f"{where}.answer")
    prompt = in_format(row.get("prompt"), "user", data_format, f"{where}.prompt")
    answers = tuple(in_format(choice, "assistant", data_format, where) for choice in choices)
    if answers.count(answers[answer]) > 1:
        raise InputError(f"{where}.choices: the right answer occurs twice: {choices!r}")
    return TargetRow(prompt, answers, answer, tools_of(row, data_format, where))


def preference_row(row: Mapping[str, Any], data_format: str, where: str) -> TargetRow:
    """A row of (rejected, chosen) and their prompt: its column, or what both begin with, as TRL's `extract_prompt` has it."""
    prompt, tools = row.get("prompt"), tools_of(row, data_format, where)
    pair: dict[str, Any] = {}
    for name in PAIR:
        turns = pair[name] = in_format(row.get(name), "assistant", data_format, f"{where}.{name}")
        if not isinstance(turns, str) and turns[-1]["role"] != "assistant":
            raise InputError(f"{where}.{name}: expected turns of which the last is the assistant's, got {turns!r:.200}")
    chosen, rejected = pair["chosen"], pair["rejected"]
    if chosen == rejected:
        raise InputError(f"{where}: chosen and rejected are equal: {chosen!r:.200}; leave out the row")
    # A text beside whole conversations, as in UltraFeedback, is their question once more.
    whole = isinstance(prompt, str) and isinstance(row["chosen"], list) and chosen[0]["role"] != "assistant"
    if "prompt" not in row or whole:
        if data_format != "text" and isinstance(row["chosen"], str):
            raise InputError(
                f"{where}: nothing says where its prompt ends, which becomes a turn of the user here, as other rows hold "
                "messages; expected a column prompt, or chosen and rejected as messages"
            )
        if chosen[0] != rejected[0]:
            raise InputError(
                f"{where}: without a column prompt it is what chosen and rejected begin with, and they begin otherwise: "
                f"{chosen!r:.100} and {rejected!r:.100}; expected a prompt, which may be empty"
            )
        parts: dict[str, Any] = extract_prompt(pair)
        if whole and not any(str(prompt).strip() in text_of([turn]) for turn in parts["prompt"]):
            raise InputError(
                f"{where}.prompt: chosen and rejected begin with another prompt, {parts['prompt']!r:.200}; leave this one out: "
                "columns: {prompt: unused_prompt}"
            )
        prompt, chosen, rejected = parts["prompt"], parts["chosen"], parts["rejected"]
    question = in_format(prompt, "user", data_format, f"{where}.prompt")
    return TargetRow(question, (rejected, chosen), 1, tools)


def asked(row: Mapping[str, Any], data_format: str, where: str) -> tuple[Prompt, Tools]:
    """(prompt, tools) of a row that needs no answer: of messages, all up to the last turn of the user."""
    tools = tools_of(row, data_format, where)
    if row.get("messages") is None:
        return in_format(row.get("prompt"), "user", data_format, f"{where}.prompt"), tools
    turns = as_turns(row["messages"], "user", f"{where}.messages")
    while turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    if not turns:
        raise InputError(f"{where}.messages: expected a turn of the user, got {row['messages']!r:.200}")
    return turns, tools


def texts_and_labels(choices: Any) -> tuple[Any, list[Any]]:
    """(texts, labels) of choices: a list, {text: [...], label: [...]}, {label: text} or [{text, label}]; labels may be none."""
    if isinstance(choices, list) and choices and all(isinstance(choice, dict) for choice in choices):
        choices = {key: [choice.get(key) for choice in choices] for key in ("text", "label")}
    if not isinstance(choices, dict):
        return choices, []
    if isinstance(choices.get("text"), list):
        labels: Any = choices.get("label")
        return choices["text"], labels if isinstance(labels, list) and set(labels) != {None} else []
    given = {label: text for label, text in choices.items() if text is not None}  # datasets fills up what a row lacks
    return list(given.values()), list(given)


def right_choice(answer: Any, choices: Sequence[str], labels: Sequence[Any], where: str) -> int:
    """The index of the right choice, given as that, or by text, label or letter of its place; refuses what is ambiguous."""
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if isinstance(answer, str | int) and not isinstance(answer, bool):
        meant = {choices.index(answer)} if answer in choices else set()
        names = [bare(label) for label in labels]
        if not labels and not meant:
            names = [*ascii_lowercase[: len(choices)]]
            meant = {place for place, text in enumerate(choices) if bare(text) == bare(answer)}
        if names.count(bare(answer)) == 1:
            meant.add(names.index(bare(answer)))
        numbered = bool(labels) and all(isinstance(label, int) for label in labels)
        if isinstance(answer, int) and not numbered and 0 <= answer < len(choices):
            meant.add(answer)
    else:
        meant = set()
    if len(meant) == 1:
        return meant.pop()
    if meant:
        raise InputError(
            f"{where}: {answer!r} names one choice by its place or text and another by its "
            f"{f'label {list(labels)}' if labels else 'text in another letter case'}; give the text of the right choice"
        )
    raise InputError(
        f"{where}: expected the index of the right choice, 0 to {len(choices) - 1} (a number, not text), its letter, its "
        f"label, or its text, got {answer!r}"
    )


def bare(label: str | int) -> str:
    """A label or letter without what is written around it, such as (A) or b."""
    return str(label).strip(" ().:").casefold()
