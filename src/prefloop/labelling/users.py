"""`prefloop label add-user`: labellers and their personal links."""

from __future__ import annotations

import secrets
from contextlib import closing

from prefloop.config.labelling import LabelAddUserConfig
from prefloop.errors import UserError
from prefloop.labelling.store import Store


def run(config: LabelAddUserConfig) -> str:
    """The personal link of a new labeller, or a new link of a known one, whose old link ends."""
    if not config.name.isprintable() or len(config.name) > 100:
        raise UserError("--name must be 1 to 100 printable characters; give another")
    token = secrets.token_urlsafe(32)
    with closing(Store(config.store, must_exist=True)) as store, store.write() as t:
        labeller_id = t.put_labeller(config.name, config.role, token)
        t.log("add user", labeller_id, name=config.name, role=config.role)
    return f"{config.url.rstrip('/')}/enter?token={token}"
