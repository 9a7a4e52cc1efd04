"""What an error of the Hub client means, and what the user can do about it."""

import re

_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]+|(?<=Bearer )\S+")
_CONNECTION_ERRORS = {"TransportError", "ConnectionError", "TimeoutException", "ProtocolError"}


def explain(error: Exception, ref: str) -> str:
    """The message for an error of the Hub client: what it means for `ref`, and a remedy.

    Args:
        error: Any exception that the client raised.
        ref: `org/name[@revision]`, or a local path that was taken for one.

    Returns:
        One or two sentences, which never contain a token.
    """
    from huggingface_hub import constants, errors, get_token

    while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # "error while uploading", from the error itself
    repo = ref.partition("@")[0]
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return (
            f"'{ref}' is gated: ask for access at {constants.ENDPOINT}/{repo}, log in to the "
            "account that has it with `hf auth login`, and run the same line again."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return (
            f"'{ref}': '{repo}' has no such branch, tag or commit. Name one that "
            f"{constants.ENDPOINT}/{repo} lists."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"'{ref}': no such local path, and the Hub has no such repository or keeps it from "
            "you. Check the name; if it is private, log in with `hf auth login`."
        )
    if status == 401 and get_token() is None:
        return f"'{ref}': you are not logged in. Log in with `hf auth login`, or set HF_TOKEN."
    if status == 401:
        return (
            f"'{ref}': the Hub does not accept your token. Log in again with `hf auth login`, or "
            "correct HF_TOKEN."
        )
    if status == 403:
        return (
            f"'{ref}': your token has no right to do this. Use one with write access to "
            f"'{repo.partition('/')[0]}' (`hf auth login`), or a name under your own account."
        )
    if constants.is_offline_mode():
        return (
            f"'{ref}': no such local path, not (or not all of it) in the Hub's cache, and offline "
            "mode is on. Unset HF_HUB_OFFLINE, or fetch it first where there is a network: "
            "`hf download`."
        )
    if _is_local(error):
        return (
            f"'{ref}': reading or writing failed here ({getattr(error, 'strerror', None)}). Make "
            "room or correct the permissions, and run the same line again."
        )
    if _is_connection(error, status):
        return (
            f"'{ref}': the connection to {constants.ENDPOINT} failed ({_reason(error)}). Check the "
            "network and run the same line again: what has arrived is kept."
        )
    return f"'{ref}': the Hub answered with an error ({type(error).__name__}: {_reason(error)})."


def _is_local(error: Exception) -> bool:
    """An error of this machine's files, such as a full disk."""
    is_network = isinstance(error, (ConnectionError, TimeoutError))
    return isinstance(error, OSError) and error.errno is not None and not is_network


def _is_connection(error: Exception, status: int | None) -> bool:
    from huggingface_hub import errors

    if status is None and isinstance(error, (OSError, errors.RevisionResolutionError)):
        return True
    # The errors of the HTTP library by name, since it belongs to the client and may change.
    return any(c.__name__ in _CONNECTION_ERRORS for c in type(error).__mro__)


def _reason(error: Exception) -> str:
    """The error's own text in one line, without any token, cut to 300 characters."""
    from huggingface_hub import get_token

    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines or [type(error).__name__])
    if token := get_token():
        text = text.replace(token, "...")
    return _TOKEN.sub("...", text)[:300]  # cut last: half a token would not be recognised
