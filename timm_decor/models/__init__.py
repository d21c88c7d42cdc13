"""The registry: importing this package gives timm a `decor_<name>` for every twin listed in its modules."""

from timm_decor.models import decor_resnet as decor_resnet
from timm_decor.models._factory import PREFIX, plain_name

__all__ = ["PREFIX", "plain_name"]
