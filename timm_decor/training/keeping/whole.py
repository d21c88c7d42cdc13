"""States as whole tensors: under FSDP2 what is cut over processes is put together to be written, and cut again to load.

So a file is the same whoever wrote it: one process or several, sharded or not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from timm_decor.engine import shards
from timm_decor.errors import UserError


def whole_weights(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """A model's state. Collective where it is sharded.

    Args:
        model: the model.
        keep: whether this process wants it; another one has the names alone of what it helped to put together.
    """
    return _whole(model.state_dict(), keep)  # type: ignore[no-any-return]


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load a whole state into a model; each process takes its share."""
    own = model.state_dict()
    model.load_state_dict(
        {key: shards.share(value, own[key]) if shards.is_cut(own[key]) else value for key, value in weights.items()}
    )


def whole_optimizer(optimizer: Optimizer, keep: bool) -> dict[str, Any]:
    """An optimizer's state; arguments as for `whole_weights`. Collective where its weights are sharded.

    Raises:
        UserError: a share has another shape than the weight's, and could not be cut again.
    """
    state = optimizer.state_dict()
    for parameter, entry in _entries(optimizer, state):
        for name, value in entry.items():
            if isinstance(value, Tensor) and shards.is_cut(value) and value.shape != parameter.shape:
                raise UserError(f"{type(optimizer).__name__} keeps shares ({name}) that are not shaped like a weight: "
                                f"its state cannot be saved under FSDP2")  # fmt: skip
    return _whole(state, keep)  # type: ignore[no-any-return]


def load_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load a whole state into an optimizer; each process takes its share.

    Raises:
        ValueError, KeyError, RuntimeError: as the optimizer does.
    """
    entries: dict[Any, Any] = dict(state["state"])
    for (parameter, entry), key in zip(_entries(optimizer, state), _keys(state), strict=True):
        if shards.is_cut(parameter) and entry:
            entries[key] = {
                name: shards.share(value, parameter)
                if isinstance(value, Tensor) and value.shape == parameter.shape
                else value
                for name, value in entry.items()
            }
    optimizer.load_state_dict({**state, "state": entries})


def refuse_own_weights(model: nn.Module) -> None:
    """Refuse a sharded model of which each process trains some weights by itself.

    Raises:
        UserError: names one.
    """
    own = [name for name, p in model.named_parameters() if p.requires_grad and not shards.is_cut(p)]
    if own:
        raise UserError(f"fsdp_ignored_modules leaves {own[0]} to each process, whose gradients are not averaged: "
                        f"--freeze it, or do not ignore it")  # fmt: skip


def _keys(state: Mapping[str, Any]) -> list[Any]:
    return [key for group in state["param_groups"] for key in group["params"]]


def _entries(optimizer: Optimizer, state: Mapping[str, Any]) -> list[tuple[Tensor, Mapping[str, Any]]]:
    """Each parameter with what a state has of it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [(p, state["state"].get(key, {})) for p, key in zip(parameters, _keys(state), strict=True)]


def _whole(tree: Any, keep: bool) -> Any:
    if isinstance(tree, Mapping):
        return {key: _whole(value, keep) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_whole(value, keep) for value in tree)
    if not isinstance(tree, Tensor) or not shards.is_cut(tree):
        return tree
    together = tree.full_tensor()  # type: ignore[attr-defined]  # by all processes, in the order of the state
    return together.cpu() if keep else None
