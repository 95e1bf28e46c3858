"""Tiny tokenizers and random models, built in code, for every test that needs the real thing."""

from __future__ import annotations

from typing import Any, Literal

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

Arch = Literal["llama", "qwen3", "gemma3", "mistral", "gpt2"]
ARCHS: tuple[Arch, ...] = ("llama", "qwen3", "gemma3", "mistral", "gpt2")
SPECIALS = ("<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>")
MERGES = (("Ġ", "t"), ("t", "h"), ("th", "e"), ("Ġ", "a"), ("i", "n"), ("a", "b"), ("o", "o"))

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Llama 2: the template prints BOS itself, and a turn ends with EOS and no line break.
LLAMA2 = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ bos_token }}[INST] {{ message['content'] }} [/INST]"
    "{% else %} {{ message['content'] }} {{ eos_token }}{% endif %}"
    "{% endfor %}"
)


def tiny_tokenizer(
    chat: bool = True, *, bos: bool = False, template: str | None = None, eos: str | None = None
) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 268 tokens with seven merges; `pad` is a token of its own.

    `chat` gives it the ChatML template (or `template`), whose `<|im_end|>` is then EOS; without
    it EOS is `<eos>`. `bos` makes the post-processor put `<bos>` before every text.
    """
    vocabulary = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary += [left + right for left, right in MERGES]
    ids = {token: number for number, token in enumerate(vocabulary)}
    core = Tokenizer(models.BPE(vocab=ids, merges=list(MERGES)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIALS])
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", ids["<bos>"])]
        )
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token=eos or ("<|im_end|>" if chat and template is None else "<eos>"),
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    if chat:
        tokenizer.chat_template = template or CHATML
    return tokenizer


def tiny_model(
    arch: Arch = "llama",
    *,
    vocab_size: int = len(SPECIALS) + 256 + len(MERGES),
    seed: int = 0,
    layers: int = 2,
    hidden: int = 32,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> PreTrainedModel:
    """A random causal LM in evaluation mode whose vocabulary is `tiny_tokenizer`'s.

    mistral and gemma3 attend within a window of 6 tokens (gemma3: in its first layer only).
    """
    special: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 4}
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden // 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        **special,
    }
    windows = ["sliding_attention" if n % 2 == 0 else "full_attention" for n in range(layers)]
    config: Any
    if arch == "llama":
        config = LlamaConfig(**{**common, **overrides})
    elif arch == "qwen3":
        config = Qwen3Config(**{**common, **overrides})
    elif arch == "mistral":
        config = MistralConfig(**{**common, "sliding_window": 6, **overrides})
    elif arch == "gemma3":
        own = {"sliding_window": 6, "layer_types": windows, "query_pre_attn_scalar": hidden // 4}
        config = Gemma3TextConfig(**{**common, **own, **overrides})
    else:
        gpt2: dict[str, Any] = {
            "vocab_size": vocab_size,
            "n_embd": hidden,
            "n_layer": layers,
            "n_head": 4,
            "n_positions": 512,
            "initializer_range": 0.2,
            **special,
        }
        config = GPT2Config(**{**gpt2, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    return model.eval()  # type: ignore[no-any-return]
