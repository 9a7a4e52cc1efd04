"""Merge adapters of one base into an adapter.

product   dW = sum_t c_t s_t B_t A_t                           weights uniform: task arithmetic
          dW = sum_t c_t S_t dW_t / sum_t c_t S_t  per entry   weights precision
          with S_t = 1 / (V_W + floor), cut to rank R by SVD
concat    B = [c_1 s_1 B_1, ...], A = [A_1; ...]               task arithmetic, exact
core      dW = U M V', M merged by any method (see `core`), cut to rank R by SVD
factor    the factors themselves, where their average means something (see `factors`)
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from mergekit_bayes.checkpoint import sources
from mergekit_bayes.checkpoint.replacing import replacing
from mergekit_bayes.checkpoint.side_files import (
    MERGE_RECIPE,
    MERGE_REPORT,
    check_side_files,
    copy_side_files,
    side_files,
)
from mergekit_bayes.checkpoint.stamps import documents_in, refuse_changed, stamps_of
from mergekit_bayes.lora.adapter import Adapter, open_adapter
from mergekit_bayes.lora.checks import (
    check_bases,
    check_linear,
    check_options,
    check_output,
    check_precision_options,
    check_precisions,
)
from mergekit_bayes.lora.config import CONFIG
from mergekit_bayes.lora.core import measure_cores
from mergekit_bayes.lora.factors import choose_averaging
from mergekit_bayes.lora.inputs import AdapterMerge, Layers, Space, Weights, match_adapters
from mergekit_bayes.lora.output import write_config, write_tensors
from mergekit_bayes.lora.replacements import decide_replacements
from mergekit_bayes.lora.report import (
    SYMBOLS,
    AdapterReport,
    describe_rule,
    formula,
    summarise,
)
from mergekit_bayes.lora.rules import check_space, choose_rule
from mergekit_bayes.lora.shifts import check_shifts, note_on_zeros
from mergekit_bayes.lora.variants import variant_notes
from mergekit_bayes.posterior.info import note_on_losses
from mergekit_bayes.recipes import recipe_text
from mergekit_bayes.records import Progress


def merge_adapters(
    adapters: Sequence[str],
    out: Path,
    *,
    scales: Sequence[float] = (1.0,),
    weights: Weights = "uniform",
    space: Space = "product",
    rank: int | None = None,
    method: str | None = None,
    param: Mapping[str, float | str] | None = None,
    counts: Literal["equal", "recorded"] = "equal",
    precision: Mapping[str, str] | None = None,
    identities: Mapping[str, str] | None = None,
    precision_identities: Mapping[str, str] | None = None,
    seed: int = 0,
    force: bool = False,
    progress: Progress | None = None,
) -> AdapterReport:
    """Merge LoRA adapters of one base into one PEFT adapter folder, layer by layer.

    Args:
        adapters: Folders or Hub ids.
        out: The folder to write; it appears complete or not at all.
        scales: One for all or one per adapter. With uniform weights they multiply changes; with
            precision weights they are shares and not negative.
        weights: `uniform`, or `precision`, which needs a precision of every adapter.
        space: `product`, `concat` (exact, uniform weights only), `factor` or `core` (uniform
            weights only).
        rank: Rank of the result in product or core space; by default the largest of the adapters',
            and at most that of the largest layer. What a layer does not need of it is zero.
        method: In core space, the method by which cores are merged; None for task arithmetic, which
            product space and concatenation are, too.
        param: Settings of the method.
        counts: `equal` counts all precisions for one number of observations, the smallest on
            record; `recorded` each for its own.
        precision: Another place for an adapter's precision, by the adapter as given.
        identities: Content hash that each adapter must have, by the adapter as given.
        precision_identities: Content hash that each adapter's precision must have, likewise.
        seed: Seed of the SVD of large layers.
        force: Replace `out`.
        progress: Called with (layers done, layers in all).

    Raises:
        CheckpointError: A file cannot be read or was changed meanwhile, or the output exists.
        ConfigError: The options contradict each other, or an adapter is of a kind that is not read
            or does not add up without its base.
        MismatchError: The adapters have different bases or shapes, or factors of which no average
            can be taken.
        PrecisionError: A precision is missing or of another kind.
    """
    shares = check_options(adapters, scales, weights, space, rank, method)
    rule = choose_rule(method, param or {}, len(adapters), scales) if space == "core" else None
    if rule is None:
        check_space(method, param or {}, space)
    places = precision or {}
    check_precision_options(adapters, weights, space, counts, places)
    needs_precision = weights == "precision" or space == "factor"
    with ExitStack() as stack:
        opened: list[Adapter] = []
        for ref in adapters:
            adapter = stack.enter_context(
                open_adapter(ref, precision=places.get(ref), with_precision=needs_precision)
            )
            opened.append(adapter)
            has_precision = adapter.posterior.has_precision
            adapter.posterior.check_identity(
                (identities or {}).get(ref),
                (precision_identities or {}).get(ref) if has_precision else None,
            )
        read = stamps_of(file for a in opened for file in documents_in(a.posterior.path))
        for adapter in opened:
            read |= adapter.posterior.inputs
        check_output(out, opened)
        for adapter in opened:
            side_files(adapter.posterior.path)  # refuses links that lead out of its folder
        check_side_files(opened[0].posterior.path)
        check_linear(opened)
        notes = check_bases(opened)
        if weights == "precision":
            counted = check_precisions(opened, counts)
            on_losses = note_on_losses({a.ref: a.posterior.info for a in opened})
            notes += [on_losses] if on_losses is not None else []
        else:
            counted = (None,) * len(opened)
        notes += [note for adapter in opened if (note := adapter.unused_note) is not None]
        notes += [note for a in opened for note in variant_notes(a.config, a.ref)]
        layers, replacements = match_adapters(opened)
        merge = AdapterMerge(opened, shares, counted, weights, seed, rule=rule)
        notes += [note for note in (note_on_zeros(layers),) if note is not None]
        if space == "factor":
            averaging = choose_averaging(merge, layers)
            notes.append(averaging.reason)
            merge = merge._replace(averaged=not averaging.is_linear)
        if rule is not None:
            check_shifts(layers, rule)
            merge = merge._replace(facts=measure_cores(merge, layers))
            notes += [note for note in (describe_rule(rule),) if note is not None]
        result_rank = _choose_rank(space, rank, layers)
        if rank is not None and result_rank < rank:
            notes.append(f"rank {result_rank} in place of {rank}: no layer has a larger one")
        partial = stack.enter_context(replacing(out, force=force))
        partial.mkdir()
        outcomes = decide_replacements(merge, replacements)
        done = write_tensors(
            merge, space, result_rank, layers, replacements, outcomes, partial, progress
        )
        write_config(opened, layers, replacements, result_rank, partial)
        copy_side_files(opened[0].posterior.path, partial, but=CONFIG)
        report = AdapterReport(
            path=str(out),
            space=space,
            weights=weights,
            method=rule.method.name if rule is not None else "",
            param=dict(rule.settings) if rule is not None else {},
            summary=summarise(space, weights, shares, averaged=merge.averaged, rule=rule),
            formula=formula(space, weights, rule),
            symbols=SYMBOLS[space, weights],
            adapters=tuple(adapters),
            scales=shares,
            counts=counted,
            rank=result_rank,
            exact_rank=_exact_rank(merge, space, layers),
            largest_error=max(layer.error for layer in done.values()),
            layers=done,
            whole=outcomes,
            notes=tuple(notes),
        ).with_rank_note()
        (partial / MERGE_REPORT).write_text(report.model_dump_json(indent=2) + "\n")
        pinned = {a.ref: a.posterior.pinned for a in opened}
        posteriors = [a.posterior for a in opened]
        recipe = {
            "models": list(pinned.values()),
            "weights": weights,
            "scale": list(scales),
            "counts": counts,
            "precision": {
                pinned[ref]: sources.pinned(place) for ref, place in places.items() if ref in pinned
            },
            "space": space,
            "rank": rank,
            **({} if rule is None else {"method": rule.method.name, "param": dict(rule.settings)}),
            "identities": {p.pinned: p.identity for p in posteriors},
            "precision_identities": {
                p.pinned: p.precision_identity for p in posteriors if p.has_precision
            },
        }
        (partial / MERGE_RECIPE).write_text(recipe_text(recipe))
        refuse_changed(read)
        return report


def _choose_rank(space: Space, rank: int | None, layers: Layers) -> int:
    ranks = [[copy.layer.rank for copy in copies] for copies in layers.values()]
    if space == "concat":
        return max(map(sum, ranks))
    if space == "factor":
        return max(map(max, ranks))
    largest = max(min(c[0].layer.rows, c[0].layer.columns) for c in layers.values())
    return min(rank or max(map(max, ranks)), largest)  # more would be zeros


def _exact_rank(merge: AdapterMerge, space: Space, layers: Layers) -> int | None:
    """The smallest rank that surely holds the merged change of every layer; None if none cuts."""
    if space not in ("product", "core"):
        return None
    ranks = []
    for copies in layers.values():
        full = min(copies[0].layer.rows, copies[0].layer.columns)
        used = sum(copy.layer.rank for copy in copies if merge.scales[copy.owner])
        ranks.append(full if merge.weights == "precision" else min(full, used))
    return max(ranks)
