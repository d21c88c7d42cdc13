"""The rules that move R: a class each, with its knobs, its statistics and its mathematics, and a row in `RULES`."""

from __future__ import annotations

from timm_decor.rules.base import Rule, of_layers
from timm_decor.rules.crgd import Crgd
from timm_decor.rules.dbp import Dbp
from timm_decor.rules.whiten import Whiten

__all__ = ["RULES", "Rule", "of_layers"]

RULES: dict[str, type[Rule]] = {rule.name: rule for rule in (Whiten, Dbp, Crgd)}
