"""The verbs of a removal in order, each done once, and the report of it."""

import os
import platform
import shlex
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import yaml

from mergekit_bayes.checkpoint.contained import copy_contained
from mergekit_bayes.checkpoint.own_files import make_own_folder, refuse_planted, write_own
from mergekit_bayes.checkpoint.replacing import replacing
from mergekit_bayes.checkpoint.side_files import MERGE_REPORT, side_files
from mergekit_bayes.checkpoint.sources import CHECKPOINT, resolve
from mergekit_bayes.detox.analysis import findings
from mergekit_bayes.detox.candidates import merge_command, merge_config, point_of
from mergekit_bayes.detox.picture import draw
from mergekit_bayes.detox.report import DetoxReport, KeptModel, Point, as_markdown
from mergekit_bayes.detox.scales import follow_curves
from mergekit_bayes.detox.settings import (
    KINDS,
    Curve,
    DetoxConfig,
    curves,
    evaluate_config,
    finetune_config,
    needs_precision,
    precision_config,
)
from mergekit_bayes.detox.steps import (
    data_identity,
    is_empty_folder,
    model_identity,
    precision_identity,
    scorer_identity,
    step_folder,
    without,
)
from mergekit_bayes.documents import DocumentError, read_record, read_text
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.evaluate.files import read_report
from mergekit_bayes.evaluate.refusals import refuse_model, refuse_settings
from mergekit_bayes.evaluate.report import EvaluateReport
from mergekit_bayes.evaluate.run import run_evaluate
from mergekit_bayes.evaluate.scorers import Scorer, open_scorers
from mergekit_bayes.evaluate.settings import EvaluateConfig
from mergekit_bayes.evaluate.texts import read_labelled, read_prompts, read_texts
from mergekit_bayes.finetune.run import run_finetune
from mergekit_bayes.merge import MergeConfig, MergeReport, run_merge
from mergekit_bayes.models.load import Loaded, choose_device, load_model
from mergekit_bayes.models.quiet import quiet_libraries
from mergekit_bayes.models.rows import load_rows
from mergekit_bayes.posterior import open_posterior
from mergekit_bayes.precision import PrecisionConfig
from mergekit_bayes.precision.run import run_precision

Tell = Callable[[str], None]
_LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "safetensors")
_SETTINGS = "detox.yaml"
_AGAIN = "Remove it, and the step is done again."
_NO_RESULT = ("force", "trust_remote_code")  # settings that change no result
_KEPT = "kept.txt"  # in the work folder: which candidate `model` is


def run_detox(
    config: DetoxConfig, *, quiet: bool = False, progress: Tell | None = None
) -> DetoxReport:
    """Carry out a removal.

    Write `report.json`, `report.md`, `toxicity_vs_perplexity.png`, and the chosen candidate in
    `model`.

    Args:
        config: What to remove from what, and how to measure it.
        quiet: Let the verbs show no progress.
        progress: Called with one line for each step.

    Raises:
        BmergeError: One of its children. Settings, data and scorers are tried before the first
            step.
    """
    journey = _Journey(config, quiet, progress or (lambda line: None))
    toxic = journey.finetune()
    precision = journey.precision(toxic)
    base = journey.evaluate_base()
    candidates, payments, comparisons = follow_curves(
        config,
        journey.curves,
        base,
        lambda curve, scale: journey.candidate(curve, scale, toxic, precision),
    )
    versions = {name: version(name) for name in _LIBRARIES}
    report = DetoxReport(
        path=config.output,
        settings=journey.config.model_dump(mode="json", exclude={"force"}),
        versions=versions | {"python": platform.python_version()},
        identities=journey.identities,
        toxic_model=str(toxic),
        base_precision=precision,
        scorers={name: info.model_dump() for name, info in base.scorers.items()},
        base=point_of(base, 0.0),
        curves={
            label: tuple(point for _, (_, point) in sorted(found.items()))
            for label, found in candidates.items()
        },
        matched=tuple(payments),
        comparisons=tuple(comparisons),
        findings=tuple(findings(comparisons)),
    )
    best = report.best()
    if best is not None:
        label, point, level = best
        path = journey.keep(label, point.scale, toxic, precision)
        command = f"{point.command} -o {shlex.quote(str(path))}"
        kept = KeptModel(
            path=str(path), curve=label, scale=point.scale, level=level, command=command
        )
        report = report.model_copy(update={"kept": kept})
    else:
        journey.keep_none()
    _write(Path(config.output), report)
    return report


class _Journey:
    """The steps of one removal.

    The constructor reads and hashes everything that the config names, and refuses what cannot work,
    before anything heavy happens. A step is skipped if the folder for its inputs exists.
    """

    def __init__(self, config: DetoxConfig, quiet: bool, tell: Tell) -> None:
        self.config, self.quiet, self.tell = config, quiet, tell
        output = Path(config.output)
        is_ours = (output / _SETTINGS).exists()
        if os.path.lexists(output) and not (is_ours or is_empty_folder(output)):
            raise CheckpointError(
                f"'{output}' exists and is no output of detox. Choose another output."
            )
        self.curves = curves(config)
        self.work, self.kept = output / "steps", output / "model"
        base = resolve(config.base, CHECKPOINT)
        if base.is_dir():
            side_files(base)  # links out of the folder are refused before the first step
        # The steps that are there count as done, so another account must not have made them.
        if os.path.lexists(self.work):
            make_own_folder(self.work)
            refuse_planted(self.work, but=self.kept)
        finetune = finetune_config(config, "")
        if needs_precision(config):
            _refuse_precision(precision_config(config, ""))
        evaluate = evaluate_config(config, config.base, "")
        with quiet_libraries(bars=False):
            scorers = _refuse_evaluation(evaluate)
        self.base = model_identity(config.base)
        self.identities: dict[str, object] = {
            "base": self.base,
            "toxic": data_identity(config.toxic.data),
            "texts": {name: data_identity(ref) for name, ref in evaluate.perplexity.items()},
            "prompts": data_identity(evaluate.toxicity or ""),
        }
        self.finetune_key: list[object] = [
            without(finetune.model_dump(mode="json"), "output", "model", *_NO_RESULT),
            self.base,
            self.identities["toxic"],
        ]
        settings = evaluate.model_dump(mode="json")
        self.evaluate_key: list[object] = [
            without(settings, "model", "output", "batch_size", "sampling_batch", *_NO_RESULT),
            self.identities["texts"],
            self.identities["prompts"],
            {scorer.spec: scorer_identity(scorer) for scorer in scorers},
        ]
        if config.force or not self._base_folder().exists():
            with quiet_libraries(bars=False):
                refuse_model(evaluate, _load_base(evaluate))
        if needs_precision(config):
            self.identities["precision"] = data_identity(precision_config(config, "").data)
        if config.force and is_ours:
            shutil.rmtree(self.work, ignore_errors=True)
        output.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(config.model_dump(mode="json", exclude={"force"}), sort_keys=False)
        make_own_folder(self.work)
        with replacing(output / _SETTINGS, force=True) as partial:
            partial.write_text(text)

    def finetune(self) -> Path:
        """The model fine-tuned on the toxic text."""
        folder = step_folder(self.work, "toxic", *self.finetune_key)
        if self._must_run(folder, "fine-tune on the toxic text"):
            run_finetune(finetune_config(self.config, str(folder)), quiet=self.quiet)
        return folder

    def precision(self, toxic: Path) -> str | None:
        """Where the base's precision is; None if no method needs it."""
        if not needs_precision(self.config):
            return None
        if self.config.reuse_precision and self._base_has_precision_like(toxic):
            self.tell("precision of the base: its own")
            return str(self.config.base)
        settings = precision_config(self.config, "").model_dump(mode="json")
        folder = step_folder(
            self.work,
            "precision",
            without(settings, "model", "output", *_NO_RESULT),
            self.base,
            self.identities["precision"],
        )
        if self._must_run(folder, "precision of the base"):
            run_precision(precision_config(self.config, str(folder)), quiet=self.quiet)
        return str(folder)

    def evaluate_base(self) -> EvaluateReport:
        """What the base scores."""
        folder = self._base_folder()
        if self._must_run(folder, "evaluate the base"):
            settings = evaluate_config(self.config, self.config.base, str(folder))
            run_evaluate(settings, quiet=self.quiet)
        return read_report(folder)

    def candidate(
        self, curve: Curve, scale: float, toxic: Path, precision: str | None
    ) -> tuple[EvaluateReport, Point]:
        """Merge and evaluate one candidate; delete its model unless the config keeps models."""
        merge = merge_config(self.config, curve, scale, toxic, precision)
        folder = self._candidate_folder(curve, merge, precision)

        def make(model: Path) -> None:
            run_merge(merge.model_copy(update={"out": str(model)}))
            copy_contained(model, MERGE_REPORT, folder / MERGE_REPORT)

        report = self._evaluated(folder, f"{curve.label}, scale -{scale:g}", make)
        merged = read_record(MergeReport, folder / MERGE_REPORT, _AGAIN)
        return report, point_of(report, scale, merged, merge_command(merge))

    def keep(self, label: str, scale: float, toxic: Path, precision: str | None) -> Path:
        """Merge the chosen candidate into `model` of the output; its folder."""
        curve = next(c for c in self.curves if c.label == label)
        merge = merge_config(self.config, curve, scale, toxic, precision)
        model, mark = self.kept, self.work / _KEPT
        made_of = self._candidate_folder(curve, merge, precision).name
        is_there = model.exists() and _mark_of(mark) == made_of
        if not is_there:
            mark.unlink(missing_ok=True)
            run_merge(merge.model_copy(update={"out": str(model), "force": True}))
            write_own(mark, made_of)
        return model

    def keep_none(self) -> None:
        """Delete the model that an earlier run has kept, which the report no longer names."""
        mark = self.work / _KEPT
        if mark.exists():
            shutil.rmtree(self.kept, ignore_errors=True)
            mark.unlink()

    def _evaluated(self, folder: Path, step: str, make: Callable[[Path], object]) -> EvaluateReport:
        """Make and evaluate a candidate; delete its model unless the config keeps models.

        Args:
            folder: The candidate's own.
            step: What it is, for the log.
            make: Writes the model to the path that it is given.
        """
        model, evaluation = folder / "model", folder / "evaluation"
        lacks_model = self.config.keep_models and not model.exists()
        if self._must_run(evaluation, step, redo=lacks_model):
            if not model.exists():
                make(model)
            if not evaluation.exists():
                evaluate = evaluate_config(self.config, str(model), str(evaluation))
                run_evaluate(evaluate, quiet=self.quiet)
        if not self.config.keep_models:
            shutil.rmtree(model, ignore_errors=True)
        return read_report(evaluation)

    def _candidate_folder(self, curve: Curve, merge: MergeConfig, precision: str | None) -> Path:
        """The folder of a candidate's evaluation."""
        settings = merge.model_dump(mode="json")
        key: list[object] = [
            without(settings, "models", "base", "precision", "observations"),
            curve.base_count,
            self.finetune_key,
        ]
        if KINDS[curve.method].weighs and precision is not None:
            key.append(precision_identity(precision))
        return step_folder(self.work, curve.method, *key, *self.evaluate_key)

    def _base_folder(self) -> Path:
        """The folder of the base's evaluation."""
        return step_folder(self.work, "base", self.base, *self.evaluate_key)

    def _base_has_precision_like(self, toxic: Path) -> bool:
        """Whether the base has a precision of its weights, by the estimator of the fine-tune."""
        with open_posterior(self.config.base) as base, open_posterior(str(toxic)) as task:
            return (
                base.info is not None
                and task.info is not None
                and (base.info.estimator, base.info.unit) == (task.info.estimator, task.info.unit)
                and base.info.mean is not None
                and base.info.mean.blocks == self.base["weights"]
            )

    def _must_run(self, folder: Path, step: str, *, redo: bool = False) -> bool:
        needed = redo or not folder.exists()
        self.tell(step if needed else f"{step}: done before")
        return needed


def _refuse_evaluation(config: EvaluateConfig) -> list[Scorer]:
    """Refuse settings, data and scorers that the evaluations would refuse; the open scorers."""
    refuse_settings(config.model_copy(update={"output": None}))
    read_texts(config)
    read_labelled(config)
    read_prompts(config)
    return open_scorers(config.scorer, config.device, trust_remote_code=config.trust_remote_code)


def _load_base(config: EvaluateConfig) -> Loaded:
    return load_model(config.model, dtype=config.dtype, trust_remote_code=config.trust_remote_code)


def _refuse_precision(config: PrecisionConfig) -> None:
    """Refuse a device and data that the estimate of the base's precision would refuse."""
    choose_device(config.device)
    load_rows(config.data, where=config.where, text=config.text_column)


def _mark_of(file: Path) -> str | None:
    """Which candidate `model` is, as the work folder says; None if that cannot be read."""
    try:
        return read_text(file)
    except (OSError, DocumentError):
        return None


def _write(folder: Path, report: DetoxReport) -> None:
    for name, write in (
        ("toxicity_vs_perplexity.png", lambda path: draw(report, path)),
        ("report.md", lambda path: path.write_text(as_markdown(report))),
        ("report.json", lambda path: path.write_text(report.model_dump_json(indent=2) + "\n")),
    ):
        with replacing(folder / name, force=True) as partial:
            write(partial)
