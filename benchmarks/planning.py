"""How far a plan is from what a run holds: SFT, reward, DPO, PPO; full, LoRA, NF4; three sizes.

Every run is a process of its own (`benchmarks.planning_side`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.sides import MODELS
from prefloop.models.export import export_model
from prefloop.models.load import load_scorer

SHAPES = {  # vocabulary, width, inner width, layers, heads, key heads
    "1M": (1024, 128, 256, 4, 4, 2),
    "10M": (16384, 256, 768, 8, 8, 4),
    "60M": (32768, 512, 1408, 14, 8, 4),
    "135M": (49152, 576, 1536, 30, 9, 3),
}
WARM_UP = "1M"
COMMON: dict[str, Any] = {
    "model": "",
    "data": "",
    "output": "unused",
    "max_length": 256,
    "micro_batch_tokens": 512,
}
COMMANDS: dict[str, dict[str, Any]] = {  # each step has two micro-batches
    "sft": {"batch_size": 4},
    "reward": {"batch_size": 2},
    "dpo": {"batch_size": 2},
    "ppo": {"batch_size": 4, "ppo_epochs": 1, "reward_model": ""},
}
FORMS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora_rank": 8},
    "nf4": {"lora_rank": 8, "weights": "nf4"},
}


def measure(dtype: str, threads: int) -> dict[str, Any]:
    """All runs, printed as a table of Markdown and returned."""
    folders = {name: model_folder(name) for name in SHAPES}
    rows = []
    print(
        "| model | command | weights | planned, MiB | tensors, MiB | plan off by | process, MiB |"
    )
    print("|---|---|---|---:|---:|---:|---:|")
    for size in [name for name in SHAPES if name != WARM_UP]:
        for command, own in COMMANDS.items():
            for form, changes in FORMS.items():
                settings = COMMON | own | changes | {"command": command, "dtype": dtype}
                found = _run(settings, folders[size], folders[WARM_UP], threads)
                planned, tensors = found["planned"] / 2**20, found["tensors"] / 2**20
                print(
                    f"| {size} | {command} | {form} | {planned:.0f} | {tensors:.0f} | "
                    f"{planned / tensors - 1:+.1%} | {found['memory'] / 2**20:.0f} |",
                    flush=True,
                )
                rows.append({"size": size, "command": command, "form": form} | found)
    return {"planning": rows}


def _run(settings: dict[str, Any], model: Path, small: Path, threads: int) -> Any:
    words = [json.dumps(settings), str(model), str(small)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.planning_side", *words],
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(ended.stdout.splitlines()[-1])


def model_folder(name: str) -> Path:
    """A random Llama and a scorer of it, with a tokenizer of bytes."""
    folder = MODELS / f"planning-{name}"
    scorer = folder.with_name(f"{folder.name}-scorer")
    if (scorer / "config.json").exists():
        return folder
    vocabulary, width, inner, layers, heads, key_heads = SHAPES[name]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = ["<pad>", "<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    tokenizer.save_pretrained(folder)
    export_model(load_scorer(str(folder), torch.device("cpu")), scorer)
    return folder
