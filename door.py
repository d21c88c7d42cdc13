"""How train.py and validate.py begin: the command line first, then what takes seconds to import."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import io
import os
import sys
from pathlib import Path


def enter(prog: str, parser: str, main: str) -> int:
    """Parse the command line, say what is being loaded, and go on in the package.

    `--help` and arguments that are refused need neither torch nor timm, which timm_decor/__init__.py imports. So it
    runs after the parser, whose own imports are light; the modules that the parser has brought in stay as they are.

    Args:
        prog: the script, for messages.
        parser: the function of timm_decor/training/args.py that makes its parser.
        main: the module whose `main` takes the command line.

    Returns:
        The exit code.
    """
    spec = importlib.util.find_spec("timm_decor")
    assert spec is not None and spec.loader is not None
    package, load = importlib.util.module_from_spec(spec), spec.loader.exec_module
    sys.modules["timm_decor"] = package
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # in a pipe as well: a line that is hours late helps nobody
    from timm_decor.errors import exit_code
    from timm_decor.training import args

    def run(argv: list[str]) -> None:
        given = getattr(args, parser)().parse(argv)
        if os.environ.get("RANK", "0") == "0":  # the launcher's, of several processes
            print(f"{prog}: loading PyTorch, timm{_named(given)}", file=sys.stderr, flush=True)
        load(package)
        importlib.import_module(main).main(argv)

    return exit_code(prog, run)


def _named(given: argparse.Namespace) -> str:
    """What the command line says is to be loaded: `, a and b`. A recipe or a run to resume stands for all in it."""
    resumed = getattr(given, "resume", None)
    source = resumed if resumed != "auto" else None
    source = source or getattr(given, "config", None)
    if source:
        names = [Path(source).name]
    else:
        weights = getattr(given, "checkpoint", [])
        more = [f"{len(weights) - 1} more"] if len(weights) > 1 else []
        data = given.dataset or (Path(given.data_dir).name if given.data_dir else "digits")
        names = [*(Path(path).name for path in weights[:1]), *more, *([given.model] if given.model else []), data]
    return "".join(f", {name}" for name in names[:-1]) + f" and {names[-1]}"
