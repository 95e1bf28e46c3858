"""A hub that cannot be reached is told at once."""

import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from prefloop.errors import UserError
from prefloop.hub import is_cached, require_hub

CLOSED = "http://127.0.0.1:9"  # nothing listens there


def online(**changes):
    return {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | changes


class Refusing(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(404)
        self.end_headers()

    def log_message(self, *words):
        pass


def test_a_hub_that_answers_is_left_to_who_asks_it():
    """In a process of its own: its client reads HF_HUB_OFFLINE when it is loaded."""
    server = HTTPServer(("127.0.0.1", 0), Refusing)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    code = f"from prefloop.hub import require_hub; require_hub('owner/name', '{address}')"
    try:
        subprocess.run([sys.executable, "-c", code], env=online(), check=True)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("address", [CLOSED, "https://hub.invalid"])
def test_one_that_does_not_is_told(address):
    with pytest.raises(
        UserError, match=rf"^owner/name: no such folder here, and the hub {address}"
    ):
        require_hub("owner/name", address)


def test_what_is_no_hub_id_is_not_asked_for():
    assert not is_cached("owner/name-that-nobody-fetched", "config.json")
    assert is_cached("no hub/id at:all", "config.json")


@pytest.mark.slow
def test_the_command_line_says_so_in_one_line():
    """The hub's own client would try again for 31 s."""
    model = "nobody/nothing"
    words = [sys.executable, "-m", "prefloop", "check", "--model", model]
    start = time.monotonic()
    told = subprocess.run(
        words, env=online(HF_ENDPOINT=CLOSED), capture_output=True, text=True, check=False
    )
    assert time.monotonic() - start < 25
    assert told.returncode == 2
    assert told.stderr.count("\n") == 1
    assert f"{model}: no such folder here, and the hub {CLOSED} cannot be asked" in told.stderr
