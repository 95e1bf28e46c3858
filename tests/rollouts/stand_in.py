"""A vLLM server's endpoints on this machine, over plain Transformers, with faults as a test says.

What is asked for in a request is done step by step by a plain forward pass: so its log-probs are
independent of the code under test. `kill` drops every connection; `start` begins again from the
weights on disk, as a new process would.
"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from prefloop.models.adapters import quiet

Fault = Callable[[str, dict[str, Any], int], "int | bytes | str | None"]
"""Of a path, its body and how often the path was asked before: a status, a whole reply, "drop" to
close the connection, "silence" until the server ends, or None for a sound reply."""


def sound(*_: Any) -> None:
    """No fault."""


class StandIn:
    """One server; `tunable` is VLLM_SERVER_DEV_MODE, `adapters` runtime loading of LoRA.

    On the CPU its head is a copy, which vLLM 0.32 renews only by what is stored under its name.
    """

    def __init__(
        self,
        folder: Path,
        fault: Fault = sound,
        mode: str = "processed_logprobs",
        tunable: bool = True,
        adapters: bool = True,
        port: int = 0,
        device: str = "cuda",
    ) -> None:
        self.folder, self.fault, self.mode = folder, fault, mode
        self.tunable, self.adapters = tunable, adapters
        self.asked: list[dict[str, Any]] = []  # completions
        self.paths: list[str] = []
        self.read: list[Path] = []  # folders of weights and adapters
        self.port, self.device = port, device
        self.lock = threading.Lock()
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.dead = threading.Event()
        self.base = AutoModelForCausalLM.from_pretrained(self.folder, dtype="float32").eval()
        if self.device == "cpu":
            self.base.lm_head = copy.deepcopy(self.base.lm_head)
        self.loaded: dict[str, Any] = {}
        self.version, self.paused = "default", False
        self.http = ThreadingHTTPServer(("127.0.0.1", self.port), self._handler())
        self.http.daemon_threads = True
        self.port = self.http.server_port
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,))
        self.thread.start()

    def kill(self) -> None:
        self.dead.set()
        self.http.shutdown()
        self.http.socket.close()
        self.thread.join()

    # --- replies ---------------------------------------------------------------------------------

    def reply(self, path: str, body: dict[str, Any]) -> Any:
        """A reply's JSON or text; a status for an error."""
        path = path.partition("?")[0]
        if path == "/v1/models":
            cards = [{"id": "served", "root": str(self.folder), "parent": None}]
            return {"data": cards + [{"id": name, "parent": "served"} for name in self.loaded]}
        if path == "/v1/completions":
            return self._complete(body)
        if path == "/v1/load_lora_adapter" and self.adapters:
            self.read.append(Path(body["lora_path"]))
            with quiet():
                tuned = PeftModel.from_pretrained(copy.deepcopy(self.base), body["lora_path"])
            self.loaded[body["lora_name"]] = tuned
            return "Success: loaded"
        if path == "/v1/unload_lora_adapter" and self.adapters:
            return "Success" if self.loaded.pop(body["lora_name"], None) else 404
        if not self.tunable:
            return 404
        return self._tune(path, body)

    def _tune(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/weight_info":
            return {"weight_version": self.version}
        if path in ("/pause", "/resume"):
            self.paused = path == "/pause"
            return {"status": path}
        if path == "/update_weight_version":
            self.version = body["new_version"]
            return {"success": True}
        if path == "/server_info":
            return {"vllm_config": f"dtype=torch.float32, device_config={self.device}, seed=0"}
        if path == "/reset_prefix_cache":
            return {"success": True}
        if path == "/collective_rpc":
            assert self.paused and body["method"] == "reload_weights"
            folder = body["kwargs"]["weights_path"]
            self.read.append(Path(folder))
            # Not by `from_pretrained`: it alters a class meanwhile, for all threads.
            told = load_file(Path(folder) / "model.safetensors")
            assert not self.base.load_state_dict(told, strict=False).unexpected_keys
            return {"results": [None]}
        return 404

    @torch.no_grad()
    def _complete(self, body: dict[str, Any]) -> Any:
        name = body.get("model", "served")
        if name not in ("served", *self.loaded):
            return 404
        model = self.base if name == "served" else self.loaded[name]
        generator = torch.Generator().manual_seed(body["seed"])
        if body["temperature"] > 2:
            return 400
        ids, log_probs, tops, ended = list(body["prompt"]), [], [], "length"
        for _ in range(body["max_tokens"]):
            logits = model(torch.tensor([ids])).logits[0, -1]
            raw, scaled = logits.log_softmax(-1), logits / (body["temperature"] or 1.0)
            order = scaled.argsort(descending=True)
            left = scaled[order].softmax(-1).cumsum(-1) - scaled[order].softmax(-1) < body["top_p"]
            left[body["top_k"] or len(left) :] = False
            scaled = scaled.masked_fill(~torch.zeros_like(left).scatter(0, order, left), -torch.inf)
            processed = scaled.log_softmax(-1)
            token = int(processed.exp().multinomial(1, generator=generator))
            if body["temperature"] == 0:
                token = int(logits.argmax())
            told = {"processed_logprobs": processed, "raw_logprobs": raw, "raw_logits": logits}
            log_probs.append(float(told[self.mode][token]))
            best = told[self.mode].topk(2)
            values = best.values.clamp(min=-9999.0).tolist()
            tops.append(dict(zip(map(str, best.indices.tolist()), values, strict=True)))
            ids.append(token)
            if token in body["stop_token_ids"]:
                ended = "stop"
                break
        choice = {
            "token_ids": ids[len(body["prompt"]) :],
            "logprobs": {"token_logprobs": log_probs, "top_logprobs": tops},
            "finish_reason": ended,
        }
        return {"model": name, "choices": [choice]}

    # --- HTTP ------------------------------------------------------------------------------------

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        stand_in, dead = self, self.dead

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer({})

            def do_POST(self) -> None:
                self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def answer(self, body: dict[str, Any]) -> None:
                with stand_in.lock:
                    before = stand_in.paths.count(self.path)
                    stand_in.paths.append(self.path)
                    if self.path == "/v1/completions":
                        stand_in.asked.append(body)
                    said = stand_in.fault(self.path, body, before)
                    if said is None:
                        said = stand_in.reply(self.path, body)
                if said == "silence":
                    dead.wait(60)
                if dead.is_set() or said in ("silence", "drop"):
                    self.close_connection = True
                    return
                status, content = 200, b""
                if isinstance(said, int):
                    status, content = said, json.dumps({"error": {"message": "no"}}).encode()
                elif isinstance(said, bytes):
                    content = said
                else:
                    content = (said if isinstance(said, str) else json.dumps(said)).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


@contextmanager
def serving(*folders: Path, **options: Any) -> Iterator[list[StandIn]]:
    """A server of each folder."""
    servers = [StandIn(folder, **options) for folder in folders]
    try:
        yield servers
    finally:
        for server in servers:
            if not server.dead.is_set():
                server.kill()
