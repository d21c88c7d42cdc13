"""What people do to a model after `attach`: layers that are unfrozen, frozen, added, weights that are replaced.

Followed, or said once.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from timm_decor.convert import convertible, decor_layers
from timm_decor.layers import DecorLayer

_logger = logging.getLogger(__name__)


class Watch:
    """The layers of a model that are not attached.

    Args:
        model: as it was given to `attach`.
        optimizer: that the model is attached to.
        attached: (name, layer) of the attached layers; the handle's own list, which grows.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, attached: Sequence[tuple[str, DecorLayer]]) -> None:
        self._model, self._optimizer, self._attached = model, optimizer, attached
        self._known = {id(module) for module in model.modules()}
        self._told: set[str] = set()
        self._frozen = self._not_attached()

    def unfrozen(self) -> list[tuple[str, DecorLayer]]:
        """Layers that were frozen and have a gradient now, to be attached. Mostly there is none to look at."""
        ready = [(name, layer) for name, layer in self._frozen if layer.weight.grad is not None]
        if not ready:
            return []
        held = self._held()
        for name, layer in ready:
            if id(layer.weight) not in held:
                self._tell(name, "it has a gradient, and the attached optimizer does not hold its weight")
        ready = [(name, layer) for name, layer in ready if id(layer.weight) in held]
        self.taken_in(ready)
        return ready

    def held_back(self) -> list[tuple[str, DecorLayer]]:
        """Layers that are not attached, because they were frozen, and whose weights the optimizer holds."""
        held = self._held()
        return [(name, layer) for name, layer in self._frozen if id(layer.weight) in held]

    def taken_in(self, layers: Sequence[tuple[str, DecorLayer]]) -> None:
        """Those are attached from now on."""
        taken = {id(layer) for _, layer in layers}
        self._frozen = [(name, layer) for name, layer in self._frozen if id(layer) not in taken]

    def replaced(self, weights: Mapping[str, Tensor]) -> None:
        """Say of attached layers whose weight the optimizer does not hold any more: it is another parameter now.

        Args:
            weights: of the attached layers, by name.
        """
        held = self._held()
        for name, weight in weights.items():
            if id(weight) not in held:
                self._tell(name, "its weight was replaced after attach, and the attached optimizer does not hold it")

    def look(self) -> None:
        """Say of layers that came or were frozen since, once each; at a refresh, because it walks over the model."""
        for name, module in self._model.named_modules():
            if id(module) not in self._known and convertible(module):
                self._tell(name, "it came after attach; to take it in, call detach() and attach again")
        for name, layer in self._attached:
            if not layer.weight.requires_grad:
                self._tell(name, "it was frozen after attach: it keeps its R")

    def outside(self) -> None:
        """The weights move, and no step ends: the attached optimizer is not the one that steps."""
        kind = type(self._optimizer).__name__
        self._tell("", f"the weights move, but step() of the attached {kind} is not called: training is plain")

    def _held(self) -> set[int]:
        return {id(p) for group in self._optimizer.param_groups for p in group["params"]}

    def _not_attached(self) -> list[tuple[str, DecorLayer]]:
        mine = {id(layer) for _, layer in self._attached}
        return [(name, layer) for name, layer in decor_layers(self._model) if id(layer) not in mine]

    def _tell(self, name: str, why: str) -> None:
        if name not in self._told:
            self._told.add(name)
            _logger.warning("%s%s", f"layer {name} is plain: " if name else "", why)
