"""The command lines: what is accepted, what is refused in one line, and two runs from start to end."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training_runs import DECOR, ROOT, TINY, history, reset_accelerate, train

from timm_decor import DecorConfig, knobs
from timm_decor.config import REMOVED_DEFAULTS, REMOVED_KNOBS
from timm_decor.errors import UserError, exit_code
from timm_decor.training import args as args_module
from timm_decor.training import run as train_module
from timm_decor.training import validation, without_effect
from timm_decor.training.args import as_recipe, decor_config, train_parser
from timm_decor.training.run import parse
from timm_decor.training.without_effect import idle

DIGITS = ("--dataset", "digits", "--device", "cpu", "-j", "0", "--split", "test[:70]")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of a decorrelated test_resnet with averaged weights."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    return train(folder, *DECOR, "--epochs", 1, "--model-ema", "--model-ema-decay", "0.5")


def refused(main: Callable[[Sequence[str]], None], prog: str, words: list[str], capsys: pytest.CaptureFixture) -> str:
    """The one line that a command line is refused with."""
    reset_accelerate()
    assert exit_code(prog, main, words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{prog}: error: ") and error.count("\n") == 1 and "Traceback" not in error
    return error.removeprefix(f"{prog}: error: ").strip()


TRAIN_ERRORS = [
    ("--model decor_resnet81", "unknown model 'decor_resnet81'; near: decor_resnet1"),
    ("--model resnet81", "unknown model 'resnet81'; near: resnet"),
    ("--model decor_resnet18.a9_in1k", "decor_resnet18 has no tag 'a9_in1k'; tags: "),
    ("--model resnet18.a9_in1k", "resnet18 has no tag 'a9_in1k'; tags: a1_in1k"),
    ("--model-kwargs depth=3", "cannot create test_resnet: "),
    ("--model-kwargs depth", "takes key=value, not 'depth'"),
    ("--decor --decor-rule witen", "unknown rule 'witen'; did you mean 'whiten'?"),
    ("--decor --decor-structure kroneker", "unknown structure 'kroneker'; did you mean 'kronecker'?"),
    ("--decor --decor-rule dbp --decor-structure kronecker", "rule 'dbp' does not go with structure 'kronecker'"),
    ("--decor --decor-rule dbp --decor-structure full --decor-kappa 1.5", "kappa=1.5: must be in [0, 1]"),
    ("--decor --decor-kappa 0.9", "kappa=0.9: rule 'whiten' has no kappa (dbp)"),
    ("--decor --decor-damping -1", "damping=-1.0"),
    ("--decor --decor-every 0", "every=0"),
    ("--decor-damping 3", "--decor-damping does nothing for plain test_resnet: add --decor"),
    ("--compare", "--compare needs a decorrelated model"),
    ("--opt sdg", "unknown optimizer 'sdg'; near: sgd"),
    ("--opt sgd --opt-kwargs foo=1", "optimizer sgd: "),
    ("--sched cosin", "argument --sched: invalid choice: 'cosin'"),
    ("--lrr 0.1", "unknown argument '--lrr'; near: --lr"),
    ("--epochs 0", "argument --epochs: must be 1 or more, not 0"),
    ("--epochs x", "argument --epochs: invalid count value: 'x'"),
    ("--lr nan", "argument --lr: must be 0 or more, not nan"),
    ("--clip-grad 0", "argument --clip-grad: must be above 0, not 0"),
    ("--smoothing 1", "argument --smoothing: must be in [0, 1), not 1"),
    ("--crop-pct 20", "argument --crop-pct: must be in [0.1, 10], not 20"),
    ("--std 0", "argument --std: must be above 0, not 0"),
    ("--mean nan", "argument --mean: must be finite, not nan"),
    ("--head-init-bias nan", "argument --head-init-bias: must be finite, not nan"),
    ("--sched step --decay-epochs 0", "argument --decay-epochs: must be above 0, not 0"),
    (
        "--warmup-prefix --warmup-epochs 0.5",
        "--warmup-prefix puts whole epochs before the schedule, not --warmup-epochs 0.5",
    ),
    ("--lr-cycle-mul 0", "argument --lr-cycle-mul: must be above 0, not 0"),
    ("--cutmix-minmax 0.8 0.2", "argument --cutmix-minmax: the smaller one first, not 0.8 0.2"),
    ("--train-crop-mode rkrc --scale 0 1", "argument --scale: must be above 0, not 0"),
    ("--opt adamw --opt-betas 0.9", "optimizer adamw: list index out of range; --opt-betas has too few values for it"),
    ("--torchcompile inducter", "--torchcompile inducter: no backend of torch.compile; near: inductor"),
    ("--model-kwargs features_only=True", "FeatureListNet is no classifier: it says no number of classes"),
    ("--compare-lr 0.1", "--compare-lr does nothing without --compare"),
    ("--find-updates 5", "--find-updates does nothing without --find-lr"),
    ("--task-loss-weight 0.5", "--task-loss-weight does nothing without --kd-model-name"),
    ("--class-map names.txt", "--class-map numbers the classes of folders and of wds/, not those of --dataset digits"),
    ("--model vit_tiny_patch16_224 --img-size 48", "; --model-kwargs img_size=48 makes it for such images"),
    ("--batch-size 200", "the training split has 128"),
    (
        "--progressive-size 48",
        "argument --progressive-size: write SIZE:SHARE,SIZE:SHARE, as in 48:0.4,64:0.6, not '48'",
    ),
    (
        "--model vit_tiny_patch16_224 --model-kwargs img_size=32 depth=1 --epochs 2 --progressive-size 16:0.5,32:0.5",
        "does not take images of (3, 16, 16)",
    ),
    (
        "--decor --compare --compare-epochs 2 --progressive-size 16:0.5,32:0.5",
        "they need the same --epochs, 1",
    ),
    ("--mixup 0.5 --batch-size 33", "--batch-size must be even, not 33"),
    ("--aa nonsense", "timm cannot make that transform"),
    ("--num-classes 4", "with 4 classes labels are 0 to 3"),
    ("--in-chans 2", "images have 1 or 3 channels, not 2"),
    ("--mean 0.5 0.5", "--mean takes 1 or 3 values, not 2"),
    ("--dataset digit", "unknown dataset 'digit'; near: digits"),
    ("--dataset parquet", "--dataset parquet needs --data-dir"),
    ("--dataset parquet --data-dir {tmp}/nope", "nope does not exist"),
    ("--dataset parquet --data-dir {tmp}", "is empty"),
    ("--dataset torch/cifar10 --data-dir {tmp}", "cannot open torch/cifar10, split train[:128]"),
    ("--train-split train[", "split 'train['"),
    ("--device tpu9", "--device tpu9: no such device"),
    ("--amp", "--amp in float16 needs a GPU"),
    ("-c {tmp}/nope.yaml", "cannot read recipe"),
    ("--initial-checkpoint {tmp}/nope.pth", "no checkpoint file"),
    ("--resume {tmp}/nope", "nothing to resume"),
    ("--output {file}", "cannot make output folder"),
    ("--eval-metric top6", "argument --eval-metric: invalid choice"),
    ("--model vgg11 --grad-checkpointing", "cannot create vgg11 with --grad-checkpointing: gradient checkpointing not"),
    (
        "--decor --compare -b 1 --img-size 32",
        "test_resnet: --batch-size 1 at 32 px leaves BatchNorm one value a channel",
    ),
]


@pytest.mark.parametrize(("words", "expected"), TRAIN_ERRORS, ids=[words for words, _ in TRAIN_ERRORS])
def test_train_refuses_in_one_line(words: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    file = tmp_path.parent / f"{tmp_path.name}.txt"
    file.touch()
    extra = words.format(tmp=tmp_path, file=file).split()
    output = [] if "--output" in extra else ["--output", str(tmp_path.parent / f"{tmp_path.name}-out")]
    line = refused(train_module.main, "train.py", [*TINY, "--epochs", "1", *output, *extra], capsys)
    assert expected in line


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--clip-mode agc", "--clip-mode does nothing without --clip-grad"),
        ("--clip-mode agc --clip-grad 0.1", ""),
        ("--bce-target-thresh 0.2", "--bce-target-thresh does nothing without --bce-loss"),
        ("--input-size 3 32 32", "--img-size does nothing beside --input-size"),
        ("--kd-temperature 2", "--kd-temperature does nothing without --kd-model-name"),
        ("--mixup-prob 0.5", "--mixup-prob does nothing without --mixup or --cutmix or --cutmix-minmax"),
        ("--mixup-prob 0.5 --cutmix 1", ""),
        ("--model-ema-decay 0.9", "--model-ema-decay does nothing without --model-ema"),
        ("--color-jitter-prob 0.5", "--color-jitter-prob does nothing without --color-jitter"),
        ("--no-aug --aa rand-m9", "--aa does nothing beside --no-aug"),
        (
            "--sched step --cooldown-epochs 3",
            "--cooldown-epochs does nothing with --sched step: it is for cosine, poly, tanh, rsqrt, wsd",
        ),
        ("--cooldown-epochs 3", ""),
        ("--decay-rate 0.5", "--decay-rate does nothing with --sched cosine: it is for multistep, plateau, poly, step"),
        ("--decay-milestones 3 6", "--decay-milestones does nothing with --sched cosine: it is for multistep"),
        ("--sched step --decay-rate 0.5 --decay-epochs 2", ""),
        ("--decay-epochs 90", ""),
        ("--decay-epochs 30", "--decay-epochs does nothing with --sched cosine: it is for rsqrt, wsd, step"),
        (
            "--sched step --min-lr 0.1",
            "--min-lr does nothing with --sched step: it is for cosine, poly, tanh, rsqrt, wsd, plateau",
        ),
        ("--sched none --warmup-epochs 3", "--warmup-epochs does nothing with --sched none"),
        ("--sched none", ""),
        ("--lr-base 0.7", "--lr-base does nothing beside --lr"),
        ("--project-name x", "--project-name does nothing without --log-with"),
    ],
)
def test_what_waits_for_another_argument_is_told_of(words: str, line: str):
    parser = train_parser()
    assert idle(parser.parse([*TINY, *words.split()]), parser) == [line] * bool(line)


def test_each_schedule_has_its_usual_decay():
    """Recorded as a number, as it was before there was more than one: a run of then that goes on has not changed."""
    usual = {sched: parse([*TINY, "--sched", sched]).decay_epochs for sched in ("cosine", "step", "wsd", "rsqrt")}
    assert usual == {"cosine": 90, "step": 90, "wsd": 0.2, "rsqrt": 0.2}
    assert parse([*TINY, "--sched", "wsd", "--decay-epochs", "5"]).decay_epochs == 5


def test_what_a_begun_run_has_is_told_of_and_not_refused(tmp_path: Path):
    (tmp_path / "args.yaml").write_text("compare_lr: 0.1\nclass_map: names.txt")
    with pytest.raises(UserError, match="--compare-lr does nothing without --compare"):
        parse(["-c", str(tmp_path / "args.yaml")])
    parser = train_parser()
    assert idle(parse(["--resume", str(tmp_path)]), parser) == ["--compare-lr does nothing without --compare"]
    assert parse(["-c", str(tmp_path / "args.yaml")], is_begun=True).compare_lr == 0.1


def test_a_recipe_beside_a_run_to_resume_leaves_the_runs_other_arguments(tmp_path: Path):
    (tmp_path / "args.yaml").write_text("lr: 0.3\nepochs: 2\nweight_decay: 0.01")
    (tmp_path / "r.yaml").write_text("epochs: 5\nmomentum: 0.5")
    args = parse(["-c", str(tmp_path / "r.yaml"), "--resume", str(tmp_path), "--weight-decay", "0.02"])
    assert (args.lr, args.epochs, args.momentum, args.weight_decay) == (0.3, 5, 0.5, 0.02)


def test_a_recipe_beside_a_run_to_resume_takes_its_arguments_back(tmp_path: Path):
    """Null, nothing and false are values, too; and of lists the recipe's counts, without the run's."""
    (tmp_path / "args.yaml").write_text(
        "clip_grad: 1.0\nfreeze: [conv1]\nmodel_kwargs: {depth: 2}\nno_aug: true\nlog_with: [tensorboard]\nlr: 0.3"
    )
    (tmp_path / "r.yaml").write_text("clip-grad: null\nfreeze: []\nmodel_kwargs: {}\nno_aug: false\nlog-with: [wandb]")
    args, default = parse(["-c", str(tmp_path / "r.yaml"), "--resume", str(tmp_path)]), parse([])
    for name in ("clip_grad", "freeze", "model_kwargs", "no_aug"):
        assert getattr(args, name) == getattr(default, name), name
    assert (args.log_with, args.lr) == (["wandb"], 0.3)


def test_a_hint_names_schedules_that_there_are():
    assert {name for names in without_effect._SCHEDULES.values() for name in names} <= set(args_module._SCHEDULES)


def test_a_recipe_without_augmentation_can_be_undone(tmp_path: Path):
    (tmp_path / "r.yaml").write_text("no_aug: true")
    recipe = ["-c", str(tmp_path / "r.yaml")]
    assert parse(recipe).no_aug is True and parse([*recipe, "--aug"]).no_aug is False
    (tmp_path / "r.yaml").write_text("no_aug: false")
    assert parse(recipe).no_aug is False and parse([*recipe, "--no-aug"]).no_aug is True


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture):
    words = [*TINY, "--device", "cuda", "--output", str(tmp_path)]
    assert "no usable CUDA GPU; use --device cpu" in refused(train_module.main, "train.py", words, capsys)


class TestRecipes:
    def written(self, folder: Path, text: str) -> str:
        (folder / "r.yaml").write_text(text)
        return str(folder / "r.yaml")

    def test_the_command_line_overrides_the_recipe(self, tmp_path: Path):
        recipe = self.written(
            tmp_path, "lr: 0.5\nopt_betas: [0.8, 0.9]\namp: true\nmodel-kwargs: {a: 1, b: x}\ndecor_every: 7\n"
        )
        args = parse(["-c", recipe, "--lr", "0.25", "--no-amp"])
        assert (args.lr, args.opt_betas, args.amp, args.decor_every) == (0.25, [0.8, 0.9], False, 7)
        assert args.model_kwargs == {"a": 1, "b": "x"}

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("epoch: 3", "unknown key 'epoch'; near: epochs"),
            ("epochs: -1", "argument --epochs: must be 1 or more, not -1"),
            ("amp: 3", "must be true or false, not 3"),
            ("lr: true", "takes a value, not True"),
            ("- lr", "must be a mapping"),
            ("a: [", "is not YAML"),
            ("config: other.yaml", "unknown key 'config'"),
        ],
    )
    def test_bad_ones_are_refused(self, text: str, expected: str, tmp_path: Path):
        with pytest.raises(UserError) as error:
            parse(["-c", self.written(tmp_path, text)])
        assert expected in str(error.value)

    def test_what_a_run_writes_reads_back(self, tmp_path: Path):
        args = parse([*TINY, "--no-aug", "--mean", "-0.1", "--no-sched-on-updates", "--opt-kwargs", "a=1", "--decor"])
        recipe = self.written(tmp_path, yaml.safe_dump(as_recipe(args)))
        assert as_recipe(parse(["-c", recipe])) == as_recipe(args)

    @pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
    def test_the_published_ones_parse(self, path: Path):
        args = parse(["-c", str(path), "--compare"])
        decor_config(args)
        assert f"recipes/{path.name}" in path.read_text().split("\n\n")[0], "the header says how it is run"


class TestParser:
    @pytest.mark.parametrize("words", [["--decor-warmup", "3"], ["--decor-follow-lr"], ["--no-decor-follow-lr"],
                                       ["--decor-block-dim=9"]])  # fmt: skip
    def test_a_knob_that_was_removed_says_why(self, words, tmp_path):
        flag = words[0].split("=")[0].replace("--no-", "--")
        with pytest.raises(UserError, match=f"^{flag} was removed: [^\n]+$"):
            train_module.parse(words)
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(f"{flag[2:]}: 3\n")
        with pytest.raises(UserError, match=f"recipe .*: {flag} was removed: "):
            train_module.parse(["-c", str(recipe)])

    def test_a_row_is_enough_to_remove_a_knob(self, tmp_path, monkeypatch):
        monkeypatch.setitem(REMOVED_KNOBS, "decor_zest", "use salt")
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text("decor_zest: true\n")
        refusals = [
            (UserError, "--decor-zest was removed: use salt", lambda: train_module.parse(["--decor-zest=1"])),
            (UserError, "--decor-zest was removed: use salt", lambda: train_module.parse(["-c", str(recipe)])),
            (ValueError, "TIMM_DECOR_DECOR_ZEST was removed: use salt",
             lambda: knobs.from_environment({"TIMM_DECOR_DECOR_ZEST": "1"})),
            (ValueError, "no decor_zest any more: use salt", lambda: DecorConfig.from_dict({"decor_zest": 1})),
        ]  # fmt: skip
        for kind, words, call in refusals:
            with pytest.raises(kind, match=f"{words}$"):
                call()

    @pytest.mark.parametrize(
        "path", sorted((ROOT / "hub" / "staged").glob("*/recipe.yaml")), ids=lambda p: p.parent.name
    )
    def test_recipes_of_staged_weights_are_read(self, path):
        assert decor_config(parse(["-c", str(path)])) == DecorConfig()

    def test_recipes_of_before_are_read(self, tmp_path):
        """They name knobs that are gone, at the values with which those did nothing."""
        words = {knobs.dest(name): value for name, value in REMOVED_DEFAULTS.items()}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(words | {"decor_every": 5}))
        assert decor_config(parse(["-c", str(tmp_path / "recipe.yaml")])) == DecorConfig(every=5)

    def test_every_knob_of_decorrelation_has_an_argument(self):
        args = parse(["--decor-damping", "0.125", "--no-decor-preserve-function", "--decor-structure", "space"])
        expected = dataclasses.replace(DecorConfig(), damping=0.125, preserve_function=False, structure="space")
        assert decor_config(args) == expected
        flags = train_parser().format_help()
        for spec in dataclasses.fields(DecorConfig):
            assert f"--decor-{spec.name.removeprefix('decor_').replace('_', '-')}" in flags

    @pytest.mark.skipif(not (ROOT / ".git").exists(), reason="a reminder for the checkout")
    def test_every_argument_is_used(self):
        code = "".join(path.read_text() for path in (ROOT / "timm_decor" / "training").rglob("*.py"))
        # read by timm's own helpers (optimizer_kwargs, scheduler_kwargs, resolve_data_config) from a group of options
        timms = shlex.split(
            "opt_eps opt_betas layer_decay interpolation momentum weight_decay decay_milestones decay_epochs "
            "decay_rate warmup_lr warmup_epochs warmup_prefix cooldown_epochs min_lr patience_epochs lr_noise "
            "lr_noise_pct lr_noise_std lr_cycle_mul lr_cycle_decay lr_cycle_limit lr_k_decay lr_decay_fn "
            "lr_stable_timescale sched_on_updates crop_pct crop_mode mean std layer_decay_min_scale "
            "layer_decay_no_opt_scale"
        )
        for action in train_parser()._actions:
            read = re.search(rf"(\w|\))\.{action.dest}\b", code)
            known = action.dest in timms or action.dest.startswith("decor") or isinstance(action, argparse._HelpAction)
            assert read or known, f"{action.dest} is accepted but read by nothing"


class TestValidate:
    def evaluated(self, folder: Path, *words: str) -> dict:
        reset_accelerate()
        out = folder / "result.json"
        validation.main([*DIGITS, *words, "--results-file", str(out), "--results-format", "json"])
        return json.loads(out.read_text())

    def test_it_agrees_with_training(self, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
        result = self.evaluated(tmp_path, "--checkpoint", str(trained / "last.safetensors"))
        row = history(trained)[-1]
        assert json.loads(capsys.readouterr().out) == result
        assert result["top1"] == pytest.approx(row["eval_top1"], abs=1e-3)
        assert result["top5"] == pytest.approx(row["eval_top5"], abs=1e-3)
        assert result["loss"] == pytest.approx(row["eval_loss"], abs=1e-5)
        assert (result["model"], result["images"], result["img_size"]) == ("test_resnet", 70, 32)

    def test_averaged_weights(self, trained: Path, tmp_path: Path):
        result = self.evaluated(tmp_path, "--checkpoint", str(trained / "last.safetensors"), "--use-ema")
        assert result["loss"] == pytest.approx(history(trained)[-1]["ema_loss"], abs=1e-5)
        in_one_file = self.evaluated(
            tmp_path, "--checkpoint", str(trained / "resume.pt"), "--use-ema", "--model", "test_resnet",
            *("--img-size", "32", "--crop-pct", "1"),
        )  # fmt: skip
        assert in_one_file["loss"] == pytest.approx(result["loss"], abs=1e-5)

    def test_both_names_take_the_same_checkpoint(self, tmp_path: Path):
        import timm

        weights = timm.create_model("resnet10t", num_classes=10).state_dict()
        save_file({key: value.contiguous() for key, value in weights.items()}, tmp_path / "w.safetensors")
        torch.save({"state_dict": weights}, tmp_path / "w.pth")
        pairs = (("resnet10t", "w.safetensors"), ("decor_resnet10t", "w.safetensors"), ("resnet10t", "w.pth"))
        losses = [
            self.evaluated(tmp_path, "--model", name, "--img-size", "32", "--checkpoint", str(tmp_path / file))["loss"]
            for name, file in pairs
        ]
        assert losses == [pytest.approx(losses[0])] * 3

    def test_a_tag_does_not_hide_what_the_checkpoint_says(
        self, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
    ):
        checkpoint = str(trained / "last.safetensors")
        result = self.evaluated(tmp_path, "--checkpoint", checkpoint, "--model", "test_resnet.r160_in1k")
        assert result["img_size"] == 32 and "validate.py" not in capsys.readouterr().err

    def test_it_says_that_another_models_metadata_is_not_used(
        self, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
    ):
        with safe_open(trained / "last.safetensors", "pt") as file:
            metadata = file.metadata() | {"architecture": "resnet10t"}
        save_file(load_file(trained / "last.safetensors"), tmp_path / "w.safetensors", metadata)
        words = ("--model", "test_resnet", "--num-classes", "10")
        result = self.evaluated(tmp_path, "--checkpoint", str(tmp_path / "w.safetensors"), *words)
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("validate.py: ")]
        assert result["img_size"] == 160 and len(said) == 1
        assert "w.safetensors is of resnet10t, not test_resnet: its data configuration" in said[0]

    def test_csv(self, trained: Path, tmp_path: Path):
        reset_accelerate()
        checkpoint = str(trained / "last.safetensors")
        validation.main([*DIGITS, "--checkpoint", checkpoint, "--results-file", str(tmp_path / "r.csv")])
        with open(tmp_path / "r.csv", newline="") as file:
            assert [row["images"] for row in csv.DictReader(file)] == ["70"]

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            ("--checkpoint {run}/last.safetensors --model resnet18", "does not fit resnet18: it has no 'conv1.weight'"),
            (
                "--checkpoint {run}/last.safetensors --num-classes 7",
                "'fc.weight' has shape (10, 96), the model's is",
            ),
            ("--checkpoint {run}/summary.csv --model test_resnet", "summary.csv is not a checkpoint"),
            ("--checkpoint {tmp}/cut.safetensors --model test_resnet", "cut.safetensors is not a checkpoint"),
            ("--checkpoint {tmp}/list.pth --model test_resnet", "list.pth is not a checkpoint"),
            ("--checkpoint {tmp}/evil.pth --model test_resnet", "evil.pth is not a checkpoint"),
            ("--checkpoint {tmp}/bare.safetensors --use-ema --model test_resnet", "no averaged weights"),
            ("--checkpoint {tmp}/nope.safetensors --model test_resnet", "no checkpoint file"),
            ("--checkpoint {tmp}/bare.safetensors", "--model is needed"),
            ("--model resnet81 --checkpoint {run}/last.safetensors", "unknown model 'resnet81'; near: "),
            ("", "--model is needed"),
            ("--checkpoint a --pretrained", "exclude each other"),
            ("--use-ema --model resnet18", "--use-ema needs --checkpoint"),
            (
                "--checkpoint {run}/last.safetensors --results-file {tmp}/cut.safetensors/r.csv",
                "cannot make output folder",
            ),
        ],
    )
    def test_it_refuses_in_one_line(
        self, words: str, expected: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
    ):
        data = (trained / "last.safetensors").read_bytes()
        (tmp_path / "cut.safetensors").write_bytes(data[: len(data) // 2])
        torch.save([1, 2], tmp_path / "list.pth")
        torch.save({"state_dict": Path("x")}, tmp_path / "evil.pth")
        save_file(load_file(trained / "last.safetensors"), tmp_path / "bare.safetensors")
        filled = words.format(run=trained, tmp=tmp_path).split()
        assert expected in refused(validation.main, "validate.py", [*DIGITS, *filled], capsys)


class TestAsCommands:
    def call(self, *words: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=240)

    def test_train_then_validate(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        words = [*TINY, *DECOR, "--epochs", "1", "--compare", "--output", str(tmp_path), "--experiment", "run"]
        done = self.call("train.py", *words)
        assert done.returncode == 0, done.stderr
        assert f"compare  {tmp_path / 'run' / 'compare.png'}" in done.stdout and "| learning rate |" in done.stdout
        assert "\r" not in done.stderr, "no progress bar where nobody looks"
        reset_accelerate()
        validation.main([*DIGITS, "--checkpoint", str(tmp_path / "run" / "plain" / "best.safetensors")])
        assert json.loads(capsys.readouterr().out)["model"] == "test_resnet"

    def test_an_error_is_one_line_and_exit_code_2(self):
        done = self.call("train.py", "--model", "decor_resnet81")
        loading, error = done.stderr.splitlines()
        assert (done.returncode, done.stdout) == (2, "") and loading.startswith("train.py: loading ")
        assert error.startswith("train.py: error: unknown model 'decor_resnet81'; near: ")
