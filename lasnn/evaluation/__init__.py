"""What a trained network does on test images, and conversion without training as the baseline."""
