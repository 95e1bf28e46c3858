"""How much memory a rank takes while a model is loaded and divided."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from prefloop import distributed
from prefloop.models.load import load_policy
from prefloop.training.start import divide, model_options, start
from tests.tiny import tiny_tokenizer
from tests.training.small import config


def write_deep(folder: Path) -> None:
    """A model of 100 MB in bfloat16, nearly all of it in its 12 layers."""
    shape = LlamaConfig(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=8,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(shape).to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer(chat=False).save_pretrained(folder)


def tell_loading(world: Path, output: Path, name: str, model: str) -> None:
    """Writes NAME-RANK.json: of a policy of which all weights are trained, in bytes, what loading
    it added to the process's own memory at most (`peak`), and what its weights take (`whole`).
    """
    chosen = config("sft", world, output / f"{name}-run")
    run, device = start(chosen, "sft")
    with run:
        load_policy(str(world / "model"), device, **model_options(chosen) | {"divided": False})
        with own_memory() as seen:
            policy = load_policy(model, device, **model_options(chosen))
            divide(chosen, [policy])
    whole = sum(p.numel() * p.element_size() for p in policy.module.parameters())
    found = {"peak": max(seen) - seen[0], "whole": whole}
    (output / f"{name}-{distributed.rank()}.json").write_text(json.dumps(found))
    distributed.barrier()


@contextmanager
def own_memory() -> Iterator[list[int]]:
    """Yields what, after it, are the bytes that the process held of its own, every millisecond;
    a mapped file's are not among them.
    """
    seen = [anonymous_bytes()]
    done = threading.Event()

    def look() -> None:
        while not done.wait(1e-3):
            seen.append(anonymous_bytes())

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join()
        seen.append(anonymous_bytes())


def anonymous_bytes() -> int:
    """Of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024
