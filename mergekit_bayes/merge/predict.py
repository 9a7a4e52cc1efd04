"""Predict what merges by several sets of scales would cost each model, and write none of them.

The inputs are read once: of every chunk the merged mean is formed for one set after another, and
its distances from the models are summed as a merge itself sums them (`merge/increase`).
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import numpy as np

from mergekit_bayes import __version__
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError
from mergekit_bayes.kernels import can_fuse, elementwise
from mergekit_bayes.kernels.base import Tally
from mergekit_bayes.merge.increase import (
    SHOWN_LAYERS,
    Increase,
    is_of_inputs,
    notes_on_increases,
    predicted_increases,
)
from mergekit_bayes.merge.matrices import merge_matrices, read_layer
from mergekit_bayes.merge.pool import AHEAD, CHUNK, PLAIN_CHUNK, WORTH_FUSING, default_threads
from mergekit_bayes.merge.tally import MergeTotals, UnitTally
from mergekit_bayes.methods.base import Method
from mergekit_bayes.plan import MergeConfig, MergePlan, Step, plan_merge
from mergekit_bayes.plan.mixtures import refuse_mixtures
from mergekit_bayes.plan.options import ScaleRule, check_options, choose_method, parse_scales
from mergekit_bayes.plan.rescale import guard_by, scales_in
from mergekit_bayes.records import Progress, Record
from mergekit_bayes.stream.bad_entries import replace_bad_entries
from mergekit_bayes.stream.chunks import FirstPassResult, Reader
from mergekit_bayes.stream.first_pass import FirstPass
from mergekit_bayes.stream.numbers import kind_of, numbers_of, real_of
from mergekit_bayes.stream.units import Unit, units_of

T = TypeVar("T")
R = TypeVar("R")


class PredictedMerge(Record):
    """What a merge by one set of scales would do.

    Attributes:
        scale: The scale of each model.
        guard: rho of the guard on removal that it would use.
        predicted: The predicted increase of each model's loss on its own data.
    """

    scale: tuple[float, ...]
    guard: float
    predicted: tuple[Increase, ...]


class PredictionReport(Record):
    """The predictions for several sets of scales.

    Attributes:
        version: Version of this package.
        models: The models as given, in the order of the scales.
        base: The base as given; None without one.
        method: The merging rule.
        rules: The scales that hold for some tensors only, in every set.
        sets: One for each set of scales, in the order asked for.
        notes: Remarks for the reader.
    """

    version: str = __version__
    models: tuple[str, ...]
    base: str | None
    method: str
    rules: tuple[str, ...] = ()
    sets: tuple[PredictedMerge, ...]
    notes: tuple[str, ...] = ()


def predict_merges(
    config: MergeConfig,
    scales: Sequence[Sequence[float]],
    *,
    progress: Progress | None = None,
    threads: int | None = None,
    fused: bool | None = None,
    chunk: int | None = None,
    most_layers: int | None = SHOWN_LAYERS,
) -> PredictionReport:
    """Predict the increase of each model's loss for several merges, by one pass over the inputs.

    Args:
        config: The settings of the merges. Of `scale` only the rules `MODEL:REGEX=X` count.
        scales: Sets of scales: one number for all models, or one for each.
        progress: Called with (entries done, entries in all).
        threads: How many threads; by default one per core, at most four.
        fused: Use the compiled pass; by default where numba is installed and it is worth loading.
        chunk: Entries that are read at a time.
        most_layers: How many layers each prediction lists; None for all.

    Returns:
        One prediction for each set. It is the one that the report of that merge has, which says
        nothing of models of scale zero.

    Raises:
        BmergeError: What `plan_merge` raises, a set that no merge takes, a method that draws at
            random or merges whole tensors, or an entry that cannot be merged. Every model needs a
            precision, even where the method reads none.
    """
    if not scales:
        raise ConfigError("there is nothing to predict: give a set of scales.")
    if threads is not None and threads < 1:
        raise ConfigError(f"--threads {threads}: expected 1 or more.")
    method, settings = choose_method(config)
    if method.random:
        raise ConfigError(
            f"--predict: {method.name} draws at random, and no draw is predicted. Choose another "
            "--method."
        )
    if method.tensor is not None:
        raise ConfigError(
            f"--predict: {method.name} merges whole tensors, and what such a merge costs is not "
            "predicted. Choose another --method."
        )
    if config.trajectory:
        raise ConfigError(
            "--predict: the shares of a --trajectory are no choice. Drop one of both."
        )
    texts = tuple(s for s in config.scale if isinstance(s, str))
    sets = [_checked(config, numbers, texts) for numbers in scales]
    # A model of scale zero would not be read, and one that only counts in some sets is.
    read = tuple(next((s[i] for s in sets if s[i]), 1.0) for i in range(len(config.models)))
    update: dict[str, object] = {"scale": (*read, *texts), "posterior": False, "force": True}
    if not method.needs_precision:  # the merge reads none; its prediction does
        update |= {"weights": "precision", "method": None, "param": {}}
    asked = config.model_copy(update=update)
    with plan_merge(asked) as plan:
        refuse_mixtures(plan.inputs, "--predict")
        _refuse_covariances(plan)
        _, rules = parse_scales(asked)
        if not method.needs_precision:
            _refuse_matrices(plan, method)
            weighs = method._replace(needs_precision=True)
            plan = replace(plan, method=weighs, settings=settings)
        guards = [guard_by(plan, numbers, rules) for numbers in sets]
        found = _Sweep(plan, sets, guards, rules, threads, fused, chunk).run(progress)
        plan.refuse_changed(full=config.verify)
        notes = [*plan.notes, *notes_on_increases(plan)]
        return PredictionReport(
            models=config.models,
            base=config.base,
            method=plan.method.name,
            rules=texts,
            sets=tuple(
                PredictedMerge(
                    scale=numbers,
                    guard=guard,
                    predicted=predicted_increases(plan, totals.moves, most_layers=most_layers),
                )
                for numbers, guard, totals in zip(sets, guards, found, strict=True)
            ),
            notes=tuple(notes),
        )


def _checked(
    config: MergeConfig, numbers: Sequence[float], rules: tuple[str, ...]
) -> tuple[float, ...]:
    """One scale for each model, which a merge would take.

    Raises:
        ConfigError: It would not.
    """
    count = len(config.models)
    if len(numbers) not in (1, count):
        raise ConfigError(
            f"--predict {_text(numbers)}: {len(numbers)} scales for {count} models. Give one for "
            "all, or one for each with commas between them."
        )
    # The plan of the prediction checks these two, since it reads precisions where a merge does not.
    update = {"scale": (*map(float, numbers), *rules), "precision": {}, "isotropic": {}}
    one = config.model_copy(update=update)
    try:
        scales, parsed = parse_scales(one)
        method, _ = choose_method(one)
        check_options(one, method, scales, parsed)
    except ConfigError as error:
        raise ConfigError(f"--predict {_text(numbers)}: {error}") from None
    return scales


def _refuse_covariances(plan: MergePlan) -> None:
    """Refuse precisions that tell nothing of a loss.

    Raises:
        ConfigError: A model has the covariance of inputs.
    """
    ref = next((model.ref for model in plan.inputs if is_of_inputs(model)), None)
    if ref is not None:
        raise ConfigError(
            f"no rise of the loss is predicted: '{ref}' has the covariance of inputs (--estimator "
            "inputs), which is no curvature of the loss. Predict by precisions of another "
            f"estimator, as `bmerge precision {ref} --data TEXTS -o OTHER` makes one, with "
            f"--precision {ref}=OTHER."
        )


def _refuse_matrices(plan: MergePlan, method: Method) -> None:
    """Refuse matrices where the method reads numbers of each entry only.

    Raises:
        ConfigError: The method or a precision has some.
    """
    if method.matrix is not None:
        raise ConfigError(
            f"--predict: {method.name} reads no precision and merges whole matrices, which is not "
            "predicted. Choose another --method."
        )
    name = next((step.name for step in plan.steps if step.axis is not None), None)
    if name is not None:
        raise ConfigError(
            f"--predict: the precisions have matrices ('{name}'), and {method.name} is predicted "
            "by one number for each entry. Name precisions of --estimator ggn, as `bmerge "
            "precision MODEL --data TEXTS -o OTHER` makes one, with --precision MODEL=OTHER."
        )


class _Sweep:
    """One pass over the inputs, for all sets of scales."""

    def __init__(
        self,
        plan: MergePlan,
        sets: Sequence[tuple[float, ...]],
        guards: Sequence[float],
        rules: Sequence[ScaleRule],
        threads: int | None,
        fused: bool | None,
        chunk: int | None,
    ) -> None:
        self._plan, self._sets, self._guards, self._rules = plan, sets, guards, rules
        self._threads = threads or default_threads()
        work = len(sets) * sum(step.merged for step in plan.steps)
        is_worth_it = work >= WORTH_FUSING if fused is None else fused
        self._fused = is_worth_it and can_fuse(len(plan.inputs))
        self._chunk = chunk or (CHUNK if self._fused else PLAIN_CHUNK)
        self._local = threading.local()

    def run(self, progress: Progress | None) -> list[MergeTotals]:
        """What a merge by each set counts."""
        units = units_of(self._plan)
        blank = UnitTally().to_json()
        lines = [{unit.id: blank for unit in units} for _ in self._sets]
        total, done = sum(step.merged for step in self._plan.steps), 0
        with ThreadPoolExecutor(self._threads) as pool:
            try:
                for unit, tallies in self._results(pool, units):
                    for of_set, tally in zip(lines, tallies, strict=True):
                        of_set[unit.id] = tally.to_json()
                    done += unit.stop - unit.start
                    if progress is not None:
                        progress(min(done, total), total)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        totals = [MergeTotals(self._plan, units, of_set) for of_set in lines]
        totals[0].refuse_zero()
        return totals

    def _results(
        self, pool: ThreadPoolExecutor, units: Sequence[Unit]
    ) -> Iterator[tuple[Unit, list[UnitTally]]]:
        """Each unit that is merged, with what is counted in it for each set."""

        def ordered_map(act: Callable[[T], R], items: Iterable[T], /) -> Iterator[R]:
            return pool.map(act, items)

        passes = {
            guard: FirstPass(
                replace(self._plan, guard=guard), self._reader, ordered_map, fused=self._fused
            )
            for guard in self._guards
        }
        waiting: deque[tuple[Unit, Future[list[UnitTally]]]] = deque()
        measured: dict[float, FirstPassResult] = {}
        before: int | None = None
        for unit in units:
            step = self._plan.steps[unit.step]
            if step.copied is not None or step.tied_to is not None or unit.start >= step.merged:
                continue
            if unit.step != before:
                measured = {guard: one.measure(step) for guard, one in passes.items()}
                before = unit.step
            waiting.append((unit, pool.submit(self._unit, step, measured, unit)))
            while len(waiting) > AHEAD * self._threads:
                first, future = waiting.popleft()
                yield first, future.result()
        for unit, future in waiting:
            yield unit, future.result()

    def _reader(self) -> Reader:
        """The calling thread's reader."""
        if not hasattr(self._local, "reader"):
            self._local.reader = Reader(self._plan)
        reader: Reader = self._local.reader
        return reader

    def _unit(
        self, step: Step, measured: dict[float, FirstPassResult], unit: Unit
    ) -> list[UnitTally]:
        if step.axis is not None:
            return self._matrices(step, measured)
        act = elementwise(kind_of(self._plan, step)._replace(removes=False), fused=self._fused)
        constants = [
            numbers_of(self._plan, step, measured[guard].facts)._replace(
                scales=tuple(map(real_of(step), scales_in(step, numbers, self._rules)))
            )
            for guard, numbers in zip(self._guards, self._sets, strict=True)
        ]
        one = measured[self._guards[0]]
        tallies = [UnitTally() for _ in self._sets]
        end = min(unit.stop, step.merged)
        for start in range(unit.start, end, self._chunk):
            chunk = self._reader().chunk(step, one, start, min(start + self._chunk, end))
            for i, (numbers, tally) in enumerate(zip(constants, tallies, strict=True)):
                counts = Tally(len(chunk.means))
                act(chunk, numbers, counts)
                if counts.bad_means.any() or counts.bad_precisions.any():  # of the first set only
                    chunk, _ = replace_bad_entries(self._plan, step, one, chunk, numbers)
                    counts = Tally(len(chunk.means))
                    act(chunk, numbers, counts)
                if counts.bad:
                    raise CheckpointError(
                        f"'{step.name}': the merge by the scales {_text(self._sets[i])} is not "
                        "finite. Are its precisions on the same scale?"
                    )
                tally.add(counts)
        return tallies

    def _matrices(self, step: Step, measured: dict[float, FirstPassResult]) -> list[UnitTally]:
        """What is counted in a layer that is merged as a whole."""
        layer, tallies = read_layer(self._plan, step), []
        for guard, scales in zip(self._guards, self._sets, strict=True):
            numbers = numbers_of(self._plan, step, measured[guard].facts, np.float64)
            in_step = scales_in(step, scales, self._rules)
            numbers = numbers._replace(scales=tuple(map(np.float64, in_step)))
            counts = Tally(len(step.operands))
            try:
                merge_matrices(self._plan, step, layer, numbers, counts)
            except MismatchError as error:
                raise MismatchError(f"--predict {_text(scales)}: {error}") from None
            tallies.append(UnitTally())
            tallies[-1].add(counts)
        return tallies


def _text(scales: Sequence[float]) -> str:
    """A set of scales as it is typed."""
    return ",".join(f"{scale:g}" for scale in scales)
