"""Push a model folder to the Hub in one commit, so that readers never see half of it.

Only files that belong to a model are pushed, and the report names the others. Large files are
uploaded before the commit and kept by the Hub: the same command resumes an interrupted push. A
folder that the repository already holds makes no commit.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mergekit_bayes.checkpoint.contained import contained
from mergekit_bayes.checkpoint.side_files import MIXTURE
from mergekit_bayes.checkpoint.sources import forget
from mergekit_bayes.errors import ConfigError, printable
from mergekit_bayes.hub.card import Card, is_generated, make_card
from mergekit_bayes.hub.files import (
    Choice,
    PushFile,
    choose_files,
    stale_files,
    token_found,
)
from mergekit_bayes.hub.folder import CARD, lone_precision_files, read_card
from mergekit_bayes.hub.licenses import License, hub_licenses, local_licenses
from mergekit_bayes.hub.local_paths import has_token
from mergekit_bayes.hub.login import check_target, explained
from mergekit_bayes.hub.parents import Parent, parents
from mergekit_bayes.hub.report import PushPlan, PushReport
from mergekit_bayes.hub.repository import (
    RemoteFile,
    Target,
    check_same_form,
    checked_commit,
    head_commit,
    is_unchanged,
    list_files,
    make_repository,
)
from mergekit_bayes.posterior.pooling import PosteriorForm

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

Say = Callable[[str], None]


def plan_push(
    folder: Path,
    repo: str,
    *,
    posterior: bool = True,
    only_posterior: bool = False,
    posterior_form: PosteriorForm = "row",
) -> PushPlan:
    """What `push_folder` would push. Contacts no server, so parents on the Hub give no licence.

    Args:
        folder: As of `push_folder`.
        repo: `org/name`.
        posterior: Push the posterior too (default True).
        only_posterior: Push nothing but the posterior.
        posterior_form: As of `push_folder`.

    Raises:
        CheckpointError: No such folder, or neither a model nor a precision in it.
        ConfigError: `repo` is not `org/name`, or the options leave nothing to push.
        PrecisionError: The precision belongs to other weights than those beside it, by all bytes
            where those were recorded.
    """
    check_target(repo)
    with _content(folder, posterior, only_posterior, posterior_form) as content:
        existing = _folder_card(folder, only_posterior=only_posterior)
        return _plan(content, repo, existing, local_licenses(content.parents))


def push_folder(
    folder: Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    posterior: bool = True,
    only_posterior: bool = False,
    posterior_form: PosteriorForm = "row",
    say: Say | None = None,
) -> PushReport:
    """Push a model folder and its posterior to `org/name`, which is made if it does not exist.

    Args:
        folder: As `bmerge` or save_pretrained wrote it, or a folder with nothing but a precision.
            It is not changed.
        repo: `org/name`.
        private: Make the repository private. An existing public one is refused.
        revision: A branch (default main), made from main if it does not exist.
        create_pr: Open a pull request on an existing repository instead of committing.
        message: Message of the commit.
        posterior: Push the posterior too (default True).
        only_posterior: Push nothing but the posterior, so that a precision can be published for
            a model that belongs to another account.
        posterior_form: `row` pushes one number a row of each tensor, the mean of its entries;
            `row-column` two vectors a matrix; `entries` the posterior as it is.
        say: Called before the commit with a line for each file that it deletes.

    Raises:
        CheckpointError: As `plan_push`; a model over an adapter or the reverse; or the Hub refused,
            with a remedy.
        ConfigError: As `plan_push`.
        PrecisionError: As `plan_push`.
    """
    check_target(repo)
    if create_pr and revision not in (None, "main"):
        raise ConfigError(
            "--create-pr opens a pull request on main; leave --revision out, or push to the branch."
        )
    with _content(folder, posterior, only_posterior, posterior_form) as content:
        existing = _folder_card(folder, only_posterior=only_posterior)
        _make_card(content, repo, existing)  # raises what it refuses before a repository is made
        target = Target(repo, revision or "main", private, create_pr, message)
        with explained(repo):
            return _push(target, content, existing, say)


class _Content(NamedTuple):
    """What of a folder is to be pushed."""

    folder: Path
    posterior: bool
    only_posterior: bool
    form: PosteriorForm
    choice: Choice
    parents: tuple[Parent, ...]


@contextmanager
def _content(
    folder: Path, posterior: bool, only_posterior: bool, form: PosteriorForm
) -> Iterator[_Content]:
    """What is pushed; a posterior in another form lies in a temporary folder meanwhile."""
    if os.path.lexists(folder / MIXTURE):
        raise ConfigError(
            f"'{folder}' is a mixture, which a repository of one model cannot hold. Push its runs, "
            f"each to a repository of its own; they can be mixed from there. To push the plain "
            f"model alone, remove {folder / MIXTURE}."
        )
    with ExitStack() as scratch:
        choice = choose_files(
            folder,
            posterior=posterior,
            only_posterior=only_posterior,
            form=form,
            scratch=scratch,
        )
        made_from = parents(folder, posterior_only=only_posterior)
        yield _Content(folder, posterior, only_posterior, form, choice, made_from)


def _make_card(
    content: _Content,
    repo: str,
    existing: str,
    licenses: Mapping[Parent, License | None] | None = None,
) -> Card:
    return make_card(
        content.folder,
        repo=repo,
        existing=existing,
        licenses=licenses,
        posterior=content.posterior,
        posterior_only=content.only_posterior,
        posterior_form=content.form,
    )


def _folder_card(folder: Path, *, only_posterior: bool) -> str:
    """The folder's card; empty for one by PEFT, and for a model's if only a posterior is pushed."""
    file = folder / CARD
    if not os.path.lexists(file) or (only_posterior and not lone_precision_files(folder)):
        return ""
    contained(folder, CARD)
    text = read_card(file)
    if has_token(text):
        raise token_found(file)
    return "" if is_generated(text) else text


def _plan(
    content: _Content, repo: str, existing: str, licenses: Mapping[Parent, License | None]
) -> PushPlan:
    card = _make_card(content, repo, existing, licenses)
    choice = content.choice
    return PushPlan(
        repo=repo,
        folder=content.folder,
        files=(PushFile(CARD, None, len(card.text.encode())), *choice.files),
        card=card.text,
        left_out=choice.left_out,
        notes=(*card.notes, *choice.notes),
    )


def _push(target: Target, content: _Content, existing: str, say: Say | None) -> PushReport:
    from huggingface_hub import HfApi

    api, repo = HfApi(library_name="mergekit-bayes"), target.repo
    make_repository(api, target)
    head, is_new_branch = head_commit(api, target)
    remote = list_files(api, repo, head)
    if not content.only_posterior:
        check_same_form(target, [file.path for file in content.choice.files], remote)
    if not existing and CARD in remote:  # the text of a card on the Hub is kept too
        existing = read_card(Path(api.hf_hub_download(repo, CARD, revision=head)))
    plan = _plan(content, repo, existing, hub_licenses(api, content.parents))
    if is_new_branch:
        api.create_branch(repo, branch=target.revision, exist_ok=True)
    changed, unchanged = _compared(plan, remote)
    deleted = stale_files(
        remote,
        {file.path for file in plan.files},
        weights_changed=any(re.fullmatch(r"[^/]+\.safetensors", a.path_in_repo) for a in changed),
        only_posterior=content.only_posterior,
    )
    if say is not None:
        for path in deleted:
            say(f"  deletes   {path}: it does not belong to what is pushed")
    commit, pull_request = head, None
    if changed or deleted:
        message = target.message or (
            f"{'Posterior' if content.only_posterior else 'Model'}, pushed by bmerge"
        )
        commit, pull_request = _commit(api, target, message, head, changed, deleted)
        forget(repo)
    sizes = {file.path: file.size for file in plan.files}
    sent = tuple(add.path_in_repo for add in changed)
    return PushReport(
        repo=repo,
        url=f"{api.endpoint}/{repo}",
        commit=commit,
        revision=target.revision,
        changed=bool(changed or deleted),
        sent=sent,
        unchanged=tuple(unchanged),
        deleted=tuple(deleted),
        bytes=sum(sizes[path] for path in sent),
        pull_request=pull_request,
        left_out=dict(plan.left_out),
        notes=plan.notes,
    )


def _compared(
    plan: PushPlan, remote: Mapping[str, RemoteFile]
) -> "tuple[list[CommitOperationAdd], list[str]]":
    """The files that the repository lacks or has with other content, and the paths of the rest."""
    from huggingface_hub import CommitOperationAdd

    changed, unchanged = [], []
    for file in plan.files:
        content: bytes | str = plan.card.encode()
        if file.source is not None:  # nothing was put in its place since it was chosen
            content = str(contained(file.source.parent, file.source.name))
        add = CommitOperationAdd(path_in_repo=file.path, path_or_fileobj=content)
        if is_unchanged(add, remote.get(file.path)):
            unchanged.append(file.path)
        else:
            changed.append(add)
    return changed, unchanged


def _commit(
    api: "HfApi",
    target: Target,
    message: str,
    head: str,
    changed: "list[CommitOperationAdd]",
    deleted: list[str],
) -> tuple[str, str | None]:
    """Commit on top of `head`; the commit, and the address of a pull request.

    The Hub refuses a commit whose parent is no longer the head, so that none is made twice. Where
    its answer is lost, the files on the branch tell whether it was made.
    """
    from huggingface_hub import CommitOperationDelete

    deletions = [CommitOperationDelete(path_in_repo=path, is_folder=False) for path in deleted]
    try:
        result = api.create_commit(
            target.repo,
            [*changed, *deletions],
            commit_message=message,
            revision=None if target.create_pr else target.revision,
            create_pr=target.create_pr,
            parent_commit=head,
        )
    except Exception:  # the client raises errors of many libraries
        made = None if target.create_pr else _made_commit(api, target, head, changed, deleted)
        if made is None:
            raise
        return made, None
    address = None if result.pr_url is None else printable(str(result.pr_url))
    return checked_commit(result.oid), address


def _made_commit(
    api: "HfApi",
    target: Target,
    head: str,
    changed: "list[CommitOperationAdd]",
    deleted: list[str],
) -> str | None:
    """The commit that was made though its answer was lost; None if it was not, or who knows."""
    try:
        commit, _ = head_commit(api, target)
        remote = list_files(api, target.repo, commit) if commit != head else {}
    except Exception:  # what failed first is the error that the user sees
        return None
    is_made = commit != head and all(is_unchanged(a, remote.get(a.path_in_repo)) for a in changed)
    return commit if is_made and remote.keys().isdisjoint(deleted) else None
