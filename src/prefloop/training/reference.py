"""The reference policy's log-probs, computed once and kept on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prefloop import distributed
from prefloop.config import DPOConfig
from prefloop.data.tokenize import Example
from prefloop.models.heads import sequence_log_probs
from prefloop.models.load import load_policy, require_same_ids
from prefloop.models.model import LoadedModel
from prefloop.training import checkpoint


def mismatched(examples: list[Example]) -> list[Example]:
    """Each prompt with the next answer that was given to another one, for KTO's KL estimate."""
    pairs = []
    for number, example in enumerate(examples):
        following = (examples[(number + k) % len(examples)] for k in range(1, len(examples)))
        other = next((e for e in following if e.prompt != example.prompt), example)
        pairs.append(
            Example(
                example.prompt,
                other.answers,
                other.answer_masks,
                index=example.index,
                where=example.where,
            )
        )
    return pairs


def reference_log_probs(
    config: DPOConfig, policy: LoadedModel, examples: list[Example], cache: Path
) -> list[Tensor]:
    """log pi_ref of every answer, per example [K]; computed once and kept in the file `cache`.

    The reference is `--ref-model`, or the policy's weights in memory as they are now. The file is
    used again only while weights and tokens hash to what it was made from. Each rank computes its
    share of the examples.
    """
    reference = policy
    if config.ref_model is not None:
        reference = load_policy(config.ref_model, policy.device)
        require_same_ids("--ref-model", reference, policy)
    weights = list(reference.hf.state_dict().values())
    key = checkpoint.fingerprint(examples, weights, more=config.dtype)
    sizes = [len(example.answers) for example in examples]
    if cache.exists():
        stored = load_file(cache)
        if key in stored:
            return list(stored[key].split(sizes))
    starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
    mine = range(distributed.rank(), len(examples), distributed.world())
    spots = [spot for i in mine for spot in range(starts[i], starts[i + 1])]
    own = [examples[i] for i in mine]
    sums = torch.zeros(sum(sizes), device=reference.device)
    sums[spots] = sequence_log_probs(reference, own, config.micro_batch_tokens, config.dtype)
    sums = distributed.sum_tensor(sums).cpu()
    if distributed.rank() == 0:
        temporary = cache.with_name(f".{cache.name}.tmp")
        save_file({key: sums}, temporary)
        temporary.replace(cache)
    return list(sums.split(sizes))
