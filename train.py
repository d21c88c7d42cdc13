#!/usr/bin/env python3
"""Train an image classifier, decorrelated or plain: see `train.py --help` and recipes/."""

import sys

from timm_decor_door import enter

if __name__ == "__main__":
    sys.exit(enter("train.py", "train"))
