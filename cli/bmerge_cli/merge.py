"""`bmerge merge`: add, average or subtract models, by equal weights or by precision."""

import os
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bmerge_cli import values
from bmerge_cli.delivery import PushTo, delivering
from bmerge_cli.flags import Settings, argument, flags_of, option, parse_flags
from bmerge_cli.merge_tables import (
    plan_document,
    show_plan,
    show_predictions,
    show_report,
)
from bmerge_cli.render import Json, Quiet, Screen, console, failures, print_json, progress_bar
from mergekit_bayes.checkpoint.sources import CHECKPOINT, is_hub_id, resolve
from mergekit_bayes.configs import parse_config, read_yaml
from mergekit_bayes.errors import BmergeError, ConfigError
from mergekit_bayes.lora import is_adapter
from mergekit_bayes.lora.config import WEIGHTS
from mergekit_bayes.merge import (
    MergeConfig,
    MergeReport,
    Part,
    carry_out,
    join,
    parse_part,
    part_of_launcher,
    predict_merges,
)
from mergekit_bayes.plan import MergePlan, partial_path, plan_merge
from mergekit_bayes.recipes import read_recipe

if TYPE_CHECKING:
    from mergekit_bayes.lora import AdapterReport

_YAML = (".yaml", ".yml")


@failures()
@flags_of(
    MergeConfig,
    argument("models", read=values.models),
    option("base"),
    option("weights"),
    option("scale", read=values.scales),
    option("trajectory"),
    option("decay"),
    option("method"),
    option("param", read=values.parameters),
    option("out", "--out", "-o"),
    option("only"),
    option("precision", read=values.assignments),
    option("isotropic", read=values.numbers),
    option("anchor"),
    option("guard"),
    option("counts"),
    option("observations", read=values.assignments),
    option("shrink"),
    option("pool"),
    option("on_missing"),
    option("vocab"),
    option("on_bad"),
    option("on_config"),
    option("on_base"),
    option("side_files"),
    option("dtype", read=values.dtype),
    option("max_shard_size"),
    option("posterior"),
    option("verify"),
    option("space"),
    option("rank"),
    option("force"),
)
def command(
    settings: Settings,
    threads: Annotated[
        int | None, typer.Option(help="Number of threads; by default one a core, at most 4.")
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(help="I/N: do part I of N; the same line without it joins the parts."),
    ] = None,
    sync: Annotated[
        bool, typer.Option("--sync", help="Wait for the disk, to survive a power cut, too.")
    ] = False,
    then: Annotated[
        Path | None,
        typer.Option(
            help="adapt.yaml: adapt the merge by these settings, as `bmerge adapt` does; their "
            "model is the merge, and their output OUT-adapted where they name none."
        ),
    ] = None,
    push_to: PushTo = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    predict: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X,X,...",
            help="Print by how much a merge with these scales, one for all models or one for each, "
            "is predicted to raise each model's loss, and write nothing; repeatable, all by one "
            "pass over the inputs.",
        ),
    ] = None,
    recipe_of: Annotated[
        str | None,
        typer.Option(
            "--print-recipe",
            metavar="mergekit",
            help="Print the recipe by which mergekit makes this merge, and stop.",
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge models: an average, or with --base the sum of their changes.

    uniform: average, task arithmetic.  precision: precision-weighted average, gradient matching
    (Daheim et al., ICLR 2024). A precision is read from X.posterior or
    MODEL/posterior/. Adapters alone merge into an adapter: a sum, or with precision weights an
    average. The same line resumes a merge that was stopped; until it is finished, its output is
    in OUT.partial. With --push-to and no -o the output goes to a temporary folder.
    """
    if recipe_of is not None:
        others = {"--predict": predict, "--dry-run": dry_run, "--shard": shard, "--then": then}
        others |= {"--push-to": push_to, "--json": as_json}
        given = [flag for flag, value in others.items() if value]
        from bmerge_cli.recipe_stages import print_recipe

        print_recipe(recipe_of, settings, partial(_config, settings), given)
        return
    if predict:
        refused = {
            "-o": "out" in settings,
            "--dry-run": dry_run,
            "--shard": shard,
            "--sync": sync,
            "--push-to": push_to,
        }
        wrong = [flag for flag, value in (refused | {"--then": then}).items() if value]
        screen = console(quiet=quiet)
        _predict(settings, predict, wrong, screen, threads=threads, as_json=as_json)
        return
    if then is not None:
        if dry_run or shard is not None or push_to is not None:
            raise ConfigError("--then goes with none of --dry-run, --shard and --push-to.")
        _merge_and_adapt(settings, then, threads, sync=sync, as_json=as_json, quiet=quiet)
        return
    with delivering(None if dry_run else push_to, settings.get("out")) as delivery:
        if delivery.temporary is not None:
            if shard is not None or part_of_launcher() is not None:
                raise ConfigError(
                    "--push-to: parts of a merge meet in one folder; name it with -o."
                )
            settings["out"] = delivery.out
        screen = console(quiet=quiet)
        report: MergeReport | AdapterReport | None
        if (recipe := _recipe_of_mergekit(settings)) is not None:
            from bmerge_cli.recipe_stages import merge_stages, show_stages, stages_in

            stages = stages_in(recipe, settings)
            part = parse_part(shard) if shard is not None else None
            if dry_run:
                show_stages(stages, screen, part, as_json=as_json)
                return
            if len(stages) > 1 and (part is not None or part_of_launcher() is not None):
                raise ConfigError(
                    f"'{recipe}' has {len(stages)} merges, and the parts of a merge go with one. "
                    "Write each into a file of its own."
                )
            carry = partial(_carry_out, part=part, threads=threads, sync=sync)
            report = merge_stages(stages, lambda plan: carry(plan, screen), screen)
        elif _adapters_alone(config := _config(settings)):
            if dry_run or shard is not None or threads is not None or sync:
                raise ConfigError(
                    "--dry-run, --shard, --threads and --sync are for whole models, not adapters "
                    "alone."
                )
            from bmerge_cli.adapters_alone import merge_adapters_alone

            report = merge_adapters_alone(config, settings, screen)
        elif (config.space, config.rank) != ("product", None):
            raise ConfigError("--space and --rank are for adapters alone; these are whole models.")
        else:
            part = parse_part(shard) if shard is not None else None
            if dry_run:
                _print_plan(config, screen, part, as_json=as_json)
                return
            report = _merge_models(config, screen, part, threads=threads, sync=sync)
        if report is not None:
            delivery.finish(report, report.path, screen, as_json=as_json, quiet=quiet)


def _merge_and_adapt(
    settings: Settings, then: Path, threads: int | None, *, sync: bool, as_json: bool, quiet: bool
) -> None:
    """Merge, and adapt what was merged; the settings of both are checked before."""
    from bmerge_cli.adapting import adapt
    from bmerge_cli.training import Line
    from mergekit_bayes.adapt.before_merge import refuse_before_merge
    from mergekit_bayes.adapt.settings import AdaptConfig

    config = _config(settings)
    out = config.out or "merged"
    if out.endswith(".safetensors") or _adapters_alone(config):
        raise ConfigError(
            "--then adapts the merge of whole models in a folder: name one with -o, and the base "
            "before each adapter and once more (BASE+ADAPTER --base BASE)."
        )
    words, settings_of_then = [f"model={out}"], read_yaml(then)
    if not _is_one_place(named := settings_of_then.get("model", out), out):
        raise ConfigError(
            f"{then}: model: --then adapts the merge, '{out}', and this is '{named}'. Leave it out."
        )
    if "output" not in settings_of_then:
        words.append(f"output={out.rstrip(os.sep)}-adapted")
    line = Line("adapt", then, words, {}, None, as_json, quiet)
    with plan_merge(config) as plan:
        has_precision = plan.info is not None and not any(s.has_matrices for s in plan.steps)
    refuse_before_merge(line.load(AdaptConfig), has_precision=has_precision)
    screen = console(quiet=quiet)
    _merge_models(config, screen, None, threads=threads, sync=sync)
    try:
        adapt(line)
    except (BmergeError, KeyboardInterrupt) as error:
        again = shlex.join(["bmerge", "adapt", str(then), *(f"--set={word}" for word in words)])
        screen.print(f"the merge is in '{out}'; go on with `{again}`", markup=False)
        if isinstance(error, KeyboardInterrupt):
            raise typer.Exit(130) from None
        raise


def _is_one_place(named: object, out: str) -> bool:
    """Whether what a file names is the path of an output, perhaps in another spelling."""
    if not isinstance(named, str):
        return False
    here, there = (os.path.abspath(os.path.expanduser(path)) for path in (named, out))
    return here == there


def _config(settings: Settings) -> MergeConfig:
    """Settings from flags, or from a recipe that the given flags beat."""
    models = settings["models"]
    recipes = [m for m in models if m.endswith(_YAML)]
    if not recipes:
        return parse_flags(MergeConfig, settings, "bmerge merge")
    if len(models) > 1:
        raise ConfigError(f"'{recipes[0]}' is a recipe and names its own models. Give it alone.")
    flags = {name: value for name, value in settings.items() if name != "models"}
    return parse_config(MergeConfig, read_recipe(Path(recipes[0])) | flags, recipes[0])


def _recipe_of_mergekit(settings: Settings) -> Path | None:
    """The recipe of mergekit that is the only model of the line; None for any other line."""
    if not settings["models"][0].endswith(_YAML):
        return None
    from bmerge_cli.recipe_stages import mergekit_recipe  # it has much to load, and few need it

    return mergekit_recipe(settings)


def _adapters_alone(config: MergeConfig) -> bool:
    if config.base is not None:
        return False
    return all(map(_may_be_adapter, config.models)) and all(
        is_adapter(resolve(m, CHECKPOINT)) for m in config.models
    )


def _may_be_adapter(ref: str) -> bool:
    """Whether a model may be an adapter alone: a folder, or the file in it for its folder."""
    path = os.path.expanduser(ref)
    is_its_file = os.path.basename(path) == WEIGHTS and os.path.isfile(path)
    return is_hub_id(ref) or os.path.isdir(path) or is_its_file


def _predict(
    settings: Settings,
    sets: Sequence[str],
    refused: Sequence[str],
    screen: Screen,
    *,
    threads: int | None,
    as_json: bool,
) -> None:
    """Print the predictions for some sets of scales; `refused` are flags that do not go with it."""
    given = [s for s in settings.get("scale", ()) if not isinstance(s, str)]
    if refused or given:
        raise ConfigError(
            f"--predict writes no merge and names its scales itself. Drop "
            f"{refused[0] if refused else f'--scale {given[0]:g}'}."
        )
    config = _config(settings)
    if _adapters_alone(config):
        raise ConfigError(
            "--predict is for whole models: put the base before each adapter, and name it: "
            "BASE+A BASE+B --base BASE."
        )
    if part_of_launcher() is not None:
        raise ConfigError("--predict reads the models in one process. Start it without a launcher.")
    scales = values.vectors(sets, "--predict")
    with progress_bar(screen, "reading") as advance:
        report = predict_merges(config, scales, threads=threads, progress=advance)
    show_predictions(screen, report)
    if as_json:
        print_json(report.model_dump(mode="json"))


def _print_plan(config: MergeConfig, screen: Screen, part: Part | None, *, as_json: bool) -> None:
    # A plan replaces nothing, so an output that exists is no reason to stop.
    with plan_merge(config.model_copy(update={"force": True})) as plan:
        show_plan(screen, plan, part)
        if as_json:
            print_json(plan_document(plan, part))


def _merge_models(
    config: MergeConfig, screen: Screen, part: Part | None, *, threads: int | None, sync: bool
) -> MergeReport | None:
    """Plan a merge of whole models and carry it out."""
    with plan_merge(config) as plan:
        return _carry_out(plan, screen, part=part, threads=threads, sync=sync)


def _carry_out(
    plan: MergePlan, screen: Screen, *, part: Part | None, threads: int | None, sync: bool
) -> MergeReport | None:
    """Merge whole models; no report where another process, or a later call, makes it."""
    launched = part_of_launcher() if part is None else None
    if launched is not None and launched.number > 1:  # one rank speaks for all
        screen = console(quiet=True)
    with progress_bar(screen, "merging") as advance:
        merge = partial(carry_out, part=part) if launched is None else partial(join, part=launched)
        try:
            report = merge(
                plan,
                progress=advance,
                threads=threads,
                sync=sync,
                say=lambda text: screen.print(text, markup=False),
            )
        except KeyboardInterrupt:
            screen.print(
                f"stopped; the same line goes on from '{partial_path(plan.target)}'", markup=False
            )
            raise typer.Exit(130) from None
    if report is not None:
        show_report(screen, report)
    elif part is not None:
        screen.print(
            f"part {part.number} of {part.of} is done; the same line without --shard joins the "
            "parts"
        )
    return report
