#!/usr/bin/env python3
"""Evaluate a checkpoint, or timm's pretrained weights: see `validate.py --help`."""

import sys

from door import enter

if __name__ == "__main__":
    sys.exit(enter("validate.py", "validate_parser", "timm_decor.training.validation"))
