"""`decor_resnet<depth><stem>`: the twins of timm's plain ResNets."""

from timm_decor.models._factory import register_twins, twin_cfgs

__all__: list[str] = []  # timm adds each entrypoint it registers

_NAMES = (
    *("resnet10t", "resnet14t"),
    *("resnet18", "resnet18d"),
    *("resnet26", "resnet26d", "resnet26t"),
    *("resnet34", "resnet34d"),
    *("resnet50", "resnet50c", "resnet50d", "resnet50s", "resnet50t"),
    *("resnet101", "resnet101c", "resnet101d", "resnet101s"),
    *("resnet152", "resnet152c", "resnet152d", "resnet152s"),
    *("resnet200", "resnet200d"),
)

default_cfgs = twin_cfgs(_NAMES)
globals().update(register_twins(__name__, _NAMES))
