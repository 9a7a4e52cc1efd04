"""Form a merge at many scales in the parameters of one model, by the merge's own passes."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from mergekit_bayes.checkpoint.specs import Closing
from mergekit_bayes.errors import MismatchError
from mergekit_bayes.kernels import can_fuse
from mergekit_bayes.merge.pool import CHUNK, PLAIN_CHUNK, WORTH_FUSING, default_threads
from mergekit_bayes.merge.work import Sinks, Worker
from mergekit_bayes.models.places import find_parameters
from mergekit_bayes.plan import MergeConfig, MergePlan, plan_merge
from mergekit_bayes.plan.mixtures import refuse_mixtures
from mergekit_bayes.plan.options import parse_scales
from mergekit_bayes.plan.rescale import Signs, rescaled, signs_of, with_scales
from mergekit_bayes.preview.held import Held, HeldReader
from mergekit_bayes.preview.parameters import ParameterSink
from mergekit_bayes.preview.settings import Vector
from mergekit_bayes.stream.chunks import FirstPassResult, Reader
from mergekit_bayes.stream.first_pass import FirstPass
from mergekit_bayes.stream.units import Unit, units_of

if TYPE_CHECKING:
    import torch

_Known: TypeAlias = tuple[Signs, float]  # signs of the scales, and the guard


class _Work(NamedTuple):
    """The units of a plan that go into the model, and what is known of their tensors."""

    units: list[Unit]
    measured: dict[int, FirstPassResult]


class Plans(Closing):
    """The plans of one recipe at any scales: one is made for each combination of signs.

    Args:
        config: The settings of the recipe.
        out: An output that does not exist, and is not made.
    """

    def __init__(self, config: MergeConfig, out: Path) -> None:
        update = {"out": str(out), "posterior": False, "force": False, "max_shard_size": None}
        self._config = config.model_copy(update=update)
        self._by_signs: dict[Signs, MergePlan] = {}
        self._stack = ExitStack()

    def at(self, scales: Vector) -> MergePlan:
        """The plan at some scales, one for each task.

        Raises:
            BmergeError: As `plan_merge`.
            MismatchError: A tensor has another shape than in the first plan that was asked for.
        """
        signs = signs_of(scales)
        if signs not in self._by_signs:
            plan = self._stack.enter_context(plan_merge(with_scales(self._config, scales)))
            refuse_mixtures(plan.inputs, "bmerge preview")
            self._by_signs[signs] = plan
            self._refuse_other_shapes(scales, plan)
        return rescaled(self._by_signs[signs], scales)

    def _refuse_other_shapes(self, scales: Vector, plan: MergePlan) -> None:
        first = {step.name: step.spec for step in next(iter(self._by_signs.values())).steps}
        for step in plan.steps:
            if step.spec != first.get(step.name):
                before = list(first[step.name].shape) if step.name in first else "missing"
                raise MismatchError(
                    f"at the scales {', '.join(f'{x:g}' for x in scales)} '{step.name}' is "
                    f"{list(step.spec.shape)}, and at the recipe's {before}: one model cannot hold "
                    "both. Preview them by recipes of their own."
                )

    def refuse_changed(self) -> None:
        """Check that all inputs are what they were when they were first opened.

        Raises:
            ChangedError: A file was written to or replaced.
        """
        for plan in self._by_signs.values():
            plan.refuse_changed(full=plan.config.verify)

    def close(self) -> None:
        """Close the files of all models."""
        self._stack.close()


class Former(Closing):
    """Forms merges of one recipe in a model, whose parameters are those of the written merge.

    The inputs are read when the first merge is formed, and kept.

    Args:
        model: The model that the merge would be loaded as.
        like: The recipe's plan at scales of which none is zero.
        vectors: About how many merges are formed: many are worth the compiled pass.
        threads: How many threads; None for one per core, at most four.

    Attributes:
        held: The inputs.
        is_average: Whether the scales are shares of an average, which has no base.
    """

    def __init__(
        self,
        model: "torch.nn.Module",
        like: MergePlan,
        vectors: int,
        threads: int | None = None,
    ) -> None:
        specs = {step.name: step.spec for step in like.steps}
        self._places = find_parameters(model, specs)
        self._sinks = Sinks(ParameterSink(self._places, specs), None)
        entries = sum(step.merged for step in like.steps)
        self._fused = entries * vectors >= WORTH_FUSING and can_fuse(len(like.inputs))
        self._chunk = CHUNK if self._fused else PLAIN_CHUNK
        self._known: dict[_Known, _Work] = {}
        self._copied: dict[str, str] = {}  # tensors that are the donor's, by name, and whose
        self.held, self.is_average = Held(), like.base is None
        self._local = threading.local()
        threads = threads or default_threads()
        self._threads = ThreadPoolExecutor(threads)
        self._map = self._threads.map if threads > 1 else map

    def form(self, plan: MergePlan) -> None:
        """Give the model the parameters of a merge.

        Args:
            plan: The merge, as `Plans.at` gives it.

        Raises:
            CheckpointError: A mean that cannot be merged, or a merge that is not finite; the model
                is then neither this merge nor the one before.
            PrecisionError: A precision that cannot be merged.
        """
        key = signs_of(parse_scales(plan.config)[0]), plan.guard
        if key not in self._known:
            self._known[key] = self._measure(plan)
        work = self._known[key]
        units = [unit for unit in work.units if self._is_to_do(plan, unit)]

        def carry_out(unit: Unit) -> None:
            worker = Worker(
                plan,
                self._reader(plan),
                self._chunk,
                fused=self._fused,
                layers=self.held.layer,
            )
            worker.run(unit, work.measured[unit.step], self._sinks)

        for _ in self._map(carry_out, units):
            pass
        for unit in units:
            step = plan.steps[unit.step]
            if step.copied is None:
                self._copied.pop(step.name, None)
            else:
                self._copied[step.name] = step.donor.mean.input.ref

    def close(self) -> None:
        """End the threads, and let go of the inputs."""
        self._threads.shutdown(cancel_futures=True)
        self.held.clear()

    def _is_to_do(self, plan: MergePlan, unit: Unit) -> bool:
        """Whether the model may have other entries: a copy stays what it is."""
        step = plan.steps[unit.step]
        return step.copied is None or self._copied.get(step.name) != step.donor.mean.input.ref

    def _measure(self, plan: MergePlan) -> _Work:
        """What must be known of a plan's tensors, which does not depend on the size of scales."""
        units = [unit for unit in units_of(plan) if plan.steps[unit.step].name in self._places]
        reader = Reader(plan)  # of windows of other sizes than the chunks that are kept

        first_pass = FirstPass(plan, lambda: reader, map, fused=self._fused)
        steps = dict.fromkeys(unit.step for unit in units)
        return _Work(units, {i: first_pass.measure(plan.steps[i]) for i in steps})

    def _reader(self, plan: MergePlan) -> HeldReader:
        """The calling thread's reader."""
        if not hasattr(self._local, "reader"):
            self._local.reader = HeldReader(plan, self.held)
        reader: HeldReader = self._local.reader
        return reader
