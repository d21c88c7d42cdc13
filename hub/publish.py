"""The door to timm_decor/publishing/: python -m hub.publish OUTPUT --repo-id OWNER/NAME."""

import sys

from timm_decor.errors import exit_code
from timm_decor.publishing.publish import main

if __name__ == "__main__":
    sys.exit(exit_code("hub.publish", main))
