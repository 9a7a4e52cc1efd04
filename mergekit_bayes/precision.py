"""A precision for a checkpoint that has none: the root-GGN diagonal over a person's data.

The likelihood part is `N * F`, with F the curvature per observation and N all of the data that it
stands for; how many examples were really looked at is recorded apart.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mergekit_bayes.checkpoint.layout import checkpoint_files, precision_path
from mergekit_bayes.checkpoint.names import Renaming, find_renaming
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.checkpoint.sources import is_hub_id, pinned
from mergekit_bayes.checkpoint.tokenizers import tokenizer_identity
from mergekit_bayes.curvature.ggn import ggn_diagonal
from mergekit_bayes.curvature.health import precision_health
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError
from mergekit_bayes.models.encode import Collate, batches, encode_rows, observations
from mergekit_bayes.models.load import UNIT, Task, load_model
from mergekit_bayes.models.places import checkpoint_names
from mergekit_bayes.models.quiet import quiet_libraries, with_bar
from mergekit_bayes.models.rows import load_rows
from mergekit_bayes.posterior import Anchor, PosteriorInfo, Prior, identify, save_posterior
from mergekit_bayes.records import Config


class PrecisionConfig(Config):
    """Settings of `bmerge precision`.

    Attributes:
        model: A folder or Hub id; a Hub id needs `output`.
        data: What the precision stands for; `where` keeps rows with these values.
        examples: How many rows are looked at, at random.
        batch_size: Rows a backward pass; smaller batches give more draws of the same data.
        prior: Isotropic prior precision to include, 1/weight^2.
    """

    model: str
    data: str | tuple[str, ...]
    output: str | None = None
    where: dict[str, Any] | None = None
    text_column: str = "text"
    label_column: str = "label"
    examples: int = 2000
    batch_size: int = 8
    max_length: int = 512
    prior: float = 0.0
    seed: int = 0
    task: Task = "auto"
    force: bool = False


class PrecisionReport(Config):
    """Where the precision was written, and what it stands for."""

    path: Path
    estimator: str
    unit: str
    observations: int
    sampled: int
    health: dict[str, float]


def run_precision(config: PrecisionConfig, *, quiet: bool = False) -> PrecisionReport:
    """Estimate a checkpoint's precision and store it in its own `posterior/`, or where `output`
    says.

    Raises:
        CheckpointError: There is one already, or the model cannot be loaded.
        ConfigError: A Hub id without an output.
        MismatchError: Data without the named columns.
    """
    if config.output is None and is_hub_id(config.model):
        raise ConfigError(
            f"'{config.model}' is a Hub id, whose cache is not ours to write to: name a place with "
            "-o."
        )
    _check(config)
    target = (
        Path(config.output) if config.output else precision_path(Path(config.model).expanduser())
    )
    if target.exists() and not config.force:
        raise CheckpointError(
            f"'{target}' exists. Choose another -o, or pass --force to replace it."
        )
    with quiet_libraries(quiet):
        return _run(config)


def _run(config: PrecisionConfig) -> PrecisionReport:
    loaded = load_model(config.model, config.task)
    source = SafetensorsSource(checkpoint_files(loaded.path))
    parameters = {n: p for n, p in loaded.model.named_parameters() if p.requires_grad}
    rename = _renaming(source, checkpoint_names(loaded.model, parameters))
    # Labels are not used: root-GGN needs the model's own distribution only.
    rows = load_rows(config.data, where=config.where, columns=[config.text_column])
    examples = encode_rows(rows, loaded, text=config.text_column, max_length=config.max_length)
    total = observations(examples, loaded.task)
    order = torch.randperm(
        len(examples), generator=torch.Generator().manual_seed(config.seed)
    ).tolist()
    chosen = [examples[i] for i in order[: config.examples]]
    loaded.use_gpu()
    cut = batches(chosen, config.batch_size, Collate(loaded.pad), device=loaded.device)
    shown = with_bar(cut, "curvature", math.ceil(len(chosen) / config.batch_size))
    found = ggn_diagonal(loaded.model, shown, seed=config.seed)
    precision = {
        n: t.mul_(total / found.observations).add_(config.prior) for n, t in found.total.items()
    }
    named = checkpoint_names(loaded.model, precision)
    tied: dict[str, str] = getattr(loaded.model, "all_tied_weights_keys", None) or {}
    ref = pinned(config.model, loaded.path)
    origin = (
        {"model": ref} if ref != config.model or is_hub_id(ref) else {}
    )  # of the Hub; a path says nothing
    info = PosteriorInfo(
        estimator="ggn",
        unit=UNIT[loaded.task],
        observations=total,
        ess=total,
        sampled=len(chosen),
        prior=Prior(kind="isotropic", precision=config.prior) if config.prior else Prior(),
        anchor=Anchor(),
        mean=identify(source),
        tokenizer=tokenizer_identity(loaded.path),
        dtype=str(next(loaded.model.parameters()).dtype).removeprefix("torch."),
        aliases={alias: rename(name, source.specs) for alias, name in tied.items()},
        training={"batch_size": config.batch_size, "seed": config.seed} | origin,
        health=precision_health(precision),
    )
    arrays = {rename(n, source.specs): t.cpu().numpy() for n, t in named.items()}
    source.close()
    out = Path(config.output) if config.output else None
    path = save_posterior(loaded.path, arrays, info, out=out, force=config.force)
    return PrecisionReport(
        path=path,
        estimator="ggn",
        unit=UNIT[loaded.task],
        observations=total,
        sampled=len(chosen),
        health=info.health,
    )


def _check(config: PrecisionConfig) -> None:
    if config.prior < 0:
        raise ConfigError(f"--prior {config.prior}: a precision is not negative.")
    for name in ("examples", "batch_size"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} {getattr(config, name)}: at least one row is needed.")


def _renaming(source: SafetensorsSource, named: Mapping[str, torch.Tensor]) -> Renaming:
    """How names in memory become the file's, which may lack their common prefix (`h.0...` of GPT-2
    on the Hub).
    """
    rename = find_renaming(source.specs, named)
    for name in named:
        if rename(name, source.specs) not in source.specs:
            raise MismatchError(
                f"'{name}' is a parameter of the model, but {source.files[0]} does not hold it, so "
                "its values were "
                "made up on loading. Fine-tune the model first, or choose another --task."
            )
    return rename
