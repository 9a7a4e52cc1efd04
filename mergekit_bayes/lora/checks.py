"""What a merge of adapters refuses: options, outputs, bases and precisions that do not fit."""

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from mergekit_bayes.checkpoint.replacing import real_output, refuse_foreign
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError, PrecisionError
from mergekit_bayes.lora.adapter import Adapter
from mergekit_bayes.lora.inputs import Space, Weights
from mergekit_bayes.lora.variants import initial_move
from mergekit_bayes.lora.writers import FOLD_ALL
from mergekit_bayes.methods import method_named


def check_options(
    adapters: Sequence[str],
    scales: Sequence[float],
    weights: Weights,
    space: Space,
    rank: int | None,
    method: str | None = None,
) -> tuple[float, ...]:
    """Check the settings against each other, and return one scale per adapter.

    Raises:
        ConfigError: They contradict each other.
    """
    if not adapters:
        raise ConfigError("a merge of adapters needs at least one.")
    if len(scales) not in (1, len(adapters)):
        raise ConfigError(
            f"--scale: {len(scales)} given for {len(adapters)} adapters. Give one for all, or one "
            "each."
        )
    shares = tuple(map(float, scales)) * (len(adapters) if len(scales) == 1 else 1)
    if not all(map(math.isfinite, shares)):
        raise ConfigError(f"--scale: {list(shares)} must be finite.")
    if weights == "precision" and (min(shares) < 0 or not sum(shares)):
        raise ConfigError(
            "--weights precision without a base takes the scales for shares: none below zero, not "
            f"all zero. To remove an adapter, fold, with a scale below zero: {FOLD_ALL}."
        )
    if weights == "precision" and method is not None:
        _refuse_method(method)
    if space == "concat" and weights == "precision":
        raise ConfigError(
            "--space concat is exact task arithmetic and weighs no entries; use --space product."
        )
    if space == "core" and weights == "precision":
        raise ConfigError(
            "--space core weighs no entries; use --space product with --weights precision."
        )
    if rank is not None and space not in ("product", "core"):
        raise ConfigError(
            f"--rank is for --space product and core; --space {space} keeps the ranks that the "
            "adapters have."
        )
    if rank is not None and rank < 1:
        raise ConfigError(f"--rank {rank}: expected at least 1.")
    return shares


def check_precision_options(
    adapters: Sequence[str],
    weights: Weights,
    space: Space,
    counts: Literal["equal", "recorded"],
    places: Mapping[str, str],
) -> None:
    """Refuse options on precisions where none is read, or of other adapters.

    In factor space a precision's record tells with which factors training began.

    Args:
        adapters: The adapters as given.
        weights: What weighs changes.
        space: The space in which they are merged.
        counts: The numbers of observations for which precisions are counted.
        places: Other places of precisions, by the adapter.

    Raises:
        ConfigError: There is such an option.
    """
    if weights == "uniform":
        useless = {"counts": counts != "equal", "precision": bool(places) and space != "factor"}
        for name in (name for name, is_given in useless.items() if is_given):
            raise ConfigError(
                f"--{name} only matters where precisions weigh. Add --weights precision, or drop "
                "it."
            )
    for ref in places:
        if ref not in adapters:
            raise ConfigError(
                f"--precision {ref}=...: no such adapter here. Name it as given: "
                f"{', '.join(adapters)}"
            )


def _refuse_method(name: str) -> None:
    """Refuse a method beside `--weights precision`.

    Raises:
        ConfigError: Always; the way out depends on whether the method needs precisions itself.
    """
    method = method_named(name, with_base=True)  # a misspelt name is the first thing to tell
    by_equal_weights = f", or --weights precision for {name} by equal weights"
    raise ConfigError(
        f"--method {name} and --weights precision are two rules, and adapters alone merge by one. "
        "Leave out --method for the average by precision"
        f"{'' if method.needs_precision or method.reads_weights else by_equal_weights}."
    )


def check_output(out: Path, adapters: Sequence[Adapter]) -> None:
    """Refuse an output that is not a folder, or that would replace something of value.

    Raises:
        CheckpointError: It would replace an adapter, or a folder that is no model, or is a link to
            itself.
        ConfigError: It is a file.
    """
    if out.suffix == ".safetensors":
        raise ConfigError(f"-o {out}: an adapter is a folder. Name one.")
    refuse_foreign(out)
    paths = [adapter.posterior.path.resolve() for adapter in adapters]
    if any(real_output(out) in (path, *path.parents) for path in paths):
        raise CheckpointError(
            f"-o {out} would overwrite an adapter that is merged. Choose another -o."
        )


def check_linear(adapters: Sequence[Adapter]) -> None:
    """Refuse adapters whose changes of a base do not add up without it.

    Raises:
        ConfigError: One has magnitudes (DoRA), trained rows, or an initialisation that moves the
            base by what depends on it.
    """
    for adapter in adapters:
        move = initial_move(adapter.config)
        reason = (
            "has magnitudes (use_dora), and scales the base's weights by them"
            if adapter.config.get("use_dora")
            else "holds rows of trained tokens (trainable_token_indices), which replace the base's"
            if adapter.rows
            else f"began with {move}, which takes a part of the base's weights out of them"
            if move
            else None
        )
        if reason is not None:
            raise ConfigError(
                f"'{adapter.ref}' {reason}: such changes do not add up without the base. Fold "
                f"instead: `{_fold_of(adapters)}`."
            )


def _fold_of(adapters: Sequence[Adapter]) -> str:
    """The command that adds what these adapters change to their base."""
    models = (shlex.quote(f"BASE+{adapter.ref}") for adapter in adapters)
    base = " --base BASE" if len(adapters) > 1 else ""  # else they would be averaged
    return f"bmerge merge {' '.join(models)}{base} -o OUT"


def check_bases(adapters: Sequence[Adapter]) -> list[str]:
    """Compare the bases on which adapters were trained, as far as they are on record.

    Returns:
        Notes on bases that are only taken to be the same.

    Raises:
        MismatchError: They were trained on different weights.
    """
    notes = []
    first = adapters[0]
    for other in adapters[1:]:
        bases = [adapter.base for adapter in (first, other) if adapter.base is not None]
        if len(set(bases)) == 2:
            raise MismatchError(
                f"'{first.ref}' and '{other.ref}' were trained on different weights; their records "
                "say so."
            )
        names = [a.config.get("base_model_name_or_path") for a in (first, other)]
        if len(bases) < 2 and names[0] != names[1]:
            notes.append(
                f"'{first.ref}' names the base '{names[0]}', '{other.ref}' '{names[1]}': taken to "
                "be the same"
            )
    return notes


def check_precisions(
    adapters: Sequence[Adapter], counts: Literal["equal", "recorded"]
) -> tuple[float | None, ...]:
    """Compare the adapters' precisions, and return the number of observations that each stands for.

    Args:
        adapters: The adapters.
        counts: `equal` takes the smallest number on record for all.

    Raises:
        PrecisionError: A precision is missing, or they are of different kinds.
    """
    for adapter in adapters:
        if adapter.posterior.precision is None:
            raise PrecisionError(
                f"no precision for '{adapter.ref}' (looked for "
                f"'{adapter.posterior.path / 'posterior'}'). Fine-tune it with IVON, make one with "
                "`bmerge precision`, or merge with --weights uniform."
            )
    kinds = {(i.estimator, i.unit): a.ref for a in adapters if (i := a.posterior.info) is not None}
    if len(kinds) > 1:
        (one, ref), (two, other) = list(kinds.items())[:2]
        raise PrecisionError(
            f"precisions of different kinds do not add: '{ref}' has {one[0]} per {one[1]}, "
            f"'{other}' {two[0]} per {two[1]}. Make them alike with `bmerge precision`."
        )
    recorded = tuple(adapter.observations for adapter in adapters)
    if counts == "recorded":
        return recorded
    smallest = min((n for n in recorded if n), default=None)
    return tuple(smallest if n else None for n in recorded)
