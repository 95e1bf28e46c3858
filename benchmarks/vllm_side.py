"""vLLM's side of generation on the CPU, in a venv of its own, its engine in this process."""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # before the import: CPU seconds count here
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB

from transformers import AutoTokenizer
from vllm import LLM, SamplingParams

from benchmarks.meter import serve
from benchmarks.work import WORKS, read_texts, stop_ids


def main(name: str, path: str, models: str, dtype: str, form: str) -> None:
    """Load, then take turns; without stops all answers have full length."""
    work, policy = WORKS[name], f"{models}/policy"
    tokenizer: Any = AutoTokenizer.from_pretrained(policy)
    prompts = [{"prompt_token_ids": tokenizer(r["prompt"])["input_ids"]} for r in read_texts(path)]
    engine = LLM(policy, dtype=dtype, max_model_len=1024)
    sampling = SamplingParams(
        n=work.answers,
        temperature=1.0,
        max_tokens=work.answer[1],
        stop_token_ids=stop_ids(work, tokenizer),
        ignore_eos=not work.stops,
        detokenize=False,
    )

    def turn() -> dict[str, Any]:
        engine.reset_prefix_cache()  # a turn must not find the last one's prompts
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        return {"tokens": sum(len(answer.token_ids) for o in outputs for answer in o.outputs)}

    serve(turn)


if __name__ == "__main__":
    main(*sys.argv[1:])
