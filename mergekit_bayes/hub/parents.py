"""The models that a model was made from: its base, tasks and adapters, as its own records say."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, cast

from mergekit_bayes.checkpoint.layout import precision_files
from mergekit_bayes.checkpoint.side_files import FINETUNE, MERGE_RECIPE, MERGE_REPORT
from mergekit_bayes.hub.folder import (
    MergeRecord,
    lone_precision_files,
    precision_info,
    read_record,
)

_COMMIT = re.compile(r"[0-9a-f]{40}")


class Parent(NamedTuple):
    """A model that this one was made from: a local one, or one on the Hub.

    Attributes:
        role: `base`, `task`, `adapter`, or `model` (the model of a posterior).
        scale: Its scale in the merge; None where there is none.
        path: Local folder or file; None for a model on the Hub.
        repo: `org/name` on the Hub; None for a local model.
        commit: The commit that was used; None if it is not recorded.
    """

    role: str
    scale: float | None
    path: str | None
    repo: str | None = None
    commit: str | None = None

    @property
    def name(self) -> str:
        """The name that a card shows: the repository, or the last part of a local path.

        The rest of a path describes a machine and is not published.
        """
        return self.repo or Path(self.path or "?").name


def parents(folder: Path, *, posterior_only: bool = False) -> tuple[Parent, ...]:
    """The models that a folder's records name; empty if they name none.

    Args:
        folder: A model, an adapter, or a posterior without a model.
        posterior_only: Give the model of the folder's posterior instead of the model's parents.

    Raises:
        CheckpointError: A record that cannot be read.
    """
    lone = lone_precision_files(folder)
    if posterior_only or lone:
        info = precision_info(lone or precision_files(folder))
        name = str(info.training.get("model", "")) if info is not None else ""
        return tuple(named_parents(name, "model", None, None)) if name else ()
    recipe = read_record(folder / MERGE_RECIPE)
    report = cast(MergeRecord, read_record(folder / MERGE_REPORT))
    if "models" in report:  # a merge of whole models
        return tuple(
            parent
            for m in report["models"]
            for parent in named_parents(str(m["ref"]), m["role"], m["scale"], m.get("commit"))
        )
    if "adapters" in report:
        return _merged_adapters(report, recipe)
    if model := read_record(folder / FINETUNE).get("model"):
        return tuple(named_parents(str(model), "base", None, None))
    config = read_record(folder / "adapter_config.json")
    return (adapter_base(config),) if config.get("base_model_name_or_path") else ()


def named_parents(ref: str, role: str, scale: float | None, commits: str | None) -> list[Parent]:
    """The parent that a reference names, or the two of BASE+ADAPTER.

    Args:
        ref: A local path or a Hub id, as the user typed it.
        role: Role of the first of them; the second is an adapter.
        scale: The scale of both.
        commits: Their commits, joined by a plus. A reference without a commit is a local path.
    """
    names = ref.split("+") if commits is None or "+" in commits else [ref]
    shas = commits.split("+") if commits else [""] * len(names)
    if len(shas) != len(names):  # a local path with a plus in it
        names, shas = [ref], [commits or ""]
    result = []
    for i, (name, sha) in enumerate(zip(names, shas, strict=True)):
        repo, _, revision = name.partition("@")
        commit = sha or (revision if _COMMIT.fullmatch(revision) else "")
        part_role = "adapter" if i > 0 else role
        if commit:
            result.append(Parent(part_role, scale, None, repo, commit))
        else:
            result.append(Parent(part_role, scale, name))
    if commits is None and not any(p.repo for p in result):
        return [Parent(role, scale, ref)]
    return result


def adapter_base(config: Mapping[str, object]) -> Parent:
    """The base that an adapter's config names, by Hub id or by path.

    PEFT does not say which of the two it is: a name in the form of a Hub id is taken for one.
    """
    name, revision = str(config.get("base_model_name_or_path")), str(config.get("revision") or "")
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        return Parent("base", None, None, name, revision if _COMMIT.fullmatch(revision) else None)
    return Parent("base", None, name)


def _merged_adapters(report: MergeRecord, recipe: Mapping[str, object]) -> tuple[Parent, ...]:
    """Adapters with their scales; the recipe pins them to commits, where the report does not."""
    scales = report["scales"] * (len(report["adapters"]) if len(report["scales"]) == 1 else 1)
    refs = cast(list[str], recipe.get("models")) or report["adapters"]
    return tuple(
        parent
        for ref, scale in zip(refs, scales, strict=False)
        for parent in named_parents(str(ref), "task", scale, None)
    )
