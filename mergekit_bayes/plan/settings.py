"""What a person may ask of a merge, and which requests contradict each other."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field

from mergekit_bayes.configs import Config
from mergekit_bayes.errors import CheckpointError, ConfigError
from mergekit_bayes.posterior import Posterior, precision_path


class MergeConfig(Config):
    """Settings of one merge. The fields are the flags of `bmerge merge`, whose help explains them.

    Attributes:
        models: The tasks: `.safetensors` files, folders, or Hub ids.
        base: What the tasks were fine-tuned from; with it the merge adds changes, without it it averages.
        scale: One for all tasks, or one per task; dimensionless, negative removes (needs a base).
        precision: Another place for a model's precision, by the model's path as given.
        isotropic: One number as a model's precision, 1/weight^2.
        anchor: What training is taken to have pulled towards: `h0` (the base posterior, the published form),
            `none`, `zero-decay`, a number (1/weight^2), or `recorded`.
        guard: rho of the guard on removal, in (0, 1].
        counts: `equal` counts every likelihood precision per observation times one common count, the base's own
            (without one, the smallest on record);
            `recorded` as often as its data had observations.
        observations: `3x` multiplies a model's count, `1000` sets it; never touches its prior.
        shrink: `X` adds X times the tensor's mean to each likelihood precision, `row:X` X times its row's.
        pool: Replaces each precision by its tensor's (or row's) mean: the control of every claim for entries.
        only: Merge only the tensors whose name matches; the others are the base's (else the first model's).
        verify: Compare all bytes of each mean with its posterior's record, not only sampled blocks.
    """

    models: tuple[str, ...]
    base: str | None = None
    weights: Literal["uniform", "precision"] = "uniform"
    scale: tuple[float, ...] = (1.0,)
    out: str | None = None
    only: str | None = None
    precision: dict[str, str] = {}
    isotropic: dict[str, float] = {}
    anchor: str = "h0"
    guard: float = Field(0.2, gt=0, le=1)
    counts: Literal["equal", "recorded"] = "equal"
    observations: dict[str, str] = {}
    shrink: str | None = None
    pool: Literal["tensor", "row"] | None = None
    posterior: bool = True
    force: bool = False
    verify: bool = False


class Shrink(NamedTuple):
    amount: float
    by_row: bool


def check_scales(config: MergeConfig) -> tuple[float, ...]:
    n = len(config.models)
    if n == 0 or (n == 1 and config.base is None):
        raise ConfigError("a merge needs two models, or one and a --base.")
    if len(config.scale) not in (1, n):
        raise ConfigError(
            f"--scale: {len(config.scale)} given for {n} models. Give one for all, or one per model by repeating "
            "the flag in the models' order: --scale 1 --scale -0.5."
        )
    return config.scale * n if len(config.scale) == 1 else config.scale


def check_options(config: MergeConfig, scales: Sequence[float]) -> None:
    if any(not abs(s) < float("inf") for s in scales):
        raise ConfigError(f"--scale: {list(scales)} must be finite.")
    if config.base is None:
        if any(s < 0 for s in scales):
            raise ConfigError("a negative scale removes a task from something: name it with --base.")
        if sum(scales) <= 0:
            raise ConfigError("without --base the scales are shares and must sum to more than zero.")
        if config.anchor != "h0":
            raise ConfigError("--anchor says how tasks were pulled to the base: name it with --base.")
    if config.weights == "uniform":
        for flag in ("precision", "isotropic", "observations", "shrink", "pool", "anchor", "counts", "guard"):
            if getattr(config, flag) != MergeConfig.model_fields[flag].default:
                raise ConfigError(f"--{flag} only matters with --weights precision. Add it, or drop --{flag}.")
    elif config.base is not None and config.base in config.models:
        raise ConfigError(f"'{config.base}' is both --base and a model; what it changed would be nothing.")
    for ref in set(config.precision) & set(config.isotropic):
        raise ConfigError(f"'{ref}' has both --precision and --isotropic. Give one of them.")
    known = {*config.models, config.base}
    for flag in ("precision", "isotropic", "observations"):
        for ref in getattr(config, flag):
            if ref not in known:
                raise ConfigError(
                    f"--{flag} {ref}=...: no such model here. Name it as given: {', '.join(config.models)}."
                )
    for ref, value in config.isotropic.items():
        if not 0 < value < float("inf"):
            raise ConfigError(f"--isotropic {ref}={value}: a precision is a positive number.")
    if config.anchor not in ("h0", "none", "zero-decay", "recorded"):
        try:
            valid = 0 <= float(config.anchor) < float("inf")
        except ValueError:
            valid = False
        if not valid:
            raise ConfigError(f"--anchor '{config.anchor}': expected h0, none, zero-decay, recorded or a number >= 0.")
    parse_shrink(config.shrink)
    if config.only is not None:
        try:
            re.compile(config.only)
        except re.error as error:
            raise ConfigError(f"--only '{config.only}' is not a regular expression ({error}).") from None


def parse_shrink(text: str | None) -> Shrink | None:
    if text is None:
        return None
    amount = text.removeprefix("row:")
    try:
        value = float(amount)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ConfigError(f"--shrink '{text}': expected X or row:X with a number X >= 0.")
    return Shrink(value, text.startswith("row:"))


def choose_target(config: MergeConfig, models: Sequence[Posterior]) -> Path:
    files_only = all(m.is_file for m in models)
    target = Path(config.out or ("merged.safetensors" if files_only else "merged"))
    written = [target]
    if target.suffix == ".safetensors":
        written.append(report_path(target))
        written.append(precision_path(target))  # also where none is written: an old one would not belong
    for model in models:
        inputs = [*model.mean.files, *(model.precision.files if model.precision else ())]
        if any(p.resolve() == w.resolve() or w.resolve() in p.resolve().parents for p in inputs for w in written):
            raise CheckpointError(f"-o {target} would overwrite '{model.ref}', an input. Choose another -o.")
    for path in written:
        if path.exists() and not config.force:
            raise CheckpointError(f"'{path}' exists. Choose another -o, or pass --force to replace it.")
    return target


def report_path(target: Path) -> Path:
    """Where a merge's report goes: beside a file, inside a folder."""
    if target.suffix == ".safetensors":
        return target.with_name(target.name.removesuffix(".safetensors") + ".merge_report.json")
    return target / "merge_report.json"
