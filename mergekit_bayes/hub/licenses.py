"""Licences of the models that a merge was made from."""

from pathlib import Path
from typing import Any

from mergekit_bayes.hub.facts import License, Parent, read_license
from mergekit_bayes.hub.files import CARD


def local_licenses(found: tuple[Parent, ...]) -> dict[Parent, License | None]:
    return {p: _license_in(Path(p.path).expanduser()) for p in found if p.path is not None}


def hub_licenses(api: Any, found: tuple[Parent, ...]) -> dict[Parent, License | None]:
    """Licences of parents here and on the Hub; one that cannot be asked for stays unknown."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    licenses = local_licenses(found)
    for parent in found:
        if parent.repo is None:
            continue
        try:
            card = Path(api.hf_hub_download(parent.repo, CARD, revision=parent.commit))
            licenses[parent] = read_license(card.read_text())
        except (EntryNotFoundError, HfHubHTTPError):
            licenses[parent] = None
    return licenses


def _license_in(path: Path) -> License | None:
    card = (path.parent if path.is_file() else path) / CARD
    return read_license(card.read_text()) if card.is_file() else None
