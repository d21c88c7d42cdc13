"""What the benchmark scripts share: images, networks, the training loop, result files, the protocol's arithmetic."""
