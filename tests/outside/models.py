"""Tiny random models for the cases: two-layer Llamas of width 32, a byte-level tokenizer of 261."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MambaConfig,
    PreTrainedTokenizerFast,
)

SPECIALS = ["<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>"]
TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = "{% for m in messages %}" + TURN + "{% endfor %}" + PROMPT
# As Llama 3.1 and Qwen 2.5: tool descriptions go before the conversation.
TOOLS = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}" + CHATML
# As DeepSeek-R1-Distill: the generation prompt opens a thought that no finished turn shows.
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<|im_end|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_end|><think>\n{% endif %}"
)
# As Llama 2 with its `else`: whoever is not the user speaks as the assistant.
TWO_ROLES = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)


def tokenizer(template: str | None, eos: str = "<|im_end|>") -> PreTrainedTokenizerFast:
    vocabulary = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(vocabulary)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIALS])
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token=eos if template else "<eos>",
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = template
    return made


def llama(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=261,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=4,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def save(folder: Path, made: PreTrainedTokenizerFast, seed: int = 0) -> None:
    llama(seed).save_pretrained(folder)
    made.save_pretrained(folder)


def wide_tokenizer(folder: Path) -> None:
    """A tokenizer with two tokens more than the model has embeddings (added, never resized)."""
    made = tokenizer(CHATML)
    made.add_special_tokens({"additional_special_tokens": ["<tool>", "</tool>"]})
    save(folder, made)


def mamba(folder: Path) -> None:
    config = MambaConfig(
        vocab_size=261,
        hidden_size=32,
        state_size=4,
        num_hidden_layers=2,
        pad_token_id=0,
        eos_token_id=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer(None).save_pretrained(folder)


def bad_generation_config(folder: Path) -> None:
    """Sampling settings without do_sample, as Llama 2 chat has: Transformers will not save it."""
    save(folder, tokenizer(CHATML))
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": 4, "temperature": 0.9, "top_p": 0.6}))


MAKERS: dict[str, Callable[[Path], None]] = {
    "plain": lambda f: save(f, tokenizer(None)),
    "chatml": lambda f: save(f, tokenizer(CHATML)),
    "tools": lambda f: save(f, tokenizer(TOOLS)),
    "r1": lambda f: save(f, tokenizer(R1, eos="<eos>")),
    "two-roles": lambda f: save(f, tokenizer(TWO_ROLES, eos="<eos>")),
    "wide-tokenizer": wide_tokenizer,
    "mamba": mamba,
    "bad-generation-config": bad_generation_config,
}
