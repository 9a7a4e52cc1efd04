"""A model folder to the Hub, in one commit, so that nobody ever sees half of it.

Only files that belong to a model go (an allowlist); what stays behind is said. Large files arrive before the commit and
are kept by the Hub, so the same line resumes an interrupted push; a folder that is there already makes no commit.
The token comes from huggingface_hub's own places and is passed on by it; this module never sees it.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from mergekit_bayes.configs import Config
from mergekit_bayes.errors import BmergeError, CheckpointError, ConfigError, PrecisionError
from mergekit_bayes.hub.card import Card, License, Parent, is_generated, make_card, parents, read_license
from mergekit_bayes.posterior import PosteriorInfo, checkpoint_files, precision_files, read_info
from mergekit_bayes.sources import explain, forget
from mergekit_bayes.tensors import SafetensorsSource, identity

CARD = "README.md"
# By name, where a merge copies all that is no tensor (`posterior.side_files`): what is published cannot be taken back.
_SIDE_FILES = (
    "config.json", "generation_config.json", "adapter_config.json", "preprocessor_config.json", "processor_config.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "*.model", "tokenizer.model.*", "*.tiktoken", "*.spm", "*.vocab", "*.bpe",
    "chat_template.jinja", "chat_template.json",
    "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json",
    "merge_report.json", "merge_recipe.yaml", "finetune.yaml", "LICENSE*", "NOTICE*",
)  # fmt: skip
_INNER_FILES = ("additional_chat_templates/*.jinja", "[0-9]_*/config.json")  # the second are sentence-transformers'
_RECORDS = ("merge_report.json", "merge_recipe.yaml", "finetune.yaml")
_MODEL = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_ADAPTER = re.compile(r"adapter_model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_POSTERIOR = re.compile(r"posterior/(precision[^/]*\.safetensors|precision\.safetensors\.index\.json|posterior\.json)")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class PushFile(NamedTuple):
    """One file of a push: where it goes, and where it lies (None: the card, which is made)."""

    path: str
    source: Path | None
    size: int


class PushPlan(NamedTuple):
    """What would be pushed: files, the card, what is left out and why, and what a person should know."""

    repo: str
    folder: Path
    files: tuple[PushFile, ...]
    card: str
    left_out: Mapping[str, str]
    notes: tuple[str, ...]


class PushReport(Config):
    """What a push did.

    Attributes:
        commit: Of the repository, the one before if nothing had changed.
        changed: Whether there was anything to commit.
        sent, unchanged, deleted: Paths in the repository. Deleted are shards, precisions and records of other weights.
        pull_request: Its address, where one was asked for.
        left_out: Files of the folder that do not belong to a model, with the reason.
    """

    repo: str
    url: str
    commit: str
    revision: str
    changed: bool
    sent: tuple[str, ...]
    unchanged: tuple[str, ...]
    deleted: tuple[str, ...]
    bytes: int
    pull_request: str | None
    left_out: dict[str, str]
    notes: tuple[str, ...]


def plan_push(folder: Path, repo: str, *, posterior: bool = True, only_posterior: bool = False) -> PushPlan:
    """What `push_folder` would push. Contacts nobody, so licences of parents on the Hub are not in the card.

    Raises:
        CheckpointError: No such folder, or neither a model nor a precision in it.
        ConfigError: A name that is not `org/name`, or options that leave nothing.
        PrecisionError: A precision of other weights than those beside it, by all bytes where they were recorded.
    """
    check_target(repo)
    files, left_out, notes = _choose(folder, posterior=posterior, only_posterior=only_posterior)
    licenses = _local_licenses(parents(folder, posterior_only=only_posterior))
    card = make_card(folder, repo=repo, existing=_own_card(folder, only=only_posterior), licenses=licenses,
                     posterior=posterior, posterior_only=only_posterior)  # fmt: skip
    return _planned(folder, repo, files, card, left_out, notes)


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
    say: Callable[[str], None] | None = None,
) -> PushReport:
    """Push a model folder and its posterior to `org/name`, which is made if it is not there.

    Args:
        folder: As `bmerge` or save_pretrained wrote it; or a folder with nothing but a precision. It is not changed.
        repo: `org/name`.
        private: For a repository that is made. A public one that exists is refused.
        revision: A branch, made from main if it is not there.
        create_pr: Open a pull request on a repository that exists, instead of committing.
        message: Of the commit.
        posterior: False leaves the posterior at home.
        only_posterior: Push nothing else, so that anybody can publish a precision of a model that they do not own.
        say: Called before the commit with a line for each file that it deletes.

    Raises:
        CheckpointError: As `plan_push`; a model over an adapter or the reverse; or the Hub refused, with the way out.
        ConfigError: As `plan_push`.
        PrecisionError: As `plan_push`.
    """
    check_target(repo)
    if create_pr and revision not in (None, "main"):
        raise ConfigError("--create-pr opens a pull request on main; leave --revision out, or push to the branch.")
    files, left_out, notes = _choose(folder, posterior=posterior, only_posterior=only_posterior)
    make_card(folder, repo=repo, existing=_own_card(folder, only=only_posterior), posterior=posterior,
              posterior_only=only_posterior)  # what it refuses, it refuses before a repository is made  # fmt: skip
    with _answers(repo):
        return _push(
            _Target(repo, revision or "main", private, create_pr, message), folder, files, left_out, notes,
            posterior=posterior, only=only_posterior, say=say,
        )  # fmt: skip


def check_target(repo: str) -> None:
    """Raise `ConfigError` unless `repo` can be the name of a repository."""
    if not _NAME.fullmatch(repo):
        more = " The branch goes into --revision." if "@" in repo else ""
        raise ConfigError(f"'{repo}' is not the name of a repository on the Hub (org/name).{more}")


def check_login(repo: str) -> None:
    """Ask the Hub who we are, before work that is to be pushed to `repo`; raises what a push would.

    What a fine-grained token may do only the push finds out.
    """
    from huggingface_hub import HfApi

    check_target(repo)
    with _answers(repo):
        me = HfApi(library_name="mergekit-bayes").whoami()
    owner, token = repo.partition("/")[0].casefold(), ((me.get("auth") or {}).get("accessToken") or {}).get("role")
    # A member who reads may yet write to some resource group.
    groups = {
        o["name"].casefold() for o in me.get("orgs") or () if o.get("roleInOrg") != "read" or "resourceGroups" in o
    }
    if token == "read":
        raise CheckpointError(
            f"'{repo}': your token can only read. Make one that writes and log in with hf auth login."
        )
    if token == "write" and owner not in groups | {me["name"].casefold()}:
        raise CheckpointError(
            f"'{repo}': you are logged in as '{me['name']}', who may not write to '{repo.partition('/')[0]}'. Push to "
            f"'{me['name']}/{repo.partition('/')[2]}', or log in as somebody who may."
        )


class _Target(NamedTuple):
    repo: str
    revision: str
    private: bool
    create_pr: bool
    message: str | None


class _Remote(NamedTuple):
    size: int
    sha1: str
    sha256: str | None  # of a large file


def _push(
    target: _Target, folder: Path, files: list[PushFile], left_out: Mapping[str, str], notes: list[str], *,
    posterior: bool, only: bool, say: Callable[[str], None] | None,
) -> PushReport:  # fmt: skip
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, repo = HfApi(library_name="mergekit-bayes"), target.repo
    _prepare(api, target)
    head, is_new = _head(api, target)
    there = _listing(api, repo, head)
    if not only:
        _check_kind(target, [f.path for f in files], there)
    existing = _own_card(folder, only=only)
    if not existing and CARD in there:  # somebody's text on the Hub is kept, too
        existing = Path(api.hf_hub_download(repo, CARD, revision=head)).read_text()
    licenses = _licenses(api, parents(folder, posterior_only=only))
    card = make_card(folder, repo=repo, existing=existing, licenses=licenses, posterior=posterior, posterior_only=only)
    plan = _planned(folder, repo, files, card, left_out, notes)
    if is_new:
        api.create_branch(repo, branch=target.revision, exist_ok=True)
    sent, unchanged = [], []
    for file in plan.files:
        content: Any = plan.card.encode() if file.source is None else str(file.source.resolve())
        add = CommitOperationAdd(path_in_repo=file.path, path_or_fileobj=content)
        if _is_same(add, there.get(file.path)):
            unchanged.append(file.path)
        else:
            sent.append(add)
    new = {f.path for f in plan.files}
    weights = any(re.fullmatch(r"[^/]+\.safetensors", add.path_in_repo) for add in sent)
    stale = [p for p in there if p not in new and _is_stale(p, weights=weights, pushed=new, only=only)]
    if say is not None:
        for path in stale:
            say(f"  deletes   {path}: it does not belong to what is pushed")
    commit, pull_request = head, None
    if sent or stale:
        operations: list[Any] = [*sent, *(CommitOperationDelete(path_in_repo=p, is_folder=False) for p in stale)]
        done = api.create_commit(
            repo,
            operations,
            commit_message=target.message or ("Posterior" if only else "Model") + ", pushed by bmerge",
            revision=None if target.create_pr else target.revision,
            create_pr=target.create_pr,
            parent_commit=head,
        )
        commit, pull_request = str(done.oid), done.pr_url
        forget(repo)
    sizes = {f.path: f.size for f in plan.files}
    return PushReport(
        repo=repo, url=f"{api.endpoint}/{repo}", commit=commit, revision=target.revision,
        changed=bool(sent or stale), sent=tuple(a.path_in_repo for a in sent), unchanged=tuple(unchanged),
        deleted=tuple(stale), bytes=sum(sizes[a.path_in_repo] for a in sent), pull_request=pull_request,
        left_out=dict(plan.left_out), notes=plan.notes,
    )  # fmt: skip


def _prepare(api: Any, target: _Target) -> None:
    """The repository, made if it is not there."""
    if not target.create_pr:
        api.create_repo(target.repo, private=target.private or None, exist_ok=True)
    if target.private and not api.repo_info(target.repo).private:
        raise CheckpointError(
            f"'{target.repo}' exists and is public, so --private would not hold. Make it private on the Hub first, or "
            "push without --private."
        )


def _head(api: Any, target: _Target) -> tuple[str, bool]:
    """The commit to build on, and whether the branch is still to be made (from main)."""
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        return str(api.repo_info(target.repo, revision=target.revision).sha), False
    except RevisionNotFoundError:
        if target.revision == "main" or target.revision.startswith("refs/"):
            raise
        return str(api.repo_info(target.repo).sha), True


def _listing(api: Any, repo: str, commit: str) -> dict[str, _Remote]:
    from huggingface_hub.hf_api import RepoFile

    tree = api.list_repo_tree(repo, revision=commit, recursive=True)
    return {
        f.path: _Remote(f.size, f.blob_id, f.lfs.sha256 if f.lfs else None) for f in tree if isinstance(f, RepoFile)
    }


def _is_same(add: Any, remote: _Remote | None) -> bool:
    if remote is None or remote.size != add.upload_info.size:
        return False
    if remote.sha256 is not None:
        return bool(add.upload_info.sha256.hex() == remote.sha256)
    with add.as_file() as file:
        content = file.read()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == remote.sha1


def _is_weight(path: str) -> bool:
    return bool(_MODEL.fullmatch(path) or _ADAPTER.fullmatch(path))


def _is_stale(path: str, *, weights: bool, pushed: set[str], only: bool) -> bool:
    """Files under our names that belong to other weights: shards, a precision, the records of how they were made."""
    if _POSTERIOR.fullmatch(path):
        return weights or any(p.startswith("posterior/") for p in pushed)
    if path in _RECORDS:
        return not only and (weights or not pushed.isdisjoint(_RECORDS))
    return not only and _is_weight(path)


def _check_kind(target: _Target, pushed: list[str], there: Mapping[str, _Remote]) -> None:
    """Beside each other a model and an adapter break loaders, and replacing one by the other is a person's choice."""
    is_adapter = any(p.startswith("adapter_model") for p in pushed)
    other, ours, theirs = (_MODEL, "an adapter", "a model") if is_adapter else (_ADAPTER, "a model", "an adapter")
    config = () if is_adapter or "adapter_config.json" in pushed else ("adapter_config.json",)
    found = next((p for p in there if other.fullmatch(p) or p in config), None)
    if found is not None:
        raise CheckpointError(
            f"'{target.repo}' ({target.revision}) holds {theirs} ({found}), and this is {ours}; nothing was changed. "
            "Push to another repository, or with --revision to a branch that holds none (a new one begins as main)."
        )


def _choose(folder: Path, *, posterior: bool, only_posterior: bool) -> tuple[list[PushFile], dict[str, str], list[str]]:
    """Files that go, files that stay with the reason, and notes; after the hashes have been compared."""
    if not posterior and only_posterior:
        raise ConfigError("--no-posterior and --posterior-only together leave nothing to push.")
    if not folder.is_dir():
        what = "is a file; push takes a folder (merge with -o FOLDER)" if folder.exists() else "is no folder"
        raise CheckpointError(f"'{folder}' {what}.")
    bare = sorted(folder.glob("precision*.safetensors"))
    chosen: dict[str, Path] = {}
    if bare:
        if not only_posterior:
            raise ConfigError(f"'{folder}' holds a precision and no model. Push it with --posterior-only.")
        extra = [folder / n for n in ("precision.safetensors.index.json", "posterior.json")]
        chosen = {f"posterior/{f.name}": f for f in [*bare, *(f for f in extra if f.exists())]}
        _check_alone(folder, bare)
    else:
        if not only_posterior:
            chosen = _model_files(folder)
        found = precision_files(folder) if posterior else []
        if only_posterior and not found:
            raise PrecisionError(
                f"'{folder}' holds no posterior. Make one with `bmerge precision {folder} --data TEXTS`."
            )
        if found:
            _check_posterior(folder, found)
            extra = [folder / "posterior" / n for n in ("precision.safetensors.index.json", "posterior.json")]
            chosen |= {f"posterior/{f.name}": f for f in [*found, *(f for f in extra if f.exists())]}
    left_out = _left_out(folder, set(chosen.values()), posterior=posterior, only=only_posterior)
    files = [PushFile(path, source, source.stat().st_size) for path, source in sorted(chosen.items())]
    notes = [f"{n} names paths on this machine, which will be public" for n in _RECORDS if _has_paths(chosen.get(n))]
    if _has_paths(chosen.get("adapter_config.json")):
        notes.append(
            "adapter_config.json names a base on this machine, where nobody else can load it; put its Hub id there"
        )
    return files, left_out, notes


def _model_files(folder: Path) -> dict[str, Path]:
    weights = checkpoint_files(folder)
    chosen = {f.name: f for f in weights}
    stem = "adapter_model" if weights[0].name.startswith("adapter_model") else "model"
    names = [f"{stem}.safetensors.index.json", *_modules(folder)]
    for file in sorted(folder.iterdir()):
        if file.is_file() and (file.name in names or any(fnmatchcase(file.name, p) for p in _SIDE_FILES)):
            chosen[file.name] = file
    for pattern in _INNER_FILES:
        chosen |= {f"{file.parent.name}/{file.name}": file for file in sorted(folder.glob(pattern))}
    return chosen


def _modules(folder: Path) -> set[str]:
    """Python files that the model's config or tokenizer says it needs (`auto_map`)."""
    found = set()
    for name in ("config.json", "tokenizer_config.json"):
        try:
            content = json.loads((folder / name).read_text())
        except (OSError, ValueError):
            continue
        for value in ((content.get("auto_map") or {}) if isinstance(content, dict) else {}).values():
            for place in value if isinstance(value, list) else [value]:
                if isinstance(place, str) and "--" not in place:
                    found.add(f"{place.partition('.')[0]}.py")
    return found


def _left_out(folder: Path, chosen: set[Path], *, posterior: bool, only: bool) -> dict[str, str]:
    found = {}
    for path in sorted(folder.iterdir()):
        if path in chosen or (path.name == CARD and not only) or (path.is_dir() and path in {f.parent for f in chosen}):
            continue
        if only:
            reason = "--posterior-only"
        elif path.name == "posterior":
            reason = "--no-posterior" if not posterior else "no precision in it"
        elif path.name.startswith("checkpoint-") or path.name.endswith((".checkpoints", ".partial")):
            reason = "a checkpoint or an unfinished output"
        else:
            reason = "not a file of a model"
        found[path.name + "/" * path.is_dir()] = reason
    strays = {f.parent for f in chosen if f.parent != folder}
    for path in sorted(p for parent in strays for p in parent.iterdir() if p not in chosen):
        found[path.relative_to(folder).as_posix()] = "not a file of a model"
    return found


def _check_posterior(folder: Path, files: list[Path]) -> None:
    """A precision must be of the weights beside it, by all bytes where they were recorded."""
    info = _check_alone(folder / "posterior", files, str(folder), " or leave it at home with --no-posterior.")
    mean = SafetensorsSource(checkpoint_files(folder))
    try:
        full = info.mean.full is not None
        if (info.mean.full or info.mean.blocks) != identity(mean, full=full):
            raise PrecisionError(
                f"'{files[0]}' was taken at other weights than those in '{folder}'. Push the precision that belongs to "
                "them, or leave it at home with --no-posterior."
            )
    finally:
        mean.close()


def _check_alone(folder: Path, files: list[Path], model: str = "MODEL", other: str = "") -> PosteriorInfo:
    """A precision must say which weights it is of."""
    source = SafetensorsSource(files)
    info = read_info(source)
    source.close()
    if info is None:
        raise PrecisionError(
            f"'{files[0]}' does not say which weights it is of, so nobody could check it. Make it with `bmerge "
            f"precision {model} --data TEXTS --out {folder}`{',' + other if other else '.'}"
        )
    return info


def _has_paths(file: Path | None) -> bool:
    return file is not None and bool(re.search(r"[\s\"':\[,](/|~/)[\w.-]+/", file.read_text(errors="replace")))


def _own_card(folder: Path, *, only: bool) -> str:
    """The folder's card, if it says a person's word or ours; a model's is not that of its posterior alone."""
    file = folder / CARD
    if not file.is_file() or (only and not list(folder.glob("precision*.safetensors"))):
        return ""
    text = file.read_text()
    return "" if is_generated(text) else text


def _planned(
    folder: Path, repo: str, files: list[PushFile], card: Card, left_out: Mapping[str, str], notes: list[str]
) -> PushPlan:
    whole = [PushFile(CARD, None, len(card.text.encode())), *files]
    return PushPlan(repo, folder, tuple(whole), card.text, left_out, (*card.notes, *notes))


def _local_licenses(found: tuple[Parent, ...]) -> dict[Parent, License | None]:
    return {p: _license_in(Path(p.path).expanduser()) for p in found if p.path is not None}


def _licenses(api: Any, found: tuple[Parent, ...]) -> dict[Parent, License | None]:
    """Licences of parents here and on the Hub; one that cannot be asked for stays unknown."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    licenses = _local_licenses(found)
    for parent in found:
        if parent.repo is None:
            continue
        try:
            card = Path(api.hf_hub_download(parent.repo, CARD, revision=parent.commit))
            licenses[parent] = read_license(card.read_text())
        except (EntryNotFoundError, HfHubHTTPError):
            licenses[parent] = None
    return licenses


def _license_in(path: Path) -> License | None:
    card = (path.parent if path.is_file() else path) / CARD
    return read_license(card.read_text()) if card.is_file() else None


@contextmanager
def _answers(repo: str) -> Iterator[None]:
    """Errors of the client as one message with the way out, without a traceback that might show what it sent."""
    try:
        yield
    except BmergeError:
        raise
    except Exception as error:
        raise CheckpointError(explain(error, repo)) from None
