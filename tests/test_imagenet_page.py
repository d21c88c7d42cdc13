"""What docs/imagenet.md tells a person to type is typed, on a miniature of ImageNet and two processes of the CPU."""

from __future__ import annotations

import json
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from processes import free_port, launched_one_of, start
from safetensors.torch import load_file
from training_runs import ROOT, history, reset_accelerate

from timm_decor.training.run import parse
from timm_decor.training.validation import main as validate

PAGE = (ROOT / "docs" / "imagenet.md").read_text(encoding="utf-8")
COMMANDS = [shlex.split(line) for line in re.findall(r"^    (\S.*)$", re.sub(r"(?s)```.*?```", "", PAGE), re.MULTILINE)]
TRAINING, LEFT_OVER = 26, 2  # images; of two processes with batches of four, two make no step
# in seconds on a CPU: the page's run otherwise
SMALL = shlex.split(
    "--model test_resnet --decor --decor-every 3 --num-classes 3 --img-size 32 --progressive-size 24:0.5,32:0.5 "
    "--epochs 2 --batch-size 4 --workers 2 --lr 0.02 --no-amp --device cpu --recovery-interval 1 --warmup-epochs 0"
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by the page's script of folders with JPEG files of 64 pixels."""
    folder = tmp_path_factory.mktemp("imagenet")
    numbers = np.random.default_rng(0)
    for split, images in (("train", TRAINING), ("val", 11)):
        for number in range(images):
            place = folder / "IMAGENET" / split / f"n0144076{number % 3}"
            place.mkdir(parents=True, exist_ok=True)
            pixels = numbers.integers(80 * (number % 3), 80 * (number % 3) + 90, (64, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{number}.JPEG")
    (command,) = (words for words in COMMANDS if words[1:2] == ["make_shards.py"])
    (script,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    before, sys.argv = sys.argv, [*placed(command[1:], folder), "7"]
    try:
        exec(compile(script, "make_shards.py", "exec"), {"__name__": "__main__"})
    finally:
        sys.argv = before
    return folder / "SHARDS"


def placed(words: list[str], folder: Path) -> list[str]:
    """A command's words with the places that its names stand for."""
    here = {"IMAGENET": folder / "IMAGENET", "SHARDS": folder / "SHARDS"}
    return [str(here.get(w, ROOT / w if w.startswith(("recipes/", "docs/")) else w)) for w in words]


def launches() -> list[tuple[list[str], list[str]]]:
    """The launcher's words and train.py's of each `accelerate launch`, in the page's order."""
    found = [words[2:] for words in COMMANDS if words[:2] == ["accelerate", "launch"]]
    return [(words[: words.index("train.py")], words[words.index("train.py") + 1 :]) for words in found]


def test_every_command_has_its_test():
    kinds = [" ".join(words[: 2 if words[0] in ("accelerate", "python") else 1]) for words in COMMANDS]
    here = ["accelerate launch"] * 3 + ["python make_shards.py", "python train.py", "python validate.py", "timm-decor"]
    assert sorted(kinds) == sorted([*here, "hf", "pip"]), "hf and pip need a network"


def test_the_shards_are_as_the_page_says(shards: Path):
    info = json.loads((shards / "_info.json").read_text())["splits"]
    assert (info["train"]["num_samples"], info["validation"]["num_samples"]) == (TRAINING, 11)
    assert info["train"]["shard_lengths"] == [7, 7, 7, 5] and len(info["validation"]["filenames"]) == 2
    assert json.loads((shards / "classes.json").read_text()) == ["n01440760", "n01440761", "n01440762"]


def test_the_arguments_are_known():
    """Those of all three launches and of the single GPU, and what the page has in its text."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    for launcher, words in launches():
        arguments = launch_command_parser().parse_args([*placed(launcher, ROOT), "train.py"])
        _validate_launch_command(arguments)
        parse(placed(words, ROOT))
    (single,) = (words[2:] for words in COMMANDS if words[1:2] == ["train.py"])
    given = parse([*placed(single, ROOT), *shlex.split("--compare --find-lr 0.4 3.2")])
    assert (given.model, given.dataset, given.epochs) == ("decor_resnet18", "wds/", 16)


def test_the_expected_steps():
    number = r"(\d[\d ]*)"
    for name, processes in (("imagenet_resnet50", 8), ("imagenet_resnet18", 1)):
        recipe = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
        pattern = rf"`{name}.yaml` {number} / {number}, {number} an\s+epoch and {number} in {number}"
        images, batch, steps, total, epochs = (int(text.replace(" ", "")) for text in re.search(pattern, PAGE).groups())
        assert (images, batch, epochs) == (1_281_167, recipe["batch-size"] * processes, recipe["epochs"])
        assert (steps, total) == (images // batch, images // batch * epochs) and recipe["lr-base-size"] == batch


def launch(launcher: list[str], words: list[str], log: Path) -> list[Any]:
    port = free_port()
    launcher = [*launcher, "--num_processes", "2"]
    return [start(words, log, launched_one_of, rank, 2, port, launcher) for rank in range(2)]


def test_launched_killed_and_launched_again(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """DDP and FSDP2, each with one of its two processes killed within the first epoch, come to the same end."""
    ends = []
    for launcher, words in launches()[:2]:
        kind = "fsdp2" if "--config_file" in launcher else "ddp"
        launcher, words = placed(launcher, shards.parent), placed(words, shards.parent)
        words, log = [*words, *SMALL, "--output", str(tmp_path)], tmp_path / f"{kind}.log"
        run = tmp_path / words[words.index("--experiment") + 1]
        group = launch(launcher, words, log)
        while not (run / "resume.pt").exists() and group[0].exitcode is None:
            time.sleep(0.01)
        group[1].kill()
        group[1].join()
        group[0].kill()  # as the launcher does when one is gone
        group[0].join()
        assert [process.exitcode for process in group] == [-9, -9], log.read_text()
        group = launch(launcher, words, log)
        for process in group:
            process.join()
        said = log.read_text()
        assert [process.exitcode for process in group] == [0, 0], said
        assert said.count("goes on after update") == 1, said
        assert ("the model is cut over the processes" in said) == (kind == "fsdp2"), said
        assert [row["steps"] for row in history(run)] == [(TRAINING - LEFT_OVER) // 8 * n for n in (1, 2)]
        ends.append((load_file(run / "last.safetensors"), history(run)))
    (ddp, rows), (fsdp2, others) = ends
    for key, value in ddp.items():
        torch.testing.assert_close(fsdp2[key], value, rtol=1e-3, atol=1e-4)
    assert [row["eval_loss"] for row in rows] == pytest.approx([row["eval_loss"] for row in others], rel=1e-3)

    (command,) = (words[2:] for words in COMMANDS if words[1:2] == ["validate.py"])
    reset_accelerate()
    checkpoint = str(tmp_path / "imagenet_resnet50" / "best.safetensors")
    capsys.readouterr()
    validate([*placed(command, shards.parent), "--checkpoint", checkpoint, "--device", "cpu", "--workers", "0"])
    result = json.loads(capsys.readouterr().out)
    best = max(rows, key=lambda row: row["eval_top1"])
    assert result["images"] == 11 and result["top1"] == pytest.approx(best["eval_top1"], abs=0.01)
    assert result["loss"] == pytest.approx(best["eval_loss"], rel=1e-4)
