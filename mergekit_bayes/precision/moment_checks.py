"""Whether second moments belong to the weights, and whether the settings complete them."""

import math
from collections.abc import Mapping
from pathlib import Path

from mergekit_bayes.checkpoint.identity import identity
from mergekit_bayes.checkpoint.layout import checkpoint_files
from mergekit_bayes.checkpoint.moment_files import MomentFiles
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.documents import read_mapping
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError, shown
from mergekit_bayes.models.skeleton import Skeleton
from mergekit_bayes.moments import Moment, Moments
from mergekit_bayes.precision.settings import PrecisionConfig

ADAM = "adam"
_OF_A_PASS = {
    *("self_generated", "keep_generated", "random_tokens", "where", "text_column", "label_column"),
    *("blocks", "examples", "batch_size", "max_length", "seed", "sums", "device", "dtype"),
    *("num_processes", "resume", "save_every"),
    *("messages_column", "prompt_column", "completion_column"),
}
TRAINER_STATE = "trainer_state.json"
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
        if config.estimator == ADAM:
            raise ConfigError(
                "--estimator adam reads what a training has left: name it with --from PATH."
            )
        return
    if "estimator" in config.model_fields_set and config.estimator != ADAM:
        raise ConfigError(
            f"--estimator {config.estimator} makes a pass over data, and --from makes none: what "
            "it reads is adam."
        )
    if config.data is not None:
        raise ConfigError("--data and --from: name one of them, text or what a training has left.")
    if others := sorted(_OF_A_PASS & config.model_fields_set):
        raise ConfigError(
            f"--{others[0].replace('_', '-')} is about a pass over data, and --from makes none. "
            "Leave it out."
        )
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


def refuse_other_weights(
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
                f"'{config.model}' are of step {steps:,} (its {TRAINER_STATE}). Take both from one "
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
    if not (folder / TRAINER_STATE).is_file():
        return None
    step = read_mapping(folder / TRAINER_STATE).get("global_step")
    if type(step) is not int:
        raise CheckpointError(
            f"{folder / TRAINER_STATE}: global_step is {shown(step)}, expected a whole number. "
            "Remove the file, or take that of the checkpoint."
        )
    return step


def _weights_beside(files: MomentFiles) -> Path | None:
    """The folder of the moments' checkpoint, if it holds a model too."""
    folders = [files.path] if files.path.is_dir() else [files.path.parent]
    if files.form == "shards" and files.path.name.startswith("optimizer"):
        folders.append(files.path.parent)  # accelerate writes them into the checkpoint's folder
    for folder in folders:
        try:
            checkpoint_files(folder)
        except CheckpointError:
            continue
        return folder
    return None


def with_settings(
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
            ("--step", config.step, max((m.step or 0 for m in named.values()), default=0) or None),
            ("--beta2", config.beta2, moment.beta2),
        ):
            if given is not None and recorded is not None and not math.isclose(given, recorded):
                raise ConfigError(f"{flag} is {given}, but {path} says {recorded}. Leave it out.")
        if step is None or beta2 is None:
            missing = [f for f, v in (("--step", step), ("--beta2", beta2)) if v is None]
            raise ConfigError(
                f"{path} does not say {' and '.join(missing)}, without which its scale is not "
                "known: pass the number of optimizer steps that it was made in, and Adam's beta2."
            )
        completed[name] = Moment(moment.shape, moment.dtype, step, beta2, moment.read)
    return completed


def refuse_other_shapes(
    path: Path, skeleton: Skeleton, source: SafetensorsSource, named: Mapping[str, Moment]
) -> None:
    """Refuse moments whose names or shapes are not those of the model.

    Moments have the shape of the stored tensor, also those of GPT-2's Conv1D, which stores
    (inputs, outputs): nothing is transposed.

    Raises:
        MismatchError: As said.
    """
    shapes = {name: tuple(p.shape) for name, p in skeleton.model.named_parameters()}
    if not in_memory(skeleton, named):
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


def in_memory(skeleton: Skeleton, named: Mapping[str, object]) -> bool:
    """Whether names are those of the model in memory, and not those in its files."""
    parameters = {name for name, _ in skeleton.model.named_parameters()}
    return parameters.issuperset(named)
