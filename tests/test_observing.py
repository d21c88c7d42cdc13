"""What is seen of a run: the record, the timed updates, trackers, and the page at its end."""

from __future__ import annotations

import html.parser
import json
import re
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file
from training_runs import DECOR, TINY, history, options, train

from timm_decor.errors import UserError
from timm_decor.training.run import parse
from timm_decor.training.seeing import charts, report, trackers
from timm_decor.training.seeing.clock import PHASES, StepClock
from timm_decor.training.seeing.compare import Side
from timm_decor.training.seeing.losswatch import LossWatch
from timm_decor.training.seeing.observe import Series, phase_times


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
        assert not re.search(r"""(?:src|href)=["'](?!#|data:)""", text), "nothing to fetch: it opens offline"
        assert "url(http" not in text and "#0a0" not in text and "var(--side1)" in text, "colours are the page's"

    def test_of_one_short_plain_run(self, tmp_path: Path):
        page = Page((train(tmp_path / "run", "--epochs", 1) / "report.html").read_text())
        assert page.tags.count("svg") == 5 and "Correlation of the layers' inputs" not in page.words
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
        context = {"config": {}, "versions": {}, "machine": {"gpu": None, "cpu": "a CPU", "processes": 1}}
        text = report.render(arms, "one and two", "train.py", context)
        assert "two: &lt;the loss&gt; is not finite" in text and "one is best in epoch 1 of 1: 50.00 %" in text
        assert Page(text).tags.count("svg") == 4

    def test_spikes_do_not_flatten_the_loss(self):
        bold = charts.Line([1, 2], [2.0, 1.0], 0)
        thin = charts.Line(list(range(1000)), [1.5] * 500 + [1e6] + [1.5] * 499, 0, faint=True)
        assert charts._limits([bold], [thin])[1] < 3


def test_the_extras_name_every_tracker():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert all(re.search(rf'^{name} = \["{name}>=', text, re.MULTILINE) for name in trackers.NAMES)
    assert set(parse([*TINY, "--log-with", *trackers.NAMES]).log_with) == set(trackers.NAMES)


def test_without_trackers_nothing_is_started(tmp_path: Path):
    accelerator = Accelerator(cpu=True)
    trackers.start(accelerator, options().watch, {}, tmp_path, ())
    assert accelerator.trackers == [] and not list(tmp_path.iterdir())
