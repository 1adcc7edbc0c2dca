"""Thoughts in answers, which are not rated."""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from m2m_hf.config.targets import marks
from m2m_hf.data.tokens import special_pattern

END = 64  # tokens of a prompt in which its last mark is


class Thoughts:
    """Takes thoughts out of answers.

    Args:
        strip: the marks around a thought, such as `<think>…</think>`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strip: str) -> None:
        self._tokenizer, (self.open, self.close) = tokenizer, marks(strip)
        self._special = special_pattern(tokenizer)

    def text(self, prompt: Sequence[int], answer: Sequence[int]) -> str:
        """An answer's text without thoughts and special tokens, of which the marks may be some.

        A thought that has no end, because the answer was cut off, reaches to the end of the answer. One may begin at the end of
        the prompt, where the chat template opens it, or without a mark.
        """
        text: str = self._tokenizer.decode(answer, skip_special_tokens=False)
        begins = self._tokenizer.decode(prompt[-END:]).rstrip().endswith(self.open)
        ahead, found, rest = text.partition(self.close)
        if begins or (found and self.open not in ahead):
            text = rest
        kept = re.sub(f"{re.escape(self.open)}.*?({re.escape(self.close)}|$)", "", text, flags=re.DOTALL)
        return self._special.sub("", kept)
