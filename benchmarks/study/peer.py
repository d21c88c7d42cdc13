"""The authors' public code (github artcogsys/decorbp) as an arm, run from a folder that the user names.

Its license, CC BY-NC 4.0, lets nobody ship it with this project: it is imported where it lies, and called as its own
training loop calls it: `bp2decor` converts the model, and after each optimizer step `decor_update` updates every R. The
settings are those of its experiments/config/CIFAR10_RESNET18.txt.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

from torch import nn

from timm_decor.errors import UserError, first_line

SETTINGS = {"decor_lr": 1e-4, "kappa": 0.01, "downsample_perc": 0.1, "method": "standard"}


class Peer:
    """The authors' package.

    Args:
        path: a checkout of it.

    Raises:
        UserError: it cannot be imported from there.
    """

    def __init__(self, path: Path) -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "decorbp"]:
            del sys.modules[name]
        # Its modules import each other as `decorbp.…`, whatever the folder is called.
        package = types.ModuleType("decorbp")
        package.__path__ = [str(path)]
        sys.modules["decorbp"] = package
        try:
            self._layers: Any = importlib.import_module("decorbp.decorrelation.decorrelation")
            self._experiments: Any = importlib.import_module("decorbp.experiments.experiments")
        except (ImportError, SyntaxError) as error:
            raise UserError(f"--peer-path {path}: no checkout of artcogsys/decorbp: {first_line(error)}") from error

    def convert(self, model: nn.Module) -> nn.Module:
        """Give every convolution and linear layer its R.

        Raises:
            UserError: a layer that this code would take for another: it knows no groups, and drops a kernel's bias.
        """
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Conv2d) and (layer.groups > 1 or layer.bias is not None):
                what = f"{layer.groups} groups" if layer.groups > 1 else "a bias"
                raise UserError(f"the authors' code would ignore that convolution {name} has {what}")
        converted: nn.Module = self._experiments.bp2decor(model, **SETTINGS)
        return converted

    def layers(self, model: nn.Module) -> list[Any]:
        """The converted layers, for `update`."""
        found: list[Any] = self._layers.decor_modules(model)
        return found

    def update(self, layers: list[Any]) -> None:
        """One update of every R, after the optimizer's step."""
        self._layers.decor_update(layers)


def describe(layers: list[Any]) -> str:
    """How many layers of what kind are decorrelated: `20 DecorConv2d (7 of them 1x1 or strided), 1 DecorLinear`."""
    kinds = Counter(type(layer).__name__ for layer in layers)
    special = sum(
        layer.stride not in (1, (1, 1)) or layer.kernel_size in (1, (1, 1))
        for layer in layers
        if hasattr(layer, "kernel_size")
    )
    notes = {"DecorConv2d": f" ({special} of them 1x1 or strided)"}
    return ", ".join(f"{count} {kind}{notes.get(kind, '')}" for kind, count in kinds.items())
