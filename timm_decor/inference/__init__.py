"""What a trained model says of images that have no labels."""
