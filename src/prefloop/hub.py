"""The Hugging Face hub: whether it can be asked, who pushes, and the pushing. No torch."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefloop.errors import UserError, first_line

log = logging.getLogger("prefloop")


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


def require_login(repo: str) -> None:
    """UserError unless there is a token and the hub knows whose it is; before any work."""
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise UserError(
            f"--push-to-hub {repo}: no token of the hub here; run `hf auth login`, or set HF_TOKEN"
        )
    with _one_line(repo, "look at the token and the network"):
        HfApi().whoami()


def push(folder: Path, repo: str, private: bool, mend: str = "") -> str:
    """Uploads a folder as one commit to a model repository, made where it is not there; its URL.

    `mend` is what to do where it fails. An existing repository keeps its visibility, its history,
    and files of other names.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _one_line(repo, mend or f"{folder} is whole, push it again from there"):
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message="prefloop export")
    log.info("pushed to %s", url)
    return str(url)


def readme(repo: str) -> str:
    """The card of a repository, "" where there is none or the hub is not to be reached."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, "README.md")).read_text(encoding="utf-8")
    except Exception as error:  # without network, cache, permission, card: it says nothing then
        log.debug("card of %s: %r", repo, error)
        return ""


@contextmanager
def _one_line(repo: str, mend: str) -> Iterator[None]:
    """Whatever the hub and its client raise, as the user's to mend."""
    try:
        yield
    except Exception as error:
        raise UserError(f"--push-to-hub {repo}: {first_line(error)}; {mend}") from error
