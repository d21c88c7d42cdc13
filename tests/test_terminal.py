"""What a person sees at the terminal: the bar, lines in a pipe, the run's time left, the first word and the last."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from training_runs import DECOR, ROOT, options, reset_accelerate, train

from timm_decor.errors import UserError
from timm_decor.training import build, validation
from timm_decor.training.args import train_parser, validate_parser
from timm_decor.training.seeing import display, ending
from timm_decor.training.seeing.timeleft import TimeLeft

NEEDED = r"top-1 \d+\.\d%, loss [\d.]+, lr [\d.e-]+, (\d+:)?\d\d:\d\d left"


class Terminal(io.StringIO):
    """A standard error that says it is a terminal; `frames` is what stood in its last line, one after the other."""

    def isatty(self) -> bool:
        return True

    @property
    def frames(self) -> list[str]:
        return [frame.rstrip() for frame in re.split(r"[\r\n]", self.getvalue()) if frame.strip()]


def shown(
    monkeypatch: pytest.MonkeyPatch, columns: int, title: str, left: float = 61.0, batches: int = 30, **kwargs: Any
) -> list[str]:
    """The frames of an epoch's bar on a terminal of so many columns."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = display.Display(title, batches, 32, Accelerator(cpu=True), 50, lambda *_: None, lambda *_: left, **kwargs)
    bar._bar.mininterval, bar._bar.dynamic_ncols = 0, lambda _: (columns, 24)
    for step in range(kwargs.get("done", 0), batches):
        bar.update((2.302585, 97.77), 1.2345e-05, (0.321, 0.0123), step + 1)
    bar.close()
    return terminal.frames


class TestBar:
    @pytest.mark.parametrize(
        "title", ["test_resnet 1/3", "decorrelated test_resnet 1/3", f"decor_{'vit_small_patch14_' * 4} 100/300"]
    )
    @pytest.mark.parametrize("left", [0.4, 59.0, 360_000.0])
    def test_80_columns_have_what_is_needed(self, title: str, left: float, monkeypatch: pytest.MonkeyPatch):
        frames = shown(monkeypatch, 80, title, left)
        assert len(frames) > 5 and max(map(len, frames)) <= 80
        for frame in frames[1:]:
            assert re.search(rf"^{title[:5]}.* {title.split()[-1]} +\d+%\|.+\| {NEEDED}", frame), frame

    def test_more_columns_have_more(self, monkeypatch: pytest.MonkeyPatch):
        wide, wider = (shown(monkeypatch, columns, "test_resnet 1/3")[-1] for columns in (90, 140))
        assert re.search(NEEDED + r", \d+ img/s$", wide) and "correlation" not in wide
        assert re.search(NEEDED + r", \d+ img/s, correlation 0\.32 > 0\.01$", wider)

    def test_a_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setattr(display, "_Bar", partial(display._Bar, mininterval=0))  # four batches may take 0.1 s
        train(tmp_path / "run", "--epochs", 1)
        assert all(len(frame) <= 80 for frame in terminal.frames)
        assert any(re.search(f"test_resnet.* 1/1 .*{NEEDED}", frame) for frame in terminal.frames)


class TestLines:
    def lines(self, capsys: pytest.CaptureFixture) -> list[str]:
        return [line for line in capsys.readouterr().out.splitlines() if ": batch " in line]

    def test_the_first_the_last_and_each_interval(self, tmp_path: Path, capsys: pytest.CaptureFixture):
        train(tmp_path / "run", *DECOR, "--train-split", "train[:224]", "--epochs", 2, "--log-interval", 3)
        lines = self.lines(capsys)
        assert [re.search(r"batch (\d)/7", line)[1] for line in lines] == ["1", "3", "6", "7"] * 2
        assert all(re.search(NEEDED + r", \d+ img/s, correlation 0\.\d+ > 0\.\d+$", line) for line in lines)

    def test_where_looking_costs_something(self, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch):
        """As on a GPU, where losses are fetched each --log-interval batches."""
        monkeypatch.setattr("timm_decor.training.seeing.losswatch.LossWatch.due", property(lambda self: False))
        train(tmp_path / "run", "--epochs", 1, "--log-interval", 50)
        assert [re.search(r"batch (\d)/4", line)[1] for line in self.lines(capsys)] == ["1", "4"]


@dataclass
class Arm:
    name: str
    epochs: int
    failure: str | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    works: Sequence[float] = (1,) * 9

    @property
    def epoch(self) -> int:
        return len(self.history)

    def work(self, epoch: int) -> float:
        return self.works[epoch]


class TestTimeLeft:
    def test_the_first_epoch_goes_by_its_rate(self):
        assert TimeLeft([arm := Arm("a", 5)]).seconds(arm, pace=100, share=0.25, rest=0.75) == 75 + 4 * 100

    def test_evaluation_and_saving_count(self):
        left = TimeLeft([arm := Arm("a", 5)])
        left.seconds(arm, pace=100, share=1, rest=0)
        left.end_epoch(arm, 130)
        arm.history.append({"epoch_seconds": 100})
        assert left.seconds(arm, pace=100, share=0.5, rest=0.5) == 50 + 30 + 3 * 130
        # the share of this epoch weighs as much as it is long
        assert left.seconds(arm, pace=160, share=0.5, rest=0.5) == pytest.approx(60 + 30 + 3 * 150)

    def test_a_resumed_run_goes_by_this_process(self):
        arm = Arm("a", 5, history=[{"epoch_seconds": 1e6}] * 2)
        left = TimeLeft([arm])
        assert left.seconds(arm, pace=100, share=0.1, rest=0.5) == pytest.approx(50 + 2 * 100)
        left.end_epoch(arm, 0.6 * 100 + 10)
        assert left._spent["a"].besides == pytest.approx(60), "what came after the last figure"

    def test_an_epoch_that_was_only_evaluated(self):
        left = TimeLeft([arm := Arm("a", 3)])
        left.end_epoch(arm, 20)
        arm.history.append({"epoch_seconds": 100})
        assert left.seconds(arm, pace=50, share=0.5, rest=0.5) == 25 + 20 + (50 + 20)

    def test_both_arms_of_a_comparison(self):
        mine, twin = Arm("a", 3), Arm("b", 2)
        left = TimeLeft([mine, twin])
        assert left.seconds(mine, pace=100, share=1, rest=0) == 2 * 100 + 2 * 100, "nothing is known of the twin"
        left.end_epoch(mine, 110)
        mine.history.append({"epoch_seconds": 100})
        assert left.seconds(twin, pace=40, share=0.5, rest=0.5) == 20 + 40 + 2 * 110
        left.end_epoch(twin, 25)
        twin.history.append({"epoch_seconds": 40})
        assert left.seconds(mine, pace=100, share=0.5, rest=0.5) == 50 + 10 + 110 + (40 + 5)
        twin.failure = "it diverged"
        assert left.seconds(mine, pace=100, share=0.5, rest=0.5) == 50 + 10 + 110

    def test_an_arm_of_a_resumed_comparison_that_waits(self):
        mine, twin = Arm("a", 2), Arm("b", 2, history=[{"epoch_seconds": 30}])
        assert TimeLeft([mine, twin]).seconds(mine, pace=100, share=0.5, rest=0.5) == 50 + 100 + 30

    def test_smaller_images_cost_less(self):
        mine, twin = (Arm(name, 3, works=(0.25, 0.25, 1)) for name in "ab")
        left = TimeLeft([mine, twin])
        assert left.seconds(mine, pace=10, share=0.5, rest=0.5) == 5 + 50 + 60
        left.seconds(mine, pace=10, share=1, rest=0)
        left.end_epoch(mine, 12)
        mine.history.append({"epoch_seconds": 10})
        assert left.seconds(twin, pace=20, share=0.5, rest=0.5) == 10 + 20 + 80 + (50 + 2 * 2)
        resumed = Arm("a", 3, works=(0.25, 0.25, 1), history=[{"epoch_seconds": 10}])
        assert TimeLeft([twin, resumed]).seconds(twin, pace=20, share=1, rest=0) == 20 + 80 + 50

    def test_a_run_asks_it_of_both(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        asked, ended, seconds, end = [], [], TimeLeft.seconds, TimeLeft.end_epoch

        def see(self: TimeLeft, arm: Arm, pace: float, share: float, rest: float) -> float:
            asked.append((arm.name, rest, pace, left := seconds(self, arm, pace, share, rest)))
            return left

        monkeypatch.setattr(TimeLeft, "seconds", see)
        monkeypatch.setattr(
            TimeLeft, "end_epoch", lambda self, arm, whole: (ended.append(arm.name), end(self, arm, whole))
        )
        train(tmp_path / "run", *DECOR, "--epochs", 2, "--compare")
        order = ["decorrelated test_resnet", "test_resnet", "test_resnet", "decorrelated test_resnet"]
        assert [name for name, rest, *_ in asked if rest == 0] == ended == order
        assert [round(rest, 6) for _, rest, *_ in asked[:4]] == [0.75, 0.5, 0.25, 0]
        _, _, pace, left = asked[3]
        assert left == pytest.approx(3 * pace), "one epoch more of its own, two of the twin"


@pytest.fixture
def without_torch(tmp_path: Path) -> dict[str, str]:
    """An environment in which to import torch ends the program at once."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    return {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}


class TestStart:
    def call(self, env: dict[str, str], *words: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)

    @pytest.mark.parametrize("script", ["train.py", "validate.py"])
    def test_help_and_refusals_need_no_torch(self, script: str, without_torch: dict[str, str]):
        done = self.call(without_torch, script, "--help")
        assert done.returncode == 0 and done.stdout.startswith(f"usage: {script}") and done.stderr == ""
        done = self.call(without_torch, script, "--checkpooint", "x")
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(f"{script}: error: unknown argument '--checkpooint'; near: --.*\n", done.stderr)

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            ("train.py --model resnet18 --data-dir /data/pets", "resnet18 and pets"),
            ("train.py -c recipes/digits_resnet18.yaml", "and digits_resnet18.yaml"),
            ("train.py --resume output/run", "and run"),
            ("train.py --resume auto --experiment x", "decor_resnet18 and digits"),
            ("validate.py --checkpoint a/best.safetensors b/c.pth", "best.safetensors, 1 more and digits"),
        ],
    )
    def test_a_line_comes_before_torch(self, words: str, said: str, without_torch: dict[str, str]):
        script, *rest = words.split()
        first, second = self.call(without_torch, script, *rest).stderr.splitlines()
        separator = " " if said.startswith("and") else ", "
        assert first == f"{script}: loading PyTorch, timm{separator}{said}" and second == "torch was imported"

    def test_one_process_says_it(self, without_torch: dict[str, str]):
        assert self.call({**without_torch, "RANK": "1"}, "train.py").stderr == "torch was imported\n"

    def test_the_package_is_whole_behind_the_door(self):
        code = (
            "import sys, timm_decor_door; sys.argv = ['x', '--seed', '3']; probe = type(sys)('probe')\n"
            "probe.main = lambda argv, prog: print(argv, prog, sys.modules['timm_decor'].__version__)\n"
            "sys.modules['timm_decor.training.validation'] = probe\n"
            "print(timm_decor_door.enter('x', 'validate')); import timm_decor, timm\n"
            "print(timm.is_model('decor_resnet18'), timm_decor.attach.__module__)"
        )
        done = self.call({**os.environ, "PYTHONPATH": str(ROOT)}, "-c", code)
        version = sys.modules["timm_decor"].__version__
        expected = [f"['--seed', '3'] x {version}", "0", "True timm_decor.engine.attach"]
        assert done.stdout.splitlines() == expected, done.stderr


@pytest.mark.parametrize("make", [train_parser, validate_parser])
def test_help_has_each_default_once_and_right(make: Any):
    parser, shown = make(), 0
    assert "None" not in parser.format_help()
    for action in parser._actions:
        text = " ".join(parser._get_formatter()._format_action(action).split())
        found = re.findall(r"\(default: ([^)]*)\)", text)
        assert len(found) <= 1, text
        if found:
            assert found == [str(action.default)], text
            shown += 1
        elif action.default not in (None, [], {}) and action.dest != "help":
            assert "default: " in action.help, text
    assert shown > 10


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A comparison, and what it said."""
    run = tmp_path_factory.mktemp("runs") / "run"
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", said)
        patch.setattr(sys, "stderr", Terminal())
        train(run, *DECOR, "--epochs", 2, "--compare", "--model-ema")
    return run, said.getvalue()


class TestRun:
    def test_no_line_wraps(self, out: tuple[Path, str]):
        run, text = out
        lines = [line for line in text.replace(str(run), "output/run").splitlines() if not line.startswith("|")]
        assert [line for line in lines if len(line) > 80] == []

    def test_an_epoch_is_a_line(self, tmp_path: Path, capsys: pytest.CaptureFixture):
        train(tmp_path / "run", "--epochs", 1)
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
        figures = r"loss \d\.\d{3}, eval \d\.\d{3}, top-1 [\d.]+%, lr [\d.e-]+, [\d.]+ s, \d+ img/s"
        assert re.fullmatch(rf"epoch 1/1: {figures}", line)

    def test_the_sides_of_a_comparison_take_turns(self, out: tuple[Path, str]):
        heads = re.findall(r"^(decor|plain) (\d)/2: loss", out[1], re.MULTILINE)
        assert heads == [("decor", "1"), ("plain", "1"), ("plain", "2"), ("decor", "2")]

    def test_the_end_says_where_everything_is(self, out: tuple[Path, str]):
        run, text = out
        block = text[text.index("\nreport ") :]
        places = re.findall(rf"{re.escape(str(run))}[\w/.-]*", block)
        assert len(places) == 10 and "--use-ema" in block and all(Path(place).exists() for place in places)
        for name in ("report.html", "compare.png", "decorrelated/best.safetensors", "plain/last.safetensors"):
            assert str(run / name) in places
        command = " ".join(block[block.index("validate:") :].split("publish")[0].replace("\\\n", "").split()[3:])
        assert (
            command
            == f"--dataset digits --split 'test[:70]' --checkpoint {run}/decorrelated/best.safetensors --use-ema"
        )

    def test_a_finished_run_says_so(self, out: tuple[Path, str], capsys: pytest.CaptureFixture):
        run, _ = out
        # summary.csv is written anew with what is in it, because a killed run may have left it behind its checkpoint
        files = [file for file in run.rglob("*") if file.is_file() and file.name != "summary.csv"]
        before = [file.stat().st_mtime_ns for file in files]
        capsys.readouterr()
        train(run, "--resume", run, base=[])
        assert capsys.readouterr().out == f"{run} is finished: 2 of 2 epochs; --epochs N trains on\n"
        assert before == [file.stat().st_mtime_ns for file in files]

    def test_one_that_was_stopped_before_its_results(self, tmp_path: Path, capsys: pytest.CaptureFixture):
        run = train(tmp_path / "run", "--epochs", 1)
        (run / "results.json").unlink()
        capsys.readouterr()
        train(run, "--resume", run, base=[])
        assert "is finished" not in capsys.readouterr().out
        results = json.loads((run / "results.json").read_text())
        assert results["final"]["epoch"] == 1
        (run / "results.json").write_text(json.dumps({**results, "final": {**results["final"], "epoch": 0}}))
        train(run, "--resume", run, base=[])
        assert json.loads((run / "results.json").read_text())["final"]["epoch"] == 1, "it was of an epoch before"

    def test_it_trains_on(self, tmp_path: Path, capsys: pytest.CaptureFixture):
        run = train(tmp_path / "run", "--epochs", 1)
        capsys.readouterr()
        train(run, "--resume", run, "--epochs", 2, base=[])
        out = capsys.readouterr().out
        assert "goes on after update 4" in out and "\nepoch 2/2: " in out


class TestPlaces:
    def test_relative_to_the_current_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.chdir(tmp_path)
        assert ending.here(tmp_path / "output" / "run") == ending.here(Path("output/run")) == "output/run"
        assert ending.here(Path("/elsewhere/run")) == "/elsewhere/run"

    def test_the_data_are_named_and_commands_can_be_copied(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "run").mkdir()
        for name in ("best.safetensors", "best-ema.safetensors", "summary.csv", "results.json", "report.html"):
            (tmp_path / "run" / name).touch()
        data = options("--dataset", "folder", "--data-dir", "/mnt/my data/of/flowers").data
        lines = ending.whereabouts(Path("run"), {"": Path("run")}, data, "validation", averaged=False).splitlines()
        assert lines[:3] == [
            "report   run/report.html",
            "best     run/best.safetensors",
            "results  run/results.json",
        ]
        assert lines[4:6] == [
            "  timm-decor validate --dataset folder --data-dir '/mnt/my data/of/flowers' \\",
            "    --checkpoint run/best.safetensors",
        ]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs."""
    return train(tmp_path_factory.mktemp("runs") / "run", "--epochs", 2)


class TestValidate:
    def printed(self, monkeypatch: pytest.MonkeyPatch, columns: int, *words: object, terminal: bool = True) -> str:
        said = Terminal() if terminal else io.StringIO()
        monkeypatch.setattr(sys, "stdout", said)
        monkeypatch.setenv("COLUMNS", str(columns))
        reset_accelerate()
        validation.main(["--dataset", "digits", "--device", "cpu", "-j", "0", "--split", "test[:70]", *map(str, words)])
        return said.getvalue()

    def test_several_are_a_table_on_a_terminal(self, run: Path, monkeypatch: pytest.MonkeyPatch):
        header, _, *rows = self.printed(monkeypatch, 80, "--checkpoint", run).splitlines()
        assert header.split()[:4] == ["checkpoint", "top1", "top5", "loss"] and len(rows) == 2
        assert max(map(len, (header, *rows))) <= 80
        wide = self.printed(monkeypatch, 200, "--checkpoint", run).splitlines()[0].split()
        narrow = self.printed(monkeypatch, 20, "--checkpoint", run).splitlines()[0].split()
        assert wide[4:] == ["images_per_s", "img_size", "model"] and narrow == wide[:4]

    def test_json_in_a_pipe_when_asked_for_and_of_one(self, run: Path, monkeypatch: pytest.MonkeyPatch):
        assert len(json.loads(self.printed(monkeypatch, 80, "--checkpoint", run, terminal=False))) == 2
        assert len(json.loads(self.printed(monkeypatch, 80, "--checkpoint", run, "--json"))) == 2
        one = run / "last.safetensors"
        assert json.loads(self.printed(monkeypatch, 80, "--checkpoint", one))["model"] == "test_resnet"

    def test_a_file_that_is_not_there(self, run: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(validation, "open_source", lambda *_: pytest.fail("data were read"))
        monkeypatch.setattr(validation, "make_accelerator", lambda *_: pytest.fail("too late"))
        with pytest.raises(UserError) as error:
            validation.main(["--checkpoint", str(run / "last.safetensors"), str(run / "bets.safetensors")])
        words = f"no checkpoint file {run / 'bets.safetensors'}; in its folder: best.safetensors, "
        assert str(error.value).startswith(words) and "last.safetensors" in str(error.value)

    def test_what_is_in_its_folder(self, tmp_path: Path):
        assert build.no_checkpoint(f"{tmp_path}/x.pth").endswith("x.pth; in its folder: none")
        assert build.no_checkpoint(f"{tmp_path}/no/x.pth") == (
            f"no checkpoint file {tmp_path}/no/x.pth: there is no folder {tmp_path}/no"
        )
        for name in [".hidden/", "run/", *(f"checkpoint-{n}.safetensors" for n in range(9)), "x.csv"]:
            (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
        text = build.no_checkpoint(f"{tmp_path}/checkpoint-9.safetensors")
        assert text.endswith(" and 5 more") and text.count("checkpoint-") == 6
        assert "in its folder: run/, " in build.no_checkpoint(f"{tmp_path}/rn")
