"""A model hub on this machine: as much of its protocol as uploading a folder needs."""

from __future__ import annotations

import base64
import json
import sys
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any


class Hub(BaseHTTPRequestHandler):
    """Writes what is committed into `root`."""

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
            self._answer({"commitUrl": f"{self._home}/me/x/commit/1", "commitOid": "1" * 40})
        else:
            self._answer({"error": self.path}, 404)

    def do_GET(self) -> None:
        """Answer who is asking; nothing is stored yet."""
        if self.path.endswith("/whoami-v2"):
            self._answer({"name": "me", "type": "user"})
        else:
            self._answer({"error": self.path}, 404)

    def do_HEAD(self) -> None:
        """Answer that no file is there yet."""
        self.send_response(404)
        self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()

    @property
    def _home(self) -> str:
        host, port = self.server.server_address[:2]
        return f"http://{host!s}:{port}"

    def _answer(self, value: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Tell what was asked, for a test that fails."""
        print(self.path, args, file=sys.stderr)
