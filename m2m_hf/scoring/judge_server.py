"""The client of a judge: an OpenAI-compatible server (vLLM, TGI, llama.cpp, `transformers serve`). It knows nothing of models."""

import json
import os
import random
import re
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import httpx2

from m2m_hf.config.judge import TOKEN, JudgeConfig
from m2m_hf.errors import InputError, StoppedError, first_line, redact
from m2m_hf.storage.files import fingerprint
from m2m_hf.storage.judgements import FIRST, NONE, SECOND, TIE, Judgements

TRIES = 6  # of a request that the server does not answer
BACKOFF = 0.5  # seconds before the second one, doubled each time
PATIENCE = 300.0  # seconds: the longest `Retry-After` that is waited for
GRACE = 3.0  # seconds that requests under way have after Ctrl-C
MOST_BYTES = 1 << 22  # of a response
SHOWN = 300  # characters of a response in a message
KEPT = 4000  # characters of what a judge wrote, its end
ENOUGH = 20  # answers without a verdict, before they are given up early
UNUSABLE = 0.1  # the share of answers without a verdict from which on nothing is scored
VERDICT = re.compile(r"(?im)^[\W_]*verdict[\W_]*(A|B|tie)[\W_]*$")
THOUGHT = re.compile(r"(?s)^.*</think>")
REMINDER = "\n\nWrite the last line alone: Verdict: A, Verdict: B or Verdict: tie."
SAYS = {"a": FIRST, "b": SECOND, "tie": TIE}


class EndedError(Exception):
    """Another thread has met what ends all of them."""


def verdict_in(reply: str) -> str | None:
    """The verdict of the last line that holds one, outside a thought."""
    found = VERDICT.findall(THOUGHT.sub("", reply))
    return SAYS[found[-1].lower()] if found else None


class JudgeServer:
    """Asks a server for verdicts: several requests at once, each pair once, no more than `max_requests` in the whole run.

    Args:
        path: the log of all requests and verdicts.
        where: the target, for messages.
    """

    def __init__(self, config: JudgeConfig, path: Path, where: str) -> None:
        self.config, self.path, self.where = config, path, f"{where}.judge"
        self._not_before = 0.0  # when the server may be asked again

    @cached_property
    def log(self) -> Judgements:
        return Judgements(self.path)

    def key(self, prompt: str) -> str:
        """Identifies everything that a verdict depends on."""
        return fingerprint([self.config.model, self.config.max_tokens, REMINDER, VERDICT.pattern, prompt])

    def verdicts(self, prompts: Sequence[str]) -> list[str]:
        """The verdict on every prompt; the server is asked for those that the log does not hold.

        Raises:
            StoppedError: the limit is reached, or the server does not answer; what was answered is kept.
            InputError: the server refuses the requests, or its model gives too few verdicts.
        """
        known = self.log.verdicts
        asked = {prompt: self.key(prompt) for prompt in prompts}
        if missing := {key: prompt for prompt, key in asked.items() if key not in known}:
            self._ask_all(missing)
        self._refuse_unusable(list(asked.values()))
        return [known[asked[prompt]] for prompt in prompts]

    def _refuse_unusable(self, keys: Sequence[str], enough: int = 1) -> None:
        """Refuses a judge of whose answers too many hold no verdict."""
        said = [says for key in keys if (says := self.log.verdicts.get(key))]
        if (none := said.count(NONE)) >= enough and none > UNUSABLE * len(said):
            raise InputError(
                f"{self.where}: {none} of {len(said)} answers of {self.config.model} hold no verdict, though asked "
                f"twice; expected at most {UNUSABLE:.0%}. {self.path} has what it wrote: raise max_tokens where it was cut off, "
                "else take another model, and give the target another name"
            )

    def _ask_all(self, missing: dict[str, str]) -> None:
        """Asks for verdicts, by key, in threads that end with this process."""
        todo: SimpleQueue[str] = SimpleQueue()
        ended: SimpleQueue[BaseException | None] = SimpleQueue()
        stop, client = threading.Event(), self._client()
        for key in missing:
            todo.put(key)

        def work() -> None:
            error: BaseException | None = None
            try:
                while not stop.is_set():
                    key = todo.get_nowait()
                    if self._ask(client, stop, key, missing[key]) == NONE:
                        self._refuse_unusable(list(missing), ENOUGH)
            except Empty:
                pass
            except BaseException as met:
                error = met
            ended.put(error)

        threads = [
            threading.Thread(target=work, daemon=True) for _ in range(min(self.config.concurrency, len(missing)))
        ]
        for thread in threads:
            thread.start()
        errors = []
        try:
            for _ in threads:
                if (error := ended.get()) is not None:
                    errors.append(error)
                    stop.set()  # the others end with what they have asked already
        finally:  # after Ctrl-C too, when what is under way has a moment to end
            stop.set()
            end = time.monotonic() + GRACE
            for thread in threads:
                thread.join(max(0.0, end - time.monotonic()))
        client.close()
        if errors:
            raise errors[0]

    def _client(self) -> httpx2.Client:
        token = os.environ.get(TOKEN, "").strip()
        if not (token.isascii() and token.isprintable()) or " " in token:
            raise InputError(f"{TOKEN}: expected a token, and it holds characters that no token has")
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        headers |= {"Authorization": f"Bearer {token}"} if token else {}
        limits = httpx2.Limits(max_connections=self.config.concurrency)
        return httpx2.Client(headers=headers, timeout=self.config.timeout, limits=limits, follow_redirects=False)

    def _ask(self, client: httpx2.Client, stop: threading.Event, key: str, prompt: str) -> str:
        """Asks for one verdict, a second time where the first answer holds none, and keeps it."""
        says, reply = None, ""
        for text in (prompt, prompt + REMINDER):
            reply = self._send(client, stop, key, text)
            if says := verdict_in(reply):
                break
        self.log.verdict(key, says or NONE, self._clean(reply)[-KEPT:])
        return says or NONE

    def _send(self, client: httpx2.Client, stop: threading.Event, key: str, text: str) -> str:
        """What the model answers; tries again where the server is busy, broken or out of reach."""
        problem = ""
        for number in range(TRIES):
            self._wait(stop, self._not_before - time.monotonic())
            if not self.log.request(key, self.config.max_requests):
                raise StoppedError(
                    f"{self.where}.max_requests: all {self.config.max_requests:,} requests are spent, and more are needed. "
                    f"What was answered is kept in {self.path}; raise max_requests to go on"
                )
            asked = 0.0
            try:
                status, headers, body = self._post(client, text)
            except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
                self.log.unsent(key)
                problem = f"it cannot be reached: {self._shown(first_line(error))}"
            except httpx2.RequestError as error:
                problem = f"{type(error).__name__}: {self._shown(first_line(error))}"
            else:
                if status == 200 and (reply := reply_of(body)) is not None:
                    return reply
                problem = "no chat completion: " if status == 200 else f"status {status}: "
                problem += self._shown(body.decode(errors="replace"))
                if status != 200 and status not in (408, 429) and status < 500:
                    raise InputError(
                        f"{self.where}: {self.config.base_url} refuses {self._hint(status, headers)}{problem}"
                    )
                asked = wait_asked_for(headers)
            if asked > PATIENCE:
                problem += f", and it asks to wait {asked:,.0f} s"
                break
            if asked:
                self._not_before = max(self._not_before, time.monotonic() + asked)
            if number + 1 < TRIES:
                self._wait(stop, BACKOFF * 2**number * random.uniform(0.5, 1.5))
        raise StoppedError(
            f"{self.where}: {self.config.base_url} gave no answer, asked {number + 1} times ({problem}). What was "
            f"answered is kept in {self.path}"
        )

    def _wait(self, stop: threading.Event, seconds: float) -> None:
        if stop.wait(max(0.0, seconds)):
            raise EndedError

    def _post(self, client: httpx2.Client, text: str) -> tuple[int, httpx2.Headers, bytes]:
        """(status, headers, content) of a response; the time and size of all of it are bounded."""
        asked = {
            "model": self.config.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": self.config.max_tokens,
            "stream": False,
        }
        end, body = time.monotonic() + self.config.timeout, b""
        with client.stream(
            "POST", f"{self.config.base_url}/chat/completions", content=json.dumps(asked).encode()
        ) as response:
            for part in response.iter_raw():
                body += part
                if len(body) > MOST_BYTES:
                    raise httpx2.ReadError(f"a response of more than {MOST_BYTES:,} bytes")
                if time.monotonic() > end:
                    raise httpx2.ReadTimeout(f"the response was not complete after {self.config.timeout:g} s")
            return response.status_code, response.headers, body

    def _hint(self, status: int, headers: httpx2.Headers) -> str:
        """What to do about a request that is refused."""
        if status in (401, 403):
            there = "is not accepted" if os.environ.get(TOKEN) else "is not set"
            return f"the request, and the token in the environment variable {TOKEN} {there}; "
        if 300 <= status < 400:
            place = self._shown(headers.get("Location", "elsewhere"))
            return f"to answer and leads to {place}, where no token is sent; give that address as base_url if it is yours; "
        if status == 404:
            return "the request: is the model's name right, and does base_url end as the server's page says, often in /v1? "
        return "the request; "

    def _shown(self, text: str) -> str:
        """A server's words, short and without secrets."""
        return " ".join(self._clean(text).split())[:SHOWN] or "nothing"

    def _clean(self, text: str) -> str:
        token = os.environ.get(TOKEN, "").strip()
        return redact(text.replace(token, "***") if token else text)


def reply_of(body: bytes) -> str | None:
    """What the model wrote, by the JSON of a response; None if it is no chat completion."""
    try:
        message: dict[str, Any] = json.loads(body)["choices"][0]["message"]
        content = message.get("content")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return content if isinstance(content, str) else ""  # none where it has only thought


def wait_asked_for(headers: httpx2.Headers) -> float:
    """The seconds of `Retry-After`, which may also be a date; 0 without one."""
    given = headers.get("Retry-After", "")
    with suppress(ValueError, TypeError):
        return max(0.0, float(given))
    with suppress(ValueError, TypeError):
        when = parsedate_to_datetime(given)
        return max(0.0, ((when if when.tzinfo else when.replace(tzinfo=UTC)) - datetime.now(UTC)).total_seconds())
    return 0.0
