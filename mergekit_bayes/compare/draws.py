"""What is said of weights that were drawn: how wide, and what to make of it."""

import math
from collections.abc import Iterator, Sequence

from mergekit_bayes.compare.report import Evaluated
from mergekit_bayes.compare.wording import cuts
from mergekit_bayes.evaluate.report import EvaluateReport
from mergekit_bayes.models.sampling import WIDE, SamplingReport


def draws_in_words(draws: SamplingReport) -> str:
    """How many draws there were, of what and how wide."""
    origin = "given" if draws.given else "recorded for draws" if draws.recorded else "stored"
    words = (
        f"{draws.samples} samples of {draws.parameters:,} parameters ({draws.held:,} at the mean), "
        f"{draws.sigma_over_rms:.2g} of the weights' RMS from the mean: prior precision "
        f"{draws.prior:.3g} ({origin}), temperature {draws.temperature:g}, seed {draws.seed}"
    )
    if draws.components is None or draws.runs is None:
        return words
    drawn = [(n, run) for n, run in zip(draws.components, draws.runs, strict=True) if n]
    counts = ", ".join(f"{n} of '{run}'" for n, run in drawn)
    return (
        f"{words}; of a mixture: samples {counts}, and the entries at the mean, the distance and "
        f"the prior precision are those of '{drawn[0][1]}'"
    )


def notes_by_model(evaluations: Sequence[Evaluated]) -> Iterator[tuple[str, str]]:
    """The label of a model, and what a reader should know of its numbers; of all, one by one."""
    alone = len({one.model for one in evaluations}) == 1
    for one in evaluations:
        for note in (*cuts(one.report), *draw_notes(one.report, alone=alone)):
            yield one.label, note


def draw_notes(report: EvaluateReport, *, alone: bool = True) -> Iterator[str]:
    """What a reader of the numbers over samples should know of the draws.

    Args:
        report: What was measured of a model.
        alone: Whether it is the only one. Options that draw one model otherwise hold for all.

    Yields:
        Sentences without a full stop.
    """
    if report.sampled is None:
        return
    draws = report.sampled.draws
    own = "" if alone else "measured alone, "
    # A recorded width is that of the training, whatever the precision counts.
    ess, observations = draws.ess, draws.observations
    if not draws.recorded and ess and observations and not math.isclose(ess, observations):
        once = ess / observations
        is_once = math.isclose(draws.temperature, once, rel_tol=1e-3)
        width = draws.sigma_over_rms * (once / draws.temperature) ** 0.5
        counts = (
            f"the precision is that of {ess:,g} observations (ess), the data held {observations:,g}"
        )
        if width > WIDE and not is_once:
            yield f"{counts}; draws that counted each once would lie {width:.2g} of the RMS away"
        elif not is_once:
            yield f"{counts}: {own}--posterior-temperature {once:.4g} counts each once"
    if draws.sigma_over_rms > WIDE:
        # The factor of the variance that the prior alone would have to make up for.
        excess = (draws.sigma_over_rms / WIDE) ** 2
        # A prior that is given takes the place of the recorded temperature, too.
        prior = "" if draws.recorded else f"--prior {draws.prior * excess:.2g} or more, or "
        yield (
            f"the draws are {draws.sigma_over_rms:.2g} of the weights' RMS from the mean, where "
            f"models often predict worse; {own}with {prior}--posterior-temperature "
            f"{draws.temperature / excess:.2g} they are about {WIDE:g}"
        )
        return
    for name, at_mean in report.classification.items():
        change = report.sampled.classification_change[name].nll
        drawn = report.sampled.classification[name].confidence
        is_unsure = drawn < at_mean.confidence < (at_mean.accuracy.low or 0.0)
        if is_unsure and change is not None and (change.low or 0.0) > 0:
            yield (
                f"on {name} the model at its mean is less sure ({at_mean.confidence:.3f}) than it "
                f"is right ({at_mean.accuracy.value:.3f}), and averaging over samples makes it "
                f"less sure still ({drawn:.3f}): predict at the mean"
            )
