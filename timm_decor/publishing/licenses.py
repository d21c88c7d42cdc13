"""The licenses that the Hub knows, by the ids that a card names them with."""

from __future__ import annotations

import argparse
from pathlib import Path

from timm_decor.text import near

# An id a line, from https://huggingface.co/docs/hub/repositories-licenses
LICENSES = tuple(Path(__file__).with_name("licenses.txt").read_text(encoding="utf-8").split())


def license_id(text: str) -> str:
    """A license that the Hub knows, as a type of an argument."""
    if text not in LICENSES:
        like = near(text.lower().replace(" ", "-").replace("_", "-"), LICENSES)
        hint = like or "; for one that it has no id for: other"
        raise argparse.ArgumentTypeError(f"the Hub has no license '{text}'{hint}")
    return text
