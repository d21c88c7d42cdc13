"""What installing and importing the package promises."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import timm_decor

ROOT = Path(__file__).resolve().parents[1]


def test_public_names_exist() -> None:
    promised = {"DecorConfig", "attach", "decorrelate", "to_plain", "__version__"}
    assert promised <= set(timm_decor.__all__)
    assert all(hasattr(timm_decor, name) for name in timm_decor.__all__)


def test_version_is_single_sourced() -> None:
    assert version("timm-decor") == timm_decor.__version__


def test_package_is_typed_and_licensed() -> None:
    assert (ROOT / "timm_decor" / "py.typed").is_file()
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_import_leaves_heavy_libraries_alone() -> None:
    """A person who only wants the optimizer's hooks does not pay for what train.py needs."""
    heavy = ("accelerate", "matplotlib", "pyarrow", "sklearn")
    code = f"import sys, timm_decor; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
