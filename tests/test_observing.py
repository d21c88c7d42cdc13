"""What is seen of a run: the record, the timed updates, trackers, and the page at its end."""

from __future__ import annotations

import base64
import html.parser
import io
import itertools
import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from legends import legends
from matplotlib.figure import Figure
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_kill_and_resume import stop_at
from torch import nn
from training_runs import DECOR, TINY, drawn_reports, history, options, train

import timm_decor
from timm_decor.errors import Stopped, UserError
from timm_decor.training import find_lr, results
from timm_decor.training.run import parse
from timm_decor.training.seeing import charts, plot, report, trackers
from timm_decor.training.seeing import watch as watch_module
from timm_decor.training.seeing.clock import PHASES, StepClock
from timm_decor.training.seeing.compare import Side
from timm_decor.training.seeing.drawing import STROKES, whole_ticks
from timm_decor.training.seeing.losswatch import LossWatch, NonFiniteLoss
from timm_decor.training.seeing.mistakes import Mistakes
from timm_decor.training.seeing.observe import Series, phase_times
from timm_decor.training.seeing.watch import EpochWatch

A_START = {"versions": {}, "machine": {"gpu": None, "cpu": "a CPU", "processes": 1, "torch_threads": 2}}


@pytest.fixture(scope="module", autouse=True)
def _drawn() -> Iterator[None]:
    with drawn_reports():
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison with TensorBoard's files, started with a path and a token in the environment."""
    folder = tmp_path_factory.mktemp("runs") / "seen"
    words = ["--epochs", 2, "--compare", "--compare-epochs", 1, "--log-interval", 2, "--log-with", "tensorboard"]
    return train(folder, *DECOR, *words)


class TestSeries:
    def test_it_keeps_evenly_spaced_rows_and_goes_on_where_it_was(self):
        whole, first = Series(8), Series(8)
        for number in range(37):
            whole.offer(lambda number=number: number)
        for number in range(20):
            first.offer(lambda number=number: number)
        second = Series(8)
        second.load(json.loads(json.dumps(first.state())))
        for number in range(20, 37):
            second.offer(lambda number=number: number)
        assert whole.rows == second.rows == [0, 8, 16, 24, 32]

    def test_a_row_that_is_not_kept_is_not_made(self):
        series, made = Series(4), []
        for number in range(100):
            series.offer(lambda number=number: made.append(number))
        assert len(made) < 20


class TestClock:
    def test_each_phase_gets_its_time_and_the_first_update_is_left_out(self):
        clock = StepClock(torch.device("cpu"), updates=5, handle=None)
        for number in clock.batches(iter(range(5))):
            time.sleep(0.02 * (number > 0))
            clock.lap("forward")
            clock.lap("backward")
            clock.lap("optimizer")
            clock.updated()
        assert 3 <= len(clock.watched) <= 4
        for row in clock.watched:
            seconds = dict(zip(PHASES, row[1:], strict=True))
            assert row[0] == 0 and seconds["forward"] > 0.015 and sum(seconds.values()) - seconds["forward"] < 0.015

    def test_it_does_not_ask_a_fused_optimizer_what_it_skipped(self):
        model = timm_decor.decorrelate(nn.Linear(4, 4))
        optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=True)
        handle, scaler = timm_decor.attach(model, optimizer), torch.amp.GradScaler("cpu", init_scale=2.0)
        clock = StepClock(torch.device("cpu"), 5, handle)
        for _ in range(3):
            scaler.scale(model(torch.ones(2, 4)).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            clock.updated()
        assert handle._not_made is not None and handle.begun == handle.step == 3

    def test_a_refresh_is_what_it_adds_spread_over_the_updates(self):
        plain, refreshing = [0.0, 0.001, 0.010, 0.020, 0.005], [1.0, 0.001, 0.014, 0.020, 0.021]
        times = phase_times([plain, plain, refreshing], every=10)
        assert times == pytest.approx({"data": 1, "forward": 10, "backward": 20, "optimizer": 5, "refresh": 2})
        assert phase_times([], every=10) is None and "refresh" not in phase_times([plain], every=10)


class TestRecord:
    def test_results_say_where_the_time_went(self, run: Path):
        results = json.loads((run / "decorrelated" / "results.json").read_text())
        assert set(results["ms_per_update"]) == {*PHASES, "refresh"}
        assert all(value >= 0 for value in results["ms_per_update"].values())
        assert results["peak_memory_bytes"] > 50 * 2**20
        assert all(0 <= row["correlation_after"] <= 1 for row in results["layers"])
        assert "refresh" not in json.loads((run / "plain" / "results.json").read_text())["ms_per_update"]

    def test_right_answers_of_hard_and_of_mixed_labels(self):
        watch = LossWatch(Accelerator(cpu=True), interval=1)
        output = torch.tensor([[3.0, 1, 0], [0, 2, 1], [0, 2, 1]])
        watch.see(torch.tensor(2.0), output, torch.tensor([0, 1, 2]), step=1)
        assert watch.figures() == pytest.approx((2.0, 200 / 3))
        watch.see(torch.tensor(4.0), output[:1], torch.tensor([[0.6, 0.4, 0]]), step=2)
        assert watch.totals() == pytest.approx((2.5, 75.0, 4))

    def test_training_accuracy(self, run: Path):
        rows = history(run / "decorrelated")
        assert all(0 < row["train_top1"] <= 100 and row["train_top1"] * 128 / 100 % 1 < 1e-3 for row in rows)

    def test_it_is_saved_with_the_run(self, run: Path):
        seen = torch.load(run / "decorrelated" / "resume.pt", weights_only=True)["observed"]
        steps = [row["step"] for row in seen["correlations"]["rows"]]
        assert steps[0] == 1 and len(steps) >= 2 and all((step - 1) % 3 == 0 for step in steps)
        assert len(seen["correlations"]["rows"][0]["before"]) == 16
        assert [row[0] for row in seen["curve"]["rows"]] == list(range(1, 9)), "every batch's loss, on a CPU"

    def test_a_resumed_run_goes_on_with_it(self, tmp_path: Path):
        run = train(tmp_path / "run", *DECOR, "--epochs", 1)
        train(run, "--resume", run, "--epochs", 2, base=[])
        seen = torch.load(run / "resume.pt", weights_only=True)["observed"]
        assert [row[0] for row in seen["curve"]["rows"]] == list(range(1, 9))

    def test_looking_changes_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        words = (*DECOR, "--epochs", 1, "--grad-accum-steps", 2, "--drop", 0.2)  # random numbers in the forward pass
        seeing = train(tmp_path / "seeing", *words)
        for name in (
            "observe.Observer.look",
            "observe.Observer.point",
            "clock.StepClock.lap",
            "display.Display.update",
        ):
            monkeypatch.setattr(f"timm_decor.training.seeing.{name}", lambda *_: None)
        blind = train(tmp_path / "blind", *words)
        mine, theirs = (load_file(folder / "last.safetensors") for folder in (seeing, blind))
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


class TestTrackers:
    def test_tensorboard_gets_batches_and_epochs_of_both_sides(self, run: Path):
        accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        events = accumulator.EventAccumulator(str(run / "timm_decor")).Reload()
        tags = events.Tags()["scalars"]
        for side in ("decorrelated", "plain"):
            assert {f"{side}/train/loss", f"{side}/train/lr", f"{side}/eval_top1", f"{side}/train_loss"} <= set(tags)
            logged = [event.value for event in events.Scalars(f"{side}/eval_top1")]
            assert logged == pytest.approx([row["eval_top1"] for row in history(run / side)])
        assert [event.step for event in events.Scalars("decorrelated/train/loss")] == [2, 4, 6, 8]
        assert "decorrelated/train/correlation_after" in tags and "plain/train/correlation_after" not in tags

    def test_its_configuration_is_the_published_one(self, run: Path):
        (file,) = run.glob("timm_decor/*/hparams.yml")
        config = yaml.safe_load(file.read_text())
        assert config["lr"] == 0.05 and "output" not in config and str(run.parent) not in file.read_text()

    @pytest.mark.parametrize("name", ["wandb", "trackio"])
    def test_others_without_a_network(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        pytest.importorskip(name)
        if name not in trackers.LOGGER_TYPE_TO_CLASS:
            with pytest.raises(UserError, match="this Accelerate is too old for it"):
                train(tmp_path / "run", "--epochs", 1, "--log-with", name)
            return
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("WANDB_SILENT", "true")
        monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
        run = train(tmp_path / "run", "--epochs", 1, "--log-with", name)
        assert (run / "report.html").exists()

    def test_one_that_is_missing(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(trackers, "find_spec", lambda name: None)
        with pytest.raises(
            UserError, match=r"^--log-with wandb: it is not installed: pip install 'timm-decor\[wandb\]'$"
        ):
            trackers.check_available(["wandb"])

    def test_names_add_up_and_none_takes_them_back(self, tmp_path: Path):
        (tmp_path / "r.yaml").write_text("log-with: [tensorboard, wandb]")
        recipe = ["-c", str(tmp_path / "r.yaml")]
        assert parse([*recipe, "--log-with", "trackio"]).log_with == ["tensorboard", "wandb", "trackio"]
        assert parse([*recipe, "--log-with", "none"]).log_with == []
        assert parse(["--log-with", "wandb", "--log-with", "tensorboard"]).log_with == ["wandb", "tensorboard"]
        with pytest.raises(UserError, match="invalid choice: 'mlflow'"):
            parse(["--log-with", "mlflow"])


class Page(html.parser.HTMLParser):
    """The page's elements, ids and visible words; complains about a tag that is not closed."""

    VOID = ("meta", "br", "img", "link", "hr", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())


class TestReport:
    def test_of_a_comparison(self, run: Path):
        text = (run / "report.html").read_text()
        page = Page(text)
        assert page.tags.count("svg") == 7, "accuracy twice, loss, learning rate, two heat maps, time"
        assert len(page.ids) == len(set(page.ids)), "charts do not share clip paths and markers"
        words = " ".join(page.words)
        for expected in (
            "layer1.0.conv1",
            "refresh",
            "seconds of training",
            "train.py",
            "timm_decor 0.",
            "--decor-every",
        ):
            assert expected in words
        assert "peak memory" not in words, "that of one process tells nothing of two models"
        assert not re.search(r"""(?:src|href)=["'](?!#|data:)""", text), "nothing to fetch: it opens offline"
        assert "url(http" not in text and "#0a0" not in text and "var(--side1)" in text, "colours are the page's"

    def test_of_one_short_plain_run(self, tmp_path: Path):
        page = Page((train(tmp_path / "run", "--epochs", 1, "--no-report-mistakes") / "report.html").read_text())
        assert page.tags.count("svg") == 5 and "Correlation of the layers' inputs" not in page.words
        assert "peak memory of the process, MiB" in page.words
        assert "img" not in page.tags and "What the best checkpoint gets wrong" not in page.words
        top1 = history(tmp_path / "run")[0]["eval_top1"]
        assert page.words.count(f"{top1:.4g}") >= 2, "a single point is told as a number"

    def test_of_two_where_one_never_got_anywhere(self):
        rows = [{"epoch": 1, "steps": 4, "epoch_seconds": 1.0, "seconds": 1.0, "lr": 0.1, "train_loss": 2.0}]
        rows[0] |= {"eval_top1": 50.0, "eval_loss": 1.5}
        nothing = {"curve": [], "correlations": [], "ms_per_update": None, "peak_memory_bytes": None}
        arms = [
            report.Seen(Side("one", "one", "sgd", 0.1, 1, rows), nothing, ()),
            report.Seen(Side("two", "two", "sgd", 0.1, 1, [], "two: <the loss> is not finite"), nothing, ()),
        ]
        context: dict[str, Any] = {"config": {}, **A_START, "starts": [{"steps": 0, **A_START}]}
        text = report.render(arms, "one and two", "train.py", context)
        averaged = {**rows[0], "ema_top1": 70.0, "ema_loss": 0.5}
        for metric, words in (
            ("ema_top1", "one is best in epoch 1 of 1: 70.00 % top-1 of the averaged weights"),
            ("eval_loss", "one is best by eval_loss in epoch 1 of 1: 50.00 % top-1"),
        ):
            side = Side("one", "one", "sgd", 0.1, 1, [averaged], metric=metric)
            told = report.render([report.Seen(side, nothing, ())], "title", "command", context)
            assert words in told and ("Evaluation top-1 of the averaged weights" in told) == metric.startswith("ema")
        assert "two: &lt;the loss&gt; is not finite" in text and "one is best in epoch 1 of 1: 50.00 %" in text
        assert Page(text).tags.count("svg") == 4

    def test_spikes_do_not_flatten_the_loss(self):
        bold = charts.Line([1, 2], [2.0, 1.0], 0)
        thin = charts.Line(list(range(1000)), [1.5] * 500 + [1e6] + [1.5] * 499, 0, faint=True)
        assert charts._limits([bold], [thin])[1] < 3


class TestChart:
    def test_both_of_two_equal_lines_are_seen(self):
        line = [0.1, 0.2, 0.1]
        svg = charts.lines("lr", "steps", [charts.Line([1, 2, 3], line, side) for side in (0, 1)])
        strokes = re.findall(r'<path d="M[^"]*"[^>]*style="([^"]*stroke: var\(--side\d\)[^"]*)"', svg)
        assert ["side0" in stroke for stroke in strokes] == [True, False], "the second is drawn over the first"
        widths = [float(re.search(r"stroke-width: ([\d.]+)", stroke)[1]) for stroke in strokes]
        assert widths[0] > 1.5 * widths[1] and ["dasharray" in stroke for stroke in strokes] == [False, True]
        assert STROKES[0]["markersize"] > 1.5 * STROKES[1]["markersize"], "nor does a mark cover the other's"
        many = charts.lines("lr", "steps", [charts.Line(list(range(30)), [0.1] * 30, 0)])
        assert "<use " in svg.split("legend")[0] and many.count("<use ") < svg.count("<use "), "batches have no marks"

    def test_an_axis_begins_and_ends_at_a_tick(self):
        axes = Figure().add_subplot()
        for low, high, integer in ((0, 66, True), (15.5, 94.9, False), (0, 2, True), (3.0, 3.0, False)):
            whole_ticks(axes.xaxis, low, high, 5, integer)
            ticks = axes.get_xticks()
            assert axes.get_xlim() == (ticks[0], ticks[-1]) and ticks[0] <= low <= high <= ticks[-1]
            assert 3 <= len(ticks) <= 7 and (not integer or all(tick == int(tick) for tick in ticks))

    def test_rows_of_a_heat_map_can_be_told_apart(self):
        """One layer sees pixels, and all others' correlations are small beside its own."""
        values = np.array([[0.7], [0.01], [0.02], [0.05], [math.nan]])
        names = ["a", "b", "c", "d", "_e"]
        svg = charts.heat_map("x", names, [1], values, charts.ratio_ticks(values))
        data = [base64.b64decode(found) for found in re.findall(r"base64,([^\"]+)", svg.replace("\n", ""))]
        drawn = [Image.open(io.BytesIO(each)).convert("RGBA") for each in data]
        picture = np.asarray(max(drawn, key=lambda image: image.height))  # not the scale
        shown = [picture[int((row + 0.5) * len(picture) / 5), 0].astype(int) for row in range(5)]
        for first, second in itertools.combinations(shown, 2):
            assert abs(first - second).sum() > 60
        assert [colour[3] for colour in shown].count(0) == 1, "what is not known has no colour"
        assert all(f">{name}<" in svg for name in names[:4])

    def test_a_scale_of_ratios(self):
        assert charts.ratio_ticks(np.array([0.034, 0.6])) == [0.02, 0.05, 0.1, 0.2, 0.5, 1]
        long = charts.ratio_ticks(np.array([0.0, math.nan, 1e-9, 0.9]))
        assert long == [0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1]
        for odd in ([math.nan], [0.0], [0.5], [1.0], [1e-12]):
            ticks = charts.ratio_ticks(np.array(odd))
            assert len(ticks) >= 2 and ticks == sorted(ticks)

    def test_of_very_many_layers_some_are_named(self):
        rows = [f"layers.{number}.of.a.very.deep.network.conv" for number in range(130)]
        svg = charts.heat_map("x", rows, [1, 2], np.full((130, 2), 0.1), [0.1, 0.2])
        assert svg.count(".of.a.very.deep.network.conv<") == 44
        assert charts.named_rows(rows) == "Every 3. layer is named."
        assert charts.named_rows(rows[:64]) == ""

    def test_a_legend_covers_no_line(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        rows = [{"steps": 9 * n, "seconds": n, "train_loss": 2 / n, "eval_top1": 30.0 * n} for n in (1, 2, 3)]
        sides = [Side(name, name, "sgd", 0.1, 3, rows) for name in ("decor_resnet18", "resnet18")]
        trials = [find_lr.Trial(lr, [2.0, 1.0 + lr], 2) for lr in (0.1, 0.2)]
        assert legends(monkeypatch, lambda: plot.save_picture(sides, tmp_path / "c.png", "both")) == 1
        searches = [find_lr.Search(side.name, trials) for side in sides]
        assert legends(monkeypatch, lambda: find_lr.save_picture(searches, tmp_path / "f.png", "both")) == 1


class TestMistakes:
    def test_they_are_the_best_checkpoints(self, tmp_path: Path, capsys: pytest.CaptureFixture):
        """Of averaged weights where those were judged, read from their file when the run ends, also after a resume."""
        run = train(tmp_path / "run", "--epochs", 2, "--model-ema", "--model-ema-decay", 0.5)
        best = run / "best-ema.safetensors"
        counts, epoch = matrix(run), json.loads((run / "results.json").read_text())["best"]["epoch"]
        assert counts.sum() == 70 and counts.sum(1).tolist() == [7] * 10, "rows are classes"
        top1 = max(row["ema_top1"] for row in history(run))
        assert 100 * np.trace(counts) / 70 == pytest.approx(top1)
        text = (run / "report.html").read_text()
        assert f"best-ema.safetensors, after epoch {epoch}: {np.trace(counts)} of 70 images right" in text
        with safe_open(best, "pt") as file:
            weights, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
        weights["fc.weight"].zero_()
        weights["fc.bias"].copy_(torch.arange(10) == 3)
        save_file(weights, best, metadata)
        (run / "results.json").unlink()
        train(run, "--resume", run, base=[])
        assert matrix(run)[:, 3].tolist() == [7] * 10 and matrix(run).sum() == 70
        best.unlink()
        (run / "results.json").unlink()
        capsys.readouterr()
        train(run, "--resume", run, base=[])
        assert "the report does without mistakes: no checkpoint file" in capsys.readouterr().err
        assert (run / "results.json").exists() and "gets wrong" not in (run / "report.html").read_text()

    def test_of_both_sides_with_their_worst_images(self, run: Path):
        page = Page((run / "report.html").read_text())
        assert page.tags.count("img") == 2 * 12 and page.tags.count("figure") == 2 * 12
        losses = [float(word.split("loss ")[1]) for word in page.words if re.search(r"\d+\xa0%, loss [\d.]+$", word)]
        assert len(losses) == 24
        for side in (losses[:12], losses[12:]):
            assert side == sorted(side, reverse=True)
        assert [matrix(run, side).sum() for side in (0, 1)] == [70, 70]

    def test_of_many_classes_the_pairs(self):
        counts = np.diag(np.full(200, 8))
        counts[3, 7], counts[9, 1], counts[9, 2] = 5, 2, 0
        names = [f"class <{number}>" for number in range(200)]
        text = page_of(Mistakes("best.safetensors", 2, names, counts, []))
        rows = re.findall(r"<tr><td>class &lt;(\d+)&gt;</td><td class=\"text\">class &lt;(\d+)&gt;</td>(.*)</tr>", text)
        assert [row[:2] for row in rows] == [("3", "7"), ("9", "1")]
        assert rows[0][2] == "<td>5</td><td>38 % of 13</td>" and 'matrix">' not in text

    def test_an_image_is_shown_with_what_it_was_taken_for(self):
        class Images:
            class_names, labels, notes, num_classes = ["cat", "<dog>"], None, [], 2

            def image(self, index: int) -> Image.Image:
                return Image.new("RGB", (500, 250), (0, 0, 50 * index))

            def label(self, index: int) -> int:
                return index % 2

        seen = np.array([[0, 0, 0.1, 0.9], [1, 0, 4.0, 0.98], [0, 0, 0.6, 0.55]])
        mistakes = Mistakes.of("best.safetensors", None, Images(), seen, 2)
        assert [wrong.index for wrong, _ in mistakes.worst] == [1, 2, 0]
        pictures = [Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))) for _, url in mistakes.worst]
        assert {picture.size for picture in pictures} == {(128, 64)} and pictures[0].getpixel((9, 9))[2] > 40
        words = " ".join(Page(page_of(mistakes)).words)
        assert re.search(r"<dog> +taken for +cat +98\xa0%, loss 4.00", words)
        assert re.search(r"cat +right +55\xa0%", words)


class TestStopped:
    """A run that does not come to its end has its report all the same."""

    def test_a_comparison_and_its_resume(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        stop_at(monkeypatch, 18)  # both have an epoch, one is in its second
        words = (*DECOR, "--epochs", 2, "--compare")
        with pytest.raises(Stopped):
            train(tmp_path / "run", *words)
        monkeypatch.undo()
        text = (tmp_path / "run" / "report.html").read_text()
        page = Page(text)
        assert "Not finished: decorrelated test_resnet 1 of 2 epochs and test_resnet 1 of 2 epochs." in page.words
        assert page.tags.count("svg") >= 6 and "points above" not in text and str(tmp_path) not in text
        assert "What the best checkpoint gets wrong is looked at when the run ends." in page.words
        assert not list((tmp_path / "run").rglob("results.json")) and not (tmp_path / "run" / "compare.md").exists()
        train(tmp_path / "run", *words, "--resume", "auto")
        text = (tmp_path / "run" / "report.html").read_text()
        assert "Not finished" not in text and matrix(tmp_path / "run", 1).sum() == 70

    def test_one_that_diverges(self, tmp_path: Path):
        with pytest.raises(NonFiniteLoss):
            train(tmp_path / "run", "--epochs", 2, "--lr", 1e30)
        text = (tmp_path / "run" / "report.html").read_text()
        assert "Not finished: test_resnet 0 of 2 epochs." in text and "loss is not finite in epoch 1" in text

    def test_before_the_first_step_there_is_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        stop_at(monkeypatch, 1)
        with pytest.raises(Stopped):
            train(tmp_path / "run", "--epochs", 1)
        assert not (tmp_path / "run" / "report.html").exists()

    def test_in_its_last_look_it_is_not_finished(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        def stopped(*_: object) -> None:
            raise Stopped(15, "")

        monkeypatch.setattr(results, "find_mistakes", stopped)
        with pytest.raises(Stopped):
            train(tmp_path / "run", "--epochs", 1)
        assert "Not finished: test_resnet 1 of 1 epochs." in (tmp_path / "run" / "report.html").read_text()
        monkeypatch.undo()
        train(tmp_path / "run", "--epochs", 1, "--resume", "auto")
        assert matrix(tmp_path / "run").sum() == 70 and (tmp_path / "run" / "results.json").exists()


def matrix(run: Path, side: int = 0) -> np.ndarray:
    """The confusion matrix on a run's page."""
    table = re.findall(r'<table class="matrix">(.*?)</table>', (run / "report.html").read_text(), re.DOTALL)[side]
    rows = table.split("<tr>")[1:]
    return np.array([[int(n or 0) for n in re.findall(r"<td[^>]*>(\d*)</td>", row)] for row in rows if "<td" in row])


def page_of(mistakes: Mistakes) -> str:
    """A page about one evaluated epoch and these mistakes."""
    row = {"epoch": 1, "steps": 4, "epoch_seconds": 1.0, "seconds": 1.0, "lr": 0.1, "train_loss": 2.0}
    row |= {"eval_top1": 50.0, "eval_loss": 1.5}
    nothing = {"curve": [], "correlations": [], "ms_per_update": None, "peak_memory_bytes": None}
    seen = report.Seen(Side("one", "one", "sgd", 0.1, 1, [row]), nothing, (), mistakes)
    context: dict[str, Any] = {"config": {}, **A_START, "starts": [{"steps": 0, **A_START}]}
    return report.render([seen], "one", "train.py", context)


def test_the_extras_name_every_tracker():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert all(re.search(rf'^{name} = \["{name}>=', text, re.MULTILINE) for name in trackers.NAMES)
    assert set(parse([*TINY, "--log-with", *trackers.NAMES]).log_with) == set(trackers.NAMES)


def test_without_trackers_nothing_is_started(tmp_path: Path):
    accelerator = Accelerator(cpu=True)
    trackers.start(accelerator, options().watch, {}, tmp_path, ())
    assert accelerator.trackers == [] and not list(tmp_path.iterdir())


def test_the_side_that_came_so_far_is_shown(tmp_path: Path) -> None:
    """One of two diverges before its first evaluation: the page has the other's result."""
    with pytest.raises(UserError, match="loss"):
        train(tmp_path / "run", *DECOR, "--compare", "--lr", "1e25", "--compare-lr", 0.05, "--epochs", 1)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<p>test_resnet is best in epoch 1 of 1" in page and "was not evaluated" not in page
    assert re.search(r"<td>best top-1 accuracy, %</td><td>-</td><td>[\d.]+</td>", page)
    assert "--compare-lr" in page and "--grad-accum-steps" not in page and "--amp" not in page


def test_a_pause_is_none_of_an_epochs_time(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = EpochWatch.__new__(EpochWatch)
    watch._start, watch._spent, watch._observer = 0.0, 0.0, SimpleNamespace(spent=1.0)
    watch._progress, watch._device = SimpleNamespace(seconds=0.0), torch.device("cuda")
    now = 3.0

    def synchronize(device: torch.device) -> None:
        nonlocal now
        now += 7 if device.type == "cuda" else 0  # what the device had still to do is of the epoch's time

    monkeypatch.setattr(watch_module, "synchronize", synchronize)
    monkeypatch.setattr(watch_module, "time", SimpleNamespace(perf_counter=lambda: now))
    with watch.paused():
        assert watch._progress.seconds == 10 - 1
        now += 5
    now += 5
    assert watch.seconds == 20 - 5 - 1
