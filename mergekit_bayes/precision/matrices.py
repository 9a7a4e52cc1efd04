"""What is different where an estimate has matrices: of the inputs of layers, and of outputs."""

from torch import Tensor
from torch.nn import Module

from mergekit_bayes.curvature import Curvature
from mergekit_bayes.curvature.sketches import diagonal_and_factor
from mergekit_bayes.errors import ConfigError
from mergekit_bayes.models.load import Loaded
from mergekit_bayes.models.places import input_axes
from mergekit_bayes.posterior.factors import Directions, Kronecker, LowRank, Matrices
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
    if config.rank is not None and (config.estimator != INPUTS or config.blocks != 1):
        beside = (
            f"--estimator {config.estimator}"
            if config.estimator != INPUTS
            else f"--blocks {config.blocks}"
        )
        raise ConfigError(
            f"--rank {config.rank} makes the matrices of --estimator {INPUTS} smaller, in place of "
            f"--blocks, and goes with no {beside}. Leave one of them out."
        )
    if config.estimator in (INPUTS, KRONECKER) and config.pool is not None:
        raise ConfigError(
            f"--pool {config.pool} takes the mean of numbers, and --estimator {config.estimator} "
            "has matrices (those of inputs --blocks N or --rank N makes smaller). Leave it out."
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
) -> dict[str, Directions]:
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
    stored: dict[str, Directions] = {}
    for name, place in input_axes(model, curvature.matrices).items():
        total = curvature.total[place.parameter]
        total = total if place.expert is None else total[place.expert]
        is_left = place.axis == -2
        if place.parameter in curvature.sketches:
            diagonal, factor = diagonal_and_factor(total)
            diagonal, factor = diagonal * scale + config.prior, factor * scale**0.5
            stored[name] = LowRank(diagonal.cpu().numpy(), factor.cpu().numpy(), is_left)
        else:
            total.mul_(scale).diagonal(dim1=-2, dim2=-1).add_(config.prior)
            stored[name] = Matrices(total.cpu().numpy(), is_left)
    return stored


def _products(model: Module, curvature: Curvature, scale: float) -> dict[str, Directions]:
    """The factors of both axes, in the order in which a weight is stored."""
    stored: dict[str, Directions] = {}
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
    full = [n for n in curvature.matrices if n not in curvature.sketches]
    whole = [n for n in full if curvature.total[n].shape[-3] != config.blocks]
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
    if config.rank is not None:
        notes.append(_rank_note(config.rank, curvature, len(full)))
    return tuple(notes)


def _rank_note(rank: int, curvature: Curvature, full: int) -> str:
    """How many matrices are of low rank, and what of their diagonals their factors hold."""
    if not curvature.sketches:
        return f"all of them are in full, since no layer has more than {2 * rank} inputs"
    shares = {
        name: float(total[..., 1:, :].double().square().sum() / total[..., 0, :].double().sum())
        for name in curvature.sketches
        if (total := curvature.total[name])[..., 0, :].any()
    }
    held = ""
    if shares:
        least, most = min(shares.items(), key=lambda item: item[1]), max(shares.values())
        held = (
            f", which holds {least[1]:.1%} ('{least[0]}') to {most:.1%} of the sum of squared "
            "inputs"
        )
    return (
        f"{len(curvature.sketches)} of them are a diagonal and a factor of rank {rank}{held}; "
        f"{full} with up to {2 * rank} inputs are in full"
    )
