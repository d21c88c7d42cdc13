"""The door to scripts/run.py: python -m timm_decor.run SCRIPT [ARGS ...]."""

import sys

from timm_decor.scripts.run import USAGE, main

__all__ = ["USAGE", "main"]

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
