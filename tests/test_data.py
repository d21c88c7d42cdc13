"""Data: which images, in which order, with which random numbers, and what is said when something is wrong."""

from __future__ import annotations

import io
import json
import random
import struct
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from training_runs import options, reset_accelerate, training_batches

from timm_decor.errors import UserError, message
from timm_decor.training.args import validate_parser
from timm_decor.training.data.datasets import open_source
from timm_decor.training.data.digits import Digits
from timm_decor.training.data.loaders import eval_loader, of_epoch
from timm_decor.training.data.parquet import Parquet, ParquetColumns
from timm_decor.training.data.progressive import Progression
from timm_decor.training.data.sources import Cached, read, rows_of, split_of, whole_label
from timm_decor.training.options import DataOptions
from timm_decor.training.runtime import make_accelerator

CONFIG = {
    "input_size": (3, 32, 32),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.25, 0.25, 0.25),
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "crop_mode": "center",
}


def picture(seed: int, size: int = 12) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8))


def encoded(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(folder: Path, name: str, images: list[bytes | None], labels: list[int | None], **extra: list) -> None:
    rows = [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(images)]
    pq.write_table(pa.table({"image": rows, "label": labels, **extra}), folder / name)


def data_options(*words: str) -> DataOptions:
    return DataOptions.of(validate_parser().parse([*words]))


def batches(*words: str, epoch: int = 0, workers: int = 0, batch: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    loader = training_batches(options("-j", workers, *words), CONFIG)
    loader.set_epoch(epoch)
    loader.dataset.set_epoch(epoch)
    return [(images.clone(), labels.clone()) for images, labels in loader]


def equal(a: list[tuple[torch.Tensor, torch.Tensor]], b: list[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True)
    )


class TestDigits:
    def test_the_split_is_complete_and_stratified(self):
        train, test = Digits("train", "L"), Digits("validation", "L")
        assert len(train) + len(test) == 1797
        for digit in range(10):
            in_train = sum(train.label(i) == digit for i in range(len(train)))
            in_test = sum(test.label(i) == digit for i in range(len(test)))
            assert abs(in_test / (in_train + in_test) - 0.2) < 0.01

    def test_no_row_is_in_both_splits(self):
        from sklearn.datasets import load_digits

        pixels = np.concatenate([Digits(split, "L")._pixels for split in ("train", "test")]).reshape(-1, 64)
        everything = np.round(load_digits().images * (255 / 16)).astype(np.uint8).reshape(-1, 64)
        assert sorted(map(bytes, pixels)) == sorted(map(bytes, everything))

    def test_pixels_span_the_whole_range_in_both_modes(self):
        for mode, shape in (("L", (8, 8)), ("RGB", (8, 8, 3))):
            pixels = np.stack([np.asarray(Digits("test", mode).image(i)) for i in range(50)])
            assert pixels.shape[1:] == shape and pixels.min() == 0 and pixels.max() == 255

    def test_unknown_split_is_refused(self):
        with pytest.raises(UserError, match="no split 'tset'; near: test"):
            Digits("tset", "L")


class TestProgressiveSize:
    @pytest.mark.parametrize(
        ("text", "epochs", "expected"),
        [
            ("48:0.4,64:0.6", 10, [48] * 4 + [64] * 6),
            ("16:0.2,24:0.3,32:0.5", 10, [16] * 2 + [24] * 3 + [32] * 5),
            ("48:0.4,64:0.6", 1, [64]),
            ("48:0.6,64:0.4", 1, [48]),
            ("16:0.1,24:0.1,32:0.8", 3, [24, 32, 32]),  # shares that come to no epoch are passed over
            (None, 3, [32] * 3),
        ],
    )
    def test_sizes_by_epoch(self, text: str | None, epochs: int, expected: list[int]):
        progression = Progression.of(text, (3, 32, 32), epochs)
        assert [progression.input_size(epoch) for epoch in range(epochs)] == [(3, size, size) for size in expected]
        assert progression.input_size(epochs + 5)[-1] == expected[-1], "a cool-down has the last size"
        assert [progression.work(e) for e in range(epochs)] == [(size / max(expected)) ** 2 for size in expected]

    def test_batches_have_them_whatever_the_workers(self):
        words = ["--progressive-size", "16:0.5,24:0.5", "--epochs", "2", "--color-jitter", "0.4"]
        for workers in (0, 1):
            loader = training_batches(options(*words, "-j", workers), CONFIG)
            for epoch, size in enumerate((16, 24)):  # a worker outlives its epoch
                loader.set_epoch(epoch)
                loader.dataset.set_epoch(epoch)
                seen = [(images.clone(), labels.clone()) for images, labels in loader]
                assert {tuple(images.shape[1:]) for images, _ in seen} == {(3, size, size)}
                assert equal(batches(*words, epoch=epoch), seen)

    def test_other_forms_are_refused(self):
        for text, expected in {
            "48": "write SIZE:SHARE",
            "48:0.4,64": "write SIZE:SHARE",
            "48:0.4,64:0.5": "add up to 0.9, not 1",
            "0:0.4,64:0.6": "a size is 1 or more",
            "48:-1,64:2": "a share of the epochs above 0",
        }.items():
            with pytest.raises(UserError, match=expected):
                options("--progressive-size", text)
        with pytest.raises(UserError, match="32 x 48 pixels"):
            Progression.of("16:1", (3, 32, 48), 3)


class TestSplits:
    @pytest.mark.parametrize(
        ("text", "rows"),
        [
            ("train", 10),
            ("train[:3]", 3),
            ("train[7:]", 3),
            ("train[20%:50%]", 3),
            ("train[2:4]", 2),
            ("train[:99]", 10),
        ],
    )
    def test_rows(self, text: str, rows: int):
        name, bounds = split_of(text)
        assert name == "train" and len(rows_of(bounds, 10, text)) == rows

    @pytest.mark.parametrize("text", ["", "train[3]", "train[a:b]", "train[-2:]"])
    def test_other_forms_are_refused(self, text: str):
        with pytest.raises(UserError, match="write a name"):
            split_of(text)

    def test_no_rows_are_refused(self):
        with pytest.raises(UserError, match="no images"):
            rows_of(split_of("train[5:5]")[1], 10, "x")


class TestParquet:
    def test_shards_are_read_in_order_with_class_names(self, tmp_path: Path):
        write_parquet(tmp_path, "train-00000-of-00002.parquet", [encoded(0), encoded(1)], [0, 2])
        write_parquet(tmp_path, "train-00001-of-00002.parquet", [encoded(2)], [1])
        (tmp_path / "classes.json").write_text(json.dumps(["a", "b", "c", "d"]))
        source = Parquet(tmp_path, "train", "RGB", ParquetColumns())
        assert source.num_classes == 4
        assert [source.label(i) for i in range(3)] == [0, 2, 1]
        for i in range(3):
            assert np.array_equal(np.asarray(source.image(i)), np.asarray(picture(i)))
        assert source.where(2) == "train-00001-of-00002.parquet, row 0 (0.png)"

    def test_plain_bytes_and_named_columns(self, tmp_path: Path):
        pq.write_table(pa.table({"pixels": [encoded(5)], "kind": [3]}), tmp_path / "test.parquet")
        args = data_options(
            *(["--dataset", "parquet", "--input-key", "pixels", "--target-key", "kind", "--data-dir"]), str(tmp_path)
        )
        source = open_source(args, "validation", "RGB")
        assert source.num_classes == 4 and np.array_equal(np.asarray(source.image(0)), np.asarray(picture(5)))

    def test_class_names_from_hugging_face_metadata(self, tmp_path: Path):
        features = {"info": {"features": {"label": {"names": ["a", "b", "c"], "_type": "ClassLabel"}}}}
        table = pa.table({"image": [encoded(0)], "label": [1]}).replace_schema_metadata(
            {"huggingface": json.dumps(features)}
        )
        pq.write_table(table, tmp_path / "train.parquet")
        assert Parquet(tmp_path, "train", "RGB", ParquetColumns()).num_classes == 3

    def test_validation_falls_back_to_val_and_test(self, tmp_path: Path):
        write_parquet(tmp_path, "test.parquet", [encoded(0)] * 3, [0, 0, 0])
        args = data_options("--dataset", "parquet", "--data-dir", str(tmp_path))
        assert len(open_source(args, "validation", "RGB")) == 3
        write_parquet(tmp_path, "val.parquet", [encoded(0)] * 2, [0, 0])
        assert len(open_source(args, "validation", "RGB")) == 2
        assert len(open_source(args, "test", "RGB")) == 3

    def test_a_split_is_one_set_of_files(self, tmp_path: Path):
        """train beside train_noisy is two splits; two revisions of one are refused, not read one after the other."""

        def images(*names: str, split: str = "train") -> int:
            (folder := tmp_path / str(len(list(tmp_path.iterdir())))).mkdir()
            for name in names:
                write_parquet(folder, name, [encoded(0)], [0])
            return len(Parquet(folder, split, "RGB", ParquetColumns()))

        beside = ("train-00000-of-00001.parquet", "train_noisy-00000-of-00001.parquet")
        assert images(*beside) == images(*beside, split="train_noisy") == 1
        assert images("train.parquet", "train_small.parquet") == 1
        assert images("train_0.parquet", "train_1.parquet") == images("train1.parquet", "train2.parquet") == 2
        hashed = ("train-00000-of-00002-ab1.parquet", "train-00001-of-00002-cd2.parquet")
        assert images(*hashed) == 2
        for more in ("train-00000-of-00002-ef3.parquet", "train-00000-of-00003.parquet", "train.parquet"):
            with pytest.raises(UserError, match="more than one set|files are missing"):
                images(*hashed, more)

    def test_images_of_two_types(self, tmp_path: Path):
        for number, kind in enumerate((pa.binary(), pa.large_binary())):
            table = pa.table({"image": pa.array([encoded(number)], kind), "label": [0]})
            pq.write_table(table, tmp_path / f"train_{number}.parquet")
        source = Parquet(tmp_path, "train", "RGB", ParquetColumns())
        assert [np.asarray(source.image(i)).mean() for i in (0, 1)] == [np.asarray(picture(i)).mean() for i in (0, 1)]
        write_parquet(tmp_path, "train_2.parquet", [encoded(2)], [0])
        with pytest.raises(
            UserError, match="train_2.parquet: its images are struct<.*>, those of the first file binary"
        ):
            Parquet(tmp_path, "train", "RGB", ParquetColumns())

    @pytest.mark.parametrize(
        ("broken", "words"),
        [
            (b"not an image", "cannot decode image train.parquet, row 1 (1.png)"),
            (encoded(0)[:60], "cannot decode image train.parquet, row 1 (1.png)"),
            (None, "cannot decode image train.parquet, row 1 (1.png): the row holds no image bytes"),
        ],
        ids=["text", "cut", "null"],
    )
    def test_an_undecodable_image_is_named(self, tmp_path: Path, broken: bytes | None, words: str):
        write_parquet(tmp_path, "train.parquet", [encoded(0), broken], [0, 0])
        with pytest.raises(UserError) as error:
            open_source(data_options("--dataset", "parquet", "--data-dir", str(tmp_path)), "train", "RGB")
        assert words in message(error.value)

    def test_what_is_missing_is_named(self, tmp_path: Path):
        args = data_options("--dataset", "parquet", "--data-dir", str(tmp_path))
        with pytest.raises(UserError, match="is empty"):
            open_source(args, "train", "RGB")
        (tmp_path / "notes.txt").write_text("")
        with pytest.raises(UserError, match="no \\*.parquet files in"):
            open_source(args, "train", "RGB")
        write_parquet(tmp_path, "test.parquet", [encoded(0)], [0])
        with pytest.raises(UserError, match="no train\\*.parquet; it has: test.parquet"):
            open_source(args, "train", "RGB")
        (tmp_path / "train.parquet").write_bytes(b"PAR1 nonsense")
        with pytest.raises(UserError, match="cannot read .*train.parquet"):
            open_source(args, "train", "RGB")

    def test_wrong_columns_are_named(self, tmp_path: Path):
        pq.write_table(pa.table({"image": [encoded(0)], "class": [0]}), tmp_path / "train.parquet")
        with pytest.raises(UserError, match="no column 'label'; its columns: image, class"):
            Parquet(tmp_path, "train", "RGB", ParquetColumns())
        pq.write_table(pa.table({"image": [encoded(0)], "label": ["cat"]}), tmp_path / "train.parquet")
        with pytest.raises(UserError, match="holds string, not integer labels"):
            Parquet(tmp_path, "train", "RGB", ParquetColumns())
        write_parquet(tmp_path, "train.parquet", [encoded(0)] * 3, [0, 1, None])
        with pytest.raises(UserError, match="train.parquet, row 2: no label"):
            Parquet(tmp_path, "train", "RGB", ParquetColumns())

    def test_cifar10_beside_the_checkout(self, cifar10_dir: Path):
        args = data_options("--dataset", "parquet", "--data-dir", str(cifar10_dir))
        source = open_source(args, "test[:100]", "RGB")
        image, label = read(source, 0)
        assert (len(source), source.num_classes, image.size) == (100, 10, (32, 32)) and 0 <= label < 10


class TestFolders:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        for split, name, count in (("train", "cat", 2), ("train", "dog", 2), ("train", "owl", 2), ("val", "owl", 1)):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                picture(i).save(tmp_path / split / name / f"{i}.png")
        return tmp_path

    def test_the_training_folder_numbers_the_classes(self, root: Path):
        source = open_source(data_options("--data-dir", str(root)), "validation", "RGB")
        assert (len(source), source.num_classes) == (1, 3)
        assert read(source, 0)[1] == 2, "owl is the third class, although val has no other"

    def test_a_class_that_training_lacks_is_refused(self, root: Path):
        (root / "val" / "yak").mkdir()
        picture(0).save(root / "val" / "yak" / "0.png")
        with pytest.raises(UserError, match="class 'yak', which .*train has not"):
            open_source(data_options("--data-dir", str(root)), "validation", "RGB")

    def test_what_is_missing_is_named(self, root: Path):
        args = data_options("--data-dir", str(root))
        with pytest.raises(UserError, match="no folder 'test' for split 'test'; it has: train, val"):
            open_source(args, "test", "RGB")
        with pytest.raises(UserError, match="does not exist"):
            open_source(data_options("--data-dir", str(root / "nope")), "train", "RGB")
        for file in (root / "val").rglob("*.png"):
            file.unlink()
        with pytest.raises(UserError, match="val, split validation: no images"):
            open_source(args, "validation", "RGB")

    @pytest.mark.parametrize("split", ["train[:3]", "train[50%:]", "train[2:4]"])
    def test_a_part_would_lack_classes(self, root: Path, split: str):
        with pytest.raises(UserError, match="a part of a folder would lack whole classes; give the whole, train"):
            open_source(data_options("--data-dir", str(root)), split, "RGB")
        assert len(open_source(data_options("--data-dir", str(root)), "train[:]", "RGB")) == 6

    def test_an_undecodable_image_is_named_and_not_skipped(self, root: Path):
        broken = root / "train" / "dog" / "1.png"
        broken.write_bytes(b"not an image")
        source = open_source(data_options("--data-dir", str(root)), "train", "RGB")
        with pytest.raises(UserError) as error:
            for i in range(len(source)):
                read(source, i)
        assert str(broken) in str(error.value)

    def test_the_cache_changes_nothing(self, root: Path):
        source = open_source(data_options("--data-dir", str(root)), "train", "RGB")
        cached = Cached(source)
        for i in range(len(source)):
            (image, label), (again, label_again) = read(source, i), read(cached, i)
            assert np.array_equal(np.asarray(image), np.asarray(again)) and label == label_again

    def test_torchvision_folders(self, root: Path):
        source = open_source(data_options("--dataset", "torch/image_folder", "--data-dir", str(root)), "train", "L")
        assert (len(source), source.num_classes, read(source, 5)[0].mode, read(source, 5)[1]) == (6, 3, "L", 2)


class TestTorchvision:
    """timm takes what is no word for training for the test images."""

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        """MNIST's files: 6 training images of grey 10, 4 test images of grey 200, labels 0, 1, 2, ..."""
        (raw := tmp_path / "MNIST" / "raw").mkdir(parents=True)
        for name, count, grey in (("train", 6, 10), ("t10k", 4, 200)):
            pixels = np.full((count, 28, 28), grey, dtype=np.uint8).tobytes()
            (raw / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, count, 28, 28) + pixels)
            (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, count) + bytes(range(count)))
        return tmp_path

    @pytest.mark.parametrize(
        ("split", "grey", "labels"),
        [
            ("train", 10, range(6)),
            ("training[:4]", 10, range(4)),
            ("train[50%:]", 10, range(3, 6)),
            ("test", 200, range(4)),
            ("validation[1:3]", 200, (1, 2)),
        ],
    )
    def test_splits_and_parts(self, root: Path, split: str, grey: int, labels: Sequence[int]):
        source = open_source(data_options("--dataset", "torch/mnist", "--data-dir", str(root)), split, "L")
        found = [read(source, i) for i in range(len(source))]
        assert [label for _, label in found] == list(labels)
        assert {int(np.asarray(image).max()) for image, _ in found} == {grey}

    def test_other_words_are_refused(self, root: Path):
        with pytest.raises(UserError, match="torch/mnist has no split 'trian'; did you mean 'train'?|no split 'trian'"):
            open_source(data_options("--dataset", "torch/mnist", "--data-dir", str(root)), "trian", "L")
        with pytest.raises(UserError, match="no images"):
            open_source(data_options("--dataset", "torch/mnist", "--data-dir", str(root)), "test[4:]", "L")


@pytest.mark.parametrize("name", ["digits/x", "parquet/foo", "folder/cats"])
def test_a_name_that_would_not_be_looked_at(name: str, tmp_path: Path):
    with pytest.raises(UserError, match=f"--dataset {name}: {name.split('/')[0]} takes no name"):
        open_source(data_options("--dataset", name, "--data-dir", str(tmp_path)), "train", "RGB")


def test_digits_are_not_in_a_folder(tmp_path: Path):
    with pytest.raises(UserError, match="digits comes with scikit-learn, not from"):
        open_source(data_options("--dataset", "digits", "--data-dir", str(tmp_path)), "train", "RGB")


@pytest.mark.parametrize("value", [0.9, 2.0, None, "x"])
def test_a_label_is_a_whole_number(value: object):
    with pytest.raises(ValueError, match="no whole number|invalid literal"):
        whole_label(value)


def test_labels_as_data_sets_have_them():
    assert [whole_label(value) for value in (3, "3", b"3\n", np.int64(3), torch.tensor(3))] == [3] * 5


class TestBatches:
    def test_they_depend_on_seed_and_epoch_alone(self):
        reference = batches(epoch=1)
        random.seed(5), np.random.seed(5), torch.manual_seed(5)
        assert equal(batches(epoch=1), reference)
        assert equal(batches(epoch=1, workers=2), reference)
        assert not equal(batches(epoch=2), reference)
        assert not equal(batches("--seed", "7", epoch=1), reference)

    def test_the_same_images_are_augmented_anew_in_each_epoch(self):
        dataset = training_batches(options(), CONFIG).dataset
        first = dataset.__getitems__([3, 4, 5])[0]
        assert torch.equal(dataset.__getitems__([3, 4, 5])[0], first)
        dataset.set_epoch(1)
        assert not torch.equal(dataset.__getitems__([3, 4, 5])[0], first)

    def test_an_epoch_has_each_image_once(self):
        images = torch.cat([images for images, _ in batches("--no-aug")])
        assert len(images) == 128 and len(torch.unique(images.flatten(1), dim=0)) == 128

    def test_reading_them_leaves_the_random_numbers_alone(self):
        loader = training_batches(options("--reprob", 0.5), CONFIG)
        states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        loader.dataset.__getitems__([3, 4, 5])
        assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())

    def test_normalisation(self):
        images = torch.cat([images for images, _ in batches("--no-aug")])
        assert images.min() == -2 and images.max() == 2, "0 and 1, less 0.5, over 0.25"

    def test_random_erasing(self):
        assert not equal(batches("--reprob", "1"), batches())
        assert equal(batches("--reprob", "1", "--no-aug"), batches("--no-aug"))

    def test_mixup_gives_smoothed_soft_labels_until_its_last_epoch(self):
        words = ("--mixup", "0.8", "--smoothing", "0.1", "--mixup-off-epoch", "1")
        labels = torch.cat([labels for _, labels in batches(*words)])
        assert labels.shape == (128, 10) and torch.allclose(labels.sum(1), torch.ones(128))
        assert (labels.topk(2).values[:, 1] > 0.02).any(), "two classes share an image"
        later = torch.cat([labels for _, labels in batches(*words, epoch=1)])
        assert torch.allclose(later.max(1).values, torch.tensor(0.91)), "smoothed, but no longer mixed"

    @pytest.mark.parametrize(
        ("words", "why"),
        [
            ("--aa rand-m9-n9-mstd0 --train-interpolation lanczos", "digits, image [0-9]+"),
            ("--gaussian-blur-prob 1 --epochs 2 --progressive-size 8:0.5,32:0.5", "digits, image [0-9]+"),
        ],
    )
    def test_what_an_augmentation_cannot_do_is_named(self, words: str, why: str):
        with pytest.raises(UserError, match=f"cannot augment image {why}"):
            batches(*words.split())

    def test_cutmix_needs_sizes_to_choose_from(self):
        for values in ("0.5 0.5", "0 0", "0.5 0.51"):
            with pytest.raises(UserError, match="--cutmix-minmax .* leaves no pixel to choose from in images of 32 px"):
                batches(*f"--cutmix-minmax {values}".split())

    def test_a_gpu_does_not_wait_for_its_batches(self, monkeypatch: pytest.MonkeyPatch):
        reset_accelerate()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        accelerator = make_accelerator("cpu", False, "float16")
        monkeypatch.undo()
        given = options("--epochs", 1)
        source = open_source(given.data, "train[:128]", "RGB")
        loader = eval_loader(given.loader, source, CONFIG, 10, given.seed, accelerator)
        assert loader._non_blocking and of_epoch(loader, 0, 1)._non_blocking
        for device, words, pinned in (("cuda", [], True), ("cpu", [], False), ("cuda", ["--no-pin-mem"], False)):
            here = SimpleNamespace(device=torch.device(device), non_blocking=True, prepare_data_loader=lambda of: of)
            given = options(*words)
            assert eval_loader(given.loader, source, CONFIG, 10, given.seed, here).pin_memory is pinned

    def test_a_gpu_finds_its_fastest_convolutions(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
        reset_accelerate()
        make_accelerator("cpu", False, "float16")
        assert not torch.backends.cudnn.benchmark
        monkeypatch.setattr(Accelerator, "device", torch.device("cuda"))
        make_accelerator("cpu", False, "float16")
        assert torch.backends.cudnn.benchmark

    def test_a_label_beyond_the_classes_is_named(self):
        reset_accelerate()
        given, accelerator = options(), make_accelerator("cpu", False, "float16")
        source = open_source(given.data, "train[:128]", "RGB")
        loader = eval_loader(given.loader, source, CONFIG, 5, given.seed, accelerator)
        with pytest.raises(UserError, match=r"digits, image \d+ has label \d, but the model has 5 classes"):
            list(loader)

    def test_an_error_in_a_worker_stays_one_line(self, tmp_path: Path):
        write_parquet(tmp_path, "train.parquet", [encoded(0)] * 31 + [b"junk"], [0] * 32)
        with pytest.raises(UserError) as error:
            batches(
                *f"--dataset parquet --data-dir {tmp_path} --no-cache-images --train-split train".split(), workers=1
            )
        assert message(error.value).startswith("cannot decode image train.parquet, row 31 (31.png)")
        assert "\n" not in message(error.value)
