"""What ran, and what it cost: versions, revision, CPU seconds, peak memory. Imports no torch."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from prefloop.errors import UserError, first_line

PACKAGES = ("prefloop", "torch", "transformers", "tokenizers", "peft", "numpy")


def versions() -> dict[str, str]:
    """Of Python and of the packages that numbers depend on."""
    known = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            known[package] = version(package)
        except PackageNotFoundError:
            continue
    return known


def revision() -> str | None:
    """Git revision of prefloop's source, with `-dirty` where it was changed; None without git."""
    here = Path(__file__)

    def git(*words: str) -> str:
        result = subprocess.run(
            ["git", "-C", str(here.parent), *words], capture_output=True, text=True, check=True
        )
        return result.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # ours, not a repository around us
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def cpu_seconds() -> float:
    """Of this process and of its children that have ended, user and system."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def reset_peak_memory() -> None:
    """Start this process's peak anew, so that one process can measure several runs (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_memory_gib() -> float:
    """This process's largest resident size since `reset_peak_memory` (on Linux; else its start)."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**20  # type: ignore[index]
    except (OSError, TypeError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**30 if sys.platform == "darwin" else 2**20)


def free_memory() -> int | None:
    """Bytes of main memory that this process has or can have, by its control group, too (Linux);
    None elsewhere.
    """
    try:
        own = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        free = int(found[1]) * 1024  # type: ignore[index]
    except (OSError, TypeError):
        return None
    group = Path("/sys/fs/cgroup")
    try:
        cached = re.search(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.M)
        used = int((group / "memory.current").read_text()) - int(cached[1])  # type: ignore[index]
        free = min(free, int((group / "memory.max").read_text()) - used)
    except (OSError, TypeError, ValueError):  # no such group, or one without a limit
        pass
    return max(free, 0) + own


def file_hashes(paths: Iterable[str]) -> dict[str, str]:
    """sha256 of those of the paths that are files, by path."""
    digests = {}
    for path in paths:
        if Path(path).is_file():
            with open(path, "rb") as file:
                digests[path] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def weights_sha256(folder: Path) -> str:
    """sha256 of a model folder's safetensors files in the order of their names; "" without any."""
    files = sorted(folder.glob("*.safetensors"))
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest() if files else ""


def files_digest(folder: Path | str) -> str:
    """sha256 of a model folder's weights as its safetensors files hold them; "" without any.

    Of names, types, shapes and bytes of the tensors: the same wherever the folder lies and however
    the weights are split into files. A file is read once in a process, until it changes. UserError
    where a file in a run's directory is not as the run wrote it.
    """
    folder = Path(folder)
    record = folder.resolve().parent / "run.json"
    written = _written(record).get(folder.resolve().name, {})
    files = _by_file(folder)
    for path, tensors in files.items():
        if written.get(path.name, digest := _digest(tensors)) != digest:
            raise UserError(
                f"{path}: not as {record} says that it was written; copy the run again from where "
                "it is whole, or move the folder out of the run if you changed it"
            )
    return _digest({name: part for each in files.values() for name, part in each.items()})


def written_files(folders: Iterable[Path]) -> dict[str, dict[str, str]]:
    """By the name of each folder that is there, what `files_digest` will compare its files with."""
    there = (folder for folder in folders if folder.is_dir())
    return {f.name: {p.name: _digest(part) for p, part in _by_file(f).items()} for f in there}


def _written(record: Path) -> dict[str, dict[str, str]]:
    """What the record of a run that is finished says of the files that it wrote."""
    try:
        told = json.loads(record.read_text(encoding="utf-8"))
        return dict(told["weights"]) if told["status"] == "finished" else {}
    except (OSError, ValueError, KeyError, TypeError):  # another's, or an earlier prefloop's
        return {}


def _digest(tensors: dict[str, str]) -> str:
    listing = "".join(f"{name} {tensors[name]}\n" for name in sorted(tensors))
    return hashlib.sha256(listing.encode()).hexdigest() if tensors else ""


def _by_file(folder: Path) -> dict[Path, dict[str, str]]:
    """Digests of the tensors of a model folder's files, which are chosen as Transformers does."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    files = [whole] if whole.exists() else sorted(folder.glob("*.safetensors"))
    if not whole.exists() and index.exists():
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        files = [folder / name for name in sorted(set(named))]
    stats = {path: path.stat() for path in files}
    return {p: _tensor_digests(p.resolve(), s.st_size, s.st_mtime_ns) for p, s in stats.items()}


@functools.cache
def _tensor_digests(path: Path, size: int, changed: int) -> dict[str, str]:
    """By name: type, shape and sha256 of each tensor of a safetensors file of that size and time.

    The file is the length of its header (8 bytes), the header as JSON, and the tensors' bytes.
    """
    digests = {}
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            start = file.tell()
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                first, end = entry["data_offsets"]
                file.seek(start + first)
                digest = hashlib.sha256()
                while first < end and (part := file.read(min(end - first, 2**24))):
                    digest.update(part)
                    first += len(part)
                if first < end:
                    raise ValueError("it ends too early")
                digests[name] = f"{entry['dtype']} {entry['shape']} {digest.hexdigest()}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{path}: not a safetensors file ({first_line(error)}); fetch or save it again"
        ) from error
    return digests
