"""A Hub on loopback: the endpoints that huggingface_hub speaks, over real HTTP, with repositories in memory.

`python tests/hub_server.py` serves until it is ended and prints the address to set HF_ENDPOINT to.
"""

import hashlib
import json
import re
import threading
from base64 import b64decode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".png")  # files that are sent apart from the commit


class RefusedError(Exception):
    """Answered with a status and a code, by which the client tells what is missing."""

    def __init__(self, status: int, code: str, **more: str) -> None:
        self.status, self.code, self.more = status, code, more


class Repository:
    """Commits, each with all its files."""

    def __init__(self, private: bool) -> None:
        self.private = private
        self.commits: list[tuple[str, dict[str, bytes]]] = [(hashlib.sha1(b"").hexdigest(), {})]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        for sha, files in reversed(self.commits):
            if revision in ("main", sha):
                return sha, files
        raise RefusedError(404, "RevisionNotFound")


class Hub:
    """What the server knows.

    Args:
        token: what a client must send to write, and to read what is private.
    """

    def __init__(self, token: str = "hf_loopbackloopback") -> None:
        self.token = token
        self.forget()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments) -> None:
                pass

            def do(self) -> None:
                hub.requests.append(f"{self.command} {self.path}")
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                known = self.headers.get("Authorization") == f"Bearer {hub.token}"
                status, headers = 200, {}
                try:
                    content = hub.answer(unquote(urlsplit(self.path).path), body, known)
                except RefusedError as error:
                    status, content = error.status, {"error": error.code, **error.more}
                    headers = {"X-Error-Code": error.code, "X-Error-Message": error.code}
                if isinstance(content, tuple):
                    sha, content = content
                    headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": sha}
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for key, value in (headers | {"Content-Length": str(len(data))}).items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do  # noqa: N815

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def forget(self) -> None:
        """Makes it as it was at first."""
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.broken = 0  # uploads of large files that are still to fail

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.server.shutdown()
        self.server.server_close()

    def files(self, kind: str, name: str) -> dict[str, bytes]:
        return self.repositories[kind, name].commits[-1][1]

    def answer(self, path: str, body: bytes, known: bool) -> Any:
        """JSON or bytes; for a file of a repository (its commit, the file)."""
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if match := re.fullmatch(r"/lfs/(\w+)", path):
            return self.store(match[1], body)
        if path.endswith(".git/info/lfs/objects/batch"):
            return {"transfer": "basic", "objects": [self.place(one) for one in json.loads(body)["objects"]]}
        if match := re.fullmatch(r"/(datasets/)?([\w.-]+/[\w.-]+)/resolve/([\w.-]+)/(.+)", path):
            kind, name, revision, file = match.groups()
            sha, files = self.find("dataset" if kind else "model", name, known).at(revision)
            if file not in files:
                raise RefusedError(404, "EntryNotFound")
            return sha, files[file]
        if path in ("/api/whoami-v2", "/api/repos/create"):
            if not known:
                raise RefusedError(401, "log in")
            return self.create(json.loads(body)) if body else {"name": "org", "type": "user", "orgs": [], "auth": {}}
        if match := re.fullmatch(
            r"/api/(model|dataset)s/([\w.-]+/[\w.-]+)(?:/([\w-]+))?(?:/([\w.-]+))?(?:/(.*))?", path
        ):
            kind, name, action, revision, rest = match.groups()
            repository = self.find(kind, name, known)
            if action in ("preupload", "commit") and not known:
                raise RefusedError(401, "log in")
            sha, files = repository.at(revision or "main")
            if action == "commit":
                return self.commit(repository, name, body)
            if action == "preupload":
                return {"files": [self.mode(one["path"], files) for one in json.loads(body)["files"]]}
            if action == "tree":
                return [describe(one, content) for one, content in files.items() if one.startswith(rest or "")]
            if action == "paths-info":
                asked = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode()).get("paths", [])
                return [describe(one, files[one]) for one in asked if one in files]
            siblings = [{"rfilename": one, "size": len(content)} for one, content in files.items()]
            return {"id": name, "sha": sha, "siblings": siblings, "private": repository.private, "tags": []}
        raise RefusedError(404, "NotFound")

    def find(self, kind: str, name: str, known: bool) -> Repository:
        repository = self.repositories.get((kind, name))
        if repository is None or (repository.private and not known):
            raise RefusedError(404, "RepoNotFound")
        return repository

    def create(self, given: dict) -> dict:
        kind, name = given.get("type") or "model", f"{given.get('organization') or 'org'}/{given['name']}"
        url = f"{self.address}/{'datasets/' if kind == 'dataset' else ''}{name}"
        if (kind, name) in self.repositories:
            raise RefusedError(409, "it is there", url=url)
        self.repositories[kind, name] = Repository(given.get("private") is True or given.get("visibility") == "private")
        return {"url": url, "name": name, "id": name}

    def place(self, one: dict) -> dict:
        """Where to send a large file that is not known yet."""
        known = one["oid"] in self.large
        return one if known else {**one, "actions": {"upload": {"href": f"{self.address}/lfs/{one['oid']}"}}}

    def store(self, digest: str, body: bytes) -> bytes:
        if self.broken:
            self.broken -= 1
            raise RefusedError(403, "no room")
        if hashlib.sha256(body).hexdigest() != digest:
            raise RefusedError(400, "not these bytes")
        self.large[digest] = body
        return b""

    def mode(self, path: str, files: dict[str, bytes]) -> dict:
        """How to send a file, and what is there by that name."""
        about = describe(path, files[path]) if path in files else {}
        oid = about.get("lfs", about).get("oid")
        mode = "lfs" if path.endswith(LARGE) else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def commit(self, repository: Repository, name: str, body: bytes) -> dict:
        sha, files = repository.commits[-1]
        files = dict(files)
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = hashlib.sha1(f"{sha}{body!r}".encode()).hexdigest()
        repository.commits.append((sha, files))
        return {"success": True, "commitUrl": f"{self.address}/{name}/commit/{sha}", "commitOid": sha, "hookOutput": ""}


def describe(path: str, content: bytes) -> dict:
    """A file as the Hub lists it."""
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    about = {"type": "file", "path": path, "size": len(content), "oid": oid}
    if path.endswith(LARGE):
        about["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return about


if __name__ == "__main__":
    with Hub() as hub:
        print(f"HF_ENDPOINT={hub.address} HF_TOKEN={hub.token} HF_HUB_DISABLE_XET=1", flush=True)
        threading.Event().wait()
