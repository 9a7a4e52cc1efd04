"""Checks of a push's target: the name of the repository, and the account that is to write to it.

The token comes from where huggingface_hub keeps it and is passed on by it; it is read here only to
keep it out of messages (checkpoint/hub_errors).
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from mergekit_bayes.checkpoint.hub_client import HubError, prepare
from mergekit_bayes.checkpoint.hub_errors import asking
from mergekit_bayes.errors import CheckpointError, ConfigError, shown

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
    check_target(repo)
    with explained(repo):
        from huggingface_hub import HfApi

        account = _Account.of(HfApi(library_name="mergekit-bayes").whoami())
    owner, _, name = repo.partition("/")
    if account.role == "read":
        raise CheckpointError(
            f"'{repo}': your token can only read. Make one that writes and log in with hf auth "
            "login."
        )
    writable = {account.name.casefold(), *account.writable}
    if account.role == "write" and owner.casefold() not in writable:
        raise CheckpointError(
            f"'{repo}': you are logged in as {shown(account.name)}, who may not write to "
            f"'{owner}'. Push to {shown(f'{account.name}/{name}')}, or log in to an account that "
            "may."
        )


class _Account(NamedTuple):
    """The user of a token, as far as the Hub says something of use.

    Attributes:
        name: The user's name.
        role: What the token may do (`read`, `write`); None if that depends.
        writable: The organisations that the user may write to, in lower case.
    """

    name: str
    role: str | None
    writable: frozenset[str]

    @classmethod
    def of(cls, answer: object) -> "_Account":
        if not isinstance(answer, dict) or not isinstance(name := answer.get("name"), str):
            raise HubError("the Hub does not say whose token this is.")
        role: str | None = None
        match answer:
            case {"auth": {"accessToken": {"role": str(given)}}}:
                role = given
        writable = set()
        orgs = answer.get("orgs")
        for org in orgs if isinstance(orgs, list) else ():
            # A member who may only read can still write to a resource group of the organisation.
            match org:
                case {"name": str(org_name), "roleInOrg": "read"} if "resourceGroups" not in org:
                    pass
                case {"name": str(org_name)}:
                    writable.add(org_name.casefold())
        return cls(name, role, frozenset(writable))


@contextmanager
def explained(repo: str) -> Iterator[None]:
    """Ask the Hub about a push in the block, as `asking`, unless offline mode is on.

    Raises:
        CheckpointError: As `asking`, or offline mode is on.
    """
    prepare()
    from huggingface_hub import constants

    if constants.is_offline_mode():
        raise CheckpointError(
            f"'{repo}': offline mode is on, so that nothing can be pushed. Unset HF_HUB_OFFLINE "
            "and run the same line again."
        )
    with asking(repo):
        yield
