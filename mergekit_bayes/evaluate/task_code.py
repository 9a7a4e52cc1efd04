"""Tasks of lm-eval in a folder of the user's: their data are read, and no Python code is run.

A task's YAML file runs Python in three ways: a tag `!function`, a metric that is the name of a
script, and a template that reaches for the insides of Python's objects. The first two are refused,
and templates are rendered in jinja2's sandbox.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from mergekit_bayes.documents import SETTINGS, DocumentError, parse_yaml, read_text
from mergekit_bayes.errors import CheckpointError, ConfigError, shown

_TRUST = "Read it, and pass --trust-remote-code if you want its code to run."


def refuse_code(folder: Path) -> None:
    """Refuse a folder of tasks whose YAML files would run Python code.

    Args:
        folder: The folder, of which lm-eval reads every `*.yaml`, and what these include.

    Raises:
        ConfigError: A file holds a tag, or a metric that is none of lm-eval's.
        CheckpointError: A file cannot be read.
    """
    paths, seen = sorted(folder.glob("**/*.yaml")), set[Path]()
    while paths:
        path = paths.pop()
        if path.resolve() in seen:
            continue
        seen.add(path.resolve())
        fields = _read(path)
        if isinstance(fields, Mapping):
            _refuse_scripts(path, fields)
            included = fields.get("include", [])
            others = included if isinstance(included, list) else [included]
            paths += [path.parent / other for other in others if isinstance(other, str)]


def _read(path: Path) -> object:
    try:
        return parse_yaml(read_text(path, SETTINGS))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}).") from None
    except DocumentError as error:
        raise ConfigError(
            f"{path} is not plain YAML ({error}). A tag such as !function runs Python code. "
            f"{_TRUST}"
        ) from None


def _refuse_scripts(path: Path, fields: Mapping[str, object]) -> None:
    """Refuse metrics that `evaluate` would load, which runs a script of that name."""
    from lm_eval.api import metrics  # noqa: F401  # which fills the registry
    from lm_eval.api.registry import metric_registry

    listed = fields.get("metric_list")
    for entry in listed if isinstance(listed, list) else []:
        if not isinstance(entry, Mapping):
            continue
        metric = entry.get("metric")
        if not isinstance(metric, str) or metric not in metric_registry or entry.get("hf_evaluate"):
            raise ConfigError(
                f"{path}: metric {shown(metric)} is none of lm-eval's own, so that a script of "
                f"this name would be run. {_TRUST}"
            )


@contextmanager
def sandboxed_templates() -> Iterator[None]:
    """Let lm-eval render the templates of its tasks in jinja2's sandbox inside the block."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils

    own = utils.env
    sandbox = ImmutableSandboxedEnvironment(
        undefined=own.undefined, keep_trailing_newline=own.keep_trailing_newline
    )
    sandbox.filters.update(own.filters)
    utils.env = sandbox
    try:
        yield
    finally:
        utils.env = own
