"""The demo's repository, a Space on the Hub: hub/space of a checkout, timm_decor/space of a wheel, as it is."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from huggingface_hub import RepoCard

from timm_decor.publishing.upload import Contents
from timm_decor.training.keeping.folder import RunFolder

FILES = CARD, APP, REQUIREMENTS = ("README.md", "app.py", "requirements.txt")
_TAG = "timm_decor"  # by which a Space's card says that it is this one
_EMPTY = (".gitattributes", CARD)  # what the Hub puts into a new Space
_PACKAGE = Path(__file__).resolve().parents[1]
_PLACES = (_PACKAGE / "space", _PACKAGE.parent / "hub" / "space")


def write(folder: Path, requirement: str | None) -> None:
    """Write the files.

    Args:
        folder: where to.
        requirement: what the Space installs, as a line of requirements.txt; None for what the files say.
    """
    source = next(place for place in _PLACES if place.is_dir())
    for name in FILES:
        text = (source / name).read_text(encoding="utf-8")
        RunFolder(folder).write_text(name, f"{requirement}\n" if requirement and name == REQUIREMENTS else text)


def contents(folder: Path) -> Contents:
    """A written folder, for the Hub."""

    def other(names: Collection[str], read: Callable[[str], str]) -> str:
        strangers = sorted(set(names).difference(_EMPTY))
        if not strangers or (CARD in names and _TAG in _tags(read(CARD))):
            return ""
        return f"{strangers[0]}, which is not of this demo"

    return Contents(folder, FILES, "Publish the demo of timm_decor", other, "space")


def _tags(card: str) -> list[str]:
    """Those of a card; none where its metadata cannot be read."""
    try:
        found = RepoCard(card, ignore_metadata_errors=True).data.to_dict().get("tags")
    except ValueError:  # metadata that is no mapping
        return []
    return found if isinstance(found, list) else []
