"""Loading: any Hugging Face causal LM as a policy, and its sequence-classification form as a scorer.

Weights are float32 masters; bfloat16 is autocast around the forward pass. Dropout is off. Each model
passes a self-test: what does not give the same numbers packed as one by one takes padded batches.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from prefloop.config import UserError
from prefloop.data.batches import TokenBatch, pack
from prefloop.data.tokenize import Example
from prefloop.runs import model_path
from prefloop.models import adapters, attention

log = logging.getLogger("prefloop")
SELF_TEST_TOLERANCE = 1e-3  # of the largest absolute value; rounding stays a hundred times below


@dataclass(eq=False)
class LoadedModel:
    """A model with its tokenizer, ready to take token batches."""

    module: nn.Module  # PreTrainedModel, or PeftModel around one
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    packed: bool  # False: fails the self-test, takes padded batches
    source: str

    @property
    def hf(self) -> PreTrainedModel:
        """The Transformers model, adapters in place."""
        return adapters.unwrap(self.module)

    @property
    def is_scorer(self) -> bool:
        """True for a reward or value model (one label), False for a policy."""
        return hasattr(self.hf, "score")

    def trainable(self) -> list[nn.Parameter]:
        """Parameters that take gradients."""
        return [p for p in self.module.parameters() if p.requires_grad]


class ModelOptions(TypedDict):
    """How a trained model differs from one that is only read."""

    lora_rank: int
    lora_alpha: float
    gradient_checkpointing: bool


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name}: no CUDA device here; use --device cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: not a device; use auto, cpu, cuda or cuda:0") from None


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub id."""
    try:
        return AutoTokenizer.from_pretrained(model_path(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: no tokenizer found ({_first_line(error)}); save the tokenizer into the model's "
            "folder with tokenizer.save_pretrained"
        ) from error


def load_policy(
    path: str,
    device: torch.device,
    *,
    lora_rank: int = 0,
    lora_alpha: float = 0.0,
    gradient_checkpointing: bool = False,
) -> LoadedModel:
    """A causal LM with its tokenizer; `lora_rank` > 0 adds fresh adapters and freezes the rest."""
    tokenizer = load_tokenizer(path)
    module = _from_pretrained(AutoModelForCausalLM, path)
    return _ready(
        module, tokenizer, device, path, lora_rank, lora_alpha, gradient_checkpointing
    )


def load_scorer(
    path: str,
    device: torch.device,
    *,
    seed: int = 0,
    lora_rank: int = 0,
    lora_alpha: float = 0.0,
    gradient_checkpointing: bool = False,
) -> LoadedModel:
    """A reward or value model: the trained head of a scorer's folder, or a new one on a causal LM.

    A new head is drawn with standard deviation 1/sqrt(width + 1) (lm-human-preferences).
    """
    tokenizer = load_tokenizer(path)
    module = _from_pretrained(AutoModelForSequenceClassification, path, num_labels=1)
    if not hasattr(module, "score"):
        raise UserError(f"{path}: {type(module).__name__} has no scalar `score` head")
    if not is_scorer_folder(path):
        head: nn.Linear = module.score
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(head.weight, std=(head.in_features + 1) ** -0.5, generator=generator)
        _set_distinct_pad(module, tokenizer)
    return _ready(
        module, tokenizer, device, path, lora_rank, lora_alpha, gradient_checkpointing
    )


def is_scorer_folder(path: str) -> bool:
    """Whether the folder or hub id holds a sequence classifier."""
    config = AutoConfig.from_pretrained(model_path(path))
    return any("SequenceClassification" in name for name in config.architectures or [])


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0][:200]


def _from_pretrained(kind: Any, path: str, **options: Any) -> PreTrainedModel:
    path = model_path(path)
    try:
        if adapters.is_adapter_folder(path):
            return adapters.load_merged(kind, path, dtype=torch.float32, **options)
        return kind.from_pretrained(path, dtype=torch.float32, **options)  # type: ignore[no-any-return]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path}: not a model folder or hub id that Transformers can load as "
            f"{kind.__name__.removeprefix('AutoModelFor')} ({_first_line(error)})"
        ) from error


def _ready(
    module: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    source: str,
    lora_rank: int,
    lora_alpha: float,
    gradient_checkpointing: bool,
) -> LoadedModel:
    disable_dropout(module)
    module.to(device)  # type: ignore[arg-type]
    packed = passes_self_test(module)
    if not packed:
        log.warning("%s takes padded batches: packed attention is not exact for it", source)
    if gradient_checkpointing:
        module.gradient_checkpointing_enable({"use_reentrant": False})
    wrapped: nn.Module = module
    if lora_rank:
        wrapped = adapters.add_lora(module, lora_rank, lora_alpha or 2.0 * lora_rank)
    wrapped.train()
    return LoadedModel(wrapped, tokenizer, device, packed, source)


def disable_dropout(module: nn.Module) -> None:
    """Turns every dropout off, so that training and sampling see the same model."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)


def _set_distinct_pad(module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives a scorer a pad token that no answer ends with.

    Transformers scores the last token that is not padding, so pad = eos would move the score.
    """
    ends = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in ends:
        unused = [t for t in tokenizer.get_added_vocab() if "pad" in t.lower() or "reserved" in t]
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id not in ends:
            unused.append(str(tokenizer.unk_token))
        if unused:
            tokenizer.pad_token = unused[0]
        else:
            tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
            if len(tokenizer) > module.get_input_embeddings().num_embeddings:
                module.resize_token_embeddings(len(tokenizer))
    module.config.pad_token_id = tokenizer.pad_token_id


@torch.no_grad()
def passes_self_test(module: PreTrainedModel) -> bool:
    """Switches the model to packed attention if it then gives the numbers of one-by-one forwards.

    The test batch is two prompts with two answers each, some sharing tokens at other positions.
    """
    device = next(module.parameters()).device
    vocabulary = module.get_input_embeddings().num_embeddings
    batch = pack(_test_examples(vocabulary)).to(device)
    module.eval()
    alone = torch.cat([_forward(module, batch, rows, {}) for rows in batch.paths()])
    before = module.config._attn_implementation
    try:
        module.set_attn_implementation(attention.NAME)
        plan = attention.PackedPlan(batch.segments, device)
        packed = _forward(module, batch, list(range(batch.tokens)), {"attention_plan": plan})
        packed = torch.cat([packed[rows] for rows in batch.paths()])
        scale = alone.abs().max()
        if bool((packed - alone).abs().max() <= SELF_TEST_TOLERANCE * scale):
            return True
    except (NotImplementedError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        log.debug("packed self-test: %s", error)
    module.set_attn_implementation(before)
    return False


def _test_examples(vocabulary: int) -> list[Example]:
    def tokens(seed: int, length: int) -> tuple[int, ...]:
        return tuple((seed + 7 * i * i + 3 * i) % min(vocabulary, 997) for i in range(length))

    examples = []
    for number, (prompt, answers) in enumerate([(5, (3, 6)), (4, (7, 2))]):
        parts = tuple(tokens(11 * number + 31 * i + 1, n) for i, n in enumerate(answers))
        masks = tuple((True,) * n for n in answers)
        examples.append(
            Example(tokens(5, prompt), parts, masks, index=number, where="the self-test")
        )
    return examples


def _forward(
    module: PreTrainedModel, batch: TokenBatch, rows: list[int], options: dict[str, Any]
) -> Tensor:
    base = module.base_model
    return base(  # type: ignore[no-any-return]
        input_ids=batch.input_ids[rows].unsqueeze(0),
        position_ids=batch.position_ids[rows].unsqueeze(0),
        use_cache=False,
        **options,
    ).last_hidden_state[0]
