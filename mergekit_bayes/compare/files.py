"""Write and read the folder of models side by side."""

from collections.abc import Sequence
from pathlib import Path

from mergekit_bayes.checkpoint.replacing import replacing
from mergekit_bayes.compare.differences import Measured
from mergekit_bayes.compare.labels import folder_of, labels_of
from mergekit_bayes.compare.markdown import PICTURE, as_markdown
from mergekit_bayes.compare.picture import draw
from mergekit_bayes.compare.report import CompareReport, Evaluated
from mergekit_bayes.documents import read_mapping, read_record
from mergekit_bayes.evaluate.files import read_report, write_files
from mergekit_bayes.evaluate.report import EvaluateReport

_REPORT = "report.json"
_AGAIN = "Remove the folder, and measure again."


def write_compare(
    folder: Path, report: CompareReport, measured: Sequence[Measured], *, force: bool
) -> None:
    """Write the files of all evaluations, the report, its text and its picture.

    One model as it is has the files of its evaluation in the folder itself; of several each has a
    folder of its own, by its label, and `report.json` is the `CompareReport`.

    Args:
        folder: The output; it appears under its name only when it is complete.
        report: What was measured.
        measured: The evaluations of the report.
        force: Replace a folder that exists.
    """
    with replacing(folder, force=force) as unfinished:
        if is_alone(report.evaluations):
            write_files(unfinished, *measured[0].evaluation)
        else:
            unfinished.mkdir()
            for one in measured:
                write_files(unfinished / folder_of(one.evaluated.label), *one.evaluation)
            (unfinished / _REPORT).write_text(report.model_dump_json(indent=2) + "\n")
        (unfinished / "report.md").write_text(as_markdown(report), encoding="utf-8")
        draw(report, unfinished / PICTURE)


def read_compare(folder: str | Path) -> CompareReport:
    """A report as `run_compare` returned it, with the numbers that its JSON leaves out.

    Raises:
        CheckpointError: A file of the folder cannot be read.
    """
    folder = Path(folder)
    if "evaluations" not in read_mapping(folder / _REPORT, _AGAIN):
        return of_one(read_report(folder))
    report = read_record(CompareReport, folder / _REPORT, _AGAIN)
    evaluations = tuple(
        one.model_copy(update={"report": read_report(folder / folder_of(one.label))})
        for one in report.evaluations
    )
    return report.model_copy(update={"evaluations": evaluations})


def of_one(report: EvaluateReport) -> CompareReport:
    """The evaluation of one model as it is; the settings are those of the evaluation."""
    (label,) = labels_of([report.model])
    one = Evaluated(label=label, model=report.model, variant=report.variant, report=report)
    return CompareReport(
        version=report.version, settings=report.settings, evaluations=(one,), path=report.path
    )


def is_alone(evaluations: Sequence[Evaluated]) -> bool:
    """Whether this is the evaluation of one model as it is."""
    return len(evaluations) == 1
