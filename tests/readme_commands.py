"""The commands of README and docs/measured.md as they stand there; PATH, PHOTOS and output/RUN are real.

tests/test_readme.py runs them in this checkout, tests/check_dist.py with the installed wheel. No torch is needed here.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README, MEASURED = ROOT / "README.md", ROOT / "docs" / "measured.md"
_PROGRAMS = ("pip", "make", "python", "accelerate", "timm-decor", "train.py", "validate.py")
# Later words override earlier ones, so that a command takes seconds.
_SHORT = {
    "train": "--epochs 1 --warmup-epochs 0 --img-size 32 -b 8 -j 0 --device cpu --experiment RUN",
    "validate": "-j 0 --device cpu",
    "predict": "-j 0 --device cpu",
    "publish": "",
    "list": "",
}
CLASSES = ("cat", "dog")


def python_blocks() -> list[str]:
    """README's Python."""
    return re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def blocks() -> list[str]:
    """The commands that have a line of their own, in their order, without comments."""
    lines = README.read_text(encoding="utf-8").splitlines()
    return _commands(line.partition("  #")[0] for line in lines if line.startswith("    "))


def inline() -> list[str]:
    """The commands within a line of text; a program's bare name is none."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in (README, MEASURED))
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return _commands(re.findall(r"`([^`]+)`", text))


def _commands(texts: object) -> list[str]:
    words = [text.split() for text in texts]  # type: ignore[attr-defined]
    return list(dict.fromkeys(" ".join(each) for each in words if len(each) > 1 and each[0] in _PROGRAMS))


def of_the_door() -> list[str]:
    """The block of timm-decor's subcommands: each finds what the ones before it left."""
    return [command for command in blocks() if command.startswith("timm-decor ")]


def shortened(command: str) -> list[str]:
    """A subcommand's words, without the program, and with those that make it quick."""
    words = shlex.split(command)[1:]
    return words + shlex.split(_SHORT[words[0]])


def make_places(folder: Path) -> None:
    """PATH, a folder of classes with images to train on and to validate, and PHOTOS."""
    from PIL import Image

    for split, count in (("train", 8), ("val", 4)):
        for number, name in enumerate(CLASSES):
            place = folder / "PATH" / split / name
            place.mkdir(parents=True)
            for image in range(count):
                Image.new("RGB", (32, 32), (200 * number, 20 * image, 90)).save(place / f"{image}.png")
    (folder / "PHOTOS").mkdir()
    Image.new("RGB", (32, 32), (200, 0, 90)).save(folder / "PHOTOS" / "1.png")
