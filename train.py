#!/usr/bin/env python3
"""Train an image classifier, decorrelated or plain: see `train.py --help` and recipes/."""

import sys

from timm_decor.errors import exit_code
from timm_decor.training.run import main

if __name__ == "__main__":
    sys.exit(exit_code("train.py", main))
