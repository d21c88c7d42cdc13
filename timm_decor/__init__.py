"""timm_decor: decorrelated backpropagation (arXiv 2405.02385) for timm.

    import timm, timm_decor

    model = timm.create_model("decor_resnet18", num_classes=10)
    optimizer = timm.optim.create_optimizer_v2(model, opt="sgd", lr=0.4, momentum=0.9)
    handle = timm_decor.attach(model, optimizer)  # from here every optimizer.step() is a decorrelated step

Importing this package registers the `decor_*` models with timm.
"""

import timm.optim  # noqa: F401  # `import timm` alone does not give `timm.optim`, which the lines above use

from timm_decor.config import DecorConfig
from timm_decor.convert import decorrelate, to_plain
from timm_decor.engine.attach import attach
from timm_decor.engine.handle import DecorHandle
from timm_decor.layers import DecorConv2d, DecorConv2dSame, DecorLinear, DecorTimmLinear
from timm_decor.version import __version__

from timm_decor import models  # isort: skip  # last: registration builds on everything above
from timm_decor.models import register_decorrelated  # isort: skip

__all__ = [
    "DecorConfig",
    "DecorConv2d",
    "DecorConv2dSame",
    "DecorHandle",
    "DecorLinear",
    "DecorTimmLinear",
    "__version__",
    "attach",
    "decorrelate",
    "models",
    "register_decorrelated",
    "to_plain",
]


def __dir__() -> list[str]:
    """The public names alone: the rooms behind them may move."""
    return sorted(__all__)
