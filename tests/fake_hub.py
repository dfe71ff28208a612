"""A Hub on the loopback interface: enough of its protocol for downloads, headers by range, and a missing repository."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serving(repo_id, folder):
    """Serves `folder` as `repo_id`; yields (the address, a list that grows by (file, bytes sent) per download)."""
    sent = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments):
            pass

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

        def reply(self, status, data, body, headers):
            self.send_response(status)
            for key, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", sent
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
