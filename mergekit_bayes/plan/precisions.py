"""Which precision belongs to which tensor, and in which form the merged one is written."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mergekit_bayes.checkpoint.codec import read_chunk
from mergekit_bayes.checkpoint.identity import block_hash
from mergekit_bayes.checkpoint.specs import TensorSpec
from mergekit_bayes.errors import ConfigError, PrecisionError
from mergekit_bayes.lora import adapted_mean
from mergekit_bayes.methods.base import Method
from mergekit_bayes.plan.inputs import Input, Inputs
from mergekit_bayes.plan.options import parse_shrink
from mergekit_bayes.plan.settings import MergeConfig
from mergekit_bayes.plan.steps import Step, TensorRef
from mergekit_bayes.plan.tied_heads import precision_names
from mergekit_bayes.posterior import Posterior
from mergekit_bayes.posterior.forms import Form, StoredPrecision, low_rank_shape, merged_form
from mergekit_bayes.posterior.info import INPUTS

_SAMPLE, _SAMPLES = 1024, 16  # entries of a block that is compared, and number of blocks


class MatchedPrecisions(NamedTuple):
    """The precisions of one tensor.

    Attributes:
        stored: Each input's precision.
        unchanged: Tasks that did not change the tensor: they have no precision for it and the
            base's values in it, since it was frozen in their training. The base's precision stands
            in.
        borrowed: The inputs for which the donor's precision stands in.
    """

    stored: dict[Input, StoredPrecision]
    unchanged: frozenset[Input]
    borrowed: frozenset[Input]


def match_precisions(
    inputs: Inputs, name: str, means: Mapping[Input, TensorRef]
) -> MatchedPrecisions | None:
    """Each model's precision of a tensor.

    Args:
        inputs: The models.
        name: The donor's name of the tensor.
        means: Each model's tensor.

    Returns:
        None if no model has a precision for the tensor and all means agree.

    Raises:
        PrecisionError: A model has no precision for a tensor that its training changed.
    """
    donor = inputs.donor
    stored: dict[Input, StoredPrecision] = {}
    missing: list[Input] = []
    for model, mean in means.items():
        precision = _stored_precision(name, model, mean, donor)
        if precision is None:
            missing.append(model)
        else:
            stored[model] = precision
    borrowed = frozenset(m for m, mean in means.items() if not _owns_precision(m, mean))
    if not missing:
        return MatchedPrecisions(stored, frozenset(), borrowed)
    unchanged = [m for m in missing if _agree(means[m], means[donor])]
    with_files = [m for m, mean in means.items() if mean.input.posterior.precision is not None]
    if missing == with_files and missing == unchanged:
        return None
    if inputs.base is not None and inputs.base not in missing and missing == unchanged:
        stored = {m: stored[donor] if m in unchanged else stored[m] for m in means}
        return MatchedPrecisions(stored, frozenset(unchanged), borrowed.union(unchanged))
    changed = next((m for m in missing if m not in unchanged), missing[0])
    owner = means[changed].input.posterior
    adapted = adapted_mean(owner)
    reason = None if adapted is None else adapted.explain_no_precision(means[changed].name)
    if reason is not None:
        raise PrecisionError(
            f"no precision for '{name}' of '{owner.ref}'. {reason} Merge with --weights uniform, "
            "or leave the tensor out with --only."
        )
    looked_in = owner.precision.files[0] if owner.precision is not None else owner.path
    raise PrecisionError(
        f"no precision for '{name}' of '{owner.ref}' (looked in {looked_in}). Was it frozen in "
        "training? Make a full one with `bmerge precision`, or leave the tensor out with --only."
    )


def donor_precision(name: str, mean: TensorRef) -> StoredPrecision | None:
    """The donor's precision of a tensor that is copied; None if it has none, and none is written.

    Args:
        name: The donor's name of the tensor.
        mean: The donor's tensor.

    Raises:
        PrecisionError: The shape of the precision does not fit the tensor's.
    """
    donor = mean.input.posterior
    if donor.precision is None and donor.isotropic is None:
        return None
    return _stored_precision(name, mean.input, mean, mean.input)


def merged_shape(
    config: MergeConfig, spec: TensorSpec, forms: Sequence[Form], merged: int
) -> tuple[int, ...]:
    """The coarsest shape that holds the merged precision of a tensor.

    One number per entry is written only if some model has as many after pooling.

    Args:
        config: The settings.
        spec: The tensor's spec.
        forms: The forms of the models' precisions.
        merged: How many entries are merged; the others keep the donor's precision.
    """
    shrink = parse_shrink(config.shrink)
    by_row = (shrink is not None and shrink.by_row) or 0 < merged < spec.size
    pooled = [form.pooled(config.pool) for form in forms]
    return merged_form(pooled, by_row=by_row).shape_of(spec.shape)


class MatrixForm(NamedTuple):
    """In which form a tensor's precisions are matrices.

    Attributes:
        shape: That of the precisions, as in `posterior/forms.py`.
        axis: The axis of the tensor that they are for.
    """

    shape: tuple[int, ...]
    axis: int


def matrices_of(
    config: MergeConfig,
    method: Method,
    name: str,
    stored: Mapping[Input, StoredPrecision],
    *,
    removes: bool = False,
) -> MatrixForm | None:
    """The form in which a tensor's precisions are merged if they are matrices; None for numbers.

    One number for the tensor is a matrix, too, and goes with others. Those of low rank stay so,
    with the ranks of all models in the merged one, unless their sum is half of the inputs or more,
    one model has its matrix in full, or a task is removed, which bounds every direction: they are
    matrices in full then.

    Args:
        config: The settings.
        method: The merging rule.
        name: The tensor.
        stored: The precision of each model.
        removes: Whether a scale is negative.

    Raises:
        ConfigError: The method or a setting has no meaning for matrices.
        PrecisionError: The models have them for other axes or in other blocks, or one has numbers.
    """
    forms: dict[MatrixForm, Input] = {}
    terms, ranks, is_full = 0, dict[tuple[int, str], int](), removes
    for model, precision in stored.items():
        if precision.form > Form.ENTRY and precision.source is not None:
            shape = precision.source.specs[precision.name].shape
            if precision.form is Form.KRONECKER:
                terms += shape[-4]
                shape = (*shape[:-4], 0, *shape[-3:])
            elif precision.form is Form.LOW_RANK:  # as one block, which it may have to be
                *leading, rows, n = shape[: precision.axis - 2]
                shape = (*leading, 1, n, n, *shape[precision.axis - 2 :][3:])
                # The donor's stands in for models that have none.
                ranks[id(precision.source), precision.name] = rows - 1
            else:
                is_full = True
            forms.setdefault(MatrixForm(shape, precision.axis), model)
    if not forms:
        return None
    (found, one), *others = forms.items()
    # One number is a matrix, too, and no product that could be told from its factors.
    coarse = (Form.TENSOR, Form.ROW, Form.ENTRY) if terms else (Form.ROW, Form.ENTRY)
    numbers = [m for m, p in stored.items() if p.form in coarse]
    if others or numbers:
        other = others[0][1] if others else numbers[0]
        has = _in_words(others[0][0]) if others else "numbers"
        mend = "Make both by one `bmerge precision --estimator`."
        if others and (blocks := _other_blocks(found, others[0][0])):
            mend = (
                f"Make both with as many blocks, as `bmerge precision {other.ref} --data TEXTS "
                f"--estimator {INPUTS} --blocks {blocks} -o OTHER` makes one for "
                f"--precision {other.ref}=OTHER."
            )
        raise PrecisionError(
            f"the precision of '{name}' is one of {_in_words(found)} for '{one.ref}', and one of "
            f"{has} for '{other.ref}'. {mend}"
        )
    if terms:  # a merge has the terms of all
        found = MatrixForm((*found.shape[:-4], terms, *found.shape[-3:]), found.axis)
    if ranks and not is_full and 2 * (rank := sum(ranks.values())) < _blocks(found)[1]:
        *leading, _, n, _ = found.shape if found.axis == -1 else found.shape[:-1]
        found = MatrixForm(low_rank_shape(leading, rank, n, found.axis), found.axis)
    if method.matrix is None:
        raise ConfigError(
            f"--method {method.name} reads one number an entry, and the precision of '{name}' of "
            f"'{one.ref}' is one of matrices. Use gradient_matching or precision_average, or other "
            "precisions (--precision MODEL=PATH)."
        )
    for setting in ("pool", "shrink"):
        if getattr(config, setting) is not None:
            raise ConfigError(
                f"--{setting} {getattr(config, setting)}: the precision of '{name}' of "
                f"'{one.ref}' is one of matrices, for which it has no meaning. Drop it."
            )
    return found


def _in_words(matrices: MatrixForm) -> str:
    shape = matrices.shape
    if shape[-2:] == (1, 1) and shape[-4] == 0:
        return "Kronecker products"
    blocks, size = _blocks(matrices)
    return f"matrices ({blocks} of {size} x {size}, for axis {matrices.axis})"


def _blocks(matrices: MatrixForm) -> tuple[int, int]:
    """How many, and of how many rows."""
    *_, blocks, size, _ = matrices.shape if matrices.axis == -1 else matrices.shape[:-1]
    return blocks, size


def _other_blocks(found: MatrixForm, other: MatrixForm) -> int | None:
    """How many blocks the other needs, if it is their number alone that differs."""
    products = any(m.shape[-2:] == (1, 1) and m.shape[-4] == 0 for m in (found, other))
    if products or found.axis != other.axis:
        return None
    (blocks, size), (others, of_other) = _blocks(found), _blocks(other)
    return blocks if blocks * size == others * of_other else None


def refuse_no_matrices(method: Method, steps: Sequence[Step]) -> None:
    """Check that a method for whole matrices merges one.

    Raises:
        ConfigError: Nothing that is merged is the weight of a linear layer.
        PrecisionError: No precision of what is merged is a matrix of a layer's inputs, or one is of
            Kronecker products.
    """
    merged = [step for step in steps if step.copied is None]
    if not method.needs_matrices or not merged:
        return
    kronecker = next((s.name for s in merged if s.form is Form.KRONECKER), None)
    if kronecker is None and any(step.axis is not None for step in merged):
        return
    if method.needs_precision:
        found = f"that of '{merged[0].name}' and of all else that is merged is one of numbers"
        if kronecker is not None:
            found = f"that of '{kronecker}' is one of Kronecker products"
        raise PrecisionError(
            f"--method {method.name} weighs linear layers by precision matrices of their inputs, "
            f"and {found}. Make such matrices with `bmerge precision MODEL --data TEXTS "
            "--estimator inputs`."
        )
    raise ConfigError(
        f"--method {method.name} merges the weights of linear layers as whole matrices, and "
        f"nothing that is merged is one ('{merged[0].name}', for example). Use --method "
        "task_arithmetic."
    )


def _stored_precision(
    name: str, model: Input, mean: TensorRef, donor: Input
) -> StoredPrecision | None:
    """The precision of one model's tensor; None if its file has none for it."""
    owner = mean.input.posterior
    if owner.precision is None:
        number = model.posterior.isotropic
        number = donor.posterior.isotropic if number is None else number
        assert number is not None  # `check_precisions` made sure of it
        return StoredPrecision.everywhere(number)
    stored = _find_name(name, mean.name, owner)
    if stored is None:
        return None
    return StoredPrecision.of(owner.precision, stored, mean.spec.shape)


def _owns_precision(model: Input, mean: TensorRef) -> bool:
    """Whether a tensor's precision is the model's own, and not that of the donor."""
    if mean.input.posterior.precision is not None:
        return mean.input is model
    return model.posterior.isotropic is not None


def _find_name(name: str, stored: str, model: Posterior) -> str | None:
    """The name of a tensor among a model's precisions; `stored` is its name among the means."""
    assert model.precision is not None
    specs = model.precision.specs
    for candidate in precision_names(name, stored, model):
        if candidate in specs:
            return candidate
    return model.renamed_precisions.get(stored)


def _agree(one: TensorRef, other: TensorRef) -> bool:
    """Whether two tensors hold the same values, in one dtype or two, by their sampled blocks."""
    if one.spec == other.spec:
        return block_hash(one.source, one.name) == block_hash(other.source, other.name)
    if one.spec.shape != other.spec.shape:
        return False
    size = one.spec.size
    last = max(size - _SAMPLE, 0)
    for start in {last * i // (_SAMPLES - 1) for i in range(_SAMPLES)}:
        stop = min(start + _SAMPLE, size)
        values = read_chunk(one.source, one.name, start, stop)
        if not np.array_equal(values, read_chunk(other.source, other.name, start, stop)):
            return False
    return True
