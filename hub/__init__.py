"""Publishing: from a training output to a repository on the Hugging Face Hub. `python -m hub.publish --help`."""
