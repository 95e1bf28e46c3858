"""A real PostgreSQL, started for the session; skipped where none is installed."""

import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.labelling.small import OPENED

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))


def as_owner(*words):
    """PostgreSQL refuses to run as root: then as the user that its package makes."""
    return (
        ["runuser", "-u", "postgres", "--", *map(str, words)] if os.geteuid() == 0 else list(words)
    )


@pytest.fixture(autouse=True)
def close_stores():
    yield
    while OPENED:
        OPENED.pop().close()


@pytest.fixture(scope="session")
def postgres():
    """`postgres(name)` makes an empty database and gives its URL."""
    if not PROGRAMS:
        pytest.skip("no PostgreSQL: apt-get install postgresql")
    programs = PROGRAMS[-1].parent
    folder = Path(tempfile.mkdtemp(prefix="prefloop-postgres-"))
    if os.geteuid() == 0:
        owner = pwd.getpwnam("postgres")
        os.chown(folder, owner.pw_uid, owner.pw_gid)
    data, log = folder / "data", folder / "log"

    def run(*words):
        subprocess.run(as_owner(*words), check=True, capture_output=True, cwd=folder)

    run(
        programs / "initdb", "-D", data, "-U", "prefloop", "--auth=trust", "-E", "UTF8", "--no-sync"
    )
    options = f"-k {folder} -c listen_addresses='' -c max_connections=200"
    run(programs / "pg_ctl", "-D", data, "-l", log, "-o", options, "-w", "start")

    def make(name):
        run(programs / "createdb", "-h", folder, "-U", "prefloop", name)
        return f"postgresql://prefloop@/{name}?host={folder}"

    yield make
    run(programs / "pg_ctl", "-D", data, "-m", "immediate", "stop")
    shutil.rmtree(folder)
