"""Several runs of each task in the experiment on addition: as mixtures, and all by name.

The runs of a task start from one base and see its rows in other orders. As a mixture
(`bmerge mix`) they count as one task, of which a merge weighs the runs in each tensor; by name each
has an equal share of the task's scale.
"""

import shutil
from pathlib import Path
from typing import NamedTuple

from sentiment_world import BASE, Step, World

from mergekit_bayes.merge import run_merge
from mergekit_bayes.mix import MixConfig, run_mix
from mergekit_bayes.plan import MergeConfig

RUNS = 2


class Mixed(NamedTuple):
    """A way of merging several runs of each task.

    Attributes:
        name: Of its files.
        label: In tables.
        is_mixture: Whether those of a task are one posterior.
    """

    name: str
    label: str
    is_mixture: bool

    def step(self, world: World, seed: int) -> Step:
        """The merge of a seed."""
        base = world.base(seed)
        of_base = world.precision(base, BASE, "ggn", seed)
        runs = {task: _runs(world, task, seed) for task in world.size.tasks}

        def make(folder: Path) -> None:
            models: list[str] = []
            for task, pairs in runs.items():
                copies = [folder / f"{task}-{k}" for k in range(len(pairs))]
                for copy, (model, precision) in zip(copies, pairs, strict=True):
                    shutil.copytree(model.model, copy)
                    shutil.copytree(precision.precision, copy / "posterior")
                if self.is_mixture:
                    out = str(folder / task)
                    run_mix(MixConfig(runs=tuple(map(str, copies)), out=out))
                    models.append(out)
                else:
                    models += map(str, copies)
            settings = {
                "models": tuple(models),
                "base": str(base.model),
                "weights": "precision",
                "scale": (1.0 if self.is_mixture else 1 / RUNS,),
                "precision": {str(base.model): str(of_base.precision)},
                "posterior": False,
                "out": str(folder / "model"),
            }
            run_merge(MergeConfig.model_validate(settings), threads=1)
            for made in folder.iterdir():
                if made.is_dir() and made.name != "model":
                    shutil.rmtree(made)

        needs = (base, of_base, *(step for pairs in runs.values() for p in pairs for step in p))
        settings = {"mixture": self.is_mixture, "runs": RUNS}
        return Step(world.work, f"{self.name}-{seed}", settings, make, needs)


def _runs(world: World, task: str, seed: int) -> list[tuple[Step, Step]]:
    """The runs of a task, each with its precision; the first is the one that all columns have."""
    models = [world.tuned(task, seed, run=run) for run in range(RUNS)]
    return [(model, world.precision(model, task, "ggn", seed)) for model in models]


MIXED = (
    Mixed("mixture", "gradient matching, mixtures", is_mixture=True),
    Mixed("named", "gradient matching, all runs by name", is_mixture=False),
)
