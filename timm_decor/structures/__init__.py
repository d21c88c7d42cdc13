"""How R and L are stored, applied and refreshed; pure. A structure is a class, and a row in `STRUCTURES`."""

from __future__ import annotations

from timm_decor.structures.base import Structure
from timm_decor.structures.dense import FullR, SpaceR
from timm_decor.structures.kronecker import KroneckerR
from timm_decor.structures.outputs import SCALE, NoOutputs, OutputL, Sides, has_outputs, is_of_outputs

__all__ = ["SCALE", "STRUCTURES", "NoOutputs", "OutputL", "Sides", "Structure", "has_outputs", "is_of_outputs"]

STRUCTURES: dict[str, type[Structure]] = {kind.name: kind for kind in (FullR, KroneckerR, SpaceR)}
