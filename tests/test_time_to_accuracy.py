"""What the benchmarks share, and time_to_accuracy's protocol: its arithmetic, and the smoke preset from end to end."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import time_to_accuracy
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from study import protocol, stages, tables
from study.images import Batches, augmented, generate, load
from study.presets import PRESETS, Preset
from study.results import Results
from study.training import Record, Run, Spec, schedule, train_in_turns
from timm_decor import DecorConfig
from timm_decor.errors import UserError

SMOKE = PRESETS["smoke"]
BUDGETS = (0.25, 0.5, 0.75)
DECOR = DecorConfig(every=3).to_json()


def record(top1: float, **given: Any) -> Record:
    """A finished run."""
    values = {"opt": "sgd", "arm": "plain", "lr": 0.1, "steps": 100, "seed": 0, "group": "g", "seconds": 10.0} | given
    group, seconds = values.pop("group"), values.pop("seconds")
    config = None if values["arm"] == "plain" else DECOR
    spec = Spec(config=config, weight_decay=0.0, **values)
    return Record(spec, 10, group, "test", at=[spec.steps], top1=[top1], loss=[1.0], seconds=[seconds / 4] * 4)


def budgets_run(scores: dict[float, float], arm: str = "decorrelated", **given: Any) -> list[Record]:
    return [record(top1, arm=arm, steps=round(100 * budget), **given) for budget, top1 in scores.items()]


# -- the protocol's arithmetic


@given(st.integers(1, 12), st.integers(0, 12))
def test_search_finds_the_smallest_budget(count: int, first: int) -> None:
    """Bisection asks for few budgets and ends at the smallest that reaches, with the one below it tried and missed."""
    budgets = [float(i + 1) for i in range(count)]
    reached: dict[float, bool] = {}
    while (following := protocol.smallest_first(budgets, reached)[1]) is not None:
        assert following not in reached
        reached[following] = following > first
    found = protocol.smallest_first(budgets, reached)[0]
    assert found == (float(first + 1) if first < count else None)
    assert found is None or found == budgets[0] or reached[found - 1] is False
    assert len(reached) <= 2 + count.bit_length()


def test_grid_grows_at_its_edge() -> None:
    assert protocol.beyond([0.1, 0.2, 0.4], 0.2) is None
    assert protocol.beyond([0.1, 0.2, 0.4], 0.4) == 0.8
    assert protocol.beyond([0.1, 0.2, 0.4], 0.1) == 0.05
    assert protocol.beyond([0.1], 0.1) is None  # not tuned over
    inside = {(0.1, 0.0): 50.0, (0.2, 0.0): 60.0, (0.4, 0.0): 55.0}
    assert protocol.chosen(inside, "sgd plain") == (0.2, 0.0)
    with pytest.raises(UserError, match="sgd plain: the best learning rate, 0.4, is at the edge"):
        protocol.chosen(inside | {(0.4, 0.0): 70.0}, "sgd plain")
    with pytest.raises(UserError, match="was not tuned"):
        protocol.chosen({}, "sgd plain")


def test_table() -> None:
    """Accuracy and cost are means and ratios over seeds; the budget is that of the mean, on the list, bracketed."""
    runs = [record(70.0), record(72.0, seed=1, group="h", seconds=20.0)]
    for seed, group, shift in ((0, "g", 0.0), (1, "h", 2.0)):
        accuracies = {1.0: 76.0 + shift, 0.5: 70.5 + shift, 0.25: 60.0 + shift}
        runs += budgets_run(accuracies, seed=seed, group=group, seconds=12.0 + 10 * seed)
    plain, decor = protocol.rows(runs, 100, BUDGETS, 2)
    assert (plain.target, plain.budget, plain.is_target) == (71.0, None, True)
    assert (decor.mean, decor.budget, decor.missed, decor.unfinished) == (77.0, 0.5, 0.25, False)
    assert decor.cost == pytest.approx((1.2, 1.1))
    assert decor.seconds_speedup == pytest.approx(2 / 1.15)
    cells = tables.cells(decor)
    assert cells[0] == "sgd 71.0" and cells[-2:] == ["2.00x", "1.74x"]
    assert "0.25: 61.0" in cells


def test_a_turn_in_which_one_arm_was_slow_does_not_count() -> None:
    """Something else had the machine while plain training had its turn: that is no saving of the other arm's."""
    plain, decor = record(70.0), *budgets_run({1.0: 76.0})
    plain.seconds, decor.seconds = [2.0, 2.1, 4.0, 2.0, 2.0, 2.0], [2.4, 2.5, 2.4, 2.4, 2.4, 3.4]
    row = protocol.rows([plain, decor], 100, BUDGETS, 1)[1]
    assert protocol.quiet_turns([plain, decor]) == {"g": [0, 1, 3, 4]}
    assert row.cost == pytest.approx((9.7 / 8.1,))
    assert row.milliseconds == pytest.approx(1000 * 9.7 / (4 * 17)), "17 steps a turn, the last one fewer"
    decor.seconds[0] *= 2
    assert protocol.quiet_turns([plain, decor]) == {"g": [0, 1, 2, 3, 4, 5]}, "too few are left: there is no usual turn"


def test_on_a_gpu_what_is_timed_has_it_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    preset = dataclasses.replace(SMOKE, workers=4)
    results = Results(tmp_path / "file.json", {})
    alone: list[str] = []
    monkeypatch.setattr(stages, "_train_group", lambda bench, specs, group: alone.append(group))
    monkeypatch.setattr(Results, "open", classmethod(lambda cls, path, settings: results))
    monkeypatch.setattr(stages, "ProcessPoolExecutor", lambda *args: pytest.fail("several at a time"))
    groups = [[record(0.0, seed=seed).spec] for seed in range(2)]
    stages.Bench(preset, None, False, torch.device("cuda"), results, {}, 1).run(groups, timed=True)
    assert len(alone) == 2
    with pytest.raises(pytest.fail.Exception, match="several"):
        stages.Bench(preset, None, False, torch.device("cpu"), results, {}, 1).run(groups, timed=True)
    with pytest.raises(pytest.fail.Exception, match="several"):
        stages.Bench(preset, None, False, torch.device("cuda"), results, {}, 1).run(groups)


def test_workers_end_with_a_benchmark_that_is_killed(tmp_path: Path) -> None:
    """Left alone they would train on for hours, and whatever is timed next would share the machine with them."""
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, os, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from study.stages import end_with_parent\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    with ProcessPoolExecutor(1, context, end_with_parent) as pool:\n"
        "        print(pool.submit(os.getpid).result(), flush=True)\n"
        "        pool.submit(time.sleep, 600).result()\n"
    )
    benchmarks = str(Path(time_to_accuracy.__file__).parent)
    env = {**os.environ, "PYTHONPATH": benchmarks}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=env) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.kill()
    with pytest.raises(ProcessLookupError):  # there is no such process any more
        for _ in range(300):
            os.kill(worker, 0)
            time.sleep(0.1)
        os.kill(worker, signal.SIGKILL)


def test_table_without_proof() -> None:
    """Nothing is filled in: seconds that were not measured in turns, a seed that is missing, a search not ended."""
    runs = [record(70.0), *budgets_run({1.0: 76.0}, group="another hour")]
    runs += budgets_run({1.0: 76.0}, arm="at once", group="g")
    runs[-1].seconds = [12.0]
    at_once, decor = protocol.rows(runs, 100, BUDGETS, 1)[1:]
    assert at_once.cost == ()
    assert decor.cost == () and decor.seconds_speedup is None and "not in turns" in tables.cells(decor)[5]
    assert decor.unfinished and "unfinished" in tables.budget_text(decor)
    searched = dataclasses.replace(at_once, cost=(1.5,))
    assert searched.unfinished and searched.seconds_speedup and tables.cells(searched)[-2:] == ["-", "-"]
    assert protocol.rows(runs, 100, BUDGETS, 2) == []
    never = protocol.rows([record(70.0), *budgets_run({1.0: 69.9})], 100, BUDGETS, 1)[1]
    assert never.budget is None and not never.unfinished and tables.budget_text(never) == "not with 1"
    assert tables.cells(never)[-2:] == ["-", "-"]


def test_rival() -> None:
    """Plain training with the rival is searched for the others' target, at the seconds it takes."""
    runs = [record(70.0), record(75.0, opt="muon", seconds=15.0)]
    runs += budgets_run({0.5: 71.0, 0.25: 60.0}, arm="plain", opt="muon")
    sgd, rival, muon = protocol.rows(runs, 100, BUDGETS, 1, rival="muon")
    assert sgd.is_target and muon.is_target and not rival.is_target
    assert (rival.against, rival.opt, rival.budget, rival.missed) == ("sgd", "muon", 0.5, 0.25)
    assert rival.seconds_speedup == pytest.approx(2 / 1.5)


def test_comparison_tells_what_is_outside() -> None:
    """The same figures are within the spread; a lost point too many, a lost budget or a dearer step is not."""

    def table(gain: float = 0.0, seconds: float = 12.0, half: float = 71.5) -> list[protocol.Row]:
        runs = []
        for seed in range(3):
            runs += [record(70.0 + 0.5 * seed, seed=seed, group=str(seed))]
            accuracies = {1.0: 76.0 + 0.5 * seed + gain, 0.75: 73.0, 0.5: half, 0.25: 60.0}
            runs += budgets_run(accuracies, seed=seed, group=str(seed), seconds=seconds)
        return protocol.rows(runs, 100, BUDGETS, 3)

    def outside(new: list[protocol.Row]) -> list[str]:
        lines, count = tables.compared(new, table(), BUDGETS)
        found = [line[0] for line in lines if line[-1] == "OUTSIDE"]
        assert len(found) == count
        return found

    assert outside(table()) == []
    # sd 0.5 of two arms, 4 degrees of freedom: two means of three may differ by 4.60 * 0.5 * sqrt(2 / 3) = 1.88
    assert outside(table(gain=-1.8)) == []
    assert outside(table(gain=-2.0)) == ["sgd decorrelated: top-1 %"]
    assert outside(table(seconds=13.5)) == ["sgd decorrelated to sgd's target: cost of a step"]
    assert outside(table(half=60.0)) == []  # the next budget on the list
    assert outside(table(gain=-9)) == ["sgd decorrelated: top-1 %", "sgd decorrelated to sgd's target: budget"]
    assert outside([]) == ["sgd plain", "sgd decorrelated"]


# -- images


def test_augmentation_is_each_image_s_own() -> None:
    """Each image equals its own mirrored and shifted self, computed one by one."""
    x = torch.randn(4, 3, 6, 5)
    flips, shifts = torch.tensor([False, True, False, True]), torch.tensor([[2, 2], [2, 2], [0, 1], [4, 3]])
    out = augmented(x, flips, shifts, 2)
    assert torch.equal(out[0], x[0]) and torch.equal(out[1], x[1].flip(2))
    padded = torch.nn.functional.pad(x, (2,) * 4)
    for i in (2, 3):
        top, left = shifts[i].tolist()
        # mirrored first, then shifted, as torchvision's flip and crop would
        image = torch.nn.functional.pad(x[i].flip(2), (2,) * 4) if flips[i] else padded[i]
        left = 4 - left if flips[i] else left
        assert torch.equal(out[i], image[:, top : top + 6, left : left + 5])


def test_batches_use_every_image_once_an_epoch() -> None:
    images = generate(50, 8, tunes=False).train
    batches = Batches(images, 8, 1, seed=3)
    first = torch.cat([batches.plan(2).rows.flatten(), batches.plan(4).rows.flatten()])
    assert len(first.unique()) == len(first) == 48
    again = Batches(images, 8, 1, seed=3)
    assert torch.equal(first, again.plan(6).rows.flatten())  # however the epoch is cut
    assert not torch.equal(batches.plan(6).rows, again.plan(6).rows.flip(0))
    x, y = again.batch(again.plan(1), 0)
    assert x.shape == (8, 3, 8, 8) and y.shape == (8,)


def write_parquet(path: Path, values: range) -> None:
    """One-coloured images whose grey level says which they are."""
    rows = []
    for value in values:
        file = io.BytesIO()
        Image.fromarray(np.full((8, 8, 3), value, dtype=np.uint8)).save(file, "png")
        rows.append({"bytes": file.getvalue(), "path": None})
    pq.write_table(pa.table({"image": rows, "label": [value % 2 for value in values]}), path)


def test_tuning_never_sees_test_images(tmp_path: Path) -> None:
    """Tuning trains on and is measured on different training images, and there need not be any test images."""
    write_parquet(tmp_path / "train.parquet", range(0, 60))
    split = load(tmp_path, 40, 15)
    trained, measured = (set(part.pixels[:, 0, 0, 0].tolist()) for part in (split.train, split.measured))
    assert len(trained) == 40 and len(measured) == 15 and not trained & measured and split.measured_on == "held-out"
    write_parquet(tmp_path / "test.parquet", range(100, 120))
    split = load(tmp_path, None, None)
    assert len(split.train) == 60 and split.measured_on == "test"
    assert set(split.measured.pixels[:, 0, 0, 0].tolist()) == set(range(100, 120))
    # normalised by the training images
    assert split.train.normalized(slice(None)).mean().abs() < 1e-3 < split.measured.normalized(slice(None)).mean()
    with pytest.raises(UserError, match="60 training images; 50 \\+ 20 are asked for"):
        load(tmp_path, 50, 20)


# -- training


@pytest.fixture
def small() -> Preset:
    return dataclasses.replace(SMOKE, train_images=96, epochs=2, turn=2)


def finish(spec: Spec, preset: Preset) -> Run:
    run = Run(spec, preset, generate(96, 16, tunes=False), "g")
    while not run.is_done:
        run.advance()
    return run


def test_warm_up_and_turns_leave_no_trace(small: Preset, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is the same whether or not steps were made before the clock, and alone as in turns with others."""
    spec = Spec("sgd", "decorrelated", DECOR, 0.1, 0.0, 0, 6)
    alone = finish(spec, small)
    assert alone.record.at == [3, 6] and len(alone.record.seconds) == 3
    done: list[Record] = []
    others = [spec, dataclasses.replace(spec, arm="plain", config=None)]
    train_in_turns(others, small, generate(96, 16, tunes=False), "g", done.append)
    monkeypatch.setattr("study.training.WARM_UP", 0)
    cold = finish(spec, small)
    for other in (cold.record, next(r for r in done if r.spec == spec)):
        assert (other.top1, other.loss) == (alone.record.top1, alone.record.loss)
    plain = next(r for r in done if r.spec != spec)
    assert plain.loss != alone.record.loss


def test_runs_take_turns(small: Preset, monkeypatch: pytest.MonkeyPatch) -> None:
    """No arm trains for more than a turn while another waits, and none is always the first of a round."""
    order: list[tuple[str, int]] = []
    advance = Run.advance
    monkeypatch.setattr(Run, "advance", lambda run: (advance(run), order.append((run.spec.opt, run.step))))
    specs = [Spec(opt, "plain", None, 0.01, 0.0, 0, 6) for opt in ("sgd", "adamw")]
    train_in_turns(specs, small, generate(96, 16, tunes=False), "g", lambda record: None)
    assert order == [("sgd", 2), ("adamw", 2), ("adamw", 4), ("sgd", 4), ("sgd", 6), ("adamw", 6)]


def test_schedule_is_that_of_the_run_s_own_budget() -> None:
    for steps in (20, 50):
        shares = [schedule(step, steps) for step in range(steps)]
        assert shares[0] == pytest.approx(10 / steps) and shares[-1] == pytest.approx(1 / steps)
        assert max(shares) == shares[steps // 10 - 1] and shares[steps // 2] == pytest.approx(0.5)


def test_divergence_ends_the_run(small: Preset) -> None:
    run = finish(Spec("sgd", "plain", None, 1e30, 0.0, 0, 6), small)
    assert run.record.diverged and run.step < 6 and run.record.loss[-1] is None
    assert json.loads(json.dumps(run.record.as_json()))["diverged"]


# -- the script


def run_script(*words: Any) -> None:
    time_to_accuracy.main([str(word) for word in words])


def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tune, then report; a rerun trains nothing; runs of another configuration are not reported."""
    tune, out = tmp_path / "tune.json", tmp_path / "report.json"
    common = ["--preset", "smoke", "--opt", "sgd", "--train-images", 96, "--turn", 1]
    with pytest.raises(UserError, match="cannot read results from"):
        run_script("report", *common, "--json", out, "--tune-json", tune)
    run_script("tune", *common, "--json", tune)
    tuned = Results.read(tune)
    assert {r.measured_on for r in tuned.records} == {"held-out"}
    points = {arm: {r.spec.lr for r in tuned.records if r.spec.arm == arm} for arm in ("plain", "decorrelated")}
    assert points["plain"] == points["decorrelated"] and len(points["plain"]) >= 5  # an equal grid
    assert "<- chosen" in capsys.readouterr().out

    run_script("report", *common, "--json", out, "--tune-json", tune, "--seeds", 2)
    results = Results.read(out)
    assert {r.measured_on for r in results.records} == {"test"}
    assert {r.spec.steps for r in tuned.records} == {tuned.settings["steps"]}
    for r in results.records:
        tuned_as = "plain" if r.spec.arm == stages.AT_PLAIN_RATE else r.spec.arm
        alike = (t for t in tuned.records if t.spec.arm == tuned_as)
        assert r.spec.lr == protocol.best(protocol.scores(alike))[0]
    whole = [r for r in results.records if r.spec.steps == results.settings["steps"]]
    arms = (stages.AT_PLAIN_RATE, "decorrelated", "plain")
    assert {(r.spec.arm, r.spec.seed) for r in whole} == {(a, s) for a in arms for s in (0, 1)} and len(whole) == 6
    for seed in (0, 1):  # the arms of a seed train in turns
        assert len({r.group for r in whole if r.spec.seed == seed}) == 1
    plain, *decor = stages.read_table(out)
    assert plain.target == statistics.mean(r.final for r in whole if r.spec.arm == "plain")
    assert len(decor) == 2 and all(row.cost and not row.unfinished for row in decor)
    assert str(tmp_path) not in out.read_text(encoding="utf-8")

    before = out.read_text(encoding="utf-8")
    capsys.readouterr()
    run_script(*["report", *common, "--json", out, "--tune-json", tune, "--seeds", 2, "--workers", 2, "--compare", out])
    shown = capsys.readouterr()
    assert "7 of 7 figures are within the spread" in shown.out and shown.err == ""
    assert out.read_text(encoding="utf-8") == before
    with pytest.raises(UserError, match="holds runs with epochs 2, not 3"):
        run_script("report", *common, "--json", out, "--tune-json", tune, "--epochs", 3)
    with pytest.raises(UserError, match="was tuned with batch_size 32, not 16"):
        run_script("report", *common, "--json", tmp_path / "x.json", "--tune-json", tune, "--batch-size", 16)
    with pytest.raises(UserError, match="tuned decorrelated with another configuration"):
        arm = 'decorrelated={"every": 3}'
        run_script("report", *common, "--json", out, "--tune-json", tune, "--arm", arm)
    assert out.read_text(encoding="utf-8") == before
    stages.drop_stale(results, {"plain": None, "decorrelated": DecorConfig(every=3).to_json()})
    assert {r.spec.arm for r in Results.read(out).records} == {"plain", stages.AT_PLAIN_RATE}
    assert "removed" in capsys.readouterr().err


def test_results_of_two_processes_add_up(tmp_path: Path) -> None:
    """Each process re-reads before it writes; a run of the same spec takes the old one's place."""
    one, two = (Results.open(tmp_path / "r.json", {"model": "x"}) for _ in range(2))
    one.add(record(70.0), {"command": "a"})
    two.add(record(71.0, seed=1), {"command": "b"})
    one.add(record(72.0), {"command": "a"})
    found = Results.read(tmp_path / "r.json")
    assert sorted((r.spec.seed, r.final, r.session) for r in found.records) == [(0, 72.0, 0), (1, 71.0, 1)]
    with pytest.raises(UserError, match="holds runs with model x, not y"):
        Results.open(tmp_path / "r.json", {"model": "y"})


def test_bad_input_is_one_line() -> None:
    with pytest.raises(UserError, match="no settings for optimizer 'sdg'; near: sgd"):
        run_script("tune", "--preset", "smoke", "--opt", "sdg")
    with pytest.raises(UserError, match="--data-dir is needed"):
        run_script("tune", "--preset", "cpu")
    with pytest.raises(SystemExit):
        run_script("tune", "--preset", "smoke", "--arm", 'x={"rul": "dbp"}')


@pytest.mark.parametrize(("best", "tried"), [(2, 3), (4, 4), (16, 6), (0.5, 5)])
def test_a_grid_of_rates_grows_while_it_pays(best: float, tried: int) -> None:
    seen: list[float] = []

    def score(lr: float) -> float:
        seen.append(lr)
        return -abs(math.log2(lr / best))

    assert protocol.best_rate((1, 2, 4), score) == best and len(seen) == tried


def test_a_grid_of_rates_that_are_all_alike_ends() -> None:
    assert protocol.best_rate((1, 2, 4), lambda lr: 10.0) == 1
