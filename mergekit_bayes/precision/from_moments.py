"""A precision from Adam's second moments: what a training has left behind, without any data.

    S = N B v / (1 - beta2^t) + prior        (`moments.base` says what it is worth)

N and B are asked for, because no optimizer's file holds them. The moments must be of the weights:
their step number is compared with that of `trainer_state.json`, their shapes with those of the
tensors, and the weights that lie beside them, or whose hash they record, with the model's.
"""

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_bayes.checkpoint.identity import identity
from mergekit_bayes.checkpoint.layout import checkpoint_files
from mergekit_bayes.checkpoint.moment_files import MomentFiles, find_moments
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.checkpoint.sources import is_hub_id, pinned
from mergekit_bayes.checkpoint.stamps import refuse_changed, stamps_of
from mergekit_bayes.checkpoint.tokenizers import tokenizer_identity
from mergekit_bayes.curvature.health import precision_health
from mergekit_bayes.curvature.outputs import trained_loss
from mergekit_bayes.documents import read_mapping
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError, shown
from mergekit_bayes.models.load import UNIT
from mergekit_bayes.models.places import checkpoint_names
from mergekit_bayes.models.skeleton import Skeleton, load_skeleton
from mergekit_bayes.moments import Moment, Moments, Parameter, name_moments, read_moments
from mergekit_bayes.moments.base import precision_of
from mergekit_bayes.posterior import Anchor, PosteriorInfo, Prior, identify, save_posterior
from mergekit_bayes.posterior.info import LOSS
from mergekit_bayes.precision.settings import PrecisionConfig, PrecisionReport
from mergekit_bayes.precision.stored import stored_dtype, stored_names

ESTIMATOR = "adam"
_STATE = "trainer_state.json"
_CLIP = 1.0  # the Trainer's default of max_grad_norm
_COARSE = 0.996  # a larger beta2 changes a moment by less than half a step of bfloat16
_NOTHING_RECORDED = (
    "nothing on the disk says that the moments are of these weights: neither a trainer_state.json "
    "beside the weights, nor weights beside the moments"
)


def refuse_moment_settings(config: PrecisionConfig) -> None:
    """Refuse settings that do not go together, before anything is read.

    Raises:
        ConfigError: As said.
    """
    counts = {
        "--observations": config.observations,
        "--batch-observations": config.batch_observations,
    }
    if config.moments is None:
        own = counts | {"--step": config.step, "--beta2": config.beta2}
        if given := [flag for flag, value in own.items() if value is not None]:
            raise ConfigError(f"{given[0]} goes with --from: data are counted, not told.")
        return
    if config.data is not None:
        raise ConfigError("--data and --from: name one of them, text or what a training has left.")
    if missing := [flag for flag, value in counts.items() if value is None]:
        raise ConfigError(
            f"--from needs {' and '.join(missing)}: no optimizer's file says for how many "
            "observations it stands, and nothing is guessed. Observations are tokens for a "
            "language model, else rows. --observations counts those of all the data, "
            "--batch-observations those of one optimizer step: batch x accumulation x processes."
        )
    assert config.observations is not None
    assert config.batch_observations is not None
    if config.batch_observations > config.observations:
        raise ConfigError(
            f"--batch-observations is {config.batch_observations:,} and --observations "
            f"{config.observations:,}: a batch cannot hold more than all the data. Are they "
            "swapped?"
        )


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
    assert config.observations is not None
    assert config.batch_observations is not None
    found = find_moments(files)
    stamps = stamps_of(found.files)
    skeleton = load_skeleton(config.model, config.task, trust_remote_code=config.trust_remote_code)
    model = skeleton.model
    with (
        SafetensorsSource(checkpoint_files(skeleton.path)) as source,
        read_moments(found) as moments,
    ):
        notes = _refuse_other_weights(config, skeleton, source, found, moments)
        named = _completed(config, found.path, name_moments(moments, _parameters(skeleton)))
        _refuse_other_shapes(found.path, skeleton, source, named)
        precision = {
            name: precision_of(moment, config.observations, config.batch_observations, config.prior)
            for name, moment in named.items()
        }
        health = precision_health(precision)
        tensors = _as_stored(skeleton, precision)
        rename = stored_names(source, tensors)
        loss = trained_loss(model)
        tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
        step = max(moment.step or 0 for moment in named.values())
        beta2 = max(moment.beta2 or 0 for moment in named.values())
        notes += _notes(named, moments, found)
        info = PosteriorInfo(
            estimator=ESTIMATOR,
            unit=UNIT[skeleton.task],
            observations=config.observations,
            ess=config.observations,
            prior=Prior(kind="isotropic", precision=config.prior) if config.prior else Prior(),
            anchor=Anchor(),
            mean=identify(source),
            tokenizer=tokenizer_identity(skeleton.path),
            dtype=stored_dtype(source),
            aliases={alias: rename(name) for alias, name in tied.items()},
            training={
                "optimizer": "adam",
                "steps": step,
                "beta2": beta2,
                "batch_observations": config.batch_observations,
                LOSS: loss.name,
            }
            | _hub_model(config, skeleton),
            health=health,
        )
        arrays = {rename(name): tensor.cpu().numpy() for name, tensor in tensors.items()}
        refuse_changed({**source.inputs, **stamps})
    out = Path(config.output) if config.output else None
    return PrecisionReport(
        path=save_posterior(skeleton.path, arrays, info, out=out, force=config.force),
        estimator=ESTIMATOR,
        unit=UNIT[skeleton.task],
        loss=loss.describe(),
        observations=config.observations,
        rows=None,
        sampled=None,
        device=None,
        dtype=None,
        step=step,
        notes=tuple(notes),
        health=health,
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


def _refuse_other_weights(
    config: PrecisionConfig,
    skeleton: Skeleton,
    source: SafetensorsSource,
    files: MomentFiles,
    moments: Moments,
) -> list[str]:
    """Refuse moments of other weights, or of another step of their training.

    Returns:
        A note where nothing could be compared.

    Raises:
        MismatchError: As said.
    """
    steps = _step_of(skeleton.path)
    if steps is not None and moments.step is not None:
        # A step whose gradients overflowed in float16 is counted by the Trainer alone.
        may_skip = (skeleton.path / "scaler.pt").exists() and moments.step <= steps
        if moments.step != steps and not may_skip:
            raise MismatchError(
                f"{files.path}: the optimizer has made {moments.step:,} steps, and the weights in "
                f"'{config.model}' are of step {steps:,} (its {_STATE}). Take both from one "
                "checkpoint."
            )
    beside = _weights_beside(files)
    expected = moments.mean
    if beside is not None and expected is None:
        if beside.resolve() == skeleton.path.resolve():
            return []
        with SafetensorsSource(checkpoint_files(beside)) as other:
            expected = identity(other)
    if expected is not None and expected != identity(source):
        where = "that it records" if moments.mean else f"in '{beside}'"
        raise MismatchError(
            f"{files.path}: the weights {where} are not those of '{config.model}', and a precision "
            "belongs to the weights at which it was taken. Name the checkpoint in which weights "
            "and optimizer were saved together."
        )
    return [] if expected or (steps is not None and moments.step) else [_NOTHING_RECORDED]


def _step_of(folder: Path) -> int | None:
    """The optimizer step of the weights in a folder, as the Trainer records it; None without."""
    if not (folder / _STATE).is_file():
        return None
    step = read_mapping(folder / _STATE).get("global_step")
    if type(step) is not int:
        raise CheckpointError(
            f"{folder / _STATE}: global_step is {shown(step)}, expected a whole number. Remove the "
            "file, or take that of the checkpoint."
        )
    return step


def _weights_beside(files: MomentFiles) -> Path | None:
    """The folder of the moments' checkpoint, if it holds a model too."""
    inner = files.form == "shards" or files.path.is_dir()
    for folder in ([files.path] if inner else []) + [files.path.parent]:
        try:
            checkpoint_files(folder)
        except CheckpointError:
            continue
        return folder
    return None


def _completed(
    config: PrecisionConfig, path: Path, named: Mapping[str, Moment]
) -> dict[str, Moment]:
    """The moments, each with its step and beta2, which a file may leave to the settings.

    Raises:
        ConfigError: One is in neither, or in both with different values.
    """
    completed = {}
    for name, moment in named.items():
        step, beta2 = moment.step or config.step, moment.beta2
        beta2 = config.beta2 if beta2 is None else beta2
        for flag, given, recorded in (
            ("--step", config.step, max((m.step or 0 for m in named.values()), default=0)),
            ("--beta2", config.beta2, moment.beta2),
        ):
            if given is not None and recorded and not math.isclose(given, recorded):
                raise ConfigError(f"{flag} is {given}, but {path} says {recorded}. Leave it out.")
        if step is None or beta2 is None:
            missing = [f for f, v in (("--step", step), ("--beta2", beta2)) if v is None]
            raise ConfigError(
                f"{path} does not say {' and '.join(missing)}, without which its scale is not "
                "known: pass the number of optimizer steps that it was made in, and Adam's beta2."
            )
        completed[name] = Moment(moment.shape, moment.dtype, step, beta2, moment.read)
    return completed


def _refuse_other_shapes(
    path: Path, skeleton: Skeleton, source: SafetensorsSource, named: Mapping[str, Moment]
) -> None:
    """Refuse moments whose names or shapes are not those of the model.

    Moments have the shape of the stored tensor, also those of GPT-2's Conv1D, which stores
    (inputs, outputs): nothing is transposed.

    Raises:
        MismatchError: As said.
    """
    shapes = {name: tuple(p.shape) for name, p in skeleton.model.named_parameters()}
    if not _in_memory(skeleton, named):
        shapes = {name: source.specs[name].shape for name in source.specs}
    for name, moment in named.items():
        if name not in shapes:
            raise MismatchError(
                f"{path}: {shown(name)} is no parameter of '{skeleton.path}'. Is it the state of "
                "another model?"
            )
        if moment.shape != shapes[name]:
            turned = " It is transposed." if moment.shape == shapes[name][::-1] else ""
            raise MismatchError(
                f"{path}: the second moment of {shown(name)} is {list(moment.shape)}, and the "
                f"parameter {list(shapes[name])}.{turned} Take the optimizer's file of this model."
            )


def _in_memory(skeleton: Skeleton, named: Mapping[str, object]) -> bool:
    """Whether names are those of the model in memory, and not those in its files."""
    parameters = {name for name, _ in skeleton.model.named_parameters()}
    return parameters.issuperset(named)


def _as_stored(skeleton: Skeleton, precision: dict[str, Any]) -> dict[str, Any]:
    """A precision under the names that `save_pretrained` gives, stacked experts one by one."""
    if not _in_memory(skeleton, precision):
        return precision
    return checkpoint_names(skeleton.model, precision)


def _notes(named: Mapping[str, Moment], moments: Moments, files: MomentFiles) -> list[str]:
    """What in the moments makes a precision other than it should be."""
    notes = [_clipping(files)]
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
    state = files.path.parent / _STATE
    if files.path.is_dir() and (files.path / _STATE).is_file():
        state = files.path / _STATE
    if not state.is_file():
        return said
    history = read_mapping(state).get("log_history")
    entries = history if isinstance(history, list) else []
    norms = [
        float(e["grad_norm"])
        for e in entries
        if isinstance(e, dict) and isinstance(e.get("grad_norm"), int | float)
    ]
    if not norms:
        return said
    clipped = [norm for norm in norms if norm > _CLIP]
    median = statistics.median(norms)
    told = f"{said}; of {len(norms)} norms in {_STATE}, {len(clipped)} are above {_CLIP:g}"
    if median <= _CLIP:
        return f"{told} (the Trainer's default max_grad_norm)"
    return (
        f"{told}, with the median {median:.3g}: clipped at {_CLIP:g}, the Trainer's default, the "
        f"precision would be about {(median / _CLIP) ** 2:.3g} times too small"
    )


def _hub_model(config: PrecisionConfig, skeleton: Skeleton) -> dict[str, str]:
    """The Hub model that it is of; the path of a folder is left out."""
    ref = pinned(config.model, skeleton.path)
    return {"model": ref} if ref != config.model or is_hub_id(ref) else {}
