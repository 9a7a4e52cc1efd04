"""Give the finished output its final name."""

import os
from pathlib import Path

from mergekit_bayes.checkpoint.layout import old_precision_path, precision_path
from mergekit_bayes.checkpoint.replacing import sync_path
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.merge.partial import Partial
from mergekit_bayes.plan import MergePlan, recipe_path, report_path


def refuse_existing(plan: MergePlan) -> None:
    """Check that no final name has been taken meanwhile, unless it is to be replaced.

    Raises:
        CheckpointError: A file or folder of that name exists.
    """
    if plan.config.force:
        return
    for path in reversed(_final_names(plan)):
        if path.exists():
            raise CheckpointError(
                f"'{path}' exists. Choose another -o, or pass --force to replace it."
            )


def publish(plan: MergePlan, partial: Partial, *, sync: bool) -> None:
    """Give the output its final name.

    Until the last rename that name is missing, or it is what it was before. A second call after a
    kill continues where the first one stopped.

    Args:
        plan: The merge.
        partial: The folder with the complete output.
        sync: Whether to wait for the disk.

    Raises:
        CheckpointError: The output is gone, or a rename failed.
    """
    target = plan.target
    complete = partial.out / target.name if plan.to_file else partial.out
    if not (target.exists() or complete.exists()):
        raise CheckpointError(
            f"{partial.folder}: the complete output that was in it is gone. Remove the folder to "
            "start again."
        )
    try:
        if not partial.is_publishing:
            if sync:
                for path in (partial.out, *sorted(partial.out.rglob("*"))):
                    sync_path(path)
            partial.publish(sync=sync)
        if plan.to_file:
            _publish_files(plan, partial)
        elif partial.out.exists():
            if os.path.lexists(target):
                os.rename(target, partial.replaced)
            os.rename(partial.out, target)
        if sync:
            sync_path(target.absolute().parent)
    except OSError as error:
        raise CheckpointError(f"{target}: writing failed ({error.strerror or error}).") from error


def _publish_files(plan: MergePlan, partial: Partial) -> None:
    if plan.info is None:
        precision_path(plan.target).unlink(missing_ok=True)  # that of the file which is replaced
    old_precision_path(plan.target).unlink(missing_ok=True)
    for final in _final_names(plan):
        if (partial.out / final.name).exists():
            os.replace(partial.out / final.name, final)


def _final_names(plan: MergePlan) -> tuple[Path, ...]:
    """The names in the order in which they are given: the model itself last."""
    target = plan.target
    if not plan.to_file:
        return (target,)
    return report_path(target), recipe_path(target), precision_path(target), target
