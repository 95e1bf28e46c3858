"""llama.cpp itself, as the package xllamacpp brings it: its server, asked over HTTP."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any


class Llama:
    """A file's model on one thread, its keys and values in float32."""

    def __init__(self, file: Path) -> None:
        import xllamacpp as x

        settings = x.CommonParams()
        settings.model.path = str(file)
        settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = 512, 1, 0
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
        settings.cache_type_k = settings.cache_type_v = x.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.warmup = settings.fit_params = False
        settings.cache_ram_mib = settings.port = settings.verbosity = 0
        self.server = x.Server(settings)

    def ask(self, path: str, **body: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            self.server.listening_address + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def ids(self, text: str, special: bool = True) -> list[int]:
        """A text's tokens; with `special`, those that begin and end a text too."""
        asked = {"content": text, "add_special": special, "parse_special": True}
        return list(self.ask("/tokenize", **asked)["tokens"])

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """The answer's tokens, with the one that ended it."""
        asked = {"prompt": ids, "n_predict": count, "temperature": 0, "cache_prompt": False}
        return list(self.ask("/completion", **asked, return_tokens=True)["tokens"])

    def log_probs(self, ids: list[int], count: int) -> dict[int, float]:
        """Log-probs of the `count` likeliest next tokens; none where those are no whole letters."""
        asked = {"prompt": ids, "n_predict": 1, "temperature": 0, "cache_prompt": False}
        found = self.ask("/completion", **asked, n_probs=count).get("completion_probabilities")
        return {one["id"]: one["logprob"] for one in found[0]["top_logprobs"]} if found else {}
