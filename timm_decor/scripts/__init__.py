"""Decorrelation in scripts that know nothing of it, and the zoo as a table: what `python -m timm_decor.*` runs."""
