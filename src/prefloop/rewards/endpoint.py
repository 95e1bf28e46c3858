"""An OpenAI-compatible endpoint: many requests at once, tried again, their replies kept on disk.

The API key is read from `PREFLOOP_JUDGE_API_KEY`; it goes into the request's header alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import queue
import random
import ssl
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefloop.errors import UserError, first_line
from prefloop.files import write_atomic
from prefloop.progress import Progress
from prefloop.terminal import shown

KEY = "PREFLOOP_JUDGE_API_KEY"
TRIES = 8
LONGEST = 60.0  # seconds between two tries, unless the endpoint asks for more
LONGEST_ASKED = 600.0
AGAIN = (408, 409, 425, 429)  # and all from 500 on
THIS_ONE = (400, 413, 422)  # what is wrong is this request: too long, or not allowed
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


class Refused(Exception):
    """One request will get no reply that can be read; others may."""


class Again(Exception):
    """The endpoint is busy, broken or away: the request is worth another try."""

    def __init__(self, why: str, after: float = 0.0) -> None:
        super().__init__(why)
        self.after = after


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirection: the key is for this address."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


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
        self._open = urllib.request.build_opener(_Stay).open
        self._lock, self._random = threading.Lock(), random.Random()
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
                why = str(error)
                spread = self._random.uniform(0.75, 1.25)
                delay = max(error.after, min(self.backoff * 2**number * spread, LONGEST))
            if number + 1 < TRIES:
                self._tell(why)
                with self._lock:
                    self.usage.retries += 1
                if over.wait(delay):
                    break
        raise UserError(
            f"{self}: {why}, {TRIES} times; see whether it runs, and give the command again: "
            f"the replies that came are kept in {self.cache}"
        )

    def _post(self, messages: Messages) -> str:
        body = {"model": self.model, "messages": messages, **self.args}
        headers = {"Content-Type": "application/json", "User-Agent": "prefloop"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(
            f"{self.url}/chat/completions", json.dumps(body).encode(), headers
        )
        try:
            with self._open(request, timeout=self.timeout) as response:
                content = json.loads(response.read())
            reply = content["choices"][0]["message"]["content"] or ""
            cost = content.get("usage") or {}
            tokens = [int(cost.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        except urllib.error.HTTPError as error:
            raise self._status(error) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise UserError(f"{self}: {first_line(reason)}; mend its certificate") from None
            raise Again(f"no reply ({first_line(reason)})") from None
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise Again(f"a malformed reply ({type(error).__name__}: {error})") from None
        if not isinstance(reply, str):
            raise Again("a malformed reply (its content is no text)")
        with self._lock:
            self.usage.requests += 1
            self.usage.prompt_tokens += tokens[0]
            self.usage.completion_tokens += tokens[1]
        return reply

    def _status(self, error: urllib.error.HTTPError) -> Exception:
        """What a status other than 200 means."""
        try:
            text = error.read(4000).decode(errors="replace")
        except (OSError, http.client.HTTPException):
            text = ""
        with contextlib.suppress(ValueError, LookupError, TypeError):
            text = str(json.loads(text)["error"]["message"])
        text = text.replace(self._key, "***") if self._key else text
        why = f"status {error.code} ({' '.join(text.split())[:200] or error.reason})"
        if error.code in AGAIN or error.code >= 500:
            after = error.headers.get("Retry-After", "")
            seconds = float(after) if after.isdecimal() else 0.0
            return Again(why, min(seconds, LONGEST_ASKED))
        if error.code in THIS_ONE:
            return Refused(why)
        remedy = "mend the URL or the model's name"
        if error.code in (401, 403):
            remedy = f"give its API key in {KEY}"
        return UserError(f"{self}: {why}; {remedy}")

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
