"""Messages, and the tools that they call: all that a row says goes to the chat template as TRL passes it, or is refused."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from datasets import Dataset, LargeList, List
from transformers import PreTrainedTokenizerBase

from m2m_hf.data.rows import MESSAGE, Prompt, Tools
from m2m_hf.data.tokens import render
from m2m_hf.errors import InputError

LINKS = ("id", "tool_call_id")  # of messages: they say what belongs together, which the order says too
UNREAD = ("chat_template_kwargs", "image", "images")  # columns that TRL would train on
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
    """The tools of a row, a list or JSON of one; refuses what else TRL would read beside messages, and tools beside texts."""
    for name in UNREAD:
        if says_something(row.get(name)):
            raise InputError(f"{where}.{name}: a causal LM here is given no {name}; leave it out: {unused(name)}")
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


def check_shown(conversations: Iterable[tuple[str, Prompt, Tools]], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses what the chat template shows in no row: it would be lost without a word."""
    shown: set[str] = set()
    hidden: dict[str, str] = {}
    for where, messages, tools in conversations:
        assert not isinstance(messages, str)
        parts = [part for part in parts_of(messages, tools) if part not in shown]
        whole = render(tokenizer, messages, where, tools=tools) if parts else []
        for part in parts:
            try:
                rest = render(tokenizer, lacking(messages, part), where, tools=None if part == "tools" else tools)
            except InputError:  # a template that asks for it
                rest = []
            if rest != whole:
                shown.add(part)
                hidden.pop(part, None)
            else:
                hidden.setdefault(part, where)
    if hidden:
        raise InputError(
            f"{next(iter(hidden.values()))}: the model's chat template does not show {', '.join(hidden)}; neither training nor "
            "scores would know of it. Take it out of the rows, or give a template that shows it: chat_template_path"
        )


def parts_of(messages: list[dict[str, Any]], tools: Tools) -> dict[str, None]:
    """What of a conversation might be lost: its tools, the words of every role, and other fields of messages."""
    parts = {"tools": None} if tools else {}
    for turn in messages:
        if turn.get("content", "").strip():
            parts[f"turns of the role {turn['role']!r}"] = None
        parts |= {key: None for key in turn if key not in MESSAGE and says(turn, key)}
    return parts


def lacking(messages: list[dict[str, Any]], part: str) -> list[dict[str, Any]]:
    """Messages without a part of `parts_of`."""
    turns = [{key: value for key, value in turn.items() if key != part} for turn in messages]
    return [turn | {"content": ""} if part == f"turns of the role {turn['role']!r}" else turn for turn in turns]
