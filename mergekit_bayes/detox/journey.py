"""The verbs of a removal in order, each done once, and the report of it."""

import os
import platform
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import yaml

from mergekit_bayes.adapt.kept import steps_of
from mergekit_bayes.adapt.run import run_adapt
from mergekit_bayes.checkpoint.contained import copy_contained
from mergekit_bayes.checkpoint.own_files import make_own_folder, refuse_planted, write_own
from mergekit_bayes.checkpoint.replacing import replacing
from mergekit_bayes.checkpoint.side_files import MERGE_REPORT, side_files
from mergekit_bayes.checkpoint.sources import CHECKPOINT, resolve
from mergekit_bayes.detox.adaptations import (
    adapt_command,
    adapt_config,
    passes_of,
    settings_file,
    settings_text,
)
from mergekit_bayes.detox.analysis import findings
from mergekit_bayes.detox.candidates import (
    Made,
    finetune_passes,
    merge_command,
    merge_config,
    output_flag,
    point_of,
)
from mergekit_bayes.detox.costs import Cost, forget_cost, read_cost, timed, total, write_cost
from mergekit_bayes.detox.inputs import read_inputs
from mergekit_bayes.detox.markdown import as_markdown
from mergekit_bayes.detox.picture import draw
from mergekit_bayes.detox.report import DetoxReport, KeptModel, Point, in_words
from mergekit_bayes.detox.scales import follow_curves
from mergekit_bayes.detox.settings import (
    Curve,
    DetoxConfig,
    curves,
    evaluate_config,
    finetune_config,
    looks,
    needs_finetune,
    needs_precision,
    precision_config,
    weighs,
)
from mergekit_bayes.detox.steps import has_own_precision, is_empty_folder, step_folder
from mergekit_bayes.documents import DocumentError, read_record, read_text
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.evaluate.files import read_report
from mergekit_bayes.evaluate.refusals import refuse_model
from mergekit_bayes.evaluate.report import EvaluateReport
from mergekit_bayes.evaluate.run import run_evaluate
from mergekit_bayes.evaluate.settings import EvaluateConfig
from mergekit_bayes.finetune.run import run_finetune
from mergekit_bayes.launcher import apart
from mergekit_bayes.merge import MergeReport, run_merge
from mergekit_bayes.models.load import load_model
from mergekit_bayes.models.quiet import quiet_libraries
from mergekit_bayes.precision.run import run_precision
from mergekit_bayes.ranks import join, lead

Tell = Callable[[str], None]
Evaluate = Callable[[EvaluateConfig], object]
_LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "safetensors")
_SETTINGS = "detox.yaml"
_AGAIN = "Remove it, and the step is done again."
_NO_RESULT = {"force", "num_processes"}
_KEPT = "kept.txt"  # in the work folder: which candidate `model` is


def run_detox(
    config: DetoxConfig, *, quiet: bool = False, progress: Tell | None = None
) -> DetoxReport:
    """Carry out a removal.

    Write `report.json`, `report.md`, `toxicity_vs_perplexity.png`, and the chosen candidate in
    `model`. Under a launcher every rank calls this and gets the same report, or the same error.
    All share the evaluations; rank 0 alone makes models and writes.

    Args:
        config: What to remove from what, and how to measure it.
        quiet: Let the verbs show no progress.
        progress: Called with one line for each step.

    Raises:
        BmergeError: One of its children. Settings, data and scorers are tried before the first
            step.
    """
    join(config.num_processes)
    tell = progress or (lambda line: None)

    def evaluate(settings: EvaluateConfig) -> None:
        run_evaluate(settings, quiet=quiet)

    return lead(lambda together: _carry_out(config, quiet, tell, together), evaluate)


def _carry_out(config: DetoxConfig, quiet: bool, tell: Tell, evaluate: Evaluate) -> DetoxReport:
    journey = _Journey(config, quiet, tell, evaluate)
    toxic = journey.finetune()
    made = Made(toxic, journey.precision(toxic))
    base = journey.evaluate_base()
    candidates, payments, comparisons = follow_curves(
        config, journey.curves, base, lambda curve, place: journey.candidate(curve, place, made)
    )
    versions = {name: version(name) for name in _LIBRARIES}
    report = DetoxReport(
        path=config.output,
        settings=journey.config.model_dump(mode="json", exclude=_NO_RESULT),
        versions=versions | {"python": platform.python_version()},
        identities=journey.inputs.identities,
        toxic_model=str(toxic) if toxic is not None else None,
        base_precision=made.precision,
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
        path = journey.keep(label, point.scale, made)
        kept = KeptModel(
            path=str(path),
            curve=label,
            scale=point.scale,
            unit=point.unit,
            level=level,
            command=f"{point.command} {output_flag(point.unit, path)}",
        )
        report = report.model_copy(update={"kept": kept})
    else:
        journey.keep_none()
    journey.write_settings(made)
    _write(Path(config.output), report)
    return report


class _Journey:
    """The steps of one removal.

    The constructor reads and hashes everything that the config names, and refuses what cannot work,
    before anything heavy happens. A step is skipped if the folder for its inputs exists.
    """

    def __init__(
        self, config: DetoxConfig, quiet: bool, tell: Tell, evaluate: Evaluate = run_evaluate
    ) -> None:
        self.config, self.quiet, self.tell, self.evaluate = config, quiet, tell, evaluate
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
        self.inputs = read_inputs(config, self.curves)
        if config.force or not self._base_folder().exists():
            with quiet_libraries(bars=False):
                _refuse_base(evaluate_config(config, config.base, ""))
        if config.force and is_ours:
            shutil.rmtree(self.work, ignore_errors=True)
        output.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(config.model_dump(mode="json", exclude=_NO_RESULT), sort_keys=False)
        make_own_folder(self.work)
        with replacing(output / _SETTINGS, force=True) as partial:
            partial.write_text(text)

    def finetune(self) -> Path | None:
        """The model fine-tuned on the toxic text; None if no method subtracts it."""
        if not needs_finetune(self.config):
            return None
        folder = step_folder(self.work, "toxic", *self.inputs.finetune)
        if self._must_run(folder, "fine-tune on the toxic text"):
            finetune = finetune_config(self.config, str(folder))
            timed(
                folder,
                lambda: apart(run_finetune, finetune, quiet=self.quiet),
                lambda report: finetune_passes(finetune, report.steps),
            )
        return folder

    def precision(self, toxic: Path | None) -> str | None:
        """Where the base's precision is; None if no method needs it."""
        if not needs_precision(self.config):
            return None
        weights = self.inputs.base["weights"]
        if self.config.reuse_precision and has_own_precision(self.config.base, weights, toxic):
            self.tell("precision of the base: its own")
            return str(self.config.base)
        folder = step_folder(self.work, "precision", *self.inputs.precision)
        if self._must_run(folder, "precision of the base"):
            precision = precision_config(self.config, str(folder))
            timed(
                folder,
                lambda: run_precision(precision, quiet=self.quiet),
                lambda report: precision.examples,
            )
        return str(folder)

    def evaluate_base(self) -> EvaluateReport:
        """What the base scores."""
        folder = self._base_folder()
        if self._must_run(folder, "evaluate the base"):
            self.evaluate(evaluate_config(self.config, self.config.base, str(folder)))
        return read_report(folder)

    def candidate(self, curve: Curve, place: float, made: Made) -> tuple[EvaluateReport, Point]:
        """Make and evaluate one candidate; delete its model unless the config keeps models.

        Args:
            curve: The method and its settings.
            place: The scale of a merge, or the steps of an adaptation.
            made: What it is made of, beside the base.
        """
        return (self._look if curve.unit == "step" else self._merge)(curve, place, made)

    def keep(self, label: str, place: float, made: Made) -> Path:
        """Make the chosen candidate once more, in `model` of the output; its folder."""
        curve = next(c for c in self.curves if c.label == label)
        model, mark = self.kept, self.work / _KEPT
        made_of = self._folder(curve, place, made).name
        is_there = model.exists() and _mark_of(mark) == made_of
        if not is_there:
            mark.unlink(missing_ok=True)
            if curve.unit == "step":
                adapt = adapt_config(self.config, curve, str(model), int(place), made.precision)
                apart(run_adapt, adapt.model_copy(update={"force": True}), quiet=self.quiet)
            else:
                merge = merge_config(self.config, curve, place, made)
                run_merge(merge.model_copy(update={"out": str(model), "force": True}))
            write_own(mark, made_of)
        return model

    def write_settings(self, made: Made) -> None:
        """Write the settings of each adaptation, to which the commands of its looks refer."""
        for curve in (c for c in self.curves if c.unit == "step"):
            adapt = adapt_config(self.config, curve, "", 1, made.precision)
            with replacing(settings_file(self.config, curve), force=True) as partial:
                partial.write_text(settings_text(adapt))

    def keep_none(self) -> None:
        """Delete the model that an earlier run has kept, which the report no longer names."""
        mark = self.work / _KEPT
        if mark.exists():
            shutil.rmtree(self.kept, ignore_errors=True)
            mark.unlink()

    def _merge(self, curve: Curve, scale: float, made: Made) -> tuple[EvaluateReport, Point]:
        """Merge and evaluate one candidate."""
        merge = merge_config(self.config, curve, scale, made)
        folder = self._folder(curve, scale, made)

        def make(model: Path) -> None:
            timed(folder, lambda: run_merge(merge.model_copy(update={"out": str(model)})))
            copy_contained(model, MERGE_REPORT, folder / MERGE_REPORT)

        report = self._evaluated(folder, f"{curve.label}, {in_words(curve.unit, scale)}", make)
        merged = read_record(MergeReport, folder / MERGE_REPORT, _AGAIN)
        costs = [self._cost_of_precision(curve, made), read_cost(folder)]
        if made.toxic is not None:
            costs.append(read_cost(made.toxic))
        point = point_of(report, scale, merge_command(merge), total(costs), merged=merged)
        return report, point

    def _look(self, curve: Curve, place: float, made: Made) -> tuple[EvaluateReport, Point]:
        """Evaluate an adaptation after some of its steps."""
        step, folder = int(place), self._folder(curve, place, made)

        def make(model: Path) -> None:
            kept, cost = self._adaptation(curve, step, made)
            folder.mkdir(parents=True, exist_ok=True)
            kept.replace(model)
            if cost is not None:
                write_cost(folder, cost)

        report = self._evaluated(folder, f"{curve.label}, {in_words(curve.unit, step)}", make)
        command = adapt_command(self.config, curve, step)
        cost = total([self._cost_of_precision(curve, made), read_cost(folder)])
        return report, point_of(report, place, command, cost, unit="step")

    def _adaptation(self, curve: Curve, step: int, made: Made) -> tuple[Path, Cost | None]:
        """The model of an adaptation after a step, and what it took.

        One run makes the models of all steps that are still to be evaluated.
        """
        run = step_folder(self.work, f"{curve.method}-run", *self.inputs.adaptation(curve, made))
        kept = steps_of(run / "model")
        if not (kept / str(step)).exists():
            wanted = tuple(int(s) for s in looks(self.config, curve) if self._lacks(curve, s, made))
            shutil.rmtree(run, ignore_errors=True)
            forget_cost(run)
            adapt = adapt_config(
                self.config, curve, str(run / "model"), max(wanted), made.precision, wanted
            )
            self.tell(f"{curve.label}: {max(wanted)} steps")
            timed(
                run,
                lambda: apart(run_adapt, adapt, quiet=self.quiet),
                lambda report: passes_of(adapt, report.steps),
            )
            shutil.rmtree(run / "model", ignore_errors=True)  # the last of the kept steps, again
        adapt = adapt_config(self.config, curve, "", step, made.precision)
        cost, passes = read_cost(run), passes_of(adapt, step)
        if cost is None:
            return kept / str(step), None
        share = passes / cost.passes if cost.passes else 0.0
        return kept / str(step), Cost(seconds=cost.seconds * share, passes=passes)

    def _lacks(self, curve: Curve, place: float, made: Made) -> bool:
        """Whether a look is still to be evaluated, or its model to be kept, and it is not there."""
        folder = self._folder(curve, place, made)
        needed = self.config.keep_models or not (folder / "evaluation").exists()
        return needed and not (folder / "model").exists()

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
                self.evaluate(evaluate_config(self.config, str(model), str(evaluation)))
        if not self.config.keep_models:
            shutil.rmtree(model, ignore_errors=True)
        return read_report(evaluation)

    def _folder(self, curve: Curve, place: float, made: Made) -> Path:
        """The folder of a candidate's evaluation."""
        key = self.inputs.candidate(curve, place, made)
        return step_folder(self.work, curve.method, *key, *self.inputs.evaluation)

    def _cost_of_precision(self, curve: Curve, made: Made) -> Cost | None:
        """What the precision of the base took; nothing if it has its own, or needs none."""
        if not weighs(self.config, curve.method) or made.precision in (None, self.config.base):
            return Cost(seconds=0.0)
        return read_cost(Path(str(made.precision)))

    def _base_folder(self) -> Path:
        """The folder of the base's evaluation."""
        return step_folder(self.work, "base", self.inputs.base, *self.inputs.evaluation)

    def _must_run(self, folder: Path, step: str, *, redo: bool = False) -> bool:
        needed = redo or not folder.exists()
        self.tell(step if needed else f"{step}: done before")
        return needed


def _refuse_base(config: EvaluateConfig) -> None:
    code = config.trust_remote_code
    refuse_model(config, load_model(config.model, dtype=config.dtype, trust_remote_code=code))


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
