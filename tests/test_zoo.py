"""One member of each family learns, and is the plain model afterwards; the table of the zoo is made from the code."""

from __future__ import annotations

import argparse
import copy
import re
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import timm_decor
from timm_decor import list as zoo
from timm_decor.errors import UserError
from timm_decor.models import FAMILIES, PREFIX, Family
from timm_decor.scripts import zoo as zoo_module

IDS = [family.module for family in FAMILIES]

# Smaller than the published members where those take long on one core; the same code paths.
KWARGS: dict[str, dict[str, object]] = {
    "vgg": {"mlp_ratio": 1 / 16},
    "vision_transformer": {"img_size": 64, "patch_size": 8, "depth": 4},
    "deit": {"img_size": 64, "depth": 4},
    "mlp_mixer": {"img_size": 64, "mlp_ratio": (0.5, 1.0)},
    "swin_transformer": {"img_size": 64, "window_size": 4, "depths": (1, 1, 2, 1), "embed_dim": 48},
}
SIZE = {name: 32 for name in ("resnet", "vgg", "regnet", "densenet", "efficientnet")}  # pixels; others: 64


def small_member(family: Family) -> nn.Module:
    return timm.create_model(PREFIX + family.example, num_classes=4, **KWARGS.get(family.module, {}))


@pytest.mark.parametrize("family", FAMILIES, ids=IDS)
def test_a_member_of_each_family_learns_and_comes_back_plain(family: Family) -> None:
    """30 decorrelated steps: the loss falls, every R moved, and `to_plain` keeps the function."""
    torch.manual_seed(1)
    model = small_member(family)
    size = SIZE.get(family.module, 64)
    images, labels = torch.randn(8, 3, size, size), torch.arange(8) % 4
    images += labels.view(-1, 1, 1, 1) / 2  # something that can be learned
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=1e-3)
    config = timm_decor.DecorConfig(every=6)
    handle = timm_decor.attach(model, optimizer, config)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.8 * losses[0], losses
    report = handle.report()
    assert len(report.rows) == len(model.decor_report.decorrelated)
    assert all((row.refreshes, row.skips) == (5, 0) for row in report.rows), str(report)
    before, after = report.mean_correlation()  # type: ignore[misc]
    assert after < before

    model.eval()
    with torch.no_grad():
        expected = model(images)
        handle.detach()
        plain = timm_decor.to_plain(copy.deepcopy(model))
        assert torch.equal(plain(images), expected)
    assert not any("Decor" in type(module).__name__ for module in plain.modules())
    assert plain.pretrained_cfg["architecture"] == family.example  # type: ignore[index]


@pytest.mark.parametrize("family", FAMILIES, ids=IDS)
def test_twins_have_the_function_of_timms_model(family: Family) -> None:
    kwargs = {"num_classes": 4, **KWARGS.get(family.module, {})}
    twin, plain = (timm.create_model(name, **kwargs).eval() for name in (PREFIX + family.example, family.example))
    plain.load_state_dict(twin.state_dict(), strict=True)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(twin(x), plain(x))


def test_list_has_a_row_for_each_family(capsys: pytest.CaptureFixture[str]) -> None:
    zoo.main([])
    table, _, notes = capsys.readouterr().out.partition("\n\n")
    rows = [re.split(r"  +", line.strip()) for line in table.splitlines()[2:]]
    for family, cells in zip(FAMILIES, rows, strict=True):
        assert cells[0] == f"{PREFIX}{family.module}: {family.example}"
        assert cells[1] == str(len(timm.list_models(module=PREFIX + family.module)))
    plain = {cells[0].split(":")[0]: cells[5] for cells in rows}
    assert plain["decor_resnet"] == "-" and re.fullmatch(r"\d+ a, \d+ b", plain["decor_mobilenetv3"])
    letters = {word[-1] for cell in plain.values() for word in cell.split(", ")} - {"-"}
    assert [line[:4] for line in notes.splitlines()] == [f"({letter}) " for letter in sorted(letters)]


def test_list_of_models(capsys: pytest.CaptureFixture[str]) -> None:
    zoo.main(["--markdown", "decor_resnet18", "resnet10t"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == ["model", "---", "decor_resnet10t", "decor_resnet18"]
    zoo.main(["--markdown", "decor_resnet18.whiten_cifar10_r64", "resnet10t.c3_in1k"])
    assert [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()] == rows
    report = timm.create_model("decor_resnet18").decor_report
    assert rows[3][1:3] == ["11.7", "21"]
    assert float(rows[3][3]) == pytest.approx((report.bytes + report.moment_bytes) / 2**20, abs=0.05)


def test_reasons_have_letters_that_no_table_takes_for_its_own():
    notes, row = zoo_module.Notes(), argparse.Namespace
    marks = [notes.marked(row(plain=[row(plain_reason=f"reason {n}")] * 2)) for n in (*range(28), 1)]
    assert marks[0] == "2 a" and marks[25:] == ["2 z", "2 aa", "2 bb", "2 b"]
    assert notes.lines()[26] == "(aa) reason 26"


def test_page_of_a_family(tmp_path: Path) -> None:
    zoo.main(["decor_vgg11", "--page", str(tmp_path / "zoo.md")])
    text = (tmp_path / "zoo.md").read_text()
    assert all(f"| `{name}` |" in text for name in timm.list_models(module="decor_vgg"))
    assert "decor_resnet" not in text


@pytest.mark.parametrize("name", ["decor_resnet18", "resnet18"])
def test_list_of_layers(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    zoo.main(["--layers", name])
    out = capsys.readouterr().out
    assert out.startswith("decor_resnet18\n") and "layer1.0.conv1" in out


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("resnet81", "^'resnet81' is no model that has a twin; near: decor_resnet"),
        ("beit_base_patch16_224", "^'beit_base_patch16_224' is a model of timm without a twin"),
        ("nothing*", "; all of them: 'decor_.'$"),
    ],
)
def test_list_of_nothing(word: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        zoo.main([word])


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^cannot write .*zoo.md: No such file or directory$"):
        zoo.main(["vgg11", "--page", str(tmp_path / "no" / "zoo.md")])
