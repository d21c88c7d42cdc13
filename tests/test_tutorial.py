"""docs/tutorial.md: what it tells to type works, and prints what the page says. make dist does it with the wheel."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import processes
import pytest
import tutorial
from tutorial import Step, difference


def perform(words: list[str]) -> int:
    """The command of these words, in a process that has torch already."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the page is of a CPU
    if words[0] == "python":
        exec(compile(words[2], "tutorial.md", "exec"), {"__name__": "__main__"})
        return 0
    from timm_decor import cli

    sys.argv = words
    return cli.main(words[1:], lambda: None)


def test_every_command_prints_what_the_page_says(tmp_path: Path):
    (folder := tmp_path / "work").mkdir()
    done = []
    for number, step in enumerate(tutorial.steps()):
        log = tmp_path / f"{number}.log"
        code = processes.call(folder, log, perform, step.words)
        printed = log.read_text()
        assert code == 0, printed
        assert difference(step, printed) == "", printed
        done.append(step.words[0] if step.language == "python" else step.words[1])
    assert done == ["python", "train", "validate", "predict", "export", "publish", "python"]


@pytest.mark.parametrize(
    ("said", "printed", "missing"),
    [
        ("8 images, 1.5 s", "10\n8   images,\n 0.2 s", ""),
        ("8 images", "7 images", "8 images"),
        ("a 1,024 bytes\n...\nc", "a 7 bytes b c", ""),
        ("a\n...\nc", "c a", "c"),
        ("epoch 3, top-1 96.00%", "epoch 3, top-1 91.50%", ""),
        ("epoch 3, top-1 96.00%", "epoch 3, top-1 12.50%", "accuracy 96.00: it is 12.50"),
        ('"top1": 96.0,', '"top1": 100.0,', ""),
        ("name    %\n----  ---", "name      %\n------  ---", ""),
        ("differ by 3.3e-06 at most", "differ by 0.0e+00 at most", ""),
    ],
)
def test_a_difference_is_seen(said: str, printed: str, missing: str):
    assert difference(Step("sh", "", said), printed) == missing
