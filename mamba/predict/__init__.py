"""What does a trained model say of images that it has not seen? Predictions, how many are right, other formats."""
