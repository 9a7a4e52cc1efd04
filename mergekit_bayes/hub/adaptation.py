"""How a card tells of an adaptation: what was removed and added, what held the rest, its checks."""

from collections.abc import Iterator, Mapping

from mergekit_bayes.hub.facts import Facts
from mergekit_bayes.hub.folder import AdaptRecord, CheckRecord, mapping, texts
from mergekit_bayes.hub.local_paths import last_parts
from mergekit_bayes.hub.markdown import code, text

_REMOVALS = {
    "npo": "negative preference optimisation",
    "ascent": "gradient ascent",
    "kl_uniform": "KL divergence of the uniform distribution",
    "contrast": "negative preference optimisation beside matched rows",
}


def adaptation(facts: Facts) -> str:
    """The list of what an adaptation did, as far as the folder says it."""
    return "\n".join(f"- {line}" for line in _lines(facts.adapt, facts.adaptation))


def _lines(settings: Mapping[str, object], record: AdaptRecord) -> Iterator[str]:
    unit = text(record.unit)
    removal = settings.get("removal")
    named = _REMOVALS.get(removal, "?") if isinstance(removal, str) else "?"
    if record.removed:
        yield f"removed: {record.removed:,} {unit}s{_of(settings.get('remove'))} by {named}"
    if contrast := _of(settings.get("contrast")):
        yield f"added to match them: rows{contrast}"
    if record.added:
        yield f"added: {record.added:,} {unit}s{_of(settings.get('add'))}"
    yield f"held by {' and '.join(_held_by(settings, record)) or 'nothing'}; tau {record.tau:g}"
    yield f"the start counts as {record.base:,.0f} {unit}s"
    yield from _steps(record)
    if record.without_precision:
        yield f"no precision is stored: {text(record.without_precision)}"


def _held_by(settings: Mapping[str, object], record: AdaptRecord) -> Iterator[str]:
    if record.memory:
        written = settings.get("memory_self_generated")
        of = _of(settings.get("memory"))
        own = " and of the model's own text" if of else " of the model's own text"
        yield (
            f"a memory of {record.memory:,} {text(record.unit)}s{of}{own if written else ''}, "
            f"each counted {record.kappa:.4g} times (kappa)"
        )
    prior, pool = record.prior, settings.get("pool")
    if prior == "stored":
        pooled = f", one number a {text(pool)}" if isinstance(pool, str) else ""
        yield f"the stored precision of its start{pooled}"
    elif isinstance(prior, float | int):
        yield f"a precision of {prior:.4g} on every weight"


def _steps(record: AdaptRecord) -> Iterator[str]:
    ended = {True: "; a goal was reached", False: "; no goal was reached", None: ""}
    undone = f", {record.refused_steps:,} of them undone" if record.refused_steps else ""
    yield (
        f"{record.steps:,} steps{undone}, of which step {record.kept_step:,} was kept"
        f"{ended[record.reached]}"
    )
    for check in record.checks:
        if check.step == record.kept_step and (found := list(_found(check))):
            yield f"the check at that step: {', '.join(found)}"
    if (error := record.reconstruction_error) is not None:
        size = f"{error:.3g}" if error > 0 else "below its noise"
        yield f"relative squared error of the K-prior's gradient on the held-out memory: {size}"


def _found(check: CheckRecord) -> Iterator[str]:
    if check.toxic_share is not None:
        yield f"{check.toxic_share:.1%} of the continuations toxic"
    if check.held_out_rise is not None:
        yield f"held-out loss {_signed(check.held_out_rise)} nats an observation"
    if check.memory_kl is not None:
        yield f"KL on the memory {_signed(check.memory_kl)} nats an observation"


def _signed(value: float | str) -> str:
    return f"{value:+.3g}" if isinstance(value, float) else text(value)


def _of(rows: object) -> str:
    """Where rows come from, local paths by their last part; empty if that is not said."""
    data = last_parts(mapping(rows).get("data"))
    names = (data,) if isinstance(data, str) else texts(data)
    return f" of {', '.join(map(code, names))}" if names else ""
