"""What a model folder says about itself: how it was made, its posterior, task and evaluations."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit_bayes.checkpoint.contained import contained
from mergekit_bayes.checkpoint.identity import identity
from mergekit_bayes.checkpoint.layout import checkpoint_files, precision_files
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.checkpoint.side_files import ADAPT, EXTRACT, FINETUNE, MERGE_RECIPE, RECORDS
from mergekit_bayes.hub.folder import (
    AdaptRecord,
    ExtractRecord,
    MergeRecord,
    WrittenRecipe,
    lone_precision_files,
    mapping,
    precision_info,
    read_adaptation,
    read_extraction,
    read_merge,
    read_record,
    read_written_recipe,
    texts,
)
from mergekit_bayes.hub.parents import Parent, parents
from mergekit_bayes.posterior import PosteriorInfo
from mergekit_bayes.posterior.info import Pool
from mergekit_bayes.posterior.pooling import PosteriorForm, is_finer
from mergekit_bayes.posterior.stored import StoredPrecisions

_PIPELINES = {  # the end of an architecture's class name -> the Hub's pipeline tag
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
}
_ADAPTER_PIPELINES = {"CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification"}


@dataclass(frozen=True)
class Facts:
    """What the files of a folder say.

    Attributes:
        repo: `org/name`, or the folder's name.
        only_posterior: The card is of a posterior, without a model.
        report: `merge_report.json`; None if the folder is not a merge.
        recipe: `merge_recipe.yaml`, likewise; of several documents the last one.
        earlier_recipes: The documents before, whose outputs it merges.
        flags: What the command that repeats a merge of mergekit needs besides its recipe.
        finetune: `finetune.yaml`; empty if the folder is not a fine-tune.
        adapt: `adapt.yaml`; empty if the folder is not an adapted model.
        adaptation: `adapt_report.json`, with what it leaves out as if nothing had been done.
        extract: `extract.yaml`; empty if the folder is not an extracted adapter.
        extraction: `extract_report.json`, likewise with defaults.
        adapter: `adapter_config.json`; empty for a whole model.
        is_adapter: The weights are those of an adapter.
        parents: The models it was made from.
        has_posterior: The folder holds a precision that the card describes.
        info: What the precision's header says.
        pool: The form to which its numbers are pooled when it is pushed, or were before; None
            where they are as the estimate or the merge made them.
        has_matrices: Whether it holds matrices for some tensors.
        pipeline: The Hub's pipeline tag.
        evaluations: Reports of `bmerge evaluate` on these weights.
        notes: What the user should know before publishing.
    """

    repo: str
    only_posterior: bool
    report: MergeRecord | None
    recipe: Mapping[str, object]
    earlier_recipes: tuple[Mapping[str, object], ...]
    flags: Mapping[str, str]
    finetune: Mapping[str, object]
    adapt: Mapping[str, object]
    adaptation: AdaptRecord
    extract: Mapping[str, object]
    extraction: ExtractRecord
    adapter: Mapping[str, object]
    is_adapter: bool
    parents: tuple[Parent, ...]
    has_posterior: bool
    info: PosteriorInfo | None
    pool: Pool | None
    has_matrices: bool
    pipeline: str | None
    evaluations: tuple[Mapping[str, object], ...]
    notes: tuple[str, ...]

    @property
    def places(self) -> tuple[Parent, ...]:
        """The parents and the outputs of earlier merges: whatever a note may name by its path."""
        stages = self.report.stages if self.report is not None else {}
        return (*self.parents, *(Parent("stage", None, ref) for ref in stages))


def read_facts(
    folder: Path,
    repo: str,
    *,
    posterior: bool,
    only_posterior: bool,
    form: PosteriorForm = "entries",
) -> Facts:
    """Read what a folder says about itself.

    Args:
        folder: Nothing outside of it is read.
        repo: The name to show.
        posterior: Describe the posterior in the folder, if there is one.
        only_posterior: Describe nothing but the posterior.
        form: The form in which the posterior is pushed.

    Raises:
        CheckpointError: Neither a model nor a precision, or a file that cannot be read or leads
            out of the folder.
    """
    lone = lone_precision_files(folder)
    only = only_posterior or bool(lone)
    precision = lone or (precision_files(folder) if posterior else [])
    for file in (*precision, *_documents(folder, only=only)):
        contained(folder, file.relative_to(folder))
    report = None if only else read_merge(folder)
    written = WrittenRecipe() if only else read_written_recipe(folder / MERGE_RECIPE)
    finetune, adapt, extract = (
        {} if only else read_record(folder / name) for name in (FINETUNE, ADAPT, EXTRACT)
    )
    made_from = parents(folder, posterior_only=only_posterior)
    adapter = read_record(folder / "adapter_config.json")
    mean_identity = None
    if not lone:
        with SafetensorsSource(checkpoint_files(folder)) as mean:
            mean_identity = identity(mean)
    info = precision_info(precision)
    config = read_record(folder / "config.json")
    evaluations, notes = ((), ()) if only else _evaluations(folder, mean_identity)
    return Facts(
        repo=repo,
        only_posterior=only,
        report=report,
        recipe=written.documents[-1] if written.documents else {},
        earlier_recipes=written.documents[:-1],
        flags=written.flags,
        finetune=finetune,
        adapt=adapt,
        adaptation=(None if only else read_adaptation(folder)) or AdaptRecord(),
        extract=extract,
        extraction=(None if only else read_extraction(folder)) or ExtractRecord(),
        adapter=adapter,
        is_adapter=bool(adapter) and not (folder / "model.safetensors").exists(),
        parents=made_from,
        has_posterior=bool(precision),
        info=info,
        pool=_pool(precision, info, form),
        has_matrices=_has_matrices(precision),
        pipeline=_pipeline(texts(config.get("architectures")), str(adapter.get("task_type"))),
        evaluations=evaluations,
        notes=notes,
    )


def _pool(
    precision: Sequence[Path], info: PosteriorInfo | None, form: PosteriorForm
) -> Pool | None:
    """The form to which a posterior is pooled when it is pushed, or was before."""
    if form != "entries" and precision:
        with StoredPrecisions(precision) as source:
            if is_finer(source, form):
                return form
    return None if info is None else info.pool


def _has_matrices(precision: Sequence[Path]) -> bool:
    if not precision:
        return False
    with StoredPrecisions(precision) as source:
        return bool(source.matrices)


def _evaluations(
    folder: Path, mean_identity: str | None
) -> tuple[tuple[Mapping[str, object], ...], tuple[str, ...]]:
    """Evaluations of these weights, and a note for each evaluation of other weights."""
    reports, notes = [], []
    for file in _report_files(folder):
        measured = _measured(read_record(file))
        of_these = [report for report in measured if report["model_identity"] == mean_identity]
        reports += of_these[:1]
        if measured and not of_these:
            notes.append(
                f"{file.relative_to(folder)} evaluates other weights than these, so the card "
                "leaves its results out"
            )
    return tuple(reports), tuple(notes)


def _measured(report: Mapping[str, object]) -> list[Mapping[str, object]]:
    """The evaluations in a `report.json`: one, those of models side by side, or none."""
    several = report.get("evaluations")
    found = [report]
    if isinstance(several, list):
        found = [mapping(mapping(one).get("report")) for one in several]
    return [one for one in found if "model_identity" in one]


def _report_files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("report.json"), *folder.glob("*/report.json")])


def _documents(folder: Path, *, only: bool) -> list[Path]:
    """The files of a folder whose content is read for a card, as far as they are there."""
    names = ("config.json", "adapter_config.json", *(() if only else RECORDS))
    reports = [] if only else _report_files(folder)
    return [*(folder / name for name in names if os.path.lexists(folder / name)), *reports]


def _pipeline(architectures: Sequence[str], adapter_task: str) -> str | None:
    for name in architectures:
        for ending, tag in _PIPELINES.items():
            if name.endswith(ending):
                return tag
    return _ADAPTER_PIPELINES.get(adapter_task)
