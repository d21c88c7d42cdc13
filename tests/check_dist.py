"""Build the wheel and the source distribution, and check them as a stranger gets them: python tests/check_dist.py

`make dist`. What passes lies in dist/ afterwards; where something fails, nothing does. The first failure is one line,
exit code 1, and the whole output of the command that failed is in output/check_dist.log.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

import readme_commands
import tutorial

ROOT = Path(__file__).resolve().parents[1]
DIST, LOG = ROOT / "dist", ROOT / "output" / "check_dist.log"
UV = (sys.executable, "-m", "uv")
PYPI_LIMIT = 100 * 10**6  # bytes a file, unless PyPI was asked for more
WHEEL_LIMIT = 60 * 2**20  # bytes: all who install it fetch it

# Run by the fresh environment's Python, away from the source tree.
PROBE = """
import importlib.metadata, json, sys
import timm, torch
import timm_decor
import timm_decor.completion, timm_decor.inference.export, timm_decor.inference.predict, timm_decor.publishing.publish
import timm_decor.training.run, timm_decor.training.validation, timm_decor.training.seeing.report

model = timm.create_model("decor_resnet18", num_classes=4)
optimizer = timm.optim.create_optimizer_v2(model, opt="sgd", lr=0.1, momentum=0.9)
handle = timm_decor.attach(model, optimizer, timm_decor.DecorConfig(every=1))
before = model.conv1.weight.detach().clone()
loss = torch.nn.functional.cross_entropy(model(torch.randn(4, 3, 64, 64)), torch.arange(4))
loss.backward()
optimizer.step()
rows = handle.report().rows
own = [name for name in timm.list_pretrained("decor_*") if timm.models.get_pretrained_cfg(name).file]
for name in own:
    timm.create_model(name, pretrained=True)
plain = timm.create_model("resnet18", num_classes=4)
plain.load_state_dict(model.state_dict(), strict=True)
print(json.dumps({
    "file": timm_decor.__file__,
    "prefix": sys.prefix,
    "versions": [importlib.metadata.version("timm-decor"), timm_decor.__version__],
    "loss": loss.item(),
    "moved": not torch.equal(before, model.conv1.weight),
    "finite": all(bool(p.isfinite().all()) for p in model.parameters()),
    "layers": len(rows),
    "refreshed": sum(row.refreshes for row in rows),
    "staged": sorted(own),
    "torch": torch.__version__,
    "timm": timm.__version__,
}))
"""


class Failure(Exception):
    """What is wrong with the distributions, in one line."""


def run(what: str, *command: str | Path, cwd: Path) -> str:
    """stdout of a command that must succeed; the source tree is not on its path."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}  # what is checked needs neither
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        output = done.stdout + done.stderr
        fail(f"{what}: {reason(output, done.returncode)}", output)
    return done.stdout


def fail(message: str, output: str) -> NoReturn:
    """Keep a command's whole output, and say where."""
    LOG.parent.mkdir(exist_ok=True)
    LOG.write_text(output, encoding="utf-8")
    raise Failure(f"{message} (all of it: {LOG.relative_to(ROOT)})")


def reason(output: str, code: int) -> str:
    """The line of a failed command's output that says most: its last exception, else its last error, else its last."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or [f"exit code {code}"]
    exceptions = [line for line in lines if re.match(r"[\w.]*(Error|Exception): ", line)]
    errors = [line for line in lines if line.lower().startswith("error: ")]
    return (exceptions or errors or lines)[-1]


def require(holds: bool, message: str) -> None:
    if not holds:
        raise Failure(message)


def say(what: str, found: str) -> None:
    print(f"{what:10} {found}", flush=True)


def named(names: Iterable[str]) -> str:
    """The first few of some names."""
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def build(kind: str, source: Path, out: Path) -> Path:
    run(f"building the {kind} of {source.name}", *UV, "build", f"--{kind}", "--out-dir", out, source, cwd=out.parent)
    return next(out.glob("*.whl" if kind == "wheel" else "*.tar.gz"))


def left_out() -> set[str]:
    """The files of the checkout that pyproject.toml keeps out of both distributions."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    names = re.findall(r'^    "(hub/staged/.+)",$', text, re.MULTILINE)  # Python 3.10 has no tomllib
    return {path.relative_to(ROOT).as_posix() for name in names for path in ROOT.glob(name)}


def wheel_files(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def tracked() -> set[str] | None:
    """What git has of the checkout, as far as it is there; None in an unpacked source distribution."""
    if not (ROOT / ".git").exists():
        return None
    return {name for name in run("git ls-files", "git", "ls-files", cwd=ROOT).splitlines() if (ROOT / name).is_file()}


def check_source(unpacked: Path) -> str:
    """The source distribution is what is in git, but for .ci and the weights that are fetched."""
    found = {file.relative_to(unpacked).as_posix() for file in unpacked.rglob("*") if file.is_file()} - {"PKG-INFO"}
    committed = tracked()
    if committed is None:
        return f"{len(found)} files (no git here to compare them with)"
    wanted = {name for name in committed if not name.startswith(".ci/")} - left_out()
    require(wanted <= found, f"the sdist lacks {named(wanted - found)}: pyproject.toml, [tool.hatch...sdist]")
    require(found <= wanted, f"the sdist has what is not in git: {named(found - wanted)}: commit, ignore or remove it")
    return f"{len(found)} files, those in git but for {len(left_out())} of weights that are fetched"


def check_commands(unpacked: Path, python: Path, work: Path) -> str:
    """In the unpacked source distribution train.py trains, and hub.publish writes the repository of what came out."""
    words = "--model decor_resnet10t --img-size 32 --train-split train[:64] --val-split test[:32] -b 32 -j 0 --epochs 1"
    output = work / "output"
    run(
        "train.py of the sdist",
        python,
        "train.py",
        *words.split(),
        "--output",
        output,
        "--experiment",
        "run",
        cwd=unpacked,
    )
    publish = (python, "-m", "hub.publish", output / "run", "--repo-id", "me/model", "--dry-run", work / "repository")
    run("python -m hub.publish of the sdist", *publish, cwd=unpacked)
    written = {file.name for file in (work / "repository").rglob("*")}
    missing = {"README.md", "config.json", "model.safetensors"} - written
    require(not missing, f"python -m hub.publish of the sdist wrote no {named(missing)}")
    return "train.py trains in the unpacked sdist, python -m hub.publish --dry-run writes its repository"


def check_wheel(wheel: Path, unpacked: Path) -> str:
    """The package and its license, typed, with what is staged for it and the demo; nothing else at the top level."""
    require(wheel.stat().st_size <= WHEEL_LIMIT, f"the wheel has more than {WHEEL_LIMIT // 2**20} MiB")
    files = wheel_files(wheel)
    info = "-".join(wheel.name.split("-")[:2]) + ".dist-info"
    places = {"timm_decor": "timm_decor", "hub/staged": "timm_decor/staged", "hub/space": "timm_decor/space"}
    wanted = {
        f"{target}/{file.relative_to(unpacked / source).as_posix()}"
        for source, target in places.items()
        for file in (unpacked / source).rglob("*")
        if file.is_file()
    } | {f"{info}/licenses/LICENSE", "timm_decor/py.typed", "timm_decor_door.py"}
    have = {name for name in files if not name.startswith(f"{info}/") or "licenses" in name}
    require(wanted <= have, f"the wheel lacks {named(wanted - have)}")
    require(have <= wanted, f"the wheel has what is not of the package: {named(have - wanted)}")
    return f"{len(files)} files, typed, licensed, {sum('/staged/' in name for name in files)} of staged weights"


def check_rebuilt(wheel: Path, rebuilt: Path) -> str:
    """The source distribution builds the same wheel as the checkout."""
    first, second = wheel_files(wheel), wheel_files(rebuilt)
    differing = {name for name in first.keys() | second.keys() if first.get(name) != second.get(name)}
    require(not differing, f"the wheel built from the sdist differs in {named(differing)}")
    return "the wheel built from the sdist has the same files, byte by byte"


def check_installed(wheel: Path, unpacked: Path, work: Path) -> tuple[str, Path]:
    """Installed by itself, the wheel trains; returns that environment's Python as well."""
    venv = work / "venv"
    run("creating an environment", *UV, "venv", "--python", sys.executable, venv, cwd=work)
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    run("installing the wheel", *UV, "pip", "install", "--python", python, wheel, cwd=work)
    said = run("timm-decor of the wheel", python.with_name("timm-decor"), "--help", cwd=work)
    require("publish" in said, "timm-decor --help of the installed wheel names no publish")
    run("its dependencies", *UV, "pip", "check", "--python", python, cwd=work)
    seen = json.loads(run("a training step with the installed wheel", python, "-c", PROBE, cwd=work).splitlines()[-1])
    require(Path(seen["file"]).is_relative_to(seen["prefix"]), f"timm_decor was imported from {seen['file']}")
    version = wheel.name.split("-")[1]
    require(set(seen["versions"]) == {version}, f"versions differ: wheel {version}, installed {seen['versions']}")
    require(seen["moved"] and seen["finite"], "the training step left the weights as they were, or not finite")
    require(
        seen["layers"] == seen["refreshed"] > 0,
        f"R was refreshed in {seen['refreshed']} of decor_resnet18's {seen['layers']} layers",
    )
    configs = [
        json.loads(file.read_text(encoding="utf-8"))
        for file in unpacked.glob("hub/staged/*/config.json")
        if file.with_name("model.safetensors").is_file()
    ]
    staged = sorted(f"decor_{config['architecture']}.{config['pretrained_cfg']['tag']}" for config in configs)
    require(
        seen["staged"] == staged,
        f"hub/staged has {named(staged)} for the wheel, the installed one {named(seen['staged'])}",
    )
    return f"decor_resnet18 trains, torch {seen['torch']}, timm {seen['timm']}, {len(staged)} staged weights", python


def check_tutorial(python: Path, work: Path) -> str:
    """What docs/tutorial.md tells to type works away from the checkout, and prints what it says."""
    (folder := work / "tutorial").mkdir()
    programs = {"python": python, "timm-decor": python.with_name("timm-decor")}
    done = []
    for step in tutorial.steps():
        program, *words = step.words
        what = f"the tutorial's {program}" if step.language == "python" else f"the tutorial's {program} {words[0]}"
        printed = run(what, programs[program], *words, cwd=folder)
        if missing := tutorial.difference(step, printed):
            fail(f"{what} does not print what the page says: {missing}", printed)
        done.append(words[0] if step.language == "sh" else program)
    return f"{', '.join(done)}: as docs/tutorial.md says"


def check_readme(python: Path, work: Path) -> str:
    """README's ten lines and its block of subcommands, as they stand there but for words that make them quick."""
    folder = work / "readme"
    readme_commands.make_places(folder)
    (code,) = readme_commands.python_blocks()
    loader = "import torch; loader = [(torch.randn(4, 3, 64, 64), torch.arange(4))] * 2"
    said = run("README's ten lines", python, "-c", f"{loader}\n{code}", cwd=folder)
    require("DecorHandle of SGD" in said, "README's print(handle) said nothing")
    commands = readme_commands.of_the_door()
    for command in commands:
        run(command, python.with_name("timm-decor"), *readme_commands.shortened(command), cwd=folder)
    for made in ("resnet18.pth", "output/RUN/report.html", "staged/model.safetensors"):
        require((folder / made).is_file(), f"README's lines left no {made}")
    return f"README's ten lines train, and its {len(commands)} subcommands run"


def check(work: Path) -> list[Path]:
    """Every check, a line each; returns the checked files."""
    built = work / "dist"
    sdist, wheel = build("sdist", ROOT, built), build("wheel", ROOT, built)
    with tarfile.open(sdist) as archive:
        archive.extractall(work / "sdist", filter="data")
    (unpacked,) = (work / "sdist").iterdir()
    say("sdist", check_source(unpacked))
    say("wheel", check_wheel(wheel, unpacked))
    say("rebuilt", check_rebuilt(wheel, build("wheel", sdist, work / "rebuilt")))
    run("twine check", *UV, "tool", "run", "twine", "check", "--strict", sdist, wheel, cwd=work)
    say("twine", "metadata and README as PyPI wants them")
    installed, python = check_installed(wheel, unpacked, work)
    say("installed", installed)
    say("commands", check_commands(unpacked, python, work))
    extra = f"timm-decor[onnx] @ {wheel.as_uri()}"
    run("installing the wheel's extra", *UV, "pip", "install", "--python", python, extra, cwd=work)
    say("tutorial", check_tutorial(python, work))
    say("readme", check_readme(python, work))
    for file in (sdist, wheel):
        size = file.stat().st_size
        require(size <= PYPI_LIMIT, f"{file.name} has {size / 10**6:.0f} MB, PyPI takes {PYPI_LIMIT // 10**6}")
    return [sdist, wheel]


def main() -> int:
    for stale in DIST.glob("timm_decor-*"):
        stale.unlink()
    # outside the checkout, so that nothing is imported from it by accident
    with tempfile.TemporaryDirectory(prefix="timm_decor_dist_") as work:
        try:
            files = check(Path(work))
        except Failure as failure:
            print(f"check_dist.py: error: {failure}", file=sys.stderr)
            return 1
        DIST.mkdir(exist_ok=True)
        for file in files:
            target = Path(shutil.copy(file, DIST))
            print(f"dist/{target.name}  {target.stat().st_size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
