"""Preview a merge: many scale vectors in one model in memory, measured on the given texts.

    form(scales) -> parameters in place -> losses     for the recipe, the grid and the search

The inputs are read once and kept, and each merge is formed by the passes of `bmerge merge`, so that
a preview has the bits of the merge that it stands for.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from mergekit_bayes.checkpoint.scratch import Scratch
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError
from mergekit_bayes.evaluate.inputs import read_inputs
from mergekit_bayes.evaluate.refusals import refuse_settings
from mergekit_bayes.evaluate.report import StepProgress
from mergekit_bayes.evaluate.settings import is_by_name
from mergekit_bayes.merge.recipe import recipe_text
from mergekit_bayes.metrics.base import Interval
from mergekit_bayes.models.load import is_classifier, load_model
from mergekit_bayes.models.quiet import quiet_libraries
from mergekit_bayes.plan import plan_merge
from mergekit_bayes.plan.rescale import signs_of, with_scales
from mergekit_bayes.preview.asking import read_asked
from mergekit_bayes.preview.choosing import cost, pareto
from mergekit_bayes.preview.designs import Named
from mergekit_bayes.preview.files import write_preview
from mergekit_bayes.preview.forming import Former, Plans
from mergekit_bayes.preview.measuring import Measurer, Scores, loss_changes
from mergekit_bayes.preview.memory import refuse_too_large
from mergekit_bayes.preview.predicting import Predicted, best_predicted, predict
from mergekit_bayes.preview.report import Point, PreviewReport
from mergekit_bayes.preview.search import Search
from mergekit_bayes.preview.settings import Origin, PreviewConfig, Vector
from mergekit_bayes.preview.skeleton import write_skeleton

_NOWHERE = float("inf")  # the loss of a merge that cannot be measured


def run_preview(
    config: PreviewConfig, *, quiet: bool = False, progress: StepProgress | None = None
) -> PreviewReport:
    """Form and measure the merges that the config asks for, and write what they scored.

    Everything is checked before the inputs are read; the output appears under its name only when it
    is complete.

    Args:
        config: What to preview, and how.
        quiet: Call no `progress`.
        progress: Called with (step, done, of).

    Returns:
        The report, which is also in the output.

    Raises:
        ConfigError: A setting of the recipe or the preview makes no sense.
        BmergeError: What a merge by this recipe, or an evaluation of it, raises.
    """
    started = time.monotonic()
    tell = progress if progress is not None and not quiet else _ignore
    recipe, asked_of, vectors = read_asked(config)
    refuse_settings(config.evaluation({**config.test, **config.data}, classifies=False))
    _refuse_texts_twice(config)
    with ExitStack() as stack:
        stack.enter_context(quiet_libraries(bars=False))
        scratch = stack.enter_context(Scratch(Path(tempfile.gettempdir()), "bmerge-"))
        predicted = predict(config, asked_of, vectors, scratch.new / "model")
        asked, vectors = len(vectors), best_predicted(config, vectors, predicted)
        plans = stack.enter_context(Plans(recipe, scratch.new / "model"))
        previewer = _open(config, plans, vectors, scratch.new / "unformed", stack)
        points = [
            _with_prediction(point, predicted) for point in previewer.points(config, vectors, tell)
        ]
        chosen = _chosen(config, points)
        held_out = previewer.held_out(config, points[0], points[chosen])
        best = with_scales(recipe, points[chosen].scales)
        with plan_merge(best.model_copy(update={"out": str(scratch.new / "best")})) as plan:
            text = recipe_text(plan)
        plans.refuse_changed()
        report = PreviewReport(
            settings=config.model_dump(mode="json"),
            summary=plan.summary,
            formula=plan.method.formula or plan.method.summary,
            base=recipe.base,
            tasks=recipe.models,
            unit=previewer.measurer.unit,
            observations=previewer.observations,
            points=tuple(points),
            held_out=held_out,
            skipped=asked - len(vectors),
            pareto=pareto([point.loss for point in points]),
            chosen=chosen,
            held_bytes=previewer.former.held.nbytes,
            seconds=time.monotonic() - started,
            path=config.output,
        )
    write_preview(Path(config.output), report, text, force=config.force)
    return report


@dataclass
class _Previewer:
    """A model in memory, what forms its parameters and what measures it."""

    plans: Plans
    former: Former
    measurer: Measurer
    tester: Measurer | None
    observations: dict[str, int]

    def points(self, config: PreviewConfig, vectors: Named, tell: StepProgress) -> Iterator[Point]:
        """Every vector's point, and those of the search.

        Raises:
            BmergeError: The recipe's own merge cannot be formed.
        """
        total = len(vectors) + (config.search or 0)
        points: list[Point] = []

        def point(scales: Vector, origin: Origin) -> Point:
            points.append(self._point(scales, origin, config))
            tell("merges previewed", len(points), total)
            return points[-1]

        for scales, origin in vectors.items():
            yield point(scales, origin)
        if config.search is None:
            return
        own = points[0]
        search = Search(config, own.scales, shares=self.former.is_average)
        for known in points:
            search.know(known.scales, cost(known.loss, own.loss, config.choose))
        for _ in range(config.search):
            found = point(search.propose(), "search")
            search.learn(cost(found.loss, own.loss, config.choose))
            yield found

    def held_out(self, config: PreviewConfig, own: Point, best: Point) -> dict[str, Interval]:
        """The change of the loss on the texts that decided nothing; empty where none can be told.

        Raises:
            CheckpointError: A merge gives no numbers on them.
        """
        if self.tester is None or own is best or own.failure is not None:
            return {}
        self.former.form(self.plans.at(own.scales))
        before = self.tester.predictions()
        self.former.form(self.plans.at(best.scales))
        return loss_changes(before, self.tester.predictions(), config.seed)

    def _point(self, scales: Vector, origin: Origin, config: PreviewConfig) -> Point:
        started, formed, failure = time.monotonic(), None, None
        scores = Scores(dict.fromkeys(config.data, _NOWHERE), {}, {})
        plan = self.plans.at(scales)
        try:
            self.former.form(plan)
            formed = time.monotonic()
            scores = self.measurer.measure()
            self.observations.update(scores.observations)
        except (CheckpointError, MismatchError) as error:
            # A merge that is not finite or gives no numbers, or a removal that no matrices bound.
            if formed is None and origin == "recipe":
                raise
            failure = str(error)
        ended = time.monotonic()
        return Point(
            scales=scales,
            origin=origin,
            loss=scores.loss,
            accuracy=scores.accuracy,
            failure=failure,
            form_seconds=(formed or ended) - started,
            measure_seconds=0.0 if formed is None else ended - formed,
        )


def _open(
    config: PreviewConfig, plans: Plans, vectors: Named, folder: Path, stack: ExitStack
) -> _Previewer:
    """Plan all merges, read the texts, and load the model that the merges are formed in.

    Args:
        config: What to preview.
        plans: The recipe.
        vectors: The scales.
        folder: Where the unformed model is written.
        stack: Closes what is opened.
    """
    own = next(iter(vectors))
    like = plans.at(tuple(scale or 1.0 for scale in own))
    for scales in {signs_of(scales): scales for scales in vectors}.values():
        plans.at(scales)
    refuse_too_large(like, config.dtype)
    write_skeleton(like, folder)
    classifies = is_classifier(str(folder), trust_remote_code=config.trust_remote_code)
    evaluation = config.evaluation(config.data, classifies=classifies)
    inputs = read_inputs(evaluation)
    test = config.evaluation(config.test, classifies=classifies) if config.test else None
    test_inputs = None if test is None else read_inputs(test)
    loaded = load_model(str(folder), dtype=config.dtype, trust_remote_code=config.trust_remote_code)
    loaded.move_to(config.device)
    measurer, tester = Measurer(evaluation, inputs, loaded), None
    if test is not None and test_inputs is not None:
        tester = Measurer(test, test_inputs, loaded)
    count = len(vectors) + (config.search or 0)
    former = stack.enter_context(Former(loaded.model, like, count))
    return _Previewer(plans, former, measurer, tester, {})


def _refuse_texts_twice(config: PreviewConfig) -> None:
    """Refuse texts that would both choose the merge and be said to have decided nothing.

    Raises:
        ConfigError: Rows of `test` are those of `data`: one path, and one condition.
    """
    conditions = config.where if is_by_name(config.where) else {}
    for (name, texts), (same, of_data) in product(config.test.items(), config.data.items()):
        if _place(texts) == _place(of_data) and conditions.get(name) == conditions.get(same):
            raise ConfigError(
                f"--test {name}={texts} is --data {same}, which the merge is chosen on. Name texts "
                "that are in no --data, or leave it out."
            )


def _place(texts: str) -> str:
    path = os.path.expanduser(texts)
    return os.path.realpath(path) if os.path.exists(path) else texts


def _with_prediction(point: Point, predicted: Predicted) -> Point:
    if point.scales not in predicted:
        return point
    nats, trusted = predicted[point.scales]
    return point.model_copy(update={"predicted": nats, "trusted": trusted})


def _chosen(config: PreviewConfig, points: list[Point]) -> int:
    """Index of the recommended point.

    Raises:
        CheckpointError: No merge could be measured.
    """
    if all(point.failure is not None for point in points):
        raise CheckpointError(f"none of {len(points)} merges can be measured: {points[0].failure}")
    costs = [cost(point.loss, points[0].loss, config.choose) for point in points]
    return costs.index(min(costs))


def _ignore(step: str, done: int, of: int) -> None:
    pass
