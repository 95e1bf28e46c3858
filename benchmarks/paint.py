"""How soon Chromium paints the labelling server's pages, and how many bytes each is.

Each page is opened in a browser context of its own, so that nothing is cached, from a store of 200
tasks of four answers that two labellers have half done.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import threading
from pathlib import Path
from typing import Any

import uvicorn
from playwright.sync_api import Browser, sync_playwright

from prefloop.config.labelling import LabelImportConfig
from prefloop.labelling import imports
from prefloop.labelling.assign import Judgement, next_assignment, submit
from prefloop.labelling.store import Store
from prefloop.labelling.web.app import create_app

TURNS = 5
SCREENS = {"phone": (390, 844), "desk": (1280, 900), "wide": (1920, 900)}
PAGES = (
    *("/", "/mine", "/guidelines?project=main&version=1", "/admin?project=main"),
    *(f"/admin/{name}?project=main" for name in ("tasks", "charts", "quality", "settings")),
    "/admin/task?project=main&id=1",
)
FLAGS = "--headless --no-sandbox --disable-gpu --disable-background-networking".split()
PAINTED = "() => performance.getEntriesByName('first-contentful-paint').length > 0"
PAINT = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
SIZE = """["navigation", "resource"].flatMap((kind) => performance.getEntriesByType(kind))
  .reduce((sum, entry) => sum + entry.decodedBodySize, 0)"""
ANSWER = (
    "Warm the pot, **then** pour:\n\n- leaves, a spoon a cup\n- water, just off the boil\n\n" * 4
)


def measure(dtype: str, threads: int) -> dict[str, Any]:
    """Milliseconds to the first contentful paint, and bytes uncompressed, of each page."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        raise SystemExit("paint needs Chromium: apt-get install chromium")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        store = filled_store(Path(folder))
        config = uvicorn.Config(create_app(store), port=0, log_level="error")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        browser = playwright.chromium.launch(
            executable_path=chromium, args=FLAGS, ignore_default_args=["--headless=old"]
        )
        while not server.started:
            thread.join(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        for name, size in SCREENS.items():
            for path in PAGES:
                seen = [look(browser, f"http://127.0.0.1:{port}", path, size) for _ in range(TURNS)]
                paint, size_of = statistics.median(ms for ms, _ in seen), max(b for _, b in seen)
                found[f"{name} {path}"] = {"paint_ms": [ms for ms, _ in seen], "bytes": size_of}
                print(f"{name:6} {path:32} {paint:5.0f} ms {size_of / 1000:6.1f} kB", flush=True)
        browser.close()
        server.should_exit = True
        thread.join()
        store.close()
    return {"paint": found}


def filled_store(folder: Path) -> Store:
    """Two labellers, who have done half, and an admin."""
    rows = [
        {
            "prompt": f"How do I make tea, case {n}?",
            "completions": [f"{k}. {ANSWER}" for k in "abcd"],
        }
        for n in range(200)
    ]
    data, address = folder / "rows.jsonl", str(folder / "labels.db")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    imports.run(LabelImportConfig(store=address, data=str(data), need=2))
    store = Store(address)
    with store.write() as t:
        people = [t.put_labeller(name, "labeller", name) for name in ("ann", "bob")]
        t.put_labeller("boss", "admin", "token-boss")
    for number in range(200):
        who = people[number % 2]
        task = next_assignment(store, who)
        assert task is not None
        tiers = [[i] for i in range(len(task.shown))][:: 1 - 2 * (number % 3 == 0)]
        flags = [{"answer": 0, "flag": "false"}] if number % 9 == 0 else []
        said = Judgement(tiers, flags=flags, seconds=20.0, request_id=f"request-{number}")
        submit(store, who, task.id, said)
    return store


def look(browser: Browser, url: str, path: str, size: tuple[int, int]) -> tuple[float, int]:
    """(milliseconds to the first contentful paint, bytes) of a page that nothing is cached of."""
    context = browser.new_context(viewport={"width": size[0], "height": size[1]})
    context.request.get(f"{url}/enter?token=token-boss", max_redirects=0)  # the cookie alone
    page = context.new_page()
    page.goto(f"{url}{path}")
    page.wait_for_function(PAINTED)
    page.wait_for_load_state("networkidle")
    measured = (float(page.evaluate(PAINT)), int(page.evaluate(SIZE)))
    context.close()
    return measured
