"""DARE and DELLA against mergekit's: over many draws of their own, and with mergekit's draws.

One small tensor of a base and two tasks is merged with many seeds by mergekit, through its
documented `merge_tensors`, and by the package's rules. mergekit draws the same entries for a method
with and without the election of signs if the seed is the same. What it kept is recovered from the
method without, where each entry shows it, and handed to the package's rules of both.
"""

import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mergekit_expected import Tensor
from mergekit_random import Explained, Share, explain
from mergekit_rules import RANDOM, Array, Inputs, Mask
from numpy.typing import NDArray

from mergekit_bayes.kernels.base import keyed_draws, task_key
from mergekit_bayes.methods.measuring import combine_whole
from mergekit_bayes.methods.recipe_table import RECIPE_METHODS
from mergekit_bayes.methods.tensors import Tensors

SHAPE = (48, 40)
WEIGHTS = (0.6, 0.5)
SETTINGS = {"density": (0.6, 0.8), "epsilon": (0.1, 0.15), "lambda": 1.1}
PLAIN = {"dare_linear": "dare_linear", "dare_ties": "dare_linear"}
PLAIN |= {"della_linear": "della_linear", "della": "della_linear"}

CHILD = """
import sys
import numpy as np, torch
from mergekit.merge_methods import merge_tensors
file, seeds, methods, settings = sys.argv[1], *map(eval, sys.argv[2:])
tensors = [torch.from_numpy(t) for t in np.load(file)["tensors"]]
out = {}
for method in methods:
    given = {k: v for k, v in settings.items() if k != "epsilon" or method.startswith("della")}
    merged = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        merged.append(merge_tensors(tensors, method, parameters=given, base_index=0).numpy())
    out[method] = np.stack(merged)
np.savez(file, **out)
"""


class Draws(NamedTuple):
    """One method over many seeds.

    Attributes:
        method: Its name.
        seeds: How many.
        expected: Share of the visible changes that is kept by the method's probabilities.
        shares: That of bmerge and of mergekit, each with its standard deviations from `expected`.
        mean: Root mean square, over entries, of the difference of both means over its standard
            error; 1 if the means are the same.
        variance: bmerge's variance over mergekit's, summed over entries.
        same_draws: Largest difference with the same draws, in roundings.
    """

    method: str
    seeds: int
    expected: float
    shares: tuple[tuple[float, float], tuple[float, float]]
    mean: float
    variance: float
    same_draws: float

    @property
    def is_same(self) -> bool:
        """Whether both methods are the same as far as can be told."""
        deviations = max(abs(d) for _, d in self.shares)
        return (
            deviations < 4.5
            and abs(self.mean - 1) < 0.1
            and abs(self.variance - 1) < 0.05
            and self.same_draws <= 16
        )


def tensors() -> list[NDArray[np.float32]]:
    """A base and two tasks, which have each changed a part of the entries."""
    rng = np.random.default_rng(5)
    base = 0.05 * rng.standard_normal(SHAPE, np.float32)
    result = [base]
    for _ in WEIGHTS:
        change = 0.02 * rng.standard_normal(SHAPE, np.float32)
        result.append(base + change * (rng.random(SHAPE) > 0.25))
    return result


def compare_draws(python: Path, seeds: int) -> list[Draws]:
    """All random methods over a number of seeds.

    Args:
        python: The interpreter of mergekit's environment.
        seeds: How many.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "draws.npz"
        np.savez(file, tensors=np.stack(tensors()))
        settings = {k: list(v) if isinstance(v, tuple) else v for k, v in SETTINGS.items()}
        settings["weight"] = list(WEIGHTS)
        arguments = [str(file), str(seeds), repr(RANDOM), repr(settings)]
        subprocess.run([python, "-c", CHILD, *arguments], check=True, capture_output=True)
        with np.load(file) as found:
            theirs = {method: found[method] for method in RANDOM}
    return [_compare(method, theirs) for method in RANDOM]


def _compare(method: str, theirs: dict[str, Array]) -> Draws:
    seeds = len(theirs[method])
    ours = np.stack([_ours(method, _own_draws(seed)) for seed in range(seeds)])
    shares = [_share(method, outputs) for outputs in (ours, theirs[method])]
    pair = [o.astype(np.float64) for o in (ours, theirs[method])]
    variances = [p.var(axis=0, ddof=1) for p in pair]
    varies = sum(variances) > 1e-12
    error = np.sqrt(sum(variances)[varies] / seeds)
    scores = (pair[0].mean(axis=0) - pair[1].mean(axis=0))[varies] / error
    same = 0.0
    for seed in range(seeds):
        plain = explain(_tensor(PLAIN[method]), theirs[PLAIN[method]][seed].astype(np.float64))
        assert plain is not None
        merged = _ours(method, _given_draws(plain))
        same = max(same, float(np.abs(merged - theirs[method][seed]).max()))
    scale = float(np.abs(theirs[method]).max())
    first, second = ((s.kept / s.entries, s.deviations) for s in shares)
    return Draws(
        method,
        seeds,
        shares[0].expected / shares[0].entries,
        (first, second),
        float(np.sqrt(np.mean(scores**2))),
        float(variances[0].sum() / variances[1].sum()),
        same / scale / 2.0**-24,
    )


def _tensor(method: str) -> Tensor:
    """The tensor for the restatement in float64."""
    base, *tasks = (t.astype(np.float64) for t in tensors())
    settings: dict[str, Any] = {
        k: list(v) if isinstance(v, tuple) else v for k, v in SETTINGS.items()
    }
    return Tensor(method, Inputs(base, tasks, settings | {"weight": list(WEIGHTS)}))


def _share(method: str, outputs: Array) -> Share:
    share = Share()
    for output in outputs:
        draws = explain(_tensor(method), output.astype(np.float64))
        assert draws is not None
        share = share.add(draws)
    return share


def _ours(method: str, draws: Callable[[int], Array]) -> Array:
    """The package's rule."""
    rule = RECIPE_METHODS[method]
    assert rule.tensor is not None
    settings = {p.name: p.default for p in rule.parameters} | SETTINGS
    base, *tasks = tensors()
    given = Tensors(base, tuple(tasks), WEIGHTS, settings, None, draws)
    return combine_whole(rule.tensor, given)


def _own_draws(seed: int) -> Callable[[int], Array]:
    size = SHAPE[0] * SHAPE[1]
    return lambda t: keyed_draws(task_key(seed, "tensor", str(t)), 0, size).reshape(SHAPE)


def _given_draws(draws: Explained) -> Callable[[int], Array]:
    """Numbers below every probability where an entry was kept, and above all elsewhere."""
    masks: list[Mask] = draws.kept
    return lambda t: np.where(masks[t], np.float32(0), np.float32(1 - 2.0**-24))


def draws_table(rows: list[Draws]) -> str:
    """The rows as a table in Markdown."""
    lines = [
        "| method | seeds | kept: expected | bmerge | mergekit | difference of means "
        "| variance | same draws | verdict |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        cells = [row.method, str(row.seeds), f"{row.expected:.4f}"]
        cells += [f"{share:.4f} ({deviations:+.1f})" for share, deviations in row.shares]
        cells += [f"{row.mean:.3f}", f"{row.variance:.3f}", f"{row.same_draws:.2f}"]
        lines.append(f"| {' | '.join([*cells, 'same' if row.is_same else 'differs'])} |")
    return "\n".join(lines)
