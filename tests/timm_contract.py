"""timm's own model tests, run over `decor_*` names: python tests/timm_contract.py [--models PATTERN ...]

Takes tests/test_models.py out of timm's source distribution of the installed version (all that is downloaded) and lets
it see the twins where it asks timm for models. A failure is a deviation only if the plain model passes the same test
here, so what fails is run again under the plain names. The result is a page of markdown (--page) and a JSON file.

This file is the pytest plugin of those runs as well.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import platform
import subprocess
import sys
import tarfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch

import timm_decor
from timm_decor.models import FAMILIES, PREFIX
from timm_decor.text import markdown_table

# What needs no network. Left out: test_model_inference, test_model_load_pretrained, test_model_features_pretrained
# (weights from the Hub), and the tests that are of one plain model by name.
TESTS = {
    "test_model_forward": "forward, and equal under gradient checkpointing",
    "test_model_backward": "backward: every parameter has a gradient",
    "test_model_default_cfgs": "default cfg: sizes, classifier, first convolution, headless forms; every tag",
    "test_model_default_cfgs_non_std": "the same for transformers and mixers",
    "test_model_forward_features": "features_only",
    "test_model_forward_intermediates_features": "features_only with feature_cls='getter'",
    "test_model_forward_intermediates": "forward_intermediates, and equal under gradient checkpointing",
    "test_model_forward_torchscript": "torch.jit.script",
    "test_model_forward_fx": "fx: traced forward",
    "test_model_backward_fx": "fx: traced backward",
    "test_model_forward_fx_torchscript": "fx, then torch.jit.script",
}

# Small members, of each kind of block; --models '*' takes them all.
MODELS = (
    *(family.example for family in FAMILIES),
    *("test_resnet", "resnet10t", "resnet26t", "resnet50d", "resnext50_32x4d", "ecaresnet26t", "seresnet50"),
    *("resnetblur18", "resnetaa34d", "resnetrs50", "vgg11"),
    *("regnetx_002", "regnetx_004_tv", "regnety_040", "regnetz_005", "densenet169", "densenetblur121d"),
    *("test_convnext", "convnext_femto_ols", "convnextv2_atto", "convnext_tiny_hnf"),
    *("mobilenetv3_large_075", "tf_mobilenetv3_small_minimal_100", "lcnet_050", "mobilenetv4_conv_small"),
    *("test_efficientnet", "tf_efficientnet_b0", "tf_efficientnet_b1", "tf_efficientnetv2_b0", "efficientnet_cc_b0_4e"),
    *("efficientnet_es", "efficientnet_em", "efficientnet_lite0", "tf_efficientnet_lite0", "tinynet_e"),
    *("mixnet_s", "tf_mixnet_s", "mobilenetv2_035", "mnasnet_small"),
    *("test_vit", "vit_small_patch32_224", "vit_xsmall_patch16_clip_224"),
    *("deit_tiny_distilled_patch16_224", "deit3_small_patch16_224"),
    *("mixer_s32_224", "mixer_b32_224", "gmlp_ti16_224", "resmlp_12_224"),
    *("swin_s3_tiny_224", "swin_small_patch4_window7_224"),
)

_PATTERNS = "TIMM_CONTRACT_MODELS"  # what the plugin reads: wildcards over plain names, as JSON
_NAMES = "TIMM_CONTRACT_NAMES"  # "decor" or "plain"
_REPORT = "TIMM_CONTRACT_REPORT"  # where the plugin writes outcomes


# --- the plugin -------------------------------------------------------------------------------------------------------


def pytest_configure(config: Any) -> None:
    if _PATTERNS not in os.environ:
        return
    patterns = json.loads(os.environ[_PATTERNS])
    prefix = PREFIX if os.environ[_NAMES] == "decor" else ""
    list_models = timm.list_models

    def chosen(*args: Any, **kwargs: Any) -> list[str]:
        names = list_models(*args, **kwargs)  # the tests' own filters are over plain names
        return [
            prefix + name
            for name in names
            if timm.is_model(PREFIX + name) and any(fnmatch.fnmatch(name.split(".")[0], p) for p in patterns)
        ]

    timm.list_models = chosen  # before test_models.py imports it
    timm.list_pretrained = lambda *args, **kwargs: []
    config.pluginmanager.register(_Outcomes(Path(os.environ[_REPORT])))


class _Outcomes:
    """Writes one JSON line a test: its function, its model, the outcome and the last line of what it raised."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        if os.environ.get("PYTEST_XDIST_WORKER"):
            return  # the controller writes
        function, _, case = report.nodeid.split("::")[-1].partition("[")
        model = case.rstrip("]").split("-", 1)[1]
        why = ""
        if report.outcome == "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            why = (crash.message if crash else str(report.longrepr)).strip().splitlines()[0]
        with self.path.open("a") as file:
            file.write(json.dumps({"test": function, "model": model, "outcome": report.outcome, "why": why}) + "\n")


# --- the command ------------------------------------------------------------------------------------------------------


def fetch_tests(folder: Path) -> Path:
    """timm's tests of the installed version, out of its source distribution.

    Raises:
        SystemExit: pip could not get it.
    """
    name = f"timm-{timm.__version__}"
    if not (folder / name / "tests").is_dir():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        # Without isolation pip reads the metadata with the pdm-backend at hand instead of downloading one.
        command += ["--no-binary", "timm", "--no-build-isolation", f"timm=={timm.__version__}", "--dest", str(folder)]
        if subprocess.run(command).returncode:
            raise SystemExit(f"pip could not download the source distribution of {name}")
        with tarfile.open(folder / f"{name}.tar.gz") as archive:
            members = [m for m in archive.getmembers() if m.name.startswith(f"{name}/tests/")]
            archive.extractall(folder, members, filter="data")
    return folder / name / "tests"


def run_tests(tests: Path, names: str, patterns: Sequence[str], report: Path, extra: Sequence[str]) -> list[Any]:
    """Run timm's tests over twins ("decor") or plain models; one record a test."""
    report.unlink(missing_ok=True)
    env = {
        **os.environ,
        _PATTERNS: json.dumps(list(patterns)),
        _NAMES: names,
        _REPORT: str(report),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(timm_decor.__file__).parents[1])]),
        "HF_HUB_OFFLINE": "1",
    }
    select = " or ".join(f"{name}[" for name in TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "timm_contract", "-p", "no:cacheprovider", "--tb=line"]
    command += [
        "-W",
        "ignore",
        "-c",
        os.devnull,
        f"--rootdir={tests}",
        "-k",
        select,
        str(tests / "test_models.py"),
        *extra,
    ]
    code = subprocess.run(command, env=env, cwd=tests.parent).returncode
    if code not in (0, 1):
        raise SystemExit(f"pytest ended with {code}")
    return [json.loads(line) for line in report.read_text().splitlines()]


def failed(records: list[Any]) -> set[tuple[str, str]]:
    """(test, plain model) of what failed."""
    return {(r["test"], r["model"].removeprefix(PREFIX)) for r in records if r["outcome"] == "failed"}


def page(twins: list[Any], plain_failures: set[tuple[str, str]]) -> str:
    """The result as markdown."""
    outcomes: dict[str, Counter[str]] = defaultdict(Counter)
    deviations, shared = [], []
    for record in twins:
        key = (record["test"], record["model"].removeprefix(PREFIX))
        outcome = record["outcome"]
        if outcome == "failed":
            outcome = "as plain" if key in plain_failures else "deviates"
            (shared if outcome == "as plain" else deviations).append((record["model"], record["test"], record["why"]))
        outcomes[record["test"]][outcome] += 1
    columns = ("passed", "skipped", "as plain", "deviates")
    rows = [(f"`{test}`", what, *(outcomes[test][column] for column in columns)) for test, what in TESTS.items()]
    total = sum((counter for counter in outcomes.values()), Counter())
    rows.append(("together", "", *(total[column] for column in columns)))
    models = sorted({record["model"].split(".")[0] for record in twins})
    text = [
        "# timm's tests over the twins\n",
        f"Made by `make timm-tests`: tests/test_models.py of timm {timm.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, over {len(models)} models. *Skipped* is timm's own rule (too large); "
        "*fails in plain timm too* means that the plain model fails the same test on the same machine.\n",
        markdown_table(("test", "what", "passed", "skipped", "fails in plain timm too", "deviates"), rows),
        "\n## Deviations\n",
        markdown_table(("model", "test", "why"), deviations) if deviations else "None.",
    ]
    if shared:
        text += ["\n## Failures that the plain model shares\n", markdown_table(("model", "test", "why"), shared)]
    text += [
        "\n## Not run\n",
        "`test_model_inference`, `test_model_load_pretrained` and `test_model_features_pretrained` download weights.\n",
        "## Models\n",
        ", ".join(f"`{model}`" for model in models),
    ]
    return "\n".join(text) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 1 where a twin deviates from its plain model."""
    parser = argparse.ArgumentParser(description="Run timm's model tests over the decorrelated twins.")
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="PATTERN", help="wildcards over plain names")
    parser.add_argument("--folder", type=Path, default=Path("output/timm_contract"), help="downloads and outcomes")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--workers", default="1", help="pytest-xdist's -n (default: 1)")
    args = parser.parse_args(argv)
    unknown = [p for p in args.models if not fnmatch.filter(timm.list_models("decor_*"), PREFIX + p)]
    if unknown:
        parser.error(f"no twin matches {', '.join(unknown)}; the twins: python -m timm_decor.list 'decor_*'")
    args.folder.mkdir(parents=True, exist_ok=True)
    folder = args.folder.resolve()
    tests = fetch_tests(folder)
    extra = ["-n", args.workers]
    twins = run_tests(tests, "decor", args.models, folder / "decor.jsonl", extra)
    failures = failed(twins)
    models = sorted({model.split(".")[0] for _, model in failures})
    plain = run_tests(tests, "plain", models, folder / "plain.jsonl", extra) if models else []
    text = page(twins, failed(plain))
    print(text)
    if args.page:
        args.page.write_text(text)
    return int(bool(failures - failed(plain)))


if __name__ == "__main__":
    sys.exit(main())
