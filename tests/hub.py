"""A stand-in for the Hugging Face hub: the part of its HTTP API that pushing a folder takes."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_the_owner"


@dataclass
class Hub:
    """What it was asked for, and what it holds."""

    url: str = ""
    private: bool | None = None  # the repository's, once it is made
    files: dict[str, bytes] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)  # uploaded apart, by sha256
    commits: int = 0
    fails_at: str = ""  # a part of the address that it refuses
    asked: list[str] = field(default_factory=list)


@contextmanager
def standing_in(fails_at: str = "") -> Iterator[Hub]:
    """A hub on this machine for the time of the block."""
    hub = Hub(fails_at=fails_at)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            hub.asked.append(f"{self.command} {self.path}")
            status, found = reply(hub, self.path, body, self.headers.get("authorization"))
            data = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = answer

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def reply(hub: Hub, path: str, body: bytes, key: str | None) -> tuple[int, Any]:
    """Status and JSON of one request."""
    if path.startswith("/put/"):  # addresses for large files are signed: they take no token
        hub.large[path.removeprefix("/put/")] = body
        return 200, {}
    if path.startswith("/api/agent"):
        return 200, {}
    if key != f"Bearer {TOKEN}":
        return 401, {"error": "Invalid user token."}
    if hub.fails_at and hub.fails_at in path:
        return 403, {"error": "You don't have the rights to do that"}
    if path == "/api/whoami-v2":
        return 200, {"name": "owner", "type": "user"}
    if path == "/api/repos/create":
        hub.private = json.loads(body).get("visibility") == "private"
        return 200, {"url": f"{hub.url}/owner/name", "name": "owner/name"}
    if "/preupload/" in path:
        files = [f["path"] for f in json.loads(body)["files"]]
        kinds = {True: "lfs", False: "regular"}
        told = [
            {"path": f, "uploadMode": kinds[f.endswith(".safetensors")], "shouldIgnore": False}
            for f in files
        ]
        return 200, {"files": told}
    if path.endswith("/info/lfs/objects/batch"):
        wanted = json.loads(body)["objects"]
        actions = [{"upload": {"href": f"{hub.url}/put/{o['oid']}"}} for o in wanted]
        objects = [{**o, "actions": a} for o, a in zip(wanted, actions, strict=True)]
        return 200, {"transfer": "basic", "objects": objects}
    if "/commit/" in path:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                hub.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                hub.files[value["path"]] = hub.large[value["oid"]]
        hub.commits += 1
        url = f"{hub.url}/owner/name/commit/{'1' * 40}"
        return 200, {"commitUrl": url, "commitOid": "1" * 40, "success": True}
    if path == "/api/validate-yaml":
        return 200, {"errors": [], "warnings": []}
    return 404, {"error": f"{path}: not a part of the stand-in"}
