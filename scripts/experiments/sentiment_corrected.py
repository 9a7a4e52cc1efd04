"""Corrections of the experiment on addition: a few steps on a few rows of each task after a merge.

`bmerge merge --then adapt.yaml`: the merge is adapted to the first rows of the training text of all
tasks, with the precision that the merge wrote as the prior of its weights or with no prior. The
same steps from the base and from merges without a precision are its controls.
"""

import shutil
from pathlib import Path
from typing import NamedTuple

from sentiment_columns import COLUMNS, UNTUNED, Column
from sentiment_world import JSON, ROWS, Step, World, read_text, write_rows

from mergekit_bayes.adapt.run import run_adapt
from mergekit_bayes.adapt.settings import AdaptConfig
from mergekit_bayes.merge import run_merge

EACH = 64  # rows of a task


class Correction(NamedTuple):
    """A way of correcting.

    Attributes:
        name: Of its files.
        label: In tables.
        column: The way of merging that it starts from, untuned; None for the base.
        prior: Of its weights, as `bmerge adapt` names it.
    """

    name: str
    label: str
    column: str | None
    prior: str = "none"

    @property
    def start(self) -> Column | None:
        """The way of merging."""
        return next((c for c in COLUMNS if c.name == self.column), None)

    def step(self, world: World, seed: int) -> Step:
        """The corrected model of a seed."""
        size, start = world.size, self.start
        base = world.base(seed)
        made = () if start is None else start.steps(world, seed)
        settings: JSON = {
            "max_steps": size.correction_steps,
            "max_length": size.tokens,
            "seed": seed,
            "prior": self.prior,
            "posterior": "none",
        }
        merge = None if start is None else start.config(world, seed, UNTUNED)

        def make(folder: Path) -> None:
            model = base.model
            rows = [row for task in size.tasks for row in read_text(task, "train", EACH)]
            write_rows(folder / ROWS, rows)
            if merge is not None:
                model = folder / "merge"
                run_merge(
                    merge.model_copy(update={"out": str(model), "posterior": True}), threads=1
                )
            config = {"model": str(model), "output": str(folder / "model")}
            config |= {"add": str(folder / ROWS), **settings}
            run_adapt(AdaptConfig.model_validate(config), quiet=True)
            if merge is not None:
                shutil.rmtree(model)

        what = None if start is None else [start.method, dict(start.settings), start.constant]
        return Step(
            world.work,
            f"{self.name}-{seed}",
            settings | {"tasks": size.tasks, "each": EACH, "start": what},
            make,
            (base, *made),
        )


CORRECTIONS = (
    Correction("base_50", "base", None),
    Correction("average_50", "average", "average"),
    Correction("tsv_m_50", "TSV-M", "tsv_m"),
    Correction("regmean_50", "RegMean", "regmean"),
    Correction("gm_inputs_50", "gradient matching, input covariance", "gm_inputs"),
    Correction("gm_50", "gradient matching, root-GGN", "gm"),
    Correction("gm_50_prior", "gradient matching, root-GGN, as prior", "gm", "stored"),
    Correction("gm_tensor_50_prior", "control: per tensor, as prior", "gm_tensor", "stored"),
)
