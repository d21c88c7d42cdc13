"""python -m timm_decor.run SCRIPT [ARGS ...]: `python SCRIPT ARGS ...` with decorrelated steps (see hook.py)."""

from __future__ import annotations

import importlib
import importlib.util
import io
import os
import sys
from collections.abc import Callable
from functools import partial
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any

from timm_decor.errors import UserError

USAGE = "usage: python -m timm_decor.run SCRIPT [ARGS ...], or -m MODULE [ARGS ...] in the place of SCRIPT"


def main(argv: list[str]) -> int:
    """Switch decorrelation on and run a script or a module as `python` would; what that raises is not touched.

    Args:
        argv: the script, or `-m` and the module, and their arguments.

    Returns:
        0 when it returned, 2 and one line on stderr where there is nothing to run or a variable is refused.
    """
    if argv[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    try:
        run = _found(argv)
        _switch_on()
    except UserError as error:
        print(f"timm_decor.run: error: {error}", file=sys.stderr)
        return 2
    run()
    return 0


def _found(argv: list[str]) -> Callable[[], object]:
    """What runs the script or module that the arguments name."""
    if not argv:
        raise UserError(f"nothing to run; {USAGE}")
    if argv[0] == "-m":
        if len(argv) == 1:
            raise UserError(f"-m needs a module; {USAGE}")
        return partial(_run_module, _module_spec(argv[1]), argv[2:])
    if argv[0].startswith("-"):
        raise UserError(f"unknown option {argv[0]!r}; {USAGE}")
    if not os.path.isfile(argv[0]):
        raise UserError(f"{argv[0]!r} is not a file; {USAGE}")
    return partial(_run_script, argv)


def _switch_on() -> None:
    try:
        importlib.import_module("timm_decor.hook")
    except ValueError as error:
        raise UserError(str(error)) from error


def _module_spec(name: str) -> ModuleSpec:
    """What `python -m` runs: the module, or a package's `__main__`."""
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            name += ".__main__"
            spec = importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):  # what its package imports is not there
            raise
        spec = None
    except ValueError:  # a relative name
        spec = None
    if spec is None or spec.origin is None or not hasattr(spec.loader, "get_code"):
        raise UserError(f"no Python module {name!r}")
    return spec


def _run_module(spec: ModuleSpec, args: list[str]) -> None:
    assert spec.origin is not None
    sys.argv = [spec.origin, *args]
    _run(spec.loader.get_code(spec.name), spec.origin, spec.loader, spec)  # type: ignore[union-attr]


def _run_script(argv: list[str]) -> None:
    path = os.path.abspath(argv[0])
    sys.argv = argv
    if not getattr(sys.flags, "safe_path", False):  # Python 3.11's -P
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    with io.open_code(path) as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)  # not this file's __future__ imports
    _run(code, path, SourceFileLoader("__main__", path), None)


def _run(code: CodeType, path: str, loader: Any, spec: ModuleSpec | None) -> None:
    """Run code as `__main__`. runpy takes its `__main__` away at the end, and atexit functions and pickles need it."""
    module = ModuleType("__main__")
    module.__file__, module.__loader__, module.__spec__ = path, loader, spec
    module.__package__ = spec.parent if spec is not None else None
    sys.modules["__main__"] = module
    exec(code, vars(module))
