"""What the report of `bmerge precision` says about the stability of its estimate."""

from collections.abc import Mapping

from mergekit_bayes.checkpoint.layers import group_layers
from mergekit_bayes.curvature import Curvature
from mergekit_bayes.curvature.stability import K, stability
from mergekit_bayes.errors import ConfigError
from mergekit_bayes.precision.settings import LayerStability, PrecisionReport, Stability

_ALL = ""  # the layer of all tensors
_WAYS_OUT = {
    "data": "Name more data",
    "self-generated": "Raise --self-generated",
    "random-tokens": "Raise --random-tokens, or lower --max-length",
}


def refuse_few(count: int, rows: int, source: str = "data") -> None:
    """Refuse examples of which no disjoint subsamples can be made.

    Args:
        count: Number of examples that the estimate looks at.
        rows: Number of examples in the data.
        source: What the data are, as in `PrecisionReport.source`.

    Raises:
        ConfigError: There are fewer than subsamples.
    """
    if count >= K:
        return
    are = f"{rows} row{'s' * (rows != 1)}"
    verb = "is" if rows == 1 else "are"
    setting = f"--examples is {count}" if rows > count else f"there {verb} {are}"
    raise ConfigError(
        f"a precision is estimated from at least {K} rows, so that its error can be, but {setting}."
        f" {'Raise it' if rows > count else _WAYS_OUT[source]}."
    )


def describe(curvature: Curvature, sizes: Mapping[str, int], examples: int) -> Stability | None:
    """The stability of an estimate; None where it kept no subsamples.

    Args:
        curvature: The estimate.
        sizes: Number of entries by parameter name.
        examples: How many it looked at.
    """
    if not curvature.parts:
        return None
    names = list(curvature.parts[0].rows)
    layers = stability(curvature.parts, sizes, {_ALL: names, **group_layers(names)})
    total = layers.pop(_ALL, None)
    if total is None:
        return None
    return Stability(
        relative_error=total.relative_error,
        rank_correlation=total.rank_correlation,
        layers=tuple(
            LayerStability(name=name, **layer._asdict()) for name, layer in layers.items()
        ),
        more_examples=3 * examples,  # the error falls with the root of the number of examples
    )


def health_of(found: Stability | None) -> dict[str, float]:
    """What the stored record keeps of the stability."""
    return {} if found is None else {"relative_error": found.relative_error}


def in_words(report: PrecisionReport) -> str:
    """How stable an estimate is, and how it would become more so; or why that is not known."""
    found = report.stability
    if report.rows is None or report.sampled is None:
        return "stability: unknown, since second moments do not say how they differ between rows"
    if found is None and report.estimator == "ivon":
        return (
            "stability: unknown, since ivon averages over batches and keeps no subsamples of them; "
            "the estimators other than ivon and adam do"
        )
    if found is None:
        return (
            f"stability: unknown, with fewer than {K} batches; a smaller --batch-size or more rows "
            "give it"
        )
    parts = [f"stability: relative standard error of a row's curvature {found.relative_error:.2g}"]
    if len(found.layers) > 1:
        worst = max(found.layers, key=lambda layer: layer.relative_error)
        parts.append(f" (largest {worst.relative_error:.2g}, in {worst.name})")
    if found.rank_correlation is not None:
        parts.append(f", rank correlation between halves {found.rank_correlation:.2f}")
    parts.append(f"; {found.more_examples:,} more rows would halve the error")
    left, needed = report.rows - report.sampled, report.sampled + found.more_examples
    if left >= found.more_examples:
        parts.append(f" (--examples {needed})")
    elif report.source == "self-generated":
        parts.append(f" (--self-generated {needed} --examples {needed})")
    elif report.source == "random-tokens":
        tokens = -(-report.observations * needed // report.rows)
        parts.append(f" (--random-tokens {tokens} --examples {needed})")
    else:
        parts.append(f", of which the data have {left:,}")
    return "".join(parts)
