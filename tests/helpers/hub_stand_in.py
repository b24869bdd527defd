"""A stand-in of the Hub: the part of its HTTP surface that uploads and downloads of model repositories use.

Commits are kept in memory, large files as LFS objects; writing needs the token. `damage` changes what is served.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_tests"


@dataclass
class Repository:
    """Commit -> path -> content, in the order of the commits; branches and tags by name."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False

    def commit(self, files: dict[str, bytes]) -> str:
        content = repr((sorted(files), len(self.commits))).encode() + b"".join(files[name] for name in sorted(files))
        sha = hashlib.sha1(content).hexdigest()
        self.commits[sha] = files
        self.refs["main"] = sha
        return sha


class HubStandIn:
    """The repositories, the uploaded LFS objects, and what was asked for ("GET /path")."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.damage = lambda path, content: content

    def add(self, name: str, files: dict[str, bytes]) -> str:
        """Commits files to a repository, as if someone had pushed them; the hash of the commit."""
        return self.repositories.setdefault(name, Repository()).commit(files)


class _Refused(Exception):
    def __init__(self, status: int, code: str) -> None:
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubStandIn

    def log_message(self, *_):
        pass

    def _answer(self, value=None, *, status=200, body=None, headers=()):
        body = json.dumps(value).encode() if body is None else body
        self.send_response(status)
        for key, text in {
            "Content-Length": str(len(body)),
            "Content-Type": "application/json",
            **dict(headers),
        }.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _serve(self):
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        try:
            if self.command in ("POST", "PUT") and not path.startswith("/lfs/"):
                if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    raise _Refused(401, "")
            self._route(path, content)
        except _Refused as refused:
            self._answer({"error": "refused"}, status=refused.status, headers={"X-Error-Code": refused.code})

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _files(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        if (repository := self.hub.repositories.get(name)) is None:
            raise _Refused(404, "RepoNotFound")
        sha = repository.refs.get(revision, revision)
        if sha not in repository.commits:
            raise _Refused(404, "RevisionNotFound")
        return sha, repository.commits[sha]

    def _route(self, path: str, content: bytes) -> None:
        for pattern, action in (
            (r"/api/repos/create", self._create),
            (r"/api/validate-yaml", lambda _: self._answer({"errors": [], "warnings": []})),
            (r"/api/models/(\S+/\S+)/preupload/(\S+)", self._preupload),
            (r"/(\S+/\S+)\.git/info/lfs/objects/batch", self._batch),
            (r"/lfs/(\w+)", self._store),
            (r"/api/models/(\S+/\S+)/commit/(\S+)", self._commit),
            (r"/api/models/(\S+/\S+)/tree/(\S+)", self._tree),
            (r"/api/models/([^/]+/[^/]+?)(?:/revision/(\S+))?", self._info),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(\S+)", self._resolve),
        ):
            if found := re.fullmatch(pattern, path):
                return action(content, *found.groups())
        raise _Refused(404, "")

    def _create(self, content):
        asked = json.loads(content)
        name = f"{asked['organization']}/{asked['name']}"
        known = name in self.hub.repositories
        repository = self.hub.repositories.setdefault(name, Repository(private=asked.get("visibility") == "private"))
        if not known:
            repository.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        facts = {"url": f"{self.hub.endpoint}/{name}", "id": name, "name": name}
        self._answer(facts, status=409 if known else 200)

    def _preupload(self, content, name, revision):
        self._files(name, revision)
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(content)["files"]
        ]
        self._answer({"files": modes})

    def _batch(self, content, name):
        where = {one["oid"]: {"upload": {"href": f"{self.hub.endpoint}/lfs/{one['oid']}"}} for one in _objects(content)}
        self._answer({"objects": [{**one, "actions": where[one["oid"]]} for one in _objects(content)]})

    def _store(self, content, oid):
        assert hashlib.sha256(content).hexdigest() == oid
        self.hub.objects[oid] = content
        self._answer({})

    def _commit(self, content, name, revision):
        sha, files = self._files(name, revision)
        files = dict(files)
        for line in map(json.loads, content.splitlines()):
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit") not in (None, sha):
                raise _Refused(412, "")
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        new = self.hub.repositories[name].commit(files)
        url = f"{self.hub.endpoint}/{name}/commit/{new}"
        self._answer({"success": True, "commitOid": new, "commitUrl": url, "hookOutput": ""})

    def _info(self, content, name, revision=None):
        sha, files = self._files(name, revision or "main")
        facts = {"id": name, "modelId": name, "sha": sha, "private": self.hub.repositories[name].private, "tags": []}
        self._answer({**facts, "siblings": [{"rfilename": path} for path in files]})

    def _tree(self, content, name, revision):
        _, files = self._files(name, revision)
        entries = []
        for path, body in files.items():
            entry = {"type": "file", "path": path, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
            if path.endswith(".safetensors"):
                entry["lfs"] = {"oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 130}
            entries.append(entry)
        self._answer(entries)

    def _resolve(self, content, name, revision, path):
        sha, files = self._files(name, revision)
        if path not in files:
            raise _Refused(404, "EntryNotFound")
        body = self.hub.damage(path, files[path])
        etag = hashlib.sha256(files[path]).hexdigest()
        self._answer(body=body, headers={"ETag": f'"{etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"})


def _objects(content: bytes) -> list[dict]:
    return json.loads(content)["objects"]


@contextmanager
def hub_stand_in():
    """A stand-in on a free port of the loopback."""
    handler = type("Handler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.hub = HubStandIn(f"http://127.0.0.1:{server.server_port}")
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield handler.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def here(monkeypatch, cache):
    """A stand-in that huggingface_hub of this process talks to, with an empty cache and the token."""
    with hub_stand_in() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        address = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("urllib.request.getproxies", dict)
        yield hub
