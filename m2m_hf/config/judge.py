"""The entry `judge:` of a target: the server that compares answers, and what it may be asked."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import Any
from urllib.parse import urlsplit

from m2m_hf.config import checks
from m2m_hf.config.candidates import changed_options
from m2m_hf.config.checks import Rule, option, text
from m2m_hf.errors import InputError

TOKEN = "OPENAI_API_KEY"  # the environment variable
RUBRIC = "The better answer does what was asked, is correct, and says no more than it needs to."
TOKENS = ("api_key", "api_token", "auth", "authorization", "headers", "key", "password", "token")
NEEDED = "{base_url: http://localhost:8000/v1, model: NAME}"


@dataclass(frozen=True)
class JudgeConfig:
    """A model behind an OpenAI-compatible server. Its token is in the environment alone (`OPENAI_API_KEY`)."""

    base_url: str = option(text("the address of a server, such as http://localhost:8000/v1"), MISSING)
    model: str = option(text("the name of a model of the server"), MISSING)
    rubric: str = option(text("by what answers are judged"), RUBRIC)
    max_requests: int = option(checks.integer(1), 2000)  # of the target in the whole run, repeated ones included
    max_tokens: int = option(checks.integer(1), 1024)  # of what the judge writes; one that reasons needs more
    concurrency: int = option(checks.integer(1), 8)  # requests under way at once
    timeout: float = option(checks.POSITIVE, 60)  # seconds that the server has for a request

    @classmethod
    def parse(cls, entry: Any, where: str) -> "JudgeConfig":
        """Reads the mapping of the YAML."""
        rule = Rule(NEEDED, lambda value: isinstance(value, Mapping))
        checks.check_fields({"judge": entry}, {"judge": rule}, where.removesuffix(".judge"))
        for key in entry:
            if str(key).lower() in TOKENS:
                raise InputError(
                    f"{where}.{key}: a configuration holds no token, since the run folder shows it; set the environment "
                    f"variable {TOKEN}"
                )
        values = checks.read_entry(entry, checks.rules(cls), where)
        if missing := [key for key in ("base_url", "model") if key not in values]:
            raise InputError(f"{where}.{missing[0]} is missing: give {NEEDED}")
        check_address(values["base_url"], f"{where}.base_url")
        return cls(**values | {"base_url": values["base_url"].rstrip("/")})

    def to_json(self) -> dict[str, Any]:
        """The mapping that `parse` reads, without defaults."""
        return changed_options(self)


def check_address(address: str, where: str) -> None:
    """Refuses what is no plain http address; does not repeat one that may hold a token."""
    try:
        parts = urlsplit(address)
        plain = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        plain = plain and address.isprintable() and " " not in address
    except ValueError:
        raise InputError(f"{where}: expected an address such as http://localhost:8000/v1") from None
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise InputError(
            f"{where}: expected an address without user, password, ? and #, such as http://localhost:8000/v1; a token goes into "
            f"the environment variable {TOKEN}"
        )
    if not plain:
        raise InputError(f"{where}: expected an address such as http://localhost:8000/v1, got {address!r}")
