"""Training and validation on Accelerate: what train.py and validate.py are made of.

Not imported by `import timm_decor`: the engine works without Accelerate.
"""
