"""The project's own weights (staged/), and the door to timm_decor/publishing/: `python -m hub.publish --help`."""
