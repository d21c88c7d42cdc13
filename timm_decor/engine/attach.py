"""attach(model, optimizer): binds a decorrelated model to its optimizer, in the merged view.

The model's parameter is always A = W R, an ordinary kernel; forward and backward never see R. Each `optimizer.step()`
becomes a step on W (see coordinates.py), inside of everybody else's hooks (hooks.py), and as a whole or not at all
(flight.py):

    before:  gradient <- gradient R^T,  parameter <- W = A R^-1
    after:   parameter <- A + (W_after - W) R;  every `every` steps R <- rule(R, statistics)

which is exactly the step of explicit modules z = R x, y = W z (tests/test_equivalence.py). Where the outputs are
decorrelated as well, y = L W z, and the same holds with L^T gradient R^T and L W R.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import Optimizer

from timm_decor.config import DecorConfig
from timm_decor.convert import any_attached, decor_layers, reconverted, report_kept_on_error
from timm_decor.engine import shards
from timm_decor.engine.checkpoint import STATE_KEY
from timm_decor.engine.handle import DecorHandle, attached_optimizers
from timm_decor.engine.optimizers import check_held, innermost
from timm_decor.engine.probe import refuse
from timm_decor.layers import REPLICAS

_logger = logging.getLogger(__name__)

# Called first, with the model and the innermost optimizer: who attached on a script's behalf gives way to its own call.
giving_way: list[Callable[[nn.Module, Optimizer], None]] = []


def attach(model: nn.Module, optimizer: Optimizer, config: DecorConfig | None = None) -> DecorHandle:
    """Make every `optimizer.step()` from now on a decorrelated step of the model.

    R starts as the identity, so that the first step is a plain one. The state (R and its statistics) travels in
    `optimizer.state_dict()` under the key "timm_decor". Gradients are back to autograd's own after each step, and
    whoever looks at the weights, in hooks too, sees kernels.

    A layer whose statistics cannot be used (all zero, not finite, no input in training mode) keeps its R: the refresh
    is skipped, counted in `report()` and, the first time, logged with its step and layer. Weights written from outside
    between steps (a checkpoint, EMA, Lookahead, `.data`) are followed. A closure is evaluated once, before the step. A
    step that fails, or that a gradient scaler skips, moves nothing and is not counted; nor is one at a learning rate of
    zero, or without a single gradient.

    Args:
        model: a model that went through `decorrelate` (every `decor_*` model has); DDP and torch.compile may wrap it,
            and fully_shard (FSDP2) may have cut its weights: then all processes attach together.
        optimizer: a `torch.optim.Optimizer`; Accelerate's, Lightning's, timm's and torch's wrappers are fine.
        config: that given to `decorrelate` (or to an earlier attach) if None.

    Returns:
        A handle with `report()` and `detach()`.

    Raises:
        ValueError: no decorrelated layer, attached twice, weights in other pieces than rows (FSDP1, DeepSpeed, tensor
            parallel), an optimizer that does not hold the layers' weights, that loaded its state before, that keeps
            weights in its state (MADGRAD, ASGD), needs second derivatives or evaluates a closure several times
            (L-BFGS).
    """
    inner = innermost(optimizer)
    for give_way in giving_way:
        give_way(model, inner)
    if any(isinstance(module, nn.DataParallel) for module in model.modules()):
        raise ValueError(REPLICAS)
    shards.refuse_kinds(model)
    if inner in attached_optimizers or any_attached(layer for _, layer in decor_layers(model)):
        raise ValueError("already attached: call detach() on the first handle before attaching again")
    if torch.__version__ < (2, 5):  # type: ignore[operator]
        # There torch.compile takes a module's attributes for constants unless told; `recording` changes with the steps.
        importlib.import_module("torch._dynamo").config.guard_nn_modules = True  # imported late: it takes seconds
    with report_kept_on_error(model):
        return _attach(model, inner, config)


def _attach(model: nn.Module, inner: Optimizer, config: DecorConfig | None) -> DecorHandle:
    config = reconverted(model, config).config
    trained = [(name, layer) for name, layer in decor_layers(model) if layer.weight.requires_grad]
    if not trained:
        raise ValueError("every decorrelated layer is frozen: nothing to attach")
    shards.put_back(model, trained)
    check_held(inner, trained)
    shards.check_cuts(trained)
    if any(STATE_KEY in inner.state.get(layer.weight, {}) for _, layer in trained):
        raise ValueError(
            "the optimizer loaded a decorrelated run's state before attach, and R of it is lost: attach first"
        )
    refuse(inner, (layer.weight for _, layer in trained))
    if "Muon" in type(inner).__name__:
        _logger.warning("decorrelated Muon ended below plain Muon in our measurements: compare it with plain training")
    return DecorHandle(model, inner, trained, config)
