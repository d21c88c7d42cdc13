"""Fine-tuning: a checkpoint with a new head, frozen submodules, layer decay."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from training_runs import DECOR, created, options, train

import timm_decor
from timm_decor.errors import UserError
from timm_decor.training import build
from timm_decor.training.optim import make_optimizer
from timm_decor.training.schedule import Schedule

FROZEN = ("conv1", "bn1", "layer1")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "last.safetensors")


def head_of(key: str) -> bool:
    return key.startswith("fc.")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A test_resnet of 7 classes, whose running statistics and BatchNorm weights are nobody's defaults."""
    torch.manual_seed(1)
    model = timm.create_model("test_resnet", num_classes=7)
    for _ in range(3):
        model(torch.randn(8, 3, 32, 32))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
    path = tmp_path_factory.mktemp("checkpoints") / "old.safetensors"
    save_file(model.state_dict(), path)
    return path


def create(*words: object, classes: int = 10, channels: int = 3) -> nn.Module:
    return created(options(*words, base=[]), classes, channels)


class TestPretrainedPath:
    @pytest.mark.parametrize("decor", [[], ["--decor"]])
    @pytest.mark.parametrize("classes", [10, 7])
    def test_all_but_the_head_is_taken(self, checkpoint: Path, decor: list[str], classes: int):
        model = create("--model", "test_resnet", *decor, "--pretrained-path", checkpoint, classes=classes)
        saved = load_file(checkpoint)
        for key, value in model.state_dict().items():
            if not head_of(key):
                assert torch.equal(value, saved[key]), key
        assert build.class_count(model) == classes and model.fc.weight.shape[0] == classes
        if classes == 7:  # timm's meaning: the head is new even then
            assert not torch.equal(model.fc.weight, saved["fc.weight"])
        assert not model.pretrained_cfg.get("state_dict")

    def test_a_registered_twin_takes_it(self, tmp_path: Path):
        saved = timm.create_model("resnet18", num_classes=3).state_dict()
        save_file(saved, tmp_path / "r18.safetensors")
        model = create("--model", "decor_resnet18", "--pretrained-path", tmp_path / "r18.safetensors")
        assert isinstance(model.layer4[1].conv2, timm_decor.DecorConv2d)
        assert all(torch.equal(v, saved[k]) for k, v in model.state_dict().items() if not head_of(k))

    def test_colours_become_grey(self, checkpoint: Path):
        model = create("--model", "test_resnet", "--pretrained-path", checkpoint, channels=1)
        first = "conv1.weight" if "conv1.weight" in model.state_dict() else "conv1.0.weight"
        torch.testing.assert_close(model.state_dict()[first], load_file(checkpoint)[first].sum(1, keepdim=True))

    def test_averaged_weights_first_as_timm_does(self, tmp_path: Path):
        plain, averaged = (timm.create_model("test_resnet").state_dict() for _ in range(2))
        torch.save({"state_dict": plain, "state_dict_ema": averaged}, tmp_path / "both.pth")
        model = create("--model", "test_resnet", "--pretrained-path", tmp_path / "both.pth")
        assert torch.equal(model.layer1[0].conv1.weight, averaged["layer1.0.conv1.weight"])

    def test_refusals(self, checkpoint: Path, tmp_path: Path):
        def refuse(match: str, path: Path) -> None:
            with pytest.raises(UserError, match=match) as caught:
                create("--model", "test_resnet", "--pretrained-path", path)
            assert "\n" not in str(caught.value)

        refuse("no checkpoint file", tmp_path / "absent.pth")
        (tmp_path / "text.pth").write_text("hello")
        refuse("is not a checkpoint", tmp_path / "text.pth")
        torch.save({"state_dict": {}}, tmp_path / "empty.pth")
        refuse("holds no tensors", tmp_path / "empty.pth")
        saved = load_file(checkpoint)
        torch.save({k: v for k, v in saved.items() if "layer3.0.conv2" not in k}, tmp_path / "less.pth")
        refuse("does not fit test_resnet: it has no 'layer3.0.conv2.weight'", tmp_path / "less.pth")
        torch.save(saved | {"layer9.weight": torch.zeros(1)}, tmp_path / "more.pth")
        refuse("does not fit test_resnet: the model has no 'layer9.weight'", tmp_path / "more.pth")
        torch.save(saved | {"layer1.0.conv1.weight": torch.zeros(1)}, tmp_path / "shape.pth")
        refuse("cannot create test_resnet: .*size mismatch for layer1.0.conv1.weight", tmp_path / "shape.pth")

    def test_checkpoints_from_before_batchnorm_counted(self, checkpoint: Path, tmp_path: Path):
        saved = {k: v for k, v in load_file(checkpoint).items() if not k.endswith("num_batches_tracked")}
        torch.save(saved, tmp_path / "ancient.pth")
        model = create("--model", "test_resnet", "--pretrained-path", tmp_path / "ancient.pth")
        assert torch.equal(model.bn1.running_var, saved["bn1.running_var"])

    def test_families_that_rename_keys_are_left_to_timm(self, tmp_path: Path):
        saved = timm.create_model("test_vit", num_classes=5).state_dict()
        saved["mask_token"] = torch.zeros(1, 64)  # DINOv2's, which timm drops
        torch.save({"model": saved}, tmp_path / "vit.pth")
        model = create("--model", "test_vit", "--pretrained-path", tmp_path / "vit.pth")
        assert torch.equal(model.blocks[0].attn.qkv.weight, saved["blocks.0.attn.qkv.weight"])


class TestFreeze:
    @pytest.fixture(scope="class")
    @staticmethod
    def run(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Both sides of a comparison with momentum and weight decay, an averaged model beside each."""
        words = (*DECOR, "--compare", "--pretrained-path", checkpoint, "--freeze", *FROZEN, "--epochs", 1)
        words += ("--momentum", 0.9, "--weight-decay", 0.1, "--model-ema", "--model-ema-decay", 0.5)
        return train(tmp_path_factory.mktemp("runs") / "frozen", *words)

    @pytest.mark.parametrize("side", ["decorrelated", "plain"])
    @pytest.mark.parametrize("name", ["last", "last-ema"])
    def test_frozen_parts_stay_bit_equal_and_the_rest_moves(self, checkpoint: Path, run: Path, side: str, name: str):
        before, after = load_file(checkpoint), load_file(run / side / f"{name}.safetensors")
        assert before.keys() == after.keys()
        for key in before:
            if key.startswith(tuple(f"{part}." for part in FROZEN)):
                assert torch.equal(after[key], before[key]), key
            elif not head_of(key):
                assert not torch.equal(after[key], before[key]), key

    @pytest.mark.parametrize("side", ["decorrelated", "plain"])
    def test_the_checkpoint_loads_into_the_plain_model(self, run: Path, side: str):
        timm.create_model("test_resnet", num_classes=10).load_state_dict(weights(run / side), strict=True)
        build.load_weights(create("--model", "test_resnet"), str(run / side / "last.safetensors"))

    def test_frozen_layers_have_no_r(self, run: Path):
        layers = json.loads((run / "decorrelated" / "results.json").read_text())["layers"]
        names = [layer["name"] for layer in layers]
        assert names and not any(name.startswith(FROZEN) for name in names)

    def test_results_name_no_file_of_this_machine(self, run: Path, checkpoint: Path):
        for file in (run / "compare.json", run / "decorrelated" / "results.json"):
            assert str(checkpoint) not in file.read_text() and str(run.parent) not in file.read_text()

    def test_it_can_be_resumed(self, run: Path, checkpoint: Path, tmp_path: Path):
        folder = tmp_path / "copy"
        shutil.copytree(run, folder)
        train(folder, "--resume", folder, "--epochs", 2, base=[])
        before, middle = load_file(checkpoint), weights(run / "decorrelated")
        after = weights(folder / "decorrelated")
        assert torch.equal(after["bn1.running_mean"], before["bn1.running_mean"])
        assert not torch.equal(after["layer4.0.conv1.weight"], middle["layer4.0.conv1.weight"])

    def test_the_frozen_part_computes_the_same_in_training_mode(self):
        model = create("--model", "test_resnet", "--freeze", *FROZEN)
        x = torch.randn(4, 3, 32, 32)
        part = nn.Sequential(*(model.get_submodule(name) for name in FROZEN))
        with torch.no_grad():
            assert torch.equal(part.train()(x), part.eval()(x))
        twin = build.plain_twin(model).train()
        assert not twin.bn1.training and twin.layer2[0].bn1.training and not copy.deepcopy(twin).train().bn1.training

    def test_names_may_be_nested_and_overlap(self):
        model = create("--model", "test_resnet", "--freeze", "layer1", "layer1.0", "layer2.0.bn1")
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert {"bn1.weight", "layer2.0.conv1.weight", "layer2.0.bn2.weight", "fc.weight"} <= trained
        assert not any(name.startswith(("layer1.", "layer2.0.bn1.")) for name in trained)
        model.train()
        assert model.layer2[0].bn2.training and not model.layer2[0].bn1.training
        assert create("--model", "test_resnet").bn1.training  # other models' BatchNorm is as it was

    def test_refusals(self):
        with pytest.raises(UserError, match="^--freeze: test_resnet has no 'layer11'; near: layer1"):
            create("--model", "test_resnet", "--freeze", "layer11")
        with pytest.raises(UserError, match="^--freeze: test_resnet has no 'xyz'; it has: conv1, bn1, .*, fc$"):
            create("--model", "test_resnet", "--freeze", "xyz")
        with pytest.raises(UserError, match="nothing to train"):
            create("--model", "test_resnet", "--freeze", *FROZEN, "layer2", "layer3", "layer4", "fc")

    def test_only_the_head_may_be_left(self, checkpoint: Path, tmp_path: Path):
        words = (*DECOR, "--pretrained-path", checkpoint, "--epochs", 1)
        after = weights(train(tmp_path / "head", *words, "--freeze", *FROZEN, "layer2", "layer3", "layer4"))
        before = load_file(checkpoint)
        assert all(torch.equal(after[key], before[key]) for key in before if not head_of(key))


class TestLayerDecay:
    def optimizer(self, *words: object) -> tuple[nn.Module, torch.optim.Optimizer]:
        given = options("--model", "test_resnet", "--warmup-epochs", 0, *words, base=[])
        model = created(given)
        optimizer = make_optimizer(given.optimizer, model, 1.0)
        Schedule(given.schedule, optimizer, 10, given.optimizer.layer_decay, "top1", seed=0)
        return model, optimizer

    def test_earlier_layers_learn_more_slowly(self):
        model, optimizer = self.optimizer("--layer-decay", 0.5, "--sched", "constant")
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        chain = [model.layer1[0].conv1, model.layer2[0].conv1, model.layer3[0].conv1, model.layer4[0].conv1, model.fc]
        found = [rates[id(layer.weight)] for layer in chain]
        assert found[-1] == 1 and found == sorted(set(found))

    def test_it_leaves_frozen_parts_out(self):
        model, optimizer = self.optimizer("--layer-decay", 0.5, "--freeze", *FROZEN)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in model.parameters() if p.requires_grad}

    def test_a_decorrelated_run(self, checkpoint: Path, tmp_path: Path):
        words = (*DECOR, "--pretrained-path", checkpoint, "--layer-decay", 0.5, "--epochs", 1, "--freeze", "conv1")
        after = weights(train(tmp_path / "run", *words))
        assert all(value.isfinite().all() for value in after.values())

    def test_without_a_schedule_it_is_refused(self):
        with pytest.raises(UserError, match="--layer-decay does nothing with --sched none"):
            self.optimizer("--layer-decay", 0.5, "--sched", "none")
        self.optimizer("--layer-decay", 1, "--sched", "none")
