"""What is different where an estimate has matrices: of the inputs of layers, and of outputs."""

from torch import Tensor
from torch.nn import Module

from mergekit_bayes.curvature import Curvature
from mergekit_bayes.errors import ConfigError
from mergekit_bayes.models.load import Loaded
from mergekit_bayes.models.places import input_axes
from mergekit_bayes.posterior.factors import Kronecker, Matrices
from mergekit_bayes.posterior.info import INPUTS, KRONECKER
from mergekit_bayes.precision.keeping import is_sharded
from mergekit_bayes.precision.settings import PrecisionConfig
from mergekit_bayes.ranks import launched


def refuse_matrix_settings(config: PrecisionConfig) -> None:
    """Refuse settings that do not go with matrices, or only with them.

    Raises:
        ConfigError: As said.
    """
    if config.estimator != INPUTS and "blocks" in config.model_fields_set:
        raise ConfigError(
            f"--blocks {config.blocks} cuts the matrices of --estimator {INPUTS} alone. Leave "
            "it out."
        )
    if config.estimator in (INPUTS, KRONECKER) and config.pool is not None:
        raise ConfigError(
            f"--pool {config.pool} takes the mean of numbers, and --estimator {config.estimator} "
            "has matrices (those of inputs --blocks N makes smaller). Leave it out."
        )
    if config.estimator in (INPUTS, KRONECKER) and is_sharded(config):
        raise ConfigError(
            f"--estimator {config.estimator} adds up the inputs of whole layers, and with --device "
            f"auto {launched()} processes have a part of each. Leave --device out, and they share "
            "the rows, or start one process."
        )
    if config.estimator == KRONECKER and config.prior:
        raise ConfigError(
            f"--prior {config.prior:g}: a number on every entry is no Kronecker product. Leave it "
            "out, or choose inputs."
        )


def refuse_adapter(config: PrecisionConfig, loaded: Loaded) -> None:
    """Refuse matrices for an adapter, whose factors are merged by their entries.

    Raises:
        ConfigError: The model is an adapter.
    """
    if config.estimator in (INPUTS, KRONECKER) and hasattr(loaded.model, "peft_config"):
        raise ConfigError(
            f"'{config.model}' is an adapter, and --estimator {config.estimator} is for whole "
            "layers: the inputs of its factors are not those of the weights that it changes. Merge "
            "it into its base first (--method task_arithmetic --base BASE), or choose ggn."
        )


def numbers_of(curvature: Curvature) -> dict[str, Tensor]:
    """The sums of an estimate that are no matrices."""
    return {n: total for n, total in curvature.total.items() if n not in curvature.matrices}


def stored_matrices(
    config: PrecisionConfig, model: Module, curvature: Curvature, scale: float
) -> dict[str, Matrices | Kronecker]:
    """The matrices `scale * total + prior I` or factors, as `save_pretrained` names them.

    Args:
        config: The settings; `prior` is used.
        model: The model.
        curvature: The estimate, whose matrices are overwritten.
        scale: Observations that the precision stands for, over those in the sums.

    Raises:
        MismatchError: A weight is stored otherwise than in whole layers.
    """
    if not curvature.matrices:
        return {}
    if curvature.outputs:
        return _products(model, curvature, scale)
    total = {name: curvature.total[name].mul_(scale) for name in curvature.matrices}
    for matrices in total.values():
        matrices.diagonal(dim1=-2, dim2=-1).add_(config.prior)
    stored: dict[str, Matrices | Kronecker] = {}
    for name, place in input_axes(model, curvature.matrices).items():
        matrices = total[place.parameter]
        blocks = matrices if place.expert is None else matrices[place.expert]
        stored[name] = Matrices(blocks.cpu().numpy(), is_left=place.axis == -2)
    return stored


def _products(model: Module, curvature: Curvature, scale: float) -> dict[str, Matrices | Kronecker]:
    """The factors of both axes, in the order in which a weight is stored."""
    stored: dict[str, Matrices | Kronecker] = {}
    for name, place in input_axes(model, curvature.matrices).items():
        inputs = curvature.total[place.parameter].cpu().numpy()
        outputs = curvature.outputs[place.parameter].mul(scale).cpu().numpy()
        if place.axis == -1:
            stored[name] = Kronecker(outputs, inputs)
        else:
            stored[name] = Kronecker(inputs, outputs)
    return stored


def matrix_notes(config: PrecisionConfig, curvature: Curvature) -> tuple[str, ...]:
    """What the report says of the matrices: what they take, and which are not in blocks."""
    if not curvature.matrices:
        return ()
    sizes = [curvature.total[name].numel() for name in curvature.matrices]
    sizes += [factor.numel() for factor in curvature.outputs.values()]
    whole = [n for n in curvature.matrices if curvature.total[n].shape[-3] != config.blocks]
    notes = [
        f"{len(curvature.matrices)} linear layers have matrices, which took "
        f"{4 * sum(sizes) / 1e6:,.1f} MB"
        + ("" if curvature.outputs else " and are in squared inputs, not 1/weight^2")
    ]
    if whole:
        notes.append(
            f"{len(whole)} of them have one block, since their inputs are not divisible by "
            f"{config.blocks}: {', '.join(whole[:3])}{', ...' if len(whole) > 3 else ''}"
        )
    return tuple(notes)
