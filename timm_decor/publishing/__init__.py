"""Publishing: from a training output to a repository on the Hugging Face Hub.

Read in this order: trained.py (what train.py left), repository.py (the files), card.py and card.md.j2 (the model card),
datasets.py (what a card says of the data), upload.py (the one commit), publish.py (the command). space.py is the demo.
"""
