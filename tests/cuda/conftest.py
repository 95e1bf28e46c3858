"""What the tests on a GPU share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training import small


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As wide as kernels that read whole blocks of 4 bits ask for."""
    folder = tmp_path_factory.mktemp("world")
    small.write_world(folder, hidden=64)
    return folder
