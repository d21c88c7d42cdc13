"""The arguments that timm's train.py has: docs/training.md's table against the parser, and what each of them does."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import nn
from training_runs import DECOR, ROOT, created, history, options, reset_accelerate, train, training_batches

from timm_decor.errors import UserError
from timm_decor.training import build
from timm_decor.training import run as run_module
from timm_decor.training.args import train_parser, validate_parser
from timm_decor.training.distill import Distillation, make_distillation
from timm_decor.training.keeping.metadata import stored_metadata
from timm_decor.training.optim import make_loss, make_optimizer
from timm_decor.training.runtime import make_accelerator

DATA = {
    "input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bilinear", "crop_pct": 1.0,
    "crop_mode": "center",
}  # fmt: skip
ROW = re.compile(r"^\| `(--[\w-]+|data)` \| (same|renamed|left out) \| (.*) \|$")


@pytest.fixture(scope="module")
def rows() -> list[tuple[str, str, str]]:
    lines = (ROOT / "docs" / "training.md").read_text().splitlines()
    return [match.groups() for line in lines if (match := ROW.match(line))]


@pytest.fixture(scope="module")
def ours() -> set[str]:
    return {flag for action in train_parser()._actions for flag in action.option_strings}


class TestTable:
    """The page's rows are timm's arguments; this side's must be true of our parser."""

    def test_it_holds_all_of_timms(self, rows: list[tuple[str, str, str]]):
        flags = [flag for flag, _, _ in rows]
        assert len(flags) == len(set(flags)) == 173, "timm's train.py of 2026-08-08 has 172 and the positional data"

    def test_what_it_calls_the_same_is_there(self, rows: list[tuple[str, str, str]], ours: set[str]):
        assert [flag for flag, what, _ in rows if what == "same" and flag not in ours] == []

    def test_what_it_calls_left_out_is_not(self, rows: list[tuple[str, str, str]], ours: set[str]):
        assert [flag for flag, what, _ in rows if what != "same" and flag in ours] == []

    def test_new_names_exist_and_reasons_are_given(self, rows: list[tuple[str, str, str]], ours: set[str]):
        validates = {flag for action in validate_parser()._actions for flag in action.option_strings}
        for flag, what, text in rows:
            named = re.findall(r"`(--[\w-]+)", text)
            assert all(name in ours | validates for name in named), (flag, named)
            assert what == "same" or text, f"{flag} is {what} without a reason"
            assert what != "renamed" or named, f"{flag} is renamed to nothing"

    def test_our_other_arguments_are_listed(self, rows: list[tuple[str, str, str]], ours: set[str]):
        timms = {flag for flag, _, _ in rows}
        text = (ROOT / "docs" / "training.md").read_text()
        own = {flag for flag in ours - timms if not re.match(r"--(no-|decor|help)|-\w\b|-vb", flag)}
        assert [flag for flag in sorted(own) if f"`{flag}" not in text] == []


def model_of(*words: str) -> nn.Module:
    torch.manual_seed(0)
    return created(options(*words))


class TestModel:
    def test_head(self):
        plain, changed = model_of(), model_of("--head-init-scale", "0.5", "--head-init-bias", "-2")
        assert torch.equal(changed.fc.weight, 0.5 * plain.fc.weight) and set(changed.fc.bias.tolist()) == {-2.0}
        both = model_of("--model", "deit_tiny_distilled_patch16_224", "--head-init-bias", "1")
        assert set(both.head.bias.tolist()) == set(both.head_dist.bias.tolist()) == {1.0}

    def test_batch_norm(self):
        norms = [
            m
            for m in model_of("--bn-momentum", "0.25", "--bn-eps", "1e-3").modules()
            if "BatchNorm" in type(m).__name__
        ]
        assert norms and {(m.momentum, m.eps) for m in norms} == {(0.25, 1e-3)}

    def test_no_dropout_is_none_as_in_timms(self):
        """Some architectures have another default than train.py."""
        assert timm.create_model("ghostnet_050").drop_rate == 0.2
        assert (
            model_of("--model", "ghostnet_050").drop_rate
            == 0
            == model_of("--model", "ghostnet_050", "--drop", "0").drop_rate
        )
        assert model_of("--model", "ghostnet_050", "--drop", "0.3").drop_rate == 0.3

    def test_a_checkpoint_to_begin_with_is_the_averaged_one_as_in_timm(self, tmp_path: Path):
        model = timm.create_model("test_resnet", num_classes=10)
        weights = model.state_dict()
        averaged = {name: torch.ones_like(value) for name, value in weights.items()}
        torch.save({"state_dict": weights, "state_dict_ema": averaged}, tmp_path / "w.pth.tar")
        theirs = timm.create_model("test_resnet", num_classes=10, checkpoint_path=str(tmp_path / "w.pth.tar"))
        ours = model_of("--initial-checkpoint", tmp_path / "w.pth.tar")
        for ours_value, value in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
            assert torch.equal(ours_value, value)

    def test_pooling_and_drop_block(self):
        assert type(model_of("--gp", "max").global_pool.pool).__name__ == "AdaptiveMaxPool2d"
        assert any(type(m).__name__ == "DropBlock2d" for m in model_of("--drop-block", "0.1").modules())
        with pytest.raises(UserError, match="cannot create vit_tiny_patch16_224: .*drop_block"):
            model_of("--model", "vit_tiny_patch16_224", "--drop-block", "0.1")

    def test_layer_decay_limits(self):
        def least(words: str) -> float:
            optimizer = make_optimizer(options(*words.split()).optimizer, model_of(), 0.1)
            return min(group["lr_scale"] for group in optimizer.param_groups)

        assert least("--layer-decay 0.5 --layer-decay-min-scale 0.1 --layer-decay-no-opt-scale 0.05") >= 0.05
        assert least("--layer-decay 0.5") < 0.1


def images_of(*words: str) -> torch.Tensor:
    """The first training batch."""
    given = options("--no-cache-images", "--train-split", "train[:64]", *words)
    return next(iter(training_batches(given, build.data_config(given.image, model_of(), 3))))[0]


class TestImages:
    @pytest.mark.parametrize(
        "words",
        [
            "--gaussian-blur-prob 1",
            "--color-jitter 0.4",
            "--aa rand-m9-mstd0.5",
            "--reprob 1",
            "--vflip 1",
            "--mixup 0.5",
            "--cutmix 1",
        ],
    )
    def test_each_augmentation_changes_them(self, words: str):
        assert not torch.equal(images_of(), images_of(*shlex.split(words)))

    def test_color_jitter_has_a_chance(self):
        assert torch.equal(images_of(), images_of("--color-jitter", "0.4", "--color-jitter-prob", "0"))


def test_bce_arguments():
    output, labels = torch.randn(4, 10), torch.arange(4)

    def loss(*words: str) -> float:
        given = options("--bce-loss", *words)
        return float(make_loss(given.loss, given.label)(output, labels))

    assert loss("--bce-sum") == pytest.approx(10 * loss(), rel=1e-5)
    assert loss("--bce-pos-weight", "3") > loss()


def test_averaging_with_warm_up(tmp_path: Path):
    run = train(tmp_path / "run", "--epochs", 1, "--model-ema", "--model-ema-warmup")
    mine, averaged = load_file(run / "last.safetensors"), load_file(run / "last-ema.safetensors")
    start = model_of().state_dict()
    # without warm-up the average would have moved by 0.08 % of the way in four updates
    away = {
        name: float((weights["fc.weight"] - start["fc.weight"]).norm())
        for name, weights in (("mine", mine), ("averaged", averaged))
    }
    assert 0.1 * away["mine"] < away["averaged"] < away["mine"]


class TestDistillation:
    CONFIG = {"mean": (0.3, 0.4, 0.5), "std": (0.2, 0.3, 0.4), "input_size": (3, 32, 32)}

    def made(self, teacher: nn.Module, *words: str) -> Distillation:
        reset_accelerate()
        return Distillation(
            teacher, options("--kd-model-name", "any", *words).distill, self.CONFIG, Accelerator(cpu=True)
        )

    def asked(
        self, words: list[str], student: nn.Module, config: dict, names: Sequence[str] = ()
    ) -> Distillation | None:
        given = options(*words)
        return make_distillation(given.distill, student, given.model, config, names, Accelerator(cpu=True), False)

    def batch(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return torch.randn(4, 3, 32, 32), torch.randn(4, 10), torch.arange(4)

    @pytest.mark.parametrize(
        "words",
        ["", "--task-loss-weight 0.3", "--distill-loss-weight 0.7", "--task-loss-weight 2 --distill-loss-weight 3"],
    )
    def test_it_is_timms_loss(self, words: str):
        try:
            task_module = importlib.import_module("timm.task")
        except ImportError:
            pytest.skip("this timm has no distillation to compare with")
        teacher, student = model_of().eval(), model_of("--head-init-scale", "3")
        student.pretrained_cfg = {**student.pretrained_cfg, "mean": self.CONFIG["mean"], "std": self.CONFIG["std"]}
        given = options("--kd-model-name", "any", *shlex.split(words)).distill
        theirs = task_module.LogitDistillationTask(
            student, teacher, nn.CrossEntropyLoss(), distill_loss_weight=given.distill_loss_weight,
            task_loss_weight=given.task_loss_weight, temperature=2.0, device=torch.device("cpu"), verbose=False,
        )  # fmt: skip
        images, _, labels = self.batch()
        student.eval()
        ours = self.made(teacher, *shlex.split(words), "--kd-temperature", "2")
        output = student(images)
        loss = ours(nn.functional.cross_entropy(output, labels), output, images)
        assert loss.item() == pytest.approx(theirs(images, labels)["loss"].item(), rel=1e-5)

    @pytest.mark.parametrize("kind", ["soft", "hard"])
    def test_by_token(self, kind: str):
        teacher = model_of().eval()
        made = self.made(
            teacher, "--kd-distill-type", "token", "--kd-token-distill-type", kind, "--task-loss-weight", "0"
        )
        images, logits, _ = self.batch()
        with torch.no_grad():
            right = teacher(images * made._factor + made._offset)
        agreeing, other = (made(torch.zeros(()), (logits, dist), images) for dist in (30 * right, -30 * right))
        assert agreeing < other

    def test_the_teacher_stays_as_it_is_and_teaches(self, tmp_path: Path):
        weights = {**model_of().state_dict()}
        weights["fc.bias"] = torch.tensor([9.0] + [0.0] * 9)  # it says 0 whatever it sees
        save_file(weights, tmp_path / "teacher.safetensors")
        teacher = ("--kd-model-name", "test_resnet", "--kd-pretrained-path", tmp_path / "teacher.safetensors")
        words = (*DECOR, "--epochs", 2, "--lr", 0.2, "--task-loss-weight", 0)
        run = train(tmp_path / "run", *words, *teacher)
        model = timm.create_model("test_resnet", num_classes=10, checkpoint_path=str(run / "last.safetensors")).eval()
        images, _, _ = self.batch()
        assert (model(images).argmax(1) == 0).all()
        assert history(run)[-1]["train_loss"] < history(run)[0]["train_loss"]

    def test_a_distilled_deit_learns_by_token(self):
        reset_accelerate()
        words = shlex.split(
            "--model deit_tiny_distilled_patch16_224 --kd-model-name test_resnet --kd-distill-type token"
        )
        student = model_of("--model", "deit_tiny_distilled_patch16_224")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("timm_decor.training.distill._teacher", lambda *_: model_of())
            config = {**self.CONFIG, "input_size": (3, 224, 224)}
            assert self.asked(words, student, config) is not None
        assert len(student.train()(torch.zeros(1, 3, 224, 224))) == 2

    def test_a_comparison_warms_up_a_model_with_two_heads(self):
        reset_accelerate()
        model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=1, num_classes=10)
        model.set_distilled_training(True)
        arm = SimpleNamespace(model=model, name="deit", accelerator=make_accelerator("cpu", False, "float16"))
        run_module._warm_up([arm, arm], (3, 32, 32), 2)
        assert all(parameter.grad is None for parameter in model.parameters())

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            ("--kd-model-name resnet81", "unknown model 'resnet81'; near: "),
            (
                "--kd-model-name resnet18.a1_in1k",
                "teacher resnet18.a1_in1k knows 1000 classes, not these 10: --kd-pretrained-path",
            ),
            ("--kd-model-name test_resnet --kd-pretrained-path nope.pth", "no checkpoint file nope.pth"),
            ("--kd-model-name test_resnet --kd-distill-type token", "test_resnet has no distillation head"),
            ("--kd-pretrained-path x.pth", "--kd-pretrained-path does nothing without --kd-model-name"),
        ],
    )
    def test_it_refuses_in_one_line(self, words: str, expected: str):
        reset_accelerate()
        with pytest.raises(UserError) as error:
            self.asked(words.split(), model_of(), self.CONFIG)
        assert expected in str(error.value) and "\n" not in str(error.value)

    def test_a_teacher_of_the_hub_keeps_its_head(self, tmp_path: Path):
        """What timm knows by such a name it knows once it is there; a new head would teach noise."""
        folder = tmp_path / "teacher"
        save_for_hf(timm.create_model("test_resnet", num_classes=10), folder, safe_serialization=True)
        words = ["--kd-model-name", f"local-dir:{folder}"]
        reset_accelerate()
        made = self.asked(words, model_of(), self.CONFIG)
        assert made is not None
        weights = load_file(folder / "model.safetensors")
        assert torch.equal(made.teacher.state_dict()["fc.weight"], weights["fc.weight"])
        save_for_hf(timm.create_model("test_resnet", num_classes=7), folder, safe_serialization=True)
        with pytest.raises(UserError, match="teacher local-dir:.* knows 7 classes, not these 10"):
            self.asked(words, model_of(), self.CONFIG)

    def test_classes_are_matched_by_name(self, tmp_path: Path):
        path, names = tmp_path / "teacher.safetensors", [f"class {i}" for i in range(10)]
        teacher = model_of()
        save_file(teacher.state_dict(), path, stored_metadata("test_resnet", 10, DATA, {}, names[::-1]))
        words = ["--kd-model-name", "test_resnet", "--kd-pretrained-path", str(path), "--task-loss-weight", "0"]
        images = self.batch()[0]
        reset_accelerate()
        made = self.asked(words, model_of(), self.CONFIG, names)
        assert made is not None
        with torch.no_grad():
            right = teacher.eval()(images * made._factor + made._offset).flip(1)
        assert made(torch.zeros(()), right, images).item() == pytest.approx(0, abs=1e-6)
        with pytest.raises(UserError, match="the teacher does not know class 'another'"):
            self.asked(words, model_of(), self.CONFIG, [*names[:9], "another"])

    def test_a_grey_teacher_is_normalised_as_it_is_alone(self):
        reset_accelerate()
        teacher = timm.create_model("test_resnet", num_classes=10, in_chans=1)
        teacher.pretrained_cfg = {**teacher.pretrained_cfg, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
        given = options("--kd-model-name", "any").distill
        config = {"mean": (0.45,), "std": (0.25,), "input_size": (1, 32, 32)}
        made = Distillation(teacher, given, config, Accelerator(cpu=True))
        assert (made._factor.item(), made._offset.item()) == pytest.approx((0.25 / 0.5, (0.45 - 0.2) / 0.5))

    def test_the_teachers_opinion_is_not_rounded(self):
        """Under bfloat16 its logits are; its probabilities still sum to one."""
        reset_accelerate()
        teacher = model_of().eval()
        given = options("--kd-model-name", "any").distill
        made = Distillation(teacher, given, self.CONFIG, Accelerator(cpu=True, mixed_precision="bf16"))
        images, _, _ = self.batch()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits = teacher(images * made._factor + made._offset).float()
        ours = torch.randn(4, 10)
        t = given.kd_temperature
        right = nn.functional.kl_div(
            (ours / t).log_softmax(1), (logits / t).log_softmax(1), reduction="batchmean", log_target=True
        )
        assert made(torch.zeros(()), ours, images).item() == pytest.approx(right.item() * t**2, rel=1e-5)

    def test_a_teacher_of_another_size(self):
        with pytest.raises(UserError, match=r"--kd-model-name: it does not take images of \(3, 32, 32\)"):
            self.made(timm.create_model("vit_tiny_patch16_224", num_classes=10))


@pytest.mark.parametrize("name", ["--initial-checkpoint", "--pretrained-path"])
def test_a_head_of_other_classes_is_told_of(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The same classes under other numbers would be wrong for each of them; others are a choice."""
    digits = [str(digit) for digit in range(10)]
    path = tmp_path / "weights.safetensors"
    save_file(model_of().state_dict(), path, stored_metadata("test_resnet", 10, DATA, {}, digits[::-1]))
    with pytest.raises(UserError, match=f"{name} .* numbers the classes otherwise: '0' is 9 there and 0 here"):
        train(tmp_path / "run", "--epochs", 1, name, path)
    for names, told in ((digits, False), ([], False), ([f"kind {digit}" for digit in digits], True)):
        save_file(model_of().state_dict(), path, stored_metadata("test_resnet", 10, DATA, {}, names))
        train(tmp_path / f"run{len(names)}{told}", "--epochs", 1, name, path)
        assert (f"{name}: its head knows other classes ('kind 0', ...)" in capsys.readouterr().out) == told


def test_every_switch_can_be_undone():
    switches = [a for a in train_parser()._actions if isinstance(a, argparse.BooleanOptionalAction)]
    assert all(any(flag.startswith("--no-") for flag in action.option_strings) for action in switches)
