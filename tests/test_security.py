"""Nothing that is loaded runs; nothing private is written into files that are made to be published."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from training_runs import DECOR, TINY, drawn_reports, train

from timm_decor.errors import UserError
from timm_decor.training import run as train_module
from timm_decor.training import validation
from timm_decor.training.keeping.privacy import published, published_command, refuse_secrets, without_paths
from timm_decor.training.run import parse

TOKEN = "hf_" + "aB3" * 9


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.made),)  # raises the second time


@pytest.fixture(params=["torch", "legacy", "pickle"])
def evil(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A file that would run code as a full pickle, and what it would make."""
    made, file = tmp_path / "made", tmp_path / "evil.pth"
    state = {"state_dict": {"conv1.weight": Evil(made)}, "optimizer": Evil(made), "history": []}
    if request.param == "pickle":
        file.write_bytes(pickle.dumps(state, protocol=2))
    else:
        torch.save(state, file, _use_new_zipfile_serialization=request.param == "torch")
    return file, made


class TestLoading:
    def test_the_file_is_dangerous(self, evil: tuple[Path, Path]):
        file, made = evil
        for load in (partial(torch.load, weights_only=False), lambda path: pickle.loads(path.read_bytes())):
            with contextlib.suppress(Exception):
                load(file)
        assert made.exists()

    @pytest.mark.parametrize("flag", ["--initial-checkpoint", "--pretrained-path", "--resume", "--kd-pretrained-path"])
    def test_train(self, flag: str, evil: tuple[Path, Path], tmp_path: Path):
        file, made = evil
        words = [*TINY, "--epochs", "1", "--output", str(tmp_path / "out"), flag, str(file)]
        if flag == "--resume":
            (tmp_path / "args.yaml").write_text("model: test_resnet")
        if flag.startswith("--kd"):
            words += ["--kd-model-name", "test_resnet"]
        with pytest.raises(UserError) as error:
            train_module.main(words)
        assert "evil.pth" in str(error.value) and "\n" not in str(error.value)
        assert not made.exists(), "it ran"

    def test_validate(self, evil: tuple[Path, Path]):
        file, made = evil
        words = [
            "--dataset",
            "digits",
            "--device",
            "cpu",
            "-j",
            "0",
            "--model",
            "test_resnet",
            "--checkpoint",
            str(file),
        ]
        for extra in ([], ["--use-ema"]):
            with pytest.raises(UserError, match="evil.pth is not a checkpoint: "):
                validation.main([*words, *extra])
        assert not made.exists(), "it ran"

    def test_what_it_wanted_is_told(self, tmp_path: Path):
        torch.save({"state_dict": Evil(tmp_path / "made")}, tmp_path / "evil.pth")
        with pytest.raises(UserError, match=r"it would call (posix|nt)\.mkdir as it loads, which is refused$"):
            train_module.main([*TINY, "--output", str(tmp_path), "--initial-checkpoint", str(tmp_path / "evil.pth")])

    @pytest.mark.parametrize("where", ["local-dir", "checkpoint_path", "overlay"])
    def test_ways_round_our_own_loader(self, where: str, tmp_path: Path):
        """timm reads these by itself, and its older versions as full pickles."""
        made, file = tmp_path / "made", tmp_path / "pytorch_model.bin"
        torch.save({"conv1.weight": Evil(made)}, file)
        words = [*TINY, "--epochs", "1", "--output", str(tmp_path / "out")]
        if where == "local-dir":
            (tmp_path / "config.json").write_text(
                json.dumps({"architecture": "test_resnet", "num_classes": 10, "pretrained_cfg": {"num_classes": 10}})
            )
            words += ["--model", f"local-dir:{tmp_path}", "--pretrained"]
        elif where == "checkpoint_path":
            words += ["--model-kwargs", f"checkpoint_path={file}"]
        else:
            words += ["--pretrained", "--model-kwargs", f"pretrained_cfg_overlay={{'file': {str(file)!r}}}"]
        with pytest.raises(UserError, match="^cannot create "):
            train_module.main(words)
        assert not made.exists(), "it ran"

    def test_a_recipe_makes_no_objects(self, tmp_path: Path):
        made = tmp_path / "made"
        (tmp_path / "r.yaml").write_text(f"lr: !!python/object/apply:os.mkdir ['{made}']\n")
        with pytest.raises(UserError, match="r.yaml is not YAML: line 1 has the tag '.*os.mkdir': plain values"):
            parse(["-c", str(tmp_path / "r.yaml")])
        assert not made.exists()


class TestSecrets:
    @pytest.mark.parametrize(
        ("words", "flag"),
        [
            (["--model-kwargs", f"a={TOKEN}"], "--model-kwargs"),
            (["--opt-kwargs", "api_key=1234"], "--opt-kwargs"),
            (["--data-dir", "https://me:hunter22@example.org/data"], "--data-dir"),
            (["--experiment", TOKEN], "--experiment"),
            (["--project-name", "from-the-environment"], "--project-name"),
        ],
    )
    def test_they_are_refused_and_not_repeated(self, words: list[str], flag: str, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("WANDB_API_KEY", "from-the-environment")
        with pytest.raises(UserError, match=f"^{flag} holds what looks like a password or token") as error:
            parse(words)
        assert words[1].split("=")[-1] not in str(error.value)

    def test_in_a_recipe_as_well(self, tmp_path: Path):
        (tmp_path / "r.yaml").write_text(f"model-kwargs: {{x: {TOKEN}}}")
        with pytest.raises(UserError, match="^--model-kwargs holds"):
            parse(["-c", str(tmp_path / "r.yaml")])

    def test_ordinary_arguments_are_none(self):
        refuse_secrets(parse([*TINY, "--model", "hf-hub:timm/resnet18.a1_in1k", "--opt-kwargs", "nesterov=True"]))


class TestPaths:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("cannot read /home/me/data/a.png: gone", "cannot read .../a.png: gone"),
            ("local-dir:/home/me/model", "local-dir:.../model"),
            ("in ~/data and file:///srv/x/y", "in .../data and .../y"),
            (r"C:\Users\me\data", ".../data"),
            ("https://example.org/a/b, 1/2, a/b/c, ../x", "https://example.org/a/b, 1/2, a/b/c, ../x"),
            ("rand-m9-mstd0.5-inc1", "rand-m9-mstd0.5-inc1"),
        ],
    )
    def test_they_are_cut_to_their_last_part(self, text: str, expected: str):
        assert without_paths(text) == expected

    def test_a_command(self):
        words = ["-c", "recipes/a.yaml", "--data-dir", "../me/data", "--output=/home/me/out", "--lr", "0.1"]
        words += ["--model", "local-dir:/home/me/m", "--scale", "0.8", "1.0", "--mean", "-0.1"]
        assert published_command("train.py", words) == (
            "train.py -c recipes/a.yaml --data-dir PATH --output=PATH --lr 0.1 --model local-dir:.../m --scale 0.8 1.0 "
            "--mean -0.1"
        )
        assert published_command("train.py", ["-c", "/home/me/r.yaml"]) == "train.py -c .../r.yaml"
        assert published_command("train.py", ["-c/home/me/r.yaml", "-b", "4"]) == "train.py -c=.../r.yaml -b 4"

    @pytest.mark.parametrize("place", ["/home/my name/the data/cats", "~/the data/cats", r"C:\my name\the data\cats"])
    def test_spaces_do_not_end_them(self, place: str):
        words = ["--dataset", f"hfds/{place}", f"--kd-model-name=local-dir:{place}", "--teacher", place]
        told = published_command("train.py", words)
        assert told == "train.py --dataset hfds/.../cats --kd-model-name=local-dir:.../cats --teacher .../cats"
        args = argparse.Namespace(dataset=f"hfids/{place}", model=f"local-dir:{place}", kinds=[place])
        assert published(args) == {"dataset": "hfids/.../cats", "model": "local-dir:.../cats", "kinds": [".../cats"]}

    def test_nested_values(self):
        args = argparse.Namespace(model_kwargs={"a": ["/home/me/x", 1]}, data_dir="/home/me/data", lr=0.1)
        assert published(args) == {"model_kwargs": {"a": [".../x", 1]}, "lr": 0.1}

    def test_no_file_that_is_published_holds_one(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """A comparison from a folder of images, with every argument that takes a path, below a home folder."""
        home = tmp_path / "home-of-someone"
        data = home / "their-images"
        for split in ("train", "val"):
            for label in ("ant", "bee"):
                (data / split / label).mkdir(parents=True)
                for number in range(4):
                    Image.new("RGB", (32, 32), (40 * number, 90, 0)).save(data / split / label / f"{number}.png")
        (home / "classes.txt").write_text("ant\nbee\n")
        (home / "r.yaml").write_text("lr: 0.01")
        (home / "model").mkdir()
        (home / "model" / "config.json").write_text(json.dumps({"architecture": "test_resnet", "num_classes": 2}))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HOME", str(home))
        base = ["-c", str(home / "r.yaml"), "--data-dir", str(data), "--class-map", str(home / "classes.txt")]
        base += ["--model", f"local-dir:{home / 'model'}", "--device", "cpu", "-j", "0", "--img-size", "32", "-b", "4"]
        words = (
            "--train-split",
            "train",
            "--val-split",
            "val",
            "--num-classes",
            2,
            "--epochs",
            1,
            "--warmup-epochs",
            0,
        )
        with drawn_reports():
            out = train(home / "out", *words, *DECOR, "--compare", "--log-with", "tensorboard", base=base)

        files = [out / "report.html", *out.glob("compare.*"), *out.rglob("results.json"), *out.rglob("summary.csv")]
        files += list(out.rglob("hparams.yml")) + list(out.rglob("events.*"))
        assert len(files) >= 9
        for file in files:
            found = file.read_bytes()
            assert str(home).encode() not in found and TOKEN.encode() not in found, file
            assert str(Path.cwd()).encode() not in found, file
        checkpoints = list(out.rglob("*.safetensors"))
        for file in checkpoints:
            with safe_open(file, "pt") as opened:
                metadata = opened.metadata()
            assert str(home) not in str(metadata) and metadata["architecture"] == "test_resnet"
        assert checkpoints
        for file in out.rglob("*"):  # private files too
            assert file.is_dir() or TOKEN.encode() not in file.read_bytes(), file
