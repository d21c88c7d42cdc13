"""--find-lr: short trainings over learning rates, before a run is begun."""

from __future__ import annotations

import json
import math

import pytest
from training_runs import DECOR, TINY, reset_accelerate

from timm_decor.errors import UserError
from timm_decor.training import find_lr
from timm_decor.training.find_lr import Search, Trial
from timm_decor.training.run import main, parse


def trial(lr, loss, noise=0.0, updates=20, diverged=False):
    losses = [3.0] * 16 + [loss + noise * (-1) ** i for i in range(4)]
    return Trial(lr, losses[:12] if diverged else losses, updates)


def test_a_grid_is_geometric_and_has_both_ends():
    assert find_lr.grid(0.05, 1.6) == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6]
    assert find_lr.grid(0.1, 0.5) == [0.1, 0.171, 0.2924, 0.5]
    assert find_lr.grid(0.1, 0.1) == [0.1]


def test_the_lowest_rate_within_the_noise_is_named():
    clear = Search("a", [trial(0.1, 2.0), trial(0.2, 1.0), trial(0.4, 0.9), trial(0.8, 2.0)])
    assert clear.best.lr == 0.4
    noisy = Search("a", [trial(0.1, 2.0), trial(0.2, 1.0), trial(0.4, 0.9, noise=0.4), trial(0.8, 2.0)])
    assert noisy.best.lr == 0.2


def test_what_diverged_is_told_and_never_named():
    some = Search("a", [trial(0.1, 2.0), trial(0.2, 0.1, diverged=True)])
    assert some.best.lr == 0.1 and math.isinf(some.trials[1].loss)
    assert "diverged at update 13" in find_lr.table([some])
    assert "at the edge of what was tried: try lower ones" in some.words
    none = Search("a", [trial(0.1, 2.0, diverged=True)])
    assert none.best is None and "with every learning rate training diverged" in none.words


def find(folder, *words):
    reset_accelerate()
    main([*TINY, *DECOR, "--find-lr", *words, "--output", str(folder), "--experiment", "x"])


def test_both_twins_are_tried_and_no_run_is_begun(tmp_path, capsys):
    out = tmp_path
    find(out, "0.02", "0.08", "--find-updates", "9", "--compare")
    said = capsys.readouterr().out
    folder = out / "x-find-lr"
    assert sorted(path.name for path in folder.iterdir()) == ["find_lr.json", "find_lr.png"]
    assert [path.name for path in out.iterdir()] == ["x-find-lr"]
    found = json.loads((folder / "find_lr.json").read_text(encoding="utf-8"))
    decorrelated, plain = found["sides"]
    for side in (decorrelated, plain):
        assert [t["lr"] for t in side["trials"]] == [0.02, 0.04, 0.08]
        assert all(len(t["losses"]) == 9 and not t["diverged"] for t in side["trials"])
        # the first update's loss is that of the weights they all begin with, on the same batch
        assert len({t["losses"][0] for t in side["trials"]}) == 1
        assert len({t["losses"][-1] for t in side["trials"]}) == 3
    assert decorrelated["trials"][0]["losses"][0] == plain["trials"][0]["losses"][0]
    assert decorrelated["trials"][0]["losses"][-1] != plain["trials"][0]["losses"][-1]
    assert "<-" in said and f"learning rate {decorrelated['best_lr']:.4g}" in said
    assert str(out) not in (folder / "find_lr.json").read_text(encoding="utf-8")


def test_a_run_of_that_name_is_not_touched(tmp_path):
    """A second search has a folder of its own, and the run's stays as it is."""
    run = tmp_path / "x"
    run.mkdir()
    (run / "resume.pt").write_bytes(b"a run")
    for _ in range(2):
        find(tmp_path, "0.02", "0.02", "--find-updates", "2")
    assert [path.name for path in run.iterdir()] == ["resume.pt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "x-find-lr", "x-find-lr-2"]


@pytest.mark.parametrize(
    "words,message",
    [
        (["--find-lr", "0.4", "0.1"], "the lower one comes first"),
        (["--find-lr", "0.1", "0.4", "--resume", "auto", "--experiment", "x"], "leave out --resume"),
        (["--find-lr", "0", "0.4"], "must be above 0"),
    ],
)
def test_bad_ranges_are_one_line(words, message, tmp_path):
    with pytest.raises(UserError, match=message):
        main([*TINY, *DECOR, "--output", str(tmp_path), *words])
    assert not list(tmp_path.iterdir())


def test_a_recipe_does_not_search():
    assert parse(["--model", "resnet18"]).find_lr is None
