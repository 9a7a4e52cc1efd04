"""How well a K-prior rebuilds the gradient of the data that the start was trained on.

At the adapted weights theta the gradient of the old data has changed by

    g = N_0 E[ J' (p_theta - p_theta_0) ] = N_0 grad E[ KL(p_theta_0 || p_theta) ]

an expectation over the old observations; for a generalised linear model this is exact, for others
the change of J under the old residuals is left out. The K-prior puts k in its place, the gradient
of W + F. Their relative squared error is |k - g|^2 / |g|^2.

Only means over m groups of held-out examples are known, g_i = g + noise, independent of each other
and of k. Squares of their mean would contain the noise; products of two groups do not:

    U = mean over i != j of g_i . g_j                               E[U] = |g|^2
    D = mean over i != j of (k - g_i) . (k - g_j)                   E[D] = |k - g|^2
      = |k|^2 - 2 k . mean(g_i) + U

D / U is the estimate. It is told where U > V, with V the squared standard error of the groups'
mean: below that the gradient itself is lost in noise.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from mergekit_bayes.adapt.data import Run, batches_of
from mergekit_bayes.adapt.objective import HELD, PARTS
from mergekit_bayes.adapt.teacher import Batch, Teacher, run, scored
from mergekit_bayes.models.encode import Example
from mergekit_bayes.models.estimate import random_examples

_GROUPS = 8  # of held-out examples
MOST = 1024  # of a large memory at most; the rest is taken to be like them


class Reconstruction(NamedTuple):
    """Unbiased estimates of the squares, in nats^2/weight^2.

    Attributes:
        error: D, of |k - g|^2. It may be below 0 where the error is smaller than its noise.
        gradient: U, of |g|^2.
        noise: V, the squared standard error of the mean gradient of the held-out examples.
    """

    error: float
    gradient: float
    noise: float

    @property
    def relative(self) -> float | None:
        """D / U; None where the gradient is below its noise."""
        return self.error / self.gradient if self.gradient > self.noise else None


def measure_reconstruction(
    adaptation: Run, teacher: Teacher, penalty: Callable[[], Tensor] | None
) -> float | None:
    """The relative squared error of a run's K-prior, at the model's present weights.

    A memory of more than 1,024 examples is looked at in part, which adds the part's own noise: the
    estimate is then an upper bound.

    Args:
        adaptation: The run, whose model is adapted now.
        teacher: The start.
        penalty: W of the present weights, with its graph; None without it.

    Returns:
        The error; None without a memory, with fewer than two held-out examples, or where they are
        too few to tell.
    """
    memory, held_out = adaptation.parts.get("memory"), adaptation.held.memory
    if not memory or len(held_out) < 2:
        return None
    seed, units, loaded = adaptation.config.seed, adaptation.units, adaptation.loaded
    chosen = random_examples(_numbered(memory), min(len(memory), MOST), seed)
    shuffled = random_examples(_numbered(held_out), len(held_out), seed)
    count = min(_GROUPS, len(shuffled))
    loaded.model.eval()  # the start's predictions are made without dropout
    with torch.autocast(loaded.device.type, torch.bfloat16, enabled=adaptation.config.bf16):
        return reconstruct(
            loaded.model,
            teacher,
            batches_of(adaptation, chosen, PARTS.index("memory")),
            [batches_of(adaptation, shuffled[i::count], HELD) for i in range(count)],
            memory_weight=units.kappa * units.memory,
            base_weight=units.base,
            penalty=penalty,
        ).relative


def reconstruct(
    model: Module,
    teacher: Teacher,
    memory: Iterable[Batch],
    groups: Sequence[Iterable[Batch]],
    *,
    memory_weight: float,
    base_weight: float,
    penalty: Callable[[], Tensor] | None = None,
) -> Reconstruction:
    """Compare the gradient of W + F with that of held-out groups.

    Three gradients are kept in main memory. Those of the model are cleared.

    Args:
        model: The model, in eval mode.
        teacher: The start.
        memory: Batches of the memory that is trained on.
        groups: At least two groups of batches of held-out examples.
        memory_weight: kappa |M|.
        base_weight: N_0.
        penalty: As in `measure_reconstruction`.
    """
    rebuilt = _gradient(model, teacher, memory, memory_weight, penalty)
    total = [torch.zeros_like(part) for part in rebuilt]
    squares = 0.0
    for group in groups:
        old = _gradient(model, teacher, group, base_weight)
        squares += _product(old, old)
        for part, change in zip(total, old, strict=True):
            part += change
    m = len(groups)
    whole = _product(total, total)
    gradient = (whole - squares) / (m * (m - 1))
    noise = (squares - whole / m) / (m * (m - 1))
    error = _product(rebuilt, rebuilt) - 2 * _product(rebuilt, total) / m + gradient
    return Reconstruction(error, gradient, noise)


def _gradient(
    model: Module,
    teacher: Teacher,
    batches: Iterable[Batch],
    weight: float,
    penalty: Callable[[], Tensor] | None = None,
) -> list[Tensor]:
    """Gradient of weight times the mean divergence of an observation, and of the penalty."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    observations = 0
    for batch in batches:
        logits, _ = scored(run(model, batch), batch["labels"], batch["input_ids"])
        divergence = teacher.divergence(batch, logits)
        observations += len(divergence)
        divergence.sum().backward()  # type: ignore[no-untyped-call]
    factor = weight / max(1, observations)
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad * factor
    if penalty is not None:
        penalty().backward()  # type: ignore[no-untyped-call]
    result = [p.grad.detach().cpu() for p in parameters if p.grad is not None]
    model.zero_grad()
    return result


def _product(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    pairs = zip(a, b, strict=True)
    return sum(float((x.double() * y.double()).sum()) for x, y in pairs)


def _numbered(examples: Sequence[Example]) -> list[Example]:
    """The examples with their places, by which a stored teacher knows them."""
    return [{**example, "index": i} for i, example in enumerate(examples)]
