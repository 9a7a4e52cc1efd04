"""Join several runs of one task into one posterior of it: a mixture, in a folder of its own.

The runs are copied byte for byte, so that the folder can be moved and outlives them. Nothing is
averaged here: a merge weighs the components tensor by tensor (`stream/mixtures`).
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from pydantic import Field

from mergekit_bayes.checkpoint.contained import copy_contained
from mergekit_bayes.checkpoint.layout import POSTERIOR_FOLDER
from mergekit_bayes.checkpoint.model_config import labels, read_model_config
from mergekit_bayes.checkpoint.own_files import write_own
from mergekit_bayes.checkpoint.replacing import refuse_foreign, refuse_inputs, replacing
from mergekit_bayes.checkpoint.side_files import MIXTURE, check_side_files, copy_side_files
from mergekit_bayes.checkpoint.stamps import documents_in, refuse_changed, stamps_of
from mergekit_bayes.checkpoint.tokenizers import tokens_apart
from mergekit_bayes.configs import Config
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError, PrecisionError, shown
from mergekit_bayes.lora import is_adapter
from mergekit_bayes.plan.model_configs import find_differences
from mergekit_bayes.posterior import Identity, Posterior, open_posterior
from mergekit_bayes.posterior.directions import refuse_matrices
from mergekit_bayes.posterior.mixture import MOST_COMPONENTS, Component, Mixture, read_mixture
from mergekit_bayes.posterior.quantised import refuse_emptied, refuse_quantised
from mergekit_bayes.records import Force, Frozen, Progress


class MixConfig(Config):
    """Settings of `bmerge mix`."""

    runs: tuple[str, ...] = Field(
        description="Folders or Hub ids of runs of one task, each with a precision."
    )
    out: str = Field(description="The folder of the mixture.")
    weights: tuple[float, ...] = Field(
        (),
        description="Weight of each run, such as 1,1,2, or by repeating the flag; by default all "
        "weigh alike.",
    )
    force: Force = False


class MixReport(Frozen):
    """What was mixed.

    Attributes:
        path: The folder.
        labels: The runs as they were named.
        weights: The weight of each, which sum to one.
        plain: Which run is the plain model of the folder, from 0 on.
        bytes: Size of what was copied of the tensors.
        notes: Remarks for the reader.
    """

    path: Path
    labels: tuple[str, ...]
    weights: tuple[float, ...]
    plain: int
    bytes: int
    notes: tuple[str, ...] = ()


def run_mix(config: MixConfig, *, progress: Progress | None = None) -> MixReport:
    """Copy runs of one task into a folder that is their mixture.

    Args:
        config: The settings.
        progress: Called with (bytes of tensors copied, bytes of tensors in all).

    Raises:
        ChangedError: A file of a run was written to meanwhile.
        CheckpointError: A run cannot be read, or the output exists or lies in a run.
        ConfigError: Weights that do not fit the runs, a run that is named twice or is no folder of
            a whole model, or an output that is no folder.
        MismatchError: Runs of other architectures, names, shapes, tokens or labels.
        PrecisionError: A run without a precision, with one of other weights, or with matrices.
    """
    weights = _weights(config)
    target = Path(config.out).expanduser()
    if target.suffix == ".safetensors":
        raise ConfigError(f"-o {config.out}: a mixture is a folder. Choose a name of one.")
    if config.force:
        refuse_foreign(target)
    refuse_inputs(target, config.runs)
    with ExitStack() as stack:
        runs = [stack.enter_context(_open(ref)) for ref in config.runs]
        _refuse_repeated(runs)
        _refuse_inside(target, runs)
        for run in runs[1:]:
            _refuse_other(runs[0], run)
        mixture = Mixture(
            components=tuple(
                Component(label=run.ref, weight=weight, mean=Identity(blocks=run.identity))
                for run, weight in zip(runs, weights, strict=True)
            )
        )
        stamps = {file: stamp for run in runs for file, stamp in run.inputs.items()}
        stamps |= stamps_of(file for run in runs for file in documents_in(run.path))
        total = sum(file.stat().st_size for run in runs for file in run.inputs)
        done = 0
        with replacing(target, force=config.force) as partial:
            partial.mkdir()
            for number, run in enumerate(runs):
                folder = mixture.place(partial, number)
                (folder / POSTERIOR_FOLDER).mkdir(parents=True, exist_ok=True)
                for file, name in _tensor_files(run):
                    shutil.copyfile(file, folder / name)
                    done += file.stat().st_size
                    if progress is not None:
                        progress(done, total)
                for name in _records(run):
                    copy_contained(run.path, name, folder / name)
                copy_side_files(run.path, folder)
            write_own(partial / MIXTURE, mixture.model_dump_json(indent=2) + "\n")
            refuse_changed(stamps)
    return MixReport(
        path=target,
        labels=tuple(component.label for component in mixture.components),
        weights=mixture.weights,
        plain=mixture.plain,
        bytes=total,
        notes=tuple(_notes(mixture)),
    )


def _weights(config: MixConfig) -> tuple[float, ...]:
    """The weight of each run."""
    count = len(config.runs)
    if not 1 <= count <= MOST_COMPONENTS:
        raise ConfigError(
            f"{count} runs: a mixture has from 1 to {MOST_COMPONENTS} components. Name others."
        )
    weights = config.weights or (1.0,) * count
    if len(weights) != count:
        raise ConfigError(
            f"--weights: {len(weights)} given for {count} runs. Give one for each, in their order."
        )
    for weight in weights:
        if not 1e-9 <= weight <= 1e9:
            raise ConfigError(f"--weights {weight:g}: expected a number from 1e-9 to 1e9.")
    return weights


def _open(ref: str) -> Posterior:
    """Open a run, and check that it can be a component."""
    with ExitStack() as stack:
        run = stack.enter_context(open_posterior(ref))
        if run.is_file or is_adapter(run.path):
            kind = "a single file" if run.is_file else "an adapter"
            raise ConfigError(
                f"'{ref}' is {kind}, and the components of a mixture are folders of whole models. "
                "Name such a folder."
            )
        if read_mixture(run.path) is not None:
            raise ConfigError(f"'{ref}' is a mixture itself. Name the runs that it is made of.")
        refuse_emptied(run)
        refuse_quantised(run)
        check_side_files(run.path)
        if run.precision is None:
            raise PrecisionError(
                f"no precision for '{ref}', and every component of a mixture has one. Make it with "
                f"`bmerge precision {ref} --data TEXTS`."
            )
        refuse_matrices(
            run.precision,
            "a mixture",
            "Mix runs with other precisions, or merge one of these runs.",
        )
        if run.info is not None and run.info.mean.blocks != run.identity:
            raise PrecisionError(
                f"the precision of '{ref}' was taken at other weights than these: its record of "
                f"them differs. Make it again with `bmerge precision {ref} --data TEXTS --force`."
            )
        stack.pop_all()
        return run


def _refuse_repeated(runs: Sequence[Posterior]) -> None:
    """Check that no run is named twice."""
    found: dict[str, str] = {}
    for run in runs:
        place = os.path.realpath(run.path)
        if place in found:
            raise ConfigError(
                f"'{found[place]}' and '{run.ref}' are one run, named twice. Name it once; "
                "--weights says how much a run weighs."
            )
        found[place] = run.ref


def _refuse_inside(target: Path, runs: Sequence[Posterior]) -> None:
    """Check that nothing is written into the folder of a run."""
    place = Path(os.path.realpath(target))
    for run in runs:
        if place.is_relative_to(os.path.realpath(run.path)):
            raise CheckpointError(
                f"the output '{target}' lies in '{run.ref}', an input. Choose another."
            )


def _notes(mixture: Mixture) -> Iterator[str]:
    """What may not have been meant."""
    if len(mixture.components) == 1:
        yield "a mixture of one run merges as that run does"
    first: dict[str, str] = {}
    for component in mixture.components:
        if (other := first.setdefault(component.mean.blocks, component.label)) != component.label:
            yield f"'{other}' and '{component.label}' hold the same weights"


def _refuse_other(first: Posterior, run: Posterior) -> None:
    """Check that two runs are of one model.

    Raises:
        MismatchError: They are not; the message names what differs first.
    """
    ours = {name: spec.shape for name, spec in first.mean.specs.items()}
    theirs = {name: spec.shape for name, spec in run.mean.specs.items()}
    differing = next((n for n in (*ours, *theirs) if ours.get(n) != theirs.get(n)), None)
    configs = [read_model_config(model.path) for model in (first, run)]
    if differing is not None:
        shapes = [str(list(s[differing])) if differing in s else "none" for s in (ours, theirs)]
        what = f"'{differing}' is {shapes[0]} in '{first.ref}' and {shapes[1]} in '{run.ref}'"
    elif differences := find_differences(*configs):
        key, one, other, _ = differences[0]
        what = (
            f"config.json has {shown(key)} {shown(one)} in '{first.ref}' and {shown(other)} in "
            f"'{run.ref}'"
        )
    elif labels(configs[0]) != labels(configs[1]):
        what = f"'{first.ref}' and '{run.ref}' have other labels, or in another order"
    elif apart := tokens_apart(first.path, run.path):
        number, one, other = apart[0]
        what = f"token {number} is {shown(one)} in '{first.ref}' and {shown(other)} in '{run.ref}'"
    else:
        return
    raise MismatchError(f"{what}. The runs of a mixture are of one model and one task.")


def _tensor_files(run: Posterior) -> list[tuple[Path, Path]]:
    """The files of a run's mean and precision, and where they belong in the folder of a model."""
    assert run.precision is not None
    precisions = [(file, Path(POSTERIOR_FOLDER) / file.name) for file in run.precision.files]
    return [(file, Path(file.name)) for file in run.mean.files] + precisions


def _records(run: Posterior) -> list[Path]:
    """The indices of these files and the record of the precision, relative to the run."""
    found = [*run.path.glob("model.safetensors.index.json")]
    found += sorted((run.path / POSTERIOR_FOLDER).glob("*.json"))
    return [file.relative_to(run.path) for file in found]
