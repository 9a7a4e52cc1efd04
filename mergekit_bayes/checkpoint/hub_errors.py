"""What an error of the Hub client means, and what the user can do about it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from mergekit_bayes.checkpoint.hub_client import HubError, in_words, prepare
from mergekit_bayes.errors import BmergeError, CheckpointError, printable, shown

# Tokens of all kinds (hf_..., hf_oauth_..., hf_jwt_...), and what else logs in or signs.
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])hf_[\w.~+/=-]+"
    r"|(?i:(?<=bearer )|(?<=basic ))\S+"
    r"|(?<=://)[^\s/@]+(?=@)"
    r"|(?i:(?<=signature=)|(?<=token=)|(?<=key=))[^&\s]+"
)
_CONNECTION_ERRORS = {"TransportError", "ConnectionError", "TimeoutException", "ProtocolError"}


@contextmanager
def asking(ref: str) -> Iterator[None]:
    """Ask the Hub about `ref` in the block; what goes wrong becomes one message with a remedy.

    The traceback of the client is dropped, since it might show what was sent.

    Args:
        ref: `org/name[@revision]`.

    Raises:
        CheckpointError: Any error in the block, unless it is already a `BmergeError` of ours; or
            huggingface_hub cannot be loaded.
    """
    prepare()
    try:
        yield
    except HubError as error:
        raise CheckpointError(explain(error, ref)) from None
    except BmergeError:
        raise
    except Exception as error:  # the client raises errors of many libraries
        raise CheckpointError(explain(error, ref)) from None


def explain(error: Exception, ref: str) -> str:
    """The message for an error of the Hub client: what it means for `ref`, and a remedy.

    Args:
        error: Any exception that the client raised.
        ref: `org/name[@revision]`, or a local path that was taken for one.

    Returns:
        One or two sentences, which never contain a token or a control character.
    """
    from huggingface_hub import constants, errors

    wrappers = (RuntimeError, errors.LocalEntryNotFoundError, errors.RevisionResolutionError)
    while isinstance(error, wrappers) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # "error while uploading", from the error itself
    repo, name = ref.partition("@")[0], shown(ref)
    endpoint = printable(constants.ENDPOINT)
    if isinstance(error, HubError):
        return f"{name}: {error}"
    if (token := _token()) is not None and not _is_sendable(token):
        return (
            f"{name}: your token holds characters that no token has. Correct HF_TOKEN, or log in "
            "again with `hf auth login`."
        )
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{name} is gated: ask for access at {endpoint}/{repo}, log in to the account that has "
            "it with `hf auth login`, and run the same line again."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return (
            f"{name}: '{repo}' has no such branch, tag or commit. Name one that {endpoint}/{repo} "
            "lists."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{name}: no such local path, and the Hub has no such repository or keeps it from "
            "you. Check the name; if it is private, log in with `hf auth login`."
        )
    if status == 401 and token is None:
        return f"{name}: you are not logged in. Log in with `hf auth login`, or set HF_TOKEN."
    if status == 401:
        return (
            f"{name}: the Hub does not accept your token. Log in again with `hf auth login`, or "
            "correct HF_TOKEN."
        )
    if status == 403:
        return (
            f"{name}: your token has no right to do this. Use one with write access to "
            f"'{repo.partition('/')[0]}' (`hf auth login`), or a name under your own account."
        )
    if constants.is_offline_mode():
        return (
            f"{name}: no such local path, not (or not all of it) in the Hub's cache, and offline "
            "mode is on. Unset HF_HUB_OFFLINE, or fetch it first where there is a network: "
            "`hf download`."
        )
    if _is_local(error):
        return (
            f"{name}: reading or writing failed here ({_local_reason(error)}). Make room or "
            "correct the permissions, and run the same line again."
        )
    if _is_connection(error, status):
        return (
            f"{name}: the connection to {endpoint} failed ({_reason(error)}). Check the network "
            "(and HF_ENDPOINT, if it is set) and run the same line again: what has arrived is kept."
        )
    asked = getattr(response, "extensions", {}).get("asked")
    later = f" It asks to wait {in_words(asked)}." if isinstance(asked, float) else ""
    return (
        f"{name}: the Hub answered with an error ({type(error).__name__}: {_reason(error)}).{later}"
    )


def _token() -> str | None:
    from huggingface_hub import get_token

    try:
        return get_token()
    except UnicodeDecodeError:  # of a file that is not text
        return "\ufffd"
    except OSError:
        return None


def _is_sendable(token: str) -> bool:
    return token.isascii() and token.isprintable() and " " not in token


def _is_local(error: Exception) -> bool:
    """An error of this machine's files, such as a full disk."""
    is_network = isinstance(error, (ConnectionError, TimeoutError))
    return isinstance(error, OSError) and error.errno is not None and not is_network


def _local_reason(error: Exception) -> str:
    file = getattr(error, "filename", None)
    return f"{getattr(error, 'strerror', None)}" + (f": {shown(str(file))}" if file else "")


def _is_connection(error: Exception, status: int | None) -> bool:
    from huggingface_hub import errors

    if status is None and isinstance(error, (OSError, errors.RevisionResolutionError)):
        return True
    # The errors of the HTTP library by name, since it belongs to the client and may change.
    return any(c.__name__ in _CONNECTION_ERRORS for c in type(error).__mro__)


def _reason(error: Exception) -> str:
    """The error's own text in one line, without any token, cut to 300 characters."""
    lines = [line.strip() for line in str(error)[:100_000].splitlines() if line.strip()]
    text = " ".join(lines or [type(error).__name__])
    if token := _token():
        text = text.replace(token, "...")
    # Cut last: half a token would not be recognised.
    return printable(_TOKEN.sub("...", text))[:300]
