"""benchmarks/gpu.py: its commands are such as their scripts take, and it goes on where its time ended."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu
import pytest
import step_cost
import time_to_accuracy
from training_runs import ROOT

from study.presets import PRESETS
from timm_decor.errors import UserError


def task(code: str, *words: str) -> gpu.Task:
    class Python(gpu.Task):
        command = property(lambda self: [sys.executable, "-c", code, *words])

    return Python(code, ())


def test_its_scripts_take_its_commands() -> None:
    tasks = gpu.time_to_accuracy("cifar10", Path("a"), Path("out"))
    tasks += gpu.time_to_accuracy("imagenette128", Path("b"), Path("out"), *gpu.IMAGENETTE)
    for each in tasks:
        assert each.words[0] == "time_to_accuracy.py"
        args = time_to_accuracy.build_parser().parse_args(each.words[1:])
        preset = time_to_accuracy.make_preset(args)
        assert preset.model == "resnet18" and preset.amp and preset.workers == PRESETS["gpu"].workers > 1
        assert preset.stem == ("small" if "cifar10" in each.name else "timm")
        assert args.json.parent == Path("out/time_to_accuracy")
    assert [args.split(": ")[1] for args in (t.name for t in tasks)] == ["learning rates", "time to accuracy"] * 2
    for each in gpu.step_cost(Path("out")):
        args = step_cost.build_parser().parse_args(each.words[1:])
        assert args.device == "cuda" and args.img_size == [64, 128, 224] and args.precision == ["bfloat16"]


def test_it_ends_in_time_with_its_workers(tmp_path: Path) -> None:
    file = tmp_path / "alive"
    child = f"import time\nfor i in range(60):\n    open({str(file)!r}, 'a').write('x'); time.sleep(0.05)"
    slow = task(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])")
    done = task("open(__import__('sys').argv[1], 'w').write('done')", str(tmp_path / "done"))
    left = gpu.run([done, slow, done], minutes=1 / 60)
    assert left == [slow, done] and (tmp_path / "done").read_text() == "done"
    size = file.stat().st_size if file.exists() else 0
    time.sleep(0.3)
    assert (file.stat().st_size if file.exists() else 0) == size, "a worker lives on"
    assert gpu.run([done], minutes=0) == [done]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_its_workers_too(tmp_path: Path, number: signal.Signals) -> None:
    """As `timeout`, a scheduler or a closed terminal ends it: the same command would train beside an orphan."""
    file = tmp_path / "alive"
    child = f"import time\nwhile True:\n    open({str(file)!r}, 'a').write('x'); time.sleep(0.05)"
    code = (
        f"import sys; sys.path[:0] = {[str(ROOT / 'benchmarks'), str(ROOT)]!r}; import gpu\n"
        "class Python(gpu.Task):\n    command = property(lambda self: [sys.executable, '-c', self.name])\n"
        f"gpu.run([Python({child!r}, ())], minutes=5)"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    end = time.monotonic() + 60
    while not file.exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=30) == 128 + number
    size = file.stat().st_size
    time.sleep(0.5)
    assert file.stat().st_size == size, "a task lives on"


def test_a_failure_is_told() -> None:
    with pytest.raises(UserError, match="failed, see above"):
        gpu.run([task("raise SystemExit(2)")], minutes=1)


def test_images_are_asked_for() -> None:
    with pytest.raises(UserError, match="--imagenette: where are these images"):
        gpu.main(["--cifar10", "x"])
