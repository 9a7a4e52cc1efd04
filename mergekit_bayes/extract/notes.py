"""What the report of an extraction says beside its numbers."""

from collections.abc import Iterator

from mergekit_bayes.extract.changes import Models
from mergekit_bayes.extract.output import Extra
from mergekit_bayes.extract.precisions import NATS, OUTPUTS, WEIGHTS
from mergekit_bayes.extract.report import ExtractReport, OtherChange
from mergekit_bayes.extract.totals import amount, listed

_DATA = {"CAUSAL_LM": "--perplexity TEXTS", "SEQ_CLS": "--classify ROWS"}
_OF = {NATS: "the loss", OUTPUTS: "the squared outputs", WEIGHTS: "the squared change"}


def notes_of(models: Models, report: ExtractReport, extra: Extra) -> Iterator[str]:
    """Remarks on what the adapter leaves out, and on how PEFT loads and unloads it."""
    yield from models.pairing.notes
    for model in (models.tuned, models.base):
        yield from model.mean.notes if model.parts else ()
    if models.base.parts:
        yield (
            f"'{report.base}' is a base with an adapter, and PEFT needs one folder: fold it by "
            f"`bmerge merge {report.base} -o FOLDED`, and load this adapter on that"
        )
    if models.tuned.precision is not None and models.tuned.precision.is_computed:
        yield (
            f"the precision of '{report.model}' follows from its adapter's factors and is one of "
            "single entries, which overstates the loss"
        )
    yield from _on_units(models, report)
    yield from _on_missing_precisions(models)
    yield from _on_tolerance(report)
    yield from _on_left_out(report)
    if extra.whole:
        yield (
            f"{_are(len(extra.whole), 'module')} stored whole ({listed(extra.whole)}). `unload()` "
            "of PEFT keeps what is whole: to get the base back, call "
            "`model.delete_adapter('default')` before it"
        )
    if extra.tied:
        yield (
            f"{listed([*extra.tied])} follows the adapted embedding (ensure_weight_tying): PEFT "
            "makes its factors of the embedding's, and warns that they are not in the file. "
            "`merge_and_unload()` of PEFT 0.21 adds such a change twice: fold with `bmerge merge "
            "BASE+ADAPTER`"
        )


def _on_units(models: Models, report: ExtractReport) -> Iterator[str]:
    """What the losses of a report are not, and a precision that does not weigh."""
    if models.precisions.is_left_out:
        yield (
            f"the precision of '{report.model}' is of the inputs of layers alone and does not "
            "weigh here; --weights precision lets it"
        )
    if report.unit == NATS:
        yield (
            "losses are those of the precision, to second order at the tuned weights, and weigh "
            "one choice against another. What a change really costs may be far from them, most "
            "where the precision has one number an entry: `bmerge evaluate ADAPTER "
            f"{_DATA.get(models.modules.task or '', '...')}`, of the adapter's folder, measures it"
        )


def _on_missing_precisions(models: Models) -> Iterator[str]:
    lacking = models.precisions.lacking
    if lacking:
        yield (
            f"no precision, or none above zero, of {amount(len(lacking), 'changed tensor')} "
            f"({listed(lacking)}): all entries weigh alike there, and no loss is told"
        )


def _on_tolerance(report: ExtractReport) -> Iterator[str]:
    """The layers that lose more than the tolerance, by the cap of the rank or by rounding."""
    if report.tolerance is None:
        return
    allowed = report.tolerance * (1 + 1e-6)
    beyond = {name: layer for name, layer in report.layers.items() if layer.share > allowed}
    capped = {name for name, layer in beyond.items() if layer.rank == report.rank}
    reasons = {
        f"--rank {report.rank} keeps": (capped, "A larger rank, or none, meets it"),
        "rounding keeps": (beyond.keys() - capped, "--dtype F32 rounds least"),
    }
    for reason, (names, remedy) in reasons.items():
        if not names:
            continue
        worst = max(names, key=lambda name: beyond[name].share)
        yield (
            f"{reason} {len(names)} of {amount(len(report.layers), 'layer')} above --tolerance "
            f"{report.tolerance:g}; '{worst}' loses most, {beyond[worst].share:.2%}. {remedy}"
        )


def _on_left_out(report: ExtractReport) -> Iterator[str]:
    """One note for each reason why changed tensors are left out."""
    groups: dict[tuple[str, str], dict[str, OtherChange]] = {}
    for name, other in report.others.items():
        if not other.stored:
            groups.setdefault((other.why, other.unit), {})[name] = other
    for (why, unit), members in groups.items():
        known = [other.change for other in members.values() if other.change is not None]
        share = ""
        if known and (whole := report.losses[unit].change) > 0:
            share = f" with {sum(known) / whole:.2%} of {_OF[unit]}"
        what = f"{_are(len(members), 'changed tensor')} left out{share}"
        yield f"{what} ({listed([*members])}): {why}"


def _are(count: int, noun: str) -> str:
    return f"{amount(count, noun)} {'is' if count == 1 else 'are'}"
