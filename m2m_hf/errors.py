"""The exceptions for bad input and interrupted work, and secrets that no message may show."""

import os
import re

SECRET_NAMES = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSPHRASE|PASSWD|_PASS|_PAT|_KEY)$", re.IGNORECASE)
SECRETS = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}\b|(?<=://)[^/@\s]+(?=@)"  # Hub tokens; user and password in an address, or in its query
    r"|(?<=[?&])(?:\w*(?:token|key|sig|secret|password)|X-Amz-\w+|X-Goog-\w+|signature)=[^&\s\"'<>]+",
    re.IGNORECASE,
)


class InputError(ValueError):
    """The user's input is wrong: a configuration field, a dataset, a run folder.

    The message says what was given, what was expected and what to type. The command line prints it without a traceback
    and exits with 2.
    """


class StoppedError(Exception):
    """A signal or a full disk ended the work. The input is not wrong, and no failure is recorded."""


CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # except newlines and tabs


def printable(text: str) -> str:
    """`text` for a terminal: without secrets, and with control characters escaped."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), redact(text))


def holds_secret(text: str) -> bool:
    """True if `text` contains a secret long enough to be no coincidence."""
    long = [value for name, value in os.environ.items() if len(value) >= 16 and SECRET_NAMES.search(name)]
    return bool(SECRETS.search(text)) or any(value in text for value in long)


def redact(text: str) -> str:
    """`text` without secrets: Hub tokens, credentials in addresses, and the values of variables such as WANDB_API_KEY."""
    for name, value in os.environ.items():
        if len(value) >= 8 and SECRET_NAMES.search(name):
            text = text.replace(value, "***")
    return SECRETS.sub("***", text)


def first_line(error: BaseException) -> str:
    """What an exception says, in one line; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).split("\n")[0]
