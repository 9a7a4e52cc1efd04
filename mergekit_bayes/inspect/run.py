"""What is in a checkpoint and its posterior, and how far another checkpoint is from it by layer.

Tensors are streamed in chunks (`totals`), so memory does not grow with the model. Of a model on the
Hub only the headers are read (`headers`), and its report has no values.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from statistics import median

from mergekit_bayes.checkpoint.layers import group_layers
from mergekit_bayes.checkpoint.rename_rules import Scope
from mergekit_bayes.checkpoint.renaming import find_renaming, renamed_note
from mergekit_bayes.checkpoint.sources import is_hub_id
from mergekit_bayes.checkpoint.specs import MERGEABLE, CheckpointSource
from mergekit_bayes.checkpoint.ties import stored_copies
from mergekit_bayes.errors import MismatchError
from mergekit_bayes.inspect.headers import inspect_headers
from mergekit_bayes.inspect.layers import count_dtypes, is_parameter, misfits
from mergekit_bayes.inspect.notes import layer_notes, mixture_notes
from mergekit_bayes.inspect.report import (
    Comparison,
    InspectReport,
    MixedRun,
    PrecisionSummary,
)
from mergekit_bayes.inspect.totals import LayerTotals, TensorMatch, difference_of
from mergekit_bayes.lora import open_model
from mergekit_bayes.models.sampling import MATRICES, sampling_obstacle, stored_prior
from mergekit_bayes.posterior import Posterior, PosteriorInfo, identify
from mergekit_bayes.posterior.alignment import needs_weights
from mergekit_bayes.posterior.directions import matrices_in
from mergekit_bayes.posterior.forms import is_form_of
from mergekit_bayes.posterior.grids import read_grids
from mergekit_bayes.posterior.information import Information, information
from mergekit_bayes.posterior.mixture import read_mixture
from mergekit_bayes.records import Progress


def run_inspect(
    model: str,
    other: str | None = None,
    precision: str | None = None,
    *,
    progress: Progress | None = None,
) -> InspectReport:
    """Read a checkpoint, its precision if it has one, and a second checkpoint to compare with.

    Args:
        model: A `.safetensors` file, a folder, or `org/name[@revision]`, of which only headers are
            read unless `other` or `precision` is given.
        other: The second checkpoint, likewise; its tensors are matched by name, also where
            these differ by a rule.
        precision: Where the precision lies, if not beside the model.
        progress: Called with (entries read, entries in all).

    Raises:
        CheckpointError: A file cannot be read.
        PrecisionError: A precision that was named does not exist.
        MismatchError: No tensor of `other` has a partner.
    """
    if other is None and precision is None and is_hub_id(model):
        return inspect_headers(model)
    with ExitStack() as stack:
        posterior = stack.enter_context(open_model(model, precision=precision))
        mean = posterior.mean
        tied = tuple(stored_copies(mean))
        buffers = tuple(n for n, spec in mean.specs.items() if not is_parameter(n, spec))
        names = [n for n in mean.specs if n not in tied and n not in buffers]
        match = None
        if other is not None:
            second = stack.enter_context(open_model(other, with_precision=False))
            match = _match(names, mean, second)
        totals = _read_layers(names, posterior, match, progress or _ignore)
        layers = tuple(total.report() for total in totals)
        summary = _precision_summary(posterior, names, totals)
        runs, matched = _mixed_runs(posterior), match.notes if match else ()
        return InspectReport(
            # BASE+ADAPTER has two paths, and both are what is shown.
            path=posterior.ref if posterior.parts else str(posterior.path),
            files=tuple(file.name for file in mean.files),
            bytes=sum(file.stat().st_size for file in mean.files),
            identity=identify(mean, full=False).blocks,
            tensors=len(mean.specs),
            parameters=sum(total.parameters for total in totals),
            dtypes=count_dtypes(mean.specs, names),
            buffers=buffers,
            tied=tied,
            layers=layers,
            precision=summary,
            comparison=_comparison(match, totals) if match else None,
            mixture=runs,
            notes=(*mixture_notes(posterior), *layer_notes(layers, summary), *matched),
        )


def _mixed_runs(model: Posterior) -> tuple[MixedRun, ...]:
    """The components of a mixture; none of any other model."""
    mixture = None if model.parts else read_mixture(model.path)
    if mixture is None:
        return ()
    places = [mixture.place(model.path, number) for number in range(len(mixture.components))]
    return tuple(
        MixedRun(label=component.label, weight=weight, path=str(place))
        for component, weight, place in zip(
            mixture.components, mixture.weights, places, strict=True
        )
    )


def _ignore(done: int, of: int) -> None:
    """A progress callback that shows nothing."""


def _read_layers(
    names: Iterable[str],
    posterior: Posterior,
    match: TensorMatch | None,
    progress: Progress,
) -> list[LayerTotals]:
    specs = posterior.mean.specs
    layers = group_layers(names)
    entries = sum(specs[name].size for members in layers.values() for name in members)
    done, totals = 0, []
    for layer, members in layers.items():
        total = LayerTotals(layer)
        for name in members:
            total.add(name, posterior, match)
            done += specs[name].size
            progress(done, entries)
        totals.append(total)
    return totals


def _match(names: list[str], mean: CheckpointSource, second: Posterior) -> TensorMatch:
    """Match the tensors of two checkpoints by name and shape, and by rules where names differ."""
    specs, other_specs = mean.specs, second.mean.specs
    rename = find_renaming(specs, other_specs, scope=Scope.REPLACED)
    by_our_name = {rename(name): name for name in other_specs}
    by_our_name |= {name: name for name in other_specs if name in specs}
    partners: Mapping[str, str] = {
        name: by_our_name[name]
        for name in names
        if name in by_our_name
        and other_specs[by_our_name[name]].shape == specs[name].shape
        and other_specs[by_our_name[name]].dtype in MERGEABLE
    }
    if not partners:
        raise MismatchError(
            f"'{second.ref}' has no tensor of the same name and shape as '{mean.files[0]}' "
            f"('{next(iter(other_specs), 'none')}' there, '{next(iter(names), 'none')}' here). "
            "Are they of one architecture?"
        )
    matched = set(partners.values())
    return TensorMatch(
        path=str(second.path),
        source=second.mean,
        partners=partners,
        only_here=tuple(name for name in names if name not in partners),
        only_there=tuple(
            name
            for name, spec in other_specs.items()
            if name not in matched and is_parameter(name, spec)
        ),
        notes=(renamed_note(second.ref, rename),) if rename.names else (),
    )


def _comparison(match: TensorMatch, totals: list[LayerTotals]) -> Comparison:
    difference = difference_of(total.difference for total in totals)
    return Comparison(
        path=match.path,
        parameters=difference.parameters,
        rms=difference.rms,
        relative=difference.relative,
        largest=difference.largest,
        only_here=match.only_here,
        only_there=match.only_there,
    )


def _precision_summary(
    posterior: Posterior, names: Sequence[str], totals: list[LayerTotals]
) -> PrecisionSummary | None:
    precision, mean = posterior.precision, posterior.mean
    # The precision of BASE+ADAPTER is made of that of the adapter's factors, which has the record.
    owner = posterior.parts[-1] if posterior.parts else posterior
    info = owner.info
    if precision is None:
        return None
    entries = sum(total.parameters for total in totals)
    covered = sum(total.precision.parameters for total in totals)
    to_mean = {stored: name for name, stored in posterior.renamed_precisions.items()}
    precision_specs = {to_mean.get(n, n): spec for n, spec in precision.specs.items()}
    unknown = misfits(precision_specs, mean.specs)
    matrices = len(matrices_in(precision))
    return PrecisionSummary(
        files=tuple(str(file) for file in precision.files),
        info=info,
        belongs=None if info is None else info.mean.blocks == owner.identity,
        covered=covered / entries if entries else 0.0,
        numbers=sum(total.precision.numbers for total in totals),
        unknown=tuple(unknown),
        misfits=unknown,
        zeros=sum(total.precision.zeros for total in totals),
        bad=sum(total.precision.bad for total in totals),
        information=_information(posterior, names, info),
        not_samplable=MATRICES if matrices else sampling_obstacle(info),
        # Of BASE+ADAPTER the factors are drawn, and the totals are those of their products.
        draws_over_rms=None if matrices or posterior.parts else _draws_over_rms(info, totals),
        matrices=matrices,
    )


def _draws_over_rms(info: PosteriorInfo | None, totals: list[LayerTotals]) -> float | None:
    """How wide the draws for predictions are, as `SamplingReport.sigma_over_rms` measures it."""
    if info is None or info.predictive is None:
        return None
    draws, inside = info.predictive, stored_prior(info)
    ratios = [
        (draws.temperature / (max(width.median - inside, 0) + draws.prior)) ** 0.5 / width.rms
        for total in totals
        for width in total.widths
        if width.rms > 0
    ]
    return median(ratios) if ratios else None


def _information(
    posterior: Posterior, names: Sequence[str], info: PosteriorInfo | None
) -> Information | None:
    """What a sample of the tensors with one number an entry says about the precision."""
    precision, specs = posterior.precision, posterior.mean.specs
    if precision is None or precision.is_computed:
        return None
    stored = {name: posterior.renamed_precisions.get(name, name) for name in names}
    by_entry = {
        name: other
        for name, other in stored.items()
        if other in precision.specs
        and precision.specs[other].shape == specs[name].shape
        and specs[name].size > 1
        and is_form_of(precision.specs[other], specs[name])
    }
    size = sum(specs[name].size for name in by_entry)
    if 2 * size < sum(specs[name].size for name in stored):  # it is pooled, but for vectors
        return None
    grids = read_grids(precision, by_entry)
    weights = read_grids(posterior.mean, {name: name for name in needs_weights(grids)})
    return information(grids, info, weights)
