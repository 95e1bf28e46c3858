"""An OpenAI-compatible endpoint: many requests at once, tried again, their replies kept on disk.

The API key is read from `PREFLOOP_JUDGE_API_KEY`; it goes into the request's header alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefloop.errors import UserError
from prefloop.files import write_atomic
from prefloop.http_json import Again, Denied, Refused, delay, exchange
from prefloop.progress import Progress
from prefloop.terminal import shown

KEY = "PREFLOOP_JUDGE_API_KEY"
KEYLESS = f"give its API key in {KEY}"
TRIES = 8
Messages = list[dict[str, str]]
Read = Callable[[str], float | None]
"""What a reply says; None where it cannot be read."""


@dataclass
class Usage:
    """What asking has cost."""

    requests: int = 0  # that were replied to
    cached: int = 0  # replies that stood on disk
    retries: int = 0
    failed: int = 0  # judgements given up
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def summary(self) -> str:
        """One line for people."""
        return (
            f"judge: {self.requests} replies and {self.cached} from the cache, "
            f"{self.prompt_tokens:,} tokens in and {self.completion_tokens:,} out, "
            f"{self.retries} tries again, {self.failed} without a verdict"
        )


@dataclass
class Endpoint:
    """Where a language model is asked, and how."""

    model: str
    url: str  # of the API: `/chat/completions` stands below it
    args: dict[str, Any]
    timeout: float  # seconds
    concurrency: int
    cache: Path
    backoff: float = 1.0  # seconds to the second try; doubled for each that follows
    usage: Usage = field(default_factory=Usage)
    why: str = ""  # the first judgement given up

    def __post_init__(self) -> None:
        self._key = os.environ.get(KEY, "").strip()
        self._lock = threading.Lock()
        self._told: set[str] = set()

    def ask(self, prompts: Sequence[str], read: Read, reminder: str) -> list[float | None]:
        """What the model's replies to the prompts say, in order; None of one given up.

        A reply that cannot be read is asked for once more, with the `reminder`. UserError where
        the endpoint stays away, or no prompt at all gets a reply that can be read; what was replied
        is kept, and is not asked for again.
        """
        found: dict[str, float | None] = {}
        todo: queue.SimpleQueue[str] = queue.SimpleQueue()
        for prompt in dict.fromkeys(prompts):
            reply = self._kept(prompt)
            if reply is None or (known := read(reply)) is None:
                todo.put(prompt)
            else:
                found[prompt], self.usage.cached = known, self.usage.cached + 1
        waiting = todo.qsize()
        done: queue.SimpleQueue[tuple[str, float | Exception]] = queue.SimpleQueue()
        over = threading.Event()

        def work() -> None:
            while not over.is_set():
                try:
                    prompt = todo.get_nowait()
                except queue.Empty:
                    return
                try:
                    done.put((prompt, self._judged(prompt, read, reminder, over)))
                except Refused as error:
                    done.put((prompt, error))
                except Exception as error:  # no other request will fare better
                    over.set()
                    done.put((prompt, error))

        try:
            for _ in range(min(self.concurrency, waiting)):
                threading.Thread(target=work, daemon=True).start()  # Ctrl-C waits for none of them
            with Progress("judge's replies", waiting, leave=False) as progress:
                for _ in range(waiting):
                    prompt, value = done.get()
                    if isinstance(value, Refused):
                        self.usage.failed += 1
                        self.why = self.why or str(value)
                        found[prompt] = None
                    elif isinstance(value, Exception):
                        raise value
                    else:
                        found[prompt] = value
                    progress.advance()
        finally:
            over.set()
        if found and all(value is None for value in found.values()):
            raise UserError(f"{self}: no verdict at all; {self.why}")
        return [found[prompt] for prompt in prompts]

    def __str__(self) -> str:
        return f"openai:{self.model}@{self.url}"

    # --- one request -----------------------------------------------------------------------------

    def _judged(self, prompt: str, read: Read, reminder: str, over: threading.Event) -> float:
        messages = [{"role": "user", "content": prompt}]
        for _ in range(2):
            reply = self._reply(messages, over)
            if (value := read(reply)) is not None:
                self._keep(prompt, reply)
                return value
            said = {"role": "assistant", "content": reply}
            messages = [*messages, said, {"role": "user", "content": reminder}]
        raise Refused(f"a reply holds no verdict: {reply[-80:]!r}")

    def _reply(self, messages: Messages, over: threading.Event) -> str:
        """The model's reply, asked for until it comes or the tries are used up."""
        why = ""
        for number in range(TRIES):
            try:
                return self._post(messages)
            except Again as error:
                why, after = str(error), error.after
            if number + 1 < TRIES:
                self._tell(why)
                with self._lock:
                    self.usage.retries += 1
                if over.wait(delay(number, self.backoff, after)):
                    break
        raise UserError(
            f"{self}: {why}, {TRIES} times; see whether it runs, and give the command again: "
            f"the replies that came are kept in {self.cache}"
        )

    def _post(self, messages: Messages) -> str:
        body = {"model": self.model, "messages": messages, **self.args}
        try:
            content = exchange(f"{self.url}/chat/completions", body, self.timeout, self._key)
            reply = content["choices"][0]["message"]["content"] or ""
            cost = content.get("usage") or {}
            tokens = [int(cost.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        except Denied as error:
            remedy = {401: KEYLESS, 403: KEYLESS, 0: "mend its certificate"}.get(error.status)
            remedy = remedy or "mend the URL or the model's name"
            raise UserError(f"{self}: {error}; {remedy}") from None
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise Again(f"a malformed reply ({type(error).__name__}: {error})") from None
        if not isinstance(reply, str):
            raise Again("a malformed reply (its content is no text)")
        with self._lock:
            self.usage.requests += 1
            self.usage.prompt_tokens += tokens[0]
            self.usage.completion_tokens += tokens[1]
        return reply

    def _tell(self, why: str) -> None:
        """Each kind of trouble once."""
        with self._lock:
            new = why not in self._told
            self._told.add(why)
        if new:
            print(shown(f"{self}: {why}; tried again"), file=sys.stderr)

    # --- what was replied ------------------------------------------------------------------------

    def _path(self, prompt: str) -> Path:
        asked = json.dumps([self.url, self.model, self.args, prompt], sort_keys=True)
        name = hashlib.sha256(asked.encode()).hexdigest()
        return self.cache / name[:2] / f"{name}.json"

    def _kept(self, prompt: str) -> str | None:
        path = self._path(prompt)
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            reply = str(said["reply"])
            if said.get("sha256", _sha256(reply)) == _sha256(reply):  # older ones lack it
                return reply
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, TypeError):
            pass
        self._tell(f"{path} is damaged")
        return None

    def _keep(self, prompt: str, reply: str) -> None:
        said = {"judge": str(self), "args": self.args, "prompt": prompt, "reply": reply}
        said["sha256"] = _sha256(reply)
        write_atomic(self._path(prompt), json.dumps(said))


def _sha256(reply: str) -> str:
    return hashlib.sha256(reply.encode()).hexdigest()
