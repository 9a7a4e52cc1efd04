"""Inspect a model on the Hub by its headers alone."""

from collections import Counter
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from mergekit_bayes.checkpoint.names import is_buffer
from mergekit_bayes.checkpoint.sources import file_sizes, pinned, read_headers
from mergekit_bayes.checkpoint.specs import MERGEABLE, TensorSpec
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.inspect.layers import group_layers
from mergekit_bayes.inspect.report import InspectReport, Layer, PrecisionSummary
from mergekit_bayes.models.sampling import sampling_obstacle
from mergekit_bayes.posterior import parse_info
from mergekit_bayes.posterior.forms import is_form_of


def inspect_headers(ref: str) -> InspectReport:
    """What the headers of a Hub repository say."""
    sizes = file_sizes(ref)
    files = _chosen(sizes, "model.safetensors", "model-?????-of-?????.safetensors") or _chosen(
        sizes, "adapter_model.safetensors", "adapter_model-?????-of-?????.safetensors"
    )
    beside = _chosen(
        sizes, "posterior/precision.safetensors", "posterior/precision-?????-of-?????.safetensors"
    )
    if not files and not beside:
        raise CheckpointError(
            f"'{ref}' holds neither safetensors of a model nor a precision. If its tensors are in "
            "pickles: "
            f"`bmerge convert {ref} -o OUT`."
        )
    headers = {h.name: h for h in read_headers(ref, (*files, *beside))}
    mean = {n: TensorSpec(t.dtype, t.shape) for f in files for n, t in headers[f].tensors.items()}
    buffers = tuple(n for n, spec in mean.items() if is_buffer(n) or spec.dtype not in MERGEABLE)
    names = [n for n in mean if n not in buffers]
    layers = []
    for layer, members in group_layers(names).items():
        count = sum(mean[n].size for n in members)
        layers.append(
            Layer(
                name=layer, tensors=len(members), parameters=count, rms=None, largest=None, bad=None
            )
        )
    dtypes = Counter[str]()
    for name in names:
        dtypes[mean[name].dtype] += mean[name].size
    summary, notes = None, ["only headers were read; fetch the model (`hf download`) to see values"]
    if beside:
        precision = {
            n: TensorSpec(t.dtype, t.shape) for f in beside for n, t in headers[f].tensors.items()
        }
        info = parse_info(headers[beside[0]].metadata, Path(beside[0]))
        fitting = [n for n in names if is_form_of(precision.get(n), mean[n])]
        entries = sum(dtypes.values())
        summary = PrecisionSummary(
            files=beside,
            info=info,
            belongs=None,
            covered=sum(mean[n].size for n in fitting) / entries if entries else 0.0,
            numbers=sum(precision[n].size for n in fitting),
            unknown=tuple(
                n for n in precision if n not in mean or not is_form_of(precision[n], mean[n])
            )
            if files
            else (),
            zeros=None,
            bad=None,
            not_samplable=sampling_obstacle(info),
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
    return (
        (single,) if single in sizes else tuple(sorted(n for n in sizes if fnmatchcase(n, shards)))
    )
