"""The engine: a model's layers bound to an optimizer, steps on W = L^-1 A R^-1 while the weight is A, refreshes."""
