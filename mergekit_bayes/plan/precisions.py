"""Which precision belongs to which tensor, and whether precisions agree."""

import math
from collections.abc import Sequence

import numpy as np

from mergekit_bayes.checkpoint.codec import read_chunk
from mergekit_bayes.checkpoint.identity import block_hash, identity
from mergekit_bayes.checkpoint.layout import precision_path
from mergekit_bayes.checkpoint.names import Renaming, find_renaming, tied_source
from mergekit_bayes.checkpoint.specs import TensorSpec
from mergekit_bayes.errors import PrecisionError
from mergekit_bayes.plan.settings import MergeConfig
from mergekit_bayes.plan.steps import Found
from mergekit_bayes.plan.weigh import known_info
from mergekit_bayes.posterior import Posterior
from mergekit_bayes.posterior.forms import one_shape, row_shape


def donor_precision(
    name: str, source: str, models: Sequence[Posterior]
) -> tuple[Found | None, ...] | None:
    """For a tensor that is copied: only the donor's precision is needed, and none is written if it
    has none.
    """
    donor = models[0]
    if donor.precision is None:
        return (None,) if donor.isotropic is not None else None
    own = _precision_name(name, source, donor)
    if own is None:
        return None
    _check_shape(own, source, donor)
    return (Found(0, own),)


def _check_shape(own: str, source: str, model: Posterior) -> None:
    assert model.precision is not None
    there, expected = model.precision.specs[own], model.mean.specs[source].shape
    allowed = (expected, row_shape(expected), one_shape(expected), ())
    if there.dtype not in ("F32", "BF16", "F64") or there.shape not in allowed:
        raise PrecisionError(
            f"the precision of '{own}' in {model.precision.where(own)} is {there.dtype} "
            f"{list(there.shape)}, "
            f"expected F32 or BF16 {list(expected)} like the mean's, one number a row "
            f"{list(row_shape(expected))}, "
            f"or one number {list(one_shape(expected))}."
        )


def match_precisions(
    config: MergeConfig, name: str, sources: Sequence[Found], models: Sequence[Posterior]
) -> tuple[tuple[Found | None, ...] | None, set[int]]:
    """Each model's precision of a tensor (None: one number), and the tasks that left the tensor
    alone.

    A task that has no precision for a tensor and the base's values in it was frozen there: it
    counts as unchanged. The precisions are None if no model has one and all means agree.
    """
    result: list[Found | None] = []
    missing: list[int] = []
    for i, source in enumerate(sources):
        model = models[source.model]
        if model.precision is None:
            result.append(None)
            continue
        own = _precision_name(name, source.name, model)
        if own is None:
            missing.append(i)
            result.append(None)
            continue
        _check_shape(own, source.name, model)
        result.append(Found(source.model, own))
    same = {i for i in missing if _agree(sources[i], sources[0], models)}
    with_files = [i for i, s in enumerate(sources) if models[s.model].precision is not None]
    if missing and missing == with_files and len(same) == len(missing):
        return None, set()
    if 0 not in missing and same == set(missing) and config.base is not None:
        return tuple(result[0] if i in same else found for i, found in enumerate(result)), same
    first = next((i for i in missing if i not in same), missing[0]) if missing else 0
    if not missing:
        return tuple(result), set()
    model = models[sources[first].model]
    looked = model.precision.files[0] if model.precision is not None else model.path
    raise PrecisionError(
        f"no precision for '{name}' of '{model.ref}' (looked in {looked}). "
        "Was it frozen in training? Make a full one with `bmerge precision`, or leave the tensor "
        "out with --only."
    )


def _agree(a: Found, b: Found, models: Sequence[Posterior]) -> bool:
    """Whether two tensors hold the same values, in one dtype or two, by their sampled blocks."""
    left, right = models[a.model].mean, models[b.model].mean
    one, other = left.specs[a.name], right.specs[b.name]
    if one == other:
        return block_hash(left, a.name) == block_hash(right, b.name)
    if one.shape != other.shape:
        return False
    size, last = one.size, max(one.size - _SAMPLE, 0)
    for start in {last * i // (_SAMPLES - 1) for i in range(_SAMPLES)}:
        stop = min(start + _SAMPLE, size)
        if not np.array_equal(
            read_chunk(left, a.name, start, stop), read_chunk(right, b.name, start, stop)
        ):
            return False
    return True


_SAMPLE, _SAMPLES = 1024, 16  # entries of a block, and blocks


def precision_shape(
    config: MergeConfig,
    spec: TensorSpec,
    precisions: Sequence[Found | None],
    models: Sequence[Posterior],
    merged: int,
) -> tuple[int, ...]:
    """The coarsest shape that holds the merged precision; pooled ones stay kilobytes."""
    shapes = set()
    for found in precisions:
        there = one_shape(spec.shape)
        if found is not None:
            source = models[found.model].precision
            assert source is not None
            there = source.specs[found.name].shape
        if config.pool == "tensor":
            there = one_shape(spec.shape)
        elif config.pool == "row" and math.prod(there) > 1:
            there = row_shape(spec.shape)
        shapes.add(
            "entry"
            if there[1:] != row_shape(there)[1:]
            else "row"
            if math.prod(there) > 1
            else "tensor"
        )
    by_row = config.shrink is not None and config.shrink.startswith("row:")
    if "entry" in shapes:
        return spec.shape
    finer = "row" in shapes or by_row or 0 < merged < spec.size
    return row_shape(spec.shape) if finer else one_shape(spec.shape)


def _precision_name(name: str, source: str, model: Posterior) -> str | None:
    assert model.precision is not None
    specs = model.precision.specs
    aliases = model.info.aliases if model.info else {}
    candidates = [source, name, aliases.get(source), tied_source(source, model.mean)]
    for candidate in candidates:
        if candidate is not None and candidate in specs:
            return candidate
    renamed = find_renaming(model.mean.specs, specs)
    return (
        next((n for n in specs if renamed(n, model.mean.specs) == source), None)
        if renamed != Renaming()
        else None
    )


def check_precisions(config: MergeConfig, models: Sequence[Posterior], notes: list[str]) -> None:
    for model in models:
        if not model.has_precision:
            looked = precision_path(model.path)
            make = f"bmerge precision {model.ref} --data TEXTS"
            if model.path.is_file():  # a model is run from its folder
                make = f"bmerge precision FOLDER --data TEXTS -o {looked}"
            raise PrecisionError(
                f"no precision for '{model.ref}' (looked for '{looked}'). Fine-tune it with IVON, "
                "make one with "
                f"`{make}`, name one with --precision {model.ref}=PATH, give one number with "
                "--isotropic "
                f"{model.ref}=X, or merge with --weights uniform."
            )
        if model.info is None and known_info(model) is not None:
            continue  # an adapter, whose own precision was checked when it was opened
        if model.info is None:
            kind = (
                "one number everywhere"
                if model.isotropic is not None
                else "a precision without information"
            )
            notes.append(
                f"'{model.ref}' has {kind}: taken as it is, on the scale of the summed loss, prior "
                "0"
            )
            continue
        if model.identity != model.info.mean.blocks:
            raise PrecisionError(
                f"the precision of '{model.ref}' "
                f"({model.precision.files[0] if model.precision else ''}) was taken at "
                "other weights than these: its record of them differs. Use the precision that "
                "belongs to them, or "
                f"make one with `bmerge precision {model.ref} --data TEXTS --force`."
            )
        if config.verify:
            if model.info.mean.full is None:
                notes.append(
                    f"'{model.ref}' has no full hash on record; only sampled blocks were compared"
                )
            elif identity(model.mean, full=True) != model.info.mean.full:
                raise PrecisionError(
                    f"'{model.ref}' differs from the weights that its precision was taken at."
                )
    kinds = {(i.estimator, i.unit): m.ref for m in models if (i := known_info(m)) is not None}
    if len(kinds) > 1:
        (a, ref_a), (b, ref_b) = list(kinds.items())[:2]
        raise PrecisionError(
            f"precisions of different kinds do not add: '{ref_a}' has {a[0]} per {a[1]}, '{ref_b}' "
            f"{b[0]} per {b[1]}. "
            f"Make them alike, for example with `bmerge precision {ref_b} --data TEXTS -o OTHER` "
            "and "
            f"--precision {ref_b}=OTHER."
        )
