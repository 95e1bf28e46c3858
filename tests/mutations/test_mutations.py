from __future__ import annotations

import pytest

from tests.mutations.__main__ import BUGS, ROOT, main, patched


def test_every_bug_still_applies() -> None:
    for bug in BUGS:
        path, text = patched(bug, ROOT)
        compile(text, str(path), "exec")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_suite_catches_every_bug(capfd: pytest.CaptureFixture[str]) -> None:
    main()
    assert capfd.readouterr().out.count("caught by") == len(BUGS)
