"""The models that a model was made from: its base, tasks and adapters, as its own records say."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mergekit_bayes.checkpoint.layout import precision_files
from mergekit_bayes.checkpoint.side_files import ADAPT, EXTRACT, FINETUNE, MERGE_RECIPE
from mergekit_bayes.hub.folder import (
    MergedModel,
    MergeRecord,
    lone_precision_files,
    precision_info,
    read_merge,
    read_record,
    text_or_none,
    texts,
)

TUNED = "extracted from"  # role of the model whose change an adapter is
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPO = re.compile(r"[\w-][\w.-]*/[\w.-]+")


class Parent(NamedTuple):
    """A model that this one was made from: a local one, or one on the Hub.

    Attributes:
        role: `base`, `task`, `adapter`, `model` (the model of a posterior), or `extracted from`
            (the tuned model of an adapter); of a model that was merged before, with that merge's
            name behind it, `task of NAME`.
        scale: Its scale in the merge; None where there is none.
        path: Local folder or file; None for a model on the Hub.
        repo: `org/name` on the Hub; None for a local model.
        commit: The commit that was used; None if it is not recorded.
        run: The run of a mixture that this is, where the mixture is what the others name.
    """

    role: str
    scale: float | None
    path: str | None
    repo: str | None = None
    commit: str | None = None
    run: str | None = None

    @property
    def name(self) -> str:
        """The name that a card shows: the repository, or the last part of a local path.

        The rest of a path describes a machine and is not published.
        """
        return self.repo or "+".join(Path(part).name for part in (self.path or "?").split("+"))

    @property
    def title(self) -> str:
        """The name, and for a run of a mixture also that of the run."""
        return self.name if self.run is None else f"{self.name}: {Path(self.run).name}"


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
        name = text_or_none(info.training.get("model")) if info is not None else None
        return tuple(named_parents(name, "model", None, None)) if name else ()
    report = read_merge(folder)
    if report is not None and report.models:
        merged = [parent for model in report.models for parent in _merged(model)]
        return tuple(_before_stages(merged, report.stages))
    if report is not None:
        return _merged_adapters(report, read_record(folder / MERGE_RECIPE))
    for name in (FINETUNE, ADAPT):
        if model := text_or_none(read_record(folder / name).get("model")):
            return tuple(named_parents(model, "base", None, None))
    if refs := _extracted(read_record(folder / EXTRACT)):
        return refs
    base = adapter_base(read_record(folder / "adapter_config.json"))
    return () if base is None else (base,)


def _extracted(settings: Mapping[str, object]) -> tuple[Parent, ...]:
    """The base of an extracted adapter, and the tuned model; empty of anything else."""
    refs = {"base": settings.get("base"), TUNED: settings.get("model")}
    named = [(role, ref) for role, value in refs.items() if (ref := text_or_none(value))]
    return tuple(parent for role, ref in named for parent in named_parents(ref, role, None, None))


def _before_stages(
    made_from: Sequence[Parent], stages: Mapping[str, Sequence[MergedModel]]
) -> Iterator[Parent]:
    """The parents, with those of an output of an earlier merge in its place."""
    for parent in made_from:
        if parent.path is None or parent.path not in stages:
            yield parent
            continue
        others = {ref: models for ref, models in stages.items() if ref != parent.path}
        for model in stages[parent.path]:
            merged = [p._replace(role=f"{p.role} of {parent.name}") for p in _merged(model)]
            yield from _before_stages(merged, others)


def _merged(model: MergedModel) -> list[Parent]:
    """The parents that a model of a merge names."""
    if model.mixture is None:
        return named_parents(model.ref, model.role, model.scale, model.commit)
    mixture, *_ = named_parents(model.mixture, model.role, model.scale, model.commit)
    return [mixture._replace(run=model.ref.removeprefix(f"{model.mixture}: "))]


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
        commit = sha or revision
        part_role = "adapter" if i > 0 else role
        if _COMMIT.fullmatch(commit) and _REPO.fullmatch(repo):
            result.append(Parent(part_role, scale, None, repo, commit))
        else:
            result.append(Parent(part_role, scale, name))
    if commits is None and not any(p.repo for p in result):
        return [Parent(role, scale, ref)]
    return result


def adapter_base(config: Mapping[str, object]) -> Parent | None:
    """The base that an adapter's config names, by Hub id or by path; None if it names none.

    PEFT does not say which of the two it is: a name in the form of a Hub id is taken for one.
    """
    name = text_or_none(config.get("base_model_name_or_path"))
    revision = text_or_none(config.get("revision")) or ""
    if name is None:
        return None
    if _REPO.fullmatch(name):
        return Parent("base", None, None, name, revision if _COMMIT.fullmatch(revision) else None)
    return Parent("base", None, name)


def _merged_adapters(report: MergeRecord, recipe: Mapping[str, object]) -> tuple[Parent, ...]:
    """Adapters with their scales; the recipe pins them to commits, where the report does not."""
    scales = report.scales * (len(report.adapters) if len(report.scales) == 1 else 1)
    refs = texts(recipe.get("models")) or report.adapters
    return tuple(
        parent
        for ref, scale in zip(refs, scales, strict=False)
        for parent in named_parents(ref, "task", scale, None)
    )
