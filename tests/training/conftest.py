"""One folder of tiny models and rows for all tests of the trainers."""

import pytest
import torch

from tests.training.small import write_world


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """As the processes that are compared with: sums in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder
