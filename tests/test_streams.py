"""What is streamed: each image once an epoch, whatever the processes and workers, and the rest that a run promises."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chaos import final, same
from stream_files import CLASSES, LENGTHS, encoded, write_info, write_parquets, write_shards, write_tar
from test_kill_and_resume import stop_at
from torch import nn
from training_runs import DECOR, drawn_reports, history, options, reset_accelerate, train, untimed

from timm_decor.errors import Stopped, UserError, message
from timm_decor.training.data import shards as shards_module
from timm_decor.training.data import streams as streams_module
from timm_decor.training.data.datasets import open_source, open_splits
from timm_decor.training.data.loaders import WORKER_TIMEOUT, eval_loader, of_epoch, train_loader
from timm_decor.training.data.names import Renumbered
from timm_decor.training.data.progressive import Progression
from timm_decor.training.data.sources import read
from timm_decor.training.evaluate import evaluate
from timm_decor.training.keeping.privacy import without_paths
from timm_decor.training.run import parse
from timm_decor.training.runtime import make_accelerator

TOTAL = sum(LENGTHS)
CONFIG = {
    "input_size": (3, 8, 8), "mean": (0.0,) * 3, "std": (1 / 255,) * 3, "interpolation": "nearest", "crop_pct": 1.0,
    "crop_mode": "center",
}  # fmt: skip
STREAMED = shlex.split(
    "--train-split train --val-split validation --num-classes 3 --img-size 16 -b 8 --epochs 2 --dataset wds/ --data-dir"
)


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("tars"))


@pytest.fixture(scope="module")
def parquets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parquets(tmp_path_factory.mktemp("parquets"))


@pytest.fixture
def words(request: pytest.FixtureRequest) -> list[str]:
    """The arguments that name a data set, by the name of its fixture."""
    folder = request.getfixturevalue(request.param)
    return (
        ["--dataset", "wds/", "--data-dir", str(folder)]
        if request.param == "tars"
        else ["--dataset", f"hfids/{folder}"]
    )


BOTH = pytest.mark.parametrize("words", ["tars", "parquets"], indirect=True)


def loader(
    words: list[str], processes: int = 1, process: int = 0, workers: int = 0, training: bool = True, batch: int = 4,
    augmented: bool = False, non_blocking: bool = False,
) -> Any:  # fmt: skip
    """train.py's loader on one of several processes."""
    given = options(*([] if augmented else ["--no-aug"]), "-j", workers, "-b", batch, *words)
    source = open_source(given.data, "train", "RGB")
    here: Any = SimpleNamespace(
        num_processes=processes, process_index=process, device=torch.device("cpu"), non_blocking=non_blocking
    )
    if not training:
        return eval_loader(given.loader, source, CONFIG, CLASSES, given.seed, here)
    sizes = Progression.of(None, (3, 8, 8), 1)
    return train_loader(given.loader, given.augment, given.label, source, CONFIG, sizes, CLASSES, given.seed, here)


def greys(batches: Any) -> list[list[int]]:
    """Which images are in each batch: what they show is their number."""
    return [[int(pixels.round()) for pixels in images[:, 0, 0, 0]] for images, _ in batches]


def simulated(monkeypatch: pytest.MonkeyPatch, loader: Any, workers: int) -> list[list[int]]:
    """What so many workers give, without processes of their own."""
    stream = loader.dataset
    stream._lanes = workers
    each = []
    for number in range(workers):
        monkeypatch.setattr(streams_module, "get_worker_info", lambda number=number: SimpleNamespace(id=number))
        each.append(greys(stream))
    monkeypatch.undo()
    return [each[i % workers][i // workers] for i in range(sum(map(len, each)))]


class TestAnEpoch:
    @BOTH
    @pytest.mark.parametrize("processes", [1, 2, 3])
    @pytest.mark.parametrize("workers", [1, 2, 5])
    def test_has_each_image_once(self, words: list[str], processes: int, workers: int, monkeypatch: pytest.MonkeyPatch):
        """Six shards of 1 to 16 images; fewer than three processes of five workers have, too."""
        parts = [simulated(monkeypatch, loader(words, processes, n), workers) for n in range(processes)]
        steps = TOTAL // (4 * processes)
        assert [len(part) for part in parts] == [steps] * processes, "or a process would wait for the others for ever"
        seen = [grey for part in parts for batch in part for grey in batch]
        assert len(seen) == len(set(seen)) == 4 * steps * processes and set(seen) <= set(range(TOTAL))
        assert all(len(batch) == 4 for part in parts for batch in part)

    @BOTH
    def test_whatever_the_workers_are(self, words: list[str], monkeypatch: pytest.MonkeyPatch):
        """Two real ones."""
        real = loader(words, workers=2)
        assert len(real) == 10
        first = greys(of_epoch(real, 3, 0))
        assert sorted(sum(first, [])) == list(range(TOTAL))
        again = loader(words)
        of_epoch(again, 3, 0)
        assert simulated(monkeypatch, again, 2) == first, "a function of seed, epoch and workers"
        next(iter(of_epoch(real, 5, 0)))  # and left, as --find-lr does
        assert greys(of_epoch(real, 3, 3)) == first[3:], "where an epoch is gone on with"
        assert greys(of_epoch(real, 3, 9)) == first[9:]
        assert greys(of_epoch(real, 4, 0)) != first and sorted(sum(greys(of_epoch(real, 4, 0)), [])) == list(
            range(TOTAL)
        )

    def test_is_shuffled_by_shard_and_image(self, tars: Path):
        words = ["--dataset", "wds/", "--data-dir", str(tars)]
        order = sum(greys(of_epoch(loader(words), 0, 0)), [])
        assert order != sorted(order) and sum(b == a + 1 for a, b in zip(order, order[1:], strict=False)) < 10
        assert order != sum(greys(of_epoch(loader([*words, "--seed", "7"]), 0, 0)), [])

    def test_a_small_buffer_loses_nothing(self, tars: Path, monkeypatch: pytest.MonkeyPatch):
        made = loader(["--dataset", "wds/", "--data-dir", str(tars)])
        made.dataset._shards.shuffle_size = (3, 2)
        assert sorted(sum(greys(made), [])) == list(range(TOTAL))

    def test_drops_what_is_no_whole_step(self, tars: Path):
        made = [loader(["--dataset", "wds/", "--data-dir", str(tars)], 3, n, batch=6) for n in range(3)]
        left = [
            {*range(TOTAL)} - {*sum((sum(greys(of_epoch(it, epoch, 0)), []) for it in made), [])} for epoch in (0, 1)
        ]
        assert [len(images) for images in left] == [4, 4] and left[0] != left[1], "others in another epoch"

    def test_one_shard_begins_elsewhere_in_each_epoch(self, tmp_path: Path):
        """Or some images would never come, and each process would always have the same ones."""
        words = ["--dataset", "wds/", "--data-dir", str(write_shards(tmp_path, [20]))]
        made = [loader(words, 2, n, batch=6) for n in range(2)]
        seen = [[set(sum(greys(of_epoch(it, epoch, 0)), [])) for it in made] for epoch in range(12)]
        assert all(len(a | b) == 12 for a, b in seen), "each once"
        assert set().union(*(a | b for a, b in seen)) == set(range(20)), "what is left out is another one each time"
        assert set().union(*(a for a, _ in seen)) == set(range(20)), "and so is a process's part"

    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_resume_may_wait_for_what_it_leaves_out(self, tars: Path, workers: int):
        """All of it is read before the first batch: at the end of an epoch longer than a batch may take."""
        made = loader(["--dataset", "wds/", "--data-dir", str(tars)], workers=workers)
        for done, patience in ((9, 10), (0, 1), (3, 4)):
            resumed = of_epoch(made, 1, done)
            next(batches := iter(resumed))
            waits = getattr(resumed.base_dataloader._iterator, "_timeout", 0)
            assert waits == (patience * WORKER_TIMEOUT if workers else 0)
            for _ in batches:
                pass

    @BOTH
    def test_is_sent_without_a_wait_where_that_was_asked_for(self, words: list[str]):
        assert [loader(words, non_blocking=asked)._non_blocking for asked in (False, True)] == [False, True]

    def test_is_augmented_by_seed_and_epoch(self, tars: Path):
        made = loader(["--dataset", "wds/", "--data-dir", str(tars), "--reprob", "1"], augmented=True)
        one, two, other = ([*of_epoch(made, epoch, 0)] for epoch in (0, 0, 1))
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(one, two, strict=True))
        assert not any(torch.equal(a, b) for (a, _), (b, _) in zip(one, other, strict=True))


class TestEvaluation:
    @BOTH
    @pytest.mark.parametrize("processes", [1, 2, 3])
    def test_sees_each_image_once_and_knows_which(
        self, words: list[str], processes: int, monkeypatch: pytest.MonkeyPatch
    ):
        """Forty images in batches of seven: the last of them are made up of nothing on more than one process."""
        for workers in (1, 3):
            made = [loader(words, processes, n, training=False, batch=7) for n in range(processes)]
            for it in made:
                it.dataset._lanes = workers
            source = made[0].dataset.source
            steps = [simulated(monkeypatch, it, workers) for it in made]
            assert len({len(part) for part in steps}) == 1
            gathered = [grey for step in zip(*steps, strict=True) for batch in step for grey in batch]
            labels = (
                [label for n, it in enumerate(made) for _, each in it for label in each.tolist()]
                if workers == 1
                else []
            )
            assert labels.count(-1) == (len(gathered) - TOTAL if workers == 1 else 0)
            order = [int(read(source, i)[0].getpixel((0, 0))[0]) for i in range(len(source))]
            assert sorted(order) == list(range(TOTAL))
            kept = [grey for grey, real in zip(gathered, self.reality(made, workers, monkeypatch), strict=True) if real]
            assert kept == order

    @staticmethod
    def reality(made: list[Any], workers: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
        """Which of the gathered images are ones."""
        parts = []
        for it in made:
            each = []
            for number in range(workers):
                monkeypatch.setattr(streams_module, "get_worker_info", lambda number=number: SimpleNamespace(id=number))
                each.append([(labels >= 0).tolist() for _, labels in it.dataset])
            parts.append([each[i % workers][i // workers] for i in range(len(it.dataset))])
        monkeypatch.undo()
        return (real for step in zip(*parts, strict=True) for batch in step for real in batch)

    def test_counts_no_padding(self, tars: Path):
        reset_accelerate()
        accelerator = make_accelerator("cpu", False, "float16")
        made = loader(["--dataset", "wds/", "--data-dir", str(tars)], training=False, batch=7)
        made.dataset._processes, made.dataset._length = 2, 3  # the first of two
        both = [*made]
        made.dataset._process = 1
        both += [*made]
        assert sum(len(labels) for _, labels in both) == 42

        class Right(nn.Module):
            def forward(self, images: torch.Tensor) -> torch.Tensor:
                return 20 * nn.functional.one_hot(images[:, 0, 0, 0].round().long() % CLASSES, 6).float()

        seen: list[torch.Tensor] = []
        metrics = evaluate(Right(), both, accelerator, seen=seen)
        assert (metrics.images, metrics.top1, metrics.top5) == (TOTAL, 100.0, 100.0) and metrics.loss < 1e-6
        assert torch.cat(seen).shape == (TOTAL, 4) and torch.cat(seen)[:, 0].min() == 0


class TestRuns:
    def test_one_that_is_stopped_goes_on_with_the_same_bits(
        self, tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        more = "-j 2 --no-report-mistakes --decor --decor-every 2 --mixup 0.4 --reprob 0.5"
        words = [*STREAMED, str(tars), *shlex.split(more)]
        whole = train(tmp_path / "whole", *words)
        stop_at(monkeypatch, 3)
        with pytest.raises(Stopped):
            train(tmp_path / "run", *words)
        monkeypatch.undo()
        run = train(tmp_path / "run", *words, "--resume", str(tmp_path / "run"))
        assert same(final(run), final(whole)) and untimed(history(run)) == untimed(history(whole))

    def test_other_workers_within_an_epoch_are_refused(
        self, tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        words = [*STREAMED, str(tars), "--no-report-mistakes"]
        stop_at(monkeypatch, 2)
        with pytest.raises(Stopped):
            train(tmp_path / "run", *words)
        monkeypatch.undo()
        why = r"is of the middle of an epoch, with workers 1 \(here 3\): that can change only between epochs"
        with pytest.raises(UserError, match=why):
            train(tmp_path / "run", *words, "--resume", str(tmp_path / "run"), "-j", 3)

    def test_twins_and_the_report(self, tars: Path, tmp_path: Path):
        """--compare sees the same batches, and the report has its pictures."""
        words = [*STREAMED, str(tars), *DECOR, "--epochs", 1, "-b", 16]
        with drawn_reports():
            run = train(tmp_path / "run", *words, "--compare", "--compare-lr", "0", "--lr", "0")
        report = (run / "report.html").read_text()
        rows = [untimed(history(run / side))[0] for side in ("decorrelated", "plain")]
        assert rows[0] == pytest.approx(rows[1], rel=1e-5), "with a rate of zero the twins see and say the same"
        assert report.count("data:image/png;base64") >= 24 and f" of {TOTAL} images right" in report

    def test_on_the_hub_or_in_a_folder_of_parquet(self, parquets: Path, tmp_path: Path):
        words = shlex.split(
            "--train-split train --val-split test --img-size 16 -b 8 --epochs 1 --progressive-size 8:.5,16:.5"
        )
        with drawn_reports():
            run = train(tmp_path / "run", *words, "--dataset", f"hfids/{parquets}", "--train-num-samples", TOTAL)
        assert history(run)[0]["steps"] == 5 and "5 images right" in (run / "report.html").read_text()
        assert str(parquets) not in (run / "results.json").read_text() + (run / "report.html").read_text()


class TestWhatIsRead:
    def test_labels_and_classes_of_tars(self, tmp_path: Path):
        write_shards(tmp_path, (3, 2))
        (tmp_path / "classes.json").write_text('["cat", "dog", "emu"]')
        source = open_source(options("--dataset", "wds/", "--data-dir", tmp_path).data, "train", "L")
        assert (len(source), source.num_classes, source.class_names) == (5, 3, ["cat", "dog", "emu"])
        image, label = read(source, 4)
        assert (image.mode, image.getpixel((0, 0)), label) == ("L", 4, 1) and source.where(4) == "train-0001.tar, 00004"
        (tmp_path / "map.txt").write_text("c\na\nb\nd\n")
        words = [
            "--dataset",
            "wds/",
            "--data-dir",
            tmp_path,
            "--class-map",
            tmp_path / "map.txt",
            "--target-key",
            "other",
        ]
        source = open_source(options(*words).data, "train-{0000..0000}.tar", "RGB")
        assert (len(source), source.class_names, [source.label(i) for i in (2, 0)]) == (3, ["c", "a", "b", "d"], [3, 1])

    def test_classes_of_parquet_and_another_numbering(self, parquets: Path):
        given = options("--dataset", f"hfids/{parquets}", "--train-split", "train", "--val-split", "test")
        training, evaluation = open_splits(given.data, given.split, "RGB")
        assert (training.class_names, training.num_classes, len(evaluation)) == (["a", "b", "c"], 3, 5)
        assert evaluation.where(4) == "test-00000-of-00001.parquet, row 4" and evaluation.label(4) == (TOTAL + 4) % 3
        renumbered = Renumbered(training, ["c", "b", "a"], torch.tensor([2, 1, 0]).numpy())
        assert streams_module.shards_of(renumbered) is training and renumbered.label(3) == 2

    def test_without_info_shards_are_counted(self, tmp_path: Path):
        write_shards(tmp_path, (3, 2, 4))
        (tmp_path / "_info.json").unlink()
        given = options("--dataset", "wds/", "--data-dir", tmp_path)
        source = open_source(given.data, "train-{0000..0002}.tar", "RGB")
        assert len(source) == 9 and source.notes == [
            f"{tmp_path}, split train-{{0000..0002}}.tar: images counted in 3 shards; _info.json would save that"
        ]
        assert len(open_source(given.data, "train-{0001..0002}.tar|6", "RGB")) == 6

    def test_from_a_command(self, tars: Path):
        root = f"pipe:cat {tars}"
        source = open_source(options("--dataset", "wds/", "--data-dir", root).data, "train", "RGB")
        assert read(source, 20)[0].getpixel((0, 0))[0] == 20
        assert sorted(sum(greys(of_epoch(loader(["--dataset", "wds/", "--data-dir", root]), 0, 0)), [])) == [
            *range(TOTAL)
        ]

    def test_a_command_comes_from_the_command_line(self, tmp_path: Path):
        (tmp_path / "r.yaml").write_text("data-dir: 'pipe:touch x'")
        with pytest.raises(UserError, match="r.yaml: --data-dir is a command to run: give it on the command line"):
            parse(["-c", str(tmp_path / "r.yaml")])
        assert parse(["-c", str(tmp_path / "r.yaml"), "--data-dir", "pipe:cat x"]).data_dir == "pipe:cat x"

    def test_a_folder_in_the_name_stays_private(self):
        assert (
            without_paths("hfids//home/me/cats hfds//home/me/dogs hfids/me/cats")
            == "hfids/.../cats hfds/.../dogs hfids/me/cats"
        )


class TestWhatIsRefused:
    """In one line that names it."""

    def refused(self, *words: Any, split: str = "train", number: int | None = None) -> str:
        with pytest.raises(UserError) as error:
            open_source(options(*words).data, split, "RGB", number)
        text = message(error.value)
        assert "\n" not in text
        return text

    def test_what_is_not_there(self, tars: Path, parquets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        wds = ("--dataset", "wds/", "--data-dir")
        assert self.refused(*wds, tmp_path / "x") == f"data folder {tmp_path / 'x'} does not exist"
        assert self.refused("--dataset", "wds/") == "--dataset wds/ needs --data-dir"
        assert "split trian not found in info" in self.refused(*wds, tars, split="trian")
        write_shards(tmp_path / "w", (2, 2))
        (tmp_path / "w" / "train-0001.tar").unlink()
        assert self.refused(*wds, tmp_path / "w").endswith("w: 1 of 2 shards are missing: train-0001.tar")
        (tmp_path / "w" / "_info.json").unlink()
        assert self.refused(*wds, tmp_path / "w").endswith(
            "without one a split is a pattern of their names, as 'train-{0000..0009}.tar'"
        )
        assert self.refused("--dataset", f"hfids/{parquets}", split="val").endswith(
            "no such split; splits: train, test"
        )
        assert "has no column 'img'; its columns: image, label" in self.refused(
            "--dataset", f"hfids/{parquets}", "--input-key", "img"
        )
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert self.refused("--dataset", f"hfids/{tmp_path / 'none'}").startswith(
            f"cannot open hfids/{tmp_path}/none, split train: "
        )
        monkeypatch.setattr(shards_module, "find_spec", lambda name: None)
        assert self.refused(*wds, tars) == "--dataset wds/ needs webdataset: pip install 'timm-decor[data]'"
        assert "needs Hugging Face datasets: pip install 'timm-decor[data]'" in self.refused(
            "--dataset", f"hfids/{parquets}"
        )

    def test_counts_that_differ(self, tars: Path, parquets: Path, tmp_path: Path):
        wds = ("--dataset", "wds/", "--data-dir")
        assert (
            self.refused(*wds, tars, number=39) == "wds/, split train: it has 40 images, not the 39 that were asked for"
        )
        assert "it has 40 images, not the 41" in self.refused("--dataset", f"hfids/{parquets}", number=41)
        write_shards(tmp_path, (3, 2))
        write_info(tmp_path, (3, 2), total=6)
        assert self.refused(*wds, tmp_path).endswith("6 images are announced, and its shards have 5")
        (tmp_path / "_info.json").unlink()
        assert "4 images are announced, and its shards have 5" in self.refused(
            *wds, tmp_path, split="train-{0000..0001}.tar|4"
        )
        root = f"pipe:cat {tmp_path}"
        assert "how many images each shard has is not known" in self.refused(
            *wds, root, split="train-{0000..0001}.tar|5"
        )
        assert self.refused(*wds, tars, "--cache-images").startswith("--cache-images: what wds/ streams is not kept")

    @pytest.mark.parametrize("name", ["../x.tar", "/etc/x.tar", "a; touch x; .tar", "pipe:touch x.tar"])
    def test_names_that_are_none(self, name: str, tmp_path: Path):
        write_shards(tmp_path, (2,))
        info = (tmp_path / "_info.json").read_text().replace("train-0000.tar", name)
        (tmp_path / "_info.json").write_text(info)
        for root in (tmp_path, f"pipe:cat {tmp_path}"):
            assert self.refused("--dataset", "wds/", "--data-dir", root).endswith(f"'{name}' is no name of a shard")

    @pytest.mark.parametrize(
        "info, why",
        [
            ({"shard_lengths": [1, 1]}, "1 shards are named, with the lengths of 2"),
            ({"shard_lengths": [-2]}, "a shard of -2 images"),
            ({"shard_lengths": None}, "cannot open"),
            ({"filenames": 3}, "cannot open"),
            ([], "cannot open"),
        ],
    )
    def test_an_info_that_makes_no_sense(self, info: Any, why: str, tmp_path: Path):
        write_shards(tmp_path, (2,))
        file = tmp_path / "_info.json"
        given = json.loads(file.read_text())
        if isinstance(info, dict):
            given["splits"]["train"] |= info
        file.write_text(json.dumps(given if isinstance(info, dict) else info))
        assert why in self.refused("--dataset", "wds/", "--data-dir", tmp_path)

    @pytest.mark.parametrize(
        "lengths, why",
        [((3, 3, 4), "3 images and holds only 2"), ((3, 1, 4), "1 images and holds more")],
    )
    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_shard_of_another_length(self, lengths: tuple[int, ...], why: str, workers: int, tmp_path: Path):
        """It is told by the worker that comes to its end: nothing is left out in silence."""
        write_shards(tmp_path, (3, 2, 4))
        write_info(tmp_path, lengths)
        words = ["--dataset", "wds/", "--data-dir", str(tmp_path)]
        with pytest.raises(UserError) as error:
            list(loader(words, workers=workers, batch=1))
        assert message(error.value) == f"train-0001.tar should hold {why}: write _info.json anew"

    @pytest.mark.parametrize(
        "fields, why",
        [
            ({"png": b"junk", "cls": b"0"}, "cannot identify image file"),
            ({"png": encoded(1)[:45], "cls": b"0"}, "truncated|Truncated|broken"),
            ({"gif": encoded(1), "cls": b"0"}, r"no jpg or jpeg or png or webp \(--input-key\); it has gif, cls"),
            ({"png": encoded(1)}, r"no label in .cls \(--target-key\); it has png"),
            ({"png": encoded(1), "cls": b"cat"}, "invalid literal for int"),
            ({"png": encoded(1), "cls": b"-1"}, "has label -1: labels start at 0"),
            ({"png": encoded(1), "cls": b"3"}, "has label 3, but the model has 3 classes"),
        ],
    )
    def test_an_image_that_is_none_is_named(self, fields: dict[str, bytes], why: str, tmp_path: Path):
        good = {"png": encoded(0), "cls": b"0"}
        write_tar(tmp_path / "train-0000.tar", [("a", good), ("n01/b", fields), ("c", good), ("d", good)])
        write_info(tmp_path, (4,))
        with pytest.raises(UserError, match=f"image train-0000.tar, n01/b:? .*({why})"):
            list(loader(["--dataset", "wds/", "--data-dir", str(tmp_path)]))

    def test_a_file_that_is_no_tar(self, tmp_path: Path):
        write_shards(tmp_path, (4, 4))
        whole = (tmp_path / "train-0001.tar").read_bytes()
        for data in (b"junk" * 500, whole[: len(whole) // 3]):
            (tmp_path / "train-0001.tar").write_bytes(data)
            with pytest.raises(
                UserError, match=r"^(cannot read )?train-0001.tar(: | should hold 4 images and holds only \d)"
            ):
                list(loader(["--dataset", "wds/", "--data-dir", str(tmp_path)]))
