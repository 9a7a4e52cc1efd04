"""What is in a checkpoint and its posterior, and how far another checkpoint is from it, layer by
layer.

Tensors are streamed in chunks, without torch, so memory does not grow with the model. Quantiles
come from a histogram over the upper 16 bits of each float32 (sign, exponent, 7 bits of mantissa):
128 bins for every doubling, so a quantile is within 0.4 % of the true one; least and largest values
are exact.

Of a model on the Hub only the headers are read, by ranged requests, and nothing is fetched: its
report has no values.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack

from mergekit_bayes.checkpoint.names import Renaming, find_renaming, is_alias, is_buffer
from mergekit_bayes.checkpoint.sources import is_hub_id
from mergekit_bayes.checkpoint.specs import MERGEABLE, CheckpointSource
from mergekit_bayes.errors import MismatchError
from mergekit_bayes.inspect.headers import inspect_headers
from mergekit_bayes.inspect.layers import group_layers
from mergekit_bayes.inspect.report import Comparison, InspectReport, PrecisionSummary, layer_notes
from mergekit_bayes.inspect.totals import LayerTotals, TensorMatch, root_mean_square
from mergekit_bayes.lora import open_model
from mergekit_bayes.models.sampling import sampling_obstacle
from mergekit_bayes.posterior import Posterior, identify
from mergekit_bayes.posterior.forms import is_form_of

Progress = Callable[[int, int], None]  # (done, of), elements


def run_inspect(
    model: str,
    other: str | None = None,
    precision: str | None = None,
    *,
    progress: Progress | None = None,
) -> InspectReport:
    """Read a checkpoint, its precision if it has one, and perhaps a second checkpoint to compare
    with.

    Args:
        model: A `.safetensors` file, a folder, or `org/name[@revision]`, of which only headers are
            read unless `other` or `precision` ask for more.
        other: The same; its tensors are matched by name, up to one common prefix.
        precision: Where the precision lies, if not beside the model.
        progress: Called with (elements read, elements in all).

    Raises:
        CheckpointError: A file that cannot be read.
        PrecisionError: A precision that was named but is not there.
        MismatchError: No tensor of `other` has a partner.
    """
    if other is None and precision is None and is_hub_id(model):
        return inspect_headers(model)
    with ExitStack() as stack:
        posterior = open_model(model, precision=precision)
        stack.callback(posterior.close)
        mean = posterior.mean
        tied = tuple(n for n in mean.specs if is_alias(n, mean))
        buffers = tuple(
            n for n in mean.specs if is_buffer(n) or mean.specs[n].dtype not in MERGEABLE
        )
        names = [n for n in mean.specs if n not in tied and n not in buffers]
        there = None
        if other is not None:
            second = open_model(other, with_precision=False)
            stack.callback(second.close)
            there = _match(names, mean, second)
        entries = sum(mean.specs[n].size for n in names)
        count, done = progress or (lambda done, of: None), 0
        totals = []
        for layer, members in group_layers(names).items():
            total = LayerTotals(layer)
            for name in members:
                total.add(name, posterior, there)
                done += mean.specs[name].size
                count(done, entries)
            totals.append(total)
        layers = tuple(t.report() for t in totals)
        summary = _precision_summary(posterior, names, totals)
        dtypes = Counter[str]()
        for name in names:
            dtypes[mean.specs[name].dtype] += mean.specs[name].size
        return InspectReport(
            path=str(posterior.path),
            files=tuple(p.name for p in mean.files),
            bytes=sum(p.stat().st_size for p in mean.files),
            identity=identify(mean, full=False).blocks,
            tensors=len(mean.specs),
            parameters=entries,
            dtypes=dict(dtypes),
            buffers=buffers,
            tied=tied,
            layers=layers,
            precision=summary,
            comparison=_comparison(there, totals) if there else None,
            notes=tuple(layer_notes(layers, summary)),
        )


def _match(names: list[str], mean: CheckpointSource, second: Posterior) -> TensorMatch:
    rename: Renaming = find_renaming(mean.specs, second.mean.specs)
    partners = {rename(n, mean.specs): n for n in second.mean.specs}
    pairs = {
        n: partners[n]
        for n in names
        if n in partners
        and second.mean.specs[partners[n]].shape == mean.specs[n].shape
        and second.mean.specs[partners[n]].dtype in MERGEABLE
    }
    if not pairs:
        raise MismatchError(
            f"'{second.ref}' has no tensor of the same name and shape as '{mean.files[0]}' "
            f"('{next(iter(second.mean.specs), 'none')}' there, '{next(iter(names), 'none')}' "
            "here). "
            "Are they of one architecture?"
        )
    taken = set(pairs.values())
    there = [
        n
        for n, spec in second.mean.specs.items()
        if n not in taken and not is_buffer(n) and spec.dtype in MERGEABLE
    ]
    return TensorMatch(
        str(second.path), second.mean, pairs, [n for n in names if n not in pairs], there
    )


def _comparison(there: TensorMatch, totals: list[LayerTotals]) -> Comparison:
    entries = sum(t.compared for t in totals)
    rms = root_mean_square(sum(t.gap_squares for t in totals), entries)
    scale = root_mean_square(sum(t.compared_squares for t in totals), entries)
    return Comparison(
        path=there.path,
        parameters=entries,
        rms=rms,
        relative=rms / scale if scale > 0 else None,
        largest=max(t.gap for t in totals),
        only_here=tuple(there.only_here),
        only_there=tuple(there.only_there),
    )


def _precision_summary(
    posterior: Posterior, names: list[str], totals: list[LayerTotals]
) -> PrecisionSummary | None:
    precision, mean, info = posterior.precision, posterior.mean, posterior.info
    if precision is None:
        return None
    entries = sum(t.parameters for t in totals)
    return PrecisionSummary(
        files=tuple(str(p) for p in precision.files),
        info=info,
        belongs=None if info is None else info.mean.blocks == identify(mean, full=False).blocks,
        covered=sum(t.held for t in totals) / entries if entries else 0.0,
        numbers=sum(t.numbers for t in totals),
        unknown=tuple(
            n
            for n, spec in precision.specs.items()
            if n not in mean.specs or not is_form_of(spec, mean.specs[n])
        ),
        zeros=sum(t.zeros for t in totals),
        bad=sum(t.bad_precision for t in totals),
        not_samplable=sampling_obstacle(info),
    )
