"""A Hub on loopback: the endpoints that huggingface_hub speaks, over real HTTP, with repositories in memory.

`python tests/hub_server.py` serves until it is ended and prints the address to set HF_ENDPOINT to.
"""

import hashlib
import json
import re
import threading
from base64 import b64decode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}


class Repository:
    """Commits, each with all its files."""

    def __init__(self, private: bool) -> None:
        self.private = private
        self.commits: list[tuple[str, dict[str, bytes]]] = [(hashlib.sha1(b"").hexdigest(), {})]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision == "main":
            return self.commits[-1]
        return next((one for one in self.commits if one[0] == revision), None)


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
                length = int(self.headers.get("Content-Length") or 0)
                hub.answer(self, self.rfile.read(length))

            do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do  # noqa: N815

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def forget(self) -> None:
        """Makes it as it was at first."""
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.large: dict[str, bytes] = {}
        self.lfs: set[str] = set()  # digests of what was stored as a large file
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

    def answer(self, request, body: bytes) -> None:
        known = request.headers.get("Authorization") == f"Bearer {self.token}"
        parts = urlsplit(request.path)
        path = unquote(parts.path)

        def send(status: int, content=b"", **headers: str) -> None:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            request.send_response(status)
            for key, value in headers.items():
                request.send_header(key.replace("_", "-"), value)
            request.send_header("Content-Length", headers.get("Size", str(len(data))))
            request.end_headers()
            if request.command != "HEAD":
                request.wfile.write(data)

        def missing(code: str) -> None:
            send(404, {"error": code}, X_Error_Code=code, X_Error_Message=code)

        if path == "/api/whoami-v2":
            return (
                send(200, {"name": "org", "type": "user", "orgs": [], "auth": {}})
                if known
                else send(401, {"error": "who?"})
            )
        if match := re.fullmatch(r"/lfs/(\w+)", path):
            if self.broken:
                self.broken -= 1
                return send(403, {"error": "no room"})
            if hashlib.sha256(body).hexdigest() != match[1]:
                return send(400, {"error": "not these bytes"})
            self.large[match[1]] = body
            return send(200)
        if path == "/api/repos/create":
            if not known:
                return send(401, {"error": "log in"})
            given = json.loads(body)
            key = given.get("type") or "model", f"{given.get('organization') or 'org'}/{given['name']}"
            url = f"{self.address}/{'datasets/' if key[0] == 'dataset' else ''}{key[1]}"
            if key in self.repositories:
                return send(409, {"error": "it is there", "url": url})
            private = given.get("private") is True or given.get("visibility") == "private"
            self.repositories[key] = Repository(private)
            return send(200, {"url": url, "name": key[1], "id": key[1]})
        if path == "/api/validate-yaml":
            text = json.loads(body)["content"]
            found = yaml.safe_load(text.split("---")[1])
            wrong = [{"message": f"no {key}"} for key in ("license", "tags") if key not in found]
            return send(400, {"errors": wrong, "warnings": []}) if wrong else send(200, {"errors": [], "warnings": []})
        if match := re.fullmatch(r"/(?:(datasets)/)?([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            objects = []
            for one in json.loads(body)["objects"]:
                actions = (
                    {"upload": {"href": f"{self.address}/lfs/{one['oid']}"}} if one["oid"] not in self.large else {}
                )
                objects.append({**one, **({"actions": actions} if actions else {})})
            return send(200, {"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")
        if match := re.fullmatch(r"/(?:(datasets)/)?([\w.-]+/[\w.-]+)/resolve/([\w.-]+)/(.+)", path):
            repository = self.repositories.get(((match[1] and "dataset") or "model", match[2]))
            found = repository and repository.at(match[3])
            if not found or (repository.private and not known):
                return missing("RepoNotFound")
            if match[4] not in found[1]:
                return missing("EntryNotFound")
            content = found[1][match[4]]
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            if request.command == "HEAD":
                return send(200, b"", ETag=etag, X_Repo_Commit=found[0], Size=str(len(content)))
            return send(200, content, ETag=etag, X_Repo_Commit=found[0])
        if match := re.fullmatch(
            r"/api/(models|datasets)/([\w.-]+/[\w.-]+)(?:/(\w[\w-]*))?(?:/([\w.-]+))?(?:/(.*))?", path
        ):
            kind, name, action, revision, rest = match.groups()
            repository = self.repositories.get((KINDS[kind], name))
            if repository is None or (repository.private and not known):
                return missing("RepoNotFound")
            asked = (name, action, revision or "main", rest or "")
            return self.answer_for(repository, asked, body, known, send, missing)
        return missing("NotFound")

    def answer_for(self, repository, asked, body, known, send, missing) -> None:
        name, action, revision, rest = asked
        found = repository.at(revision)
        if found is None:
            return missing("RevisionNotFound")
        sha, files = found
        if action in (None, "revision"):
            siblings = [{"rfilename": path, "size": len(content)} for path, content in files.items()]
            return send(200, {"id": name, "sha": sha, "siblings": siblings, "private": repository.private, "tags": []})
        if action == "tree":
            described = [self.describe(path, content) for path, content in files.items() if path.startswith(rest)]
            if rest and not described:
                return missing("EntryNotFound")
            return send(200, described)
        if action == "paths-info":
            asked = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode()).get("paths", [])
            return send(200, [self.describe(path, files[path]) for path in asked if path in files])
        if action == "refs":
            return send(
                200,
                {
                    "branches": [{"name": "main", "ref": "refs/heads/main", "targetCommit": sha}],
                    "converts": [],
                    "tags": [],
                },
            )
        if not known:
            return send(401, {"error": "log in"})
        if action == "preupload":
            answers = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith((".safetensors", ".png")) else "regular",
                    "shouldIgnore": False,
                    "oid": self.oid(files[one["path"]]) if one["path"] in files else None,
                }
                for one in json.loads(body)["files"]
            ]
            return send(200, {"files": answers})
        if action == "commit":
            files = dict(files)
            for line in map(json.loads, body.decode().splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.large[value["oid"]]
                    self.lfs.add(value["oid"])
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            sha = hashlib.sha1(f"{sha}{body!r}".encode()).hexdigest()
            repository.commits.append((sha, files))
            return send(
                200,
                {
                    "success": True,
                    "commitUrl": f"{self.address}/{name}/commit/{sha}",
                    "commitOid": sha,
                    "hookOutput": "",
                },
            )
        return missing("NotFound")

    def oid(self, content: bytes) -> str:
        """As git, or its extension for large files, names it."""
        digest = hashlib.sha256(content).hexdigest()
        return digest if digest in self.lfs else hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def describe(self, path: str, content: bytes) -> dict:
        digest = hashlib.sha256(content).hexdigest()
        found = {
            "type": "file",
            "path": path,
            "size": len(content),
            "oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(),
        }
        return found | (
            {"lfs": {"oid": digest, "size": len(content), "pointerSize": 130}} if digest in self.lfs else {}
        )


if __name__ == "__main__":
    with Hub() as hub:
        print(f"HF_ENDPOINT={hub.address} HF_TOKEN={hub.token} HF_HUB_DISABLE_XET=1", flush=True)
        threading.Event().wait()
