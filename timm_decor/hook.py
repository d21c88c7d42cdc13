"""The door to scripts/hook.py: `--device-modules timm_decor.hook` switches decorrelation on in timm's own train.py."""

import sys

import timm_decor
from timm_decor.scripts import hook
from timm_decor.scripts.hook import handles

__all__ = ["handles"]  # for type checkers, which do not follow the line below

# One module under both names: what a script reaches by this one is the state that counts.
sys.modules[__name__] = timm_decor.hook = hook  # type: ignore[attr-defined]
