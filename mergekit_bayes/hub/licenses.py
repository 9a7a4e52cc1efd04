"""Licences of the models that a model was made from, and the one that its own card may name."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_bayes.checkpoint.contained import contained
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.hub.folder import CARD, read_card
from mergekit_bayes.hub.front_matter import split_card
from mergekit_bayes.hub.markdown import one_line
from mergekit_bayes.hub.parents import Parent

if TYPE_CHECKING:
    from huggingface_hub import HfApi

License = Mapping[str, str]  # `license`, and for the licence `other` its name and link


def agreed_license(
    made_from: Sequence[Parent], licenses: Mapping[Parent, License | None]
) -> tuple[License, tuple[str, ...]]:
    """The licence of all parents if they agree; else nothing, and a note that says why."""
    if not made_from:
        return {}, (
            "no licence: nothing in the folder says what it was made from; name one in the front "
            "matter",
        )
    by_parent = {p: licenses.get(p) for p in made_from}
    if missing := list(dict.fromkeys(p.name for p, value in by_parent.items() if not value)):
        names = ", ".join(missing)
        return {}, (f"no licence: the cards of {names} name none, or are not known here",)
    values = [value for value in by_parent.values() if value]
    if any(value != values[0] for value in values):
        named = ", ".join(f"{p.name}: {v['license']}" for p, v in by_parent.items() if v)
        return {}, (
            f"no licence: the parents disagree ({named}); name one in the front matter yourself",
        )
    return values[0], ()


def local_licenses(made_from: Sequence[Parent]) -> dict[Parent, License | None]:
    """The licences that the cards of local parents name; None for a card that names none."""
    paths = {p: Path(os.path.expanduser(p.path)) for p in made_from if p.path is not None}
    return {parent: _license_beside(path) for parent, path in paths.items()}


def hub_licenses(api: "HfApi", made_from: Sequence[Parent]) -> dict[Parent, License | None]:
    """The licences of local parents and of those on the Hub; None where a card cannot be read."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    licenses = local_licenses(made_from)
    for parent in made_from:
        if parent.repo is None:
            continue
        try:
            card = Path(api.hf_hub_download(parent.repo, CARD, revision=parent.commit))
        except (EntryNotFoundError, HfHubHTTPError, HFValidationError):
            licenses[parent] = None
        else:
            licenses[parent] = _license_in(card)
    return licenses


def read_license(card: str) -> License | None:
    """The licence that a card's front matter names; None if it names none or is not YAML."""
    try:
        fields, _ = split_card(card)
    except ValueError:
        return None
    if not (isinstance(fields.get("license"), str) and fields["license"]):
        return None
    keys = ["license"]
    if fields["license"] == "other":
        keys += ["license_name", "license_link"]
    return {k: one_line(v, 300) for k in keys if isinstance(v := fields.get(k), str) and v}


def _license_beside(path: Path) -> License | None:
    folder = path.parent if os.path.isfile(path) else path
    if not os.path.isfile(folder / CARD):  # also where a record names what no path can be
        return None
    try:
        return _license_in(contained(folder, CARD))
    except CheckpointError:  # it is a link to what is not of that model
        return None


def _license_in(card: Path) -> License | None:
    try:
        return read_license(read_card(card))
    except CheckpointError:  # the card of a parent is not needed
        return None
