"""Where the weights lie that come with the project: in the package, or in hub/staged of a checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
# A wheel has hub/staged as timm_decor/staged (pyproject.toml); a checkout, and so an editable installation, as it is.
FOLDERS = (_PACKAGE / "staged", _PACKAGE.parent / "hub" / "staged")


def staged_weights() -> dict[str, Path]:
    """The folders of staged weights (config.json, model.safetensors, ...) by name; empty where none came along."""
    found = next((folder for folder in FOLDERS if folder.is_dir()), None)
    return {file.parent.name: file.parent for file in sorted(found.glob("*/config.json"))} if found else {}
