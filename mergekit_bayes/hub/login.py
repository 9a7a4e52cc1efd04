"""Checks of a push's target: the name of the repository, and the account that is to write to it.

The token comes from where huggingface_hub keeps it and is passed on by it; it is read here only to
keep it out of messages (checkpoint/hub_errors).
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from mergekit_bayes.checkpoint.hub_errors import explain
from mergekit_bayes.errors import BmergeError, CheckpointError, ConfigError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_target(repo: str) -> None:
    """Check that `repo` has the form of a repository's name.

    Raises:
        ConfigError: It has not.
    """
    if not _NAME.fullmatch(repo):
        more = " The branch goes into --revision." if "@" in repo else ""
        raise ConfigError(f"'{repo}' is not the name of a repository on the Hub (org/name).{more}")


def check_login(repo: str) -> None:
    """Ask the Hub whether the user may write to `repo`, before the work that is to be pushed.

    The rights of a fine-grained token are not checked: only the push itself can tell.

    Raises:
        CheckpointError: The user is not logged in, or the token cannot write there.
        ConfigError: `repo` is not the name of a repository.
    """
    from huggingface_hub import HfApi

    check_target(repo)
    with explained(repo):
        account = HfApi(library_name="mergekit-bayes").whoami()
    owner, _, name = repo.partition("/")
    user = account["name"]
    role = ((account.get("auth") or {}).get("accessToken") or {}).get("role")
    # A member of an organisation who may only read can still write to one of its resource groups.
    writable = {
        org["name"].casefold()
        for org in account.get("orgs") or ()
        if org.get("roleInOrg") != "read" or "resourceGroups" in org
    }
    if role == "read":
        raise CheckpointError(
            f"'{repo}': your token can only read. Make one that writes and log in with hf auth "
            "login."
        )
    if role == "write" and owner.casefold() not in writable | {user.casefold()}:
        raise CheckpointError(
            f"'{repo}': you are logged in as '{user}', who may not write to '{owner}'. Push to "
            f"'{user}/{name}', or log in to an account that may."
        )


@contextmanager
def explained(repo: str) -> Iterator[None]:
    """Raise errors of the Hub client as one message with a remedy.

    The traceback of the client is dropped, since it might show what was sent.

    Raises:
        CheckpointError: Any error in the block, unless it is already a `BmergeError`; or offline
            mode is on.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode():
        raise CheckpointError(
            f"'{repo}': offline mode is on, so that nothing can be pushed. Unset HF_HUB_OFFLINE "
            "and run the same line again."
        )
    try:
        yield
    except BmergeError:
        raise
    except Exception as error:
        raise CheckpointError(explain(error, repo)) from None
