"""The stages of time_to_accuracy: tune, and report."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from study import protocol
from study.images import Split, generate, load
from study.presets import OPTIMIZERS, Preset
from study.results import RESULTS, Results, same_config, session
from study.training import PLAIN, Record, Spec, train_in_turns
from timm_decor import DecorConfig
from timm_decor.errors import UserError
from timm_decor.training.data.parquet import Parquet, ParquetColumns

Arms = dict[str, str | None]  # configurations as JSON, None for plain
AT_PLAIN_RATE = "at plain's rate"  # of a report: decorrelated with the learning rate that is plain training's best
MAX_EXTENSIONS = 8
TUNED_FOR = ("model", "stem", "batch_size", "shift", "amp", "data", "images", "steps")  # equal in tune and report


@dataclass
class Bench:
    """One stage on one preset and data set.

    Attributes:
        preset: the setting.
        data_dir: parquet files; None for generated images.
        tunes: measure on held-out training images.
        device: where to train.
        results: the stage's file.
        made_by: the session that new runs are of.
        whole: steps of N epochs.
    """

    preset: Preset
    data_dir: Path | None
    tunes: bool
    device: torch.device
    results: Results
    made_by: dict[str, Any]
    whole: int

    def run(self, groups: Sequence[Sequence[Spec]], timed: bool = False) -> None:
        """Train groups of runs; each group in turns, groups on the preset's workers.

        Args:
            groups: of runs.
            timed: their seconds are reported. Workers have a core each, but share a GPU: there they train one by one.
        """
        groups = [group for group in groups if group]
        begin = time.time_ns()
        jobs = [(list(group), f"{begin}-{number}") for number, group in enumerate(groups)]
        if self.preset.workers == 1 or len(jobs) <= 1 or (timed and self.device.type != "cpu"):
            for job in jobs:
                _train_group(self, *job)
        else:
            context = multiprocessing.get_context("spawn")  # a fork of a process that has torch's threads may hang
            with ProcessPoolExecutor(min(self.preset.workers, len(jobs)), context, end_with_parent) as pool:
                for future in [pool.submit(_train_group, self, *job) for job in jobs]:
                    future.result()
        if groups:
            self.results = Results.open(self.results.path, self.results.settings)


def end_with_parent() -> None:
    """Let this worker end when its parent does, however that ends: left alone it would train on, job after job."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def arms_of(opt: str, arms: Arms, preset: Preset) -> Arms:
    """The arms of an optimizer: of the rival plain training alone."""
    return {PLAIN: arms[PLAIN]} if opt == preset.rival else arms


def open_bench(
    preset: Preset, name: str, stage: str, data_dir: Path | None, path: Path | None = None, device: str = ""
) -> Bench:
    """What a stage runs on. Counts the images without decoding them.

    Args:
        preset: the setting.
        name: the preset's.
        stage: `tune` or `report`.
        data_dir: parquet files.
        path: of the result file; by preset and data set if None.
        device: cuda for the gpu preset, else cpu, if "".
    """
    if not preset.generated and data_dir is None:
        raise UserError("--data-dir is needed: a folder with train*.parquet and test*.parquet")
    found = _device(device or ("cuda" if name == "gpu" else "cpu"))
    count = preset.train_images or len(Parquet(data_dir, "train", "RGB", ParquetColumns()))  # type: ignore[arg-type]
    per_epoch = count // preset.batch_size
    whole = round(preset.epochs * per_epoch)
    if whole < 1:
        raise UserError(f"{count} images, batch {preset.batch_size} and {preset.epochs} epochs make no step")
    data = "generated" if preset.generated or data_dir is None else data_dir.resolve().name
    settings = {**preset.settings(), "data": data, "images": count, "steps": whole, "stage": stage}
    if stage != "tune":
        settings["rival"] = preset.rival
    made_by = session(found, preset.threads, preset.workers)
    path = path or RESULTS / f"{name}_{data}{'_tune' if stage == 'tune' else ''}.json"
    return Bench(preset, data_dir, stage == "tune", found, Results.open(path, settings), made_by, whole)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name} is not available here; the cpu preset needs no GPU") from error
    return device


_splits: dict[tuple[Any, ...], Split] = {}  # a worker reads the images once


def _train_group(bench: Bench, specs: list[Spec], group: str) -> None:
    preset = bench.preset
    if preset.threads:
        torch.set_num_threads(preset.threads)
    key = (bench.data_dir, bench.tunes, preset.train_images, bench.device)
    if key not in _splits:
        _splits[key] = load_split(preset, bench.data_dir, bench.tunes).to(bench.device)
    train_in_turns(specs, preset, _splits[key], group, lambda record: bench.results.add(record, bench.made_by))


def load_split(preset: Preset, data_dir: Path | None, tunes: bool) -> Split:
    """The images of a preset."""
    if preset.generated or data_dir is None:
        return generate(preset.train_images or 256, preset.generated, tunes)
    return load(data_dir, preset.train_images, preset.held_out if tunes else None)


def tune(bench: Bench, opts: Sequence[str], arms: dict[str, str | None], grid: int | None = None) -> None:
    """Measure every arm on its optimizer's grid, and let the grid grow until no arm's best lies at its edge.

    Args:
        bench: what to train on.
        opts: base optimizers.
        arms: see `time_to_accuracy`.
        grid: how many of an optimizer's learning rates to begin with; None for all.
    """
    drop_stale(bench.results, arms)
    lrs = {opt: set(OPTIMIZERS[opt].lrs[:grid]) for opt in opts}
    decays = {opt: set(OPTIMIZERS[opt].weight_decays) for opt in opts}
    for record in bench.results.records:  # an earlier command may have let the grid grow
        if record.spec.opt in opts:
            lrs[record.spec.opt].add(record.spec.lr)
            decays[record.spec.opt].add(record.spec.weight_decay)
    for _ in range(MAX_EXTENSIONS + 1):
        wanted = [
            Spec(opt, arm, config, lr, decay, seed, bench.whole)
            for opt in opts
            for lr in sorted(lrs[opt])
            for decay in sorted(decays[opt])
            for arm, config in arms_of(opt, arms, bench.preset).items()
            for seed in range(bench.preset.seeds)
        ]
        bench.run([[spec] for spec in wanted if bench.results.find(spec) is None])
        grew = False
        for opt in opts:
            mine = arms_of(opt, arms, bench.preset)
            for measured in grids(bench.results.records, opt, mine, bench.whole).values():
                lr, decay = protocol.best(measured)
                for values, value in ((lrs[opt], lr), (decays[opt], decay)):
                    more = protocol.beyond(sorted(values), value)
                    if more is not None:
                        values.add(more)
                        grew = True
        if not grew:
            return
    raise UserError(
        f"after {MAX_EXTENSIONS} extensions of the grid the best is still at its edge: see {bench.results.path}"
    )


def grids(
    records: Sequence[Record], opt: str, arms: Iterable[str], whole: int
) -> dict[str, dict[protocol.Point, float]]:
    """Held-out accuracy of an optimizer's points after N epochs, by arm."""
    return {
        arm: protocol.scores(r for r in records if (r.spec.opt, r.spec.arm, r.spec.steps) == (opt, arm, whole))
        for arm in arms
    }


def report(bench: Bench, tuned: Results, opts: Sequence[str], arms: dict[str, str | None]) -> None:
    """Train every arm for N epochs, then search each arm's smallest budget to plain's accuracy."""
    for key, value in bench.results.settings.items():
        if key in TUNED_FOR and tuned.settings[key] != value:
            has = tuned.settings[key]
            raise UserError(f"{tuned.path.name} was tuned with {key} {has}, not {value}: run the tune stage again")
    points = {}
    for opt in opts:
        for arm, measured in grids(tuned.records, opt, arms_of(opt, arms, bench.preset), bench.whole).items():
            points[opt, arm] = protocol.chosen(measured, f"{opt} {arm}")
        points[opt, AT_PLAIN_RATE] = points[opt, PLAIN]
    for record in tuned.records:
        if not same_config(record.spec.config, arms.get(record.spec.arm, record.spec.config)):
            arm = record.spec.arm
            raise UserError(f"{tuned.path.name} tuned {arm} with another configuration: run the tune stage again")

    arms = {**arms, AT_PLAIN_RATE: DecorConfig().to_json()}

    def spec(opt: str, arm: str, seed: int, budget: float) -> Spec:
        steps = protocol.budget_steps(budget, bench.whole)
        return Spec(opt, arm, arms[arm], *points[opt, arm], seed, steps)

    drop_stale(bench.results, arms)
    mine = {opt: arms_of(opt, arms, bench.preset) for opt in opts}
    budgets = (*bench.preset.budgets, 1.0)
    _drop_retuned(bench, {spec(opt, arm, 0, b) for opt in opts for arm in mine[opt] for b in budgets})

    def missing(specs: list[Spec]) -> list[Spec]:
        return [each for each in specs if bench.results.find(each) is None]

    wholes = []
    for seed in range(bench.preset.seeds):
        by_opt = [[spec(opt, arm, seed, 1.0) for arm in mine[opt]] for opt in opts]
        # An optimizer's arms train in turns or not at all: seconds of different hours are not compared.
        wholes.append([each for group in by_opt if missing(group) for each in group])
    bench.run(wholes, timed=True)
    while True:
        wanted: list[list[Spec]] = [[] for _ in range(bench.preset.seeds)]
        for row in table_of(bench):
            if row.against in opts and row.opt in opts and row.arm in mine[row.opt] and row.unfinished:
                reached = {budget: top1 >= row.target for budget, top1 in row.tried.items()}
                _, following = protocol.smallest_first((*bench.preset.budgets, 1.0), reached)
                assert following is not None  # that is what unfinished means
                for seed, group in enumerate(wanted):  # two targets may ask for the same run of the rival
                    group += [each for each in missing([spec(row.opt, row.arm, seed, following)]) if each not in group]
        if not any(wanted):
            return
        bench.run(_balanced(wanted, bench.preset.workers))


def _balanced(groups: list[list[Spec]], workers: int) -> list[list[Spec]]:
    """Searches need not train beside plain: where there are several workers, each run is a job of its own."""
    return groups if workers == 1 else [[each] for group in groups for each in group]


def drop_stale(results: Results, arms: dict[str, str | None]) -> None:
    """Remove the runs of arms that are another configuration now, such as of DecorConfig's defaults."""
    stale = [r for r in results.records if not same_config(r.spec.config, arms.get(r.spec.arm, r.spec.config))]
    if stale:
        names = ", ".join(sorted({record.spec.arm for record in stale}))
        print(f"{len(stale)} runs of {names} were made with another configuration: removed", file=sys.stderr)
        results.drop(stale)


def _drop_retuned(bench: Bench, current: set[Spec]) -> None:
    """Remove runs of budgets that have another learning rate by now: the seeds of a mean must be alike."""
    known = {(s.opt, s.arm, s.steps): (s.lr, s.weight_decay) for s in current}
    stale = []
    for record in bench.results.records:
        of = record.spec
        if (of.lr, of.weight_decay) != known.get((of.opt, of.arm, of.steps), (of.lr, of.weight_decay)):
            stale.append(record)
    if stale:
        print(f"{len(stale)} runs had another learning rate than is tuned now: removed", file=sys.stderr)
        bench.results.drop(stale)


def table_of(bench: Bench) -> list[protocol.Row]:
    """The table of the stage's file."""
    preset = bench.preset
    return protocol.rows(bench.results.records, bench.whole, preset.budgets, preset.seeds, preset.rival)


def read_table(path: Path) -> list[protocol.Row]:
    """The table of a report's file, by the settings that it was made with."""
    results = Results.read(path)
    seeds = len({record.spec.seed for record in results.records})
    settings = results.settings
    return protocol.rows(results.records, settings["steps"], settings["budgets"], seeds, settings["rival"])
