"""The registry: importing this package gives timm a `decor_<name>` for every model of the families in families.py."""

from timm_decor.models._factory import PREFIX, plain_name, register_decorrelated, register_family
from timm_decor.models.families import FAMILIES, Family

__all__ = ["FAMILIES", "PREFIX", "Family", "plain_name", "register_decorrelated"]

for _family in FAMILIES:
    globals()["decor_" + _family.module] = register_family(_family)
