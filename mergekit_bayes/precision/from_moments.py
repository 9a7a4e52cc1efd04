"""A precision from Adam's second moments: what a training has left behind, without any data.

    S = N B v / (1 - beta2^t) + prior        (`moments.base` says what it is worth)

N and B are asked for, because no optimizer's file holds them. The moments must be of the weights:
their step number is compared with that of `trainer_state.json`, their shapes with those of the
tensors, and the weights that lie beside them, or whose hash they record, with the model's.
"""

import math
import statistics
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from mergekit_bayes.checkpoint.layout import checkpoint_files
from mergekit_bayes.checkpoint.moment_files import MomentFiles, find_moments
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.checkpoint.stamps import stamps_of
from mergekit_bayes.curvature import Keeping
from mergekit_bayes.curvature.outputs import trained_loss
from mergekit_bayes.documents import read_mapping
from mergekit_bayes.errors import shown
from mergekit_bayes.models.load import UNIT
from mergekit_bayes.models.places import checkpoint_names
from mergekit_bayes.models.skeleton import Skeleton, load_skeleton
from mergekit_bayes.moments import Moment, Moments, Parameter, name_moments, read_moments
from mergekit_bayes.moments.base import precision_of
from mergekit_bayes.precision.keeping import by_tensor, keeping, stored_precision
from mergekit_bayes.precision.moment_checks import (
    ADAM,
    TRAINER_STATE,
    in_memory,
    refuse_other_shapes,
    refuse_other_weights,
    with_settings,
)
from mergekit_bayes.precision.settings import PrecisionConfig, PrecisionReport
from mergekit_bayes.precision.storing import Found, store

_CLIP = 1.0  # the Trainer's default of max_grad_norm
_LARGEST_NORM = 1e30  # NaN and infinity are no norms
_COARSE = 0.996  # a larger beta2 changes a moment by less than half a step of bfloat16


def run_from_moments(config: PrecisionConfig, files: Path) -> PrecisionReport:
    """Store the precision that an optimizer's second moments stand for.

    Args:
        config: Settings, with `moments` and both counts.
        files: Where the moments are.

    Raises:
        CheckpointError: The files cannot be read, are not Adam's, or the output exists.
        ConfigError: The file says neither step nor beta2, and they are not given.
        MismatchError: The moments are of another model, or of another step than the weights.
        PrecisionError: A moment is negative or not finite.
    """
    assert config.observations is not None  # `refuse_moment_settings` made sure of it
    found = find_moments(files)
    stamps = stamps_of(found.files)
    skeleton = load_skeleton(config.model, config.task, trust_remote_code=config.trust_remote_code)
    with (
        SafetensorsSource(checkpoint_files(skeleton.path)) as source,
        read_moments(found) as moments,
    ):
        notes = refuse_other_weights(config, skeleton, source, found, moments)
        named = with_settings(config, found.path, name_moments(moments, _parameters(skeleton)))
        refuse_other_shapes(found.path, skeleton, source, named)
        precision = _as_stored(config, skeleton, named)
        step = max(moment.step or 0 for moment in named.values())
        notes += _notes(named, moments, found, _trained_names(skeleton, named))
        result = Found(
            precision,
            ADAM,
            UNIT[skeleton.task],
            config.observations,
            trained_loss(skeleton.model),
            {
                "optimizer": ADAM,
                "steps": step,
                "beta2": max(moment.beta2 or 0 for moment in named.values()),
                "batch_observations": config.batch_observations,
            },
        )
        inputs = {**source.inputs, **stamps}
        stored = store(config, skeleton.path, skeleton.model, source, result, inputs)
    return PrecisionReport(
        path=stored.path,
        estimator=result.estimator,
        unit=result.unit,
        loss=result.loss.describe(),
        observations=result.observations,
        source="moments",
        rows=None,
        sampled=None,
        device=None,
        dtype=None,
        step=step,
        notes=tuple(notes),
        health=stored.health,
    )


def _parameters(skeleton: Skeleton) -> list[Parameter]:
    """The trained parameters of a model in its order, each with the class of its module."""
    model = skeleton.model
    owners = {
        f"{path}.{name}" if path else name: type(module).__name__
        for path, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
    }
    return [
        Parameter(name, tuple(p.shape), owners[name])
        for name, p in model.named_parameters()
        if p.requires_grad
    ]


def _trained_names(skeleton: Skeleton, named: Mapping[str, Moment]) -> Collection[str]:
    """The names of all trained parameters, in memory or in the files as those of the moments."""
    model = skeleton.model
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return trained if in_memory(skeleton, named) else checkpoint_names(model, trained)


def _as_stored(
    config: PrecisionConfig, skeleton: Skeleton, named: Mapping[str, Moment]
) -> dict[str, Tensor]:
    """The precision under the names that `save_pretrained` gives, as finely as `pool` says.

    Moments are read one by one, so that a pooled precision takes the memory of one tensor.
    """
    assert config.observations is not None
    assert config.batch_observations is not None
    is_in_memory = in_memory(skeleton, named)
    if config.pool in ("row", "tensor") and not is_in_memory:
        keep = Keeping({name: min(1, len(moment.shape)) for name, moment in named.items()})
    else:
        keep = keeping(config, skeleton.model)
    total = {}
    for name, moment in named.items():
        entries = precision_of(moment, config.observations, config.batch_observations)
        shape = keep.shape_of(name, entries)
        if shape != entries.shape:
            entries = entries.reshape(math.prod(shape), -1).mean(1).reshape(shape)
        total[name] = entries
    if is_in_memory:
        return stored_precision(config, skeleton.model, total, 1.0)
    return by_tensor(config, {name: entries.add_(config.prior) for name, entries in total.items()})


def _notes(
    named: Mapping[str, Moment], moments: Moments, files: MomentFiles, trained: Collection[str]
) -> list[str]:
    """What in the moments makes a precision other than it should be."""
    notes = [_clipping(files)]
    if missing := [name for name in trained if name not in named]:
        notes.append(
            f"{len(missing)} of {len(trained)} parameters have no second moment and get no "
            f"precision, {shown(missing[0])} first: they never had a gradient, or the file lacks "
            "them"
        )
    if any(m.dtype in ("bfloat16", "float16") and (m.beta2 or 0) > _COARSE for m in named.values()):
        notes.append(
            "the moments are in 16 bits, where a beta2 so close to 1 loses most of each change: "
            "they may be far too small or too large"
        )
    if moments.decays:
        notes.append(
            "the optimizer adds the weight decay to the gradients (Adam, not AdamW), and the "
            "moments hold it"
        )
    return notes


def _clipping(files: MomentFiles) -> str:
    """What is known of clipped gradients, which count by the square of the factor."""
    said = "gradients that were clipped make a precision too small by the clip factor squared"
    state = files.path.parent / TRAINER_STATE
    if files.path.is_dir() and (files.path / TRAINER_STATE).is_file():
        state = files.path / TRAINER_STATE
    if not state.is_file():
        return said
    history = read_mapping(state).get("log_history")
    entries = history if isinstance(history, list) else []
    norms = [
        float(e["grad_norm"])
        for e in entries
        if isinstance(e, dict)
        and isinstance(e.get("grad_norm"), int | float)
        and abs(e["grad_norm"]) < _LARGEST_NORM
    ]
    if not norms:
        return said
    clipped = [norm for norm in norms if norm > _CLIP]
    median = statistics.median(norms)
    told = f"{said}; of {len(norms)} norms in {TRAINER_STATE}, {len(clipped)} are above {_CLIP:g}"
    if median <= _CLIP:
        return f"{told} (the Trainer's default max_grad_norm)"
    return (
        f"{told}, with the median {median:.3g}: clipped at {_CLIP:g}, the Trainer's default, the "
        f"precision would be about {(median / _CLIP) ** 2:.3g} times too small; where the training "
        "had max_grad_norm 0, nothing was clipped"
    )
