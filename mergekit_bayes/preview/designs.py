"""Which scales are previewed: those that are given, and those of a grid."""

import math
from collections.abc import Iterator, Sequence
from itertools import product

from mergekit_bayes.errors import ConfigError
from mergekit_bayes.methods.base import Method
from mergekit_bayes.plan import MergeConfig
from mergekit_bayes.plan.options import check_options, choose_method, parse_scales
from mergekit_bayes.plan.rescale import with_scales
from mergekit_bayes.preview.settings import Design, Origin, PreviewConfig, Vector

_MOST = 10_000  # vectors; a grid of more is a mistake
_DIGITS = 6  # of a share, in which two merges are one

Named = dict[Vector, Origin]  # each vector once, in the order in which it is previewed


def vectors_of(config: PreviewConfig, recipe: MergeConfig) -> Named:
    """The vectors to preview, the recipe's own first; each was checked as a merge checks it.

    Those of an average are shares, and sum to 1: (1, 1) and (2, 2) are one merge, (0.5, 0.5). Where
    rules give some tensors scales of their own, which are compared with these, they stay as given.

    Args:
        config: What to preview.
        recipe: The merge.

    Raises:
        ConfigError: A vector that no such merge could have, a grid without any, or one too many.
    """
    method, _ = choose_method(recipe)
    own, rules = parse_scales(recipe)
    if not method.takes_scales:
        raise ConfigError(
            f"{config.recipe}: {method.name} takes no scales, so that there is one merge only. "
            "Merge, and evaluate the result."
        )
    if config.design is not None and not config.grid:
        raise ConfigError("--design says what is made of the values of --grid, which has none.")
    asked: Named = {own: "recipe"}
    for given in config.scales:
        asked.setdefault(_full(given, len(own)), "scales")
    for vector in _of_grid(config, method, own):
        asked.setdefault(vector, "grid")
        if len(asked) > _MOST:
            raise ConfigError(
                f"--grid: this design has more than {_MOST:,} combinations. Give fewer values, or "
                "let --search N choose."
            )
    for vector in asked:
        check_options(with_scales(recipe, vector), method, vector, rules)
    if recipe.base is not None or rules:
        return asked
    known: dict[Vector, Vector] = {}
    named: Named = {}
    for vector, origin in asked.items():
        shares = _as_shares(vector)
        alike = tuple(round(share, _DIGITS) for share in shares)
        named.setdefault(known.setdefault(alike, shares), origin)
    return named


def _as_shares(vector: Vector) -> Vector:
    total = math.fsum(vector)
    is_one = math.isclose(total, 1, abs_tol=10**-_DIGITS)
    return vector if is_one else tuple(scale / total for scale in vector)


def default_design(method: Method) -> Design:
    """One at a time where changes are added to a base, the simplex where models are averaged."""
    return "one" if method.needs_base else "simplex"


def _full(given: Vector, tasks: int) -> Vector:
    if len(given) not in (1, tasks):
        raise ConfigError(
            f"--scales {','.join(f'{x:g}' for x in given)}: {len(given)} numbers for {tasks} "
            "models. Give one for all, or one for each in the recipe's order."
        )
    return given * tasks if len(given) == 1 else given


def _of_grid(config: PreviewConfig, method: Method, own: Vector) -> Iterator[Vector]:
    if not config.grid:
        return
    design = config.design or default_design(method)
    values, tasks = config.grid, len(own)
    if design == "one":
        for position, value in product(range(tasks), values):
            yield (*own[:position], value, *own[position + 1 :])
    elif design == "common":
        yield from ((value,) * tasks for value in values)
    elif design == "product":
        yield from product(values, repeat=tasks)
    else:
        yield from _simplex(values, tasks)


def _simplex(values: Sequence[float], tasks: int) -> Iterator[Vector]:
    """All combinations of the values that are shares of one; the last share follows from others."""
    if not all(0 <= value <= 1 for value in values):
        raise ConfigError("--grid: the shares of a simplex lie between 0 and 1.")
    none = True
    for vector in _shares(tuple(dict.fromkeys(values)), tasks, 1.0):
        none = False
        yield vector
    if none:
        raise ConfigError(
            f"--grid: no {tasks} of these values sum to 1. Give the multiples of a share, such as "
            "0,0.25,0.5,0.75,1, or another --design."
        )


def _shares(values: Sequence[float], tasks: int, left: float) -> Iterator[Vector]:
    for value in values:
        if tasks == 1 and math.isclose(value, left, abs_tol=1e-6):
            yield (value,)
        elif tasks > 1 and value <= left + 1e-6:
            yield from ((value, *rest) for rest in _shares(values, tasks - 1, left - value))
