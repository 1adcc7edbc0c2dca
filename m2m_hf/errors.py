"""The one exception that means: what the user gave cannot be used; and what no message may show."""

import os
import re

SECRET_NAMES = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSPHRASE|PASSWD|_PASS|_PAT|_KEY)$", re.IGNORECASE)
SECRETS = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}\b|(?<=://)[^/@\s]+(?=@)"  # Hub tokens; user and password in an address, or in its query
    r"|(?<=[?&])(?:\w*(?:token|key|sig|secret|password)|X-Amz-\w+|X-Goog-\w+|signature)=[^&\s\"'<>]+",
    re.IGNORECASE,
)


class InputError(ValueError):
    """Something the user gave is wrong: a configuration field, a dataset, a run folder.

    The message says what was given, what was expected and what to type. The command line prints it without a traceback
    and exits with 2.
    """


class StoppedError(Exception):
    """Something outside ended what was under way: a signal, a full disk. Nothing given is wrong, and nothing is written down."""


CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # all but new lines and tabs


def printable(text: str) -> str:
    """`text` as a terminal may show it: without secrets, and with characters that steer the terminal written out."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), redact(text))


def holds_secret(text: str) -> bool:
    """Whether `redact` finds something in it that is long enough to be no accident."""
    long = [value for name, value in os.environ.items() if len(value) >= 16 and SECRET_NAMES.search(name)]
    return bool(SECRETS.search(text)) or any(value in text for value in long)


def redact(text: str) -> str:
    """`text` without secrets: Hub tokens, credentials in addresses, and the values of variables such as WANDB_API_KEY."""
    for name, value in os.environ.items():
        if len(value) >= 8 and SECRET_NAMES.search(name):
            text = text.replace(value, "***")
    return SECRETS.sub("***", text)
