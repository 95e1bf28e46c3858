"""A server on a store of its own, and the system's Chromium; skipped where there is none."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import uvicorn

from prefloop.labelling.web.app import create_app
from tests.labelling.small import add, open_store, put

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()


def pytest_collection_modifyitems(items):
    """Everything here is slow, and needs a browser."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.slow)
            item.add_marker(
                pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
            )


class Server:
    """The app under uvicorn in a thread, on a free loopback port."""

    def __init__(self, folder, names=("ann", "bob")):
        self.folder = folder
        self.store = open_store(folder)
        add(self.store, *names)
        add(self.store, "boss", role="admin")
        self.start()

    def start(self, port=0):
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(("127.0.0.1", port))
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(create_app(self.store), log_level="error")
        self.server = uvicorn.Server(config)
        sockets = {"sockets": [self.socket]}
        self.thread = threading.Thread(target=self.server.run, kwargs=sockets, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def stop(self):
        self.server.should_exit = True
        self.thread.join()
        self.socket.close()

    def select(self, query):
        with self.store.read() as t:
            return [tuple(row) for row in t.connection.exec_driver_sql(query)]


@pytest.fixture
def serve(tmp_path):
    """`serve(rows, **settings of the import)` starts a server."""
    started = []

    def start(rows, **settings):
        put(tmp_path, rows, **settings)
        started.append(Server(tmp_path))
        return started[-1]

    yield start
    for server in started:
        server.stop()
        server.store.close()


@dataclass
class Watched:
    """A browser context with what went wrong in it and what it asked the network for."""

    page: object
    errors: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM, args=FLAGS, ignore_default_args=["--headless=old"]
        )
        yield chromium
        chromium.close()


@pytest.fixture
def enter(browser):
    """`enter(server, name)` opens the personal link; the page must stay free of errors."""
    opened = []

    def open_link(server, name, **settings):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **settings})
        context.set_default_timeout(15_000)
        watched = Watched(context.new_page())
        page = watched.page
        page.on("pageerror", lambda error: watched.errors.append(str(error)))
        page.on(
            "console",
            lambda said: watched.errors.append(said.text) if said.type == "error" else None,
        )
        page.on("request", lambda request: watched.asked.append(request.url))
        page.goto(f"{server.url}/enter?token=token-{name}")
        opened.append((context, watched))
        return watched

    yield open_link
    for context, watched in opened:
        context.close()
        assert watched.errors == []
