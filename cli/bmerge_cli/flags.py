"""Flags made from the fields of a config: name, type, default and help are written once, there.

A command lists the fields that it offers, in the order of its help:

    @failures()
    @flags_of(EvaluateConfig, argument("model"), option("output", "--out", "-o"), ...)
    def command(settings: Settings, quiet: Quiet = False) -> None:
        config = parse_flags(EvaluateConfig, settings, "bmerge evaluate")

`settings` holds only what the command line sets, so defaults come from the fields alone and a
recipe's settings can be kept beneath the line's.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeAlias, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from mergekit_bayes.configs import C, Config, parse_config

Settings: TypeAlias = dict[str, Any]
Command: TypeAlias = Callable[..., None]

_FLAG_OF: dict[type[Config], dict[str, str]] = {}  # the flag of each field, by `flags_of`


@dataclass(frozen=True)
class Flag:
    """One parameter of a command, made from a field of its config.

    Attributes:
        field: Name of the field.
        names: Names of the option; empty for `--field-name`.
        positional: Whether it is an argument rather than an option.
        read: Turns what was typed into the field's value, given the option's name for messages.
        low: Smallest value of a number, checked before the config is.
    """

    field: str
    names: tuple[str, ...] = ()
    positional: bool = False
    read: Callable[[Any, str], object] | None = None
    low: int | None = None


def argument(field: str, *, read: Callable[[Any, str], object] | None = None) -> Flag:
    """A positional argument; see `option`."""
    return Flag(field, positional=True, read=read)


def option(
    field: str,
    *names: str,
    read: Callable[[Any, str], object] | None = None,
    low: int | None = None,
) -> Flag:
    """An option. A field that holds a tuple or a mapping makes a repeatable one.

    Args:
        field: Name of the field.
        names: Names of the option where they are not `--field-name`.
        read: Turns what was typed (a list if repeatable) into the field's value; its second
            argument is the option's name, for messages.
        low: Smallest value of a number.
    """
    return Flag(field, names, read=read, low=low)


def flags_of(config: type[Config], *flags: Flag) -> Callable[[Command], Command]:
    """Decorate a command with flags made from the fields of its config.

    The flags take the place of the command's parameter `settings`, in which the command receives
    the values that were given on its line, by field.

    Args:
        config: The config class.
        flags: One per field that the command offers, in the order of its help.
    """

    _FLAG_OF[config] = {f.field: f.field.upper() if f.positional else _names(f)[0] for f in flags}

    def decorate(command: Command) -> Command:
        def run(**values: Any) -> None:
            context: typer.Context = values.pop("context")
            settings = {flag.field: values.pop(flag.field) for flag in flags}
            command(settings=_given(context, settings, flags), **values)

        run.__name__ = command.__name__
        run.__module__ = command.__module__
        run.__doc__ = command.__doc__
        # typer reads the parameters of a command from its signature.
        run.__signature__ = _signature(config, flags, command)  # type: ignore[attr-defined]
        return run

    return decorate


def parse_flags(config: type[C], settings: Settings, command: str) -> C:
    """Check what a command received, in words that name its flags.

    Args:
        config: The config class of the command.
        settings: What `flags_of` gave it.
        command: What the user called, for messages.

    Raises:
        ConfigError: A value is missing or invalid; all of them at once.
    """
    flags = _FLAG_OF[config]
    return parse_config(config, settings, command, name_of=lambda field: flags.get(field, field))


def _given(context: typer.Context, values: Settings, flags: tuple[Flag, ...]) -> Settings:
    """The values that were typed, each as its field takes it."""
    given: Settings = {}
    for flag in flags:
        source = context.get_parameter_source(flag.field)
        if source is None or source.name not in ("COMMANDLINE", "ENVIRONMENT"):
            continue
        value = values[flag.field]
        if flag.read is not None:
            value = flag.read(value, _names(flag)[0])
        given[flag.field] = tuple(value) if isinstance(value, list) else value
    return given


def _signature(
    config: type[Config], flags: tuple[Flag, ...], command: Command
) -> inspect.Signature:
    """The command's own parameters, with the flags in place of `settings`."""
    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    parameters = [context]
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        if parameter.name == "settings":
            parameters += [_parameter(f, config.model_fields[f.field]) for f in flags]
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    return inspect.Signature(parameters)


def _parameter(flag: Flag, field: FieldInfo) -> inspect.Parameter:
    typed, repeatable = _type_of(field)
    default: Any = ...
    if not field.is_required():
        default = None if repeatable else field.default
    if default is None:
        typed = typed | None
    info: Any
    if flag.positional:
        info = typer.Argument(default, help=field.description)
    else:
        info = typer.Option(default, *_names(flag, field), help=field.description, min=flag.low)
    return inspect.Parameter(
        flag.field, inspect.Parameter.KEYWORD_ONLY, default=info, annotation=typed
    )


def _names(flag: Flag, field: FieldInfo | None = None) -> tuple[str, ...]:
    """The option's names; a switch that is on by default also gets the name that turns it off."""
    if flag.names:
        return flag.names
    name = flag.field.replace("_", "-")
    if field is not None and field.default is True:
        return (f"--{name}/--no-{name}",)
    return (f"--{name}",)


def _type_of(field: FieldInfo) -> tuple[Any, bool]:
    """The type that the command line reads, and whether it is a list of repeated values.

    Named choices are read as text: the config's message offers the nearest one.
    """
    annotation = field.annotation
    members = (
        get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    )
    members = tuple(m for m in members if m is not NoneType)
    origins = {get_origin(m) for m in members}
    if origins & {tuple, dict}:
        return list[str], True
    return (str if Literal in origins else members[0]), False
