"""What `bmerge merge` does with a recipe of mergekit."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from bmerge_cli.flags import Settings
from bmerge_cli.merge_tables import plan_document, show_plan
from bmerge_cli.render import Screen, print_json
from mergekit_bayes.configs import parse_config, read_yaml_documents
from mergekit_bayes.errors import ConfigError
from mergekit_bayes.merge import MergeConfig, MergeReport, Part
from mergekit_bayes.mergekit.document import is_mergekit, read_recipes
from mergekit_bayes.mergekit.export import exported, refuse_unsaid
from mergekit_bayes.mergekit.running import Made, Stage, made_by, refuse_existing, stages_of
from mergekit_bayes.mergekit.stage_folders import begin, finish, is_done, remove_stages
from mergekit_bayes.mergekit.stages import needed_names
from mergekit_bayes.plan import MergePlan, plan_merge

# What a recipe does not say itself, and flags do.
_TAKEN = ("out", "force", "verify", "max_shard_size", "side_files", "dtype", "vocab")
_RULES = ("on_missing", "on_bad", "on_config", "on_base")


def mergekit_recipe(settings: Settings) -> Path | None:
    """The recipe of mergekit that is the only model of a command line; None without one."""
    models = settings["models"]
    if len(models) != 1 or not models[0].endswith((".yaml", ".yml")):
        return None
    path = Path(models[0])
    return path if path.is_file() and is_mergekit(read_yaml_documents(path)) else None


def stages_in(path: Path, settings: Settings) -> tuple[Stage, ...]:
    """The merges of a file of mergekit's YAML.

    Raises:
        ConfigError: A flag says what a recipe says itself, or the file cannot be read.
    """
    given = {name: value for name, value in settings.items() if name != "models"}
    seed = _seed(given.pop("param", {}), path)
    for name in given:
        if name not in (*_TAKEN, *_RULES):
            raise ConfigError(
                f"--{name.replace('_', '-')}: '{path}' is a recipe of mergekit and says what is "
                f"merged itself. With it go {', '.join(_flag(n) for n in (*_TAKEN, *_RULES))} and "
                "--param seed=N."
            )
    recipes = read_recipes(path)
    if "dtype" in given and any(r.dtype or r.out_dtype for r in recipes):
        raise ConfigError(f"--dtype: '{path}' says it itself, by 'dtype' or 'out_dtype'.")
    config = parse_config(MergeConfig, {"models": (), **given}, "bmerge merge")
    return stages_of(recipes, config, seed=seed)


def show_stages(
    stages: tuple[Stage, ...], screen: Screen, part: Part | None, *, as_json: bool
) -> None:
    """Print the plans of the merges, as far as their models are there."""
    documents = []
    for stage in stages:
        needed = needed_names(stage.recipe, stage.outputs)
        if waits := [name for name in needed if not Path(stage.outputs[name]).is_dir()]:
            screen.print(
                f"{stage.recipe.label} merges {', '.join(map(repr, waits))}, which other documents "
                "make first; it can be planned when they are there",
                markup=False,
            )
            continue
        # A plan replaces nothing, so an output that exists is no reason to stop.
        forced = stage.settings.model_copy(update={"force": True})
        with Stage(stage.recipe, forced, stage.outputs, stage.seed, stage.is_last).plan() as plan:
            show_plan(screen, plan, part)
            documents.append(plan_document(plan, part))
    if as_json:
        print_json(documents[0] if len(stages) == 1 and documents else {"stages": documents})


def merge_stages(
    stages: tuple[Stage, ...],
    merge: Callable[[MergePlan], MergeReport | None],
    screen: Screen,
) -> MergeReport | None:
    """Carry out the merges in turn; what only later ones need is removed at the end."""
    report = None
    if len(stages) > 1:
        refuse_existing(stages)
    earlier: list[Made] = []
    for stage in stages:
        with stage.plan(earlier) as plan:
            if stage.is_last:
                report = merge(plan)
                continue
            if is_done(plan):
                screen.print(f"'{plan.target}' is there already", markup=False)
            else:
                begin(plan)
                merge(plan)
                finish(plan)
            earlier.append(made_by(stage, plan))
    if report is not None:
        remove_stages(stage.place for stage in stages if not stage.is_last)
    return report


def print_recipe(
    kind: str, settings: Settings, config: Callable[[], MergeConfig], other_flags: Sequence[str]
) -> None:
    """Print a merge as a recipe of another tool, and write nothing else.

    Args:
        kind: Whose recipe; only `mergekit` is known.
        settings: The command line's.
        config: Makes the settings of the merge.
        other_flags: Those that were given and do not go with it.

    Raises:
        ConfigError: The recipe cannot say the merge, or the command line asks for more.
    """
    if kind != "mergekit":
        raise ConfigError(f"--print-recipe {kind}: expected mergekit, whose recipes are known.")
    if other_flags:
        raise ConfigError(f"--print-recipe writes no merge. Drop {other_flags[0]}.")
    if (recipe := mergekit_recipe(settings)) is not None:
        raise ConfigError(f"--print-recipe mergekit: '{recipe}' is a recipe of mergekit already.")
    checked = config()
    refuse_unsaid(checked)
    # Nothing is replaced, so an output that exists is no reason to stop.
    with plan_merge(checked.model_copy(update={"force": True})) as plan:
        typer.echo(exported(plan).text, nl=False)


def _seed(param: Mapping[str, Any], path: Path) -> int | None:
    for name in param:
        if name != "seed":
            raise ConfigError(
                f"--param {name}: '{path}' is a recipe of mergekit and says it itself, under "
                "'parameters'. Only --param seed=N goes with it."
            )
    try:
        return int(param["seed"]) if "seed" in param else None
    except ValueError:
        raise ConfigError(f"--param seed={param['seed']}: expected a whole number.") from None


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}" if name != "out" else "-o"
