"""How the command lines begin: the arguments first, then what takes seconds to import.

A module beside the package: whatever is imported from timm_decor runs its `__init__`, which imports torch and timm.
"""

from __future__ import annotations

import importlib.util
import io
import sys
from collections.abc import Callable


def main() -> int:
    """The command `timm-decor`.

    Returns:
        The exit code.
    """
    load = _deferred()
    from timm_decor import cli

    return cli.main(sys.argv[1:], load)


def enter(prog: str, name: str) -> int:
    """One of its subcommands by itself, as train.py and validate.py are.

    Args:
        prog: the script, for messages.
        name: of the subcommand.

    Returns:
        The exit code.
    """
    load = _deferred()
    from timm_decor import cli

    return cli.run(cli.COMMANDS[name], prog, sys.argv[1:], load)


def _deferred() -> Callable[[], None]:
    """Put the package where imports find it, without what its `__init__` imports.

    `--help` and arguments that are refused need neither torch nor timm, and the parsers' own imports are light. The
    modules that they bring in stay as they are when the package is loaded.

    Returns:
        What loads it: to be called before anything else of it is used.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # in a pipe as well: a line that is hours late helps nobody
    spec = importlib.util.find_spec("timm_decor")
    assert spec is not None and spec.loader is not None
    package, load = importlib.util.module_from_spec(spec), spec.loader.exec_module
    sys.modules["timm_decor"] = package
    return lambda: load(package)
