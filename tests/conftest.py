"""Checks the jaxtyping shapes of the losses wherever a test calls them."""

from jaxtyping import install_import_hook

install_import_hook("prefloop.losses", "beartype.beartype")
