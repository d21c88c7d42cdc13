"""The door to scripts/zoo.py: python -m timm_decor.list ['decor_resnet*'] [--layers]."""

import sys

from timm_decor.errors import exit_code
from timm_decor.scripts.zoo import main

if __name__ == "__main__":
    sys.exit(exit_code("timm_decor.list", main))
