"""What is in a checkpoint and its posterior, and how far another checkpoint is from it, layer by layer.

Tensors are streamed in chunks, without torch, so memory does not grow with the model. Quantiles come from a histogram
over the upper 16 bits of each float32 (sign, exponent, 7 bits of mantissa): 128 bins for every doubling, so a quantile
is within 0.4 % of the true one; least and largest values are exact.

Of a model on the Hub only the headers are read, by ranged requests, and nothing is fetched: its report has no values.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from mergekit_bayes import __version__
from mergekit_bayes.configs import Config
from mergekit_bayes.errors import CheckpointError, MismatchError
from mergekit_bayes.lora import open_model
from mergekit_bayes.names import Renaming, find_renaming, is_alias, is_buffer
from mergekit_bayes.plan import one_shape, row_shape
from mergekit_bayes.posterior import CheckpointSource, Posterior, PosteriorInfo, identify, parse_info
from mergekit_bayes.sampling import not_samplable
from mergekit_bayes.sources import file_sizes, is_hub_id, pinned, read_headers
from mergekit_bayes.tensors import MERGEABLE, Array, TensorSource, TensorSpec, chunks, read_chunk, read_tensor

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_CHUNK = 1 << 18  # elements
_BINS = 1 << 16
_WIDE = 0.1  # IVON's noise should stay below this share of the weights' RMS

Progress = Callable[[int, int], None]  # (done, of), elements


class PrecisionLayer(Config):
    """The precision of a layer, 1/weight^2.

    Attributes:
        quantiles: Least, the `QUANTILES`, largest.
        sigma_ratio: Posterior deviation at the median precision over the RMS of the weights.
        zeros: Entries without any precision.
    """

    parameters: int
    quantiles: tuple[float, ...]
    sigma_ratio: float | None
    zeros: int
    bad: int


class DifferenceLayer(Config):
    """How far the other model's layer is from the first's: RMS and largest entry of the difference, in weights.

    `relative` is the RMS over that of the first model's weights; None if those are zero.
    """

    parameters: int
    rms: float
    relative: float | None
    largest: float


class Layer(Config):
    """Parameters of one layer. `bad` counts entries that are not finite, which `rms` and `largest` leave out.

    Those three are None where only headers were read.
    """

    name: str
    tensors: int
    parameters: int
    rms: float | None
    largest: float | None
    bad: int | None
    precision: PrecisionLayer | None = None
    difference: DifferenceLayer | None = None


class PrecisionSummary(Config):
    """Where the precision lies, who made it and whether it can be trusted.

    Attributes:
        info: All that its author wrote; None for a file from elsewhere.
        belongs: Whether it was made for these weights (identity by sampled blocks); None if it does not say.
        covered: Share of the model's parameters that have a precision.
        numbers: Precisions that are stored for them: fewer where one stands for a row or a tensor.
        unknown: Its tensors that the model lacks, or has in another shape.
        zeros, bad: Parameters whose precision is zero; is negative or not finite. None where only headers were read.
        not_samplable: Why weights cannot be drawn from it (`bmerge evaluate --samples`) unless a prior is given.
    """

    files: tuple[str, ...]
    info: PosteriorInfo | None
    belongs: bool | None
    covered: float
    numbers: int
    unknown: tuple[str, ...]
    zeros: int | None
    bad: int | None
    not_samplable: str | None = None


class Comparison(Config):
    """The other model. `only_here` and `only_there` are tensors without a partner of the same shape."""

    path: str
    parameters: int
    rms: float
    relative: float | None
    largest: float
    only_here: tuple[str, ...]
    only_there: tuple[str, ...]


class InspectReport(Config):
    """What is in a checkpoint.

    Attributes:
        path: A local path, or the Hub id with its commit.
        identity: SHA-256 by sampled blocks; None where only headers were read.
        parameters: Without buffers and tied copies.
        dtypes: Parameters by the dtype that holds them.
        buffers: Tensors that are no parameters.
        tied: Stored copies of another tensor.
        layers: Embeddings, layers in order, the rest, the head.
        notes: What deserves a look.
    """

    version: str = __version__
    path: str
    files: tuple[str, ...]
    bytes: int
    identity: str | None
    tensors: int
    parameters: int
    dtypes: dict[str, int]
    buffers: tuple[str, ...]
    tied: tuple[str, ...]
    layers: tuple[Layer, ...]
    precision: PrecisionSummary | None
    comparison: Comparison | None
    quantiles: tuple[float, ...] = (0.0, *QUANTILES, 1.0)
    notes: tuple[str, ...]


def run_inspect(
    model: str, other: str | None = None, precision: str | None = None, *, progress: Progress | None = None
) -> InspectReport:
    """Read a checkpoint, its precision if it has one, and perhaps a second checkpoint to compare with.

    Args:
        model: A `.safetensors` file, a folder, or `org/name[@revision]`, of which only headers are read unless `other`
            or `precision` ask for more.
        other: The same; its tensors are matched by name, up to one common prefix.
        precision: Where the precision lies, if not beside the model.
        progress: Called with (elements read, elements in all).

    Raises:
        CheckpointError: A file that cannot be read.
        PrecisionError: A precision that was named but is not there.
        MismatchError: No tensor of `other` has a partner.
    """
    if other is None and precision is None and is_hub_id(model):
        return _inspect_headers(model)
    with ExitStack() as stack:
        posterior = open_model(model, precision=precision)
        stack.callback(posterior.close)
        mean = posterior.mean
        tied = tuple(n for n in mean.specs if is_alias(n, mean))
        buffers = tuple(n for n in mean.specs if is_buffer(n) or mean.specs[n].dtype not in MERGEABLE)
        names = [n for n in mean.specs if n not in tied and n not in buffers]
        there = None
        if other is not None:
            second = open_model(other, with_precision=False)
            stack.callback(second.close)
            there = _match(names, mean, second)
        entries = sum(mean.specs[n].size for n in names)
        count, done = progress or (lambda done, of: None), 0
        totals = []
        for layer, members in _layers(names).items():
            total = _Totals(layer)
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
            notes=tuple(_notes(layers, summary)),
        )


def _inspect_headers(ref: str) -> InspectReport:
    """What the headers of a Hub repository say."""
    sizes = file_sizes(ref)
    files = _chosen(sizes, "model.safetensors", "model-?????-of-?????.safetensors") or _chosen(
        sizes, "adapter_model.safetensors", "adapter_model-?????-of-?????.safetensors"
    )
    beside = _chosen(sizes, "posterior/precision.safetensors", "posterior/precision-?????-of-?????.safetensors")
    if not files and not beside:
        raise CheckpointError(
            f"'{ref}' holds neither safetensors of a model nor a precision. If its tensors are in pickles: "
            f"`bmerge convert {ref} -o OUT`."
        )
    headers = {h.name: h for h in read_headers(ref, (*files, *beside))}
    mean = {n: TensorSpec(t.dtype, t.shape) for f in files for n, t in headers[f].tensors.items()}
    buffers = tuple(n for n, spec in mean.items() if is_buffer(n) or spec.dtype not in MERGEABLE)
    names = [n for n in mean if n not in buffers]
    layers = []
    for layer, members in _layers(names).items():
        count = sum(mean[n].size for n in members)
        layers.append(Layer(name=layer, tensors=len(members), parameters=count, rms=None, largest=None, bad=None))
    dtypes = Counter[str]()
    for name in names:
        dtypes[mean[name].dtype] += mean[name].size
    summary, notes = None, ["only headers were read; fetch the model (`hf download`) to see values"]
    if beside:
        precision = {n: TensorSpec(t.dtype, t.shape) for f in beside for n, t in headers[f].tensors.items()}
        info = parse_info(headers[beside[0]].metadata, Path(beside[0]))
        fitting = [n for n in names if _fits(precision.get(n), mean[n])]
        entries = sum(dtypes.values())
        summary = PrecisionSummary(
            files=beside,
            info=info,
            belongs=None,
            covered=sum(mean[n].size for n in fitting) / entries if entries else 0.0,
            numbers=sum(precision[n].size for n in fitting),
            unknown=tuple(n for n in precision if n not in mean or not _fits(precision[n], mean[n])) if files else (),
            zeros=None,
            bad=None,
            not_samplable=not_samplable(info),
        )
    return InspectReport(
        path=pinned(ref),
        files=files,
        bytes=sum(sizes[f] for f in files),
        identity=None,
        tensors=len(mean),
        parameters=sum(dtypes.values()),
        dtypes=dict(dtypes),
        buffers=buffers,
        tied=(),
        layers=tuple(layers),
        precision=summary,
        comparison=None,
        notes=tuple(notes),
    )


def _chosen(sizes: Mapping[str, int], single: str, shards: str) -> tuple[str, ...]:
    return (single,) if single in sizes else tuple(sorted(n for n in sizes if fnmatchcase(n, shards)))


class _Match:
    """Which tensors of the second checkpoint belong to which of the first."""

    def __init__(self, path: str, source: TensorSource, names: Mapping[str, str], here: list[str], there: list[str]):
        self.path, self.source, self.names = path, source, names
        self.only_here, self.only_there = here, there


class _Totals:
    """Sums over a layer, kept while streaming."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.tensors = self.parameters = self.bad = 0
        self.squares = self.largest = 0.0
        self.held = self.numbers = self.zeros = self.bad_precision = 0
        self.held_squares, self.least, self.most = 0.0, np.inf, -np.inf
        self.histogram = np.zeros(_BINS, np.int64)
        self.compared, self.compared_squares, self.gap_squares, self.gap = 0, 0.0, 0.0, 0.0

    def add(self, name: str, posterior: Posterior, there: _Match | None) -> None:
        spec = posterior.mean.specs[name]
        self.tensors += 1
        precision = posterior.precision
        if precision is not None and not _fits(precision.specs.get(name), spec):
            precision = None
        pooled = precision is not None and precision.specs[name].size < spec.size
        partner = there.names.get(name) if there else None
        for start, stop in chunks(spec, _CHUNK):
            weights = read_chunk(posterior.mean, name, start, stop).astype(np.float64)
            finite = weights[np.isfinite(weights)]
            self.parameters += weights.size
            self.bad += weights.size - finite.size
            squares = float(finite @ finite)
            self.squares += squares
            self.largest = max(self.largest, float(np.abs(finite).max(initial=0.0)))
            if precision is not None:
                self.held_squares += squares
            if precision is not None and not pooled:
                self._add_precision(read_chunk(precision, name, start, stop))
            if there is not None and partner is not None:
                self._add_gap(weights, read_chunk(there.source, partner, start, stop))
        if precision is not None and pooled:
            values = read_tensor(precision, name).reshape(-1)
            self._add_precision(values, each=spec.size // values.size)

    def _add_precision(self, values: Array, each: int = 1) -> None:
        """Add precisions, each of which stands for so many parameters."""
        values = values.astype(np.float32)
        good = values[np.isfinite(values) & (values >= 0)]
        self.held += values.size * each
        self.numbers += values.size
        self.bad_precision += (values.size - good.size) * each
        self.zeros += int(np.count_nonzero(good == 0)) * each
        if good.size:
            self.least, self.most = min(self.least, float(good.min())), max(self.most, float(good.max()))
        # + 0.0 turns a negative zero, whose bits sort last, into zero.
        self.histogram += each * np.bincount((good + np.float32(0)).view(np.uint32) >> 16, minlength=_BINS)

    def _add_gap(self, here: Array, there: Array) -> None:
        both = np.isfinite(here) & np.isfinite(there)
        here, gap = here[both], there[both].astype(np.float64) - here[both]
        self.compared += here.size
        self.compared_squares += float(here @ here)
        self.gap_squares += float(gap @ gap)
        self.gap = max(self.gap, float(np.abs(gap).max(initial=0.0)))

    def report(self) -> Layer:
        good = self.parameters - self.bad
        return Layer(
            name=self.name,
            tensors=self.tensors,
            parameters=self.parameters,
            rms=_rms(self.squares, good),
            largest=self.largest,
            bad=self.bad,
            precision=self._precision() if self.held else None,
            difference=self._difference() if self.compared else None,
        )

    def _precision(self) -> PrecisionLayer:
        if self.least > self.most:  # nothing but bad entries
            return PrecisionLayer(parameters=self.held, quantiles=(), sigma_ratio=None, zeros=0, bad=self.bad_precision)
        inner = [min(max(q, self.least), self.most) for q in _histogram_quantiles(self.histogram)]
        median, scale = inner[QUANTILES.index(0.5)], _rms(self.held_squares, self.held)
        return PrecisionLayer(
            parameters=self.held,
            quantiles=(self.least, *inner, self.most),
            sigma_ratio=median**-0.5 / scale if median > 0 and scale > 0 else None,
            zeros=self.zeros,
            bad=self.bad_precision,
        )

    def _difference(self) -> DifferenceLayer:
        rms, scale = _rms(self.gap_squares, self.compared), _rms(self.compared_squares, self.compared)
        return DifferenceLayer(
            parameters=self.compared, rms=rms, relative=rms / scale if scale > 0 else None, largest=self.gap
        )


def _rms(squares: float, count: int) -> float:
    return float((squares / count) ** 0.5) if count else 0.0


def _histogram_quantiles(histogram: Array) -> list[float]:
    """Middles of the bins that hold the `QUANTILES`."""
    sums = histogram.cumsum()
    places = np.searchsorted(sums, np.array(QUANTILES) * sums[-1]).astype(np.uint32)
    edges = np.stack([places << 16, np.minimum(places + 1, 0x7F7F) << 16]).view(np.float32).astype(np.float64)
    return [0.0 if place == 0 else float(x) for place, x in zip(places, edges.mean(axis=0), strict=True)]


_NUMBERED = re.compile(r"^(.*?(?:^|\.)\d+)(?=\.)")
_EMBEDDING = re.compile(r"(^|\.)(wte|wpe|embed\w*|tok_embeddings|shared|\w*embeddings?)(\.|$)")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|score|classifier|cls|qa_outputs|pooler)(\.|$)")


def _layers(names: list[str]) -> dict[str, list[str]]:
    """Names by layer: embeddings first, numbered layers in order, the rest, the head."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name in names:
        groups.setdefault(_layer_key(name), []).append(name)
    return {str(key[-1]): groups[key] for key in sorted(groups)}


def _layer_key(name: str) -> tuple[Any, ...]:
    if _HEAD.search(name):
        return (3, "", 0, "head")
    if numbered := _NUMBERED.match(name):
        stack, _, index = numbered[1].rpartition(".")
        return (1, stack, int(index), numbered[1])
    return (0, "", 0, "embeddings") if _EMBEDDING.search(name) else (2, "", 0, "rest")


def _match(names: list[str], mean: CheckpointSource, second: Posterior) -> _Match:
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
            f"('{next(iter(second.mean.specs), 'none')}' there, '{next(iter(names), 'none')}' here). "
            "Are they of one architecture?"
        )
    taken = set(pairs.values())
    there = [
        n for n, spec in second.mean.specs.items() if n not in taken and not is_buffer(n) and spec.dtype in MERGEABLE
    ]
    return _Match(str(second.path), second.mean, pairs, [n for n in names if n not in pairs], there)


def _comparison(there: _Match, totals: list[_Totals]) -> Comparison:
    entries = sum(t.compared for t in totals)
    rms = _rms(sum(t.gap_squares for t in totals), entries)
    scale = _rms(sum(t.compared_squares for t in totals), entries)
    return Comparison(
        path=there.path,
        parameters=entries,
        rms=rms,
        relative=rms / scale if scale > 0 else None,
        largest=max(t.gap for t in totals),
        only_here=tuple(there.only_here),
        only_there=tuple(there.only_there),
    )


def _fits(precision: TensorSpec | None, mean: TensorSpec) -> bool:
    """Whether a precision has one number for each entry, row, or for all of a tensor."""
    shapes = (mean.shape, row_shape(mean.shape), one_shape(mean.shape), ())
    return precision is not None and precision.dtype in MERGEABLE and precision.shape in shapes


def _precision_summary(posterior: Posterior, names: list[str], totals: list[_Totals]) -> PrecisionSummary | None:
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
            n for n, spec in precision.specs.items() if n not in mean.specs or not _fits(spec, mean.specs[n])
        ),
        zeros=sum(t.zeros for t in totals),
        bad=sum(t.bad_precision for t in totals),
        not_samplable=not_samplable(info),
    )


def _notes(layers: tuple[Layer, ...], precision: PrecisionSummary | None) -> Iterator[str]:
    if bad := sum(layer.bad or 0 for layer in layers):
        yield f"{bad:,} weights are not finite"
    if precision is None:
        yield "no precision: make one with `bmerge precision`, or fine-tune with IVON"
        return
    if precision.belongs is False:
        yield "the precision was made for other weights"
    if precision.info is None:
        yield "the precision does not say where it comes from; it is taken as summed over the data, prior 0"
    if precision.bad:
        yield f"{precision.bad:,} entries of the precision are negative or not finite"
    if precision.zeros:
        yield f"{precision.zeros:,} entries of the precision are zero"
    if precision.covered < 1:
        yield f"{1 - precision.covered:.1%} of the parameters have no precision"
    held = sum(layer.precision.parameters for layer in layers if layer.precision is not None)
    if precision.numbers < held:
        yield f"the precision is pooled: {precision.numbers:,} numbers stand for {held:,} parameters"
    if precision.unknown:
        yield f"{len(precision.unknown)} tensors of the precision fit none of the model, '{precision.unknown[0]}' first"
    if precision.info is None or precision.info.estimator != "ivon":
        return  # the optimizer's own health says nothing about a curvature that was measured afterwards
    for key, bound, why in (
        ("init_fraction", 0.5, "more than half of IVON's curvature is still its initial value"),
        ("kappa", 1.0, "IVON's curvature is mostly noise"),
    ):
        value = precision.info.health.get(key)
        if isinstance(value, (int, float)) and value > bound:
            yield f"{key} {value:.3g}: {why}"
    wide = [x.name for x in layers if x.precision and x.precision.sigma_ratio and x.precision.sigma_ratio > _WIDE]
    if wide:
        yield f"IVON's noise was above a tenth of the weights' RMS in {', '.join(wide)}; raise ess or hess_init"
