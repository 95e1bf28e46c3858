"""What stands between the network and the app: hosts, sizes, rates, headers, origin and CSRF."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Collection
from hashlib import sha256
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "prefloop_session"
MOST_BYTES = 65_536
"""Of one request's body, but for forms that carry guidelines."""
MOST_BYTES_OF = {"/admin/settings": 1_048_576}
CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": CONTENT_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # without any, browsers send forms with Origin: null
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}


def csrf_token(session: str) -> str:
    """What a page of this session sends back with each change; other sites cannot know it."""
    return hmac.new(session.encode(), b"csrf", sha256).hexdigest()


def csrf_matches(session: str, given: str) -> bool:
    """Whether a request knows the session's token."""
    return hmac.compare_digest(csrf_token(session).encode(), given.encode())


class RateLimit:
    """A bucket a key: `burst` requests at once, `rate` a second on average."""

    def __init__(self, rate: float, burst: float, clock: Callable[[], float]) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._left: dict[str, tuple[float, float]] = {}  # what is left, and when that was so

    def allows(self, key: str) -> bool:
        """Take one from the key's bucket, if there is one."""
        now = self._clock()
        left, then = self._left.get(key, (self._burst, now))
        left = min(self._burst, left + self._rate * (now - then))
        if len(self._left) > 10_000:  # full buckets say nothing
            self._left = {k: v for k, v in self._left.items() if now - v[1] < self._burst}
        self._left[key] = (left - 1 if left >= 1 else left, now)
        return left >= 1


class Guard:
    """ASGI middleware: refuses what no page of ours sends, and sets the headers of what we send."""

    def __init__(self, app: ASGIApp, hosts: Collection[str], origins: Collection[str]) -> None:
        self._app, self._hosts, self._origins = app, set(hosts), set(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                if not scope["path"].startswith("/static/"):
                    headers["Cache-Control"] = "no-store"
            await send(message)

        most = MOST_BYTES_OF.get(scope["path"], MOST_BYTES)
        fault = self._fault(scope["method"], Headers(scope=scope), most)
        answer = self._app if fault is None else JSONResponse({"reason": fault[1]}, fault[0])
        await answer(scope, receive, send_with_headers)

    def _fault(self, method: str, headers: Headers, most: int) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if (urlsplit(f"//{host}").hostname or "") not in self._hosts:
            return 400, "wrong-host"
        if method in ("GET", "HEAD"):
            return None
        origin = headers.get("origin", "")
        if origin not in self._origins and origin != f"http://{host}":
            return 403, "foreign-origin"
        length = headers.get("content-length", "")
        if not length.isdigit():
            return 411, "no-length"
        return (413, "too-large") if int(length) > most else None
