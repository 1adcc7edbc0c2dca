"""A judge on loopback: chat completions over real HTTP, with a server's moods."""

import json
import re
import threading
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HANG, DRIP, DROP = "hang", "drip", "drop"  # moods: gives no answer; gives it too slowly; closes the connection


def longer(first: str, second: str) -> str:
    """The verdict of a judge that likes long answers."""
    return "tie" if len(first) == len(second) else "AB"[len(second) > len(first)]


def compared(prompt: str) -> tuple[str, str, str]:
    """(request, first answer, second answer) of what a judge is asked."""
    parts = [re.search(f"<{name}>\n(.*)\n</{name}>", prompt, re.S) for name in ("request", "answer_A", "answer_B")]
    return tuple(part[1] for part in parts)


class Judge:
    """Compares two answers by `decide`, and answers that or, while there are `moods`, something else first.

    Args:
        decide: (first answer, second answer) -> `A`, `B` or `tie`; or a whole answer of the model.
        moods: of the next requests, one each: a status, (status, headers, body), a text in place of JSON, `HANG`, `DRIP`, `DROP`.
    """

    def __init__(self, decide: Callable[[str, str], str] = longer, moods: Iterable[Any] = ()) -> None:
        self.decide, self.moods = decide, list(moods)
        self.asked: list[dict[str, Any]] = []  # bodies of all requests
        self.tokens: set[str | None] = set()
        self.busy = self.busiest = 0
        self.waited_for = False  # whether somebody had more patience than a server that hangs
        self._lock = threading.Lock()
        judge = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *arguments) -> None:
                pass

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with judge._lock:
                    judge.asked.append(body)
                    judge.tokens.add(self.headers.get("Authorization"))
                    judge.busy += 1
                    judge.busiest = max(judge.busiest, judge.busy)
                    mood = judge.moods.pop(0) if judge.moods else None
                try:
                    self.answer(body, mood)
                finally:
                    with judge._lock:
                        judge.busy -= 1

            def answer(self, body: dict[str, Any], mood: Any) -> None:
                if mood == DROP:
                    self.close_connection = True
                    return
                if mood == DRIP:
                    self.send_response(200)
                    self.send_header("Content-Length", "1000")
                    self.end_headers()
                    while not judge.released.wait(0.05):
                        self.wfile.write(b" ")
                    return
                if mood == HANG:
                    judge.waited_for |= not judge.released.wait(5)
                    self.close_connection = True
                    return
                status, headers, text = mood if isinstance(mood, tuple) else (mood, {}, "overloaded")
                if isinstance(mood, str):
                    status, text = 200, mood
                if mood is None:
                    assert self.path == "/v1/chat/completions"
                    status, said = 200, judge.decide(*compared(body["messages"][0]["content"])[1:])
                    said = f"One is better.\nVerdict: {said}" if said in ("A", "B", "tie") else said
                    text = json.dumps({"choices": [{"message": {"role": "assistant", "content": said}}]})
                data = text.encode()
                self.send_response(status)
                for name, value in (headers | {"Content-Length": str(len(data))}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

        self.released = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self) -> "Judge":
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()
