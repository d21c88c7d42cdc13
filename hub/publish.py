"""Publish what train.py trained: python -m hub.publish OUTPUT --repo-id OWNER/NAME."""

import sys

from timm_decor_door import enter

if __name__ == "__main__":
    sys.exit(enter("hub.publish", "publish"))
