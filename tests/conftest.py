"""Checks the jaxtyping shapes of the losses wherever a test calls them."""

from jaxtyping import install_import_hook

import prefloop.cli  # noqa: F401  # says what Transformers may print, before it is loaded

install_import_hook("prefloop.losses", "beartype.beartype")
