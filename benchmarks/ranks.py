"""Several processes of this machine: tokens a second, and what each holds, with 1, 2 and 4 of them.

They share models as `--shard` says, over gloo. Cores are shared, too: where there are fewer than
processes, tokens a second cannot grow, and say what the processes cost one another.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.planning import model_folder

RANKS = (1, 2, 4)
SIZE = "10M"
COMMON: dict[str, Any] = {
    "data": "",
    "output": "unused",
    "device": "cpu",
    "max_length": 256,
    "micro_batch_tokens": 512,
    "batch_size": 8,
}
FORMS: dict[str, dict[str, Any]] = {"full": {}, "lora": {"lora_rank": 8}}


def measure(dtype: str, threads: int) -> dict[str, Any]:
    """All runs, printed as a table of Markdown and returned."""
    model, rows = model_folder(SIZE), []
    print("| SFT | processes | tokens/s | weights, MiB | gradients | moments | of one | process |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for form, changes in FORMS.items():
        one = 0.0
        for count in RANKS:
            settings = COMMON | changes | {"model": str(model), "dtype": dtype}
            found = on_ranks(settings, count, threads)
            parts = [found[part] / 2**20 for part in ("weights", "gradients", "moments")]
            one = one or sum(parts)
            print(
                f"| {form} | {count} | {found['rate']:,.0f} | "
                f"{' | '.join(f'{part:.0f}' for part in parts)} | {sum(parts) / one:.2f} | "
                f"{found['memory'] / 2**20:,.0f} |",
                flush=True,
            )
            rows.append({"form": form, "processes": count} | found)
    return {"ranks": rows}


def on_ranks(settings: dict[str, Any], count: int, threads: int) -> dict[str, float]:
    """Of the fullest process; tokens of all."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        program = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        words = ["-m", "benchmarks.ranks_side", json.dumps(settings), folder]
        subprocess.run([sys.executable, *program, *words], env=environment, check=True)
        found = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
    assert len(found) == count
    return {name: max(one[name] for one in found) for name in found[0]}
