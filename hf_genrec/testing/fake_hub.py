"""A small Hugging Face Hub on the loopback interface, for tests that must not touch the network.

It speaks enough of the protocol for the real clients (`push_to_hub`, `from_pretrained`, `upload_folder`,
`snapshot_download`, `ModelCard.push_to_hub`, the `hf` command): create and delete repositories, `preupload`, commits as
ndjson (base64 files, git-LFS files, deletions), resolve `HEAD`/`GET` with byte ranges, model info, tree, paths-info,
`whoami` and `validate-yaml`. Repositories live in memory, one branch (`main`) with its whole commit history.

`huggingface_hub` reads its settings when imported, so point a *new process* at the server::

    with FakeHub() as hub:
        subprocess.run([sys.executable, "push.py"], env=hub.environment(home=tmp_path), check=True)
        assert "config.json" in hub.files("tester/model")

Only for tests: no real authentication (any `Bearer` token is the user `tester`), nothing is kept on disk.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

USER = "tester"
TOKEN = "hf_fake_token_for_tests"
LFS_PATTERNS = ("*.safetensors", "*.parquet", "*.png")


@dataclass
class Repository:
    """One model repository: the commits in order, each a full mapping path -> content."""

    private: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)

    def commit(self, files: dict[str, bytes]) -> str:
        digest = hashlib.sha1(str(len(self.commits)).encode())
        for path in sorted(files):
            digest.update(path.encode() + hashlib.sha1(files[path]).digest())
        self.commits.append((digest.hexdigest(), dict(files)))
        return digest.hexdigest()

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision == "main":
            return self.commits[-1]
        return next((c for c in reversed(self.commits) if c[0] == revision), None)


class FakeHub:
    """A fake Hub serving on `127.0.0.1`; use as a context manager.

    Attributes:
        repositories: repository id -> `Repository`.
        requests: `(method, path)` of every request received, in order.
        fail: list of `(method, regular expression of the path, status)`; each entry fails one request.
    """

    def __init__(self, lfs_patterns: tuple[str, ...] = LFS_PATTERNS) -> None:
        self.repositories: dict[str, Repository] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self.lfs_patterns = lfs_patterns
        self.requests: list[tuple[str, str]] = []
        self.fail: list[tuple[str, str, int]] = []
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FakeHub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)

    def environment(self, home: str | os.PathLike, *, token: str | None = TOKEN) -> dict[str, str]:
        """Environment of a client process: this endpoint, an own `HF_HOME`, no Xet, no telemetry, not offline."""
        dropped = (
            "HF_HUB_OFFLINE",
            "TRANSFORMERS_OFFLINE",
            "HF_TOKEN",
            "HF_HUB_CACHE",
            "HF_XET_CACHE",
            "HF_TOKEN_PATH",
        )
        env = {key: value for key, value in os.environ.items() if key not in dropped}
        env |= {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(Path(home)),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        return env | ({"HF_TOKEN": token} if token else {})

    def files(self, repo_id: str) -> dict[str, bytes]:
        """Path -> content at the newest commit of `repo_id`."""
        return dict(self.repositories[repo_id].commits[-1][1])

    def put(self, repo_id: str, files: dict[str, bytes]) -> str:
        """Commit `files` over the newest commit (creating the repository), as an edit on the web page would."""
        with self.lock:
            repository = self.repositories.setdefault(repo_id, Repository())
            base = repository.commits[-1][1] if repository.commits else {}
            return repository.commit({**base, **files})

    def is_lfs(self, path: str, size: int) -> bool:
        return size > 0 and any(fnmatch(path, pattern) for pattern in self.lfs_patterns)

    def describe(self, path: str, content: bytes) -> dict:
        """One entry of the tree listing."""
        entry = {"type": "file", "path": path, "size": len(content), "oid": _git_oid(content)}
        if self.is_lfs(path, len(content)):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return entry


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_: object) -> None:
        """Quiet: `FakeHub.requests` is the log."""

    # -- plumbing -------------------------------------------------------------------------------------------------
    def _answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _error(self, status: int, code: str) -> None:
        self._json({"error": code}, status, {"X-Error-Code": code, "X-Error-Message": code})

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _serve(self) -> None:
        body = self._body()
        split = urlsplit(self.path)
        path, query = unquote(split.path), parse_qs(split.query)
        with self.hub.lock:
            self.hub.requests.append((self.command, path))
            for failure in self.hub.fail:
                if failure[0] == self.command and re.search(failure[1], path):
                    self.hub.fail.remove(failure)
                    return self._error(failure[2], "Injected")
            for method, pattern, function in _ROUTES:
                match = re.fullmatch(pattern, path) if method == self.command or method == "ANY" else None
                if match:
                    return function(self, body, query, **match.groupdict())
        return self._error(404, "UnknownRoute")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _repository(self, repo: str) -> Repository | None:
        """The repository if the caller may see it; otherwise answers as the Hub does and returns None."""
        repository = self.hub.repositories.get(repo)
        if repository is None or (repository.private and not self._user()):
            self._error(401 if not self._user() else 404, "RepoNotFound")
            return None
        return repository

    def _user(self) -> str | None:
        return USER if self.headers.get("Authorization", "").startswith("Bearer ") else None

    # -- account and repositories ---------------------------------------------------------------------------------
    def whoami(self, body: bytes, query: dict) -> None:
        if not self._user():
            return self._error(401, "Unauthorized")
        return self._json(
            {"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"type": "access_token"}}
        )

    def validate_yaml(self, body: bytes, query: dict) -> None:
        content = json.loads(body)["content"]
        match = re.match(r"\s*---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", content, re.DOTALL)
        try:
            valid = match is None or isinstance(yaml.safe_load(match.group(1)) or {}, dict)
        except yaml.YAMLError:
            valid = False
        if not valid:
            return self._json({"errors": [{"message": "invalid YAML metadata"}], "warnings": []}, 400)
        return self._json({"errors": [], "warnings": []})

    def create(self, body: bytes, query: dict) -> None:
        if not self._user():
            return self._error(401, "Unauthorized")
        request = json.loads(body)
        repo = f"{request.get('organization') or USER}/{request['name']}"
        answer = {"url": f"{self.hub.url}/{repo}", "name": repo, "id": repo}
        if repo in self.hub.repositories:
            return self._json({**answer, "error": "You already created this model repo"}, 409)
        private = bool(request.get("private")) or request.get("visibility") == "private"
        repository = self.hub.repositories[repo] = Repository(private=private)
        # The real Hub puts this file into every new repository.
        repository.commit({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        return self._json(answer)

    def delete(self, body: bytes, query: dict) -> None:
        request = json.loads(body)
        self.hub.repositories.pop(f"{request.get('organization') or USER}/{request['name']}", None)
        return self._json({})

    # -- writing --------------------------------------------------------------------------------------------------
    def preupload(self, body: bytes, query: dict, repo: str, rev: str) -> None:
        if not (repository := self._repository(repo)):
            return None
        current, answers = repository.commits[-1][1], []
        for entry in json.loads(body)["files"]:
            path, lfs = entry["path"], self.hub.is_lfs(entry["path"], entry["size"])
            old = current.get(path)
            oid = None if old is None else (hashlib.sha256(old).hexdigest() if lfs else _git_oid(old))
            answers.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid})
        return self._json({"files": answers})

    def lfs_batch(self, body: bytes, query: dict, repo: str) -> None:
        if not self._repository(repo):
            return None
        objects = []
        for entry in json.loads(body)["objects"]:
            answer = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self.hub.lfs_objects:
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs-upload/{entry['oid']}", "header": {}}}
            objects.append(answer)
        return self._json({"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, query: dict, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._error(400, "ChecksumMismatch")
        self.hub.lfs_objects[oid] = body
        return self._answer(200)

    def commit(self, body: bytes, query: dict, repo: str, rev: str) -> None:
        if not (repository := self._repository(repo)):
            return None
        if not self._user():
            return self._error(403, "Forbidden")
        files = dict(repository.commits[-1][1])
        for line in body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.hub.lfs_objects:
                    return self._error(400, "MissingLfsObject")
                files[value["path"]] = self.hub.lfs_objects[value["oid"]]
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    return self._error(400, "CannotDeleteMissingFile")
            elif key == "deletedFolder":
                files = {p: c for p, c in files.items() if not p.startswith(value["path"].rstrip("/") + "/")}
            elif key == "header" and value.get("parentCommit", repository.commits[-1][0]) != repository.commits[-1][0]:
                return self._error(412, "ParentCommitMismatch")
        oid = repository.commit(files)
        return self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"})

    # -- reading --------------------------------------------------------------------------------------------------
    def _snapshot(self, repo: str, rev: str) -> tuple[str, dict[str, bytes]] | None:
        if not (repository := self._repository(repo)):
            return None
        snapshot = repository.at(rev)
        if snapshot is None:
            self._error(404, "RevisionNotFound")
        return snapshot

    def info(self, body: bytes, query: dict, repo: str, rev: str | None = None) -> None:
        if not (snapshot := self._snapshot(repo, rev or "main")):
            return None
        private = self.hub.repositories[repo].private
        siblings = [{"rfilename": path} for path in sorted(snapshot[1])]
        return self._json(
            {"id": repo, "modelId": repo, "sha": snapshot[0], "private": private, "tags": [], "siblings": siblings}
        )

    def tree(self, body: bytes, query: dict, repo: str, rev: str, under: str | None = None) -> None:
        if not (snapshot := self._snapshot(repo, rev)):
            return None
        prefix = f"{under}/" if under else ""
        entries: dict[str, dict] = {}
        recursive = query.get("recursive", ["False"])[0].lower() == "true"
        for path, content in sorted(snapshot[1].items()):
            if not path.startswith(prefix):
                continue
            parts = path[len(prefix) :].split("/")
            for depth in range(1, len(parts)):
                folder = prefix + "/".join(parts[:depth])
                if recursive or depth == 1:
                    entries[folder] = {"type": "directory", "path": folder, "oid": _git_oid(folder.encode()), "size": 0}
            if recursive or len(parts) == 1:
                entries[path] = self.hub.describe(path, content)
        if prefix and not entries:
            return self._error(404, "EntryNotFound")
        return self._json(list(entries.values()))

    def paths_info(self, body: bytes, query: dict, repo: str, rev: str) -> None:
        if not (snapshot := self._snapshot(repo, rev)):
            return None
        request = json.loads(body) if body.startswith(b"{") else parse_qs(body.decode())
        return self._json([self.hub.describe(p, snapshot[1][p]) for p in request["paths"] if p in snapshot[1]])

    def resolve(self, body: bytes, query: dict, repo: str, rev: str, path: str) -> None:
        if not (snapshot := self._snapshot(repo, rev)):
            return None
        content = snapshot[1].get(path)
        if content is None:
            return self._error(404, "EntryNotFound")
        lfs = self.hub.is_lfs(path, len(content))
        etag = hashlib.sha256(content).hexdigest() if lfs else _git_oid(content)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": snapshot[0], "Accept-Ranges": "bytes"}
        headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))} if lfs else {}
        ranged = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if ranged:
            first, last = int(ranged[1]), int(ranged[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return self._answer(206, content[first : last + 1], headers)
        return self._answer(200, content, {**headers, "Content-Length": str(len(content))})

    def refs(self, body: bytes, query: dict, repo: str) -> None:
        if not (snapshot := self._snapshot(repo, "main")):
            return None
        branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": snapshot[0]}
        return self._json({"branches": [branch], "converts": [], "tags": []})


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_ROUTES = (
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("POST", r"/api/repos/create", _Handler.create),
    ("DELETE", r"/api/repos/delete", _Handler.delete),
    ("POST", rf"/api/models/{_REPO}/preupload/(?P<rev>.+)", _Handler.preupload),
    ("POST", rf"/api/models/{_REPO}/commit/(?P<rev>.+)", _Handler.commit),
    ("POST", rf"/api/models/{_REPO}/paths-info/(?P<rev>[^/]+)", _Handler.paths_info),
    ("GET", rf"/api/models/{_REPO}/tree/(?P<rev>[^/]+)(?:/(?P<under>.+))?", _Handler.tree),
    ("GET", rf"/api/models/{_REPO}/refs", _Handler.refs),
    ("GET", rf"/api/models/{_REPO}/revision/(?P<rev>[^/]+)", _Handler.info),
    ("GET", rf"/api/models/{_REPO}", _Handler.info),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs-upload/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put),
    ("GET", rf"/{_REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", _Handler.resolve),
    ("HEAD", rf"/{_REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", _Handler.resolve),
)
