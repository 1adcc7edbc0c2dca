"""Rows as token ids, and where a completion starts."""

from collections.abc import Iterator

from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from m2m_hf.data.rows import Prompt, as_turns
from m2m_hf.errors import InputError


def render(tokenizer: PreTrainedTokenizerBase, text: Prompt, where: str, answering: bool = False) -> list[int]:
    """Token ids of a text, or of messages in the tokenizer's chat template.

    Args:
        answering: end with what the template puts before an answer.

    Raises:
        InputError: messages that the template refuses (a system turn, two user turns in a row, ...).
    """
    if isinstance(text, str):
        return list(tokenizer(text)["input_ids"])
    try:
        rendered = tokenizer.apply_chat_template(text, tokenize=True, return_dict=True, add_generation_prompt=answering)
    except TemplateError as error:
        raise InputError(f"{where}: the model's chat template refuses these messages ({error}): {text!r}") from error
    return list(rendered["input_ids"])


def first_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The beginning-of-text token, or the end-of-text token of models that have none: a model needs a token to go on from."""
    return int(tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id)


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: Prompt, where: str = "row"
) -> tuple[list[int], int]:
    """(token ids of prompt and completion together, where the completion starts).

    As in TRL's SFTTrainer, the completion starts where the tokens of the prompt alone and of both together differ. So what is
    scored is what was trained. An empty prompt becomes `first_token`.

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
    return (ids, start) if start else ([first_token(tokenizer), *ids], 1)


def token_lengths(rows: Dataset, tokenizer: PreTrainedTokenizerBase, where: str) -> Iterator[tuple[int, int]]:
    """(where the completion starts, number of tokens) of every training row, before truncation.

    A conversation that trains on all assistant turns counts as starting at 0. Plain text gets the end-of-text token that TRL
    appends.
    """
    for number, row in enumerate(rows, start=1):
        if "messages" in row:
            yield 0, len(render(tokenizer, row["messages"], f"{where}, row {number}"))
        else:
            ids, start = encode(tokenizer, row["prompt"], row["completion"], f"{where}, row {number}")
            yield start, len(ids) + isinstance(row["completion"], str)
