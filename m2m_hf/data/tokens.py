"""Rows as token ids, and where a completion starts."""

import json
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import takewhile
from operator import eq
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from m2m_hf.data.rows import Prompt, Tools, as_json
from m2m_hf.errors import InputError

SAMPLE = "a"  # a word without meaning, to see how what stands before an answer is read
MARK = "m2m-answer"  # in its place in a conversation


def render(
    tokenizer: PreTrainedTokenizerBase, text: Prompt, where: str, answering: bool = False, tools: Tools = None
) -> list[int]:
    """Token ids of a text, or of messages in the tokenizer's chat template.

    A text is without the end tokens that a tokenizer appends by itself. With `answering` messages end with what the template puts
    before an answer.
    """
    if isinstance(text, str):
        ids = list(tokenizer(text)["input_ids"])
        return ids[: len(ids) - appended(tokenizer)]
    return list(
        templated(tokenizer, text, where, tools, tokenize=True, return_dict=True, add_generation_prompt=answering)[
            "input_ids"
        ]
    )


def templated(
    tokenizer: PreTrainedTokenizerBase,
    messages: Prompt,
    where: str,
    tools: Tools,
    tokenize: bool = False,
    **options: Any,
) -> Any:
    """Messages in the tokenizer's chat template, which may refuse some, such as a system turn."""
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=tokenize, **options)
    except (TemplateError, TypeError) as error:  # such as `arguments` in a text where the template wants a mapping
        raise InputError(
            f"{where}: the model's chat template refuses these messages ({error}): {messages!r}"
        ) from error


@lru_cache(maxsize=8)  # asked for every text
def appended(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens, such as the end of text, the tokenizer puts behind every text by itself."""
    mask = tokenizer(SAMPLE, return_special_tokens_mask=True)["special_tokens_mask"]
    return mask[::-1].index(0) if 0 in mask else 0


def before_answer(tokenizer: PreTrainedTokenizerBase, prompt: Any, where: str, tools: Tools = None) -> list[int]:
    """Token ids of a prompt as training has them before an answer, for a model that is to answer.

    A space at the end belongs to the answer's first token. A chat template may open answers otherwise in training than
    when it asks for one, as with an empty thought. An empty prompt becomes `first_token`.
    """
    plain, text = isinstance(prompt, str), prompt
    if not plain:
        answered = [*prompt, {"role": "assistant", "content": MARK}]
        with suppress(TemplateError, TypeError):  # a template may want other fields of an answer
            text = tokenizer.apply_chat_template(answered, tools=tools, tokenize=False)
        if MARK not in text:
            return render(tokenizer, prompt, where, answering=True, tools=tools)
        text = text.rpartition(MARK)[0]  # the last: a prompt may hold the word
    ends = appended(tokenizer) if plain else 0
    sample = SAMPLE if text[-1:].isspace() and not text.endswith(" ") else ""  # lines are read otherwise before a word
    ids = list(tokenizer(text.removesuffix(" ") + sample, add_special_tokens=plain)["input_ids"])
    ids = ids[: len(ids) - ends - len(sample)]
    return ids or [first_token(tokenizer)]


def special_in(tokenizer: PreTrainedTokenizerBase, rows: Iterable[Any]) -> tuple[int, str]:
    """(how many rows hold a special token of the tokenizer in writing, one of these tokens)."""
    search = special_pattern(tokenizer).search
    found = [match for row in rows if (match := search(json.dumps(row, ensure_ascii=False, default=as_json)))]
    return len(found), found[0][0] if found else ""


def special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """The special tokens of the tokenizer, as they are written."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    tokens = map(re.escape, {*tokenizer.all_special_tokens, *added} - {""})
    return re.compile("|".join(sorted(tokens, reverse=True)) or "(?!)")


def first_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The beginning-of-text token, or the end-of-text token of models that have none: a model needs a token to go on from."""
    return int(tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id)


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: Any, completion: Any, where: str = "row", tools: Tools = None
) -> tuple[list[int], int]:
    """(token ids of prompt and completion together, where the completion starts): see `encode_choices`."""
    (ids,), start, _ = encode_choices(tokenizer, prompt, [completion], where, tools)
    return ids, start


def encode_choices(
    tokenizer: PreTrainedTokenizerBase, prompt: Any, completions: Sequence[Any], where: str = "row", tools: Tools = None
) -> tuple[list[list[int]], int, bool]:
    """(token ids of prompt and each completion together, where all completions start, whether some alone would start later).

    Of texts, or of lists of messages. As in TRL's SFTTrainer, a completion starts where the tokens of the prompt alone and of
    both together differ. So what is scored is what was trained. All start where the first of them does: a space at the end of the
    prompt belongs to the first token of some, and stands alone before others. An empty prompt becomes `first_token`.
    """
    before = render(tokenizer, prompt, where, answering=True, tools=tools)
    rows = [render(tokenizer, prompt + completion, where, tools=tools) for completion in completions]
    starts = [sum(takewhile(bool, map(eq, before, ids))) for ids in rows]
    for completion, ids, start in zip(completions, rows, starts, strict=True):
        if start == len(ids):
            raise InputError(
                f"{where}: the completion {completion!r} adds no token to its prompt, as the tokenizer reads both; leave out "
                "the row, or write it otherwise"
            )
    start, later = min(starts), len(set(starts)) > 1
    if start:
        return rows, start, later
    return [[first_token(tokenizer), *ids] for ids in rows], 1, later
