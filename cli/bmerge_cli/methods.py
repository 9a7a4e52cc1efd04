"""`bmerge methods`: the merging rules, their settings, and a line to try each."""

import shutil
import sys
import textwrap

import typer

from bmerge_cli.render import Json, failures, print_json
from mergekit_bayes.methods import METHODS
from mergekit_bayes.methods.base import Method, Parameter


@failures()
def command(as_json: Json = False) -> None:
    """List the merging rules, their settings, and a line to try each.

    The first four are also what --weights and --base choose.
    """
    if as_json:
        print_json([_document(method) for method in METHODS.values()])
        return
    for method in METHODS.values():
        typer.echo(_filled(f"{method.name}: {method.summary}"))
        typer.echo(_filled(f"  {_needs(method)}"))
        for parameter in method.parameters:
            setting = f"--param {parameter.name}={_number(parameter.default)}"
            typer.echo(_filled(f"  {setting}: {parameter.meaning}{_bounds(parameter)}"))
        typer.echo(f"  {method.example}\n")  # as one line, to be copied


def _filled(line: str) -> str:
    """A line as a terminal shows it, broken between words."""
    if not sys.stdout.isatty():
        return line
    width = max(shutil.get_terminal_size().columns, 40)
    return textwrap.fill(line, width, subsequent_indent="    ", break_on_hyphens=False)


def _document(method: Method) -> dict[str, object]:
    return {
        "name": method.name,
        "summary": method.summary,
        "needs_base": method.needs_base,
        "takes_base": method.needs_base or method.takes_base,
        "needs_precision": method.needs_precision,
        "needs_matrices": method.needs_matrices,
        "adapters_alone": method.merges_changes,
        "models": method.tasks,
        "writes_posterior": method.writes_posterior,
        "parameters": [
            {
                "name": p.name,
                "default": p.default,
                "meaning": p.meaning,
                "choices": list(p.choices),
                "low": p.low if abs(p.low) < float("inf") else None,
                "high": p.high if abs(p.high) < float("inf") else None,
            }
            for p in method.parameters
        ],
        "example": method.example,
    }


def _needs(method: Method) -> str:
    base = "with --base" if method.needs_base else "without a base"
    if method.takes_base:
        base = "with or without --base"
    models = f", {method.tasks} model{'s' * (method.tasks > 1)}" if method.tasks else ""
    precision = ", every model with a precision" if method.needs_precision else ""
    if method.needs_precision and method.needs_matrices:
        precision += " by `bmerge precision --estimator inputs`"
    posterior = "; writes a posterior" if method.writes_posterior else ""
    alone = "; adapters alone, too" if method.merges_changes else ""
    return base + models + precision + posterior + alone


def _bounds(parameter: Parameter) -> str:
    if parameter.choices:
        return f" ({' or '.join(parameter.choices)})"
    if parameter.high < float("inf"):
        return f" ({_number(parameter.low)} to {_number(parameter.high)})"
    return f" ({_number(parameter.low)} or more)" if parameter.low > float("-inf") else ""


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.16g}"
