"""`bmerge evaluate`: perplexity on texts, toxicity of sampled continuations, a classifier's
calibration; of several models side by side.
"""

import typer

from bmerge_cli import values
from bmerge_cli.compare_tables import show_compare
from bmerge_cli.evaluate_tables import show_report
from bmerge_cli.flags import Settings, argument, flags_of, option, parse_flags
from bmerge_cli.processes import one_voice, start_processes
from bmerge_cli.render import Json, Quiet, console, failures, print_json, steps_bar
from mergekit_bayes.compare.settings import CompareConfig
from mergekit_bayes.documents import parse_json


@failures()
@one_voice
@flags_of(
    CompareConfig,
    argument("models"),
    option("perplexity", read=values.named_texts),
    option("toxicity"),
    option("scorer"),
    option("judge"),
    option("classify", read=values.named_texts),
    option("label_column"),
    option("bins"),
    option("lm_eval"),
    option("lm_eval_include"),
    option("lm_eval_limit"),
    option("lm_eval_shots"),
    option("samples"),
    option("prior"),
    option("posterior_temperature"),
    option("precision"),
    option("output", "--out", "-o"),
    option("four_bits"),
    option("relearn"),
    option("relearn_where", read=values.selection),
    option("relearn_rows"),
    option("relearn_steps"),
    option("relearn_rate"),
    option("window"),
    option("stride"),
    option("concatenate"),
    option("text_column"),
    option("prompt_column"),
    option("where", read=values.selection),
    option("prompts_where", read=values.selection),
    option("max_rows"),
    option("prompts"),
    option("continuations"),
    option("new_tokens"),
    option("top_p"),
    option("temperature"),
    option("threshold"),
    option("seed"),
    option("batch_size"),
    option("sampling_batch"),
    option("bootstrap"),
    option("num_processes", low=1),
    option("device"),
    option("dtype"),
    option("trust_remote_code"),
    option("force"),
)
def command(settings: Settings, as_json: Json = False, quiet: Quiet = False) -> None:
    """Measure perplexity on texts, toxicity of continued prompts, tasks of lm-eval, or a
    classifier's accuracy and calibration.

    Several models are measured on the same texts, prompts and noise: one table, and the difference
    of each from the first, in pairs. With -o there are also report.md and a picture.

    Perplexity is rolling, as in lm-eval with add_bos_token=False: one row is one document, which
    starts with BOS, else EOS, and that token is not scored.

    With --samples K, perplexity and classification are measured twice: at the mean, and with the
    probabilities averaged over K draws of the weights from the stored posterior. Its precision must
    contain a prior; --prior X gives it one.

    On several GPUs: --num-processes N, or accelerate launch --multi_gpu -m bmerge_cli.main evaluate
    MODELS; the numbers are those of one process.
    """
    from mergekit_bayes.compare.run import run_compare

    config = parse_flags(CompareConfig, settings, "bmerge evaluate")
    start_processes(config.num_processes)
    screen = console(quiet=quiet)
    with steps_bar(console(quiet=quiet or as_json)) as advance:
        report = run_compare(config, quiet=quiet, progress=advance)
    alone = None
    if len(report.evaluations) == 1:
        alone = report.evaluations[0].report
        show_report(screen, alone)
    else:
        show_compare(screen, report)
    if as_json:
        print_json(parse_json((alone or report).model_dump_json()))
    elif report.path and not quiet:
        typer.echo(report.path)
