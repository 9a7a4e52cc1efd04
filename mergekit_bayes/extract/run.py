"""Extract the change of a fine-tune or an edit as a LoRA adapter, which can be unloaded again.

    W_tuned - W_base ~ B A        for every linear layer, weighed by the tuned model's precision

Tensors are read one by one; memory holds one of them and its factors.
"""

import math
import shlex
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import yaml

from mergekit_bayes.checkpoint.model_config import read_model_config
from mergekit_bayes.checkpoint.replacing import refuse_foreign, refuse_inputs, replacing
from mergekit_bayes.checkpoint.side_files import EXTRACT, EXTRACT_REPORT
from mergekit_bayes.checkpoint.stamps import documents_in, refuse_changed, stamps_of
from mergekit_bayes.checkpoint.ties import ties_embeddings
from mergekit_bayes.errors import ConfigError, MismatchError
from mergekit_bayes.extract.approximate import Limits
from mergekit_bayes.extract.changes import Models, heads_tied_to, read_change
from mergekit_bayes.extract.matching import open_whole, pair
from mergekit_bayes.extract.modules import find_modules, whole_modules
from mergekit_bayes.extract.notes import notes_of
from mergekit_bayes.extract.output import (
    Extra,
    Spool,
    copy_documents,
    write_config,
    write_tensors,
)
from mergekit_bayes.extract.precisions import Precisions
from mergekit_bayes.extract.report import ExtractedLayer, ExtractReport, Losses, OtherChange
from mergekit_bayes.extract.rest import Rest, store_rest
from mergekit_bayes.extract.settings import RANK, ExtractConfig
from mergekit_bayes.extract.totals import losses_of, summary_of
from mergekit_bayes.lora import split_ref
from mergekit_bayes.posterior import identify
from mergekit_bayes.records import Progress


def run_extract(config: ExtractConfig, *, progress: Progress | None = None) -> ExtractReport:
    """Write the change of a model as an adapter folder of PEFT; it appears complete or not at all.

    Args:
        config: The settings.
        progress: Called with (entries read, entries in all).

    Raises:
        ChangedError: A file of a model was written to meanwhile.
        CheckpointError: A model cannot be read or has entries that are not finite, or the output
            exists.
        ConfigError: A model is an adapter without its base, or the output is no folder.
        MismatchError: The models are not of one architecture and vocabulary, are quantised, or are
            the same.
        PrecisionError: The precision is missing, of other weights, or invalid.
    """
    if config.out is None:
        raise ConfigError("no output: name the folder of the adapter with -o.")
    target = Path(config.out).expanduser()
    if target.suffix == ".safetensors":
        raise ConfigError(f"-o {config.out}: an adapter is a folder. Choose a name of one.")
    if config.force:
        refuse_foreign(target)
    refs = [part for ref in (config.model, config.base) for part in split_ref(ref) or (ref,)]
    refuse_inputs(target, refs)
    with ExitStack() as stack:
        models = _open(config, stack)
        stamps = {**models.tuned.inputs, **models.base.inputs}
        stamps |= stamps_of(
            file for model in (models.tuned, models.base) for file in documents_in(model.path)
        )
        partial = stack.enter_context(replacing(target, force=config.force))
        partial.mkdir()
        spool = Spool(partial / "factors", config.dtype)
        report = _write(config, models, spool, partial, target, progress)
        spool.remove()
        (partial / EXTRACT_REPORT).write_text(report.model_dump_json(indent=2) + "\n")
        (partial / EXTRACT).write_text(_recipe(config, models, report))
        refuse_changed(stamps)
    return report


def _open(config: ExtractConfig, stack: ExitStack) -> Models:
    with_precision = config.weights != "uniform"
    tuned = stack.enter_context(
        open_whole(config.model, precision=config.precision, with_precision=with_precision)
    )
    base = stack.enter_context(open_whole(config.base))
    pairing = pair(tuned, base)
    settings = read_model_config(base.path)
    modules = find_modules(base.mean.specs, settings)
    is_tied = ties_embeddings(settings) is not False
    if modules.task == "CAUSAL_LM" and is_tied:
        pairing = pairing.with_usual_head(base.mean.specs)
    return Models(tuned, base, pairing, modules, Precisions(tuned, config.weights))


def _write(
    config: ExtractConfig,
    models: Models,
    spool: Spool,
    partial: Path,
    target: Path,
    progress: Progress | None,
) -> ExtractReport:
    rank = config.rank
    if rank is None and config.tolerance is None:
        rank = RANK
    limits = Limits(rank, config.tolerance, config.sweeps, config.dtype)
    layers: dict[str, ExtractedLayer] = {}
    others: dict[str, OtherChange] = {}
    tied: dict[str, str] = {}
    specs, unchanged, done = models.base.mean.specs, 0, 0
    entries = sum(specs[name].size for name in models.pairing.tuned)
    for name in models.pairing.tuned:
        found = read_change(models, name, limits, embeddings=config.embeddings)
        if found.factors is not None and found.layer is not None:
            spool.add(found.place, found.factors)
            layers[found.place.module] = found.layer
            tied |= dict.fromkeys(heads_tied_to(models, name) or (), found.place.module)
        elif found.other is not None:
            others[name] = found.other
        else:
            unchanged += 1
        done += specs[name].size
        if progress is not None:
            progress(done, entries)
    rest = store_rest(models.modules, layers, others) if config.rest else Rest((), (), others)
    _refuse_nothing(config, layers, rest.others)
    whole = sorted({*whole_modules(models.modules), *rest.whole})
    extra = Extra(whole, rest.biases or None, tied)
    parameters = write_tensors(models, spool, extra, partial)
    write_config(models, spool, extra, partial)
    copy_documents(models, partial)
    norms = [layer.lost_norm for layer in layers.values()]
    norms += [other.norm for other in rest.others.values() if not other.stored]
    changed: list[ExtractedLayer | OtherChange] = [*layers.values(), *rest.others.values()]
    unit, losses = models.precisions.unit, losses_of(layers, rest.others)
    total = losses.get(unit, Losses(change=0, layers_change=0, layers_lost=0, left_out=0))
    report = ExtractReport(
        path=target,
        model=config.model,
        base=config.base,
        model_identity=identify(models.tuned.mean, full=False),
        base_identity=identify(models.base.mean),
        precision_identity=models.tuned.precision_identity if models.precisions.weighs else None,
        unit=unit,
        observations=models.precisions.observations,
        observation_unit=models.precisions.observation_unit,
        rank=rank,
        tolerance=config.tolerance,
        change=total.change,
        lost=total.layers_lost + total.left_out,
        losses=losses,
        norm=math.hypot(*(each.norm for each in changed)),
        lost_norm=math.hypot(*norms),
        parameters=parameters,
        unchanged=unchanged,
        layers=layers,
        others=rest.others,
    )
    told = {
        "summary": tuple(summary_of(report)),
        "notes": tuple(notes_of(models, report, extra)),
    }
    return report.model_copy(update=told)


def _refuse_nothing(
    config: ExtractConfig,
    layers: Mapping[str, ExtractedLayer],
    others: Mapping[str, OtherChange],
) -> None:
    """Refuse models of which no change can be stored.

    Raises:
        MismatchError: They are the same, or no linear layer changed.
    """
    if layers:
        return
    if not others:
        raise MismatchError(
            f"'{config.model}' and '{config.base}' hold the same weights: there is no change to "
            "extract. Name the tuned model, and the base that it was made of."
        )
    name, other = next(iter(others.items()))
    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
    raise MismatchError(
        f"of '{config.model}' only '{name}'{more} differs from '{config.base}' ({other.why}), and "
        "an adapter needs a layer with factors. Merge the whole models instead, or choose other "
        "flags."
    )


def _recipe(config: ExtractConfig, models: Models, report: ExtractReport) -> str:
    settings = config.model_dump(mode="json", exclude={"out", "force"})
    settings |= {"model": models.tuned.pinned, "base": models.base.pinned}
    settings["identities"] = {
        models.tuned.pinned: report.model_identity.blocks,
        models.base.pinned: report.base_identity.blocks,
    }
    text = "".join(_comment(config, models))
    return text + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=120)


def _comment(config: ExtractConfig, models: Models) -> Iterator[str]:
    line = "bmerge extract MODEL --base BASE -o OUT, with these settings,"
    words = ["bmerge", "extract", models.tuned.pinned, "--base", models.base.pinned]
    others = {"model", "base", "out", "force"}
    for name, value in config.model_dump(exclude_defaults=True, exclude=others).items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    if (written := shlex.join([*words, "-o", "OUT"])).isprintable():  # or it ends the comment
        line = written
    yield f"# A record, which no command reads.\n# {line}\n"
    yield "# makes the same adapter again, from models with these content hashes.\n"
