"""`prefloop label serve`: the app under uvicorn."""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from prefloop.config.labelling import LabelServeConfig
from prefloop.errors import UserError
from prefloop.labelling.store import Store

if TYPE_CHECKING:
    import uvicorn


def _until_interrupted(server: uvicorn.Config) -> None:
    import uvicorn

    uvicorn.Server(server).run()


def run(
    config: LabelServeConfig, serve: Callable[[uvicorn.Config], None] = _until_interrupted
) -> None:
    """Serve until interrupted; `serve` does so."""
    import uvicorn

    from prefloop.labelling.web.app import create_app

    hosts, origins = names_and_origins(config)
    with closing(Store(config.store, must_exist=True)) as store:
        app = create_app(store, hosts=hosts, origins=origins, session_hours=config.session_hours)
        address = origins[0] if origins else f"http://{_bracketed(config.host)}:{config.port}"
        print(f"serving {store.name} at {address}; `prefloop label add-user` makes links, "
              "Ctrl-C ends", file=sys.stderr, flush=True)  # fmt: skip
        server = uvicorn.Config(
            app, config.host, config.port, log_level="warning", access_log=False,
            limit_concurrency=500, timeout_keep_alive=30, server_header=False,
        )  # fmt: skip
        serve(server)


def names_and_origins(config: LabelServeConfig) -> tuple[list[str], list[str]]:
    """The host names that the server answers to, and the public address's origin.

    Listening on all addresses says nothing about the name that browsers use, and a server that
    answers to any name can be reached through another site's: then `public_url` must tell it.
    """
    hosts = ["127.0.0.1", "localhost", "::1", config.host]
    if config.public_url is None:
        if _is_any(config.host):
            raise UserError(
                f"--host {config.host} listens on every address; give --public-url, the address "
                "that labellers will open"
            )
        return hosts, []
    parts = urlsplit(config.public_url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/"):
        raise UserError(f"--public-url {config.public_url}: give https://NAME, without a path")
    return [*hosts, parts.hostname], [f"{parts.scheme}://{parts.netloc}"]


def _is_any(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
