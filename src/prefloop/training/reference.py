"""The reference policy: its log-probs, computed once and kept on disk, and one that moves."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from prefloop import distributed
from prefloop.config import DPOConfig, PPOConfig, TrainingConfig
from prefloop.data.batches import TokenBatch, packed_length
from prefloop.data.tokenize import Example
from prefloop.errors import first_line
from prefloop.files import write_atomic
from prefloop.models.heads import sequence_log_probs
from prefloop.models.load import load_policy, require_same_ids
from prefloop.models.model import LoadedModel
from prefloop.models.sharding import local, put
from prefloop.models.shared import reference_of
from prefloop.models.weights import frozen_copy, kept, storage_of
from prefloop.terminal import shown
from prefloop.training import checkpoint, slices
from prefloop.training.start import divide, is_divided


class References(Protocol):
    """The reference policy's log-probs of a method's examples."""

    digest: str

    def of(self, batch: TokenBatch) -> Tensor:
        """Of the batch's answers [A], in nats."""
        ...


MakeReference = Callable[[DPOConfig, LoadedModel, list[Example], Path], References]
"""Makes them; `Reference` unless another is given."""


class NoReference:
    """In the place of a Reference where its numbers weigh nothing."""

    digest = ""

    def __init__(self, *_: object) -> None:
        """See MakeReference."""

    def of(self, batch: TokenBatch) -> Tensor:
        """Zeros."""
        return torch.zeros(batch.answers, device=batch.input_ids.device)


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


class Reference:
    """log pi_ref of every answer, computed once and kept in the file `cache`.

    The reference is `--ref-model`, or the policy's weights in memory as they are now. The file is
    used again only while weights and tokens hash to what it was made from. Each rank computes its
    share of the examples.
    """

    def __init__(
        self, config: DPOConfig, policy: LoadedModel, examples: list[Example], cache: Path
    ) -> None:
        model = policy
        if config.ref_model is not None:
            model = load_policy(
                config.ref_model, policy.device, storage_of(config), divided=is_divided(config)
            )
            require_same_ids("--ref-model", model, policy)
            divide(config, [model])
        self.digest = checkpoint.weights_digest(model, checkpoint.weights_of(model.hf))
        """Of its weights."""
        sums = _log_probs(config, model, examples, cache, self.digest)
        parts = sums.split([len(example.answers) for example in examples])
        self.log_probs = {id(e): part for e, part in zip(examples, parts, strict=True)}
        """By id() of the example: those of its answers [K]."""

    def of(self, batch: TokenBatch) -> Tensor:
        """Those of the batch's answers [A], on its device."""
        parts = [self.log_probs[id(example)] for example in batch.examples]
        return torch.cat(parts).to(batch.input_ids.device)


def _log_probs(
    config: DPOConfig, model: LoadedModel, examples: list[Example], cache: Path, weights: str
) -> Tensor:
    key = hashlib.sha256(f"{model.dtype} {weights}".encode())
    for e in examples:
        key.update(repr((e.prompt, e.answers, e.answer_masks)).encode())
    name = key.hexdigest()
    sizes = [len(example.answers) for example in examples]
    stored = _stored(cache, name)
    if not distributed.any_rank(stored is None, model.device):
        assert stored is not None
        return stored
    starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
    mine = distributed.my_places(map(packed_length, examples))
    spots = [spot for i in mine for spot in range(starts[i], starts[i + 1])]
    own = [examples[i] for i in mine]
    sums = torch.zeros(sum(sizes), device=model.device)
    sums[spots] = sequence_log_probs(model, own, config.micro_batch_tokens)
    sums = distributed.sum_tensor(sums).cpu()
    if distributed.rank() == 0:
        write_atomic(cache, save({name: sums}, {"sha256": _sha256(sums)}))
    return sums


def _stored(cache: Path, name: str) -> Tensor | None:
    """The file's log-probs, if they are those that are asked for, and as they were written."""
    if not cache.exists():
        return None
    try:
        with safe_open(cache, "pt") as file:
            if name not in file.keys():  # noqa: SIM118  # of what is no mapping
                return None
            sums: Tensor = file.get_tensor(name)
            if (file.metadata() or {}).get("sha256") == _sha256(sums):
                return sums
        wrong = "not the sha256 that it was written with"
    except (OSError, SafetensorError) as error:
        wrong = first_line(error)
    if distributed.rank() == 0:
        print(shown(f"{cache}: {wrong}; it is computed again"), file=sys.stderr)
    return None


def _sha256(sums: Tensor) -> str:
    return hashlib.sha256(sums.contiguous().numpy().data).hexdigest()


def as_it_is(config: TrainingConfig, policy: LoadedModel) -> LoadedModel:
    """The policy, to stay as it is now: without its fresh adapters, or a frozen copy."""
    if config.lora_rank:
        return reference_of(policy)
    plan = kept(storage_of(config), policy.device, trained=False)
    module, unread = frozen_copy(policy.module, plan, policy.unread)
    return replace(policy, module=module, unread=unread)


def penalised_from(config: PPOConfig, policy: LoadedModel) -> LoadedModel | None:
    """What KL is measured from: the model that is named, or else a frozen copy of the policy.

    With adapters no copy is needed; where KL costs nothing none is kept.
    """
    if config.ref_model is not None:
        reference = load_policy(
            config.ref_model, policy.device, storage_of(config), divided=is_divided(config)
        )
        require_same_ids("--ref-model", reference, policy)
        reference.module.requires_grad_(False)
        return reference
    if config.lora_rank or config.kl_coef:
        return as_it_is(config, policy)
    if distributed.rank() == 0:
        print(
            "--kl-coef 0: no reference is kept, so no KL is logged; name a --ref-model to see it",
            file=sys.stderr,
        )
    return None


class MovingReference:
    """A policy's trained weights as a slow moving average (arXiv 2404.10719), kept in float32.

    theta_ref <- theta_ref + rate (theta - theta_ref). Of adapters both factors are averaged, A and
    B: it begins as the base and comes to the policy where that stays, and on the way it is near
    the average of their products, not equal to it.
    """

    def __init__(self, policy: LoadedModel, rate: float) -> None:
        self.policy, self.rate = policy, rate
        self.average = {
            name: p.detach().to(torch.float32, copy=True)
            for name, p in policy.named_trainable().items()
        }

    @torch.no_grad()
    def follow(self) -> None:
        """Moves towards the policy as it is now; tensors that were handed out stay as they were."""
        for name, p in self.policy.named_trainable().items():
            moved = self.average[name].clone()
            local(moved).lerp_(local(p).float(), self.rate)
            self.average[name] = moved

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it, the policy has the averaged weights."""
        named = self.policy.named_trainable()
        own = {name: p.detach().clone() for name, p in named.items()}
        try:
            for name, p in named.items():
                put(p, self.average[name])
            yield
        finally:
            for name, p in named.items():
                put(p, own[name])

    def load(self, average: Mapping[str, Tensor]) -> None:
        """Takes a checkpoint's average."""
        slices.read((own, average[name]) for name, own in self.average.items())
