"""A precision for a checkpoint that has none: a diagonal of its curvature over some data.

The likelihood part is `N * F`, where F is the curvature per observation and N counts the
observations of all the data. How many examples the estimate looked at is recorded separately.
"""

import os
from functools import partial
from pathlib import Path

from mergekit_bayes.checkpoint.layout import checkpoint_files, old_precision_path
from mergekit_bayes.checkpoint.replacing import refuse_inputs
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.checkpoint.sources import is_hub_id
from mergekit_bayes.curvature.outputs import trained_loss
from mergekit_bayes.errors import CheckpointError, ConfigError
from mergekit_bayes.models.encode import observations
from mergekit_bayes.models.estimate import random_examples
from mergekit_bayes.models.load import UNIT, Loaded
from mergekit_bayes.models.places import checkpoint_names
from mergekit_bayes.models.quiet import quiet_libraries
from mergekit_bayes.precision.from_moments import run_from_moments
from mergekit_bayes.precision.keeping import is_sharded, stored_precision, target_of
from mergekit_bayes.precision.matrices import (
    matrix_notes,
    numbers_of,
    refuse_adapter,
    refuse_matrix_settings,
    stored_matrices,
)
from mergekit_bayes.precision.moment_checks import refuse_moment_settings
from mergekit_bayes.precision.passes import (
    Estimate,
    load,
    refuse_device,
    refuse_left_over,
    with_passes,
)
from mergekit_bayes.precision.settings import PrecisionConfig, PrecisionReport
from mergekit_bayes.precision.sources import read_source, refuse_source
from mergekit_bayes.precision.stability import describe, health_of, refuse_few
from mergekit_bayes.precision.storing import Found, store, stored_names
from mergekit_bayes.ranks import is_main, join, launched


def run_precision(config: PrecisionConfig, *, quiet: bool = False) -> PrecisionReport:
    """Estimate a checkpoint's precision and store it as its posterior.

    Args:
        config: Settings.
        quiet: Show no progress bars.

    Raises:
        CheckpointError: There is a precision already, the model cannot be loaded, or the output
            would replace it or the data.
        ConfigError: A Hub id without an output, or a device that is not there.
        MismatchError: Data without the named columns, or a model with parameters that its file
            does not hold.
    """
    join(config.num_processes)
    with quiet_libraries(bars=not quiet and is_main()):
        return with_passes(config, partial(_run, config))


def _refuse_settings(config: PrecisionConfig) -> None:
    refuse_moment_settings(config)
    refuse_matrix_settings(config)
    refuse_device(config)
    if config.output is None and is_hub_id(config.model):
        raise ConfigError(
            f"'{config.model}' is a Hub id, and its cache must not be written to: name a place "
            "with -o."
        )
    target = target_of(config)
    earlier = (
        target if config.output else old_precision_path(Path(os.path.expanduser(config.model)))
    )
    for place in (target, earlier):
        if os.path.exists(place) and not config.force:
            raise CheckpointError(
                f"'{place}' exists. Choose another -o, or pass --force to replace it."
            )
    model = os.path.expanduser(config.model)
    weights = Path(model).glob("*.safetensors") if os.path.isdir(model) else ()
    data = (config.data,) if isinstance(config.data, str) else config.data or ()
    moments = (config.moments,) if config.moments else ()
    refuse_inputs(target, [config.model, *weights, *data, *moments])
    if config.moments is None:
        refuse_source(config, target)
        refuse_left_over(config)


def _run(config: PrecisionConfig, estimate: Estimate) -> PrecisionReport:
    _refuse_settings(config)
    if config.moments is not None:
        return run_from_moments(config, Path(os.path.expanduser(config.moments)))
    loaded = load(config)
    refuse_adapter(config, loaded)
    model = loaded.model
    with SafetensorsSource(checkpoint_files(loaded.path)) as source:
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        renaming = stored_names(source, checkpoint_names(model, parameters))
        sizes = {name: p.numel() for name, p in parameters.items()}
        del parameters  # of which a rank keeps its rows only, where the model is sharded
        drawn = read_source(config, loaded)
        examples = drawn.examples
        total = observations(examples, loaded.task)
        count = min(config.examples, len(examples))
        refuse_few(count, len(examples), drawn.name)
        chosen = random_examples(examples, count, config.seed)
        curvature = estimate(config.estimator, loaded, chosen)
        stability = describe(curvature, sizes, count)
        scale = total / curvature.observations
        found = Found(
            stored_precision(config, model, numbers_of(curvature), scale),
            config.estimator,
            UNIT[loaded.task],
            total,
            # Labels are read for heads of one label only, so that the config says which loss it is.
            trained_loss(model),
            _training(config, loaded) | drawn.record,
            sampled=count,
            health=health_of(stability),
            matrices=stored_matrices(config, model, curvature, scale),
            renaming=renaming,
        )
        stored = store(config, loaded.path, model, source, found, source.inputs)
    return PrecisionReport(
        path=stored.path,
        estimator=found.estimator,
        unit=found.unit,
        loss=found.loss.describe(),
        observations=total,
        source=drawn.name,
        rows=len(examples),
        sampled=count,
        device=str(loaded.device),
        dtype=loaded.dtype,
        health=stored.health,
        notes=(*drawn.notes, *matrix_notes(config, curvature)),
        stability=stability,
    )


def _training(config: PrecisionConfig, loaded: Loaded) -> dict[str, str | float]:
    """How the estimate was made."""
    return {
        # Of one squared gradient: sharded processes add theirs up before.
        "batch_size": config.batch_size * (launched() if is_sharded(config) else 1),
        "seed": config.seed,
        "device": loaded.device.type,
        "dtype": loaded.dtype,
    }
