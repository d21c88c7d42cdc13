"""Fill in the README's benchmark tables and draw their pictures, from the committed results alone.

    python benchmarks/readme_tables.py            # `make readme`
    python benchmarks/readme_tables.py --check    # changes nothing; exit code 1 where README or a picture is stale

A table stands between `<!-- results: FILE -->` and `<!-- end of results -->`; FILE is in benchmarks/results,
`staged` is hub/staged, and FILE#PART names one of several tables of a file.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm.optim
import torch
from huggingface_hub import ModelCard
from torch.utils.flop_counter import FlopCounterMode

from study import budgets, curve_pages, memory, networks, pictures, scaling_pages, sensitivity, tables
from study.curve import Curve
from study.families import FAMILIES
from study.presets import OPTIMIZERS
from study.protocol import Row
from study.results import Results
from study.stages import AT_PLAIN_RATE, read_table
from study.training import PLAIN
from study.verdict import DEFAULT_ARM, Measured
from timm_decor import DecorConfig, attach, decorrelate
from timm_decor.errors import UserError, exit_code
from timm_decor.publishing.repository import plain_model
from timm_decor.text import markdown_table
from timm_decor.training.foreign import read_mapping
from timm_decor.training.keeping.starts import trained_on
from timm_decor.training.seeing.compare import Side
from timm_decor.training.seeing.plot import save_picture

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RECIPE_STEPS = RESULTS / "step_cost" / "cpu_bfloat16.json"
PAGES = [
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("measured", "decorrelation", "families", "finetuning", "scaling")),
]
MARKED = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end of results -->)", re.DOTALL)


def time_to_accuracy(path: Path, draw: bool) -> str:
    """The table of a report, its conditions, a sentence an arm, and its picture."""
    results, rows = Results.read(path), read_table(path)
    if not rows:
        raise UserError(f"{path} has no optimizer with all of its seeds: finish the report")
    title = f"{_model(results.settings)}, {_images(results.settings)}"
    picture = path.with_suffix(".png")
    if draw:
        pictures.time_to_accuracy_picture(rows, picture, title)
    table = markdown_table(tables.HEADER, [tables.cells(row, bold=True) for row in rows])
    parts = (
        _conditions(results, rows),
        table,
        *_sentences(rows, results),
        _memory([(row.opt, row.arm) for row in rows if row.opt == row.against], results),
        _image(picture, title),
    )
    return "\n\n".join(filter(None, parts))


def _memory(measured: Sequence[tuple[str, str]], results: Results) -> str:
    """What each decorrelated arm holds beside what plain training does: of (optimizer, arm)."""
    configs = {record.spec.arm: record.spec.config for record in results.records}
    settings, told = results.settings, []
    for opt in dict.fromkeys(opt for opt, _ in measured):
        arms = [arm for of, arm in measured if of == opt and arm != AT_PLAIN_RATE]
        held = {arm: _held(opt, configs[arm], settings) for arm in arms}
        told += [f"{opt}, {arm} {held[arm] - held[PLAIN]:.1f}" for arm in arms if arm != PLAIN]
    return f"R, L and their statistics take, in times the weights' memory: {'; '.join(told)}." if told else ""


def _held(opt: str, config: str | None, settings: dict[str, Any]) -> float:
    model = networks.create(settings["model"], 10, settings["generated"] or 32, settings["stem"])
    if config is not None:
        decorrelate(model, DecorConfig.from_json(config))
    kind = OPTIMIZERS[opt]
    optimizer = timm.optim.create_optimizer_v2(model, opt=kind.name, lr=1e-3, **kind.kwargs)
    if config is not None:
        attach(model, optimizer)
    return memory.held(model, optimizer, settings["generated"] or 32)


def _model(settings: dict[str, Any]) -> str:
    stem = " with the stem for small images" if settings["stem"] == "small" else ""
    return {"small_resnet": "a small ResNet (0.3 M parameters)"}.get(settings["model"], settings["model"]) + stem


def _images(settings: dict[str, Any]) -> str:
    return f"{_count(settings['images'])} images of {settings['data']}, {settings['epochs']:g} epochs"


def _count(number: int) -> str:
    return f"{number:,}".replace(",", " ")


def _conditions(results: Results, rows: Sequence[Row]) -> str:
    settings = results.settings
    model = _model(settings)
    shifts = f" and shifts by up to {settings['shift']} pixels" if settings["shift"] else ""
    used = sorted({record.session for record in results.records})
    machines = dict.fromkeys(_machine(results.sessions[index]) for index in used)
    versions = results.sessions[used[-1]]["versions"]
    return (
        f"{model[0].upper()}{model[1:]}; {_count(settings['images'])} training images of {settings['data']}, batch "
        f"{settings['batch_size']}, N = {settings['epochs']:g} epochs of {rows[0].steps} steps in all, flips{shifts}, "
        f"a linear warm-up over a tenth of the steps and a linear decay, "
        f"{'bfloat16 autocast' if settings['amp'] else 'float32'}, {len(rows[0].top1)} seeds. "
        f"Learning rates were chosen on {_count(settings['held_out'])} training images held out, on one grid for all "
        f"arms. "
        f"Measured on {'; '.join(machines)}; torch {versions['torch']}, timm {versions['timm']}."
    )


def _machine(session: dict[str, Any]) -> str:
    machine = session["machine"]
    if machine["accelerator"]:
        return str(machine["accelerator"])
    workers = f", {machine['workers']} runs at a time" if machine["workers"] > 1 else ""
    threads = "one thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    return f"{machine['processor']}, {threads} a run{workers}"


def _sentences(rows: Sequence[Row], results: Results) -> list[str]:
    """What the table says, in words; nothing is said that it does not show."""
    lines = []
    for row in rows:
        if row.is_target or row.opt != row.against:
            continue
        gain = row.mean - row.target
        text = f"- {row.opt}, {row.arm}: {abs(gain):.1f} points {'more' if gain >= 0 else 'less'} than plain after "
        text += f"{results.settings['epochs']:g} epochs"
        if row.budget and not row.unfinished:
            below = f" ({row.missed:g} of them fell short)" if row.missed else ""
            text += f"; plain's accuracy with {row.budget:g} of its steps{below}"
            if row.seconds_speedup:
                faster = tables.times(row.seconds_speedup)
                text += f" and {1 / row.seconds_speedup:.2f} of its seconds: {faster} as fast"
        elif not row.unfinished:
            text += "; plain's accuracy is not reached with as many steps"
        lines.append(text + ".")
    skipped = sum(record.skipped_refreshes for record in results.records)
    if skipped:
        lines.append(f"- {skipped} refreshes of R were skipped.")
    return ["\n".join(lines)] if lines else []


def step_cost(path: Path, draw: bool) -> str:
    """The table of step_cost.py, its conditions and its picture."""
    record = json.loads(path.read_text(encoding="utf-8"))
    picture = path.with_suffix(".png")
    if draw:
        pictures.step_cost_picture(record, picture)
    others = [  # arms beside the two that every result has, where some result has them
        (arm, title, order)
        for arm, title, order in (
            ("baseline", "the engine before, ms", "the engine before"),
            ("peer", "the authors' code, ms", "the authors' code"),
        )
        if any(arm in result["ratio"] for result in record["results"])
    ]
    has_peak = pictures.has_peaks(record)
    columns = [column for _, title, _ in others for column in (title, "ratio")]
    has_refresh = has_peak and all("refresh_peak_bytes" in result for result in record["results"])
    memories: tuple[str, ...] = ("held, MiB", "peak in a step, MiB") if has_peak else ("memory, MiB",)
    memories += ("and that refreshes, MiB",) if has_refresh else ()
    header = ("", "plain, ms", "decorrelated, ms", "ratio", *columns, *memories)
    rows = []
    for result in record["results"]:
        seconds, ratio = result["seconds"], result["ratio"]
        measured = [result["held_bytes"], *([result["peak_bytes"]] if has_peak else [])]
        memory = [" -> ".join(f"{size / 2**20:.0f}" for size in sizes.values()) for sizes in measured]
        if has_refresh:
            memory.append(f"{result['refresh_peak_bytes']['decorrelated'] / 2**20:.0f}")
        row = [pictures.case_text(result["case"]), _ms(seconds["plain"]), _ms(seconds["amortised"])]
        row.append(f"**{ratio['amortised']:.2f}**")
        for arm, _, _ in others:
            digits = 1 if arm == "peer" else 2
            row += [_ms(seconds[arm]), f"{ratio[arm]:.{digits}f}"] if arm in ratio else ["-", "-"]
        rows.append([*row, *memory])
    kind = "weights, buffers and optimizer state"
    if has_peak:
        kind += ", held; and at the highest point of a step's update, with gradients and temporaries but no activations"
    order = "".join(f", then {words}" for _, _, words in others)
    notes = dict.fromkeys(result["peer"] for result in record["results"] if result["peer"])
    text = (
        f"Measured on {_machine(record)}; medians of {len(record['results'][0]['blocks'])} alternating blocks "
        f"(the ratio's is that of the ratios within a block, so that a slow minute does not count), "
        f"a refresh every {record['config']['every']} steps. Memory is {kind}: plain, then decorrelated{order}."
    )
    if record.get("baseline"):
        text += f" The engine before is that of commit {record['baseline']}."
    if notes:
        text += f" The authors' public code {'; '.join(notes)}; it updates every R in every step."
    return "\n\n".join([text, markdown_table(header, rows), _image(picture, "a step's time against plain training's")])


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f}" if seconds > 0.02 else f"{seconds * 1e3:.2f}"


def budget_curve(path: Path, draw: bool) -> str:
    """budget_curve.py and recipe_study.py: accuracy over the budget, what that saves, and the picture."""
    found, costs = _curves(path)
    picture = path.with_suffix(".png")
    if draw:
        pictures.budget_curve_picture(found, costs, picture)
    return curve_pages.block(found, costs, picture.relative_to(ROOT))


def _curves(path: Path) -> tuple[list[Curve], dict[tuple[str, str], float]]:
    """Curves and costs of a step, of budget_curve.py or recipe_study.py, whose recipe has the result's name."""
    if path.parent.name == "budget_curve":
        return budgets.read(path, path.with_name(f"{path.stem}_tune.json"), budgets.SHORT_TUNED)
    recipe = read_mapping(str(ROOT / "recipes" / f"{path.stem}.yaml"), "recipe")
    record = json.loads(RECIPE_STEPS.read_text(encoding="utf-8"))
    costs = curve_pages.step_costs(record, recipe["img-size"], recipe["batch-size"])
    return curve_pages.of_recipe(_runs(path)), costs


def headline(folder: Path, draw: bool) -> str:
    """README's first table; what has not been measured has no row."""
    rows = []
    for what, name, opt, epochs in HEADLINES:
        path = folder / name
        if path.is_file() and (row := curve_pages.headline(what, opt, epochs, *_curves(path))):
            rows.append(row)
    return markdown_table(curve_pages.HEADLINE, rows)


def compare(path: Path, draw: bool) -> str:
    """The table of a `train.py --compare`, and its picture as that command draws it."""
    record = json.loads(path.read_text(encoding="utf-8"))
    sides = record["sides"]
    if draw:
        drawn = [Side(s["name"], s["model"], s["optimizer"], s["lr"], s["epochs"], s["history"]) for s in sides]
        names, config = " and ".join(side.name for side in drawn), record["config"]
        save_picture(drawn, path.with_name("compare.png"), f"{names} on {config['dataset']}, {config['opt']}")
    rows: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("learning rate", lambda s: f"{s['lr']:.3g}"),
        ("epochs, steps", lambda s: f"{s['epochs']}, {s['steps']}"),
        ("test top-1 accuracy, %", lambda s: f"{s['final_top1']:.2f}"),
        ("training loss of the last epoch", lambda s: f"{s['final_train_loss']:.3f}"),
        ("training time, s", lambda s: f"{s['train_seconds']:.0f}"),
        ("time per step, ms (median epoch)", lambda s: f"{s['seconds_per_step'] * 1e3:.0f}"),
        (
            "as accurate as the other's best after",
            lambda s: f"epoch {s['reach_epoch']}, {s['reach_seconds']:.0f} s" if s["reach_epoch"] else "-",
        ),
    ]
    header = ("", *(side["name"] for side in sides))
    table = markdown_table(header, [(label, *(cell(side) for side in sides)) for label, cell in rows])
    alt = "accuracy and loss of both, against steps and against seconds"
    return f"{table}\n\n{_image(path.with_name('compare.png'), alt)}"


def zoo(folder: Path, draw: bool) -> str:
    """Each family of zoo_study.py: plain and as its twin comes, at plain training's rate."""
    rows = []
    for family in FAMILIES:
        if found := _measured(folder, family):
            scores = [statistics.mean(found.arms[arm]) for arm in (PLAIN, DEFAULT_ARM)]
            how = f"{found.setting['opt']} at {found.lr:g}"
            of_each = " / ".join(_seeds(found.arms[arm]) for arm in (PLAIN, DEFAULT_ARM))
            gain = f"{found.verdict} ({found.gain:+.1f})"
            rows.append((f"decor_{family}: {FAMILIES[family]}", how, *(f"{s:.1f}" for s in scores), gain, of_each))
    header = ("family: member", "optimizer, learning rate", "plain, %", "decorrelated, %", "by default", "each seed")
    return markdown_table(header, rows)


def zoo_layers(folder: Path, draw: bool) -> str:
    """What to leave plain, by the engine before the scale: every arm at the best of its learning rates."""
    names = {"plain": "plain", "every layer": "every layer", "without *.se.*": "without gates"}
    names |= {"without depthwise": "without depthwise", "without *.se.*,depthwise": "without gates and depthwise"}
    rows = []
    for file in sorted(folder.glob("*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        asked, cells = record["arguments"], {}
        for arm in dict.fromkeys(run["arm"] for run in record["runs"]):
            by_lr: dict[float, list[float]] = {}
            for run in record["runs"]:
                if run["arm"] == arm:
                    by_lr.setdefault(run["lr"], []).append(run["top1"])
            cells[names[arm]] = f"{max(statistics.mean(scores) for scores in by_lr.values()):.1f}"
        kwargs = "".join(f", {key} {value}" for key, value in asked["model_kwargs"].items())
        what = f"{asked['model']}{kwargs} (seeds: {asked['seeds']}; lr {', '.join(f'{lr:g}' for lr in asked['lr'])})"
        rows.append((what, *(cells.get(name, "-") for name in names.values())))
    return markdown_table(("", *names.values()), rows)


def _measured(folder: Path, family: str) -> Measured | None:
    file = folder / f"{family}.json"
    return Measured.read(file) if file.is_file() else None


def _seeds(scores: Sequence[float]) -> str:
    return ", ".join(f"{score:.1f}" for score in scores)


def staged(folder: Path, draw: bool) -> str:
    """The project's own weights, a row a repository: what results.json says of each."""
    found = [
        [json.loads((file.parent / name).read_text(encoding="utf-8")) for name in ("config.json", "results.json")]
        for file in sorted(folder.glob("*/results.json"))
    ]
    rows = []
    # the most classes first: in the order in which `timm_decor.models.staged` takes them
    for config, results in sorted(found, key=lambda pair: -pair[0]["num_classes"]):
        scores, twin, training = results["evaluated"], results["twin"], results["training"]
        name = f"{config['architecture']}.{config['pretrained_cfg']['tag']}"
        size, final = config["pretrained_cfg"]["input_size"], training["final"]
        where = trained_on(results["starts"], final["steps"])
        base = ModelCard.load(folder / name / "README.md").data.base_model
        start = f" from {base.rpartition('.')[2]}" if base else ""
        rows.append(
            (
                f"[decor_{name}]({(folder / name / 'README.md').relative_to(ROOT).as_posix()})",
                f"{results['data']}, {config['num_classes']} classes, {size[-1]} px",
                f"{scores['param_count']:.1f}, {_gmacs(config, size):.2f}",
                f"{training['epochs']}{start}, {_time(final['seconds'])} on {where}",
                f"{scores['top1']:.2f}",
                f"{twin['final']['eval_top1']:.2f}" if twin else "-",
                "-" if scores.get("top5") is None else f"{scores['top5']:.2f}",
            )
        )
    header = ("weights", "data", "params (M), GMACs", "epochs, time", "top-1, %", "plain twin's", "top-5, %")
    return markdown_table(header, rows)


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


def _gmacs(config: dict[str, Any], input_size: Sequence[int]) -> float:
    """Multiplications and additions of one image's forward pass, in 10^9, as timm's tables count them."""
    with torch.device("meta"):
        model = plain_model(config).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, *input_size))
    return counter.get_total_flops() / 2e9


def lr_sensitivity(path: Path, draw: bool) -> str:
    """Held-out accuracy over the learning rate, from a tune file, and its picture."""
    results = Results.read(path)
    found = _rate_curves(results)
    picture = path.with_suffix(".png")
    if draw:
        pictures.lr_sensitivity_picture(found, picture)
    seeds = sorted({len(values) for points in found.values() for values in points.values()})
    settings = results.settings
    text = (
        f"{_model(settings)[0].upper()}{_model(settings)[1:]}, {_images(settings)}, {settings['steps']} steps; "
        f"top-1 on {_count(settings['held_out'])} training images held out, %, {' or '.join(map(str, seeds))} "
        f"seed{'s' * (seeds[-1] > 1)}; 1x is plain training's best."
    )
    table = markdown_table(*sensitivity.table(found))
    return "\n\n".join([text, table, _image(picture, "accuracy over the learning rate, plain and decorrelated")])


def _rate_curves(results: Results) -> sensitivity.Curves:
    return sensitivity.curves(results.records, results.settings["steps"])


def paper_rules(path: Path, draw: bool) -> str:
    """What the rules of the papers were tuned on: held-out accuracy by rule, `decor_lr` and learning rate."""
    results = Results.read(path)
    records = [record for record in results.records if record.spec.seed == 0]
    rates = sorted({record.spec.lr for record in records})
    first = (PLAIN, DEFAULT_ARM)
    arms = sorted({record.spec.arm for record in records}, key=lambda arm: (arm not in first, arm != PLAIN, arm))
    found = {(record.spec.arm, record.spec.lr): f"{record.final:.1f}" for record in records}
    header = ("arm", *(f"lr {rate:g}" for rate in rates))
    table = markdown_table(header, [(arm, *(found.get((arm, rate), "-") for rate in rates)) for arm in arms])
    tuned = [("sgd", arm) for arm in arms if all((arm, rate) in found for rate in rates)]
    return f"{table}\n\n{_memory(tuned, results)}"


def graft(folder: Path, draw: bool) -> str:
    """graft_study.py: what the scale does at plain training's own learning rate."""
    runs = [
        run for file in sorted(folder.glob("*.json")) for run in json.loads(file.read_text(encoding="utf-8"))["runs"]
    ]
    variants = [name for name in GRAFT_VARIANTS if any(run["variant"] == name for run in runs)]
    rows = []
    for opt, lr, steps in sorted({(run["opt"], run["lr"], run["steps"]) for run in runs}, reverse=True):
        cells = []
        for variant in variants:
            mine = [r["top1"] for r in runs if (r["opt"], r["steps"], r["variant"]) == (opt, steps, variant)]
            each = ", ".join(f"{value:.1f}" for value in mine)
            cells.append(f"{statistics.mean(mine):.1f} ({each})" if mine else "-")
        rows.append((opt, f"{lr:g}", str(steps), *cells))
    return markdown_table(("optimizer", "lr", "steps", *(GRAFT_VARIANTS[name] for name in variants)), rows)


def knobs(folder: Path, draw: bool) -> str:
    """knob_study.py: each knob at other values than its default, at plain training's own learning rate."""
    files = sorted(folder.glob("*.json"), reverse=True)
    runs = [(run["variant"], file.stem, run) for file in files for run in _runs(file)]
    return _crossed("knob", runs, first="default")


def muon(folder: Path, draw: bool) -> str:
    """muon_study.py: plain training, and changes of decorrelated SGD, over budgets."""
    found = [run for file in folder.glob("*.json") for run in _runs(file)]
    runs = []
    for run in sorted(found, key=lambda run: run["steps"]):
        name = run["variant"].replace("plain", f"plain {run['opt']}").replace("base", "decorrelated sgd")
        runs.append((name, f"{run['steps']} steps", run))
    return _crossed("", runs, first="decorrelated sgd")


def finetune(file: Path, draw: bool) -> str:
    """finetune_study.py: plain and decorrelated at plain training's rate, and how that rate was found."""
    runs = _runs(file)
    rows, tried = [], []
    for opt in dict.fromkeys(run["opt"] for run in runs):
        held = sorted((r["lr"], r["top1"]) for r in runs if (r["opt"], r["measured_on"]) == (opt, "held-out"))
        tried.append(f"{opt}: " + ", ".join(f"{lr:g} {top1:.1f}" for lr, top1 in held))
        for arm in dict.fromkeys(run["arm"] for run in runs):
            mine = [r for r in runs if (r["opt"], r["arm"], r["measured_on"]) == (opt, arm, "test")]
            if mine:
                scores = [r["top1"] for r in sorted(mine, key=lambda r: r["seed"])]
                loss, seconds = (statistics.mean(r[key] for r in mine) for key in ("train_loss", "seconds"))
                top1 = f"{statistics.mean(scores):.1f} ({_seeds(scores)})"
                rows.append((opt, arm, f"{mine[0]['lr']:g}", top1, f"{loss:.2f}", f"{seconds:.0f}"))
    header = ("optimizer", "arm", "lr", "test top-1, % (each seed)", "training loss", "seconds")
    table = markdown_table(header, rows)
    return f"{table}\n\nPlain training's rate, by held-out top-1 of one seed: {'; '.join(tried)}."


def _runs(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text(encoding="utf-8"))["runs"]


def _crossed(corner: str, runs: Sequence[tuple[str, str, dict[str, Any]]], first: str) -> str:
    """Mean top-1 and each seed's, from (row, column, run)."""
    columns = list(dict.fromkeys(column for _, column, _ in runs))
    found: dict[str, dict[str, list[float]]] = {}
    for name, column, run in sorted(runs, key=lambda entry: entry[2]["seed"]):
        found.setdefault(name, {}).setdefault(column, []).append(run["top1"])

    def cell(values: list[float]) -> str:
        each = f" ({', '.join(f'{value:.1f}' for value in values)})" if len(values) > 1 else ""
        return f"{statistics.mean(values):.1f}{each}" if values else "-"

    rows = [
        (f"`{name}`" if "=" in name else name, *(cell(found[name].get(column, [])) for column in columns))
        for name in sorted(found, key=lambda name: (name != first, name))
    ]
    return markdown_table((corner, *columns), rows)


def scaling(path: Path, part: str, draw: bool) -> str:
    """A table of scaling.py's files, or the picture of its counts, for a page of docs/."""
    if part == "measured":
        return scaling_pages.measured(json.loads(path.read_text(encoding="utf-8")))
    counts = scaling_pages.read(path)
    if part != "picture":
        return scaling_pages.TABLES[part](counts)
    picture = path.with_suffix(".png")
    if draw:
        pictures.scaling_picture(counts, picture)
    return _image(picture, "the busiest GPU's part of a refresh, and what a step takes more, over the number of GPUs")


HEADLINES = (  # network and data, result, optimizer, epochs
    ("small ResNet, CIFAR-10", "budget_curve/cifar10.json", "sgd", 2),
    ("small ResNet, CIFAR-10", "budget_curve/cifar10.json", "adamw", 2),
    ("small ResNet, CIFAR-10", "budget_curve/cifar10.json", "sgd", 8),
    ("small ResNet, CIFAR-10", "budget_curve/cifar10.json", "adamw", 8),
    ("small ResNet, CIFAR-10", "budget_curve/cifar10.json", "sgd", 16),
    ("small ResNet, CIFAR-10", "budget_curve/cifar10.json", "adamw", 16),
    ("ResNet-18, CIFAR-10 at 64 px", "recipe/cifar10_64px_resnet18.json", "sgd", 20),
    ("ResNet-18, Imagenette at 128 px", "recipe/imagenette_resnet18.json", "sgd", 20),
    ("ResNet-18, Imagenette at 128 px", "recipe/imagenette_resnet18.json", "adamw", 20),
)
GRAFT_VARIANTS = {
    "plain": "plain",
    "none": "decorrelated, without the scale",
    "network": "decorrelated",
    "layer": "a scale for each layer",
    "refresh": "measured on R's own batch",
}
MAKERS = {
    **{"lr_sensitivity": lr_sensitivity, "graft": graft, "knobs": knobs, "paper_rules": paper_rules},
    **{"headline": headline, "budget_curve": budget_curve, "recipe": budget_curve},
    **{"time_to_accuracy": time_to_accuracy, "step_cost": step_cost, "cifar10_resnet18": compare},
    "cifar10_64px_resnet18": compare,
    "cifar10_64px_regnety_002": compare,
    **{"zoo": zoo, "zoo_layers": zoo_layers, "muon": muon, "finetune": finetune, "staged": staged},
}

# All that a result's picture shows, by the kind of the result.
DRAWN: dict[str, Callable[[Path], Any]] = {
    "lr_sensitivity": lambda path: pictures.lr_sensitivity_data(_rate_curves(Results.read(path))),
    "budget_curve": lambda path: pictures.budget_curve_data(*_curves(path)),
    "recipe": lambda path: pictures.budget_curve_data(*_curves(path)),
    "time_to_accuracy": lambda path: pictures.time_to_accuracy_data(read_table(path)),
    "step_cost": lambda path: pictures.step_cost_data(json.loads(path.read_text(encoding="utf-8"))),
    "scaling": lambda path: pictures.scaling_data(scaling_pages.read(path)),
}


def _image(path: Path, alt: str) -> str:
    return f"![{alt}]({path.relative_to(ROOT).as_posix()})"


def _kind(name: str) -> str:
    """Which of `MAKERS` a result is for."""
    return "lr_sensitivity" if name.endswith("_tune.json") else name.split("/", 1)[0]


def block(name: str, draw: bool) -> str:
    """What stands between the marks of a result; its links are seen from the repository's root.

    Args:
        name: the file or folder in benchmarks/results; `staged` for the project's own weights, `headline` for what
            several files say in README's first table.
        draw: draw its picture, too.

    Raises:
        UserError: no script makes such a result.
    """
    kind = _kind(name)
    if kind not in (*MAKERS, "scaling"):
        raise UserError(f"<!-- results: {name} -->: not known here; a name begins with {', '.join(MAKERS)} or scaling")
    file, _, part = name.partition("#")
    path = {"staged": ROOT / "hub" / "staged", "headline": RESULTS}.get(kind, RESULTS / file)
    if not path.exists():
        return f"Not measured yet: there is no `{path.relative_to(ROOT).as_posix()}`.\n"
    if kind == "scaling":
        return scaling(path, part, draw) + "\n"
    return MAKERS[kind](path, draw) + "\n"


def filled(text: str, folder: Path, draw: bool) -> str:
    """A page with every table as the results have it; its links are seen from the page's folder."""

    def relative(link: re.Match[str]) -> str:
        return f"]({Path(os.path.relpath(ROOT / link[1], folder)).as_posix()})"

    def table(match: re.Match[str]) -> str:
        return match[1] + re.sub(r"\]\(([^():]+)\)", relative, block(match[2], draw)) + match[3]

    return MARKED.sub(table, text)


def stale_pictures(text: str) -> list[str]:
    """Pictures of a page's results that were drawn from other numbers."""
    stale = []
    for _, name, _ in MARKED.findall(text):
        name, _, part = name.partition("#")
        path, shown = RESULTS / name, DRAWN.get(_kind(name))
        if shown is None or part not in ("", "picture") or not path.exists():
            continue
        if pictures.stored_fingerprint(path.with_suffix(".png")) != pictures.fingerprint(shown(path)):
            stale.append(f"benchmarks/results/{name.removesuffix('.json')}.png")
    return stale


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, tell what is stale")
    parser.add_argument(
        "pages", nargs="*", type=Path, default=PAGES, help="default: README and those of docs that have tables"
    )
    args = parser.parse_args(argv)
    stale = []
    for page in args.pages:
        text = page.read_text(encoding="utf-8")
        home = (
            page.resolve().parent if page.resolve().is_relative_to(ROOT) else ROOT
        )  # a copy elsewhere is read as README is
        new = filled(text, home, draw=not args.check)
        if args.check:
            stale += [page.name] * (new != text) + stale_pictures(text)
        else:
            page.write_text(new, encoding="utf-8")
    if stale:
        raise UserError(f"not what benchmarks/results has: {', '.join(stale)}; run `make readme`")


if __name__ == "__main__":
    sys.exit(exit_code("readme_tables.py", main))
