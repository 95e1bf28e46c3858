"""A small language model of one's own sentences: its tokenizer and random weights to train."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Shape:
    """Of a Llama whose head is its table of embeddings; by default 1.2 million weights."""

    vocabulary: int = 3000  # tokens at most
    width: int = 128
    layers: int = 4
    heads: int = 4


def write_small_model(texts: Iterable[str], folder: Path, shape: Shape, seed: int) -> None:
    """Writes a folder of random weights and a byte-level BPE tokenizer learned from the texts."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from prefloop.models.export import whole_folder

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocabulary,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    config = LlamaConfig(
        vocab_size=core.get_vocab_size(),
        hidden_size=shape.width,
        intermediate_size=3 * shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=core.token_to_id("<eos>"),
        pad_token_id=core.token_to_id("<pad>"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
        PreTrainedTokenizerFast(
            tokenizer_object=core,
            pad_token="<pad>",
            eos_token="<eos>",
            model_max_length=256,
            clean_up_tokenization_spaces=False,
        ).save_pretrained(temporary)
