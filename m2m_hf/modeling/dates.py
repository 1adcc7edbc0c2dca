"""Chat templates that print the date: pinned to one moment, so that a run has the same rows tomorrow."""

import json
import re
from collections.abc import Callable
from datetime import datetime
from itertools import pairwise
from typing import Any

from jinja2 import Environment, TemplateSyntaxError
from trl import SFTConfig
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

CLOCK = "strftime_now"  # what templates ask for the date, Llama's for a `date_string` that they are not given
FORMAT = re.compile("%[-_0^#]?[A-Za-z]")
ANOTHER = "strftime_now: a pinned template knows the formats that it spells out; expected one of them, as a literal"


def words_of(template: str, kind: str) -> list[str]:
    """The names or the strings in a template's code, comments and text left out; none in one that is no Jinja."""
    try:
        return [str(token.value) for token in Environment().lexer.tokenize(template) if token.type == kind]
    except TemplateSyntaxError:
        return []


def is_pinned(template: str) -> bool:
    """True for a template that brings the date along."""
    return ("macro", CLOCK) in pairwise(words_of(template, "name"))


def pinned(template: str, now: datetime) -> str:
    """The template with all that it asks the clock for written in front of it; as it is, where it asks nothing."""
    if CLOCK not in words_of(template, "name") or is_pinned(template):
        return template
    dates = {text: now.strftime(text) for text in words_of(template, "string") if FORMAT.search(text)}
    known, refusal = json.dumps(dates, ensure_ascii=False), json.dumps(ANOTHER)
    macro = f"{{%- macro {CLOCK}(format) %}}{{{{ {known}.get(format) or raise_exception({refusal}) }}}}{{% endmacro %}}"
    return f"{macro}\n{template}"  # the line's end belongs to the macro: transformers renders with trim_blocks


def pin_date(tokenizer: Any, args: SFTConfig, now: datetime) -> bool:
    """Pins the date in a tokenizer's chat template; returns whether it prints one.

    TRL knows the templates that it marks for `assistant_only_loss` by their text, so that comes first.
    """

    def each(change: Callable[[str], str]) -> Any:
        given = tokenizer.chat_template
        return {name: change(one) for name, one in given.items()} if isinstance(given, dict) else change(given)

    if tokenizer.chat_template is None or each(lambda one: pinned(one, now)) == tokenizer.chat_template:
        return False
    if args.assistant_only_loss and not has_generation_markers(tokenizer.chat_template):
        tokenizer.chat_template = get_training_chat_template(tokenizer)
    tokenizer.chat_template = each(lambda one: pinned(one, now))
    return True
