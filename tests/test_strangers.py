"""Files and names that somebody else made: each ends in one line, and none reaches an output as anything but text."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import json
import pickle
import re
import shutil
import warnings
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from training_runs import options, reset_accelerate, train

from timm_decor.errors import UserError, exit_code, message
from timm_decor.publishing import publish
from timm_decor.publishing.args import publish_parser
from timm_decor.publishing.licenses import LICENSES
from timm_decor.publishing.trained import read, read_summary
from timm_decor.redact import without_secrets
from timm_decor.text import csv_text, markdown_cell, markdown_table, markdown_text, printable
from timm_decor.training import build, find_lr, validation
from timm_decor.training.args import train_parser
from timm_decor.training.data.datasets import open_source
from timm_decor.training.foreign import read_mapping
from timm_decor.training.keeping.metadata import CheckpointMetadata, stored_metadata
from timm_decor.training.keeping.privacy import published, published_command, refuse_secrets
from timm_decor.training.options import ImageOptions
from timm_decor.training.run import parse
from timm_decor.training.seeing import charts, mistakes, plot
from timm_decor.training.seeing.compare import Side

CONFIG = {"input_size": [3, 32, 32], "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 1.0,
          "crop_mode": "center"}  # fmt: skip
GOOD = {**stored_metadata("test_resnet", 10, CONFIG, {}, []), "epoch": "1"}
NAMES = [r"$\frac$", "$x^{$", "=cmd|' /C calc'!A0", "a|b", "\x1b[2J\nred", "\udcff", "ʘ\U0001f600漢字", "_hidden", ""]
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def config(**changes: Any) -> str:
    return json.dumps({**CONFIG, **changes})


def saved(path: Path, metadata: dict[str, str] | None) -> Path:
    save_file({"fc.weight": torch.zeros(10, 2)}, path, metadata)
    return path


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    """What reaches the terminal."""
    line = message(error.value)
    assert printable(line) == line
    return line


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("strangers")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training; nothing may write into it."""
    return train(tmp_path_factory.mktemp("runs") / "run", "--epochs", 2)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return timm.create_model("test_resnet", num_classes=10).state_dict()


class TestMetadata:
    def test_what_was_written_is_read(self, tmp_path: Path):
        names = [str(number) for number in range(10)]
        told = stored_metadata("decor_resnet18", 10, CONFIG, {"x": [1], "pretrained_cfg_overlay": {"url": "u"}}, names)
        found = CheckpointMetadata.read(saved(tmp_path / "a.safetensors", {**told, "epoch": "3"}))
        assert found == CheckpointMetadata("decor_resnet18", 10, CONFIG, {"x": [1]}, names, 3)

    @pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"architecture": "hf-hub:me/x"}])
    def test_a_file_of_somebody_elses_program_says_nothing(self, metadata: dict[str, str] | None, tmp_path: Path):
        assert CheckpointMetadata.read(saved(tmp_path / "a.safetensors", metadata)) is None

    @pytest.mark.parametrize(
        ("key", "text"),
        [
            *(("num_classes", text) for text in ("many", "-1", "0", "1.5", "", "9" * 5000, "11")),
            *(("epoch", text) for text in ("last", "0")),
            *(("data_config", text) for text in ("{", "[]", "{}", "3", "[" * 100_000, "9" * 5000)),
            *(("data_config", config(crop_pct=value)) for value in (-1, 0, 1e-9, "1", None, True, float("nan"))),
            *(("data_config", config(input_size=value)) for value in ("3", [3, 32], [3, 0, 1], [3, 1e9, 1])),
            ("data_config", config(input_size=[3, 9**9, 1])),
            *(("data_config", config(mean=value)) for value in (0.5, [0.5], ["a", "b", "c"], [1, 1, float("inf")])),
            *(("data_config", config(std=value)) for value in ([0, 0, 0], [-1, 1, 1], None)),
            *(("data_config", config(interpolation=value)) for value in ("cubist", 3, [])),
            *(("data_config", config(crop_mode=value)) for value in ("middle", 3)),
            *(("architecture", text) for text in ("hf-hub:me/x", "hf_hub:me/x", "local-dir:/x", "resnet81", "")),
            ("architecture", "\x1b[2J"),
            *(("model_kwargs", text) for text in ("[]", "null", "{", '{"pretrained": true}')),
            ("model_kwargs", '{"checkpoint_path": "/etc/passwd"}'),
            ("model_kwargs", '{"pretrained_cfg_overlay": {"hf_hub_id": "me/x"}}'),
            *(("label_names", text) for text in ("[1]", "{}", '["a"]', "null", "[")),
        ],
    )  # fmt: skip
    def test_what_is_no_value_is_named(self, key: str, text: str, tmp_path: Path):
        with pytest.raises(UserError) as error:
            CheckpointMetadata.read(saved(tmp_path / "a.safetensors", {**GOOD, key: text}))
        line = one_line(error)
        assert "a.safetensors" in line and key in line and len(line) < 400

    @pytest.mark.parametrize("key", ["architecture", "num_classes", "data_config", "model_kwargs"])
    def test_what_is_missing_is_named(self, key: str, tmp_path: Path):
        metadata = {name: text for name, text in GOOD.items() if name != key}
        with pytest.raises(UserError, match=f"a.safetensors does not say its {key}"):
            CheckpointMetadata.read(saved(tmp_path / "a.safetensors", metadata))

    def test_nothing_is_asked_of_the_hub(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        def called(*_: Any, **__: Any) -> None:
            raise AssertionError("a model was made")

        monkeypatch.setattr(timm, "create_model", called)
        file = saved(tmp_path / "a.safetensors", {**GOOD, "architecture": "hf-hub:someone/thing"})
        for more in ([], ["--model", "test_resnet"]):
            with pytest.raises(UserError, match="architecture is 'hf-hub:someone/thing', which is no model"):
                validation.main(["--dataset", "digits", "--device", "cpu", "--checkpoint", str(file), *more])

    def test_of_a_folder_the_bad_ones_are_named_and_the_good_one_is_scored(
        self, weights: dict[str, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ):
        bad = {
            "classes": {"num_classes": "many"},
            "hub": {"architecture": "hf-hub:someone/thing"},
            "kwargs": {"model_kwargs": '{"layers": 0}'},
            "zero": {"model_kwargs": '{"output_stride": 0}'},
            "red\x1b[31m": {"data_config": "{"},
        }
        save_file(weights, tmp_path / "good.safetensors", GOOD)
        for name, change in bad.items():
            save_file(weights, tmp_path / f"{name}.safetensors", {**GOOD, **change})
        odd = {"architecture": "test_vit", "data_config": config(input_size=[3, 33, 33])}  # no multiple of its patches
        save_file(
            timm.create_model("test_vit", num_classes=10).state_dict(), tmp_path / "size.safetensors", {**GOOD, **odd}
        )
        whole = (tmp_path / "good.safetensors").read_bytes()
        (tmp_path / "cut.safetensors").write_bytes(whole[:-1])
        (tmp_path / "pickle.safetensors").write_bytes(pickle.dumps([1]))
        reset_accelerate()
        words = f"--dataset digits --device cpu -j 0 --split test[:20] --checkpoint {tmp_path}".split()
        assert exit_code("validate.py", validation.main, words) == 2
        told = capsys.readouterr()
        assert [row["checkpoint"] for row in json.loads(told.out)] == ["good.safetensors"]
        lines = told.err.splitlines()
        assert "\x1b" not in told.err and "Traceback" not in told.err
        left_out = {line.split(".safetensors is left out: ")[0] for line in lines if "left out" in line}
        names = {*(printable(name) for name in bad), "size", "cut", "pickle"}
        assert left_out == {f"validate.py: {name}" for name in names}
        assert any(
            line.startswith("validate.py: size.") and "does not take images of (3, 33, 33)" in line for line in lines
        )

    @FUZZ
    @given(key=st.sampled_from([*GOOD, "epoch"]), value=JSON | st.text(max_size=20), raw=st.booleans())
    def test_any_value(self, place: Path, key: str, value: Any, raw: bool):
        text = str(value) if raw else json.dumps(value)
        text = text.encode("utf-8", "replace").decode()
        file = saved(place / "any.safetensors", {**GOOD, key: text})
        try:
            found = CheckpointMetadata.read(file)
        except UserError as error:
            assert "any.safetensors" in message(error) and printable(message(error)) == message(error)
        else:
            assert found is not None and found.num_classes == 10 and timm.is_model(found.architecture)

    @FUZZ
    @given(field=st.sampled_from([*CONFIG, "more"]), value=JSON)
    def test_any_data_config(self, place: Path, field: str, value: Any):
        file = saved(place / "config.safetensors", {**GOOD, "data_config": json.dumps({**CONFIG, field: value})})
        try:
            found = CheckpointMetadata.read(file)
        except UserError as error:
            assert field in message(error)
        else:
            assert found is not None and found.data_config.keys() == CONFIG.keys()
            nothing = dict.fromkeys(spec.name for spec in dataclasses.fields(ImageOptions))
            build.data_config(ImageOptions(**nothing), timm.create_model("test_resnet"), 3)

    @FUZZ
    @given(cut=st.integers(0, 10_000), bits=st.dictionaries(st.integers(0, 1500), st.integers(0, 255), max_size=5))
    def test_any_bytes(self, place: Path, cut: int, bits: dict[int, int]):
        data = bytearray(saved(place / "whole.safetensors", GOOD).read_bytes())
        for at, value in bits.items():
            data[at % len(data)] = value
        file = place / "bytes.safetensors"
        file.write_bytes(data[:cut])
        for reading in (
            lambda: CheckpointMetadata.read(file),
            lambda: build.load_weights(torch.nn.Linear(1, 1), str(file)),
        ):
            try:
                reading()
            except UserError as error:
                assert "bytes.safetensors" in message(error)

    def test_weights_that_are_no_tensors(self, weights: dict[str, torch.Tensor], tmp_path: Path):
        model = timm.create_model("test_resnet", num_classes=10)
        for value in (3, [1, 2], weights["fc.weight"].to_sparse()):
            torch.save({**weights, "fc.weight": value}, tmp_path / "a.pth")
            with pytest.raises(UserError, match=r"a\.pth does not fit test_resnet: "):
                build.load_weights(model, str(tmp_path / "a.pth"))


class TestNames:
    def test_printable(self):
        assert printable("a\x1b[2J\n\r\x00\u202e\u2028\udcff\x9b") == r"a\x1b[2J\n\r\x00\u202e\u2028\udcff\x9b"
        for name in ("größe, 漢字 \U0001f600", "plain", "C:\\x", "a\u200db"):
            assert printable(name) == name

    @FUZZ
    @given(st.text(st.characters(codec=None)))
    def test_any_text_is_one_line_that_can_be_written(self, text: str):
        once = printable(text)
        assert len(once.splitlines()) < 2 and printable(once) == once and once.encode() is not None

    def test_an_error_with_a_name_in_it_is_one_whole_line(self, capsys: pytest.CaptureFixture[str]):
        def main(_: list[str]) -> None:
            raise UserError("cannot decode a\n\x1b]0;owned\x07.png: gone")

        assert exit_code("x", main, []) == 2
        assert capsys.readouterr().err == "x: error: cannot decode a\\n\\x1b]0;owned\\x07.png: gone\n"
        worker = "Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  x\n"
        assert message(UserError(f"{worker}timm_decor.errors.UserError: a\nb")) == "a\\nb"

    @pytest.mark.parametrize("text", ["=1+1", "+1+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", " =1", "-a"])
    def test_a_spreadsheet_takes_none_for_a_formula(self, text: str):
        cell = next(csv.reader(io.StringIO(csv_text([[text, "x"]]))))[0]
        assert not cell.lstrip().startswith(tuple("=+-@")) and cell in (
            f"'{text}",
            printable(text),
            f"'{printable(text)}",
        )

    def test_numbers_stay_numbers(self):
        assert csv_text([["-1.5", -1.5, "+3", "1e-3", "a=b", 'q"']]) == '-1.5,-1.5,+3,1e-3,a=b,"q"""\n'

    @FUZZ
    @given(st.lists(st.text(st.characters(codec="utf-8")), min_size=1, max_size=3))
    def test_a_markdown_row_keeps_its_cells(self, names: list[str]):
        line = markdown_table(["name"] * len(names), [names]).splitlines()[-1]
        without_escaped = re.sub(r"\\[!-/:-@\[-`{-~]", "", line)  # as GitHub splits a row
        assert without_escaped.count("|") == len(names) + 1

    def test_markdown(self):
        assert markdown_cell("a|b\\|c\n") == r"a\|b\\\|c\n"
        assert markdown_text("[a](http://x) <b> `c` *d*") == r"[a]\(http://x) \<b> \`c\` \*d\*"

    def test_pictures_show_any_name(self, tmp_path: Path):
        row = {"epoch": 1, "steps": 3, "seconds": 1.0, "train_loss": 2.0, "eval_top1": 10.0}
        counts = np.eye(len(NAMES), dtype=int)
        seen = np.array([[label, 0, 1.0, 0.5] for label in range(len(NAMES))])
        source = argparse.Namespace(image=lambda index: Image.new("RGB", (8, 8)))
        trial = find_lr.Trial(0.1, [2.0, 1.0], 2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a letter that the font lacks
            mistakes.write_confusion(counts, NAMES, tmp_path / "m.csv")
            mistakes.write_worst(source, seen, NAMES, tmp_path / "w.png")
            for name in filter(None, NAMES):
                plot.save_picture([Side(name, name, "sgd", 0.1, 1, [row])], tmp_path / "p.png", name)
                find_lr.save_picture([find_lr.Search(name, [trial])], tmp_path / "f.png", name)
                svg = [
                    charts.lines(name, "x", [charts.Line([1.0], [1.0], 0)]),
                    charts.heat_map(name, [name], [1], np.ones((1, 1)), charts.ratio_ticks(np.ones(1))),
                    charts.stacked_bars(name, [name], [{"a": 1.0}], {"a": charts.PHASES[0]}),
                ]
                for text in svg:
                    ElementTree.fromstring(text)
        cells = list(csv.reader(io.StringIO((tmp_path / "m.csv").read_text(encoding="utf-8"))))
        assert [line[0] for line in cells[1:]] == [f"'{n}" if n[:1] == "=" else printable(n) for n in NAMES]

    def test_class_folders_with_such_names_are_validated(
        self, weights: dict[str, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ):
        names = [name for name in NAMES if name and "/" not in name]
        for name in names:
            (tmp_path / "data" / "val" / name).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(tmp_path / "data" / "val" / name / "1.png")
        file = tmp_path / "=a|b\x1b.safetensors"
        save_file(weights, file, GOOD)
        shutil.copy(file, tmp_path / "other.safetensors")
        base = ["--data-dir", str(tmp_path / "data"), "--device", "cpu", "-j", "0", "--num-classes", "10"]
        both = ["--confusion-matrix", str(tmp_path / "m.csv"), "--worst-images", str(tmp_path / "w.png")]
        reset_accelerate()
        validation.main([*base, "--checkpoint", str(tmp_path / "other.safetensors"), *both])
        assert (tmp_path / "m.png").is_file() and (tmp_path / "w.png").is_file()
        for ending, shown in (("csv", "'=a|b\\x1b.safetensors,"), ("md", "| =a\\|b\\x1b.safetensors |")):
            reset_accelerate()
            words = ["--checkpoint", str(tmp_path), "--results-file", str(tmp_path / "out" / f"r.{ending}")]
            validation.main([*base, *words])
            text = (tmp_path / "out" / f"r.{ending}").read_text(encoding="utf-8")
            assert any(line.startswith(shown) for line in text.splitlines()), text
        assert "\x1b" not in capsys.readouterr().err

    def test_an_argument_that_cannot_be_printed_is_refused(self, tmp_path: Path):
        (tmp_path / "r.yaml").write_text('experiment: "a\\e[2Jb"\n')
        for words in (["-c", str(tmp_path / "r.yaml")], ["--experiment", "a\x1b[2Jb"]):
            with pytest.raises(UserError, match=r"^--experiment has a character .* 'a\\x1b\[2Jb'$"):
                parse(words)


class TestYaml:
    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("a: &a [x, x]\nlr: *a\n", "line 2 has an alias"),
            ("a: &a {}\nb: {<<: *a}\n", "an alias"),
            ("a: &a [x]\n" + "".join(f"b{i}: &b{i} [{'*a,' * 9}]\n" for i in range(9)), "an alias"),
            ("lr: 0.1\nlr: 0.2\n", "line 2 has the key 'lr' twice"),
            ("model-kwargs: {a: 1, a: 2}\n", "the key 'a' twice"),
            ("opt-eps: 0.1\nopt_eps: 0.2\n", "has opt_eps twice: written as opt-eps, too"),
            ("lr: " + "[" * 50_000, "levels in one another"),
            ("lr: " + "{a: " * 900, "levels in one another"),
            ("- " * 50_000 + "1", "levels in one another"),
            ("lr: !!python/name:os.system\n", "has the tag"),
            ("lr: !!binary aGk=\n", "has the tag"),
            ("lr: !mine 1\n", "has the tag"),
            ("lr: 2024-13-45\n", "is not YAML"),
            ("lr: " + "9" * 5000, "is not YAML"),
            ("lr: '\x00'", "is not YAML"),
            ("? [a]\n: b\n", "is not YAML"),
            ("lr: 1\n--- \nlr: 2\n", "is not YAML"),
            ("# " + "x" * 2**20, "larger than 1 MB"),
            ("", "must be a mapping"),
        ],
    )  # fmt: skip
    def test_what_grows_hides_or_is_ambiguous_is_refused(self, text: str, words: str, tmp_path: Path):
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(UserError) as error:
            parse(["-c", str(tmp_path / "r.yaml")])
        line = one_line(error)
        assert words in line and "r.yaml" in line and len(line) < 400

    def test_what_is_no_text(self, tmp_path: Path):
        (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(UserError, match="cannot read recipe .*r.yaml: it is not UTF-8"):
            parse(["-c", str(tmp_path / "r.yaml")])
        with pytest.raises(UserError, match="cannot read recipe .*: Is a directory"):
            parse(["-c", str(tmp_path)])

    @FUZZ
    @given(
        st.dictionaries(st.sampled_from(sorted(vars(train_parser().parse([])))) | st.text(max_size=5), JSON, max_size=4)
        | st.text("{}[]:,-&*!|>'\"\n #%@`a1<", max_size=60)
    )
    def test_any_recipe(self, place: Path, recipe: dict[str, Any] | str):
        file = place / "any.yaml"
        text = recipe if isinstance(recipe, str) else yaml.safe_dump(recipe)
        file.write_text(text, encoding="utf-8", errors="replace")
        try:
            assert isinstance(read_mapping(file, "recipe"), dict)
            parse(["-c", str(file)])
        except UserError as error:
            assert printable(message(error)) == message(error)


class TestClassMap:
    @FUZZ
    @given(st.binary(max_size=40) | st.lists(st.sampled_from(["ant", "bee", "c"])).map(lambda n: "\n".join(n).encode()))
    def test_any_text_file(self, place: Path, data: bytes):
        root = place / "images"
        for name in ("ant", "bee"):
            (root / "train" / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(root / "train" / name / "1.png")
        (place / "map.txt").write_bytes(data)
        data = options("--data-dir", root, "--class-map", place / "map.txt", base=[]).data
        try:
            assert len(open_source(data, "train", "RGB")) in (1, 2)
        except UserError as error:
            assert message(error)


SECRETS = {
    "hugging face": "hf_" + "aBcD" * 8,
    "github": "ghp_" + "a1B2" * 9,
    "github, fine-grained": "github_pat_11AAAA_" + "a1B2" * 9,
    "gitlab": "glpat-" + "a1B2" * 5,
    "google": "AIza" + "Sy-_a" * 7,
    "amazon": "AKIAIOSFODNN7EXAMPLE",
    "openai": "sk-proj-" + "a1-_" * 8,
    "openai, old": "sk-" + "a1B2" * 12,
    "anthropic": "sk-ant-api03-" + "a1B2" * 9,
    "slack": "xoxb-123456789012-abcdef",
    "slack, user's": "xoxp-123456789012-abcdef",
    "wandb": "wandb_v1_" + "a1B2" * 9,
    "jwt": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.SflKxwRJSMeKKF2QT4",
    "url": "https://example.org/data?token=abc123",
    "url, second": "https://example.org/data?split=a&api_key=abc123",
    "url, signed": "https://bucket.example.org/x?X-Amz-Signature=abc123",
    "url, user": "https://me:hunter22@example.org/data",
    "named": "password=hunter22",
}
TEXT_FLAGS = ["--data-dir", "--experiment", "--output", "--model", "--project-name", "--aa", "--class-map", "--opt",
              "--initial-checkpoint", "--train-split", "--lr", "--log-with", "--unknown"]  # fmt: skip


class TestSecrets:
    @pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS)
    def test_other_makers_tokens_are_refused_and_not_repeated(
        self, secret: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ):
        kept = re.split(r"[=@]", secret.replace("@example.org/data", ""))[-1].removeprefix("https://me:")
        assert kept not in without_secrets(f"x {secret} y") and without_secrets(f"x {secret} y").endswith(" y")
        (tmp_path / "r.yaml").write_text(yaml.safe_dump({"experiment": secret}))
        for words in (["--experiment", secret], ["-c", str(tmp_path / "r.yaml")], ["--model-kwargs", f"a={secret}"]):
            assert exit_code("train.py", parse, words) == 2
            line = capsys.readouterr().err
            assert kept not in line and "holds what looks like a password or token" in line
        for flag in ("--lr", "--nonsense", "--sched"):  # refused for another reason, in a line that quotes it
            assert exit_code("train.py", parse, [f"{flag}={secret}"]) == 2
            assert kept not in capsys.readouterr().err

    @pytest.mark.parametrize(
        "name",
        ["AWS_SECRET_ACCESS_KEY", "DB_PASSWD", "DB_PASSWORD", "PGPASSWORD", "MYSQL_PWD", "GITHUB_PAT", "MY_CREDENTIALS",
         "FOO_APIKEY", "OPENAI_API_KEY", "HF_TOKEN", "CLIENT_SECRET", "AZURE_STORAGE_KEY", "SSH_PASSPHRASE"],
    )  # fmt: skip
    def test_those_of_the_environment_are_known_by_many_names(self, name: str, monkeypatch: pytest.MonkeyPatch):
        for secret, argument in (("wordsAreLongEnough", "/x/abwordsAreLongEnoughcd"), ("short-1x", "/data/short-1x/y")):
            monkeypatch.setenv(name, secret)
            with pytest.raises(UserError, match="^--data-dir holds what looks like") as error:
                parse(["--data-dir", argument])
            assert secret not in str(error.value)
            monkeypatch.delenv(name)
            parse(["--data-dir", argument])

    @pytest.mark.parametrize("name", ["PWD", "OLDPWD", "HOME", "MODEL", "GOOGLE_APPLICATION_CREDENTIALS"])
    def test_places_are_none(self, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        monkeypatch.setenv(name, str(tmp_path))
        parse(["--data-dir", str(tmp_path / "images")])

    @pytest.mark.parametrize(
        "text",
        ["/home/me/sk-learn-digits-classification-run", "hf-hub:timm/resnet18.a1_in1k", "resnet18-5c106cde.pth",
         "vit_base_patch14_reg4_dinov2.lvd142m", "hf_datasets_imagenet_validation_split", "checkpoint-" + "0a1b" * 10,
         "rand-m9-mstd0.5-inc1", "https://example.org/a?split=train&page=2", "ssh://git@example.org/x", "train[:128]",
         "/mnt/task-decorrelated-backpropagation-imagenet", "hfds/uoft-cs/cifar10", "/data/tokens/key/a.png",
         "0a1b" * 16,
         "20260101-120000-decor_resnet18-32", "s3://bucket/train.parquet", "class_token=True", "C:\\data\\x"],
    )  # fmt: skip
    def test_ordinary_words_are_none(self, text: str):
        assert without_secrets(text) == text
        refuse_secrets(argparse.Namespace(data_dir=text, model_kwargs={"class_token": True, "x": text}))

    @FUZZ
    @given(
        st.sampled_from(
            [r"hf_[A-Z][A-Za-z0-9]{30}", r"ghp_[A-Z0-9][A-Za-z0-9]{35}", r"glpat-[\w-]{20}", r"AIza[\w-]{35}",
             r"sk-(proj|ant)-[A-Za-z0-9_-]{24,40}", r"xox[bp]-[0-9]{10}-[A-Za-z0-9]{12}", r"AKIA[0-9A-Z]{16}",
             r"eyJ[A-Za-z0-9_-]{12}\.eyJ[A-Za-z0-9_-]{12}\.[A-Za-z0-9_-]{16}"]
        ).flatmap(lambda shape: st.from_regex(re.compile(shape, re.ASCII), fullmatch=True)),
        st.sampled_from(TEXT_FLAGS),
        st.sampled_from(["{}", "/data/{}/x", "a={}", "x {} y", "https://example.org/{}", "local-dir:{}"]),
        st.booleans(),
    )  # fmt: skip
    def test_none_comes_out(self, secret: str, flag: str, around: str, joined: bool):
        word = around.format(secret)
        words = [f"{flag}={word}"] if joined else [flag, word]
        with pytest.raises(UserError) as error:
            parse(words)
        name = flag[2:].replace("-", "_")
        values = {name: word, "opt_kwargs": {"a": [word], word: 1}}
        told = [one_line(error), str(error.value), published_command("train.py", words)]
        told += [json.dumps(published(argparse.Namespace(**values)))]
        assert not any(secret in text for text in told)

    def test_a_message_that_quotes_one_hides_it(self, capsys: pytest.CaptureFixture[str]):
        words = ["--model", "test_resnet", "--data-dir", "https://me:hunter22@example.org/data", "--device", "cpu"]
        assert exit_code("validate.py", validation.main, words) == 2
        line = capsys.readouterr().err
        assert "hunter22" not in line and "https:/***@example.org/data does not exist" in line

    def test_named_ones_are_hidden_whatever_they_look_like(self):
        words = ["--opt-kwargs", "api_key=a;b c", "x=1", "--my-token=abc"]
        assert published_command("train.py", words) == "train.py --opt-kwargs 'api_key=***' x=1 '--my-token=***'"
        assert published(argparse.Namespace(opt_kwargs={"api_key": 12, "n": 3})) == {
            "opt_kwargs": {"api_key": "***", "n": 3}
        }


class TestPublishing:
    @pytest.fixture
    def copy(self, run: Path, tmp_path: Path) -> Path:
        shutil.copytree(run, tmp_path / "copy")
        return tmp_path / "copy"

    @pytest.mark.parametrize(
        ("given", "near"),
        [("MIT", "near: mit"), ("Apache-2.0", "near: apache-2.0"), ("apache 2.0", "near: apache-2.0"),
         ("CC-BY-4.0", "cc-by-4.0"),
         ("GPLv3", "gpl-3.0"), ("my own", "for one that it has no id for: other")],
    )  # fmt: skip
    def test_a_license_is_one_of_the_hubs(self, given: str, near: str, tmp_path: Path):
        with pytest.raises(UserError, match=f"--license: the Hub has no license '{given}'") as error:
            publish.main([str(tmp_path), "--repo-id", "me/x", "--license", given, "--dry-run", str(tmp_path / "out")])
        assert near in one_line(error)
        assert {"mit", "apache-2.0", "other", "cc-by-nc-4.0"} <= set(LICENSES)

    @pytest.mark.parametrize(
        ("name", "change", "words"),
        [
            ("summary.csv", lambda text: text.split("\n")[0] + "\n", "the history with epoch 0"),
            ("summary.csv", lambda text: "\n".join(text.split("\n")[:2]) + "\n", "the history with epoch 1"),
            ("summary.csv", lambda text: text[:-3], "summary.csv ends within a line"),
            ("summary.csv", lambda text: "", "summary.csv ends within a line"),
            ("summary.csv", lambda text: "a,b\n1,2\n", "summary.csv, line 2 does not say its epoch"),
            ("summary.csv", lambda text: text.replace("\n2,", "\nx,"), "summary.csv is not what train.py writes"),
            ("summary.csv", lambda text: text.replace("\n2,", "\n3,"), "line 3: epoch must be 2"),
            ("summary.csv", lambda text: text.replace("\n2,", "\nnan,"), "summary.csv, line 3: epoch must be"),
            ("summary.csv", lambda text: text + "1,2\n", "line 4 has another number of cells"),
            ("results.json", lambda text: text[: len(text) // 2], "results.json is not JSON"),
            ("results.json", lambda text: "[]", "results.json must be an object"),
            ("results.json", lambda text: "{}", "results.json does not say its model"),
            (
                "results.json",
                lambda text: text.replace('"epochs": 2', '"epochs": "2"'),
                "epochs must be a whole number",
            ),
            (
                "results.json",
                lambda text: text.replace('"final": {', '"final": null, "x": {'),
                "final must be an object",
            ),
            ("results.json", lambda text: "[" * 100_000, "results.json is not JSON"),
            ("args.yaml", lambda text: text[: len(text) // 2].rpartition("\n")[0] + "\n", "does not say its"),
            ("args.yaml", lambda text: "lr: 1\n", "args.yaml does not say its batch_size"),
            ("args.yaml", lambda text: text + "lr: 1\n", "the key 'lr' twice"),
            ("args.yaml", lambda text: text.replace("epochs: 2", "epochs: two", 1), "--epochs: invalid count value"),
            ("args.yaml", lambda text: text.replace("model: ", "mode: "), "does not say its model"),
        ],
    )
    def test_a_damaged_file_of_a_run_is_named(self, name: str, change: Any, words: str, copy: Path, tmp_path: Path):
        text = (copy / name).read_text()
        assert change(text) != text
        (copy / name).write_text(change(text))
        with pytest.raises(UserError) as error:
            publish.main([str(copy), "--repo-id", "me/x", "--no-eval", "--dry-run", str(tmp_path / "out")])
        line = one_line(error)
        assert words in line and "needs the other files of its run" in line, line
        assert not (tmp_path / "out").exists()

    def test_a_file_of_another_run_is_noticed(self, copy: Path):
        results = json.loads((copy / "results.json").read_text())
        results["final"]["steps"] += 1
        (copy / "results.json").write_text(json.dumps(results))
        with pytest.raises(UserError, match="they are not of one run, or one was cut"):
            read(copy / "last.safetensors")

    def test_a_card_with_such_names_is_a_card(self, copy: Path, tmp_path: Path):
        args = yaml.safe_load((copy / "args.yaml").read_text())
        args |= {
            "dataset": "torch/a: [b](javascript:x) <script> | \"'",
            "val_split": "`x`|y",
            "opt": 'sgd"); import os #',
        }
        (copy / "args.yaml").write_text(yaml.safe_dump(args))
        results = json.loads((copy / "results.json").read_text())
        for start in (results, *results["starts"]):
            start["machine"]["cpu"] = "x|\n\n# owned\n---\n<img src=x>"
        (copy / "results.json").write_text(json.dumps(results))
        publish.main([str(copy), "--repo-id", "me/x", "--no-eval", "--dry-run", str(tmp_path / "out")])
        card = ModelCard.load(tmp_path / "out" / "README.md")
        assert card.data.eval_results[0].dataset_name.endswith("\"'") and card.data.license == "apache-2.0"
        assert "\n# owned" not in card.text and not re.search(r"(?<!\\)<(script|img)", card.text)
        code = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
        for block in code:
            compile(block, "card", "exec")
        assert 'opt="sgd\\"); import os #"' in code[1]

    @FUZZ
    @given(st.text("0123456789,.\nenai-x\"' ", max_size=60) | st.lists(st.lists(st.floats(), max_size=3)).map(csv_text))
    def test_any_summary(self, place: Path, text: str):
        header = "epoch,steps,seconds,epoch_seconds,train_loss\n"
        for start in ("", header, header + "1,2,3,4,5\n"):
            (place / "summary.csv").write_text(start + text)
            try:
                rows = read_summary(place / "summary.csv")
            except UserError as error:
                assert "summary.csv" in message(error)
            else:
                assert [row["epoch"] for row in rows] == list(range(1, len(rows) + 1))

    @settings(FUZZ, max_examples=40)
    @given(data=st.data(), value=JSON)
    def test_any_results(self, run: Path, place: Path, data: st.DataObject, value: Any):
        folder = place / "any-results"
        if not folder.exists():
            shutil.copytree(run, folder)
        results = json.loads((run / "results.json").read_text())
        start = results["starts"][0]
        inside = data.draw(
            st.sampled_from([results, results["final"], start, start["machine"], start["versions"], results["machine"]])
        )
        inside[data.draw(st.sampled_from(sorted(inside)))] = value
        (folder / "results.json").write_text(json.dumps(results))
        try:
            trained = read(folder / "last.safetensors")
        except UserError as error:
            assert "results.json" in message(error) or "training failed" in message(error)
        else:
            from timm_decor.publishing import card, repository

            options = publish._options(publish_parser().parse(["x", "--repo-id", "me/x"]), trained)
            card.render(trained, repository._results(trained, options, None), options, "me/x", folder)
