"""The site that `make docs` builds: without a warning, every public name in it, and nothing in it from elsewhere."""

from __future__ import annotations

import dataclasses
import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

import timm_decor
from timm_decor import DecorConfig, DecorHandle

ROOT = Path(__file__).resolve().parents[1]
API = ("attach", "config", "models")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every file of the site by its path; the text of the pages, "" for others."""
    folder = tmp_path_factory.mktemp("site")
    command = (sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder))
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "WARNING" not in said, said
    assert "Documentation built" in said, "with --quiet it would not count its warnings either"
    return {
        file.relative_to(folder).as_posix(): file.read_text(encoding="utf-8") if file.suffix == ".html" else ""
        for file in folder.rglob("*")
        if file.is_file()
    }


def test_every_public_name_is_on_an_api_page(site: dict[str, str]):
    anchors = {name for page in API for name in re.findall(r'id="(timm_decor\.[\w.]+)"', site[f"docs/api/{page}.html"])}
    wanted = {f"timm_decor.{name}" for name in timm_decor.__all__} | {"timm_decor.hook.handles"}
    wanted |= {f"timm_decor.DecorConfig.{field.name}" for field in dataclasses.fields(DecorConfig)}
    for one in (DecorConfig, DecorHandle):
        wanted |= {f"timm_decor.{one.__name__}.{name}" for name in vars(one) if not name.startswith("_")}
    assert wanted - anchors == set()


def test_a_knob_has_its_default_and_its_help(site: dict[str, str]):
    text = " ".join(re.sub(r"<[^>]+>", "", site["docs/api/config.html"]).split())
    assert "damping: float = 2.0" in text and "_knob" not in text
    assert "Added to the second moment's eigenvalues, in units of their mean. Only with rule whiten." in text


def test_readme_is_the_index_and_links_lead_into_the_site(site: dict[str, str]):
    assert "Models, learning rates, checkpoints and habits stay timm" in site["index.html"]
    assert {"benchmarks/step_cost.py.html", "benchmarks/results.html", "examples/quickstart.ipynb.html"} <= site.keys()
    broken = [
        f"{page}: {target}"
        for page, text in site.items()
        if page != "404.html"  # which has absolute ones
        for target in re.findall(r'(?:href|src)="(?!\w+:|//)([^"#?]+)', text)
        if posixpath.normpath(posixpath.join(posixpath.dirname(page), unquote(target))) not in site
    ]
    assert broken == []


def test_pictures_are_in_it(site: dict[str, str]):
    pictures = re.findall(r'<img [^>]*src="([^"]+)"', site["index.html"])
    assert "benchmarks/results/budget_curve/cifar10.png" in pictures and set(pictures) <= site.keys()


def test_a_reader_fetches_nothing_from_elsewhere(site: dict[str, str]):
    fetched = r'<(?:script|img|iframe)\b[^>]*\bsrc="(https?:)?//|<link\b[^>]*\bhref="(https?:)?//'
    assert [page for page, text in site.items() if re.search(fetched, text)] == []
