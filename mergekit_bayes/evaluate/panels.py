"""Panels: several classifiers that score the same texts, by a name or in a YAML file.

A panel says of each member which label counts and how it is read, because neither is ever guessed.
`panel:NAME` stands for all members of a panel, `panel:NAME/MEMBER` for one of them. NAME is that of
a panel of this package, or the path of a `.yaml` file.
"""

import os
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pydantic import Field, field_validator

from mergekit_bayes.configs import Config, load_config
from mergekit_bayes.errors import ConfigError, did_you_mean, shown
from mergekit_bayes.metrics.scorers import Reading

PREFIX = "panel:"
_BUILT_IN = Path(__file__).parent / "built_in_panels"
_FILE = re.compile(r"(?P<file>.*\.ya?ml)(/(?P<member>[^/]*))?", re.DOTALL)
_NAME = re.compile(r"(?P<name>[^/]+)(/(?P<member>[^/]*))?")
_SHORT_NAME = re.compile(r"[\w-]+")


class Member(Config):
    """A classifier of a panel, and how its score is read."""

    model: str = Field(
        description="A model folder, by its path from the folder of the panel, or a Hub id "
        "(org/name[@revision])."
    )
    label: str = Field(description="Name of the label whose probability is the score.")
    reading: Reading = Field(
        description="softmax if a text has exactly one of the labels, sigmoid if it can have "
        "several."
    )
    threshold: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Score from which on a text is toxic by this member; by default --threshold.",
    )


class Panel(Config):
    """Several classifiers, by short names."""

    members: dict[str, Member] = Field(
        min_length=1, description="The classifiers by short names of letters, digits, - and _."
    )

    @field_validator("members")
    @classmethod
    def _check_names(cls, members: dict[str, Member]) -> dict[str, Member]:
        for name in members:
            if not _SHORT_NAME.fullmatch(name):
                raise ValueError(f"{shown(name)} is no name of letters, digits, - and _.")
        return members


class PanelMember(NamedTuple):
    """A member of a panel that was read.

    Attributes:
        spec: What reports call it: `panel:NAME/MEMBER`.
        name: Its short name.
        settings: What the panel says of it.
        ref: Its model: an absolute path, or a Hub id.
        on_hub: Whether it is a Hub id.
        lock: The file that records what was found at its first use.
        file: The file of the panel.
    """

    spec: str
    name: str
    settings: Member
    ref: str
    on_hub: bool
    lock: Path
    file: Path

    @property
    def remedy(self) -> str:
        """What to do where the panel is wrong about this member, a sentence for messages."""
        if self.file.parent != _BUILT_IN:
            return f"Correct members.{self.name} in {self.file}."
        return (
            f"Copy {self.file} to a panel of your own, correct members.{self.name} there, and name "
            "it (panel:FILE.yaml)."
        )


def is_panel(spec: str) -> bool:
    """Whether a scorer's name is that of a panel, or of a member of one."""
    return spec.startswith(PREFIX)


def read_members(spec: str) -> list[PanelMember]:
    """The members that `panel:NAME` or `panel:NAME/MEMBER` stands for.

    Raises:
        ConfigError: There is no such panel or member, or the file is no panel.
    """
    name, chosen = _split(spec)
    if name.endswith((".yaml", ".yml")):
        path = Path(os.path.expanduser(name))
        lock = path.with_suffix(".lock.json")
    else:
        path, lock = _built_in(spec, name), _own_folder() / f"{name}.lock.json"
    members = load_config(Panel, path).members
    if chosen is not None and chosen not in members:
        hint = did_you_mean(chosen, members)
        raise ConfigError(
            f"scorer '{spec}': the panel has no member '{chosen}'; it has {', '.join(members)}. "
            f"{hint[:1].upper()}{hint[1:]}".rstrip()
        )
    make = partial(_member, panel=name, file=path, lock=lock)
    return [make(key, found) for key, found in members.items() if chosen in (None, key)]


def refuse_several(spec: str) -> None:
    """Refuse a panel where one scorer is needed.

    Raises:
        ConfigError: The name is that of a panel without one of its members.
    """
    if is_panel(spec) and _split(spec)[1] is None:
        names = [member.spec for member in read_members(spec)]
        raise ConfigError(
            f"scorer '{spec}': a panel is several scorers, and one is needed here. Name one of its "
            f"members: {', '.join(names)}."
        )


def files_of(specs: Iterable[str]) -> list[str]:
    """The paths and Hub ids that scorers are read from, so that no output replaces one.

    Raises:
        ConfigError: As `read_members`.
    """
    files: list[str] = []
    for spec in specs:
        if not is_panel(spec):
            files.append(spec.partition(":")[2].partition("#")[0])
            continue
        name = _split(spec)[0]
        if name.endswith((".yaml", ".yml")):
            files.append(name)
        for member in read_members(spec):
            files += [member.ref, str(member.lock)]
    return files


def _split(spec: str) -> tuple[str, str | None]:
    """The name or file of a panel, and the member if one is named."""
    rest = spec.removeprefix(PREFIX)
    if match := _FILE.fullmatch(rest):
        return match["file"], match["member"]
    if match := _NAME.fullmatch(rest):
        return match["name"], match["member"]
    raise ConfigError(
        f"scorer '{spec}': expected panel:NAME or panel:FILE.yaml, and /MEMBER for one of its "
        f"members. Panels by name: {', '.join(_names())}."
    )


def _names() -> list[str]:
    """The panels of this package."""
    return sorted(path.stem for path in _BUILT_IN.glob("*.yaml"))


def _built_in(spec: str, name: str) -> Path:
    if name not in _names():
        raise ConfigError(
            f"scorer '{spec}': there is no panel '{name}'; there is {', '.join(_names())}. A panel "
            "of your own is named by its file, which ends in .yaml."
        )
    return _BUILT_IN / f"{name}.yaml"


def _own_folder() -> Path:
    """Where it is recorded what was found of the package's panels.

    That is no cache: whoever empties it accepts whatever is found next.

    Raises:
        ConfigError: Neither the environment nor the system names a home.
    """
    if home := os.environ.get("BMERGE_HOME"):
        return Path(os.path.expanduser(home)) / "panels"
    # The specification has relative paths ignored.
    share = os.path.expanduser("~/.local/share")  # as it is where there is no home
    data = os.environ.get("XDG_DATA_HOME", "")
    base = data if os.path.isabs(data) else share
    if not os.path.isabs(base):
        raise ConfigError(
            "a panel of this package is recorded in your home folder, and there is none. Set "
            "BMERGE_HOME to a folder."
        )
    return Path(base) / "bmerge" / "panels"


def _member(name: str, settings: Member, panel: str, file: Path, lock: Path) -> PanelMember:
    path = os.path.abspath(file.parent / os.path.expanduser(settings.model))
    on_hub = not os.path.exists(path) and not _is_path(settings.model)
    ref = settings.model if on_hub else path
    return PanelMember(f"{PREFIX}{panel}/{name}", name, settings, ref, on_hub, lock, file)


def _is_path(model: str) -> bool:
    """Whether a model can be nothing but a path: a Hub id has one slash and begins with none."""
    return model.startswith(("/", ".", "~")) or model.partition("@")[0].count("/") != 1
