"""Transformers' side of generation: `generate` on one left-padded batch, or `generate_batch`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.meter import serve
from benchmarks.work import STOPS, WORKS


def main(name: str, path: str, policy: str, reference: str, dtype: str, form: str) -> None:
    """Load, then take turns; the weights are in the dtype themselves, which is its fastest way."""
    work = WORKS[name]
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    tokenizer: Any = AutoTokenizer.from_pretrained(policy, padding_side="left")
    tokenizer.pad_token = "<|endoftext|>"
    model: Any = AutoModelForCausalLM.from_pretrained(policy, dtype=getattr(torch, dtype)).eval()
    batch = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True)
    stops = [tokenizer.eos_token_id]
    if work.answers == 1:
        stops += [tokenizer(stop)["input_ids"][0] for stop in STOPS]
    width = batch["input_ids"].shape[1]

    @torch.no_grad()
    def turn() -> dict[str, Any]:
        torch.manual_seed(0)
        output = model.generate(
            **batch,
            do_sample=True,
            top_k=0,
            max_new_tokens=work.answer[1],
            num_return_sequences=work.answers,
            eos_token_id=stops,
            pad_token_id=tokenizer.pad_token_id,
        )
        return {"tokens": int((output[:, width:] != tokenizer.pad_token_id).sum())}

    serve(turn)


if __name__ == "__main__":
    main(*sys.argv[1:])
