"""What mkdocs is told beside mkdocs.yml: which files make up the site, and how a knob's default and help are read.

A page of the site is at its path in the repository: README is the index, and `../train.py` in a page of docs/ leads to
train.py. So a link is the same on GitHub and here, none is rewritten, and mkdocs checks them all.
"""

from __future__ import annotations

import ast
import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
# By the end of the name: what becomes a page. Other files are taken as they are; a browser shows them, or saves them.
SHOWN = {"": "text", ".cff": "yaml", ".ipynb": "json", ".py": "python", ".yaml": "yaml"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Move the pages of docs/ to their paths in the repository; add README and whatever a page links to."""
    pages = files.documentation_pages()
    for page in pages:
        files.remove(page)
    in_nav = set(_leaves(config.nav))
    waiting = ["README.md", *(f"docs/{page.src_uri}" for page in pages)]
    known = set(waiting)
    while waiting:
        name = waiting.pop()
        file = _file(name, config)
        if name not in in_nav and not name.startswith("docs/"):  # for a page of docs/ that is missing mkdocs warns
            file.inclusion = InclusionLevel.NOT_IN_NAV
        files.append(file)
        if file.is_documentation_page():
            new = set(_targets(name, file.content_string)) - known
            waiting += new
            known |= new
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """README without its badges, which a reader's browser would fetch from elsewhere."""
    if page.file.src_uri != "README.md":
        return markdown
    return "\n".join(line for line in markdown.split("\n") if not line.startswith("[!["))


def _leaves(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
        return
    for item in nav.values() if isinstance(nav, dict) else nav:
        yield from _leaves(item)


def _targets(name: str, text: str) -> Iterator[str]:
    """What a page's links lead to in the repository; of a link that leads nowhere mkdocs tells."""
    for target in re.findall(r"\]\(([^)\s#]+)", text):
        path = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
        if "://" not in target and not path.startswith("..") and (ROOT / path).exists():
            yield path


def _file(name: str, config: MkDocsConfig) -> File:
    path = ROOT / name
    if not path.is_dir() and path.suffix not in SHOWN:
        return File.generated(config, name, abs_src_path=str(path))
    page = _SourcePage.generated(config, name, content=_shown(path))
    page.dest_uri = f"{name}.html"
    return page


def _shown(path: Path) -> str:
    """A notebook as its cells, a folder as the list of what is in it, a file of text as it is."""
    if path.suffix == ".ipynb":
        cells = [(c["cell_type"], "".join(c["source"])) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]]
        return "\n\n".join(_fenced(text, "python") if kind == "code" else text for kind, text in cells)
    if path.is_dir():
        inside = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
        content = "\n".join(f"- [{file}]({path.name}/{file})" for file in inside)
    else:
        content = _fenced(path.read_text(encoding="utf-8"), SHOWN[path.suffix])
    head = "---\nsearch: {exclude: true}\nhide: [navigation, toc]\n---\n"
    return f"{head}# {path.relative_to(ROOT).as_posix()}\n\n{content}\n"


def _fenced(text: str, language: str) -> str:
    fence = "`" * 8  # longer than any in a file
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


class _SourcePage(File):
    """What is no Markdown, as a page under its own name."""

    def is_documentation_page(self) -> bool:
        return True


class Knobs(griffe.Extension):
    """Fields made by `_knob(default, help, rules)` (timm_decor/config.py): their default, and the help as docstring."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Called for each attribute that is found."""
        call = attr.value
        if isinstance(call, griffe.ExprCall) and str(call.function) == "_knob":
            attr.value = call.arguments[0]
            text, *rules = (ast.literal_eval(str(argument)) for argument in call.arguments[1:])
            only = f" Only with rule {' and '.join(rules[0])}." if rules else ""
            attr.docstring = griffe.Docstring(f"{text[0].upper()}{text[1:]}.{only}", parent=attr)
