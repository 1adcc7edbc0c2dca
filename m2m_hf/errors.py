"""The one exception that means: what the user gave cannot be used; and what no message may show."""

import os
import re

SECRET_NAMES = re.compile(r"(TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY)$", re.IGNORECASE)
SECRETS = re.compile(r"\bhf_[A-Za-z0-9]{16,}\b|(?<=://)[^/@\s]+(?=@)")  # Hub tokens; user and password in an address


class InputError(ValueError):
    """Something the user gave is wrong: a configuration field, a dataset, a run folder.

    The message says what was given, what was expected and what to type. The command line prints it without a traceback
    and exits with 2.
    """


def redact(text: str) -> str:
    """`text` without secrets: Hub tokens, credentials in addresses, and the values of variables such as WANDB_API_KEY."""
    for name, value in os.environ.items():
        if len(value) >= 8 and SECRET_NAMES.search(name):
            text = text.replace(value, "***")
    return SECRETS.sub("***", text)
