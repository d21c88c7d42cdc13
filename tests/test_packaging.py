"""What installing and importing the package promises, and what the pages about the project say of it."""

from __future__ import annotations

import ast
import dataclasses
import re
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import check_dist
import pytest
import yaml
from tutorial import Step

import timm_decor
from timm_decor.config import RULE_STRUCTURES, DecorConfig, structures
from timm_decor.models import FAMILIES, PREFIX

ROOT = Path(__file__).resolve().parents[1]


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_public_names_exist() -> None:
    promised = {"DecorConfig", "attach", "decorrelate", "to_plain", "__version__"}
    assert promised <= set(timm_decor.__all__)
    assert all(hasattr(timm_decor, name) for name in timm_decor.__all__)


def test_dir_shows_the_public_names_alone() -> None:
    assert dir(timm_decor) == sorted(timm_decor.__all__)


def test_version_is_single_sourced() -> None:
    assert version("timm-decor") == timm_decor.__version__


def test_package_is_typed_and_licensed() -> None:
    assert (ROOT / "timm_decor" / "py.typed").is_file()
    assert "Apache License" in page("LICENSE")


def test_import_leaves_heavy_libraries_alone() -> None:
    """A person who only wants the optimizer's hooks does not pay for what train.py needs."""
    heavy = ("accelerate", "matplotlib", "pyarrow", "sklearn")
    code = f"import sys, timm_decor; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class TestPages:
    def test_the_changelog_has_this_version(self) -> None:
        text = page("CHANGELOG.md")
        headings = re.findall(r"^## \[(.+?)\]( - \d{4}-\d\d-\d\d)?$", text, re.MULTILINE)
        assert len(headings) == len(re.findall(r"^## ", text, re.MULTILINE)), "a heading of another form"
        released = {name for name, date in headings if date}
        assert headings[0] == ("Unreleased", ""), "the newest is on top"
        assert timm_decor.__version__ in released or f"will be {timm_decor.__version__}" in text

    def test_the_citation_is_of_this_version(self) -> None:
        citation = yaml.safe_load(page("CITATION.cff"))
        assert citation["version"] == timm_decor.__version__
        assert citation["license"] in page("pyproject.toml")
        papers = {reference["url"].rpartition("/")[2]: reference["title"] for reference in citation["references"]}
        assert set(papers) == {"2405.02385", "2407.10780"}
        assert all(title in " ".join(page("README.md").replace("> ", "").split()) for title in papers.values())

    @pytest.mark.parametrize("name", ["README.md", "docs/decorrelation.md"])
    def test_pages_name_every_choice(self, name: str) -> None:
        assert [choice for choice in (*RULE_STRUCTURES, *structures()) if f"`{choice}`" not in page(name)] == []

    def test_every_default_says_what_it_rests_on(self) -> None:
        table = page("docs/decorrelation.md").partition("| knob | default | rests on |")[2].partition("\n\n")[0]
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
        told = {
            name.strip(" `"): value.strip()
            for names, values, why in rows
            for name, value in zip(names.split(","), values.split(","), strict=True)
            if why
        }
        defaults = {field.name: field.default for field in dataclasses.fields(DecorConfig)}
        assert told == {
            name: str(value).lower() if isinstance(value, bool | str) else f"{value:g}".replace("e+", "e")
            for name, value in defaults.items()
        }

    @pytest.mark.parametrize("name", ["README.md", "docs/zoo.md"])
    def test_pages_name_every_family(self, name: str) -> None:
        assert [f.module for f in FAMILIES if f"| {PREFIX}{f.module}: " not in page(name)] == []

    @pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md", "docs/contributing.md"])
    def test_links_lead_somewhere(self, name: str) -> None:
        targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", page(name))]
        assert [t for t in targets if t and "://" not in t and not (ROOT / name).parent.joinpath(t).exists()] == []


class TestContributing:
    """docs/contributing.md names what there is."""

    NAMES = [word for code in re.findall(r"`([^`]+)`", page("docs/contributing.md")) for word in code.split()]

    def test_files(self) -> None:
        paths = [name for name in self.NAMES if re.fullmatch(r"[\w./]+(/|\.(py|md|cff|toml|yaml))", name)]
        assert len(paths) > 30, "the pattern finds them"
        made = {"dist/", "hub/staged/NAME/", "timm_decor/staged/NAME/"} | {
            f"timm_decor/{r}/NAME.py" for r in ("rules", "structures")
        }  # by make dist, or not there in every checkout
        assert [path for path in paths if path not in made and not (ROOT / path).exists()] == []

    def test_tests_and_code(self) -> None:
        code = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").glob("*.py"))
        names = [name for name in self.NAMES if re.fullmatch(r"test_\w+|Test\w+", name)]
        assert len(names) > 5 and [name for name in names if not re.search(rf"(def|class) {name}\b", code)] == []
        package = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "timm_decor").rglob("*.py"))
        constants = [name for name in self.NAMES if re.fullmatch(r"_?[A-Z][A-Z_]+[A-Z]", name)]
        assert [name for name in constants if name not in package + code] == []

    def test_targets_of_make(self) -> None:
        wanted = re.findall(r"\bmake ([a-z-]+)(?=`|  )", page("docs/contributing.md"))
        assert {"test", "dist", "readme"} <= set(wanted)
        assert [name for name in wanted if f"\n{name}:" not in page("Makefile")] == []

    def test_imports_point_down_its_layout(self) -> None:
        rows = [line.split("|")[1] for line in page("docs/contributing.md").splitlines() if line.startswith("| `")]
        level = {name: depth for depth, row in enumerate(rows) for name in re.findall(r"`([\w./]+)`", row)}

        def depth(file: Path) -> int | None:
            """The row of a file or of the folder that it is in; None for timm_decor/__init__.py."""
            name = file.relative_to(ROOT)
            keys = (name.as_posix(), *(f"{folder.as_posix()}/" for folder in name.parents))
            return next((level[key] for key in keys if key in level), None)

        files = [
            *(ROOT / "timm_decor").rglob("*.py"),
            *(ROOT / name for name in ("timm_decor_door.py", "train.py", "validate.py")),
        ]
        assert [file.name for file in files if depth(file) is None] == ["__init__.py"], "files without a row"
        upward = []
        for file in files:
            for module in imported(file):
                target = ROOT.joinpath(*module.split("."))
                found = next((t for t in (target.with_suffix(".py"), target / "__init__.py") if t.is_file()), None)
                mine, theirs = depth(file), depth(found) if found else None
                if mine is not None and theirs is not None and theirs < mine:
                    upward.append(f"{file.relative_to(ROOT)} imports {module}")
        assert upward == []


def imported(file: Path) -> set[str]:
    """The modules of timm_decor that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == "timm_decor"}


def test_hub_is_a_package() -> None:
    """Otherwise an installed package called `hub` would be imported in its place."""
    assert (ROOT / "hub" / "__init__.py").is_file()


class TestCheckDist:
    """What `make dist` refuses; that what it builds passes is left to itself."""

    @staticmethod
    def wheel(folder: Path, files: dict[str, str]) -> Path:
        path = folder / "timm_decor-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name, text in files.items():
                archive.writestr(name, text)
        return path

    def test_contents_of_a_wheel(self, tmp_path: Path) -> None:
        for name in ("timm_decor_door.py", "timm_decor/__init__.py", "timm_decor/py.typed", "hub/staged/m/config.json",
                     "hub/publish.py"):  # fmt: skip
            (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "source" / name).touch()
        info = "timm_decor-1.0.dist-info"
        good = dict.fromkeys(
            ["timm_decor_door.py", "timm_decor/__init__.py", "timm_decor/py.typed", "timm_decor/staged/m/config.json",
             f"{info}/METADATA", f"{info}/licenses/LICENSE"], ""
        )  # fmt: skip
        said = check_dist.check_wheel(self.wheel(tmp_path, good), tmp_path / "source")
        assert said == "6 files, typed, licensed, 1 of staged weights"
        for name in set(good) - {f"{info}/METADATA"}:
            less = {key: text for key, text in good.items() if key != name}
            with pytest.raises(check_dist.Failure, match=f"the wheel lacks {name}"):
                check_dist.check_wheel(self.wheel(tmp_path, less), tmp_path / "source")
        with pytest.raises(check_dist.Failure, match=r"not of the package: hub/publish\.py$"):
            check_dist.check_wheel(self.wheel(tmp_path, {**good, "hub/publish.py": ""}), tmp_path / "source")

    def test_a_wheel_that_is_built_otherwise(self, tmp_path: Path) -> None:
        (tmp_path / "other").mkdir()
        first = self.wheel(tmp_path, {"a": "1", "b": "1"})
        for files in ({"a": "1", "b": "2"}, {"a": "1"}, {"a": "1", "b": "1", "c": ""}):
            with pytest.raises(check_dist.Failure, match=r"differs in [bc]$"):
                check_dist.check_rebuilt(first, self.wheel(tmp_path / "other", files))

    @pytest.mark.parametrize(("output", "refused"), [("a", ""), ("a\nb", "does not print what the page says: a b")])
    def test_a_tutorial_that_says_otherwise(
        self, output: str, refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(check_dist, "ROOT", tmp_path)
        monkeypatch.setattr(check_dist, "LOG", tmp_path / "output" / "log")
        monkeypatch.setattr(check_dist.tutorial, "steps", lambda: [Step("python", "print('a')", output)])
        if not refused:
            assert check_dist.check_tutorial(Path(sys.executable), tmp_path) == "python: as docs/tutorial.md says"
            return
        with pytest.raises(check_dist.Failure, match=refused):
            check_dist.check_tutorial(Path(sys.executable), tmp_path)
        assert (tmp_path / "output" / "log").read_text() == "a\n"

    def test_a_command_that_fails_is_one_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(check_dist, "ROOT", tmp_path)
        monkeypatch.setattr(check_dist, "LOG", tmp_path / "output" / "log")
        for text, line in (
            ("a\\nb", "b"),
            ("OSError: no x\\nerror: no\\nhint: often so", "OSError: no x"),
            ("", "exit code 1"),
        ):
            with pytest.raises(check_dist.Failure, match=rf"^twine: {line} \(all of it: output/log\)$"):
                check_dist.run("twine", sys.executable, "-c", f"print('{text}'); raise SystemExit(1)", cwd=tmp_path)
            assert (tmp_path / "output" / "log").read_text().split("\n")[0] == text.split("\\n")[0]
