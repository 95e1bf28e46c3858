"""The README's first labels, command by command as somebody new types them.

    python -m tests.browser.from_nothing CLONE [COMMANDS]

runs the block of the clone's README (or of the file COMMANDS, one a line) in the clone, with the
programs of its `.venv` before all others, and says how long each took. `prompts.jsonl` lies in the
clone. Chromium opens the link that was printed, and ranks what the page shows.
"""

from __future__ import annotations

import os
import re
import resource
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

from tests.browser.conftest import CHROMIUM, FLAGS

PORT = 8000  # of the link that is printed
LINK = re.compile(r"http://\S+/enter\?token=\S+")
NOBODY_FOR = 60.0  # seconds until a server that does not listen is given up


def commands_of(readme: str) -> list[str]:
    """The commands of "First labels of your own", each as it stands there."""
    part = readme.split("\n## First labels of your own\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"^```sh\n(.*?)^```", part, flags=re.MULTILINE | re.DOTALL)
    return re.split(r"(?<!\\)\n", block.strip())


def follow(
    commands: Sequence[str], folder: Path, programs: Path, rank: Callable[[str], Any]
) -> Iterator[tuple[str, str]]:
    """Run each command in a shell in `folder`; yield it with what it printed.

    `label serve` is left to run while `rank` is given the link that `label add-user` printed, and
    then ended as by Ctrl-C.
    """
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    settings: dict[str, Any] = {"cwd": folder, "env": {**os.environ, "PATH": path}, "text": True}
    link = ""
    for command in commands:
        shell = ["bash", "-c", command]
        if shlex.split(command, comments=True)[:3] == ["prefloop", "label", "serve"]:
            server = subprocess.Popen(
                shell, **settings, stderr=subprocess.PIPE, start_new_session=True
            )
            try:
                if listens(server):
                    rank(link)
            finally:
                if server.poll() is None:
                    os.killpg(server.pid, signal.SIGINT)
                _, said = server.communicate()
            code, printed = server.returncode, said
        else:
            done = subprocess.run(shell, **settings, capture_output=True, check=False)
            code, printed, said = done.returncode, done.stdout, done.stderr
        if code not in (0, 130):
            raise SystemExit(f"{command}\nends with {code}:\n{said}")
        if found := LINK.search(printed):
            link = found[0]
        yield command, printed


def listens(server: subprocess.Popen[str]) -> bool:
    """Wait until it takes connections; False where it ends before."""
    end = time.monotonic() + NOBODY_FOR
    while server.poll() is None:
        with socket.socket() as caller:
            if caller.connect_ex(("127.0.0.1", PORT)) == 0:
                return True
        if time.monotonic() > end:
            raise SystemExit(f"the server does not listen on {PORT} after {NOBODY_FOR:.0f} s")
        time.sleep(0.05)
    return False


def rank_all(page: Page, link: str) -> int:
    """Rank the tasks behind a link in the order in which the page shows their answers; how many."""
    page.goto(link)
    shown = "() => document.querySelector('#work').hidden ? '' : {0}"
    prompt = "document.querySelector('#prompt').innerText"
    page.wait_for_function(shown.replace("{0}", prompt))
    tasks = 0
    while asked := page.evaluate(shown.replace("{0}", prompt)):
        for key in [*map(str, range(1, 1 + page.locator(".answer").count())), "Enter"]:
            page.keyboard.press(key)
        page.wait_for_function(
            f"(asked) => document.querySelector('#work').hidden || {prompt} !== asked", arg=asked
        )
        tasks += 1
    return tasks


def main(folder: str, script: str = "") -> None:
    clone = Path(folder).resolve()
    text = Path(script).read_text() if script else ""
    commands = text.splitlines() or commands_of((clone / "README.md").read_text())
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = chromium.new_page()
        cpu, clock = resource.RUSAGE_CHILDREN, time.monotonic()
        start, used = clock, sum(resource.getrusage(cpu)[:2])
        for command, printed in follow(
            commands, clone, clone / ".venv" / "bin", lambda link: print(rank_all(page, link))
        ):
            now, spent = time.monotonic(), sum(resource.getrusage(cpu)[:2])
            print(f"{now - clock:7.1f} s {spent - used:7.1f} s of CPU  {command}", flush=True)
            print(*printed.splitlines()[-4:], sep="\n", file=sys.stderr)
            clock, used = now, spent
        print(f"{clock - start:7.1f} s in all")
        chromium.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
