"""Put the finished output in place under its final names."""

import os
from pathlib import Path

from mergekit_bayes.checkpoint.layout import precision_path
from mergekit_bayes.checkpoint.replacing import sync_path
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.merge.partial import Partial
from mergekit_bayes.plan import MergePlan, recipe_path, report_path


def refuse_existing(plan: MergePlan) -> None:
    """Raise `CheckpointError` if a final name is taken, by now, and not to be replaced."""
    for path in () if plan.config.force else reversed(_final_names(plan)):
        if path.exists():
            raise CheckpointError(
                f"'{path}' exists. Choose another -o, or pass --force to replace it."
            )


def publish(plan: MergePlan, partial: Partial, *, sync: bool) -> None:
    """Give the output its final name: until the last rename that name is missing, or what it was
    before.

    Called again after a kill, it goes on where it stopped.
    """
    target = plan.target
    if not any(
        path.exists()
        for path in (target, partial.out / target.name if plan.to_file else partial.out)
    ):
        raise CheckpointError(
            f"{partial.folder}: the whole output that was there is gone. Remove the folder to "
            "begin anew."
        )
    try:
        if not partial.is_publishing:
            for path in (partial.out, *sorted(partial.out.rglob("*"))) if sync else ():
                sync_path(path)
            partial.publish(sync=sync)
        if plan.to_file:
            if plan.info is None:
                precision_path(target).unlink(missing_ok=True)  # of the file that --force replaces
            for final in _final_names(plan):
                if (partial.out / final.name).exists():
                    os.replace(partial.out / final.name, final)
        elif partial.out.exists():
            if os.path.lexists(target):
                os.rename(target, partial.replaced)
            os.rename(partial.out, target)
        if sync:
            sync_path(target.absolute().parent)
    except OSError as error:
        raise CheckpointError(f"{target}: writing failed ({error.strerror or error}).") from error


def _final_names(plan: MergePlan) -> tuple[Path, ...]:
    """In the order in which they are given: the model itself last."""
    target = plan.target
    if not plan.to_file:
        return (target,)
    return report_path(target), recipe_path(target), precision_path(target), target
