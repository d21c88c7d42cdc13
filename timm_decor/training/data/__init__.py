"""Which images, with which labels, in which order: sources, the data sets that name them, loaders."""
