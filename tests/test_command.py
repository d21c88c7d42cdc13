"""timm-decor: its subcommands, what it says of wrong ones, and how a shell completes it."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from training_runs import ROOT

from timm_decor import cli, completion
from timm_decor.errors import exit_code

COMMAND = "import sys, timm_decor_door; sys.argv[0] = 'timm-decor'; sys.exit(timm_decor_door.main())"


def call(*words: str, path: Path | None = None) -> subprocess.CompletedProcess:
    """The command in a process of its own; `path` comes first on the path of modules."""
    places = os.pathsep.join([*([str(path)] if path else []), str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": places, "COLUMNS": "80"}
    return subprocess.run([sys.executable, "-c", COMMAND, *words], env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture
def without_torch(tmp_path: Path) -> Path:
    """A folder whose torch ends the program at once."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    return tmp_path


@pytest.mark.parametrize("name", ["", *cli.COMMANDS])
def test_help_needs_no_torch(name: str, without_torch: Path):
    done = call(*name.split(), "--help", path=without_torch)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: {f'timm-decor {name}'.strip()} [")
    assert name or all(re.search(rf"^    {word}\b", done.stdout, re.MULTILINE) for word in cli.COMMANDS)
    assert name or max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("trian", "timm-decor: error: unknown command 'trian'; near: train"),
        ("x", "timm-decor: error: unknown command 'x'; commands: train, validate, "),
        ("", "timm-decor: error: a command is needed: train, validate, "),
        ("--model resnet18", "timm-decor: error: '--model' stands where a command is needed: train, "),
        ("train --modle resnet18", "timm-decor train: error: unknown argument '--modle'; near: --model"),
        ("publish run --repo-id", "timm-decor publish: error: argument --repo-id: expected one argument"),
        ("list --layer", "timm-decor list: error: unknown argument '--layer'; near: --layers"),
        ("completion fish", "timm-decor completion: error: argument shell: invalid choice: 'fish'"),
    ],
)
def test_refusals_are_one_line_and_need_no_torch(words: str, said: str, without_torch: Path):
    done = call(*words.split(), path=without_torch)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert done.stderr.startswith(said)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train --model resnet18", "timm-decor train: loading PyTorch, timm, resnet18 and digits"),
        ("publish output/run --repo-id me/x", "timm-decor publish: loading PyTorch, timm and run"),
        ("list resnet18", "timm-decor list: loading PyTorch, timm"),
    ],
)
def test_a_line_comes_before_torch(words: str, said: str, without_torch: Path):
    assert call(*words.split(), path=without_torch).stderr.splitlines() == [said, "torch was imported"]


def test_each_has_a_parser_and_a_main():
    for name, command in cli.COMMANDS.items():
        assert command.make_parser(f"timm-decor {name}").prog == f"timm-decor {name}"
        assert (ROOT / f"{command.module.replace('.', '/')}.py").is_file()


def test_errors_behind_the_door_name_the_command():
    done = call("list", "resnet81")
    assert done.returncode == 2
    error = done.stderr.splitlines()[-1]
    assert error.startswith("timm-decor list: error: 'resnet81' is no model that has a twin; near:")


class TestUnreadOutput:
    """As behind `| head`: nobody reads on."""

    LIGHT = "import timm_decor_door; timm_decor_door._deferred(); from timm_decor.errors import exit_code"  # no torch
    MANY = "exit_code('x', lambda _: [print(n) for n in range(100_000)], [])"

    def ended(self, code: str, *words: str, both: bool = False) -> tuple[int, str]:
        """Exit code and stderr of a program whose first line alone is read, or with `both` nothing of either stream."""
        process = subprocess.Popen(
            [sys.executable, "-c", code, *words], env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT if both else subprocess.PIPE,
        )  # fmt: skip
        if not both:
            process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read() if process.stderr else ""
        return process.wait(timeout=120), said

    @pytest.mark.parametrize("both", [False, True])
    def test_it_ends_as_sigpipe_would_end_it(self, both: bool):
        assert self.ended(f"{self.LIGHT}; import sys; sys.exit({self.MANY})", both=both) == (141, "")

    def test_what_is_still_held_back(self):
        """Printed, but in Python's own buffer until the end."""
        text = "import time; print('one', flush=True); time.sleep(0.3); print('two')"
        code = f"{self.LIGHT}; import sys; sys.stdout.reconfigure(line_buffering=False); text = {text!r}"
        assert self.ended(f"{code}; sys.exit(exit_code('x', lambda _: exec(text), []))") == (141, "")

    def test_help(self):
        code, said = self.ended(COMMAND, "train", "--help")
        assert said == "" and code in (0, 141)

    def test_a_pipe_of_something_else_is_an_error_like_others(self):
        def main(_: list[str]) -> None:
            raise BrokenPipeError("the Hub hung up")

        with pytest.raises(BrokenPipeError, match="the Hub hung up"):
            exit_code("x", main, [])


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("shtab")
    file = tmp_path_factory.mktemp("completion") / "script"
    with file.open("w") as out, contextlib.redirect_stdout(out):
        completion.main(["bash"], "timm-decor completion")
    return file


class TestCompletion:
    COMPLETE = """
        source "$1"; shift
        COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); COMPREPLY=()
        _shtab_timm_decor timm-decor "${@: -1}" "${@: -2:1}"
        printf '%s\\n' "${COMPREPLY[@]}"
    """

    @pytest.mark.parametrize(
        ("words", "completed"),
        [
            ("tr", {"train"}),
            ("train --model decor_resnet18", {"decor_resnet18", "decor_resnet18d"}),
            ("train --sched co", {"cosine", "constant"}),
            ("validate --checkpoi", {"--checkpoint"}),
            ("list resnet10t", {"resnet10t"}),
            ("publish READM", {"README.md"}),
        ],
    )
    def test_bash(self, words: str, completed: set[str], script: Path):
        words_ = ["bash", "-c", self.COMPLETE, "bash", str(script), "timm-decor", *words.split()]
        done = subprocess.run(words_, cwd=ROOT, capture_output=True, text=True, check=True)
        assert set(done.stdout.split()) == completed, done.stderr

    def test_zsh(self, capsys: pytest.CaptureFixture[str]):
        pytest.importorskip("shtab")
        completion.main(["zsh"], "timm-decor completion")
        text = capsys.readouterr().out
        assert text.startswith("#compdef timm-decor") and "decor_resnet18" in text

    def test_without_shtab(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        from timm_decor.errors import UserError

        monkeypatch.setattr(completion, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=r"needs shtab: pip install 'timm-decor\[completion\]'"):
            completion.main(["bash"], "timm-decor completion")
