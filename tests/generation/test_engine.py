from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BloomConfig, BloomForCausalLM

from prefloop.data.batches import pack
from prefloop.data.tokenize import Example
from prefloop.errors import UserError
from prefloop.generation.engine import Engine
from prefloop.generation.protocol import Sample
from prefloop.generation.sampler import Sampling
from prefloop.models.adapters import unwrap
from prefloop.models.heads import answer_log_probs
from prefloop.models.load import FLOAT32, make_ready
from prefloop.models.model import LoadedModel
from prefloop.models.weights import Storage, kept, settle
from tests.generation.naive import CPU, PROMPTS, greedy, policy, unpacked
from tests.tiny import ARCHS, Arch, tiny_model, tiny_tokenizer

GREEDY = Sampling(max_new_tokens=12, temperature=0)
WARM = Sampling(max_new_tokens=12, temperature=0.7, stop_token_ids={9, 60, 61, 62})


def tokens(rows: list[list[Sample]]) -> list[list[tuple[int, ...]]]:
    return [[sample.tokens for sample in row] for row in rows]


@pytest.mark.parametrize("slots", [4, 64])
@pytest.mark.parametrize("arch", ARCHS)
def test_greedy_is_the_naive_loop(arch: Arch, slots: int) -> None:
    rows = Engine(policy(arch), slots).generate(PROMPTS, 3, GREEDY, seed=0)
    expected = [tuple(greedy(tiny_model(arch), prompt, 12)) for prompt in PROMPTS]
    assert tokens(rows) == [[answer] * 3 for answer in expected]
    assert [[(s.prompt_index, s.sample_index) for s in row] for row in rows] == [
        [(p, s) for s in range(3)] for p in range(5)
    ]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("prefill_tokens", [1, 12])
def test_prefill_in_pieces_changes_nothing(arch: Arch, prefill_tokens: int) -> None:
    model = policy(arch)
    whole = Engine(model, 3).generate(PROMPTS, 2, WARM, seed=1)
    pieces = Engine(model, 3, prefill_tokens=prefill_tokens).generate(PROMPTS, 2, WARM, seed=1)
    assert tokens(pieces) == tokens(whole)


@pytest.mark.parametrize("arch", ARCHS)
def test_log_probs_are_the_trainers(arch: Arch) -> None:
    model = policy(arch)
    rows = Engine(model, 4).generate(PROMPTS, 3, WARM, seed=0)
    assert {s.finish_reason for row in rows for s in row} == {"stop", "length"}
    examples = [
        Example(
            prompt=tuple(prompt),
            answers=tuple(s.tokens for s in row),
            answer_masks=tuple((True,) * len(s.tokens) for s in row),
        )
        for prompt, row in zip(PROMPTS, rows, strict=True)
    ]
    expected = answer_log_probs(model, pack(examples), temperature=0.7)
    sampled = torch.tensor([x for row in rows for s in row for x in s.log_probs])
    torch.testing.assert_close(sampled, expected.detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("arch", ARCHS)
def test_an_answer_does_not_depend_on_its_company(arch: Arch) -> None:
    model = policy(arch)
    alone = Engine(model, 1).generate(PROMPTS[:2], 2, WARM, seed=5)
    for slots in (2, 7, 64):
        beside = Engine(model, slots).generate(PROMPTS, 4, WARM, seed=5)
        assert tokens([row[:2] for row in beside[:2]]) == tokens(alone)


def test_numbers_stand_for_the_prompts_places() -> None:
    model = policy()
    whole = Engine(model, 8).generate(PROMPTS, 2, WARM, seed=5)
    part = Engine(model, 8).generate(PROMPTS[1:4:2], 2, WARM, seed=5, numbers=[1, 3])
    assert tokens(part) == [tokens(whole)[1], tokens(whole)[3]]


def test_samples_of_a_prompt_and_of_seeds_differ() -> None:
    model = policy()
    rows = Engine(model, 8).generate([PROMPTS[0], PROMPTS[0]], 2, WARM, seed=5)
    again = Engine(model, 8).generate([PROMPTS[0], PROMPTS[0]], 2, WARM, seed=5)
    other = Engine(model, 8).generate([PROMPTS[0], PROMPTS[0]], 2, WARM, seed=6)
    assert again == rows
    assert len({s.tokens for row in (*rows, *other) for s in row}) == 8


def test_an_answer_ends_with_its_first_stop_token() -> None:
    model, prompt = policy(), PROMPTS[1]
    free = greedy(tiny_model(), prompt, 12)
    stop = free[4]
    expected = free[: free.index(stop) + 1]
    sampling = Sampling(max_new_tokens=12, temperature=0, stop_token_ids={stop})
    ((sample,),) = Engine(model).generate([prompt], 1, sampling, seed=0)
    assert list(sample.tokens) == expected
    assert sample.finish_reason == "stop"
    assert len(sample.log_probs) == len(expected)
    ((cut,),) = Engine(model).generate([prompt], 1, GREEDY, seed=0)
    assert cut.finish_reason == "length"
    # A stop token in the last place that is allowed still counts as a stop.
    short = Sampling(max_new_tokens=len(expected), temperature=0, stop_token_ids={stop})
    ((last,),) = Engine(model).generate([prompt], 1, short, seed=0)
    assert last.finish_reason == "stop"


def test_one_new_token_and_no_prompts() -> None:
    model = policy()
    rows = Engine(model, 2).generate(PROMPTS, 2, Sampling(max_new_tokens=1, temperature=0), seed=0)
    assert tokens(rows) == [[tuple(greedy(tiny_model(), p, 1))] * 2 for p in PROMPTS]
    assert Engine(model).generate([], 2, GREEDY, seed=0) == []


def test_frequencies_of_first_tokens_match_the_model() -> None:
    model, prompt, count = policy(initializer_range=0.02), PROMPTS[1], 3000
    rows = Engine(model, 500).generate([prompt], count, Sampling(max_new_tokens=1), seed=0)
    seen = torch.bincount(torch.tensor([s.tokens[0] for s in rows[0]]), minlength=268)
    with torch.no_grad():
        reference = tiny_model(initializer_range=0.02)
        expected = count * reference(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    assert expected.min() > 5
    chi_square = ((seen - expected) ** 2 / expected).sum().item()
    assert chi_square < 344.3  # 99.9 %, 267 degrees of freedom


def test_weights_are_live() -> None:
    model = policy()
    engine = Engine(model, 4)
    before = engine.generate(PROMPTS, 1, GREEDY, seed=0)
    other = tiny_model(seed=1)
    with torch.no_grad():
        for mine, new in zip(model.hf.parameters(), other.parameters(), strict=True):
            mine.copy_(new)
    engine.sync(model, 1)
    after = engine.generate(PROMPTS, 1, GREEDY, seed=0)
    assert tokens(after) == [[tuple(greedy(other, prompt, 12))] for prompt in PROMPTS]
    assert tokens(after) != tokens(before)
    assert before[0][0].weights_version == 0
    assert after[0][0].weights_version == 1


def test_sync_takes_another_model() -> None:
    engine, other = Engine(policy(), 4), policy("qwen3")
    engine.sync(other, 7)
    rows = engine.generate(PROMPTS, 1, GREEDY, seed=0)
    assert tokens(rows) == [[tuple(greedy(tiny_model("qwen3"), prompt, 12))] for prompt in PROMPTS]
    assert {row[0].weights_version for row in rows} == {7}


@torch.no_grad()
def _trained_adapters(model: LoadedModel, scale: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.module.named_parameters():
        if "lora_B" in name:
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def test_lora() -> None:
    model = policy(lora_rank=2)
    model.module.train()
    engine = Engine(model, 4)
    plain = [[tuple(greedy(tiny_model(), prompt, 12))] for prompt in PROMPTS]
    assert tokens(engine.generate(PROMPTS, 1, GREEDY, seed=0)) == plain
    _trained_adapters(model)
    frozen = [p.requires_grad for p in model.module.parameters()]
    rows = tokens(engine.generate(PROMPTS, 1, GREEDY, seed=0))
    assert [p.requires_grad for p in model.module.parameters()] == frozen
    assert model.module.training
    merged = unwrap(model.module.merge_and_unload())  # type: ignore[operator]
    merged.set_attn_implementation("sdpa")
    assert rows == [[tuple(greedy(merged, prompt, 12))] for prompt in PROMPTS]
    assert rows != plain


@pytest.mark.parametrize("arch", ARCHS)
def test_models_that_do_not_pack_give_the_same(arch: Arch) -> None:
    packed, fallback = policy(arch), unpacked(arch)
    for sampling in (GREEDY, WARM):
        expected = Engine(packed, 4).generate(PROMPTS, 3, sampling, seed=2)
        rows = Engine(fallback, 2).generate(PROMPTS, 3, sampling, seed=2)
        assert tokens(rows) == tokens(expected)
        for ours, theirs in zip(chain(*rows), chain(*expected), strict=True):
            assert ours.finish_reason == theirs.finish_reason
            assert ours.log_probs == pytest.approx(theirs.log_probs, abs=1e-5)


def test_bloom_takes_the_fallback() -> None:
    config = BloomConfig(vocab_size=268, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2)
    torch.manual_seed(0)
    model = BloomForCausalLM(config).eval()
    ready = make_ready(model, tiny_tokenizer(), CPU, "bloom", kept(FLOAT32, CPU, True))
    assert not ready.packed
    rows = Engine(ready).generate(PROMPTS, 2, GREEDY, seed=0)
    assert tokens(rows) == [[tuple(greedy(model, prompt, 12))] * 2 for prompt in PROMPTS]


def test_bfloat16_stays_near_and_leaves_nothing_behind() -> None:
    model = policy(lora_rank=2)
    exact = Engine(model, 4).generate(PROMPTS, 1, GREEDY, seed=0)
    near = Engine(replace(model, dtype="bfloat16"), 4).generate(PROMPTS, 1, GREEDY, seed=0)
    first = [[row[0].log_probs[0] for row in rows] for rows in (exact, near)]
    assert first[0] == pytest.approx(first[1], abs=0.2)
    assert first[0] != first[1]
    assert not torch.is_autocast_enabled("cpu")
    assert all(p.dtype == torch.float32 for p in model.module.parameters())


def asked_for_gradients(model: LoadedModel, dtype: Any) -> set[str]:
    """Parameters that require one only while answers are written."""
    before = {n for n, p in model.module.named_parameters() if p.requires_grad}
    meanwhile: set[str] = set()

    def look(_: Tensor) -> None:
        meanwhile.update(n for n, p in model.module.named_parameters() if p.requires_grad)

    model = replace(model, dtype=dtype)
    Engine(model, 4).generate(PROMPTS, 1, GREEDY, seed=0, on_tokens=look)
    assert before == {n for n, p in model.module.named_parameters() if p.requires_grad}
    return meanwhile - before


def test_autocast_keeps_the_casts_of_frozen_weights_that_are_not_packed() -> None:
    """Those are GPT-2's, which are no linear layers of torch's; nothing is cast in float32."""
    packs = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    for arch, count in (("llama", 0 if packs else 15), ("gpt2", 16 if packs else 17)):
        model = policy(arch, lora_rank=2)  # type: ignore[arg-type]
        assert asked_for_gradients(model, "float32") == set()
        assert len(asked_for_gradients(model, "bfloat16")) == count


def test_weights_kept_in_bfloat16() -> None:
    """They give the answers of float32 weights that autocast would round to them, and no casts."""
    short = kept(Storage("bfloat16", "bfloat16"), CPU, trained=False)
    ready = [replace(policy(tie_word_embeddings=False), dtype="bfloat16") for _ in range(2)]
    settle(ready[0].module, CPU, short)
    settle(ready[1].module, CPU, short)
    ready[1].module.float()
    rows = [Engine(model, 4).generate(PROMPTS, 2, WARM, seed=0) for model in ready]
    assert ready[0].hf.dtype == torch.bfloat16 and ready[1].hf.dtype == torch.float32
    assert rows[0] == rows[1]
    ready[0].module.requires_grad_(False)
    assert asked_for_gradients(ready[0], "bfloat16") == set()


def test_told_of_each_answer_as_it_ends() -> None:
    ended: list[Sample] = []
    rows = Engine(policy(), 3).generate(PROMPTS, 2, WARM, seed=0, on_done=ended.append)
    assert sorted(ended, key=lambda s: (s.prompt_index, s.sample_index)) == [*chain(*rows)]


def test_mode_and_gradients_are_as_before_even_after_an_error() -> None:
    model = policy()
    model.module.train()

    def stop(_: Sample) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Engine(model).generate(PROMPTS, 1, GREEDY, seed=0, on_done=stop)
    assert model.module.training
    assert torch.is_grad_enabled()


def test_wrong_requests_are_refused() -> None:
    engine = Engine(policy())
    with pytest.raises(UserError, match="prompt 1 has no tokens"):
        engine.generate([[5], []], 1, GREEDY, seed=0)
    learned = Engine(policy("gpt2"))
    with pytest.raises(UserError, match="up to 512 only"):
        learned.generate([[5] * 501], 1, GREEDY, seed=0)
    with pytest.raises(UserError, match="at least 1"):
        engine.generate([[5]], 0, GREEDY, seed=0)
    with pytest.raises(UserError, match="max_concurrent"):
        Engine(engine.model, 0)


def test_broken_weights_are_told() -> None:
    model = policy()
    with torch.no_grad():
        model.hf.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        Engine(model).generate(PROMPTS, 1, WARM, seed=0)
