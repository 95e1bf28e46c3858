"""A Hugging Face folder as one GGUF file for llama.cpp: weights, tokenizer and chat template.

Only what llama.cpp is known to compute as Transformers does is written, the rest refused. What is
no matrix is kept in float32, as llama.cpp wants it.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from prefloop.data.tokenize import stop_token_ids
from prefloop.errors import UserError
from prefloop.models.gguf_tokenizer import Value, cautions, refuse, tokenizer_fields

log = logging.getLogger("prefloop")

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""Transformers' model_type -> llama.cpp's architecture."""
KINDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
RAW = np.dtype(np.void)  # the writer is told types apart
FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32}  # numbers of general.file_type
PARTS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Transformers' name of a module, within its layer where it has one -> GGUF's."""


def require_convertible(model: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """UserError unless the weights of a folder or hub id can become a file with this tokenizer.

    Says where llama.cpp will not do as Transformers does. Reads no weights.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            "--gguf: not installed: gguf; run pip install 'prefloop[gguf]' "
            "(in a clone: pip install -e '.[gguf]')"
        )
    fields(model, tokenizer)
    for line in cautions(tokenizer):
        log.warning("--gguf: %s", line)


def fields(model: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, Value]:
    """GGUF's fields for a model folder or hub id, but those of how it is stored."""
    config = AutoConfig.from_pretrained(model)
    generation = None
    with suppress(OSError):  # there may be none
        generation = GenerationConfig.from_pretrained(model)
    stops = stop_token_ids(tokenizer, generation)
    return _hyperparameters(config) | tokenizer_fields(tokenizer, config.vocab_size, stops)


def write_gguf(folder: Path, file: Path, dtype: torch.dtype | None = None) -> None:
    """Writes a model's folder, weights in safetensors, as a GGUF file; a tensor at a time.

    Matrices are cast to `dtype`, or stay as they are.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    dtype = dtype or config.dtype
    writer = GGUFWriter(file, ARCHITECTURES[config.model_type])
    writer.add_file_type(FILE_TYPES[KINDS[dtype]])
    for key, value in fields(str(folder), tokenizer).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, tensor in _tensors(folder, config, dtype):
        kind = GGMLQuantizationType[KINDS[tensor.dtype]]
        writer.add_tensor_info(name, tensor.shape, RAW, tensor.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, tensor in _tensors(folder, config, dtype):
        writer.write_tensor_data(tensor.contiguous().view(torch.uint8).numpy())
    writer.close()


def _hyperparameters(config: Any) -> dict[str, Value]:
    """The sizes of a model that llama.cpp computes as Transformers does."""
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        refuse(f"models of the type {config.model_type} are not written, only {known}")
    if getattr(config, "quantization_config", None):
        refuse("its weights are quantised")
    if config.hidden_act != "silu":
        refuse(f"its activation is {config.hidden_act}, not silu")
    if config.model_type == "qwen3" and config.attention_bias:
        refuse("its attention has biases")
    longest = config.max_position_embeddings
    window = _window(config)
    if window is not None and window < longest:
        refuse(f"it attends within a window of {window} tokens")
    width = _head_width(config)
    sizes: dict[str, Value] = {
        "vocab_size": config.vocab_size,
        "context_length": longest,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": width,
        **_rope(config),
    }
    arch = ARCHITECTURES[config.model_type]
    return {f"{arch}.{name}": value for name, value in sizes.items()}


def _window(config: Any) -> int | None:
    """Tokens that a layer looks back on; None where all look back on all."""
    if "sliding_attention" not in getattr(config, "layer_types", ["sliding_attention"]):
        return None
    return getattr(config, "sliding_window", None)


def _turns_neighbours(config: Any) -> bool:
    """Whether llama.cpp turns neighbours of a head together, and not its halves."""
    return ARCHITECTURES[config.model_type] == "llama"


def _head_width(config: Any) -> int:
    width = getattr(config, "head_dim", None)
    return int(width or config.hidden_size // config.num_attention_heads)


def _rope(config: Any) -> dict[str, Value]:
    """How positions turn keys and queries; llama3's factors are a tensor of their own."""
    rope = config.rope_parameters
    kind = rope["rope_type"]
    known = ("default", "linear", *(["llama3"] if _turns_neighbours(config) else []))
    if kind not in known or rope.get("partial_rotary_factor", 1.0) != 1:
        refuse(f"its rotary positions are of the kind {kind}, or of a part of each head")
    found: dict[str, Value] = {"rope.freq_base": float(rope["rope_theta"])}
    if kind == "linear":
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    return found


def _rope_factors(config: Any) -> Tensor:
    """What Llama 3.1 divides each frequency by: 1 for short waves, `factor` for long ones.

    With length w of a wave and C the context of the pretraining, 1 / ((1 - s) / factor + s) for
    s = (C / w - low) / (high - low), held within 0 and 1.
    """
    rope, width = config.rope_parameters, _head_width(config)
    exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
    waves = 2 * math.pi * rope["rope_theta"] ** exponents
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] / waves
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    shares: Tensor = (1 - smooth) / rope["factor"] + smooth
    return (1 / shares).float()


def _tensors(folder: Path, config: Any, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Name in the file and values of each tensor, in an order that stays."""
    heads = {}
    if _turns_neighbours(config):
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for source in sorted(opened.keys()):
                name, tensor = _name(source), opened.get_tensor(source)
                part = name.split(".")[-2]
                if part in heads:
                    tensor = interleaved(tensor, heads[part])
                yield name, tensor.to(dtype) if tensor.ndim > 1 else tensor.float()
    if config.rope_parameters["rope_type"] == "llama3":
        yield "rope_freqs.weight", _rope_factors(config)


def _name(source: str) -> str:
    module, _, kind = source.rpartition(".")
    if module in PARTS:
        return f"{PARTS[module]}.{kind}"
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{PARTS[part]}.{kind}"


def interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Rows i and i + D/2 of each head, which turn together, as neighbours 2 i and 2 i + 1."""
    split = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
    return split.transpose(1, 2).reshape(tensor.shape)
