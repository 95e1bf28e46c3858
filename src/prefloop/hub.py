"""Whether the hub can be asked, before its client asks again and again in vain. No torch."""

from __future__ import annotations

from prefloop.errors import UserError, first_line


def is_cached(name: str, *files: str) -> bool:
    """Whether one of a model's files was fetched before; also of what can be no hub id."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return any(isinstance(try_to_load_from_cache(name, file), str) for file in files)
    except HFValidationError:  # told by who asks for it
        return True


def require_hub(what: str, endpoint: str | None = None, seconds: float = 5.0) -> None:
    """UserError where the hub cannot be reached within `seconds`; its answer is not looked at.

    The hub's own client takes half a minute of new tries to find that out.
    """
    from huggingface_hub import constants, get_session

    address = endpoint or constants.ENDPOINT
    if constants.HF_HUB_OFFLINE and endpoint is None:
        why = "HF_HUB_OFFLINE is set"
    else:
        try:
            get_session().head(address, timeout=seconds)
            return
        except Exception as error:  # the client's kinds of error differ from version to version
            why = first_line(error)
    raise UserError(
        f"{what}: no such folder here, and the hub {address} cannot be asked ({why}); mend the "
        "path, or the connection"
    )
