"""Messages, and the tools that they call: all that a row says goes to the chat template as TRL passes it, or is refused."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from datasets import Dataset, LargeList, List
from transformers import PreTrainedTokenizerBase

from m2m_hf.data.rows import MESSAGE, Tools
from m2m_hf.data.tokens import templated
from m2m_hf.errors import InputError

LINKS = ("id", "tool_call_id")  # of messages: they say what belongs together, which the order says too
REMEDY = "Take it out of the rows, or give a template that shows it: chat_template_path"
# Columns that others train on, or that belong to a conversation.
UNREAD = ("chat_template_kwargs", "image", "images", "system", "history", "functions", "conversations")
ROLES = {  # `from` of a ShareGPT message -> its role
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}


def rows_of(rows: Dataset) -> Iterator[dict[str, Any]]:
    """Rows without the nulls by which Arrow fills up its structs."""
    for row in rows:
        yield {name: without_nulls(value, rows.features[name]) for name, value in row.items()}


def without_nulls(value: Any, feature: Any) -> Any:
    if isinstance(feature, dict) and isinstance(value, dict):
        return {key: without_nulls(inner, feature[key]) for key, inner in value.items() if inner is not None}
    if isinstance(feature, (List, LargeList)) and isinstance(value, list):
        return [without_nulls(inner, feature.feature) for inner in value]
    return value


def says_something(value: Any) -> bool:
    return value is not None and value not in ("", [], {})


def tools_of(row: Mapping[str, Any], data_format: str, where: str) -> Tools:
    """The tools of a row, a list or JSON of one; refuses tools beside texts."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise InputError(
                f"{where}.tools: expected a list of tools, as JSON, got {tools!r:.200} ({error})"
            ) from error
    if not says_something(tools):
        return None
    if data_format == "text":
        raise InputError(
            f"{where}.tools: tools go to a chat template, and these rows are texts; bring messages, or "
            f"leave it out: {unused('tools')}"
        )
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InputError(f"{where}.tools: expected a list of tools, each a mapping, got {tools!r:.200}")
    return tools


def unused(column: str) -> str:
    return f"columns: {{{column}: unused_{column}}}"


def as_turns(text: Any, role: str, where: str) -> list[dict[str, Any]]:
    """A text as one turn of `role`; messages with all their fields, those of ShareGPT renamed."""
    if isinstance(text, str):
        text = [{"role": role, "content": text.strip()}]
    if not isinstance(text, list) or not text:
        raise InputError(f"{where}: expected a list of messages, got {text!r}")
    return [as_turn(message, where) for message in text]


def as_turn(message: Any, where: str) -> dict[str, Any]:
    """A message without its nulls, as transformers passes it on; refuses one without a role, or that says nothing."""
    turn = {key: value for key, value in message.items() if value is not None} if isinstance(message, dict) else {}
    if "from" in turn and "role" not in turn:
        turn = from_sharegpt(turn, where)
    others = [key for key in turn if key not in MESSAGE]
    content = turn.get("content", "" if others else None)
    if not isinstance(turn.get("role"), str) or not isinstance(content, str):
        raise InputError(f"{where}: expected messages of {{role, content}}, both text, got {message!r}")
    if turn["role"] == "assistant" and not content.strip() and not any(says(turn, key) for key in others):
        raise InputError(f"{where}: expected text, or tool_calls, got an empty turn of the assistant: {message!r}")
    return turn


def says(turn: Mapping[str, Any], key: str) -> bool:
    """True if a field of a message is more than a link, and not empty."""
    linked = key in LINKS or (key == "name" and turn["role"] == "tool")
    return not linked and says_something(turn[key])


def from_sharegpt(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A message of {from, value} as one of {role, content}; a `function_call` is JSON of one call, or of several."""
    if turn["from"] not in ROLES:
        raise InputError(f"{where}: expected from: {', '.join(ROLES)}, got {turn['from']!r}")
    others = {key: value for key, value in turn.items() if key not in ("from", "value")}
    changed = {"role": ROLES[turn["from"]], "content": turn.get("value"), **others}
    if turn["from"] != "function_call":
        return changed
    try:
        calls = json.loads(turn["value"])
        calls = calls if isinstance(calls, list) else [calls]
        functions = [{"name": call["name"], "arguments": call["arguments"]} for call in calls]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{where}: expected a function_call of JSON, {{name, arguments}}, got {turn.get('value')!r:.200}"
        ) from error
    return {**changed, "content": "", "tool_calls": [{"type": "function", "function": call} for call in functions]}


def check_shown(
    rows: Iterable[tuple[str, list[dict[str, Any]], Tools, int]], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Refuses what the chat template leaves out of (where, messages, tools, from where on the assistant's turns are learned).

    Of turns before, it may leave out some words, such as earlier thoughts, and fields that it shows elsewhere.
    """
    shown: set[tuple[str, str]] = set()
    hidden: dict[tuple[str, str], str] = {}
    for where, messages, tools, first in rows:
        whole = templated(tokenizer, messages, where, tools)
        spoken, lost = squeezed(whole), []
        for part, turn, key in parts_of(messages, tools):
            learned = turn is not None and turn >= first and messages[turn]["role"] == "assistant"
            words = words_of(tools if turn is None else messages[turn][key])
            missing = [word for word in words if squeezed(word) not in spoken]
            loose = turn is not None and key != "content" and not learned
            if part in shown and (loose or not missing):
                continue
            try:
                less = lacking(messages, turn, key)
                rest = templated(tokenizer, less, where, None if turn is None else tools)
            except InputError:  # a template that asks for it
                rest = ""
            if rest != whole:
                shown.add(part)
            elif loose:
                hidden.setdefault(part, where)
            if learned and missing and rest != whole:
                raise InputError(
                    f"{where}: the model's chat template shows only some words of {part[0]}: {missing[0]!r:.200}; neither "
                    f"training nor scores would know of the rest. {REMEDY}"
                )
            lost += [part[0]] if rest == whole and not loose else []
        if lost:
            raise not_shown(where, lost + [part[0] for part, place in hidden.items() if place == where])
    for part, where in hidden.items():
        if part not in shown:
            raise not_shown(where, [part[0]])


def not_shown(where: str, parts: Iterable[str]) -> InputError:
    names = ", ".join(dict.fromkeys(parts))
    return InputError(
        f"{where}: the model's chat template does not show {names}; neither training nor scores would know of it. {REMEDY}"
    )


def parts_of(messages: list[dict[str, Any]], tools: Tools) -> Iterator[tuple[tuple[str, str], int | None, str]]:
    """What of a conversation might be lost: ((what, the role before), the number of its turn if it is of one, its key)."""
    if tools:
        yield ("tools", ""), None, ""
    before = ""
    for number, turn in enumerate(messages):
        if turn.get("content", "").strip():
            yield (f"turns of the role {turn['role']!r}", before), number, "content"
        yield from (((key, ""), number, key) for key in turn if key not in MESSAGE and says(turn, key))
        before = turn["role"]


def words_of(value: Any) -> list[str]:
    """What a template that shows a part must have: its text, or the names of tools or calls."""
    if isinstance(value, str):
        return [value]
    functions = [one.get("function", one) for one in value if isinstance(one, dict)] if isinstance(value, list) else []
    return [one["name"] for one in functions if isinstance(one, dict) and isinstance(one.get("name"), str)]


def squeezed(text: str) -> str:
    return "".join(text.split())


def lacking(messages: list[dict[str, Any]], number: int | None, key: str) -> list[dict[str, Any]]:
    """Messages without a part of `parts_of`."""
    if number is None:
        return messages
    turn = {name: value for name, value in messages[number].items() if name != key}
    return [*messages[:number], turn | ({"content": ""} if key == "content" else {}), *messages[number + 1 :]]
