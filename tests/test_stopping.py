"""SIGTERM and Ctrl-C to real processes; damaged, foreign and half-written checkpoints; a full disk."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import signal
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from chaos import command, final, same, untimed
from processes import context, start
from test_kill_and_resume import stop_at
from training_runs import DECOR, TINY, history, train

from timm_decor.errors import Stopped, UserError
from timm_decor.training import run as run_module
from timm_decor.training.keeping.checkpoints import Keeper
from timm_decor.training.keeping.folder import RunFolder, find_resume, read_resume

WORDS = [*DECOR, "--recovery-interval", "1"]
ALL_WORDS = [*command(Path())[len(TINY) : -4], *WORDS]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    process = start(command(folder / "run", *WORDS), folder / "log")
    process.join()
    assert process.exitcode == 0, (folder / "log").read_text()
    return folder / "run"


def wait_for(*files: Path) -> None:
    while not all(file.exists() for file in files):
        time.sleep(0.01)


class TestSignals:
    @pytest.mark.parametrize(
        ("signum", "code", "workers"), [(signal.SIGTERM, 143, 0), (signal.SIGTERM, 143, 1), (signal.SIGINT, 130, 1)]
    )
    def test_it_saves_leaves_and_can_go_on(self, signum: int, code: int, workers: int, whole: Path, tmp_path: Path):
        run, log = tmp_path / "run", tmp_path / "log"
        words = command(run, *WORDS[:-2], "-j", workers, "--resume", "auto")
        process = start(words, log, processes.slow_update, str(tmp_path / "marker"), 0.5)
        wait_for(tmp_path / "marker")
        os.killpg(process.pid, signum)  # as a terminal does, and a cluster: to the workers as well
        process.join(60)
        text, name = log.read_text(), signal.Signals(signum).name
        assert process.exitcode == code, text
        assert f"\n{name}: saving after this update; a second signal ends it at once\n" in text
        assert text.count("\ntrain.py: ") == text.count(f" stopped by {name} after update ") == 1
        assert "Traceback" not in text
        assert " after update 2; " in text and read_resume(run / "resume.pt")["progress"]["steps"] == 2
        process = start(words, log)
        process.join()
        assert process.exitcode == 0 and same(final(run), final(whole)), log.read_text()

    def test_a_second_one_ends_it_at_once(self, tmp_path: Path):
        marker = tmp_path / "marker"
        process = start(command(tmp_path / "run"), tmp_path / "log", processes.slow_update, str(marker), 60)
        wait_for(marker)
        for _ in range(2):
            os.kill(process.pid, signal.SIGTERM)
            process.join(0.3)
            assert process.exitcode is None, "what is handed on twice in a moment is one request"
        time.sleep(1)
        os.kill(process.pid, signal.SIGTERM)
        process.join(30)
        assert process.exitcode == -signal.SIGTERM


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run stopped in its second epoch, with a recovery checkpoint from the update before as well."""
    stop_at(monkeypatch, 9)
    with pytest.raises(Stopped):
        train(tmp_path / "run", *ALL_WORDS)
    monkeypatch.undo()
    return tmp_path / "run"


def test_what_a_comparison_prints_to_go_on_with_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(monkeypatch, 2)
    with pytest.raises(Stopped) as stop:
        train(tmp_path / "run", *DECOR, "--compare", "--epochs", 1)
    monkeypatch.undo()
    place = str(stop.value).rsplit("--resume ", 1)[1]
    assert place == str(tmp_path / "run")
    train(tmp_path / "run", *DECOR, "--compare", "--epochs", 1, "--resume", place)
    assert (tmp_path / "run" / "compare.json").is_file()


def stop_where(monkeypatch: pytest.MonkeyPatch, wanted: Callable[[Any], bool]) -> None:
    """Let a SIGTERM be seen at the places at which an arm is as wanted."""
    pause = Keeper.pause

    def paused(self: Keeper, *within: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(type(self._stop), "asked", lambda stop: signal.SIGTERM if wanted(self.arm) else 0)
            pause(self, *within)

    monkeypatch.setattr(Keeper, "pause", paused)


def test_of_a_comparison_one_side_may_have_come_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop where one has an epoch and the other nothing; then one where the first has ended, on another machine."""
    words = [*DECOR, "--compare", "--epochs", 1, "--compare-epochs", 2, "--resume", "auto"]
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_where(patch, lambda arm: arm.name == "test_resnet" and arm.steps == 0)
        with pytest.raises(Stopped, match=r"^test_resnet stopped by SIGTERM after update 0; go on with .* --resume "):
            train(run, *words)
    with monkeypatch.context() as patch:
        stop_where(patch, lambda arm: bool(arm.history) and arm.steps == arm.history[-1]["steps"] + 1)
        with pytest.raises(Stopped):
            train(run, *words)
    with pytest.raises(UserError, match=r"^test_resnet: epoch 2 has begun, and .* after 1: more --compare-epochs$"):
        train(run, *words, "--compare-epochs", 1)
    machine = run_module.machine
    monkeypatch.setattr(run_module, "machine", lambda accelerator: machine(accelerator) | {"cpu": "another"})
    train(run, *words)
    first, second = json.loads((run / "starts.json").read_text())
    assert first["steps"] == 0 and second["machine"]["cpu"] == "another"
    assert second["steps"] == int(history(run / "plain")[0]["steps"]) + 1


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    """One bit of the largest record, which torch.load would not notice."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    changed = bytearray(content)
    changed[largest.header_offset + 200 + largest.file_size // 2] ^= 4
    assert torch.load(io.BytesIO(changed), weights_only=True)
    return bytes(changed)


class Code:
    def __reduce__(self) -> tuple:
        return os.system, ("touch /tmp/this-must-not-be",)


def foreign(content: bytes) -> bytes:
    file = io.BytesIO()
    torch.save({"state_dict": {}, "epoch": 3}, file)
    return file.getvalue()


DAMAGE = {
    "half-written": cut,
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "a flipped bit": flipped,
    "of another program": foreign,
    "no checkpoint": lambda content: b"PK nonsense",
    "a pickle that runs code": lambda content: pickle.dumps(Code()),
}


class TestDamage:
    @pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
    def test_the_one_before_is_chosen(self, damage: Callable[[bytes], bytes], tmp_path: Path):
        folder = RunFolder(tmp_path)
        for step in (1, 2):
            folder.write_resume({"state_dict": {"a": torch.arange(5000.0)}, "optimizer": step, "history": []})
        newest = tmp_path / "resume.pt"
        newest.write_bytes(damage(newest.read_bytes()))
        file, wrong, state = find_resume(tmp_path)
        assert file == tmp_path / "resume-previous.pt" and state["optimizer"] == read_resume(file)["optimizer"] == 1
        assert wrong.startswith(f"cannot resume from {newest}: ") and "\n" not in wrong
        assert not Path("/tmp/this-must-not-be").exists()

    def test_the_run_goes_on_from_the_one_before(self, stopped: Path, whole: Path, capsys: pytest.CaptureFixture):
        newest = stopped / "resume.pt"
        before = read_resume(stopped / "resume-previous.pt")["progress"]["steps"]
        damaged = flipped(newest.read_bytes())
        newest.write_bytes(damaged)
        capsys.readouterr()
        train(stopped, *ALL_WORDS, "--resume", "auto")
        told = [line for line in capsys.readouterr().out.splitlines() if "cannot resume" in line]
        assert len(told) == 1 and told[0].startswith(f"cannot resume from {newest}: it is damaged (")
        assert told[0].endswith(f"; going on from resume-previous.pt instead, update {before}")
        assert same(final(stopped), final(whole))
        assert (stopped / "resume-damaged.pt").read_bytes() == damaged, "out of the way, and not lost"

    def test_each_state_is_checked_and_read_once(self, stopped: Path, monkeypatch: pytest.MonkeyPatch):
        load, read = torch.load, []

        def noted(file: Path, **kwargs: Any) -> Any:
            read.append(Path(file).name)
            return load(file, **kwargs)

        monkeypatch.setattr(torch, "load", noted)
        train(stopped, *ALL_WORDS, "--resume", "auto")
        assert read == ["resume.pt"]

    def test_nothing_usable_is_refused_in_one_line(self, stopped: Path):
        for name in ("resume.pt", "resume-previous.pt"):
            (stopped / name).write_bytes(b"")
        with pytest.raises(UserError, match=r"^cannot resume from .*resume\.pt: .*resume-previous\.pt: .*$"):
            train(stopped, *ALL_WORDS, "--resume", "auto")

    def test_any_flipped_bit_is_seen_or_harmless(self, stopped: Path, tmp_path: Path):
        content, state = (stopped / "resume.pt").read_bytes(), untimed(read_resume(stopped / "resume.pt"))
        places = random.Random(0)
        seen = 0
        for number in range(80):  # in the records, and as often in the directory behind them
            place = places.randrange(len(content)) if number % 2 else len(content) - 1 - places.randrange(6000)
            changed = bytearray(content)
            changed[place] ^= 1 << places.randrange(8)
            (tmp_path / "flipped.pt").write_bytes(changed)
            try:
                assert same(untimed(read_resume(tmp_path / "flipped.pt")), state), place
            except UserError:
                seen += 1
        assert seen > 30


class TestFullDisk:
    """The run ends with one line that says why, and the checkpoint before it is there to go on from."""

    def check(self, run: Path, log: Path, exitcode: int, reason: str, whole: Path) -> None:
        text = log.read_text()
        lines = [line for line in text.splitlines() if line.startswith("train.py: error: ")]
        assert exitcode == 2 and "Traceback" not in text, text
        assert len(lines) == 1 and lines[0].startswith("train.py: error: cannot write ")
        assert lines[0].endswith(f": {reason}")
        assert not list(run.glob(".*")), "nothing takes up room for nothing"
        assert find_resume(run)[:2] == (run / "resume.pt", "")
        train(run, *ALL_WORDS, "--resume", "auto")
        assert same(final(run), final(whole))

    def test_a_file_that_cannot_grow(self, stopped: Path, whole: Path, tmp_path: Path):
        words, log = command(stopped, *WORDS, "--resume", "auto"), tmp_path / "log"
        process = start(words, log, processes.limit_file_size, (stopped / "resume.pt").stat().st_size // 2)
        process.join()
        self.check(stopped, log, process.exitcode, "File too large", whole)

    @pytest.mark.parametrize("room", [0.3, 1.2, 2.0])
    def test_a_disk_without_room(self, room: float, whole: Path, tmp_path: Path):
        """One that has room for so many resume files beside the weights and the first one."""
        disk, log = tmp_path / "disk", tmp_path / "log"
        resume, weights = (os.path.getsize(whole / name) for name in ("resume.pt", "last.safetensors"))
        size = int(resume * (1 + room) + 2 * weights) // 4096 * 4096
        words = command(disk / "run", *WORDS, "--resume", "auto")
        arguments = (words, str(disk), size, str(tmp_path / "rescued"), str(log))
        process = context().Process(target=processes.on_small_disk, args=arguments)
        process.start()
        process.join()
        if process.exitcode == 77:
            pytest.skip("may not mount here")
        self.check(tmp_path / "rescued" / "run", log, process.exitcode, "No space left on device", whole)
