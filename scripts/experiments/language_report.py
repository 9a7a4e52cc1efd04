"""The report of the experiment on addition with language models: every size, and the trend."""

import platform
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from importlib.metadata import version
from typing import Any

import numpy as np
from language_world import LanguageWorld
from posterior_quality import processor
from sentiment_columns import LANGUAGE
from sentiment_looks import Name
from sentiment_predicted import prediction_table
from sentiment_report import (
    JOINT,
    LABELS,
    TUNED,
    as_json,
    best_control,
    differences,
    measured,
    percent,
    row,
    scales,
    seeds,
    signed,
    table_head,
)
from sentiment_resampled import POINTS, REFERENCES, Resampled

Cell = Callable[[Resampled], str]


def make_report(
    worlds: Sequence[LanguageWorld], failed: Mapping[str, Mapping[str, str]]
) -> tuple[str, dict[str, Any]]:
    """The report of what is there, as Markdown and as JSON.

    Args:
        worlds: The sizes.
        failed: Errors of columns, by size.
    """
    found = {world.size.parameters: Resampled(world, LANGUAGE) for world in worlds}
    size = worlds[0].size
    text = [
        "# Adding three kinds of text to language models of several sizes\n",
        f"{date.today()}, {processor()}, one thread, Python {platform.python_version()}, torch "
        f"{version('torch')}, transformers {version('transformers')}; {size.task_steps} steps a "
        f"task, {size.examples} pieces a precision, {size.valid_tokens} tokens a look and "
        f"{size.test_tokens} a test of each task. Nats a token, means over the tasks "
        f"{', '.join(size.tasks)}. Intervals are 95 %, over documents and, where there are "
        "several, seeds.\n",
        "## The trend with size\n",
        trend(list(found.values())),
    ]
    for name, one in found.items():
        numbers = " ".join(map(str, one.world.size.seeds))
        text += [
            f"\n## {name}, seeds {numbers}: nats a token\n",
            averages(one),
            f"\n## {name}: against controls and task arithmetic\n",
            differences(one),
            f"\n## {name}: the predicted increase against the real one\n",
            prediction_table(one),
        ]
        if errors := failed.get(name):
            text += [f"\n## {name}: what failed\n"]
            text += [f"- {column}: {error}" for column, error in errors.items()]
    content = {
        name: as_json(one) | {"failed": dict(failed.get(name, {}))} for name, one in found.items()
    }
    return "\n".join(text) + "\n", content


def trend(found: Sequence[Resampled]) -> str:
    """What is gained at every size."""
    lines = table_head("|".join(["", *(one.world.size.parameters for one in found)]))
    for label, cell in _trends():
        lines.append(row([label, *(cell(one) for one in found)]))
    return "\n".join(lines)


def _trends() -> list[tuple[str, Cell]]:
    """The lines of that table."""

    def nats(name: Name) -> Cell:
        return lambda found: _nats(found, name)

    def gap(one: Name, other: Name) -> Cell:
        return lambda found: signed(found.difference(one, other))

    def to_best(name: Name) -> Cell:
        def cell(found: Resampled) -> str:
            control = best_control(found)
            if control is None or name not in found.looks:
                return ""
            return (
                f"{signed(found.difference(name, control))} ({found.columns[control.column].label})"
            )

        return cell

    def share(name: Name) -> Cell:
        return lambda found: percent(found.share(name, TUNED, JOINT))

    entries, inputs, constant = Name("gm"), Name("gm_inputs"), Name("gm_constant")
    lines = [
        ("base", nats(Name("base"))),
        ("specialists, each on its own", nats(Name("specialists"))),
        ("joint training", nats(JOINT)),
        ("tuned task arithmetic", nats(TUNED)),
        ("tuned task arithmetic - joint", gap(TUNED, JOINT)),
    ]
    for point in POINTS:
        of = {way.column: way._replace(point=point) for way in (entries, inputs, constant)}
        lines += [
            (f"entries - constant, {point}", gap(of["gm"], of["gm_constant"])),
            (f"inputs - constant, {point}", gap(of["gm_inputs"], of["gm_constant"])),
            (f"inputs - entries, {point}", gap(of["gm_inputs"], of["gm"])),
        ]
    lines += [
        ("entries - the same permuted, untuned", gap(entries, Name("gm_permuted"))),
        (
            "entries - those of the embeddings permuted, untuned",
            gap(entries, Name("gm_permuted_embeddings")),
        ),
        ("entries - all others permuted, untuned", gap(entries, Name("gm_permuted_rest"))),
        ("rows - constant, untuned", gap(Name("gm_row"), constant)),
        ("Fisher - average, untuned", gap(Name("fisher"), Name("average"))),
        ("self-generated - entries, untuned", gap(Name("gm_self"), entries)),
        ("entries - best control, untuned", to_best(entries)),
        ("inputs - best control, untuned", to_best(inputs)),
        ("inputs - RegMean, untuned", gap(inputs, Name("regmean"))),
        ("inputs - ACE, untuned", gap(inputs, Name("ace"))),
        ("inputs - TSV-M, untuned", gap(inputs, Name("tsv_m"))),
    ]
    ways = ("average", "fisher", "gm_constant", "gm", "gm_inputs", "regmean", "tsv_m")
    labels = {column.name: column.label for column in LANGUAGE}
    lines += [(f"share of the gap: {labels[way]}, untuned", share(Name(way))) for way in ways]
    lines += [
        (f"share of the gap: {labels[way]}, tuned", share(Name(way, "tuned")))
        for way in ("gm_constant", "gm", "gm_inputs", "tsv_m")
    ]
    return lines


def averages(found: Resampled) -> str:
    """Every column at its points, with what each task loses untuned, and its cost."""
    tasks = found.world.size.tasks
    lines = table_head(
        "|".join(["way|seeds|untuned", *tasks])
        + "|most above a specialist|distance|CPU s|tuned|scale|CPU s|at the distance|scale"
    )
    for name in map(Name, REFERENCES):
        if name in found.looks:
            lines.append(row([LABELS[name.column], *_untuned(found, name), *[""] * 7]))
    for column in measured(found):
        untuned, tuned, matched = (Name(column.name, point) for point in POINTS)
        away = np.mean([float(look["distance"]) for look in found.looks[untuned].values()])
        cells = [column.label, *_untuned(found, untuned), f"{away:.3g}"]
        cells.append(f"{found.seconds(column, 'untuned'):.0f}")
        chosen = [_nats(found, tuned), scales(found, tuned)]
        cells += [*chosen, f"{found.seconds(column, 'tuned'):.0f}"] if chosen[0] else [""] * 3
        lines.append(row([*cells, _nats(found, matched), scales(found, matched)]))
    return "\n".join(lines)


def _untuned(found: Resampled, name: Name) -> list[str]:
    """Seeds, the mean, each task, and the most above its specialist."""
    tasks, own = found.world.size.tasks, Name("specialists")
    numbers = [f"{found.scores(name, task)['nll']:.4f}" for task in tasks]
    above = ""
    if own in found.looks and (shared := found.seeds(name, own)):
        rises = [
            found.scores(name, t, shared)["nll"] - found.scores(own, t, shared)["nll"]
            for t in tasks
        ]
        above = f"{max(rises):+.4f}"
    return [seeds(found, name), _nats(found, name), *numbers, above]


def _nats(found: Resampled, name: Name) -> str:
    return f"{found.averages(name)['nll']:.4f}" if name in found.looks else ""
