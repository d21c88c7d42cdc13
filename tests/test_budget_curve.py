"""budget_curve: what is read off the curves, and the script from end to end on generated images."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import budget_curve
import pytest
import time_to_accuracy

from study import budgets, curve, curve_pages, presets
from study.results import Results
from study.training import PLAIN, Record, Spec
from timm_decor.errors import UserError

PER_EPOCH = 10
RATES = {
    ("sgd", "plain"): {2.0: 0.2, 8.0: 0.1},
    ("sgd", "decorrelated"): {2.0: 0.8, 8.0: 0.1},
    ("muon", "plain"): {2.0: 0.05, 8.0: 0.05},
}


def record(opt: str, arm: str, lr: float, epochs: float, top1: float, seed: int = 0) -> Record:
    spec = Spec(opt, arm, None, lr, 0.0, seed, round(epochs * PER_EPOCH))
    return Record(spec, PER_EPOCH, "g", "test", top1=[top1])


def test_a_budget_takes_the_rate_tuned_nearest_to_it() -> None:
    assert [curve.rate_for({2: 0.2, 8: 0.1}, epochs) for epochs in (1, 2, 4, 8, 16)] == [0.2, 0.2, 0.1, 0.1, 0.1]


def test_curves_by_role() -> None:
    """At plain's rate and at its own are the same runs where the rates are."""
    runs = [record("sgd", "plain", lr, epochs, 60 + epochs) for lr, epochs in ((0.2, 2), (0.1, 4), (0.1, 8))]
    runs += [record("sgd", "decorrelated", 0.2, 2, 70), record("sgd", "decorrelated", 0.8, 2, 71)]
    runs += [record("sgd", "decorrelated", 0.1, 8, 75), record("muon", "plain", 0.05, 2, 72)]
    runs += [record("sgd", "plain", 0.9, 2, 99)]  # a rate that was not chosen
    found = {each.name: each for each in curve.curves(runs, RATES, PER_EPOCH, 1, "muon", (2, 4, 8))}
    assert {name: each.means for name, each in found.items()} == {
        "sgd, plain": {2: 62, 4: 64, 8: 68},
        "sgd, at plain's rate": {2: 70, 8: 75},
        "sgd, decorrelated": {2: 71, 8: 75},
        "muon, plain": {2: 72},
    }
    assert not curve.curves(runs, RATES, PER_EPOCH, 2, "muon", (2, 4, 8)), "no point has two seeds"


def test_a_level_is_found_between_two_budgets() -> None:
    mine = curve.Curve("sgd", "decorrelated", {}, {1: (60,), 2: (70, 72), 4: (75,)})
    assert mine.budget_to(71) == 2
    assert mine.budget_to(65.5) == pytest.approx(2**0.5)
    assert mine.budget_to(73) == pytest.approx(2**1.5)
    assert mine.budget_to(59) is None and mine.budget_to(76) is None, "outside of what was trained"


def test_speedups() -> None:
    plain = curve.Curve("sgd", PLAIN, {}, {1: (50,), 2: (60,), 4: (70,), 8: (80,)})
    mine = curve.Curve("sgd", "decorrelated", {}, {1: (60,), 2: (70,), 4: (75,)})
    found = curve.speedups(mine, plain, cost=1.25)
    assert [(each.epochs, each.steps, each.seconds) for each in found] == [
        (1, None, None),
        (2, 2, 1.6),
        (4, 2, 1.6),
        (8, None, None),
    ]


def test_interval() -> None:
    """What two other seeds would give: nothing to either side without spread, and wider with more of it."""
    plain = curve.Curve("sgd", PLAIN, {}, {1: (50, 52), 2: (60, 62), 4: (70, 72)})
    mine = curve.Curve("sgd", "decorrelated", {}, {1: (60, 62), 2: (70, 72), 4: (80, 82)})
    assert curve.spreads([plain, mine]) == pytest.approx(dict.fromkeys((1, 2, 4), 2**0.5))
    assert curve.interval(mine, plain, 1.25, 4, dict.fromkeys((1, 2, 4), 1e-9)) == pytest.approx((1.6, 1.6))
    low, high = curve.interval(mine, plain, 1.25, 4, dict.fromkeys((1, 2, 4), 0.2)) or (0, 0)
    lower, higher = curve.interval(mine, plain, 1.25, 4, dict.fromkeys((1, 2, 4), 1.0)) or (0, 0)
    assert lower < low < 1.6 < high < higher
    # a line of 10 points a doubling: a standard deviation of a point in the difference is a factor of 2**0.1
    assert higher / lower == pytest.approx(2 ** (0.1 * 2 * 1.96), rel=0.1)
    assert curve.interval(mine, plain, 1.25, 2, {1: 0.2, 2: 0.2}) is None, "no spread is known of a budget"
    assert curve.interval(mine, plain, 1.25, 2, dict.fromkeys((1, 2, 4), 1.0)) is None, "half of them do not meet"


def test_tables() -> None:
    """The rival is set beside each plain curve, and decorrelated curves beside their own and the rival's."""
    arms = [("sgd", PLAIN), ("sgd", "decorrelated"), ("adamw", PLAIN), ("adamw", "decorrelated"), ("muon", PLAIN)]
    scores = [{1: (50 + number,), 2: (60 + number, 61 + number)} for number in range(len(arms))]
    found = [curve.Curve(*arm, {1: 0.1, 2: 0.1}, of) for arm, of in zip(arms, scores, strict=True)]
    beside = [(pair.target.name, pair.mine.name) for pair in curve_pages.pairs(found)]
    assert beside == [
        ("sgd, plain", "sgd, decorrelated"),
        ("sgd, plain", "muon, plain"),
        ("adamw, plain", "adamw, decorrelated"),
        ("adamw, plain", "muon, plain"),
        ("muon, plain", "sgd, decorrelated"),
        ("muon, plain", "adamw, decorrelated"),
    ]
    head, rows = curve_pages.speedup_table(found, {arm: 1.0 + number for number, arm in enumerate(arms)})
    assert head[-2:] == ["its 1 epoch", "its 2 epochs"]
    assert rows[0][2:4] == ["2.00", "-"] and rows[0][4].startswith("1.07, 0.53"), rows[0]
    head, rows = curve_pages.score_table(found)
    assert rows[1] == ["sgd, decorrelated at 0.1", "51.0 (51.0)", "61.5 (61.0, 62.0)"]


def test_readmes_row() -> None:
    """From recipe_study's rows and step_cost's results; a held-out row is no result."""

    def row(opt: str, arm: str, epochs: int, top1: float, seed: int = 0, on: str = "test") -> dict[str, Any]:
        return {"opt": opt, "arm": arm, "lr": 0.1, "seed": seed, "epochs": epochs, "measured_on": on, "top1": top1}

    runs = [row("sgd", PLAIN, 5, 70), row("sgd", PLAIN, 20, 82), row("sgd", PLAIN, 20, 80, seed=1)]
    runs += [
        row("sgd", "decorrelated", 5, 81),
        row("sgd", "decorrelated", 20, 85),
        row("sgd", PLAIN, 5, 1, on="held-out"),
    ]
    runs += [row("muon", PLAIN, 5, 77), row("muon", PLAIN, 20, 85)]
    found = curve_pages.of_recipe(runs)
    assert [each.name for each in found] == ["sgd, plain", "sgd, at plain's rate", "muon, plain"]
    assert found[0].scores == {5: [70], 20: [82, 80]}
    steps = [("sgd", 0.2, 1.25), ("muon", 0.4, 1.1)]
    record = {
        "results": [
            {
                "case": {"opt": opt, "img_size": size, "batch_size": 64},
                "seconds": {"plain": seconds * size / 64},
                "ratio": {"amortised": ratio},
            }
            for opt, seconds, ratio in steps
            for size in (64, 128)
        ]
    }
    costs = curve_pages.step_costs(record, 128, 64)
    assert costs["sgd", "at plain's rate"] == 1.25 and costs["muon", PLAIN] == 2
    with pytest.raises(UserError, match="no step of plain SGD was timed at 224 px, batch 64"):
        curve_pages.step_costs(record, 224, 64)
    cells = curve_pages.headline("a net, data", "sgd", 20, found, costs)
    assert cells == ["a net, data, 20 epochs", "sgd", "81.0 %", "85.0 %", "85.0 %", "3.2x", "1.0x"]
    assert curve_pages.headline("a net, data", "adamw", 20, found, costs) is None
    assert curve_pages.headline("a net, data", "sgd", 10, found, costs) is None


def test_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    small = dataclasses.replace(presets.PRESETS["smoke"], train_images=64, rival="muon", seeds=1, turn=1)
    monkeypatch.setitem(presets.PRESETS, "smoke", small)
    monkeypatch.setattr(budgets, "EPOCHS", (1.0, 2.0))
    monkeypatch.setattr(budgets, "SEEDS", 1)
    sgd = dataclasses.replace(presets.OPTIMIZERS["sgd"], lrs=(0.02, 0.1, 0.5))
    monkeypatch.setitem(presets.OPTIMIZERS, "sgd", sgd)
    short, tuned, out = tmp_path / "short_tune.json", tmp_path / "tune.json", tmp_path / "curve.json"
    words = ["--preset", "smoke", "--opt", "sgd"]
    time_to_accuracy.main(["tune", *words, "--json", str(short)])
    time_to_accuracy.main(["report", *words, "--json", str(tmp_path / "short.json"), "--tune-json", str(short)])
    files = ["--json", str(out), "--tune-json", str(tuned), "--short-json", str(short)]

    def run(stage: str, *more: Any) -> None:
        budget_curve.main([stage, *words, *files, *map(str, more)])

    with pytest.raises(UserError, match="cannot read results from"):
        run("report")
    run("tune")
    assert {r.measured_on for r in Results.read(tuned).records} == {"held-out"}
    with pytest.raises(UserError, match="budgets are 1, 2 epochs, not 3"):
        run("report", "--epochs", 3)
    run("report", "--seeds", 0)
    records = Results.read(out).records
    assert {r.measured_on for r in records} == {"test"}
    assert {(r.spec.arm, r.spec.steps) for r in records} == {(a, s) for a in ("plain", "decorrelated") for s in (2, 4)}
    before = out.read_text(encoding="utf-8")
    capsys.readouterr()
    run("report", "--seeds", 0)
    assert out.read_text(encoding="utf-8") == before and capsys.readouterr().err == "", "a rerun trains nothing"
    assert str(tmp_path) not in before and json.loads(before)["sessions"]
    run("table")
    shown = capsys.readouterr().out
    assert "sgd, plain" in shown and "sgd, at plain's rate" in shown and out.with_suffix(".png").stat().st_size > 10_000
