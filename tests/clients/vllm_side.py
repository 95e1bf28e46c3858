"""vLLM on the CPU: log-probs of answers after their prompts, and the reward model's scores."""

import json
import sys
from pathlib import Path

from vllm import LLM, PoolingParams, SamplingParams
from vllm.lora.request import LoRARequest

folder = Path(sys.argv[1])
rows = json.loads((folder / "rows.json").read_text())
common = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True}


def log_probs(engine, **options):
    prompts = [{"prompt_token_ids": row["prompt_ids"] + row["answer_ids"]} for row in rows]
    ask = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0.0)
    found = []
    for row, out in zip(
        rows, engine.generate(prompts, ask, use_tqdm=False, **options), strict=True
    ):
        places = out.prompt_logprobs[len(row["prompt_ids"]) :]
        ids = row["answer_ids"]
        found.append(sum(at[token].logprob for at, token in zip(places, ids, strict=True)))
    return found


def one_by_one(engine, **options):
    """The same from single next tokens: vLLM's adapters fail where it gives those of the prompt."""
    ask = SamplingParams(max_tokens=1, logprobs=-1, temperature=0.0)
    found = []
    for row in rows:
        ids, answer = row["prompt_ids"], row["answer_ids"]
        prompts = [{"prompt_token_ids": ids + answer[:n]} for n in range(len(answer))]
        outs = engine.generate(prompts, ask, use_tqdm=False, **options)
        pairs = zip(outs, answer, strict=True)
        found.append(sum(out.outputs[0].logprobs[0][token].logprob for out, token in pairs))
    return found


facts = {"policy": log_probs(LLM(str(folder / "policy"), **common))}
based = LLM(str(folder / "base"), enable_lora=True, max_lora_rank=8, max_logprobs=-1, **common)
facts["adapter"] = one_by_one(based, lora_request=LoRARequest("a", 1, str(folder / "adapter")))
scorer = LLM(str(folder / "reward"), runner="pooling", convert="classify", **common)
prompts = [{"prompt_token_ids": ids} for ids in json.loads((folder / "rendered.json").read_text())]
outputs = scorer.encode(
    prompts, PoolingParams(use_activation=False), pooling_task="classify", use_tqdm=False
)
facts["scores"] = [float(out.outputs.data.flatten()[0]) for out in outputs]
print("@@" + json.dumps(facts))
