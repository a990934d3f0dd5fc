"""A fake of the Hugging Face Hub's API, as far as uploading small files needs it: repositories, upload modes,
LFS by single PUTs, commits. It keeps what it was sent."""

import base64
import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_fake"


class FakeHub:
    """repos: private or not, by name. files: committed ones, by repository and path. asked: (method,
    path)."""

    def __init__(self):
        self.repos, self.files, self.objects, self.asked = {}, {}, {}, []

    def answer(self, method, path, body, endpoint):
        """(status, JSON) of a request that carries the token."""
        self.asked.append((method, path))
        if path == "/api/repos/create":
            wanted = json.loads(body)
            repo = "/".join(part for part in (wanted.get("organization"), wanted["name"]) if part)
            if repo in self.repos:
                return 409, {"error": "exists", "url": f"{endpoint}/{repo}"}
            self.repos[repo] = wanted.get("visibility") == "private" or bool(wanted.get("private"))
            return 200, {"url": f"{endpoint}/{repo}", "name": repo}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if method == "PUT":
            self.objects[path.rpartition("/")[2]] = body
            return 200, {}
        if path.endswith("/info/lfs/objects/batch"):
            return 200, {
                "transfer": "basic",
                "objects": [_lfs(o, endpoint) for o in json.loads(body)["objects"]],
            }
        repo = "/".join(path.split("/")[3:5])
        if path.endswith("/preupload/main"):
            modes = [_mode(file["path"]) for file in json.loads(body)["files"]]
            return 200, {"files": modes}
        if path.endswith("/commit/main"):
            return 200, self._commit(repo, [json.loads(line) for line in body.splitlines()], endpoint)
        return 200, {"id": repo, "private": self.repos[repo], "siblings": [], "tags": []}

    def _commit(self, repo, rows, endpoint):
        files = self.files.setdefault(repo, {})
        for row in rows:
            if row["key"] == "file":
                files[row["value"]["path"]] = base64.b64decode(row["value"]["content"])
            if row["key"] == "lfsFile":
                files[row["value"]["path"]] = self.objects[row["value"]["oid"]]
        return {"success": True, "commitOid": "c0ffee", "commitUrl": f"{endpoint}/{repo}/commit/c0ffee"}


def _mode(path):
    is_large = path.endswith(".safetensors")
    return {"path": path, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}


def _lfs(wanted, endpoint):
    upload = {"href": f"{endpoint}/lfs/{wanted['oid']}", "header": {}}
    return {
        "oid": wanted["oid"],
        "size": wanted["size"],
        "authenticated": True,
        "actions": {"upload": upload},
    }


@contextlib.contextmanager
def served():
    """A fake hub and its address."""
    hub = FakeHub()

    class _Requests(BaseHTTPRequestHandler):
        def _serve(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            may = self.command == "PUT" or self.headers.get("Authorization") == f"Bearer {TOKEN}"
            told = hub.answer(self.command, self.path, body, endpoint) if may else (401, {"error": "who?"})
            content = json.dumps(told[1]).encode()
            self.send_response(told[0])
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_args):
            pass

    for verb in ("GET", "POST", "PUT"):
        setattr(_Requests, f"do_{verb}", _Requests._serve)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Requests)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub, endpoint
    finally:
        server.shutdown()
        server.server_close()
