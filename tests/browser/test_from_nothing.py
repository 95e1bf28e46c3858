"""The README's first labels, word for word: from a prompt to a model trained on what ann ranked."""

import json
import re
import socket
import sys
import tempfile
from pathlib import Path

import pytest

from prefloop.recipes import fetch
from tests.browser.from_nothing import PORT, commands_of, follow, rank_all

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def in_use():
    """Whether somebody listens where the printed link leads."""
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", PORT)) == 0


@pytest.mark.skipif(
    not fetch.is_fetched("smollm2-135m-instruct"), reason="run prefloop fetch-model first"
)
@pytest.mark.skipif(in_use(), reason=f"port {PORT}, which the README's link names, is in use")
def test_the_readmes_commands_do_what_it_says(browser):
    install, *commands = commands_of(README)
    assert install == "pip install -c constraints.txt '.[demo]'"  # in this environment already
    (row,) = re.findall(r'`(\{"prompt": .*?\})`', README)
    page = browser.new_context().new_page()
    ranked = []
    with tempfile.TemporaryDirectory() as name:  # models of 270 MB, which pytest would keep
        folder = Path(name)
        rows = [row, json.dumps({"prompt": "Name a fruit."})]
        (folder / "prompts.jsonl").write_text("".join(f"{line}\n" for line in rows))
        programs = Path(sys.executable).parent
        told = list(
            follow(commands, folder, programs, lambda link: ranked.append(rank_all(page, link)))
        )
        assert ranked == [2]
        record = json.loads((folder / "runs/reward/run.json").read_text())
        weights = (folder / "runs/reward/model/model.safetensors").stat().st_size
    page.context.close()
    assert [command for command, _ in told] == commands
    assert record["status"] == "finished"
    assert record["rows"]["data"]["read"] == 2
    assert weights > 100_000_000
