"""`bmerge preview`: many scales of one merge, measured without writing a model."""

from bmerge_cli import values
from bmerge_cli.flags import Settings, argument, flags_of, option, parse_flags
from bmerge_cli.preview_tables import show_preview
from bmerge_cli.render import Json, Quiet, console, failures, print_result, steps_bar
from mergekit_bayes.preview.settings import PreviewConfig


@failures()
@flags_of(
    PreviewConfig,
    argument("recipe"),
    option("data", read=values.named_texts),
    option("test", read=values.named_texts),
    option("scales", read=values.vectors),
    option("grid", read=values.vector),
    option("design"),
    option("search"),
    option("between", read=values.vector),
    option("predict_first"),
    option("choose"),
    option("output", "--out", "-o"),
    option("text_column"),
    option("label_column"),
    option("where", read=values.selection),
    option("max_rows"),
    option("window"),
    option("stride"),
    option("concatenate"),
    option("batch_size"),
    option("seed"),
    option("device"),
    option("dtype"),
    option("trust_remote_code"),
    option("force"),
)
def command(settings: Settings, as_json: Json = False, quiet: Quiet = False) -> None:
    """Measure many scales of one merge, without writing a model.

    RECIPE is what `bmerge merge` writes beside a merge (merge_recipe.yaml), or a YAML file of its
    settings. Its models are read once and kept in memory; for each vector of scales the merge is
    formed in place in one loaded model and measured: nats a token, or accuracy and nats an example
    of a classifier. A preview has the parameters of the merge that it stands for.

    The output holds report.md, a picture, preview.json, and chosen.yaml, the recipe of the merge
    that is recommended: bmerge merge OUT/chosen.yaml -o MODEL.
    """
    from mergekit_bayes.preview.asking import refuse_early

    config = parse_flags(PreviewConfig, settings, "bmerge preview")
    refuse_early(config)
    from mergekit_bayes.preview.run import run_preview

    screen = console(quiet=quiet)
    with steps_bar(console(quiet=quiet or as_json)) as advance:
        report = run_preview(config, quiet=quiet, progress=advance)
    show_preview(screen, report)
    print_result(report, report.path, as_json=as_json, quiet=quiet)
