"""What README, and the page of measurements, tell a person to type is run, but for pip's lines."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import statistics
import subprocess
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from readme_commands import blocks, inline, make_places, of_the_door, python_blocks, shortened
from sklearn.datasets import load_digits
from test_benchmarks import write_images
from training_runs import ROOT, reset_accelerate

from timm_decor import cli
from timm_decor.models import FAMILIES
from timm_decor.scripts import zoo

README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPE = "train.py -c recipes/cifar10_resnet18.yaml --no-decor-graft --decor-damping 1 "
RECIPE += "--decor-sides input --no-decor-center --lr 0.8 --compare-lr 0.4 --data-dir ... --compare"
SEARCH = "timm-decor train --find-lr LOW HIGH"
TABLE = "python -m timm_decor.list --markdown"
LAYERS = "timm-decor list --layers NAME"
# What takes minutes, or what other files have runs of: by which tests.
ELSEWHERE = {
    "make test": "test_readme.py",  # it runs this
    "make readme": "test_benchmarks.py::test_pages_are_what_the_results_say",
    "make bench-cpu DATA=FOLDER": "test_time_to_accuracy.py",
    "make bench-gpu": "test_gpu_benchmark.py",
    "python timm/train.py --device-modules timm_decor.hook --model decor_resnet18": (
        "test_hook.py::test_an_unmodified_loop_of_timms_parts"
    ),
    "python -m timm_decor.run SCRIPT": "test_hook.py",
    "accelerate launch": "test_distributed.py",
}


def call(*words: str) -> int:
    """timm-decor, in this process."""
    reset_accelerate()
    return cli.main(list(words), lambda: None)


def test_every_command_has_its_test():
    here = {"make demo", RECIPE, SEARCH, TABLE, LAYERS, *of_the_door()}
    known = here | {*ELSEWHERE}
    found = {command for command in (*blocks(), *inline()) if not command.startswith("pip install ")}
    assert found - known == set(), "a command that nothing runs"
    assert known - found == set(), "it is not in README any more"
    for target in ELSEWHERE.values():
        file, _, name = target.partition("::")
        assert f"def {name}" in (ROOT / "tests" / file).read_text(encoding="utf-8")


def test_the_memory_that_is_told_is_the_zoos():
    """In times the weights' own, which are float32 too."""
    rows = re.findall(r"^\| `decor_(\S+)` \| ([\d.]+) \| \d+ \| ([\d.]+)", (ROOT / "docs/zoo.md").read_text(), re.M)
    times = {name: float(mebibytes) * 2**20 / (4e6 * float(parameters)) for name, parameters, mebibytes in rows}
    # by families: other tests register models of their own
    assert times.keys() == {name for family in FAMILIES for name in timm.list_models(module=family.module)}
    told = {
        "ResNet-18": "resnet18",
        "ResNet-50": "resnet50",
        "ViT-B": "vit_base_patch16_224",
        "ConvNeXt-B": "convnext_base",
        "DenseNet-121": "densenet121",
        "DenseNet-264d": "densenet264d",
    }
    pages, found = README + (ROOT / "docs/decorrelation.md").read_text(), set()
    for said, name in re.findall(r"([\d.]+)(?:\stimes\sthe\sweights)?\sfor\s+([A-Z]\w+-\w+)", pages):
        assert float(said) == pytest.approx(times[told[name]], abs=0.5 if float(said) >= 10 else 0.05), name
        found.add(name)
    assert found == {*told}
    assert f"{statistics.median(times.values()):.1f} for the median member of the zoo" in README


def test_the_ten_lines_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """At the rate that stands there, from the first step on; a rate that is too high makes the loss jump first."""
    (code,) = python_blocks()
    digits, losses, cross_entropy = load_digits(), [], torch.nn.functional.cross_entropy
    images = (torch.tensor(digits.images, dtype=torch.float32)[:, None].repeat(1, 3, 4, 4) - 8) / 4
    loader = list(zip(images[:600].split(24), torch.tensor(digits.target[:600]).split(24), strict=True))

    def noted(*args: torch.Tensor) -> torch.Tensor:
        losses.append((loss := cross_entropy(*args)).item())
        return loss

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", noted)
    exec(compile(code, "README.md", "exec"), names := {"loader": loader})  # noqa: S102
    assert len(losses) == 25 and max(losses) < 2 * losses[0] and sum(losses[-5:]) / 5 < 0.4 * losses[0]
    said = capsys.readouterr().out
    assert "DecorHandle of SGD" in said and "  25 steps; R last refreshed in step 21 " in said
    assert "correlation before" in said and names["handle"].step == 25
    timm.create_model("resnet18", num_classes=10).load_state_dict(torch.load("resnet18.pth", weights_only=True))


def test_the_subcommands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    make_places(tmp_path)
    monkeypatch.chdir(tmp_path)
    said = {}
    for command in of_the_door():
        assert call(*shortened(command)) == 0, capsys.readouterr().err
        said[command.split()[1]] = capsys.readouterr().out
    assert [*said] == ["train", "validate", "predict", "publish", "list"]
    assert "report   output/RUN/report.html" in said["train"]
    assert json.loads(said["validate"])["model"] == "resnet18" and "1.png" in said["predict"]
    assert (tmp_path / "staged" / "README.md").is_file() and "layer1.0.conv1" in said["list"]
    assert call(*shlex.split(LAYERS.replace("NAME", "resnet10t"))[1:]) == 0


def test_the_recipe_and_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    for name in ("train", "test"):
        write_images(tmp_path / f"{name}.parquet", np.random.default_rng(0), 16)
    quick = ["-b", "8", "-j", "0", "--device", "cpu", "--epochs", "1", "--output", str(tmp_path)]
    monkeypatch.chdir(ROOT)  # where recipes/ is
    words = shlex.split(RECIPE.replace("...", str(tmp_path)))
    assert call("train", *words[1:], *quick, "--experiment", "recipe") == 0, capsys.readouterr().err
    assert json.loads((tmp_path / "recipe" / "compare.json").read_text())["config"]["decor_graft"] is False
    words = shlex.split(SEARCH.replace("LOW", "0.05").replace("HIGH", "0.1"))
    quick += ["--dataset", "parquet", "--data-dir", str(tmp_path), "--model", "decor_test_resnet", "--img-size", "32"]
    assert call(*words[1:], *quick, "--find-updates", "2") == 0, capsys.readouterr().err
    assert "learning rate" in capsys.readouterr().out


def test_make_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """What make would run, on a few of its images."""
    if not shutil.which("make"):
        pytest.skip("no make here")
    # Under `make test` a make says which folder it enters and leaves, and that is not what it runs.
    command = ["make", "-n", "--no-print-directory", "demo"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    _, program, *words = shlex.split(told.splitlines()[-1])
    assert program == "train.py"
    monkeypatch.chdir(ROOT)
    quick = "--epochs 1 --train-split train[:64] --val-split test[:20] -b 32 -j 0 --device cpu"
    assert call("train", *words, *quick.split(), "--output", str(tmp_path), "--experiment", "demo") == 0
    said = capsys.readouterr().out
    assert "| | decor_resnet18 | resnet18 |" in said and (tmp_path / "demo" / "report.html").is_file()


@pytest.mark.parametrize("name", ["README.md", "docs/zoo.md"])
def test_the_zoos_table(name: str, capsys: pytest.CaptureFixture):
    """As the command prints it, by the version of timm that the page names."""
    text = (ROOT / name).read_text(encoding="utf-8")
    if f"timm {timm.__version__}" not in text:
        pytest.skip(f"{name} was made with another timm than {timm.__version__}")
    zoo.main(shlex.split(TABLE)[3:])
    table, _, notes = capsys.readouterr().out.partition("\n\n")
    assert table in text and (name != "README.md" or notes.strip() in text)


def test_badges_and_extras_are_what_pyproject_says():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (python,) = re.findall(r'^requires-python = ">=(.+)"$', project, re.MULTILINE)
    (license_,) = re.findall(r'^license = "(.+)"$', project, re.MULTILINE)
    assert f"badge/python-{python}%2B-" in README and f"badge/license-{license_.replace('-', '--')}-" in README
    assert f"Python {python} or newer" in README
    extras = project.split("[project.optional-dependencies]")[1].split("\n[")[0]
    install = README.split("## Install")[1].split("\n## ")[0]
    assert [name for name in re.findall(r"^(\w+) = \[", extras, re.MULTILINE) if f"`{name}`" not in install] == []
