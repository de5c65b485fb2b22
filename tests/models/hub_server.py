"""A model hub on this machine: as much of its protocol as a folder's way there and back needs."""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

NAME, COMMIT = "me/tiny", "1" * 40


class Hub(BaseHTTPRequestHandler):
    """Writes what is committed into `root`, and serves it from there as NAME."""

    root: Path

    def do_POST(self) -> None:
        """Answer the creation of a repository, the question how to upload, and a commit."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.endswith("/repos/create"):
            name = json.loads(body)["name"]
            self._answer({"url": f"{self._home}/me/{name}", "id": f"me/{name}"})
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif self.path.endswith("/validate-yaml"):
            self._answer({"errors": [], "warnings": []})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    target = self.root / value["path"]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(base64.b64decode(value["content"]))
            self._answer({"commitUrl": f"{self._home}/me/x/commit/1", "commitOid": COMMIT})
        else:
            self._answer({"error": self.path}, 404)

    def do_GET(self) -> None:
        """Answer who is asking, what is there, and with a file."""
        path = self.path.partition("?")[0]
        files = [file for file in self.root.rglob("*") if file.is_file()]
        names = {str(file.relative_to(self.root)): file.stat().st_size for file in files}
        if path.endswith("/whoami-v2"):
            self._answer({"name": "me", "type": "user"})
        elif "/resolve/" in path:
            self._send_file(whole=True)
        elif path.startswith(f"/api/models/{NAME}/tree/") and path.count("/") == 6:
            self._answer(
                [
                    {"type": "file", "path": name, "size": size, "oid": "0" * 40}
                    for name, size in names.items()
                ]
            )
        elif path.startswith(f"/api/models/{NAME}/revision/"):
            siblings = [{"rfilename": name} for name in names]
            self._answer({"id": NAME, "sha": COMMIT, "siblings": siblings, "private": False})
        else:
            self._answer({"error": self.path}, 404)

    def do_HEAD(self) -> None:
        """Answer whether a file is there."""
        self._send_file(whole=False)

    def _send_file(self, whole: bool) -> None:
        name = self.path.partition("?")[0].partition("/resolve/")[2].partition("/")[2]
        file = self.root / name
        here = self.path.startswith(f"/{NAME}/")
        if not (here and file.is_file()):
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if here else "RepoNotFound")
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            return
        data = file.read_bytes()
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if whole:
            self.wfile.write(data)

    @property
    def _home(self) -> str:
        host, port = self.server.server_address[:2]
        return f"http://{host!s}:{port}"

    def _answer(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        if status == 404:
            known = self.path.startswith(f"/api/models/{NAME}/")
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Tell what was asked, for a test that fails."""
        print(self.path, args, file=sys.stderr)
