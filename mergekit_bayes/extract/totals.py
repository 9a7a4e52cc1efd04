"""What an extraction loses in all: by the rank, and apart from it by what the adapter leaves out.

Losses of different units are never added: a precision of inputs weighs matrices in squared outputs,
and in nats what it has one number an entry of.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from mergekit_bayes.extract.precisions import NATS
from mergekit_bayes.extract.report import ExtractedLayer, ExtractReport, Losses, OtherChange

_LISTED = 3  # names in a line


def losses_of(
    layers: Mapping[str, ExtractedLayer], others: Mapping[str, OtherChange]
) -> dict[str, Losses]:
    """The losses by unit, of the tensors of which one is known.

    Args:
        layers: The adapted weights by module.
        others: The changed tensors without factors by name.
    """
    adapted, lacking = list(layers.values()), list(others.values())
    known = [layer.unit for layer in adapted if layer.change is not None]
    known += [other.unit for other in lacking if other.change is not None]
    units = dict.fromkeys(known)
    return {unit: _of_unit(unit, adapted, lacking) for unit in units}


def summary_of(report: ExtractReport) -> Iterator[str]:
    """One line for each unit: what the rank loses, and what is left out, by name."""
    nothing = all(other.stored for other in report.others.values())
    for unit, losses in report.losses.items():
        clauses = []
        if losses.layers_change > 0:
            layers = sum(layer.unit == unit for layer in report.layers.values())
            share = losses.layers_lost / losses.layers_change
            clauses.append(
                f"the rank loses {losses.layers_lost:.4g} of the {losses.layers_change:.4g} of "
                f"{amount(layers, 'stored layer')} ({share:.2%})"
            )
        left_out = _left_out(report, unit)
        if left_out:
            count = amount(len(left_out), "tensor")
            clauses.append(f"left out: {losses.left_out:.4g} in {count} ({listed(left_out)})")
        elif nothing:
            clauses.append("nothing is left out")
        measure = ", by the precision and no forecast" if unit == NATS else ""
        if clauses:
            yield f"in {unit_text(report, unit)}{measure}: {'; '.join(clauses)}"


def unit_text(report: ExtractReport, unit: str) -> str:
    """A unit with the number of observations over which a precision sums."""
    if report.precision_identity is None:
        return unit
    if report.observations is None:
        return f"{unit}, summed over the precision's data"
    kind = report.observation_unit or "observation"
    return f"{unit}, summed over {amount(report.observations, kind)}"


def amount(count: float, noun: str) -> str:
    """A count with its noun, in the plural where it is not one."""
    return f"{count:,.0f} {noun}{'' if count == 1 else 's'}"


def listed(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    more = f", ... {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
    return ", ".join(f"'{name}'" for name in names[:_LISTED]) + more


def _of_unit(unit: str, layers: Iterable[ExtractedLayer], others: Iterable[OtherChange]) -> Losses:
    adapted = [layer for layer in layers if layer.unit == unit]
    lacking = [other for other in others if other.unit == unit]
    in_layers = sum(layer.change or 0.0 for layer in adapted)
    return Losses(
        change=in_layers + sum(other.change or 0.0 for other in lacking),
        layers_change=in_layers,
        layers_lost=sum(layer.lost or 0.0 for layer in adapted),
        left_out=sum(other.change or 0.0 for other in lacking if not other.stored),
    )


def _left_out(report: ExtractReport, unit: str) -> list[str]:
    """The tensors of a unit that the adapter does not hold, the dearest first."""
    found = {
        name: other.change
        for name, other in report.others.items()
        if not other.stored and other.unit == unit and other.change is not None
    }
    return sorted(found, key=lambda name: -found[name])
