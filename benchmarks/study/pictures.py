"""The benchmarks' pictures, made from result files alone. On an opaque white ground, so that a dark page shows them."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from study import cluster
from study.curve import AT_PLAIN_RATE, Curve
from study.presets import OPTIMIZERS
from study.protocol import Row
from study.sensitivity import Curves, plain_best
from study.training import PLAIN
from timm_decor.training.seeing.drawing import whole_ticks

INK = "#1f2328"
# told apart in print and by the colour-blind, by mark as well as colour
STYLES = {
    "plain": {"color": "#30638e", "marker": "s"},
    "decorrelated": {"color": "#d1495b", "marker": "o"},
    "rival": {"color": "#e0a100", "marker": "^"},
}
OTHERS = ({"color": "#4f9d69", "marker": "D"}, {"color": "#7b4fa3", "marker": "v"}, {"color": "#767676", "marker": "P"})
FINGERPRINT = "Source"  # a key that the PNG format knows


def fingerprint(data: Any) -> str:
    """What a picture was made of, in short: stands in its PNG, so that a stale picture can be told."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()[:16]


def stored_fingerprint(path: Path) -> str | None:
    """The fingerprint in a picture; None if there is no such picture."""
    from PIL import Image

    return str(Image.open(path).info.get(FINGERPRINT)) if path.is_file() else None


def time_to_accuracy_data(rows: Sequence[Row]) -> Any:
    """All that its picture shows."""
    return [[row.against, row.opt, row.arm, row.top1, row.cost, row.target, list(row.tried.items())] for row in rows]


def time_to_accuracy_picture(rows: Sequence[Row], path: Path, title: str) -> None:
    """Accuracy at the end of schedules of several lengths, against steps and against seconds; a column a target.

    A target that no other arm was trained for has none.
    """
    targets = list(dict.fromkeys(row.against for row in rows if not row.is_target)) or [rows[0].against]
    with _figure(2, len(targets), (max(6.5, 3.9 * len(targets) + 0.6), 6.6), title, sharey=True) as (figure, axes):
        for column, against in enumerate(targets):
            mine = [row for row in rows if row.against == against]
            for line, (axis, unit) in enumerate(zip(axes[:, column], ("steps", "seconds"), strict=True)):
                for row, style in zip(mine, _styles(mine), strict=True):
                    cost = 1.0 if row.is_target or unit == "steps" else statistics.median(row.cost or [float("nan")])
                    budgets = sorted(row.tried)
                    style["clip_on"] = False  # a mark at the end of an axis is a whole one
                    label = f"{row.opt}, {row.arm}"
                    axis.plot([b * cost for b in budgets], [row.tried[b] for b in budgets], label=label, **style)
                    axis.plot([cost] * len(row.top1), row.top1, ".", color=style["color"], markersize=4, alpha=0.6)
                axis.axhline(mine[0].target, color=STYLES["plain"]["color"], linestyle="--", linewidth=1)
                whole_ticks(axis.xaxis, 0, axis.dataLim.x1, 6)
                if line == 0:
                    axis.set_title(f"target: tuned {against}")
                axis.set_xlabel(f"training {unit}, in units of plain {against}'s")
                axis.tick_params(labelleft=True)  # of a shared axis as well
            _legend_below(axes[1, column])
        values = [value for row in rows for value in (*row.tried.values(), *row.top1)]
        whole_ticks(axes[0, 0].yaxis, min(values), max(values), 8)
        for axis in axes[:, 0]:
            axis.set_ylabel("test top-1 (%)")
        _save(figure, path, time_to_accuracy_data(rows))


def lr_sensitivity_data(curves: Curves) -> Any:
    """All that its picture shows."""
    return [[*key, list(points.items())] for key, points in curves.items()]


def lr_sensitivity_picture(curves: Curves, path: Path) -> None:
    """Accuracy over the learning rate in units of plain training's best: a panel an optimizer, the rival in each."""
    opts = [opt for opt in dict.fromkeys(opt for opt, _ in curves) if any(o == opt and a != PLAIN for o, a in curves)]
    rivals = {opt for opt, _ in curves} - set(opts)
    title = "Accuracy over the learning rate, as multiples of the plain optimizer's best"
    with _figure(1, len(opts), (4.6 * len(opts), 4.2), title, sharey=True) as (figure, axes):
        for axis, opt in zip(axes[0], opts, strict=True):
            for (other, arm), points in curves.items():
                rival = other not in opts
                if other != opt and not rival:
                    continue
                base = plain_best(curves, other)
                style = STYLES["rival" if rival else arm]
                xs = [lr / base for lr in points]
                means = [statistics.mean(values) for values in points.values()]
                axis.plot(xs, means, label=f"{other}, {arm}", linewidth=1.8, markersize=5, **style)
                for x, values in zip(xs, points.values(), strict=True):
                    axis.plot([x] * len(values), values, ".", color=style["color"], markersize=4, alpha=0.6)
            axis.set_xscale("log", base=2)
            ticks = sorted({lr / plain_best(curves, o) for o in (opt, *rivals) for lr in OPTIMIZERS[o].lrs})
            axis.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
            axis.set_title(f"{opt}; 1x is {plain_best(curves, opt):g}")
            axis.set_xlabel("learning rate")
            axis.tick_params(labelleft=True)
            _legend_below(axis)
        values = [value for points in curves.values() for values in points.values() for value in values]
        whole_ticks(axes[0, 0].yaxis, min(values), max(values), 8)
        axes[0, 0].set_ylabel("held-out top-1 (%)")
        _save(figure, path, lr_sensitivity_data(curves))


def budget_curve_data(curves: Sequence[Curve], costs: Mapping[tuple[str, str], float]) -> Any:
    """All that its picture shows."""
    return [[each.name, each.scores, costs[each.opt, each.role]] for each in curves]


def budget_curve_picture(curves: Sequence[Curve], costs: Mapping[tuple[str, str], float], path: Path) -> None:
    """Accuracy over the budget, in epochs and in seconds of plain SGD's; a panel an optimizer, the rival in each."""
    opts = list(dict.fromkeys(each.opt for each in curves if each.role != PLAIN))
    title = "Test accuracy over the budget"
    with _figure(2, len(opts), (4.6 * len(opts) + 0.4, 7.4), title, sharey=True) as (figure, axes):
        for column, opt in enumerate(opts):
            mine = [each for each in curves if each.opt == opt or each.opt not in opts]
            for line, (axis, unit) in enumerate(zip(axes[:, column], ("epochs", "seconds"), strict=True)):
                for each in mine:
                    kind = each.role if each.opt in opts else "rival"
                    style = OTHERS[0] if each.role == AT_PLAIN_RATE else STYLES[kind]
                    cost = costs[each.opt, each.role] / costs[opt, PLAIN] if unit == "seconds" else 1.0
                    xs = [epochs * cost for epochs in each.scores]
                    axis.plot(xs, list(each.means.values()), label=each.name, linewidth=1.8, markersize=5, **style)
                    for x, values in zip(xs, each.scores.values(), strict=True):
                        axis.plot([x] * len(values), values, ".", color=style["color"], markersize=4, alpha=0.6)
                axis.set_xscale("log", base=2)
                budgets = sorted({epochs for each in mine for epochs in each.scores})
                axis.set_xticks(budgets, [f"{epochs:g}" for epochs in budgets])
                axis.set_xlabel("epochs" if unit == "epochs" else f"seconds, in those of an epoch of plain {opt}")
                if line == 0:
                    axis.set_title(opt)
                else:
                    _legend_below(axis)
        for axis in axes[:, 0]:
            axis.set_ylabel("test top-1 (%)")
        _save(figure, path, budget_curve_data(curves, costs))


def _legend_below(axis: Any) -> None:
    """A panel's legend under its label, where no line is."""
    axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, fontsize=9)


def _styles(rows: Sequence[Row]) -> list[dict[str, Any]]:
    others = iter(OTHERS)
    found = []
    for row in rows:
        kind = "plain" if row.is_target else "rival" if row.arm == PLAIN else row.arm
        found.append({"linewidth": 1.8, "markersize": 5, **(STYLES.get(kind) or next(others))})
    return found


def step_cost_data(record: dict[str, Any]) -> Any:
    """All that its picture shows."""
    results = record["results"]
    memory = [[[result["held_bytes"], result["peak_bytes"]] for result in results]] if has_peaks(record) else []
    return [[result["case"], result["ratio"], result["blocks"]] for result in results] + memory


def has_peaks(record: dict[str, Any]) -> bool:
    """Whether step_cost measured peaks of memory; its first results on a CPU have none."""
    return all(result["peak_bytes"]["plain"] is not None for result in record["results"])


# an arm, its time among a result's, its style, what it is called
_COST_ARMS: tuple[tuple[str, str, dict[str, Any], str], ...] = (
    ("plain", "plain", STYLES["plain"], "plain"),
    ("decorrelated", "amortised", STYLES["decorrelated"], "decorrelated"),
    ("baseline", "baseline", OTHERS[0], "the engine before"),
    ("peer", "peer", STYLES["rival"], "the authors' public code"),
)


def step_cost_picture(record: dict[str, Any], path: Path) -> None:
    """A step's time in units of plain's, a row a combination, and beside it its memory where its peak is known."""
    results = record["results"]
    panels = 1 + has_peaks(record)
    height = 1.6 + 0.42 * len(results) * (1 + (panels > 1) / 2)  # memory has a line for each arm
    title = "A step's time" + (" and memory" if panels > 1 else "") + " against plain training's"
    with _figure(1, panels, (8.2 + 4 * (panels - 1), height), title, sharey=True) as (figure, axes):
        _draw_times(axes[0, 0], results)
        if panels > 1:
            _draw_memory(axes[0, 1], results)
        axes[0, 0].set_yticks(range(len(results)), [case_text(result["case"]) for result in results])
        axes[0, 0].set_ylim(len(results) - 0.5, -0.7)
        below = (0.5, -0.12 - 0.3 / height)
        axes[0, 0].legend(frameon=False, loc="upper center", bbox_to_anchor=below, ncols=3, fontsize=9)
        _save(figure, path, step_cost_data(record))


def _draw_times(axis: Any, results: Sequence[dict[str, Any]]) -> None:
    """Ratios; lines from the first to the third quartile of blocks."""
    for _, kind, style, label in _COST_ARMS[1:]:
        rows = [(i, result) for i, result in enumerate(results) if kind in result["ratio"]]
        if not rows:
            continue
        for i, result in rows:
            ratios = sorted(block[kind] / block["plain"] for block in result["blocks"])
            quarter = len(ratios) // 4
            axis.plot([ratios[quarter], ratios[-1 - quarter]], [i, i], color=style["color"], linewidth=2, alpha=0.5)
            offset = (0, -14) if kind == "baseline" else (0, 7)  # its mark is often beside ours
            axis.annotate(
                f"{result['ratio'][kind]:.2f}x", (result["ratio"][kind], i), offset, ha="center", fontsize=9,
                textcoords="offset points", color=INK, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )  # fmt: skip
        xs = [result["ratio"][kind] for _, result in rows]
        axis.plot(xs, [i for i, _ in rows], linestyle="", label=label, markersize=7, **style)
    axis.axvline(1, color=STYLES["plain"]["color"], linestyle="--", linewidth=1, label="plain")
    has_peer = any("peer" in result["ratio"] for result in results)
    if has_peer:
        axis.set_xscale("log")
        axis.set_xticks([1, 2, 5, 10, 20, 50], ["1x", "2x", "5x", "10x", "20x", "50x"])
        axis.minorticks_off()
    drawn = [kind for _, kind, _, _ in _COST_ARMS]
    largest = max(ratio for result in results for kind, ratio in result["ratio"].items() if kind in drawn)
    axis.set_xlim(0.9, max(largest, 1.2) * (1.3 if has_peer else 1.15))


def _draw_memory(axis: Any, results: Sequence[dict[str, Any]]) -> None:
    """A line an arm, from what is held between steps (the mark) to the peak within an update (the end)."""
    for i, result in enumerate(results):
        arms = [arm for arm in _COST_ARMS if arm[0] in result["held_bytes"]]
        for line, (name, _, style, _) in enumerate(arms):
            y = i + (line - (len(arms) - 1) / 2) * 0.2
            held, peak = (result[kind][name] / 2**20 for kind in ("held_bytes", "peak_bytes"))
            axis.plot([held, peak], [y, y], color=style["color"], linewidth=2, alpha=0.5)
            axis.plot([held], [y], markersize=5, **style)
            axis.plot([peak], [y], color=style["color"], marker="|", markersize=8)
    axis.set_xlim(left=0)
    axis.set_xlabel("MiB held (mark) and at an update's peak (end)")


_GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_OPTIMIZERS = {"sgd": STYLES["plain"], "adamw": STYLES["decorrelated"]}


def scaling_data(counts: Sequence[Mapping[str, Any]]) -> Any:
    """All that its picture shows: by model and optimizer a refresh's work, and by network what a step takes more."""
    shown = []
    for count in counts:
        if count["structure"] == "kronecker":
            busiest = [count["refresh"]["busiest"][str(n)] for n in _GPUS]
            added = {
                name: [sum(cluster.step(count, n, cluster.Machine(network=speed)).added) for n in _GPUS if n >= 8]
                for name, speed in cluster.NETWORKS.items()
            }
            shown.append([count["model"], count["opt"], busiest, added])
    return shown


def scaling_picture(counts: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The busiest process's part of a refresh over the number of GPUs, and what a step takes more; a column a model.

    Below is one optimizer a model: SGD for ResNets, AdamW for others.
    """
    shown = scaling_data(counts)
    models = list(dict.fromkeys(model for model, *_ in shown))
    networks: list[dict[str, Any]] = [STYLES["rival"], *OTHERS, STYLES["plain"]]
    title = "A refresh shared out, and what a step takes more (DDP; planned from counts, not measured)"
    with _figure(2, len(models), (3.4 * len(models) + 0.6, 7.4), title, sharey="row") as (figure, axes):
        for column, wanted in enumerate(models):
            upper, lower = axes[:, column]
            for model, opt, busiest, added in shown:
                if model != wanted:
                    continue
                flops = [each["flops"] / 1e9 for each in busiest]
                upper.plot(_GPUS, flops, label=opt, linewidth=1.8, markersize=5, **_OPTIMIZERS[opt])
                ideal = {"color": _OPTIMIZERS[opt]["color"], "linestyle": ":", "linewidth": 1}
                upper.plot(_GPUS, [flops[0] / n for n in _GPUS], **ideal)
                if opt == ("sgd" if "resnet" in model else "adamw"):
                    lower.set_xlabel(f"GPUs, eight a node ({opt})")
                    for (name, shares), style in zip(added.items(), networks, strict=True):
                        percent = [100 * share for share in shares]
                        lower.plot(
                            [n for n in _GPUS if n >= 8], percent, label=name, linewidth=1.8, markersize=4, **style
                        )
            upper.set_title(wanted, fontsize=10)
            upper.set_yscale("log")
            for axis in (upper, lower):
                axis.set_xscale("log", base=2)
                axis.set_xticks([1, 8, 64, 512], ["1", "8", "64", "512"])
                axis.set_xlim(0.8, 640)
                axis.tick_params(labelleft=True)
        axes[0, 0].set_ylabel("GFLOP a refresh, busiest GPU\n(dotted: 1/n)")
        axes[1, 0].set_ylabel("decorrelation, % of a plain step")
        axes[1, 0].set_ylim(bottom=0)
        axes[0, 0].legend(frameon=False, loc="upper left", bbox_to_anchor=(0.0, -0.12), ncols=2, fontsize=9)
        lines, names = axes[1, 0].get_legend_handles_labels()
        figure.legend(lines, names, frameon=False, loc="outside lower center", ncols=len(names), fontsize=9)
        _save(figure, path, shown)


def case_text(case: dict[str, Any]) -> str:
    """A combination of step_cost in words."""
    words = [case["model"], f"{case['img_size']} px, batch {case['batch_size']}", case["opt"], case["precision"]]
    return ", ".join([*words, *(["compiled"] if case["compile"] else [])])


class _figure:
    """A matplotlib figure in the house style, closed at the end."""

    def __init__(self, rows: int, columns: int, size: tuple[float, float], title: str, **options: Any) -> None:
        self.shape, self.size, self.title, self.options = (rows, columns), size, title, options

    def __enter__(self) -> tuple[Any, Any]:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        self.figure, axes = pyplot.subplots(
            *self.shape, figsize=self.size, squeeze=False, layout="constrained", facecolor="white", **self.options
        )
        self.figure.suptitle(self.title, fontsize=12, color=INK)
        for axis in axes.flat:
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        return self.figure, axes

    def __exit__(self, *error: object) -> None:
        from matplotlib import pyplot

        pyplot.close(self.figure)


def _save(figure: Any, path: Path, data: Any) -> None:
    metadata = {FINGERPRINT: fingerprint(data), "Software": None}
    figure.savefig(path, dpi=130, format="png", facecolor="white", metadata=metadata)
