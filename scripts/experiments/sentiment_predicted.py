"""How well a merge's predicted increase of each task's loss tells the real one.

The prediction is that of `bmerge merge --predict`, `d' H d / 2` in nats an observation with the
task's own root-GGN H, at d = merge - specialist, and g = 0, since AdamW's runs record no pull. The
real increase is that of the loss on test rows. Tasks are never pooled.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from sentiment_looks import Name, mean_nll
from sentiment_resampled import Resampled

from mergekit_bayes.correlation import rank_correlation
from mergekit_bayes.records import FloatArray

FEWEST = 4  # merges that a correlation is of


class Pair(NamedTuple):
    """One merge and task.

    Attributes:
        predicted: Nats an observation.
        real: Nats an observation.
        trusted: Whether the merge is no farther from the specialist than the base is, in H's norm.
    """

    predicted: float
    real: float
    trusted: bool


def pairs(found: Resampled, task: str, seed: int) -> Iterator[Pair]:
    """Every merge of AdamW's models that was tested, each scale once."""
    specialists = found.looks.get(Name("specialists"), {})
    if seed not in specialists:
        return
    own = mean_nll(specialists[seed], task)
    seen = set()
    for name, looks in found.looks.items():
        column = found.columns.get(name.column)
        if column is None or column.optimizer != "adamw" or seed not in looks:
            continue
        at = (name.column, found.scales[name][seed])
        if at not in seen:
            seen.add(at)
            moved, reach = (float(x) for x in looks[seed][f"predicted {task}"])
            yield Pair(moved, mean_nll(looks[seed], task) - own, moved <= reach)


def agreement(chosen: list[Pair]) -> tuple[float, float, float, float] | None:
    """How well the predictions of several merges tell the real increases.

    Returns:
        Rank correlation, `R2 = 1 - sum (real - predicted)^2 / sum (real - mean)^2`, that of the
        best line, and the median of `real / predicted`; None for few merges, or where all are
        alike.
    """
    if len(chosen) < FEWEST:
        return None
    predicted: FloatArray = np.array([pair.predicted for pair in chosen])
    real: FloatArray = np.array([pair.real for pair in chosen])
    rank = rank_correlation(predicted, real)
    if rank is None:
        return None
    spread = ((real - real.mean()) ** 2).sum()
    line = float(np.corrcoef(predicted, real)[0, 1]) ** 2
    ratio = float(np.median(real / predicted))
    return rank, float(1 - ((real - predicted) ** 2).sum() / spread), line, ratio


def prediction_table(found: Resampled) -> str:
    """The agreement within each task and seed, the mean over seeds."""
    columns = " | rank | R2 | R2, line | ratio"
    lines = [
        "Rank correlation, R2 of the numbers themselves and of the best line, and the median of "
        "real over predicted: over all merges that were tested, and over those that are nearer to "
        "the specialist than the base is.\n",
        "| task | merges" + columns + " | trusted" + columns + " |",
        "| --- " * 11 + "|",
    ]
    for task in found.world.size.tasks:
        cells = [task]
        for only in (False, True):
            results, counts = [], []
            for seed in found.world.size.seeds:
                chosen = [p for p in pairs(found, task, seed) if p.trusted or not only]
                counts.append(len(chosen))
                if (one := agreement(chosen)) is not None:
                    results.append(one)
            cells.append(", ".join(map(str, counts)))
            if results:
                *shares, ratio = np.mean(results, axis=0)
                cells += [*(f"{x:.2f}" for x in shares), f"{ratio:.3g}"]
            else:
                cells += [""] * 4
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
