"""What prefloop writes, in the programs that take it: the same numbers to 1e-4, in float32."""

import json

import pytest
import torch

from prefloop.data.tokenize import Example
from prefloop.models.export import export_model
from prefloop.models.heads import sequence_log_probs
from prefloop.models.load import load_policy, load_scorer
from prefloop.records import Message
from prefloop.rewards.judges import load_judge
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.small import perturbed, write_rows

pytestmark = [pytest.mark.clients, pytest.mark.timeout(3000)]
CPU = torch.device("cpu")
PROMPTS = ("the boat", "an ant in a", "it took")
ANSWERS = ((" took the bath", " a"), (" thin oath", " the ant that"), (" in", " boat the"))
SIZES = {"hidden": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """policy, base, adapter and reward as prefloop writes them, rows for each program, and what
    prefloop computes of them.
    """
    folder = tmp_path_factory.mktemp("exported")
    tokenizer = tiny_tokenizer()
    for seed, name in enumerate(("base", "begin")):
        model = tiny_model("llama", seed=seed, **SIZES)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    export_model(perturbed(load_policy(str(folder / "begin"), CPU), seed=5), folder / "policy")
    tuned = load_policy(str(folder / "base"), CPU, lora_rank=4)
    export_model(perturbed(tuned, seed=6), folder / "adapter")
    export_model(
        perturbed(load_scorer(str(folder / "base"), CPU, seed=1), seed=7), folder / "reward"
    )
    rows, bare = [], []
    for place, (prompt, answers) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        ids, said = tokenizer(prompt)["input_ids"], [tokenizer(a)["input_ids"] for a in answers]
        for answer in said:
            rows.append({"prompt_ids": ids, "answer_ids": [*answer, tokenizer.eos_token_id]})
        bare.append(example(ids, said, place))
    whole = [example(row["prompt_ids"], [row["answer_ids"]], n) for n, row in enumerate(rows)]
    expected = {}
    for name in ("policy", "adapter"):
        model = load_policy(str(folder / name), CPU)
        expected[name] = sequence_log_probs(model, whole, 8192).tolist()
        expected[f"{name} without eos"] = sequence_log_probs(model, bare, 8192).tolist()
    judge = load_judge(str(folder / "reward"), device="cpu", dtype="float32")
    flat = [(p, a.strip()) for p, pair in zip(PROMPTS, ANSWERS, strict=True) for a in pair]
    chats = [(Message("user", prompt),) for prompt, _ in flat]
    expected["scores"] = judge(chats, [answer for _, answer in flat], [True] * len(flat))
    pairs = [
        {"prompt": p, "chosen": a.strip(), "rejected": b.strip()}
        for p, (a, b) in zip(PROMPTS, ANSWERS, strict=True)
    ]
    write_rows(folder / "rewardbench.jsonl", pairs)
    strings = [
        {"prompt": p, "chosen": a, "rejected": b}
        for p, (a, b) in zip(PROMPTS, ANSWERS, strict=True)
    ]
    write_rows(folder / "strings.jsonl", strings)
    choices = [
        {"prompt": p, "answers": list(a), "gold": 0} for p, a in zip(PROMPTS, ANSWERS, strict=True)
    ]
    write_rows(folder / "choices.jsonl", choices)
    (folder / "rows.json").write_text(json.dumps(rows))
    rendered = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": p}, {"role": "assistant", "content": a}], return_dict=True
        )["input_ids"]
        for p, a in flat
    ]
    (folder / "rendered.json").write_text(json.dumps(rendered))
    expected["string scores"] = judge(
        [p for p, pair in zip(PROMPTS, ANSWERS, strict=True) for _ in pair],
        [a for pair in ANSWERS for a in pair],
        [True] * len(flat),
    )
    for name in ("policy", "adapter", "scores"):
        assert max(expected[name]) - min(expected[name]) > 0.5  # numbers that tell
    return folder, expected


def example(prompt, answers, index):
    masks = tuple((True,) * len(answer) for answer in answers)
    return Example(tuple(prompt), tuple(map(tuple, answers)), masks, index=index, where="test")


def same(found, expected, what):
    gap = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    print(f"{what}: largest difference {gap:.1e} over {len(expected)}")
    assert gap < 1e-4, (what, found, expected)


def test_transformers_peft_and_a_rewardbench_file(exported, ask):
    folder, expected = exported
    found = ask("hugging-face", "transformers_side", folder)
    for name in ("policy", "adapter", "scores"):
        same(found[name], expected[name], f"transformers {name}")


def test_trl(exported, ask):
    folder, expected = exported
    found = ask("hugging-face", "trl_side", folder)
    same(found["policy"], expected["policy"], "trl policy")
    same(found["scores"], expected["string scores"], "trl scores")


def test_lm_eval(exported, ask):
    folder, expected = exported
    found = ask("hugging-face", "lm_eval_side", folder)
    for name in ("policy", "adapter"):
        same(found[name], expected[f"{name} without eos"], f"lm-eval {name}")


def test_vllm(exported, ask):
    folder, expected = exported
    found = ask("vllm", "vllm_side", folder)
    for name in ("policy", "adapter", "scores"):
        same(found[name], expected[name], f"vllm {name}")
