"""A Hub on the loopback interface: enough of its protocol for downloads, ranges, a missing repository, and uploads."""

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serving(repo_id, folder):
    """Serves `folder` as `repo_id`; yields (the address, a list that grows by (file, bytes sent) per download)."""
    sent = []

    class Handler(_Handler):
        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body):
            path = self.path.split("?")[0].removeprefix("/")
            if path.startswith(f"api/models/{repo_id}/tree/"):
                files = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "0" * 40} for p in folder.iterdir()]
                return self.reply(200, json.dumps(files).encode(), body, {"Content-Type": "application/json"})
            if path.startswith(f"api/models/{repo_id}"):
                info = {"id": repo_id, "sha": COMMIT, "siblings": [{"rfilename": p.name} for p in sorted(folder.iterdir())]}
                return self.reply(200, json.dumps(info).encode(), body, {"Content-Type": "application/json"})
            file = folder / path.rpartition("/")[2]
            if not path.startswith(f"{repo_id}/resolve/") or not file.is_file():
                code = "EntryNotFound" if path.startswith(repo_id) else "RepoNotFound"
                return self.reply(404, b"", body, {"X-Error-Code": code})
            data = file.read_bytes()
            headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            status = 200
            if wanted := self.headers.get("Range"):
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                end = min(int(last) + 1 if last else len(data), len(data))
                headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(data)}"
                data, status = data[int(first) : end], 206
            if body:
                sent.append((file.name, len(data)))
            return self.reply(status, data, body, headers)

    with _running(Handler) as address:
        yield address, sent


@dataclass
class Repository:
    """What was pushed: its visibility, its files, and how many commits there are."""

    private: bool
    files: dict = field(default_factory=lambda: {".gitattributes": b"*.safetensors filter=lfs"})
    commits: int = 1

    @property
    def sha(self):
        return f"{self.commits:040x}"


@dataclass
class Pushed:
    """The state of a Hub that takes uploads.

    failing: routes that refuse, with a message; when: called with the name of each route that is asked.
    """

    repositories: dict = field(default_factory=dict)
    token: str = "hf_aVerySecretToken"
    role: str = "write"
    failing: set = field(default_factory=set)
    when: Callable = lambda route: None
    requests: list = field(default_factory=list)
    blobs: dict = field(default_factory=dict)
    ignoring: set = field(default_factory=set)  # names that a .gitignore there keeps out


@contextmanager
def taking(hub):
    """A Hub that alice, of the organisation lab, may push to (xet switched off: LFS); yields its address.

    What arrives is in `hub`. Every request but those to storage has to carry the token.
    """

    class Handler(_Handler):
        def do_GET(self):
            self.route()

        def do_POST(self):
            self.route()

        def do_PUT(self):
            self.route()

        def route(self):
            path = self.path.partition("?")[0].removeprefix("/")
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = self.chunks()
            for name, pattern in ROUTES.items():
                if found := re.fullmatch(pattern, path):
                    hub.requests.append(name)
                    hub.when(name)
                    if name in hub.failing:
                        return self.say(403, {"error": f"no {name} today"})
                    if name != "put" and self.headers.get("Authorization") != f"Bearer {hub.token}":
                        return self.say(401, {"error": "Invalid credentials in Authorization header"})
                    return getattr(self, name)(body, *found.groups())
            return self.say(404, {"error": f"no route for {path}"})

        def whoami(self, body):
            auth = {"type": "access_token", "accessToken": {"role": hub.role}}
            self.say(200, {"name": "alice", "type": "user", "orgs": [{"name": "lab"}], "auth": auth})

        def info(self, body, repo_id):
            if repo_id not in hub.repositories:
                return self.say(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            it = hub.repositories[repo_id]
            files = [{"rfilename": name} for name in it.files]
            return self.say(200, {"id": repo_id, "sha": it.sha, "private": it.private, "siblings": files})

        def create(self, body):
            asked = json.loads(body)
            repo_id = f"{asked['organization']}/{asked['name']}"
            if repo_id in hub.repositories:
                return self.say(409, {"error": "You already created this model repo", "url": f"{address}/{repo_id}"})
            # Releases of huggingface_hub differ in how they say it; a Hub that is told nothing makes it public.
            hub.repositories[repo_id] = Repository(asked.get("visibility") == "private" or asked.get("private") is True)
            return self.say(200, {"url": f"{address}/{repo_id}", "name": repo_id})

        def validate(self, body):
            assert json.loads(body)["content"].startswith("---\n")
            self.say(200, {"warnings": [], "errors": []})

        def preupload(self, body, repo_id):
            def mode(name):
                return "lfs" if name.endswith(".safetensors") else "regular"

            names = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": n, "uploadMode": mode(n), "shouldIgnore": n in hub.ignoring} for n in names]
            self.say(200, {"files": files})

        def batch(self, body, repo_id):
            objects = json.loads(body)["objects"]
            for one in objects:
                if one["oid"] not in hub.blobs:
                    one["actions"] = {"upload": {"href": f"{address}/storage/{one['oid']}"}}
            self.say(200, {"transfer": "basic", "objects": objects})

        def put(self, body, oid):
            assert hashlib.sha256(body).hexdigest() == oid
            hub.blobs[oid] = body
            self.say(200, {})

        def commit(self, body, repo_id):
            it = hub.repositories[repo_id]
            lines = [json.loads(line) for line in body.splitlines()]
            if lines[0]["value"].get("parentCommit", it.sha) != it.sha:
                return self.say(412, {"error": "A commit has happened since"})
            for line in lines[1:]:
                value = line["value"]
                if line["key"] == "deletedFile":
                    del it.files[value["path"]]
                elif line["key"] == "lfsFile":
                    it.files[value["path"]] = hub.blobs[value["oid"]]
                else:
                    it.files[value["path"]] = base64.b64decode(value["content"])
            it.commits += 1
            return self.say(200, {"commitUrl": f"{address}/{repo_id}/commit/{it.sha}", "commitOid": it.sha})

        def tree(self, body, repo_id, revision):
            it = hub.repositories[repo_id]
            assert revision == it.sha
            files = [{"type": "file", "path": n, "size": len(data), "oid": "0" * 40} for n, data in it.files.items()]
            self.say(200, files)

        def say(self, status, value, headers=None):
            self.reply(status, json.dumps(value).encode(), True, {"Content-Type": "application/json", **(headers or {})})

    with _running(Handler) as address:
        yield address


ROUTES = {
    "whoami": "api/whoami-v2",
    "create": "api/repos/create",
    "validate": "api/validate-yaml",
    "preupload": r"api/models/([\w.-]+/[\w.-]+)/preupload/main",
    "commit": r"api/models/([\w.-]+/[\w.-]+)/commit/main",
    "tree": r"api/models/([\w.-]+/[\w.-]+)/tree/(\w+)",
    "info": r"api/models/([\w.-]+/[\w.-]+)",
    "batch": r"([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch",
    "put": r"storage/(\w+)",
}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def chunks(self):
        """A body of unknown length."""
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def reply(self, status, data, body, headers):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


class _Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        """Says nothing of a client that went away, which is what a stopped upload does.

        A traceback printed from this thread would also break a test that is in ast.parse at that moment (CPython issue 106905).
        """
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def _running(handler):
    """Serves in a thread of its own; yields the address."""
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
