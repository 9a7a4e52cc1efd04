"""`bmerge precision`: give an existing checkpoint its precision."""

from functools import partial

from bmerge_cli import values
from bmerge_cli.flags import Settings, argument, flags_of, option, parse_flags
from bmerge_cli.processes import one_voice, start_processes
from bmerge_cli.render import (
    NOTHING_WRITTEN,
    Json,
    Quiet,
    console,
    failures,
    interrupts,
    print_result,
)
from mergekit_bayes.precision.settings import PrecisionConfig

_ROWS = {
    "data": "rows",
    "self-generated": "texts that the model wrote",
    "random-tokens": "rows of random tokens",
}


@failures()
@one_voice
@flags_of(
    PrecisionConfig,
    argument("model"),
    option("data"),
    option("moments", "--from"),
    option("observations", low=1),
    option("batch_observations", low=1),
    option("step", low=1),
    option("beta2"),
    option("self_generated", low=1),
    option("keep_generated"),
    option("random_tokens", low=1),
    option("estimator"),
    option("blocks", low=1),
    option("rank", low=1),
    option("output", "--out", "-o"),
    option("where", read=values.selection),
    option("text_column"),
    option("messages_column"),
    option("prompt_column"),
    option("completion_column"),
    option("label_column"),
    option("examples", low=1),
    option("batch_size", low=1),
    option("max_length", low=2),
    option("pool"),
    option("sums"),
    option("prior"),
    option("seed"),
    option("task"),
    option("resume"),
    option("save_every"),
    option("num_processes", low=1),
    option("device"),
    option("dtype"),
    option("trust_remote_code"),
    option("force"),
)
def command(settings: Settings, as_json: Json = False, quiet: Quiet = False) -> None:
    """Estimate the curvature of a checkpoint and store it as its precision.

    With --from it is Adam's second moments that are stored, scaled by N B / (1 - beta2^step).
    """
    config = parse_flags(PrecisionConfig, settings, "bmerge precision")
    with interrupts(partial(_left_behind, config)):
        _run(config, as_json=as_json, quiet=quiet)


def _left_behind(config: PrecisionConfig) -> str:
    from mergekit_bayes.precision.passes import left_behind

    return left_behind(config) or NOTHING_WRITTEN


def _run(config: PrecisionConfig, *, as_json: bool, quiet: bool) -> None:
    start_processes(config.num_processes)
    from mergekit_bayes.posterior.info import INPUTS, KRONECKER
    from mergekit_bayes.precision.run import run_precision
    from mergekit_bayes.precision.stability import in_words

    report = run_precision(config, quiet=quiet or as_json)
    if report.rows is None:
        basis = f"second moments of {report.step:,} steps, stands for"
    else:
        rows = _ROWS[report.source]
        basis = f"looked at {report.sampled:,} of {report.rows:,} {rows}, stands for all their"
    of = " of what has no matrices" if report.estimator in (INPUTS, KRONECKER) else ""
    console(quiet=quiet).print(
        f"{report.estimator}: {basis} {report.observations:,} {report.unit}s; median precision{of} "
        f"{report.health['precision_median']:.3g} (1/weight^2)",
        markup=False,
    )
    for note in report.notes:
        console(quiet=quiet).print(f"note: {note}", markup=False)
    console(quiet=quiet).print(in_words(report), markup=False)
    if report.unit == "example":
        console(quiet=quiet).print(f"loss: {report.loss}", markup=False)
    print_result(report, report.path, as_json=as_json, quiet=quiet)
