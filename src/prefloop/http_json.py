"""JSON over HTTP: one request, and what kind of trouble it is where no reply comes. No torch."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from prefloop.errors import first_line

LONGEST = 60.0  # seconds between two tries, unless the server asks for more
LONGEST_ASKED = 600.0
AGAIN = (408, 409, 425, 429)  # and all from 500 on
THIS_ONE = (400, 413, 422)  # what is wrong is this request: too long, or not allowed


class Refused(Exception):
    """One request will get no reply that can be read; others may."""


class Again(Exception):
    """The server is busy, broken or away: the request is worth another try."""

    def __init__(self, why: str, after: float = 0.0) -> None:
        super().__init__(why)
        self.after = after


class Denied(Exception):
    """No request of this kind will fare better: address, name, key or certificate are wrong."""

    def __init__(self, why: str, status: int = 0) -> None:
        super().__init__(why)
        self.status = status


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirection: the key is for this address."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def exchange(
    url: str,
    body: Any = None,
    timeout: float = 60.0,
    key: str = "",
    read: Callable[[bytes], Any] = json.loads,
) -> Any:
    """The JSON that a server replies to a POST of `body`, or to a GET without one; None if empty.

    Again, Refused or Denied where there is none; `key` goes into the request's header alone. `read`
    reads a reply that is not JSON.
    """
    headers = {"Content-Type": "application/json", "User-Agent": "prefloop"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)
    try:
        with urllib.request.build_opener(_Stay).open(request, timeout=timeout) as response:
            content = response.read()
        return read(content) if content else None
    except urllib.error.HTTPError as error:
        raise _status(error, key) from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise Denied(first_line(reason)) from None
        raise Again(f"no reply ({first_line(reason)})") from None
    except ValueError as error:
        raise Again(f"a malformed reply ({type(error).__name__}: {error})") from None


def delay(number: int, first: float, after: float = 0.0) -> float:
    """Seconds to wait after try `number` (from 0): doubled each time, and spread.

    `after`: what the server asked for.
    """
    spread = random.SystemRandom().uniform(0.75, 1.25)  # a run's generators stay as they are
    return max(after, min(first * 2.0**number * spread, LONGEST))


def _status(error: urllib.error.HTTPError, key: str) -> Exception:
    """What a status other than 200 means."""
    try:
        text = error.read(4000).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        text = ""
    with contextlib.suppress(ValueError, LookupError, TypeError):
        text = str(json.loads(text)["error"]["message"])
    text = text.replace(key, "***") if key else text
    why = f"status {error.code} ({' '.join(text.split())[:200] or error.reason})"
    if error.code in AGAIN or error.code >= 500:
        after = error.headers.get("Retry-After", "")
        return Again(why, min(float(after) if after.isdecimal() else 0.0, LONGEST_ASKED))
    return Refused(why) if error.code in THIS_ONE else Denied(why, error.code)
