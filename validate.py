#!/usr/bin/env python3
"""Evaluate a checkpoint, or timm's pretrained weights: see `validate.py --help`."""

import sys

from timm_decor.errors import exit_code
from timm_decor.training.validation import main

if __name__ == "__main__":
    sys.exit(exit_code("validate.py", main))
