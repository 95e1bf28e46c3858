"""Training and decoding on a GPU: MFU, tokens a second, peak memory, and Transformers beside it.

Models of the shapes of SmolLM2-135M, Llama 3.2 1B and Llama 3.1 8B with random weights: speed does
not ask what they say. Full training has float32 masters under bfloat16 autocast; the 8B model is
trained through LoRA. Transformers' own side has the same weights, loss and autocast, its batch
padded, with sdpa.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import prefloop.generation.engine
from benchmarks.ceilings import model_flops, weight_bytes
from prefloop.config import DPOConfig, SFTConfig, TrainingConfig
from prefloop.data.batches import pack_all
from prefloop.data.tokenize import Example
from prefloop.generation.engine import Engine
from prefloop.generation.sampler import Sampling
from prefloop.losses.preference import sigmoid_loss
from prefloop.models import adapters, selftest
from prefloop.models.model import LoadedModel
from prefloop.models.precision import autocast
from prefloop.training import optim
from prefloop.training.preference import Preference
from prefloop.training.sft import SFT
from prefloop.training.step import optimizer_step

engines: Any = prefloop.generation.engine
CUDA = torch.device("cuda", 0)
SHAPES: dict[str, dict[str, Any]] = {
    "135M": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "1B": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "8B": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
}  # fmt: skip
PAIRS, PROMPT, ANSWER = 32, (128, 512), (64, 512)
BUDGET = {"135M": 16384, "1B": 16384, "8B": 8192}
STOCK_BUDGET = {"135M": 16384, "1B": 4096}  # its logits in float32 leave no room for more
ROUNDS = 3
NEW = 128
BATCHES = (1, 8, 32, 128)


def measure(_: str, __: int) -> dict[str, Any]:
    """Everything, printed line by line as it is found."""
    peak, bandwidth = ceilings()
    name = torch.cuda.get_device_name()
    print(f"{name}: {peak / 1e12:.0f} TFLOP/s in bfloat16, {bandwidth / 1e12:.2f} TB/s", flush=True)
    found: dict[str, Any] = {"device": name, "flops": peak, "bytes": bandwidth}
    for shape in SHAPES:
        model = load(shape)
        found[f"decode {shape}"] = decoding(model, shape, bandwidth)
        if shape == "8B":
            model.module = adapters.add_lora(model.hf, 16, 32.0)
            model.hf.gradient_checkpointing_enable({"use_reentrant": False})
            model.module.train()
        found[f"train {shape}"] = training(model, shape, peak)
        del model
        free()
    return found


def free() -> None:
    """Gives the device's memory back."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def seconds(run: Callable[[], Any]) -> float:
    """Median of a few calls after a first one."""
    run()
    times = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times)


def ceilings() -> tuple[float, float]:
    """FLOP/s of a large bfloat16 product; bytes/s of a large copy, read and written."""
    x = torch.randn(8192, 8192, device=CUDA, dtype=torch.bfloat16)
    peak = 2 * 8192**3 / seconds(lambda: [linear(x, x) for _ in range(10)]) * 10
    a = torch.empty(1 << 30, device=CUDA, dtype=torch.bfloat16)
    b = torch.empty_like(a)
    return peak, 2 * a.nbytes / seconds(lambda: b.copy_(a))


def load(shape: str) -> LoadedModel:
    """A model of the shape, through the self-test as every model goes."""
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192)
    torch.manual_seed(0)
    with CUDA:
        module = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    start = time.perf_counter()
    model = LoadedModel(module, PreTrainedTokenizerFast, CUDA, False, shape)  # type: ignore[arg-type]
    with torch.no_grad():
        selftest.choose_path(model)
    model.dtype = "bfloat16"
    spent = time.perf_counter() - start
    print(
        f"{shape}: packed {model.packed}, FlashAttention {model.varlen}, {model.lean}; "
        f"self-test {spent:.1f} s",
        flush=True,
    )
    return model


def pairs(vocabulary: int) -> list[Example]:
    """Random tokens; lengths evenly spread."""
    draw = random.Random(0)

    def ids(bounds: tuple[int, int]) -> tuple[int, ...]:
        return tuple(draw.randrange(5, vocabulary) for _ in range(draw.randint(*bounds)))

    rows = []
    for number in range(PAIRS):
        answers = (ids(ANSWER), ids(ANSWER))
        masks = tuple((True,) * len(answer) for answer in answers)
        rows.append(Example(ids(PROMPT), answers, masks, ((0,), (1,)), index=number))
    return rows


def training(model: LoadedModel, shape: str, peak: float) -> dict[str, Any]:
    """Steps of SFT and DPO, forward, backward and AdamW."""
    rows = pairs(SHAPES[shape]["vocab_size"])
    settings: dict[str, Any] = {
        "model": shape, "data": shape, "output": Path(mkdtemp()) / "run", "lr": 1e-6,
        "dtype": "bfloat16", "micro_batch_tokens": BUDGET[shape],
    }  # fmt: skip
    singles = [replace(e, answers=e.answers[:1], answer_masks=e.answer_masks[:1], tiers=((0,),))
               for e in rows]  # fmt: skip
    sft = SFTConfig(**settings)
    cache = Path(mkdtemp()) / "reference.safetensors"
    dpo = DPOConfig(**settings)
    optimizer = optim.build_optimizer({"policy": model.trainable()}, sft, {})
    methods: list[tuple[str, Any, TrainingConfig, Sequence[Example]]] = [
        ("sft", SFT(sft, model, singles, []), sft, singles),
        ("dpo", Preference(dpo, model, rows, [], cache), dpo, rows),
    ]
    found: dict[str, Any] = {}
    for name, method, config, examples in methods:
        free()
        batches: list[Any] = pack_all(examples, BUDGET[shape])
        flops = sum(
            model_flops(model, b.position_ids.cpu(), b.target_ids.numel(), trains=True)
            for b in batches
        )
        tokens = sum(len(e.prompt) + len(a) for e in examples for a in e.answers)

        def step(method: Any = method, batches: Any = batches, config: Any = config) -> float:
            parameters = {"policy": model.trainable()}
            return optimizer_step(method, batches, parameters, optimizer, config).losses["loss"]

        line: dict[str, Any] = report(f"{shape} {name}", seconds(step), tokens, flops, peak)
        if shape != "8B":
            free()
            own = stock(model, examples, optimizer, name, STOCK_BUDGET[shape])
            line |= {"stock": report(f"{shape} {name} stock", seconds(own), tokens, flops, peak)}
        found[name] = line
    return found


def report(name: str, spent: float, tokens: int, flops: float, peak: float) -> dict[str, Any]:
    """Prints and returns what a step took; tokens are those of whole sequences."""
    memory = torch.cuda.max_memory_allocated() / 2**30
    rates = f"{tokens / spent:,.0f} tokens/s, MFU {flops / spent / peak:.3f}"
    print(f"{name}: {spent:.3f} s a step, {rates}, peak {memory:.1f} GiB", flush=True)
    return {"seconds": spent, "tokens_per_second": tokens / spent, "mfu": flops / spent / peak,
            "peak_gib": memory}  # fmt: skip


def stock(
    model: LoadedModel, examples: Sequence[Example], optimizer: Any, name: str, budget: int
) -> Callable[[], float]:
    """The same step as Transformers' users write it: padded sequences, logits of every token."""
    hf = model.hf
    sequences = [(e.prompt, a) for e in examples for a in e.answers]
    longest = max(len(p) + len(a) for p, a in sequences)
    per = max(2, budget // longest // 2 * 2)  # padded sequences in the same budget of tokens
    groups = [sequences[i : i + per] for i in range(0, len(sequences), per)]

    def log_probs(group: Sequence[Any]) -> Tensor:
        ids = [torch.tensor([*p, *a], device=CUDA) for p, a in group]
        batch = pad_sequence(ids, batch_first=True)
        mask = pad_sequence([torch.ones_like(x) for x in ids], batch_first=True)
        logits = hf(input_ids=batch, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        picked = logits.gather(-1, batch[:, 1:, None])[..., 0] - logits.logsumexp(-1)
        places = torch.arange(batch.shape[1] - 1, device=CUDA)
        starts = torch.tensor([[len(p) - 1] for p, _ in group], device=CUDA)
        return (picked * (places >= starts) * mask[:, 1:]).sum(1)  # type: ignore[no-any-return]

    def step() -> float:
        total = 0.0
        optimizer.zero_grad()
        with as_it_came(hf):
            for group in groups:
                with autocast(CUDA, "bfloat16"):
                    sums = log_probs(group)
                if name == "sft":
                    loss = -sums.sum() / 10_000
                else:
                    zeros = torch.zeros_like(sums[::2])
                    loss = sigmoid_loss(sums[::2], sums[1::2], zeros, zeros, beta=0.1).sum / PAIRS
                loss.backward()
                total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.trainable(), 1.0)
        optimizer.step()
        return total

    return step


@torch.no_grad()
def decoding(model: LoadedModel, shape: str, bandwidth: float) -> list[dict[str, Any]]:
    """NEW tokens for prompts of 64; by graphs, without, and by Transformers' `generate`."""
    found = []
    step_bytes = weight_bytes(model, torch.bfloat16)
    sampling = Sampling(max_new_tokens=NEW, temperature=1.0)
    record = engines.as_graphs
    for count in BATCHES:
        prompts = [list(range(10, 74)) for _ in range(count)]
        engine = Engine(model, count)

        def run(engine: Engine = engine, prompts: Any = prompts) -> None:
            engine.generate(prompts, 1, sampling, seed=0)

        line: dict[str, Any] = {"batch": count, "graphs": seconds(run)}
        if count in (1, 32) and shape == "1B":
            engines.as_graphs = lambda step, cache, device: step
            line["plain"] = seconds(run)
            engines.as_graphs = record
            line["transformers"] = seconds(lambda p=prompts: generate(model, p))  # type: ignore[misc]
        share = step_bytes / bandwidth * NEW / line["graphs"]
        print(
            f"{shape} decode {count}: {count * NEW / line['graphs']:,.0f} tokens/s, "
            f"{share:.2f} of the bandwidth's bound; "
            + ", ".join(f"{k} {v:.2f} s" for k, v in line.items() if k != "batch"),
            flush=True,
        )
        found.append(line | {"share": share})
    free()
    return found


def generate(model: LoadedModel, prompts: list[list[int]]) -> None:
    """Transformers' own, under the same autocast."""
    hf: Any = model.hf
    ids = torch.tensor(prompts, device=CUDA)
    with as_it_came(hf), autocast(CUDA, "bfloat16"):
        hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW,
                    min_new_tokens=NEW, do_sample=True, top_k=0)  # fmt: skip


@contextmanager
def as_it_came(hf: Any) -> Iterator[None]:
    """Within it, the model computes as Transformers does, with sdpa."""
    before = hf.config._attn_implementation
    hf.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        hf.set_attn_implementation(before)
