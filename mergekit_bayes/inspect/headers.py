"""Inspect a model on the Hub by its headers alone: names, shapes, dtypes, and what made them."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from mergekit_bayes.checkpoint.layers import group_layers
from mergekit_bayes.checkpoint.layout import POSTERIOR_ENDING, POSTERIOR_FOLDER
from mergekit_bayes.checkpoint.remote import RemoteHeader, file_sizes, read_headers
from mergekit_bayes.checkpoint.sources import pinned
from mergekit_bayes.checkpoint.specs import TensorSpec
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.inspect.layers import count_dtypes, is_parameter, misfits
from mergekit_bayes.inspect.report import InspectReport, LayerReport, PrecisionSummary
from mergekit_bayes.models.sampling import MATRICES, sampling_obstacle
from mergekit_bayes.posterior import parse_info
from mergekit_bayes.posterior.forms import is_form_of
from mergekit_bayes.posterior.stored import stored_tensors

_NOTE = "only headers were read; fetch the model (`hf download`) to see values"


def inspect_headers(ref: str) -> InspectReport:
    """The report of a Hub repository, without values.

    Args:
        ref: `org/name[@revision]`.

    Raises:
        CheckpointError: The Hub refused, or the repository holds neither a model nor a precision.
    """
    sizes = file_sizes(ref)
    files = _of_stem(sizes, "model") or _of_stem(sizes, "adapter_model")
    stem = f"{POSTERIOR_FOLDER}/precision"
    precision_files = _of_stem(sizes, stem, POSTERIOR_ENDING) or _of_stem(sizes, stem)
    if not files and not precision_files:
        raise CheckpointError(
            f"'{ref}' holds neither safetensors of a model nor a precision. If its tensors are in "
            f"pickles: `bmerge convert {ref} -o OUT`."
        )
    headers = {header.name: header for header in read_headers(ref, (*files, *precision_files))}
    mean = _specs(headers[file] for file in files)
    buffers = tuple(name for name, spec in mean.items() if not is_parameter(name, spec))
    names = [name for name in mean if name not in buffers]
    dtypes = count_dtypes(mean, names)
    summary = None
    if precision_files:
        summary = _precision_summary([headers[file] for file in precision_files], mean, names)
    return InspectReport(
        path=pinned(ref),
        files=files,
        bytes=sum(sizes[file] for file in files),
        identity=None,
        tensors=len(mean),
        parameters=sum(dtypes.values()),
        dtypes=dtypes,
        buffers=buffers,
        tied=(),
        layers=tuple(
            LayerReport(
                name=layer,
                tensors=len(members),
                parameters=sum(mean[name].size for name in members),
                rms=None,
                largest=None,
                bad=None,
            )
            for layer, members in group_layers(names).items()
        ),
        precision=summary,
        comparison=None,
        notes=(_NOTE,),
    )


def _of_stem(sizes: Mapping[str, int], stem: str, ending: str = ".safetensors") -> tuple[str, ...]:
    """The file of this stem and ending, or its shards."""
    single = f"{stem}{ending}"
    if single in sizes:
        return (single,)
    shards = f"{stem}-?????-of-?????{ending}"
    return tuple(sorted(path for path in sizes if fnmatchcase(path, shards)))


def _specs(headers: Iterable[RemoteHeader]) -> dict[str, TensorSpec]:
    return {name: spec for header in headers for name, spec in header.tensors.items()}


def _precision_summary(
    headers: list[RemoteHeader], mean: Mapping[str, TensorSpec], names: list[str]
) -> PrecisionSummary:
    file = Path(headers[0].name)
    info = parse_info(headers[0].metadata, file)
    tensors = stored_tensors(_specs(headers), info, file)
    precision = {name: tensor.spec for name, tensor in tensors.items()}
    entries = sum(mean[name].size for name in names)
    covered = [name for name in names if is_form_of(precision.get(name), mean[name])]
    unknown = misfits(precision, mean) if mean else {}
    matrices = sum(tensors[name].has_matrices for name in covered)
    return PrecisionSummary(
        files=tuple(header.name for header in headers),
        info=info,
        belongs=None,
        covered=sum(mean[name].size for name in covered) / entries if entries else 0.0,
        numbers=sum(tensors[name].numbers for name in covered),
        unknown=tuple(unknown),
        misfits=unknown,
        zeros=None,
        bad=None,
        not_samplable=MATRICES if matrices else sampling_obstacle(info),
        matrices=matrices,
    )
