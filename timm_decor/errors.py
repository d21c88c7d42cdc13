"""The one exception for what the person at the keyboard can put right, and how it reaches them."""

from __future__ import annotations

import os
import re
import select
import sys
from collections.abc import Callable

from timm_decor.redact import without_secrets
from timm_decor.text import printable

_SIGPIPE = 13  # by number: Windows has no such signal


class UserError(Exception):
    """Bad input: one line that names the thing, the value and what would work. The command line exits with code 2."""


class Stopped(Exception):
    """A signal stopped the run, whose state is saved. The command line exits with 128 + the signal's number.

    Args:
        signum: the signal.
        message: one line for the person who sent it; empty on all processes but one.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


def first_line(error: BaseException) -> str:
    """An exception's message cut to its first line; its type where it has no message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def load_failure(error: BaseException) -> str:
    """Why a file of weights did not load; a pickle that wanted to call something is told by what it wanted to call."""
    chain: BaseException | None = error
    while chain is not None:
        wanted = re.search(r"(?:GLOBAL|globals:|class) ([A-Za-z_]\w*(?:\.\w+)+)", str(chain))
        if wanted:
            return f"it would call {wanted[1]} as it loads, which is refused"
        chain = chain.__cause__
    return first_line(error).split(". ")[0]


def message(error: UserError) -> str:
    """The error's own line: names in it that came with somebody's files are printable, and it holds no secret.

    A DataLoader worker's exception is raised again in the main process with the worker's traceback as its message;
    the line that was written for the reader is then what stands behind the class name.
    """
    text = str(error).strip() or type(error).__name__
    if text.startswith("Caught "):
        text = re.split(rf"^\S*\b{UserError.__name__}: ", text, flags=re.MULTILINE)[-1]
    return printable(without_secrets(text))


def exit_code(prog: str, main: Callable[[list[str]], None], argv: list[str] | None = None) -> int:
    """Run a command line: 0 when it returned, 2 and one line on stderr for a `UserError`, 128 + n for signal n.

    Where nobody reads its output any more, as behind `| head`, it ends without a word, as SIGPIPE ends a program.
    """
    try:
        code = _exit_code(prog, main, argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not (hasattr(select, "poll") and _unread()):  # a socket's, or another file's
            raise
        return 128 + _SIGPIPE


def _exit_code(prog: str, main: Callable[[list[str]], None], argv: list[str] | None) -> int:
    try:
        main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"{prog}: error: {message(error)}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        if str(stopped):
            print(f"{prog}: {printable(str(stopped))}", file=sys.stderr)
        return 128 + stopped.signum
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    return 0


def _unread() -> bool:
    """Whether stdout or stderr goes to a pipe that nobody reads. From then on it goes nowhere, and fails no more."""
    found = False
    for stream in (sys.stdout, sys.stderr):
        try:
            descriptor = stream.fileno()
        except (OSError, ValueError):  # one that is no file
            continue
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        if any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0)):
            found = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)  # what is left is written when Python ends
    return found
