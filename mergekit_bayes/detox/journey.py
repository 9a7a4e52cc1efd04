"""The journey itself: the verbs in order, each done once, and the report of it."""

import json
import platform
import shlex
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from mergekit_bayes.checkpoint.replacing import replacing
from mergekit_bayes.detox.analysis import findings, match
from mergekit_bayes.detox.picture import draw
from mergekit_bayes.detox.report import DetoxReport, Point, as_markdown
from mergekit_bayes.detox.settings import (
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
    model_identity,
    precision_identity,
    step_folder,
    without,
)
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.evaluate.files import read_report
from mergekit_bayes.evaluate.report import EvaluateReport
from mergekit_bayes.evaluate.run import run_evaluate
from mergekit_bayes.evaluate.scorers import open_scorer
from mergekit_bayes.finetune.run import run_finetune
from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.posterior import open_posterior
from mergekit_bayes.precision.run import run_precision

Tell = Callable[[str], None]
_LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "safetensors")
_NOT_IN_KEY = ("model", "output", "force", "batch_size", "sampling_batch")


def run_detox(
    config: DetoxConfig, *, quiet: bool = False, progress: Tell | None = None
) -> DetoxReport:
    """Carry out a removal and write `report.json`, `report.md` and `toxicity_vs_perplexity.png`.

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
    found: dict[str, list[EvaluateReport]] = {}
    points: dict[str, list[Point]] = {}
    for curve in journey.curves:
        for scale in config.scales:
            measured, point = journey.candidate(curve, scale, toxic, precision)
            found.setdefault(curve.label, []).append(measured)
            points.setdefault(curve.label, []).append(point)
    matched, compared = match(journey.curves, base, found, config.levels, config.held_out_rises)
    report = DetoxReport(
        path=config.output,
        settings=config.model_dump(mode="json", exclude={"force"}),
        versions={name: version(name) for name in _LIBRARIES}
        | {"python": platform.python_version()},
        identities=journey.identities,
        toxic_model=str(toxic),
        base_precision=precision,
        scorers={name: info.model_dump() for name, info in base.scorers.items()},
        base=_point(base, 0.0),
        curves={label: tuple(p) for label, p in points.items()},
        matched=tuple(matched),
        comparisons=tuple(compared),
        findings=tuple(findings(compared)),
    )
    _write(Path(config.output), config, report)
    return report


class _Journey:
    """The steps of one removal. Nothing heavy happens before everything that was named has been
    looked at.
    """

    def __init__(self, config: DetoxConfig, quiet: bool, tell: Tell) -> None:
        self.config, self.quiet, self.tell = config, quiet, tell
        output = Path(config.output)
        if output.exists() and any(output.iterdir()) and not (output / "detox.yaml").exists():
            raise CheckpointError(
                f"'{output}' exists and is no output of detox. Choose another output."
            )
        self.curves = curves(config)
        self.work = output / "steps"
        finetune = finetune_config(config, "")
        evaluate = evaluate_config(config, config.base, "")
        self.base = model_identity(config.base)
        self.identities: dict[str, Any] = {
            "base": self.base,
            "toxic": data_identity(config.toxic.data),
            "texts": {name: data_identity(ref) for name, ref in evaluate.perplexity.items()},
            "prompts": data_identity(evaluate.toxicity or ""),
        }
        self.scorers = {spec: open_scorer(spec).info.fingerprint for spec in evaluate.scorer}
        self.finetune_key = [
            without(finetune.model_dump(mode="json"), "output", "force", "model"),
            self.base,
            self.identities["toxic"],
        ]
        self.evaluate_key = [
            without(evaluate.model_dump(mode="json"), *_NOT_IN_KEY),
            self.identities["texts"],
            self.identities["prompts"],
            self.scorers,
        ]
        if needs_precision(config):
            settings = precision_config(config, "")
            self.identities["precision"] = data_identity(settings.data)
        if config.force and (output / "detox.yaml").exists():
            shutil.rmtree(self.work, ignore_errors=True)
        output.mkdir(parents=True, exist_ok=True)
        settings_text = yaml.safe_dump(
            config.model_dump(mode="json", exclude={"force"}), sort_keys=False
        )
        (output / "detox.yaml").write_text(settings_text)

    def finetune(self) -> Path:
        """The model fine-tuned on the toxic text."""
        folder = step_folder(self.work, "toxic", *self.finetune_key)
        if self._do(folder, "fine-tune on the toxic text"):
            run_finetune(finetune_config(self.config, str(folder)), quiet=self.quiet)
        return folder

    def precision(self, toxic: Path) -> str | None:
        """Where the base's precision lies; None where no method needs it."""
        if not needs_precision(self.config):
            return None
        if self.config.reuse_precision and self._has_own(toxic):
            self.tell("precision of the base: its own")
            return str(self.config.base)
        settings = precision_config(self.config, "").model_dump(mode="json")
        folder = step_folder(
            self.work,
            "precision",
            without(settings, "model", "output", "force"),
            self.base,
            self.identities["precision"],
        )
        if self._do(folder, "precision of the base"):
            run_precision(precision_config(self.config, str(folder)), quiet=self.quiet)
        return str(folder)

    def evaluate_base(self) -> EvaluateReport:
        folder = step_folder(self.work, "base", self.base, *self.evaluate_key)
        if self._do(folder, "evaluate the base"):
            run_evaluate(
                evaluate_config(self.config, self.config.base, str(folder)), quiet=self.quiet
            )
        return read_report(folder)

    def candidate(
        self, curve: Curve, scale: float, toxic: Path, precision: str | None
    ) -> tuple[EvaluateReport, Point]:
        """Merge, evaluate, and unless told to keep it, delete the model again."""
        merge = self._merge(curve, scale, toxic, precision)
        key: list[Any] = [
            without(merge.model_dump(mode="json"), "models", "base", "precision", "observations"),
            curve.base_count,
            self.finetune_key,
        ]
        if merge.weights == "precision" and precision is not None:
            key.append(precision_identity(precision))
        folder = step_folder(self.work, curve.method, *key, *self.evaluate_key)
        model, evaluation, merge_report = (
            folder / "model",
            folder / "evaluation",
            folder / "merge_report.json",
        )
        wanted = self.config.keep_models and not model.exists()
        if self._do(evaluation, f"{curve.label}, scale -{scale:g}", redo=wanted):
            if not model.exists():
                run_merge(merge.model_copy(update={"out": str(model)}))
                shutil.copyfile(model / "merge_report.json", merge_report)
            if not evaluation.exists():
                run_evaluate(
                    evaluate_config(self.config, str(model), str(evaluation)), quiet=self.quiet
                )
        if not self.config.keep_models:
            shutil.rmtree(model, ignore_errors=True)
        report, merged = read_report(evaluation), json.loads(merge_report.read_text())
        return report, _point(report, scale, merged, _command(merge))

    def _merge(self, curve: Curve, scale: float, toxic: Path, precision: str | None) -> MergeConfig:
        common: dict[str, Any] = {
            "models": (str(toxic),),
            "base": self.config.base,
            "scale": (-scale,),
            "posterior": False,
        }
        if curve.method == "task_arithmetic":
            return MergeConfig(**common)
        return MergeConfig(
            **common,
            weights="precision",
            anchor=self.config.anchor,
            guard=self.config.guard,
            shrink=curve.shrink,
            pool="tensor" if curve.method == "control" else None,
            observations={self.config.base: f"{curve.base_count:g}x"},
            precision={}
            if precision in (None, self.config.base)
            else {self.config.base: str(precision)},
        )

    def _has_own(self, toxic: Path) -> bool:
        own, other = open_posterior(self.config.base), open_posterior(str(toxic))
        try:
            return (
                own.info is not None
                and other.info is not None
                and (own.info.estimator, own.info.unit) == (other.info.estimator, other.info.unit)
                and own.info.mean is not None
                and own.info.mean.blocks == self.base["weights"]
            )
        finally:
            own.close()
            other.close()

    def _do(self, folder: Path, what: str, *, redo: bool = False) -> bool:
        needed = redo or not folder.exists()
        self.tell(what if needed else f"{what}: done before")
        return needed


def _command(merge: MergeConfig) -> str:
    """The `bmerge merge` line that makes a candidate."""
    words = [
        "bmerge",
        "merge",
        *merge.models,
        "--base",
        str(merge.base),
        "--weights",
        merge.weights,
    ]
    words += ["--scale", f"{merge.scale[0]:g}"]
    if merge.weights == "precision":
        words += ["--anchor", merge.anchor, "--guard", f"{merge.guard:g}"]
        words += ["--shrink", merge.shrink] if merge.shrink is not None else []
        words += ["--pool", merge.pool] if merge.pool is not None else []
        for flag, given in (
            ("--observations", merge.observations),
            ("--precision", merge.precision),
        ):
            for model, value in given.items():
                words += [flag, f"{model}={value}"]
    return shlex.join([*words, "--no-posterior"])


def _point(
    report: EvaluateReport, scale: float, merged: Any = None, command: str | None = None
) -> Point:
    task: dict[str, Any] = (
        next((m for m in merged["models"] if m["role"] == "task"), {}) if merged else {}
    )
    return Point(
        scale=scale,
        toxicity=report.toxicity,
        perplexity=report.perplexity,
        samples=report.samples,
        guarded_share=merged["guarded_share"] if merged else None,
        largest_multiplier=merged["largest_multiplier"] if merged else None,
        precision_ratio=task.get("ratio"),
        command=command,
    )


def _write(folder: Path, config: DetoxConfig, report: DetoxReport) -> None:
    for name, write in (
        ("toxicity_vs_perplexity.png", lambda path: draw(report, path)),
        ("report.md", lambda path: path.write_text(as_markdown(report))),
        ("report.json", lambda path: path.write_text(report.model_dump_json(indent=2) + "\n")),
    ):
        with replacing(folder / name, force=True) as partial:
            write(partial)
