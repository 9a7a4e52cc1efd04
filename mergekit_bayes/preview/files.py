"""Write and read the folder of a preview."""

from pathlib import Path

from mergekit_bayes.checkpoint.replacing import replacing
from mergekit_bayes.documents import read_record
from mergekit_bayes.preview.markdown import PICTURE, as_markdown
from mergekit_bayes.preview.picture import draw
from mergekit_bayes.preview.report import PreviewReport

REPORT, CHOSEN = "preview.json", "chosen.yaml"


def write_preview(folder: Path, report: PreviewReport, recipe: str, *, force: bool) -> None:
    """Write the report, its text and picture, and the recipe of the recommended merge.

    Args:
        folder: The output; it appears under its name only when it is complete.
        report: What was measured.
        recipe: The text of the recipe.
        force: Replace a folder that exists.
    """
    with replacing(folder, force=force) as unfinished:
        unfinished.mkdir()
        (unfinished / REPORT).write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
        (unfinished / CHOSEN).write_text(recipe, encoding="utf-8")
        (unfinished / "report.md").write_text(as_markdown(report), encoding="utf-8")
        draw(report, unfinished / PICTURE)


def read_preview(folder: str | Path) -> PreviewReport:
    """A report as `run_preview` returned it.

    Raises:
        CheckpointError: It cannot be read.
    """
    return read_record(PreviewReport, Path(folder) / REPORT, "Preview again.")
