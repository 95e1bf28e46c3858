"""One vLLM server: what it serves, answers from it, and other weights into it.

Its OpenAI completions endpoint takes and gives token ids. Weights reach it through a folder that
both see: whole ones by `reload_weights` (the server runs with VLLM_SERVER_DEV_MODE=1), adapters by
its adapter loading (VLLM_ALLOW_RUNTIME_LORA_UPDATING=1). Written against vLLM 0.32.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from prefloop.errors import UserError, first_line
from prefloop.generation.sampler import Sampling
from prefloop.http_json import Again, Denied, Refused, exchange

KEY = "PREFLOOP_ROLLOUT_API_KEY"
QUICK = 30.0  # seconds for what computes nothing
COLDEST = 0.01  # vLLM samples at no lower temperature
VOCABULARY = ("embed_tokens.weight", "wte.weight", "lm_head.weight")
NONE = -9999.0  # what vLLM tells instead of a log-prob of minus infinity
NEUTRAL = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""Said in each request: a server takes other values from the model's generation_config.json."""


@dataclass(frozen=True)
class Weights:
    """What a server is to sample from."""

    folder: str  # as the servers see it; or a hub id
    mark: str  # no other weights have it
    base: str = ""  # the whole weights that an adapter's folder stands on
    base_mark: str = ""

    @property
    def whole(self) -> tuple[str, str]:
        """Folder and mark of the whole weights below."""
        return (self.base, self.base_mark) if self.base else (self.folder, self.mark)


class Reply(NamedTuple):
    """An answer: its tokens with the stop token that ended it, and their log-probs in nats."""

    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    stopped: bool


class Server:
    """A server by its URL. Again, Refused and Denied come from it (see http_json)."""

    def __init__(self, url: str, timeout: float, patience: float, key: str = "") -> None:
        """Seconds: of an answer, and of loading weights."""
        self.url, self.timeout, self.patience, self._key = url, timeout, patience, key
        self.tunable = False  # takes whole weights, and says which it holds
        self.processed: bool | None = None  # its log-probs are those after temperature and top-k

    def __str__(self) -> str:
        return self.url

    # --- answers ---------------------------------------------------------------------------------

    def complete(
        self, weights: Weights, prompt: Sequence[int], sampling: Sampling, seed: int
    ) -> Reply:
        """One answer by these weights; Again where the server holds others before it or after."""
        name = weights.mark if weights.base else None
        if name is None:  # an adapter is asked for by its name
            self._require(weights)
        reply = self._choice(name, prompt, sampling, seed)
        self._require(weights)
        return reply

    def _require(self, weights: Weights) -> None:
        if not self.holds(weights):
            raise Again("it holds other weights: it was started again, or another loads into it")

    def _choice(
        self, name: str | None, prompt: Sequence[int], sampling: Sampling, seed: int
    ) -> Reply:
        try:
            content = self._post("/v1/completions", self._body(name, prompt, sampling, seed))
        except Denied as error:
            if name and error.status == 404:
                raise Again(f"it does not know the adapter {name}: it was started again") from None
            raise
        try:
            choice = content["choices"][0]
            tokens = tuple(int(token) for token in choice["token_ids"])
            log_probs = tuple(float(p) for p in choice["logprobs"]["token_logprobs"])
            ended = choice["finish_reason"]
        except (LookupError, TypeError, ValueError) as error:
            raise Again(f"a malformed reply ({type(error).__name__}: {error})") from None
        if ended not in ("stop", "length") or not tokens or len(tokens) != len(log_probs):
            raise Again(f"{len(tokens)} tokens, {len(log_probs)} log-probs, ended by {ended}")
        if name and content.get("model") != name:
            raise Again(f"an answer of {content.get('model')}, and {name} was asked for")
        if ended == "length" and len(tokens) < sampling.max_new_tokens:
            raise UserError(
                f"{self}: cuts an answer of {len(prompt)} + {len(tokens)} tokens; start it with a "
                "longer --max-model-len"
            )
        return Reply(tokens, log_probs, ended == "stop")

    def _body(
        self, name: str | None, prompt: Sequence[int], sampling: Sampling, seed: int
    ) -> dict[str, Any]:
        body = {
            "prompt": list(prompt),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": 0.0,
            **NEUTRAL,
            "seed": seed,
            "ignore_eos": True,  # it is one of these:
            "stop_token_ids": sorted(sampling.stop_token_ids),
            "skip_special_tokens": False,
            "return_token_ids": True,
            "logprobs": 0,
        }
        return body | ({"model": name} if name else {})

    # --- weights ---------------------------------------------------------------------------------

    def holds(self, weights: Weights) -> bool:
        """Whether it samples from them, as far as it can say: always where it cannot be told other
        ones.
        """
        return not self.tunable or self._version() == weights.whole[1]

    def put(self, weights: Weights, before: str = "") -> None:
        """Loads them, unless it holds them. `before`: the mark of an adapter that may go."""
        folder, mark = weights.whole
        held = self._version()
        self.tunable = held is not None
        if held is None and not self._launched_on(folder):
            raise UserError(
                f"{self}: serves other weights than {folder}, and takes none; start it with "
                "VLLM_SERVER_DEV_MODE=1, on a host that only you reach"
            )
        if weights.base and held == "default" and self._launched_on(folder):
            self._post("/update_weight_version", {"new_version": mark})
        elif held not in (None, mark):
            self._post("/pause", {})
            self._reload(folder)
            if AutoConfig.from_pretrained(folder).get_text_config().tie_word_embeddings:
                self._reload_tied_head(folder)
            if not self._post("/reset_prefix_cache", {})["success"]:
                raise Again("its prefix cache could not be emptied")
            self._post("/update_weight_version", {"new_version": mark})
            self._post("/resume", {})
        if weights.base:
            self._put_adapter(weights, before)
        if self.processed is None:
            self.processed = self._gives_processed(weights)

    def _reload(self, folder: str) -> None:
        call = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        self._load("/collective_rpc", call, folder, "is it a folder that it sees, too?")

    def _reload_tied_head(self, folder: str) -> None:
        """On a CPU vLLM multiplies by packed copies, and packs a head anew only where it is loaded
        by its name: else answers would be by new weights and the old head.
        """
        told = exchange(f"{self.url}/server_info", None, self.timeout, self._key)
        if "device_config=cpu" not in told["vllm_config"]:
            return
        path = Path(folder)
        heads: dict[str, Tensor] = {}
        for file in path.glob("*.safetensors"):
            with safe_open(file, "pt") as stored:
                names = (name for name in stored.offset_keys() if name.endswith(VOCABULARY))
                heads |= {name: stored.get_tensor(name) for name in names}
        if any(name.endswith("lm_head.weight") for name in heads):
            return
        if len(heads) != 1:
            raise UserError(f"{self}: no embeddings in {folder}; start it on this folder")
        try:
            with TemporaryDirectory(prefix=f"{path.name}-", dir=path.parent) as place:
                save_file({"lm_head.weight": heads.popitem()[1]}, f"{place}/model.safetensors")
                self._reload(place)
        except (OSError, SafetensorError) as error:
            told = f"{folder}: its tied head cannot be written beside it for {self}"
            raise UserError(f"{told} ({first_line(error)}); make room there") from error

    def _put_adapter(self, weights: Weights, before: str) -> None:
        ids = [card["id"] for card in self._cards()]
        if weights.mark not in ids:
            body = {"lora_name": weights.mark, "lora_path": weights.folder}
            remedy = (
                "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, --enable-lora and "
                "--max-lora-rank of its rank"
            )
            self._load("/v1/load_lora_adapter", body, weights.folder, remedy)
        if before in ids:
            with contextlib.suppress(Denied, Refused):
                body = {"lora_name": before}
                self._post("/v1/unload_lora_adapter", body, read=bytes.decode)

    def _load(self, path: str, body: Any, folder: str, remedy: str) -> None:
        try:
            self._post(path, body, self.patience, bytes.decode)
        except (Denied, Refused, Again) as error:
            if isinstance(error, Again) and not str(error).startswith("status 500"):
                raise
            raise UserError(f"{self}: does not load {folder} ({error}); {remedy}") from None

    def _version(self) -> str | None:
        """The mark that was given it, `default` before any; None where it knows no such thing."""
        try:
            return str(
                exchange(f"{self.url}/weight_info", None, QUICK, self._key)["weight_version"]
            )
        except Denied as error:
            if error.status == 404:
                return None
            raise UserError(f"{self}: {error}; give its API key in {KEY}") from None

    def _launched_on(self, folder: str) -> bool:
        first = self._cards()[0]
        served = {first.get("id"), first.get("root")}
        paths = {str(Path(name).resolve()) for name in served if name and Path(name).exists()}
        return folder in served or str(Path(folder).resolve()) in paths

    def _cards(self) -> list[dict[str, Any]]:
        try:
            cards: list[dict[str, Any]] = exchange(f"{self.url}/v1/models", None, QUICK, self._key)[
                "data"
            ]
        except Denied as error:
            raise UserError(f"{self}: {error}; give a vLLM server's URL") from None
        return cards

    # --- log-probs -------------------------------------------------------------------------------

    def _gives_processed(self, weights: Weights) -> bool:
        """Whether log-probs are those of what is sampled from: of all tokens but the likeliest none
        is left then by top-k 1.
        """
        name = weights.mark if weights.base else None
        body = self._body(name, [0], Sampling(max_new_tokens=4, top_k=1), seed=0)
        body |= {"logprobs": 2, "return_tokens_as_token_ids": True}
        try:
            told = self._post("/v1/completions", body)["choices"][0]["logprobs"]
            chosen = [float(value) for value in told["token_logprobs"]]
            lowest = min(float(p) for pair in told["top_logprobs"] for p in pair.values())
        except (LookupError, TypeError, ValueError) as error:
            raise Again(f"a malformed reply ({type(error).__name__}: {error})") from None
        processed = lowest <= NONE
        if max(chosen) > 1e-4 or (processed and max(chosen) < -1e-4):
            raise UserError(
                f"{self}: gives logits, not log-probs; start it with --logprobs-mode "
                "processed_logprobs"
            )
        return processed

    def require_exact(self, sampling: Sampling) -> None:
        """UserError where its log-probs are not those of the whole distribution at the sampling
        temperature (1 where it is 0).
        """
        cut = sampling.top_p < 1 or sampling.top_k
        if 0 < sampling.temperature < COLDEST:
            raise UserError(
                f"--temperature {sampling.temperature}: vLLM samples at {COLDEST} at least, or at 0"
            )
        if self.processed and cut and sampling.temperature:
            raise UserError(
                f"{self}: its log-probs are those of what --top-p and --top-k leave, and those of "
                "all tokens are needed; leave both out, or sample at temperature 1 from a server "
                "started with --logprobs-mode raw_logprobs"
            )
        if not self.processed and sampling.temperature not in (0.0, 1.0):
            raise UserError(
                f"{self}: its log-probs are those at temperature 1, and --temperature is "
                f"{sampling.temperature}; start it with --logprobs-mode processed_logprobs"
            )

    def _post(
        self,
        path: str,
        body: Any,
        timeout: float = 0.0,
        read: Callable[[bytes], Any] = json.loads,
    ) -> Any:
        return exchange(f"{self.url}{path}", body, timeout or self.timeout, self._key, read)
