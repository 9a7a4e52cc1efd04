"""What `bmerge merge` does with adapters alone: one adapter, whose change is that of all."""

from pathlib import Path

from bmerge_cli.flags import Settings
from bmerge_cli.merge_tables import show_adapters
from bmerge_cli.render import Screen, progress_bar
from mergekit_bayes.errors import ConfigError
from mergekit_bayes.lora import AdapterReport, merge_adapters
from mergekit_bayes.lora.writers import FOLD_ALL
from mergekit_bayes.merge import MergeConfig
from mergekit_bayes.plan.trajectory import along_trajectory


def merge_adapters_alone(config: MergeConfig, settings: Settings, screen: Screen) -> AdapterReport:
    """Merge adapters into one, and print what was done.

    Args:
        config: The settings of the merge.
        settings: Those that the command line gives.
        screen: For notes and the report.

    Raises:
        ConfigError: A flag is for whole models only.
        BmergeError: The adapters cannot be merged.
    """
    taken = {"models", "weights", "scale", "out", "precision", "counts", "space", "rank", "force"}
    taken |= {"trajectory", "decay", "method", "param"}
    if foreign := sorted(set(settings) - taken):
        raise ConfigError(
            f"--{foreign[0].replace('_', '-')} is for whole models; adapters alone take --weights, "
            "--scale, --counts, --precision, --space, --rank, --method, --param and --trajectory. "
            f"For whole models: {FOLD_ALL}."
        )
    notes: list[str] = []
    config = along_trajectory(config, notes)
    if config.method is not None and "space" not in config.model_fields_set:
        config = config.model_copy(update={"space": "core"})
        notes.append(f"merging by {config.method} in the adapters' core space (--space core)")
    for note in notes:
        screen.print(note, markup=False)
    if any(isinstance(s, str) for s in config.scale):
        raise ConfigError("--scale: adapters alone take one number each, no MODEL:REGEX=X.")
    with progress_bar(screen, "merging") as advance:
        report = merge_adapters(
            config.models,
            Path(config.out or "merged"),
            scales=[float(s) for s in config.scale],
            weights=config.weights,
            space=config.space,
            rank=config.rank,
            method=config.method,
            param=config.param,
            counts=config.counts,
            precision=config.precision,
            identities=config.identities,
            precision_identities=config.precision_identities,
            force=config.force,
            progress=advance,
        )
    show_adapters(screen, report)
    return report
