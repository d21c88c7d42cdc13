"""The benchmark scripts run and write what they promise; what they measure is for a quiet machine."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import readme_tables
import step_cost
import torch
import zoo_study
from legends import legends
from PIL import Image
from torch import nn

import timm_decor
from study import pictures, sensitivity
from study.arm import PERIOD_MORE, Arm, Case, Options, decorrelated_block
from study.memory import PeakMemory, alive, storage_bytes
from study.results import Results
from study.rows import Rows
from study.stages import read_table
from study.verdict import Measured
from timm_decor import DecorConfig
from timm_decor.engine import handle
from timm_decor.engine.flight import StepInFlight
from timm_decor.errors import UserError
from timm_decor.models import FAMILIES

ROOT = Path(__file__).resolve().parents[1]


# What step_cost.py calls of the authors' package; this one leaves the model as it is and counts its updates.
PEER = {
    "decorrelation/decorrelation.py": """
updates = []
def decor_modules(model): return [m for m in model.modules() if type(m).__name__ == "Conv2d"]
def decor_update(modules): updates.append(len(modules))
""",
    "experiments/experiments.py": """
from decorbp.decorrelation.decorrelation import *
def bp2decor(model, decor_lr, kappa, downsample_perc, method): return model
""",
}


def test_rows_say_how_they_were_made_and_are_of_one_configuration(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "file.json", 1)
    rows.add({"arm": "decorrelated", "seed": 0, "config": DecorConfig().to_dict()})
    rows.add({"arm": "older", "seed": 0})
    assert all(row["command"].startswith("python benchmarks/") and "commit" in row for row in rows.rows)
    assert rows.find({"arm": "decorrelated"}, DecorConfig()) == rows.rows[0]
    assert rows.find({"arm": "decorrelated", "seed": 1}, DecorConfig()) is None
    with pytest.raises(UserError, match="of another configuration"):
        rows.find({"arm": "decorrelated"}, DecorConfig(damping=3.0))
    assert rows.find({"arm": "older"}, DecorConfig(damping=3.0)) == rows.rows[1], "nobody knows"


def test_step_cost(tmp_path: Path) -> None:
    """Every combination is measured once, with the peer among the arms; a rerun measures only what is new."""
    for name, text in PEER.items():
        file = tmp_path / "peer" / name
        file.parent.mkdir(parents=True)
        (file.parent / "__init__.py").touch()
        file.write_text(text)
    out = tmp_path / "step_cost.json"
    command = ["--smoke", "--model", "resnet10t", "--json", str(out), "--decor-structure", "space"]
    command += ["--peer-path", str(tmp_path / "peer")]
    step_cost.main(command)
    first = json.loads(out.read_text(encoding="utf-8"))["results"]
    step_cost.main([*command, "--opt", "sgd", "adamw"])
    record = json.loads(out.read_text(encoding="utf-8"))
    assert record["config"]["structure"] == "space"
    assert [result["case"]["opt"] for result in record["results"]] == ["sgd", "adamw"]
    assert record["results"][0] == first[0]
    for result in record["results"]:
        assert len(result["blocks"]) == 2
        kinds = ("plain", "ordinary", "refresh", "measuring", "amortised", "peer")
        assert all(block[kind] > 0 for block in result["blocks"] for kind in kinds)
        assert result["held_bytes"]["decorrelated"] > result["held_bytes"]["plain"] > 0
        assert result["peer"].startswith("decorrelates 14 Conv2d")
    # of the second command; a block has one step that is timed and one that is not, and two come before all blocks
    assert sys.modules["decorbp.decorrelation.decorrelation"].updates == [14] * (2 + 2 * 2)
    assert str(tmp_path) not in out.read_text(encoding="utf-8")
    assert pictures.stored_fingerprint(out.with_suffix(".png")) == pictures.fingerprint(pictures.step_cost_data(record))
    with pytest.raises(UserError, match="was measured with another config"):
        step_cost.main([*command, "--decor-every", "7"])
    del record["results"][0]["ratio"]["measuring"]
    out.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(UserError, match="is of before the step behind a refresh was timed"):
        step_cost.main(command)
    for words, line in (
        (["--decor-warmup", "3"], "^--decor-warmup was removed: "),
        (["--decor-every", "0"], "every=0"),
    ):
        with pytest.raises(UserError, match=line):
            step_cost.main(["--smoke", *words])
    with pytest.raises(UserError, match="no checkout of artcogsys/decorbp"):
        step_cost.main(["--smoke", "--peer-path", str(tmp_path)])


def test_a_block_times_each_kind_of_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """In training one step in twenty measures how long steps are: it costs more, and is not left out."""
    kinds: list[str] = []

    class Spy(StepInFlight):
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **more)
            kinds.append("measuring" if self._measures else "ordinary")

        def refresh(self, *args: Any, **more: Any) -> Any:
            kinds[-1] = "refresh"
            return super().refresh(*args, **more)

    monkeypatch.setattr(handle, "StepInFlight", Spy)
    case = Case("test_resnet", 32, 4, "sgd", "float32", compile=False, channels_last=False)
    arm = Arm(case, Options("cpu", num_classes=10, lr=1e-3, threads=None), {"every": 2 + PERIOD_MORE})
    arm.steps(1)
    timed = []

    def steps(count: int) -> float:
        arm.steps(count)
        timed.append(kinds[-count:])
        return {"ordinary": 1.0, "refresh": 5.0, "measuring": 3.0}[kinds[-1]] * count

    blocks = [decorrelated_block(steps, 2, every=10) for _ in range(2)]
    assert timed == [["ordinary"], ["ordinary"] * 2, ["refresh"], ["measuring"]] * 2
    assert blocks == [{"ordinary": 1.0, "refresh": 5.0, "measuring": 3.0, "amortised": 1.6}] * 2


def test_pages_are_what_the_results_say(tmp_path: Path) -> None:
    """`make readme` has been run since the results changed; and a changed figure would be seen here."""
    readme_tables.main(["--check"])
    page = tmp_path / "README.md"
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    page.write_text(re.sub(r"\| (\d+\.\d)\d \|", r"| \g<1>x |", text, count=1), encoding="utf-8")
    with pytest.raises(UserError, match="README.md; run `make readme`"):
        readme_tables.main(["--check", str(page)])
    readme_tables.main([str(page)])
    assert page.read_text(encoding="utf-8") == text
    page.write_text("<!-- results: time_to_accuracy/never.json -->\nx\n<!-- end of results -->", encoding="utf-8")
    readme_tables.main([str(page)])
    assert "Not measured yet" in page.read_text(encoding="utf-8")


def test_a_recipes_result_has_its_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As recipe_study.py writes it, in docs/measured.md and in README's first table."""
    rows = [
        {"opt": "sgd", "arm": arm, "lr": 0.1, "seed": 0, "epochs": epochs, "measured_on": "test", "top1": top1}
        for arm, scores in (("plain", (70.0, 80.0)), ("decorrelated", (75.0, 82.0)))
        for epochs, top1 in zip((5, 20), scores, strict=True)
    ]
    case = {"opt": "sgd", "img_size": 64, "batch_size": 128}
    steps = {"results": [{"case": case, "seconds": {"plain": 0.2}, "ratio": {"amortised": 1.2}}]}
    root, results = readme_tables.ROOT, tmp_path / "results"
    (results / "recipe").mkdir(parents=True)
    (results / "recipe" / "cifar10_64px_resnet18.json").write_text(json.dumps({"runs": rows}))
    (results / "steps.json").write_text(json.dumps(steps))
    monkeypatch.setattr(readme_tables, "RESULTS", results)
    monkeypatch.setattr(readme_tables, "RECIPE_STEPS", results / "steps.json")
    row = "| ResNet-18, CIFAR-10 at 64 px, 20 epochs | sgd | 80.0 % | 82.0 % | - | 1.2x | - |"
    assert row in readme_tables.block("headline", draw=False)
    monkeypatch.setattr(readme_tables, "ROOT", tmp_path)
    (tmp_path / "recipes").symlink_to(root / "recipes")
    text = readme_tables.block("recipe/cifar10_64px_resnet18.json", draw=True)
    assert "| sgd, at plain's rate at 0.1 | 75.0 (75.0) | 82.0 (82.0) |" in text
    mark = "<!-- results: recipe/cifar10_64px_resnet18.json -->\n<!-- end of results -->"
    assert not readme_tables.stale_pictures(mark)
    rows[0]["top1"] = 71.0
    (results / "recipe" / "cifar10_64px_resnet18.json").write_text(json.dumps({"runs": rows}))
    assert len(readme_tables.stale_pictures(mark)) == 1


def test_legends_of_pictures_cover_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = ROOT / "benchmarks" / "results" / "time_to_accuracy" / "cpu_cifar10.json"
    tune = Results.read(study.with_name("cpu_cifar10_tune.json"))
    curves = sensitivity.curves(tune.records, tune.settings["steps"])
    cost = json.loads((study.parents[1] / "step_cost" / "cpu.json").read_text(encoding="utf-8"))
    targets = {row.against for row in read_table(study) if not row.is_target}
    tuned = {opt for opt, arm in curves if arm != "plain"}
    for panels, draw in (
        (targets, lambda: pictures.time_to_accuracy_picture(read_table(study), tmp_path / "t.png", "a title")),
        (tuned, lambda: pictures.lr_sensitivity_picture(curves, tmp_path / "l.png")),
        ([""], lambda: pictures.step_cost_picture(cost, tmp_path / "s.png")),
    ):
        assert legends(monkeypatch, draw) == len(panels) > 0


def test_zoo_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "train.parquet", np.random.default_rng(0), 320)
    out = tmp_path / "out"
    words = "--family mobilenetv3 --epochs 2 --train-images 256 --held-out 60 --seeds 0 --every-layer"
    words += f" --data-dir {tmp_path} --out {out} --leave-plain blocks.*,conv_* --arm"
    command = [*words.split(), 'damping 8={"damping": 8}']
    zoo_study.main(command)
    said = capsys.readouterr().out
    text = (out / "mobilenetv3.json").read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    runs = json.loads(text)["runs"]
    best = next(run["lr"] for run in runs if run["arm"] == "decorrelated")
    arms = [run for run in runs if run["lr"] == best]
    names = ["plain", "decorrelated", "damping 8", "blocks.*,conv_* plain", "every layer"]
    assert sorted(run["arm"] for run in arms) == sorted(names)
    assert len({run["loss"] for run in arms}) == 5  # each arm trains other layers decorrelated, or otherwise
    assert all(name in said for name in names)
    zoo_study.main(command)
    assert capsys.readouterr() == (said, "")  # what is there is not trained again


STUDIES = {
    "muon": [
        *("--epochs", "4", "--plain", "muon:0.05", "--variant", "base", "decay x2+without nesterov"),
        *("damping to 8", "until half", "whitened stem"),
    ],
    "knob": ["--opt", "sgd", "--epochs", "1", "--knob", "default", "damping=8.0", "sample=1.0,rank=4"],
}


@pytest.mark.parametrize("name", STUDIES)
def test_studies_of_single_trainings(name: str, tmp_path: Path) -> None:
    """On generated images; each variant trains in its own way."""
    file = tmp_path / "runs.json"
    command = [sys.executable, f"benchmarks/{name}_study.py", "--preset", "smoke", "--json", str(file), *STUDIES[name]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    runs = json.loads(file.read_text(encoding="utf-8"))["runs"]
    assert len({run["variant"] for run in runs}) == len(runs) == {"muon": 6, "knob": 3}[name]
    assert len({(*run["loss"], run["top1"]) for run in runs}) == len(runs)


@pytest.mark.parametrize(
    ("plain", "decorrelated", "verdict"),
    [
        ((50.0, 51.0, 52.0), (54.0, 55.0, 53.9), "gains"),
        ((50.0, 51.0, 52.0), (52.0, 53.0, 52.5), "level"),
        ((54.0, 55.0, 53.9), (50.0, 51.0, 52.0), "loses"),
        ((50.0,), (60.0,), "one seed"),
    ],
)
def test_a_gain_is_one_where_seeds_differ_less(plain: tuple, decorrelated: tuple, verdict: str, tmp_path: Path) -> None:
    rows = [{"arm": "plain", "lr": 9.0, "seed": 0, "setting": {}, "top1": 99.0}]  # at another rate: not counted
    for arm, scores in (("plain", plain), ("decorrelated", decorrelated)):
        rows += [{"arm": arm, "lr": 0.1, "seed": i, "setting": {}, "top1": top1} for i, top1 in enumerate(scores)]
    (tmp_path / "f.json").write_text(json.dumps({"runs": rows}))
    found = Measured.read(tmp_path / "f.json")
    assert found is not None and found.verdict == verdict and found.lr == 0.1


def test_families_say_what_was_measured() -> None:
    """The zoo's page has it from the package, which does not have the results."""
    for family in FAMILIES:
        file = ROOT / "benchmarks" / "results" / "zoo" / f"{family.module}.json"
        found = Measured.read(file) if file.is_file() else None
        assert family.measured == (found.words(family.example) if found else "not measured"), family.module


def write_images(path: Path, rng: np.random.Generator, count: int) -> None:
    """Random 32 x 32 images of two classes, as parquet."""
    rows = []
    for image in rng.integers(0, 255, (count, 32, 32, 3), dtype=np.uint8):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "png")
        rows.append({"bytes": file.getvalue(), "path": None})
    pq.write_table(pa.table({"image": rows, "label": [i % 2 for i in range(count)]}), path)


class TestPeakMemory:
    """What step_cost reports of memory, on steps whose peak is known."""

    @staticmethod
    def peak(step: Callable[[], object]) -> int:
        kept = torch.zeros(1000)
        with PeakMemory([kept, kept.view(10, 100)]) as meter:  # one storage
            step()
        assert meter.bytes == 4000, "what was dropped is forgotten"
        return meter.peak_bytes

    def test_of_temporaries_one_after_the_other_and_at_once(self) -> None:
        def one_after_the_other() -> None:
            for _ in range(3):
                torch.zeros(500)

        def at_once() -> None:
            first, second = torch.zeros(500), torch.zeros(250)
            first.view(2, 250).add_(second)

        assert self.peak(one_after_the_other) == 4000 + 2000
        assert self.peak(at_once) == 4000 + 2000 + 1000

    def test_of_optimizers(self) -> None:
        """SGD without momentum makes nothing; decorrelated, it holds another gradient and the weights of before."""
        ends = []
        for decor in (False, True):
            model = nn.Sequential(nn.Linear(64, 64, bias=False))
            if decor:
                timm_decor.decorrelate(model, DecorConfig(every=100))
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            if decor:
                timm_decor.attach(model, optimizer)
            for _ in range(2):
                model(torch.randn(8, 64)).sum().backward()
                held = alive(model, optimizer)
                with PeakMemory(held) as meter:
                    optimizer.step()
            ends.append((storage_bytes(held), meter.peak_bytes))
        size = 4 * 64 * 64
        assert ends[0] == (2 * size, 2 * size)
        assert ends[1][1] - ends[1][0] >= 2 * size


def test_another_checkouts_engine_takes_its_turns(tmp_path: Path) -> None:
    """An engine against itself: equal memory, and the knobs that were asked for."""
    out = tmp_path / "cost.json"
    words = ["--smoke", "--model", "test_resnet", "--baseline-path", str(ROOT), "--json", str(out)]
    step_cost.main([*words, "--decor-rank", "8"])
    record = json.loads(out.read_text(encoding="utf-8"))
    (result,) = record["results"]
    assert record["baseline"] == record["commit"]
    assert result["ratio"]["baseline"] > 0 and result["seconds"]["baseline"] > 0
    assert result["baseline_config"] == record["config"] == {**DecorConfig().to_dict(), "rank": 8}
    for kind in ("held_bytes", "peak_bytes", "refresh_peak_bytes"):
        assert result[kind]["baseline"] == result[kind]["decorrelated"] > result[kind]["plain"]
    assert pictures.step_cost_data(record)[-1] == [[result["held_bytes"], result["peak_bytes"]]]
    assert pictures.stored_fingerprint(out.with_suffix(".png")) == pictures.fingerprint(pictures.step_cost_data(record))
    with pytest.raises(UserError, match="--baseline-path .* has no timm_decor"):
        step_cost.main(["--smoke", "--model", "test_resnet", "--baseline-path", str(tmp_path)])


def test_another_version_gets_the_knobs_it_knows(tmp_path: Path) -> None:
    """Of another version's package nothing is needed but its front door; what it prints does not disturb."""
    package = tmp_path / "timm_decor"
    package.mkdir()
    (package / "__init__.py").write_text(
        """
import dataclasses
@dataclasses.dataclass
class DecorConfig:
    every: int = 3
    rank: int = 5
    old: bool = True
    to_dict = dataclasses.asdict
print("hello")
def decorrelate(model, config): pass
def attach(model, optimizer):
    state = {"timm_decor": {"layers": {"a": {"refreshes": 4, "skips": 0}}}}
    optimizer.register_state_dict_post_hook(lambda optimizer, saved: {**saved, **state})
""",
        encoding="utf-8",
    )
    out = tmp_path / "cost.json"
    words = ["--smoke", "--model", "test_resnet", "--baseline-path", str(tmp_path), "--json", str(out)]
    step_cost.main([*words, "--decor-rank", str(DecorConfig().rank), "--decor-max-rows", "9"])
    (result,) = json.loads(out.read_text(encoding="utf-8"))["results"]
    assert result["baseline_config"] == {"every": DecorConfig().every, "rank": DecorConfig().rank, "old": True}
    assert result["held_bytes"]["baseline"] == result["held_bytes"]["plain"]
    assert result["peak_bytes"]["baseline"] == result["peak_bytes"]["plain"]


@pytest.mark.parametrize("words", [[], ["--decor-every", "20", "--no-decor-center"]])
def test_asked_knobs(words: list[str]) -> None:
    """Those that are given, also at their defaults."""
    assert step_cost.asked_knobs(words) == ({"every": 20, "center": False} if words else {})


def test_bytes_of_memory_that_is_shared() -> None:
    whole = torch.zeros(10, 10)
    assert storage_bytes({"a": whole, "b": [whole[0], whole.view(100), torch.zeros(5)], "c": "text"}) == 400 + 20


def test_the_peak_is_that_of_the_step_that_needs_most() -> None:
    """A step that looks at the output errors is an ordinary one, and needs more than its neighbours."""
    options = Options("cpu", num_classes=10, lr=1e-3, threads=None)
    case = Case("test_resnet", 32, 4, "sgd", "float32", compile=False, channels_last=False)
    looking, not_looking = (Arm(case, options, {"every": 6, "output_every": every}).peak_bytes for every in (4, 100))
    assert looking > not_looking
