#!/usr/bin/env python3
"""Evaluate a checkpoint, or timm's pretrained weights: see `validate.py --help`."""

import sys

from timm_decor_door import enter

if __name__ == "__main__":
    sys.exit(enter("validate.py", "validate"))
