"""Rows as token ids, and where a completion starts."""

from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from m2m_hf.data.rows import Prompt, Tools
from m2m_hf.errors import InputError


def render(
    tokenizer: PreTrainedTokenizerBase, text: Prompt, where: str, answering: bool = False, tools: Tools = None
) -> list[int]:
    """Token ids of a text, or of messages in the tokenizer's chat template.

    With `answering` they end with what the template puts before an answer. A template may refuse messages, such as a system turn.
    """
    if isinstance(text, str):
        return list(tokenizer(text)["input_ids"])
    try:
        rendered = tokenizer.apply_chat_template(
            text, tools=tools, tokenize=True, return_dict=True, add_generation_prompt=answering
        )
    except (TemplateError, TypeError) as error:  # such as `arguments` in a text where the template wants a mapping
        raise InputError(f"{where}: the model's chat template refuses these messages ({error}): {text!r}") from error
    return list(rendered["input_ids"])


def first_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The beginning-of-text token, or the end-of-text token of models that have none: a model needs a token to go on from."""
    return int(tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id)


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: Any, completion: Any, where: str = "row", tools: Tools = None
) -> tuple[list[int], int]:
    """(token ids of prompt and completion together, where the completion starts), of two texts or two lists of messages.

    As in TRL's SFTTrainer, the completion starts where the tokens of the prompt alone and of both together differ. So what is
    scored is what was trained. An empty prompt becomes `first_token`.
    """
    whole = prompt + completion
    before = render(tokenizer, prompt, where, answering=True, tools=tools)
    ids = render(tokenizer, whole, where, tools=tools)
    start = 0
    while start < min(len(before), len(ids)) and before[start] == ids[start]:
        start += 1
    if start == len(ids):
        raise InputError(f"{where}: the completion {completion!r} adds no token to its prompt")
    return (ids, start) if start else ([first_token(tokenizer), *ids], 1)
