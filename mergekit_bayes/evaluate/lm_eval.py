"""lm-eval's tasks on a loaded model: which tasks, and what they score.

lm-eval (EleutherAI's evaluation harness) reads the data, asks the model and aggregates. Its numbers
are those of its own command, up to rounding: no chat template, its default `add_bos_token`, and the
batches of this package. What it draws (few-shot examples, sampled answers) comes from the config's
seed.
"""

import functools
import io
import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError, did_you_mean
from mergekit_bayes.evaluate.report import StepProgress, TaskReport, TaskScore
from mergekit_bayes.evaluate.settings import Measures
from mergekit_bayes.evaluate.task_code import refuse_code, sandboxed_templates
from mergekit_bayes.libraries import call
from mergekit_bayes.metrics.base import Interval, Z, share_interval
from mergekit_bayes.models.load import Loaded
from mergekit_bayes.models.quiet import logged_from
from mergekit_bayes.ranks import lead

_SOLO = "DISABLE_MULTIPROC"  # lm-eval's variable: without it, it forks to resample


class Tasks(NamedTuple):
    """Tasks that lm-eval has loaded, with their data.

    Attributes:
        loaded: Tasks and groups by name, as lm-eval's `TaskManager.load` gives them.
        trusted: Whether Python code of the user's folder may run.
    """

    loaded: dict[str, Any]
    trusted: bool


def refuse_tasks(config: Measures) -> None:
    """Refuse settings of tasks, before any task is loaded.

    Raises:
        ConfigError: A setting has no tasks to be about, lm-eval is not installed, there is no such
            folder, or a task of the folder would run Python code that is not trusted.
        CheckpointError: A file of the folder cannot be read.
    """
    about = ("lm_eval_include", "lm_eval_limit", "lm_eval_shots")
    given = [f"--{name.replace('_', '-')}" for name in about if getattr(config, name) is not None]
    if not config.lm_eval:
        if given:
            raise ConfigError(f"{given[0]} is about --lm-eval TASKS, which are not given.")
        return
    names = config.task_names
    if not names:
        raise ConfigError("--lm-eval names no task: give TASK or TASK,TASK.")
    if find_spec("lm_eval") is None:
        raise ConfigError(
            "--lm-eval needs lm-eval, which is not installed: pip install 'mergekit-bayes[lm-eval]'"
        )
    folder = _own_folder(config)
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"--lm-eval-include: '{folder}' is no folder.")
    if folder is not None and not config.trust_remote_code:
        refuse_code(folder)


def read_tasks(config: Measures) -> Tasks | None:
    """Load the tasks that a config names, and their data; None if it names none.

    Raises:
        ConfigError: lm-eval has no such task, or the task runs code that a model has written.
        CheckpointError: A task cannot be loaded, such as one whose data are on the Hub without a
            network.
        MismatchError: A task needs images or sounds.
    """
    if not config.task_names:
        return None
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}}
    with _in_lm_eval(config.seed, trusted=config.trust_remote_code):
        manager, names = _index(config)
        for name in names:
            found = call(
                f"lm-eval cannot load the task '{name}'",
                functools.partial(manager.load, [name]),
                "If its data are on the Hub, run once where the Hub can be reached.",
            )
            loaded["tasks"] |= found["tasks"]
            loaded["groups"] |= found.get("groups", {})
    for name, task in loaded["tasks"].items():
        _refuse_task(name, task, trusted=config.trust_remote_code)
        _set_shots(config, task)
    return Tasks(loaded, config.trust_remote_code)


def measure_tasks(
    config: Measures, loaded: Loaded, tasks: Tasks | None, tell: StepProgress
) -> dict[str, TaskReport]:
    """What a model scores on the tasks, by their names.

    Every rank must call this. The first one runs the tasks, whose Python code so runs once, all
    ranks share their requests to the model, and each gets all results.

    Args:
        config: How to measure.
        loaded: A causal language model, if there are tasks.
        tasks: The tasks; None for none.
        tell: Called with (step, done, of).

    Raises:
        CheckpointError: lm-eval fails, or the model does.
    """
    if tasks is None:
        return {}
    import torch
    from lm_eval.evaluator import evaluate

    from mergekit_bayes.evaluate.lm_eval_model import Asked, BlockModel

    for task in tasks.loaded["tasks"].values():
        task.set_fewshot_seed(seed=config.seed)  # again for each model: it has been drawn from
    on_gpu = [loaded.device] if loaded.device.type == "cuda" else []
    with _in_lm_eval(config.seed, trusted=tasks.trusted), torch.random.fork_rng(devices=on_gpu):
        torch.manual_seed(config.seed)
        model = BlockModel(loaded, batch_size=config.batch_size, seed=config.seed, tell=tell)

        def run(together: Callable[[Asked], object]) -> dict[str, TaskReport]:
            model.together = together
            results = call(
                "lm-eval fails on its tasks",
                lambda: evaluate(
                    lm=model,
                    task_dict=tasks.loaded,
                    limit=config.lm_eval_limit,
                    bootstrap_iters=config.bootstrap,
                    confirm_run_unsafe_code=tasks.trusted,
                ),
            )
            reports = {name: _task_report(name, results, config) for name in results["results"]}
            found = {name: report for name, report in reports.items() if report.scores}
            if not found:
                raise CheckpointError(
                    f"lm-eval gives no number for its tasks ({', '.join(reports)}): none has a "
                    "metric that is one."
                )
            return found

        return lead(run, model.answer)


@contextmanager
def _in_lm_eval(seed: int, *, trusted: bool) -> Iterator[None]:
    """Seed what tasks draw, and keep what lm-eval prints off the screen, inside the block."""
    from tqdm import tqdm

    python, numbers = random.getstate(), np.random.get_state()
    start_bar, forks = tqdm.__init__, os.environ.get(_SOLO)

    def no_bar(bar: Any, *args: Any, **options: Any) -> None:
        start_bar(bar, *args, **(options | {"disable": True}))

    with ExitStack() as stack:
        stack.callback(random.setstate, python)
        stack.callback(np.random.set_state, numbers)
        stack.enter_context(logged_from(logging.ERROR, "lm_eval"))
        stack.enter_context(redirect_stdout(io.StringIO()))
        if not trusted:
            stack.enter_context(sandboxed_templates())
        random.seed(seed)
        np.random.seed(seed % 2**32)
        os.environ[_SOLO] = "1"
        tqdm.__init__ = no_bar
        try:
            yield
        finally:
            tqdm.__init__ = start_bar
            if forks is None:
                del os.environ[_SOLO]
            else:
                os.environ[_SOLO] = forks


def _own_folder(config: Measures) -> Path | None:
    include = config.lm_eval_include
    return None if include is None else Path(os.path.expanduser(include))


def _index(config: Measures) -> tuple[Any, list[str]]:
    """lm-eval's index of tasks, and the names that the config's names and patterns match."""
    from lm_eval.tasks import TaskManager

    folder = _own_folder(config)
    if folder is not None:
        # lm-eval's own 14,000 files take seconds to read, and only groups refer to them.
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        if set(config.task_names) <= set(manager.all_subtasks):
            return manager, list(config.task_names)
    manager = TaskManager(include_path=None if folder is None else str(folder))
    names: list[str] = []
    for name in config.task_names:
        matches = manager.match_tasks([name])
        if not matches:
            own = "" if folder is None else f", and '{folder}' has none"
            hint = did_you_mean(name, manager.all_tasks)
            raise ConfigError(
                f"lm-eval {lm_eval_version()} has no task '{name}'{own}"
                f"{f' ({hint})' if hint else ''}. `lm-eval ls tasks` lists them."
            )
        names += matches
    return manager, list(dict.fromkeys(names))


def _refuse_task(name: str, task: Any, *, trusted: bool) -> None:
    if getattr(task, "MULTIMODAL", False):
        raise MismatchError(f"lm-eval's task '{name}' needs images or sounds, which are not read.")
    if getattr(task, "UNSAFE_CODE", False) and not trusted:
        raise ConfigError(
            f"lm-eval's task '{name}' runs code that the model has written. Pass "
            "--trust-remote-code if you want that to happen here."
        )


def _set_shots(config: Measures, task: Any) -> None:
    """Set the number of examples as lm-eval's own command does: a task's own 0 is kept."""
    default = task.get_config("num_fewshot")
    if config.lm_eval_shots is not None and default != 0:
        task.set_config(key="num_fewshot", value=config.lm_eval_shots)
    elif default is None:
        task.set_config(key="num_fewshot", value=0)


def lm_eval_version() -> str:
    """The version of the installed lm-eval."""
    import lm_eval

    return str(lm_eval.__version__)


def _task_report(name: str, results: Mapping[str, Any], config: Measures) -> TaskReport:
    numbers = results["results"][name]
    better = results["higher_is_better"].get(name) or {}
    values = _document_values(results["samples"].get(name, []))
    scores = {}
    for key, number in numbers.items():
        metric, separator, rule = key.partition(",")
        if not separator or metric.endswith("_stderr") or not _is_number(number):
            continue
        error = numbers.get(f"{metric}_stderr,{rule}")
        documents = values.get((metric, rule), ())
        scores[key] = TaskScore(
            metric=metric,
            filter=rule,
            score=_interval(float(number), error, documents if config.bootstrap else ()),
            higher_is_better=better.get(metric),
            document_values=documents,
        )
    shots = results["n-shot"].get(name)
    return TaskReport(
        scores=scores,
        samples=int(numbers.get("sample_len", 0)),
        shots=shots if isinstance(shots, int) else None,
        task_version=str(results["versions"].get(name, "")),
        lm_eval_version=lm_eval_version(),
    )


def _document_values(
    samples: Sequence[Mapping[str, Any]],
) -> dict[tuple[str, str], tuple[float, ...]]:
    """The number of every document, in their order, by metric and filter.

    A metric that gives some documents no number, or something else, has none here: it cannot be
    compared in pairs.
    """
    columns: dict[tuple[str, str], dict[int, Any]] = {}
    documents = sorted({sample["doc_id"] for sample in samples})
    for sample in samples:
        for metric in sample["metrics"]:
            columns.setdefault((metric, sample["filter"]), {})[sample["doc_id"]] = sample[metric]
    return {
        key: tuple(float(column[document]) for document in documents)
        for key, column in columns.items()
        if len(column) == len(documents) and all(map(_is_finite, column.values()))
    }


def _interval(value: float, error: object, documents: Sequence[float]) -> Interval:
    """A score with its 95 % interval.

    A share of documents has Wilson's, since lm-eval's standard error of no hit at all is zero. Any
    other score has `value +- 1.96 error`, where lm-eval gives an error.
    """
    shares = np.array(documents)
    if len(shares) and np.isin(shares, (0, 1)).all() and np.isclose(shares.mean(), value):
        return share_interval(shares)
    if not _is_finite(error):
        return Interval(value=value)
    half = Z * float(error)  # type: ignore[arg-type]  # a number
    return Interval(value=value, low=value - half, high=value + half)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number | np.bool_)


def _is_finite(value: object) -> bool:
    return _is_number(value) and bool(np.isfinite(value))  # type: ignore[call-overload]  # a number
