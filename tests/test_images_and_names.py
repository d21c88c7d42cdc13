"""Every image is accounted for, and labels are matched by the names of their classes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_data import data_options, encoded, write_parquet
from training_runs import reset_accelerate

from timm_decor.errors import UserError
from timm_decor.training.data import loaders
from timm_decor.training.data.datasets import open_source, open_splits
from timm_decor.training.data.decoding import decode
from timm_decor.training.data.folders import Folder, read_class_map
from timm_decor.training.data.names import check_labels, numbered_as
from timm_decor.training.data.parquet import Parquet, ParquetColumns
from timm_decor.training.data.sources import Cached
from timm_decor.training.options import DataOptions, SplitOptions
from timm_decor.training.run import main
from timm_decor.training.validation import main as validate

NAMES = ("ant", "bee", "cat")
COLOURS = ((220, 30, 30), (30, 220, 30), (30, 30, 220), (220, 220, 30))


def coloured(label: int, seed: int) -> Image.Image:
    """A picture whose colour is its class."""
    noise = np.random.default_rng(seed).normal(0, 12, (16, 16, 3))
    return Image.fromarray(np.clip(np.array(COLOURS[label]) + noise, 0, 255).astype(np.uint8))


def folder(root: Path, names: tuple[str, ...] = NAMES, train: int = 12, val: int = 4) -> Path:
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(names):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                coloured(label % 4, i).save(root / split / name / f"{i}.png")
    return root


def opened(root: Path, split: str = "train", *words: str) -> Any:
    return open_source(data_options("--data-dir", str(root), *words), split, "RGB")


class TestFolders:
    def test_every_format_that_pillow_reads(self, tmp_path: Path) -> None:
        folder(tmp_path)
        for ending in (".bmp", ".webp", ".gif", ".tiff", ".JPG"):
            coloured(2, 0).save(tmp_path / "train" / "cat" / f"more{ending}")
        source = opened(tmp_path)
        assert len(source) == 3 * 12 + 5 and not source.notes
        assert np.bincount(source.labels).tolist() == [12, 12, 17]
        for i in range(len(source)):
            assert source.image(i).mode == "RGB"

    def test_the_label_is_the_first_folder_below_the_split(self, tmp_path: Path) -> None:
        folder(tmp_path)
        (tmp_path / "train" / "cat" / "part" / "ant").mkdir(parents=True)
        for file in (tmp_path / "train" / "cat").glob("*.png"):
            file.rename(file.parent / "part" / "ant" / file.name)
        source = opened(tmp_path)
        assert np.bincount(source.labels).tolist() == [12, 12, 12] and source.class_names == list(NAMES)

    def test_what_begins_with_a_dot_is_nobodys_image(self, tmp_path: Path) -> None:
        folder(tmp_path)
        (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
        (tmp_path / "train" / "ant" / ".ipynb_checkpoints").mkdir()
        for at in (tmp_path / "train" / "ant" / ".ipynb_checkpoints", tmp_path / "train" / ".ipynb_checkpoints"):
            coloured(0, 0).save(at / "0.png")
        coloured(0, 0).save(tmp_path / "train" / "ant" / "._0.png")
        assert len(opened(tmp_path)) == 36 and opened(tmp_path).class_names == list(NAMES)

    def test_what_is_left_out_is_counted(self, tmp_path: Path) -> None:
        folder(tmp_path)
        for i in range(3):
            (tmp_path / "train" / "ant" / f"{i}.txt").write_text("notes")
        coloured(0, 0).save(tmp_path / "train" / "stray.png")
        (tmp_path / "train" / "dog").mkdir()
        source = opened(tmp_path)
        assert source.notes == [
            f"{tmp_path / 'train'}: 3 files left out: '.txt' is no image format that Pillow reads",
            f"{tmp_path / 'train'}: 1 files left out: not in a class folder",
        ]
        assert source.class_names == list(NAMES), "timm counts no class without images"

    def test_numbers_are_sorted_as_numbers(self, tmp_path: Path) -> None:
        names = [str(i) for i in range(12)]
        source = opened(folder(tmp_path, tuple(names), 1, 1))
        assert source.class_names == names

    def test_they_are_numbered_as_timm_numbers_them(self, tmp_path: Path) -> None:
        from timm.data import create_dataset

        folder(tmp_path, ("B", "a", "a10", "a9", "n01", "n1b"), 1, 1)
        theirs = create_dataset("", root=str(tmp_path / "train")).reader
        ours = Folder(tmp_path, "train", "RGB")
        assert {name: i for i, name in enumerate(ours.class_names)} == theirs.class_to_idx
        assert [(ours.where(i), ours.label(i)) for i in range(len(ours))] == theirs.samples

    def test_a_class_map_that_does_not_fit_says_so(self, tmp_path: Path) -> None:
        folder(tmp_path / "data")
        (tmp_path / "map.txt").write_text("ant\nbee\nCat\n\n")
        source = opened(tmp_path / "data", "train", "--class-map", str(tmp_path / "map.txt"))
        assert len(source) == 24 and source.num_classes == 3
        assert "12 files left out: class map" in source.notes[0] and source.notes[0].endswith("has no 'cat'")
        assert "has no images of Cat" in source.notes[1]

    @pytest.mark.parametrize(
        ("text", "words"),
        [(b"ant\n\nbee\n", "line 2: an empty line"), (b"a\nb\na\n", "line 3: 'a' is there twice"), (b"\n", "is empty"),
         (b"\x80\x04}q\x00.", "is no text")],
    )  # fmt: skip
    def test_class_maps_that_are_refused(self, tmp_path: Path, text: bytes, words: str) -> None:
        (tmp_path / "map.txt").write_bytes(text)
        with pytest.raises(UserError, match=words):
            read_class_map(tmp_path / "map.txt")


class TestDecoding:
    def test_16_bits_keep_their_brightness(self, tmp_path: Path) -> None:
        values = np.array([[0, 256, 32768, 65535]], np.uint16).repeat(4, 0)
        for ending in (".png", ".tiff"):
            Image.fromarray(values).save(tmp_path / f"x{ending}")
            for mode in ("L", "RGB"):
                pixels = np.asarray(decode(tmp_path / f"x{ending}", mode))
                assert pixels[0].reshape(4, -1)[:, 0].tolist() == [0, 1, 128, 255]

    def test_pixels_without_a_scale_are_refused(self, tmp_path: Path) -> None:
        Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "x.tiff")
        with pytest.raises(ValueError, match="32 bits"):
            decode(tmp_path / "x.tiff", "RGB")

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif_turns_the_image(self, tmp_path: Path, orientation: int) -> None:
        from PIL import ImageOps

        exif = Image.Exif()
        exif[274] = orientation
        picture = coloured(0, 1).resize((16, 8))
        picture.save(tmp_path / "x.png", exif=exif)
        wanted = ImageOps.exif_transpose(Image.open(tmp_path / "x.png"))
        assert decode(tmp_path / "x.png", "RGB").size == ((16, 8) if orientation < 5 else (8, 16))
        assert np.array_equal(np.asarray(decode(tmp_path / "x.png", "RGB")), np.asarray(wanted))

    def test_damaged_exif_costs_nothing(self, tmp_path: Path) -> None:
        coloured(0, 0).save(tmp_path / "x.jpg", exif=b"Exif\x00\x00XX*\x00\xff\xff\xff\xff")
        assert decode(tmp_path / "x.jpg", "RGB").size == (16, 16)


class TestParquet:
    @staticmethod
    def named(path: Path, labels: list[int], names: list[str]) -> None:
        info = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = pa.table({"image": [encoded(i) for i in range(len(labels))], "label": labels})
        pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), path)

    def test_a_missing_shard_is_noticed(self, tmp_path: Path) -> None:
        write_parquet(tmp_path, "train-00001-of-00003.parquet", [encoded(0)], [0])
        with pytest.raises(UserError, match=r"2 of 3 files are missing: train-00000-of-00003\.parquet"):
            Parquet(tmp_path, "train", "RGB", ParquetColumns())

    def test_two_sets_for_one_split_are_refused(self, tmp_path: Path) -> None:
        write_parquet(tmp_path, "train-00000-of-00001.parquet", [encoded(0)], [0])
        write_parquet(tmp_path, "train.parquet", [encoded(0)], [0])
        with pytest.raises(UserError, match="more than one set"):
            Parquet(tmp_path, "train", "RGB", ParquetColumns())

    def test_splits_are_matched_by_name(self, tmp_path: Path) -> None:
        self.named(tmp_path / "train.parquet", [0, 1, 2, 0], ["ant", "bee", "cat"])
        self.named(tmp_path / "test.parquet", [0, 1, 2], ["cat", "bee", "ant"])
        train, test = open_splits(*_splits(tmp_path), "RGB")
        assert (train.class_names, test.class_names) == ([*NAMES], [*NAMES])
        assert [test.label(i) for i in range(3)] == test.labels.tolist() == [2, 1, 0]

    def test_files_are_numbered_as_classes_json_is(self, tmp_path: Path) -> None:
        self.named(tmp_path / "train.parquet", [0, 1, 1], ["bee", "ant"])
        (tmp_path / "classes.json").write_text('["ant", "bee", "cat"]')
        source = Parquet(tmp_path, "train", "RGB", ParquetColumns())
        assert source.labels.tolist() == [1, 0, 0] and source.num_classes == 3

    def test_a_class_that_the_other_side_lacks_is_refused(self, tmp_path: Path) -> None:
        self.named(tmp_path / "train.parquet", [0, 1], ["ant", "bee"])
        self.named(tmp_path / "test.parquet", [0, 1], ["ant", "been"])
        with pytest.raises(UserError, match="split test has class 'been', which split train has not; near: bee"):
            open_splits(*_splits(tmp_path), "RGB")
        self.named(tmp_path / "test.parquet", [0, 0], ["ant", "been"])
        assert open_splits(*_splits(tmp_path), "RGB")[1].labels.tolist() == [0, 0], "no image is of that class"

    @pytest.mark.parametrize("text", ["1", "null", "[1]", '{"a": 1}', "[" * 100_000, "\x00"])
    def test_classes_json_of_another_kind(self, tmp_path: Path, text: str) -> None:
        write_parquet(tmp_path, "train.parquet", [encoded(0)], [0])
        (tmp_path / "classes.json").write_text(text)
        with pytest.raises(UserError, match=r"classes\.json"):
            Parquet(tmp_path, "train", "RGB", ParquetColumns())

    def test_labels_out_of_range_are_seen_at_once(self, tmp_path: Path) -> None:
        write_parquet(tmp_path, "test.parquet", [encoded(i) for i in range(3)], [0, 7, 9])
        source = Parquet(tmp_path, "test", "RGB", ParquetColumns())
        with pytest.raises(UserError, match=r"image test\.parquet, row 1 \(1\.png\) has label 7, and 1 more; with 4"):
            check_labels(source, 4, "split test")
        check_labels(source, 10, "split test")


def _splits(root: Path) -> tuple[DataOptions, SplitOptions]:
    return data_options("--dataset", "parquet", "--data-dir", str(root)), SplitOptions("train", "test", None, None)


def test_two_classes_of_one_name_cannot_be_matched() -> None:
    source: Any = SimpleNamespace(class_names=["crane", "crane"], labels=np.array([0]))
    with pytest.raises(UserError, match="two classes 'crane'"):
        numbered_as(source, ["crane", "ant"], "split val", "x.safetensors")
    assert numbered_as(source, ["crane", "crane"], "a", "b") is source
    assert numbered_as(source, [], "a", "b") is source


def test_a_cache_keeps_its_limit(tmp_path: Path) -> None:
    root = folder(tmp_path)
    for i in range(12):  # the last class has the large ones
        coloured(2, i).resize((200, 200)).save(root / "train" / "cat" / f"{i}.png")
    source = opened(root)
    cached = Cached(source, limit=24 * 16 * 16 * 3 + 200 * 200 * 3 * 2)
    assert sum(pixels.nbytes for pixels in cached._kept) <= 24 * 16 * 16 * 3 + 200 * 200 * 3 * 2
    assert len(cached._kept) == 26 and len(cached) == 36
    for i in range(36):
        assert np.array_equal(np.asarray(cached.image(i)), np.asarray(source.image(i)))
        assert cached.label(i) == source.label(i)


class TestWorkers:
    def test_one_that_dies_is_one_line(self) -> None:
        def dying() -> Any:
            yield 1
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

        batches = loaders.told(dying())
        assert next(batches) == 1
        with pytest.raises(UserError, match="a data worker was ended from outside"):
            next(batches)

    def test_one_that_stands_still_is_not_waited_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Still(torch.utils.data.Dataset):
            def __len__(self) -> int:
                return 4

            def __getitem__(self, index: int) -> Any:
                import time

                time.sleep(20)

        loader = torch.utils.data.DataLoader(Still(), num_workers=1, timeout=1)
        with pytest.raises(UserError, match="gave nothing for"):
            list(loaders.told(loader))

    def test_other_errors_stay_what_they_are(self) -> None:
        def broken() -> Any:
            raise RuntimeError("CUDA error")
            yield

        with pytest.raises(RuntimeError, match="CUDA error"):
            next(loaders.told(broken()))


MODEL = ["--model", "test_resnet", "--img-size", "32", "-b", "12", "--device", "cpu", "-j", "0"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that knows ant, bee and cat by their colours."""
    root = tmp_path_factory.mktemp("trained")
    folder(root / "data")
    reset_accelerate()
    words = [*MODEL, "--epochs", "6", "--lr", "0.1", "--warmup-epochs", "0", "--no-aug", "--smoothing", "0"]
    main([*words, "--data-dir", str(root / "data"), "--output", str(root), "--experiment", "run"])
    return root


def score(capsys: pytest.CaptureFixture[str], data: Path, checkpoint: Path) -> float:
    reset_accelerate()
    capsys.readouterr()
    validate([*MODEL[2:], "--data-dir", str(data), "--checkpoint", str(checkpoint)])
    return float(json.loads(capsys.readouterr().out)["top1"])


class TestACheckpointKnowsItsClasses:
    def test_fewer_classes_are_matched_by_name(
        self, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        best = trained / "run" / "best.safetensors"
        assert score(capsys, trained / "data", best) == 100
        shutil.copytree(trained / "data", tmp_path / "data")
        for split in ("train", "val"):
            shutil.rmtree(tmp_path / "data" / split / "ant")
        assert score(capsys, tmp_path / "data", best) == 100, "bee is class 1, although here it would be class 0"

    def test_other_classes_are_refused(self, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder(tmp_path, ("ant", "bee", "eel"))
        with pytest.raises(UserError, match="split validation has class 'eel', which .*best.safetensors has not"):
            score(capsys, tmp_path, trained / "run" / "best.safetensors")

    def test_a_checkpoint_without_names_is_told(
        self, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from safetensors.torch import load_file

        save_file(load_file(trained / "run" / "best.safetensors"), tmp_path / "timms.safetensors")
        reset_accelerate()
        validate([*MODEL, "--data-dir", str(trained / "data"), "--checkpoint", str(tmp_path / "timms.safetensors")])
        seen = capsys.readouterr()
        assert "does not name its classes: they are taken to be numbered as the data are (0 ant, 1 bee" in seen.err
        assert json.loads(seen.out)["top1"] == 100

    def test_a_flipped_bit_is_seen(self, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        shutil.copytree(trained / "run", tmp_path / "run")
        file = tmp_path / "run" / "last.safetensors"
        data = bytearray(file.read_bytes())
        data[-100] ^= 1
        file.write_bytes(data)
        with pytest.raises(UserError, match=r"last\.safetensors is damaged, or was replaced"):
            score(capsys, trained / "data", file)

    def test_a_resume_on_other_classes_is_refused(self, trained: Path, tmp_path: Path) -> None:
        shutil.copytree(trained / "run", tmp_path / "run")
        for names, words in ((("ant", "bee", "eel"), "they lack cat and also have eel"),
                             (("ant", "bee", "zat"), "they lack cat and also have zat")):  # fmt: skip
            data = folder(tmp_path / words, names)
            reset_accelerate()
            with pytest.raises(UserError, match=words):
                main(["--resume", str(tmp_path / "run"), "--epochs", "7", "--data-dir", str(data)])


class TestTimmsWeights:
    """Names of pretrained weights are ImageNet's synsets."""

    def test_another_number_of_classes_is_refused(self, tmp_path: Path) -> None:
        """By the weights' own configuration, so for published tags and names on the Hub as well."""
        name = "decor_resnet18.whiten_cifar10_r64"
        with pytest.raises(UserError, match=f"weights of {name} know 10 classes, not --num-classes 7"):
            words = ["--model", name, "--pretrained", "--num-classes", "7", "--device", "cpu"]
            validate([*words, "--data-dir", str(folder(tmp_path)), "--split", "validation"])

    def test_a_folder_of_synsets_is_matched(self, tmp_path: Path) -> None:
        import timm

        from timm_decor.training.build import pretrained_names

        names = pretrained_names(timm.create_model("resnet18"))
        assert len(names) == 1000 and names[0] == "n01440764" and names[217] == "n02102040"
        source = opened(folder(tmp_path, ("n02102040", "n01440764"), 1, 1))
        assert sorted(numbered_as(source, names, "a", "b").labels.tolist()) == [0, 217]
