"""The token that pads a scorer's batches, which no answer may end with."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefloop.data.encoder import PAD
from prefloop.data.tokenize import stop_token_ids


def set_distinct_pad(module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives a scorer a pad token that no answer ends with, a new one if it must be.

    Transformers scores the last token that is not padding, so pad = eos would move the score.
    """
    if not distinct_pad(tokenizer, module):
        tokenizer.add_special_tokens({"pad_token": PAD})
        if len(tokenizer) > len(module.get_input_embeddings().weight):  # type: ignore[arg-type]
            module.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    module.config.pad_token_id = tokenizer.pad_token_id


def distinct_pad(tokenizer: PreTrainedTokenizerBase, module: PreTrainedModel) -> bool:
    """Whether the tokenizer has a token that pads and that no answer ends with; it is set."""
    used = stop_token_ids(tokenizer) | {tokenizer.bos_token_id, None}
    if tokenizer.pad_token_id not in used:
        return True
    rows = len(module.get_input_embeddings().weight)  # type: ignore[arg-type]
    added = [t for t, n in tokenizer.get_added_vocab().items() if n not in used and n < rows]
    unused = [t for t in added if "pad" in t.lower() or "reserved" in t.lower()]
    if tokenizer.unk_token_id not in used:
        unused.append(str(tokenizer.unk_token))
    if unused:
        tokenizer.pad_token = unused[0]
    return bool(unused)
