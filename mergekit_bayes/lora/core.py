"""Merge a layer in the common core space of its adapters, by any method that merges matrices.

    [s_1 B_1, ...] = U S P',  [A_1; ...] = Q R V'               singular value decompositions
    M_t = U' s_t B_t A_t V,   U M_t V' = s_t B_t A_t            exact: (sum r x sum r) or smaller
    dW  = U M V',             M merged of the M_t, cut to rank R by its singular value decomposition

Source: Panariello, Marczak et al., *Accurate and Efficient Low-Rank Model Merging in Core Space*,
NeurIPS 2025 (arXiv 2509.17786). No matrix of the weight's size is formed. Two points are settled
here: the scaling s_t counts to B_t, and directions that no adapter has are no part of the space.

A rule that commutes with orthogonal maps of outputs and inputs merges the cores as it merges the
dense changes. An elementwise one (TIES, DARE) is another rule here than on weights: its entries are
those of the common directions, as in the paper.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from mergekit_bayes.checkpoint.specs import Array
from mergekit_bayes.errors import CheckpointError, MismatchError
from mergekit_bayes.kernels.arrays import Arrays, facts_of, merge_arrays, totals_of
from mergekit_bayes.kernels.base import task_key
from mergekit_bayes.lora.bases import Basis, orthonormal, principal
from mergekit_bayes.lora.inputs import AdapterMerge, LayerCopy, Layers
from mergekit_bayes.lora.rules import Rule
from mergekit_bayes.lora.truncate import Truncated, truncate_core
from mergekit_bayes.methods.base import Facts


class CoreSpace(NamedTuple):
    """The changes of a layer in their common core space, in float64.

    Attributes:
        left: U, (d_out, k).
        right: V, (d_in, l).
        cores: M_t, (k, l), one for each pair of factors.
    """

    left: Basis
    right: Basis
    cores: tuple[Array, ...]


def core_space(
    left: Array, right: Array, ranks: Sequence[int], *, by_singular_vectors: bool = True
) -> CoreSpace:
    """The common core space of some changes `B_t A_t`.

    The cores come out of the stacks' own parts in the bases, `U' [B_1, ...]` and `V' [A_1; ...]'`.

    Args:
        left: `[B_1, ...]`, (d_out, sum r), in float64, the scaling in it.
        right: `[A_1; ...]`, (sum r, d_in), in float64.
        ranks: r_t.
        by_singular_vectors: Take the singular vectors of the stacks, as published, and not other
            bases of the same space, which are the same to a rule that commutes with orthogonal
            maps and cost less.
    """
    spanned = principal if by_singular_vectors else orthonormal
    columns, of_b = spanned(left)
    rows, of_a = spanned(right.T)
    parts = [slice(start, stop) for start, stop in pairwise(np.cumsum([0, *ranks]))]
    return CoreSpace(columns, rows, tuple(of_b[:, part] @ of_a[:, part].T for part in parts))


def measure_cores(merge: AdapterMerge, layers: Layers) -> Facts:
    """What a rule must know of all layers before it merges one; None for any other rule."""
    rule = _rule_of(merge)
    if not rule.has_model_scope:
        return None
    arrays = (
        _arrays(merge, rule, copies, _space(merge, rule, module, copies))
        for module, copies in layers.items()
    )
    totals = totals_of(rule.method, arrays)
    return facts_of(rule.method, rule.settings, len(merge.adapters), totals)


def merge_cores(
    merge: AdapterMerge, rank: int, module: str, copies: Sequence[LayerCopy]
) -> Truncated:
    """Merge one layer.

    An adapter that lacks the layer changed nothing there, as in a merge on the base, and neither
    does one of scale zero.

    Args:
        merge: The adapters, with their rule, and with what `measure_cores` found.
        rank: Rank of the result.
        module: The layer's name, from which the keys of random numbers are derived.
        copies: The layer as each adapter holds it.

    Raises:
        CheckpointError: The change is beyond float32.
        MismatchError: What the rule cannot merge.
    """
    rule = _rule_of(merge)
    space = _space(merge, rule, module, copies)
    arrays = _arrays(merge, rule, copies, space)
    facts = merge.facts
    if facts is None:
        totals = totals_of(rule.method, [arrays])
        facts = facts_of(rule.method, rule.settings, len(merge.adapters), totals)
    keys: list[np.uint64] = []
    if rule.method.random:
        seed = int(rule.settings["seed"])
        keys = [task_key(seed, module, a.posterior.identity) for a in merge.adapters]
    try:
        merged = arrays.tasks[0]
        if merged.size:  # else no adapter changes the layer
            merged = merge_arrays(rule.method, rule.settings, arrays, merge.scales, facts, keys)
        core = merged[: space.left.size, : space.right.size]
        return truncate_core(space.left, core, space.right, rank)
    except CheckpointError as error:
        raise CheckpointError(f"'{module}': {error}") from None
    except (ArithmeticError, np.linalg.LinAlgError) as error:
        raise MismatchError(f"'{module}': {error}.") from None


def _rule_of(merge: AdapterMerge) -> Rule:
    assert merge.rule is not None
    return merge.rule


def _space(merge: AdapterMerge, rule: Rule, module: str, copies: Sequence[LayerCopy]) -> CoreSpace:
    """The core space of those adapters that change a layer."""
    taken = _taken(merge, copies)
    if not taken:
        layer = copies[0].layer
        return CoreSpace(Basis(np.zeros((layer.rows, 0))), Basis(np.zeros((layer.columns, 0))), ())
    left, right = merge.stacked(taken, with_scales=False)
    ranks = [copy.layer.rank for copy in taken]
    try:
        return core_space(left, right, ranks, by_singular_vectors=not rule.is_equivariant)
    except np.linalg.LinAlgError as error:
        raise CheckpointError(f"'{module}': {error}. Look at the values of its factors.") from None


def _taken(merge: AdapterMerge, copies: Sequence[LayerCopy]) -> list[LayerCopy]:
    """The copies that count: an adapter of scale zero adds no directions."""
    return [copy for copy in copies if merge.scales[copy.owner]]


def _arrays(
    merge: AdapterMerge, rule: Rule, copies: Sequence[LayerCopy], space: CoreSpace
) -> Arrays:
    """The cores as the models of a merge on a base of zeros; zeros for adapters without a layer.

    A rule for matrices that commutes with orthogonal maps may still ask for the size of the layer:
    TSV-M keeps min(d_out, d_in) / T directions of each task. The cores are padded with zeros as far
    as it takes to leave each as many as in the layer itself, or all that it has.
    """
    shape = (space.left.size, space.right.size)
    if rule.method.matrix is not None and rule.is_equivariant:
        layer = copies[0].layer
        directions = len(merge.adapters) * max(copy.layer.rank for copy in copies)
        enough = min(layer.rows, layer.columns, directions)
        shape = (max(shape[0], enough), max(shape[1], enough))
    tasks = [np.zeros(shape) for _ in merge.adapters]
    for copy, core in zip(_taken(merge, copies), space.cores, strict=True):
        tasks[copy.owner][: core.shape[0], : core.shape[1]] = core
    takes_base = rule.method.needs_base or rule.method.takes_base
    return Arrays(np.zeros(shape) if takes_base else None, tuple(tasks))
