"""A small OpenAI-compatible endpoint on this machine, whose replies and faults a test chooses."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = str | int | bytes | float | tuple[int, dict[str, str], str]
"""A reply's text; a status; bytes as they are; seconds to stay silent; or a whole response."""


@dataclass
class Server:
    url: str
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    most_at_once: int = 0

    @property
    def judge(self) -> str:
        return f"openai:tiny/judge@{self.url}"

    @property
    def prompts(self) -> list[str]:
        return [body["messages"][0]["content"] for body in self.asked]


def section(prompt: str, name: str) -> str:
    """What stands between <name> and </name> of the default prompts."""
    return prompt.partition(f"<{name}>\n")[2].partition(f"\n</{name}>")[0]


@contextmanager
def serving(
    reply: Callable[[str, int], Reply], port: int = 0, path: str = "/v1/chat/completions"
) -> Iterator[Server]:
    """`reply` is given a request's first message and how often that was asked before."""
    lock, seen, busy = threading.Lock(), Counter[str](), [0]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = body["messages"][0]["content"]
            with lock:
                server.asked.append(body)
                server.headers.append(dict(self.headers))
                before, seen[prompt] = seen[prompt], seen[prompt] + 1
                busy[0] += 1
                server.most_at_once = max(server.most_at_once, busy[0])
            try:
                self.answer(404 if self.path != path else reply(prompt, before))
            except BrokenPipeError:  # the client has given up
                pass
            finally:
                with lock:
                    busy[0] -= 1

        def answer(self, said: Reply) -> None:
            headers: dict[str, str] = {}
            status, content = 200, b""
            if isinstance(said, float):
                time.sleep(said)
                said = "[[C]]"
            if isinstance(said, tuple):
                status, headers, text = said
                content = text.encode()
            elif isinstance(said, int):
                status, content = said, json.dumps({"error": {"message": "no"}}).encode()
            elif isinstance(said, bytes):
                content = said
            else:
                usage = {"prompt_tokens": 100, "completion_tokens": 7}
                choice = {"message": {"role": "assistant", "content": said}}
                content = json.dumps({"choices": [choice], "usage": usage}).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server = Server(f"http://127.0.0.1:{http.server_port}/v1")
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
