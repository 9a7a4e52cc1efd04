"""What a merge misses, and whether its loss tells: gradients at the merge and at the specialists.

With g_t the mean gradient of task t's loss on rows that it was trained on,

    mismatch_t        = | g_t(merge) - g_t(specialist) |
    curvature error_t = | g_t(merge) - g_t(specialist) - H_t (merge - specialist) |

and H_t the specialist's root-GGN of one observation. A merge of exact quadratics has no curvature
error, and its distance from joint training is what the mismatches leave (Daheim et al., ICLR 2024).
"""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from sentiment_columns import Column
from sentiment_looks import Name, Place, Target, Tensors, load, nll, opened, parameters
from sentiment_predicted import FEWEST
from sentiment_resampled import Resampled
from sentiment_world import ROWS, World, read_rows

from mergekit_bayes.correlation import rank_correlation
from mergekit_bayes.models.load import Loaded

EXAMPLES = 64  # rows of a task
BATCH = 8


class Errors:
    """Measures merges of one seed against its specialists.

    Args:
        world: The experiment.
        seed: Of the models.
        target: The specialists and their curvatures.
    """

    def __init__(self, world: World, seed: int, target: Target) -> None:
        self._world, self._seed, self._target = world, seed, target

    @cached_property
    def _own(self) -> dict[str, Tensors]:
        models = {
            task: self._world.tuned(task, self._seed).model for task in self._world.size.tasks
        }
        return {task: gradient(self._world, opened(m), task) for task, m in models.items()}

    def of(self, loaded: Loaded) -> dict[str, Any]:
        """Mismatch and curvature error of each task, (2,), at a merge in memory."""
        merge, found = parameters(loaded), {}
        for task, own in self._own.items():
            specialist, curvature = self._target.specialists[task], self._target.curvatures[task]
            moved = gradient(self._world, loaded, task)
            mismatch = curved = 0.0
            for name, at_merge in moved.items():
                lacks = (at_merge - own[name]).double()
                told = curvature[name] * (merge[name] - specialist[name])
                mismatch += float(lacks.square().sum())
                curved += float((lacks - told).square().sum())
            found[f"errors {task}"] = np.sqrt([mismatch, curved])
        return found


def gradient(world: World, loaded: Loaded, task: str) -> Tensors:
    """The mean gradient of a task's loss on rows that it was trained on."""
    rows = read_rows(world.text(task).done().folder / ROWS)[:EXAMPLES]
    model = loaded.model
    model.eval().requires_grad_()
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for first in range(0, len(rows), BATCH):
        chosen = rows[first : first + BATCH]
        batch = loaded.tokenizer(
            [row["text"] for row in chosen],
            truncation=True,
            max_length=world.size.tokens,
            padding=True,
            return_tensors="pt",
        )
        labels = torch.tensor([row["label"] for row in chosen])
        loss = torch.nn.functional.cross_entropy(
            model(**batch).logits.float(), labels, reduction="sum"
        )
        named = dict(model.named_parameters())
        for name, grad in zip(
            named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True
        ):
            if grad is not None:
                total[name] += grad
    return {name: whole / len(rows) for name, whole in total.items()}


def error_table(found: Resampled) -> str:
    """How well mismatch and curvature error tell the rise of each task's loss, over untuned merges.

    Tasks are never pooled; a number is the mean over seeds.
    """
    world = found.world
    lines = ["| task | merges | mismatch | curvature error |", "| --- " * 4 + "|"]
    for task in world.size.tasks:
        results, counts = [], []
        for seed in world.size.seeds:
            chosen = [
                (*load(file)[f"errors {task}"], float(nll(found.looks[name][seed], task).mean()))
                for name, column in _untuned(found, seed)
                if (file := Place.of(world, column, seed).errors).exists()
            ]
            if len(chosen) >= FEWEST:
                mismatch, curved, nats = np.array(chosen).T
                results.append([rank_correlation(x, nats) for x in (mismatch, curved)])
                counts.append(len(chosen))
        if results:
            means = (f"{x:.2f}" for x in np.mean(np.array(results, np.float64), axis=0))
            lines.append(f"| {' | '.join([task, ', '.join(map(str, counts)), *means])} |")
    return "\n".join(lines)


def _untuned(found: Resampled, seed: int) -> Iterator[tuple[Name, Column]]:
    """The ways of merging AdamW's models that were tested in a seed."""
    for column in found.columns.values():
        name = Name(column.name)
        if column.optimizer == "adamw" and seed in found.looks.get(name, {}):
            yield name, column
